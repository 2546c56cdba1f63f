"""Shadow pages: the hash, links, zapping, generations, and how many there may be."""

from __future__ import annotations

import errno
import itertools

import pytest

from host_mm.kernel.errors import BrokenTruth
from kvm_model.mmu import shadow_page
from kvm_model.mmu.mmu_roots import kvm_mmu_unload
from kvm_model.mmu.rmap import pte_list_remove, rmap_sptes
from kvm_model.mmu.shadow_page import kvm_mmu_available_pages, make_mmu_pages_available
from kvm_model.truths_rmap import check_rmaps
from tests.kvm_model.direct_machine import direct, direct_huge, dontneed, huge_in_2m, lines, populate, rmap
from tests.kvm_model.machine import BASE, PAGE, Machine
from tests.kvm_model.test_rmap import GiveWay

MIB2 = 2 << 20


def levels(m: Machine) -> list[int]:
    return [sp.level for sp in m.kvm.active_mmu_pages.values()]


def test_pages_are_found_by_gfn_and_role_and_shared_by_all_vcpus() -> None:
    m = direct(vcpus=2)
    m.run(("w", 0, 1))
    m.run(("w", PAGE, 2), vcpu=1)
    pages = [e.args for e in m.events if e.name == "kvm_mmu_get_page"]
    assert [(p["role"] & 15, p["created"]) for p in pages] == [
        (4, True), (3, True), (2, True), (1, True), (4, False)
    ]
    assert m.vcpus[0].root_hpa == m.vcpus[1].root_hpa
    root = m.kvm.sps[m.vcpus[0].root_hpa >> 12]
    assert root.root_count == 2
    assert {sp.role & 0xFF0 for sp in m.kvm.sps.values()} == {0x780}, "direct, all rights, not 4-byte"


def test_each_table_knows_the_entry_that_points_to_it() -> None:
    m = direct()
    m.run(("w", 0, 1))
    steps = m.kvm.walk(0)
    for (_, at, spte), _below in itertools.pairwise(steps):
        child = m.kvm.sps[spte >> 12 & (1 << 34) - 1]
        assert [sptep << 3 for sptep in rmap_sptes(child.parent_ptes)] == [at]


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


def test_a_table_that_a_huge_leaf_replaced_is_linked_again_with_its_leaves() -> None:
    m = direct_huge()
    m.run(("w", 5 * PAGE, 7))
    assert huge_in_2m(m)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    m.run(("w", 5 * PAGE, 8))
    assert m.kvm.leaf_spte(5)[1] == 1
    small = m.kvm.leaf_spte(5)[0]
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 0))
    # Ending the log zaps the small leaf; the next fault maps huge over the table, which stays.
    assert not rmap(m, 5, 1)
    assert m.run(("r", 5 * PAGE)) == [8]
    assert huge_in_2m(m)
    table = m.kvm.sps[small >> 12]
    assert list(rmap_sptes(table.parent_ptes)) == []
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    mark = len(m.events)
    m.run(("w", 5 * PAGE, 9))
    assert m.kvm.leaf_spte(5)[0] == small
    existing = [e.args for e in m.events[mark:] if e.name == "kvm_mmu_get_page"]
    assert [(p["role"] & 15, p["created"]) for p in existing] == [(1, False)]
    m.truths.sweep()


def test_a_huge_leaf_goes_with_a_flush_when_a_table_takes_its_place() -> None:
    for profile, order in (
        ("linux-6.18", ["kvm_mmu_get_page", "spte_zap", "kvm_flush_remote_tlbs", "kvm_mmu_set_spte"]),
        ("linux-5.10", ["spte_zap", "kvm_flush_remote_tlbs", "kvm_mmu_get_page", "kvm_mmu_set_spte"]),
    ):
        m = direct_huge(profile=profile)
        m.run(("w", 5 * PAGE, 7))
        m.do(lambda m=m: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
        mark = len(m.events)
        m.run(("w", 5 * PAGE, 8))
        assert lines(m, *order, since=mark) == order
        assert m.last("spte_zap").args["why"] == "split"
        assert rmap(m, 0, 2) == []
        m.truths.sweep()


# -- how many -----------------------------------------------------------------------------------


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
    m.do(lambda: shadow_page.kvm_mmu_change_mmu_pages(m.kvm, 9))
    assert m.kvm.n_used_mmu_pages == 9
    assert m.kvm.n_max_mmu_pages == 9
    m.truths.sweep()


# -- the truth ----------------------------------------------------------------------------------


def test_a_leaf_that_its_rmap_has_lost_is_found_by_the_sweep() -> None:
    m = direct()
    m.run(("w", 0, 1))
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None
    pte_list_remove(slot.rmap[0][0], m.kvm.leaf_spte(0)[0] >> 3)
    with pytest.raises(BrokenTruth, match="the rmap of level 1, gfn 0x0"):
        m.truths.sweep()


def test_a_table_that_its_parent_does_not_know_is_found() -> None:
    m = direct()
    m.run(("w", 0, 1))
    table = m.kvm.sps[m.kvm.leaf_spte(0)[0] >> 12]
    pte_list_remove(table.parent_ptes, next(iter(rmap_sptes(table.parent_ptes))))
    with pytest.raises(BrokenTruth, match="parent_ptes"):
        check_rmaps(m.kvm)


def test_a_leaf_without_its_bytes_is_found_and_so_is_a_lost_page() -> None:
    m = direct()
    m.run(("w", 0, 1))
    m.host.ram.u64[m.kvm.leaf_spte(0)[0] >> 3] = 1 << 63
    with pytest.raises(BrokenTruth, match="the rmap of level 1"):
        check_rmaps(m.kvm)
    m = direct()
    m.run(("w", 0, 1))
    m.kvm.active_mmu_pages.popitem()
    with pytest.raises(BrokenTruth, match="3 tables are active"):
        check_rmaps(m.kvm)


def test_the_unmap_of_a_page_leaves_its_table() -> None:
    m = direct()
    m.run(("w", 0, 1))
    tables = list(m.kvm.sps)
    dontneed(m, 0)
    assert list(m.kvm.sps) == tables
    assert m.run(("r", 0)) == [0]
