"""Zapping shadow pages: generations, roots in use, and how many pages there may be."""

from __future__ import annotations

import errno

import pytest

from kvm_model.mmu import shadow_zap
from kvm_model.mmu.mmu_roots import kvm_mmu_unload
from kvm_model.mmu.shadow_zap import kvm_mmu_available_pages, make_mmu_pages_available
from tests.kvm_model.direct_machine import direct, lines, populate, rmap
from tests.kvm_model.machine import BASE, PAGE, Machine
from tests.kvm_model.shadow_machine import DATA_GPA, PT_GPA, USER_4K, ShadowMachine
from tests.kvm_model.test_rmap import GiveWay

MIB2 = 2 << 20


def levels(m: Machine) -> list[int]:
    return [sp.level for sp in m.kvm.active_mmu_pages.values()]


def test_deleting_a_slot_zaps_all_pages_from_the_root_down_and_frees_all_but_the_root_in_use() -> None:
    m = direct()
    m.run(("w", 0, 1))
    mark = len(m.events)
    root = m.kvm.sps[m.vcpus[0].root_hpa >> 12]
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    fast = m.last("kvm_mmu_zap_all_fast").args
    assert fast == {"mmu_valid_gen": 0, "mmu_used_pages": 4}
    zapped = [e.args["role"] & 15 for e in m.events[mark:] if e.name == "kvm_mmu_prepare_zap_page"]
    assert zapped == [4, 3, 2, 1]
    assert lines(m, "spte_zap", "frame_free", since=mark)[:1] == ["spte_zap"]
    assert m.last("spte_zap").args["why"] == "zap-root"
    assert list(m.kvm.sps.values()) == [root]
    assert root.invalid
    assert m.kvm.mmu_valid_gen == 1
    assert m.kvm.stat["mmu_shadow_zapped"] == 4


@pytest.mark.parametrize(("profile", "left"), [("linux-6.18", 4), ("linux-5.10", 0)])
def test_obsolete_pages_go_ten_between_lock_breaks_and_in_5_10_all_at_once(profile: str, left: int) -> None:
    m = direct(profile=profile, pages=16 * 512, ram=32 << 20)
    m.run(*(("w", n * MIB2, 1) for n in range(12)))
    assert m.kvm.n_used_mmu_pages == 15
    seen: list[int] = []

    def other() -> None:
        while not m.kvm.mmu_valid_gen:
            m.sched.yield_()
        with m.kvm.mmu_lock:
            seen.append(len(m.kvm.active_mmu_pages))
            if seen[0]:
                # What is not zapped yet is found by its rmap, though no vCPU can reach it any more.
                assert rmap(m, 11 * 512)

    m.sched.set_strategy(GiveWay())
    update = m.sched.spawn("update", lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    m.finish(update, m.sched.spawn("other", other))
    # The root, which is in use, is not counted.
    assert seen == [left]
    m.truths.sweep()


def test_the_obsolete_root_goes_when_the_vcpu_drops_it_and_a_new_one_is_of_the_new_generation() -> None:
    m = direct()
    m.run(("w", 0, 1))
    old = m.vcpus[0].root_hpa
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE))
    flushes = m.cpu.flushes[0]
    assert m.run(("r", 0)) == [1]
    assert m.cpu.flushes[0] > flushes
    root = m.kvm.sps[m.vcpus[0].root_hpa >> 12]
    assert m.vcpus[0].root_hpa != old
    assert root.mmu_valid_gen == 1
    assert not root.invalid
    m.truths.sweep()


def test_a_valid_root_that_nobody_uses_stays_and_is_found_again() -> None:
    m = direct()
    m.run(("w", 0, 7))
    old = m.vcpus[0].root_hpa
    m.do(lambda: kvm_mmu_unload(m.vcpus[0]))
    assert m.kvm.sps[old >> 12].root_count == 0
    assert m.run(("r", 0)) == [7]
    assert m.vcpus[0].root_hpa == old


def test_a_vm_may_have_a_table_for_every_fifty_pages_and_64_at_least() -> None:
    m = direct(pages=64)
    assert m.kvm.n_max_mmu_pages == 64
    assert direct(pages=4000, ram=32 << 20).kvm.n_max_mmu_pages == 80
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert m.kvm.n_max_mmu_pages == 64


@pytest.mark.parametrize(("profile", "stays"), [("linux-6.18", False), ("linux-5.10", True)])
def test_with_too_many_tables_the_oldest_go_and_in_5_10_the_newest(profile: str, stays: bool) -> None:
    m = direct(profile=profile, pages=8 * 512, ram=32 << 20)
    populate(m, *(n * 512 for n in range(8)))
    m.run(*(("r", n * MIB2) for n in range(7)))
    assert levels(m) == [4, 3, 2, 1, 1, 1, 1, 1, 1, 1]
    m.kvm.n_max_mmu_pages = 14
    mark = len(m.events)
    m.run(("r", 7 * MIB2))
    # A refill zaps 25 pages less those that were free: here all but the root.
    assert m.kvm.stat["mmu_recycled"] == 9
    zapped = [e.args["role"] & 15 for e in m.events[mark:] if e.name == "kvm_mmu_prepare_zap_page"]
    assert zapped == ([1] * 7 + [2, 3] if stays else [3, 2] + [1] * 7)
    assert levels(m) == [4, 3, 2, 1]
    assert m.run(("r", 0)) == [1]
    m.truths.sweep()


def test_a_vm_whose_limit_leaves_no_room_for_a_table_cannot_run() -> None:
    m = direct()
    m.run(("r", 0))
    m.kvm.n_max_mmu_pages = 1

    def fault() -> int:
        with m.kvm.mmu_lock:
            return make_mmu_pages_available(m.kvm)

    assert m.do(fault) == -errno.ENOSPC
    assert kvm_mmu_available_pages(m.kvm) == 0


def test_lowering_the_limit_zaps_what_is_too_much() -> None:
    m = direct(pages=8 * 512, ram=32 << 20)
    populate(m, *(n * 512 for n in range(8)))
    m.run(*(("r", n * MIB2) for n in range(8)))
    m.do(lambda: shadow_zap.kvm_mmu_change_mmu_pages(m.kvm, 9))
    assert m.kvm.n_used_mmu_pages == 9
    assert m.kvm.n_max_mmu_pages == 9
    m.truths.sweep()


# -- shadow paging ------------------------------------------------------------------------------


def test_a_guest_with_more_tables_than_pages_for_them_runs_on_and_unsync_ones_go_with_their_parents() -> None:
    m = ShadowMachine(data=40 << 20, ram=96 << 20)
    m.kvm.n_max_mmu_pages = 12
    for table in range(20):
        gva = DATA_GPA + table * MIB2
        m.run(("w", gva, table + 1), ("w", PT_GPA + table * PAGE + 8 * 5, DATA_GPA | USER_4K))
    assert m.kvm.n_used_mmu_pages <= 12
    assert m.kvm.stat["mmu_recycled"] >= 20
    zapped = [e.args for e in m.events if e.name == "kvm_mmu_prepare_zap_page"]
    assert any(args["unsync"] for args in zapped)
    assert m.run(*(("r", DATA_GPA + table * MIB2) for table in range(20))) == list(range(1, 21))
    assert m.run(*(("r", DATA_GPA + table * MIB2 + 5 * PAGE) for table in range(20))) == [1] * 20
    assert m.truths is not None
    m.truths.sweep()


def test_lowering_the_limit_of_a_shadow_paging_guest_zaps_its_tables_but_no_root_in_use() -> None:
    m = ShadowMachine()
    m.run(("w", DATA_GPA, 7), ("w", PT_GPA + 8 * 5, DATA_GPA | USER_4K))
    m.do(lambda: shadow_zap.kvm_mmu_change_mmu_pages(m.kvm, 1))
    assert [sp.level for sp in m.kvm.sps.values()] == [4]
    assert m.kvm.stat["mmu_unsync"] == 0
    m.kvm.n_max_mmu_pages = 64
    assert m.run(("r", DATA_GPA + 5 * PAGE)) == [7]
    assert m.truths is not None
    m.truths.sweep()
