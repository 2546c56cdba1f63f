"""Faults without the TDP MMU: tables and leaf, MMIO, the neighbours' prefetch, the fast path, 5.10."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_clear_flush_young,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from host_mm.page import PG_dirty, PG_referenced
from kvm_model.mmu.mmu import kvm_mmu_page_fault
from kvm_model.mmu.spte import PT_WRITABLE_MASK, spte_to_pfn
from tests.kvm_model.direct_machine import direct, direct_huge, dontneed, huge_in_2m, lines, populate
from tests.kvm_model.machine import BASE, PAGE, Machine
from tests.kvm_model.test_breaks import SwitchOnce

PROFILES = ("linux-6.18", "linux-5.10")


def mapped(m: Machine, pages: int = 8) -> str:
    """One letter a gfn: A mapped and accessed, w mapped writable by prefetch, - not mapped."""
    word = ""
    for gfn in range(pages):
        spte = m.leaf(gfn)
        accessed = m.kvm.spte.is_accessed_spte(spte)
        word += "-" if not spte & 1 else "A" if accessed else "w" if spte & PT_WRITABLE_MASK else "r"
    return word


def test_the_kernels_events_of_a_fault_in_order() -> None:
    m = direct()
    m.run(("w", 0, 1))
    names = [e.name for e in m.events if e.system == "kvmmmu"]
    assert names == [
        "kvm_mmu_get_page", "kvm_mmu_spte_requested", "kvm_mmu_get_page", "kvm_mmu_get_page",
        "kvm_mmu_get_page", "kvm_mmu_set_spte",
    ]
    assert "kvm_tdp_mmu_spte_changed" not in m.names()


def test_a_refault_names_the_zap_that_made_it_necessary() -> None:
    m = direct()
    m.run(("w", 0, 1))
    dontneed(m, 0)
    zap = m.last("spte_zap")
    m.run(("w", 0, 1))
    assert m.last("spte_install").killed_by == zap.seq


def test_a_fault_of_one_vcpu_that_another_has_served_is_spurious() -> None:
    m = direct(vcpus=2)
    m.run(("w", 0, 1))
    m.run(("r", PAGE), vcpu=1)
    m.do(lambda: kvm_mmu_page_fault(m.vcpus[1], 0, 2))
    assert m.vcpus[1].stat["pf_spurious"] == 1


# -- prefetch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("populated", "profile", "want"), [
    ((0, 1, 2, 4, 5, 6, 7), "linux-6.18", "wwwAwwww"),
    ((0, 1, 2, 4, 5, 6, 7), "linux-5.10", "wwwA----"),
    ((0, 2, 4, 6), "linux-6.18", "w--Aw---"),
    ((1, 2, 4, 5), "linux-6.18", "---A----"),
    ((4, 5, 7), "linux-6.18", "---A----"),
    ((0, 1, 4, 5, 7), "linux-6.18", "ww-Aww--"),
])
def test_the_populated_prefix_of_each_run_is_mapped_and_an_empty_one_ends_it(
    populated: tuple[int, ...], profile: str, want: str
) -> None:
    m = direct(profile=profile)
    populate(m, *populated)
    m.run(("w", 3 * PAGE, 1))
    assert mapped(m) == want
    m.truths.sweep()


def test_runs_end_at_leaves_that_are_there() -> None:
    m = direct()
    m.run(("w", 4 * PAGE, 1))
    populate(m, 0, 1, 5, 6)
    m.run(("w", 2 * PAGE, 1))
    # 0-1 and 3 are runs of their own; 3 is not populated and ends the group before 5.
    assert mapped(m) == "wwA-A---"


def test_a_prefetched_leaf_is_used_without_a_fault_and_its_page_is_dirty() -> None:
    m = direct()
    populate(m, 1)
    m.do(m.host.lru.lru_add_drain_all)
    m.run(("w", 0, 1))
    faults = m.vcpus[0].stat["pf_taken"]
    assert m.host.pages.flags[spte_to_pfn(m.leaf(1))] & PG_dirty
    assert m.run(("r", PAGE)) == [2]
    assert m.vcpus[0].stat["pf_taken"] == faults
    assert m.last("spte_install").args["prefetch"]


def test_nothing_is_prefetched_without_a_bits_in_a_log_or_over_a_page_only_read() -> None:
    m = direct(params={"kvm_intel.eptad": "0"})
    populate(m, 1, 2)
    m.run(("w", 0, 1))
    assert mapped(m) == "A-------"
    m = direct()
    populate(m, 1, 2)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    m.run(("w", 0, 1))
    assert mapped(m) == "A-------"
    m = direct()
    m.run(("r", PAGE))
    dontneed(m, 1)
    populate(m, 1)
    m.do(lambda: do_madvise(m.mm, BASE + PAGE, PAGE, MADV_PAGEOUT))
    m.do(m.host.swap_device.drain)
    m.run(("w", 0, 1))
    assert mapped(m) == "A-------"


def test_nothing_is_prefetched_while_a_bracket_is_open_somewhere() -> None:
    m = direct()
    populate(m, 1, 2)
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE + 20 * PAGE, BASE + 21 * PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    m.run(("w", 0, 1))
    assert mapped(m) == "A-------"
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.run(("w", 3 * PAGE, 1))
    assert mapped(m) == "AwwA----"


def test_a_huge_leaf_has_no_neighbours() -> None:
    m = direct_huge()
    m.run(("w", 0, 1))
    assert huge_in_2m(m)
    assert lines(m, "spte_install") == ["spte_install"]


# -- huge, MMIO, log ----------------------------------------------------------------------------


def test_the_unmap_of_4k_takes_the_huge_leaf_along() -> None:
    m = direct_huge()
    m.run(("w", 0, 1))
    mark = len(m.events)
    dontneed(m, 7)
    assert m.last("spte_zap").args["level"] == 2
    assert lines(m, "kvm_unmap_hva_range", since=mark)
    assert m.run(("r", 0)) == [1]
    m.truths.sweep()


@pytest.mark.parametrize("profile", PROFILES)
def test_mmio_is_marked_once_and_known_after_that(profile: str) -> None:
    m = direct(profile=profile)
    assert m.run_raw(("w", 1 << 30, 5)).kind == "mmio"
    shown = ["mark_mmio_spte"] if profile == "linux-6.18" else ["mark_mmio_spte", "kvm_mmu_set_spte"]
    assert lines(m, "mark_mmio_spte", "kvm_mmu_set_spte") == shown
    assert m.kvm.spte.is_mmio_spte(m.leaf(1 << 18))
    assert m.vcpus[0].stat["pf_mmio_spte_created"] == 1
    m.run_raw(("w", (1 << 30) + 8, 5))
    assert m.vcpus[0].stat["pf_mmio_spte_created"] == 1
    m.truths.sweep()


def test_an_mmio_spte_of_an_old_memory_map_is_made_anew() -> None:
    m = direct()
    m.run_raw(("w", 1 << 30, 5))
    m.do(lambda: m.kvm.set_user_memory_region(1, 1 << 31, PAGE, BASE))
    m.run_raw(("w", 1 << 30, 5))
    assert m.vcpus[0].stat["pf_mmio_spte_created"] == 2


@pytest.mark.parametrize("eptad", ["0", "1"])
def test_a_logged_page_gets_its_right_back_without_mmu_lock_and_its_bit_is_set(eptad: str) -> None:
    m = direct(params={"kvm_intel.eptad": eptad})
    m.run(("w", 3 * PAGE, 1))
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    assert not m.leaf(3) & PT_WRITABLE_MASK
    m.run(("w", 3 * PAGE, 2))
    assert m.vcpus[0].stat["pf_fast"] == 1
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 1 << 3
    assert not m.leaf(3) & PT_WRITABLE_MASK
    m.truths.sweep()


# -- 5.10 ---------------------------------------------------------------------------------------


def old(**options: Any) -> Machine:
    return direct(profile="linux-5.10", **options)


def test_the_seeds_chain_takes_accessed_and_dirty_to_the_page() -> None:
    m = old()
    m.run(("w", 0, 7))
    pfn = spte_to_pfn(m.leaf(0))
    m.do(m.host.lru.lru_add_drain_all)
    m.host.pages.flags[pfn] &= ~(PG_dirty | PG_referenced)
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE, BASE + PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    flags = m.host.pages.flags[pfn]
    assert flags & PG_dirty
    assert flags & PG_referenced
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))


def test_every_fault_on_what_is_not_there_shows_that_the_fast_path_looked() -> None:
    m = old()
    m.run(("w", 0, 7))
    looked = m.last("fast_page_fault").args
    assert looked["old_spte"] == looked["new_spte"] == 1 << 63
    assert m.vcpus[0].stat["pf_fast"] == 0
    assert "fast_page_fault" not in direct().names()


def test_an_accessed_page_shows_young_at_the_level_of_its_leaf_only() -> None:
    m = old()
    m.run(("w", 5 * PAGE, 7))
    for young in (True, False):
        mark = len(m.events)
        m.do(lambda: mmu_notifier_clear_flush_young(m.mm, BASE + 5 * PAGE, BASE + 6 * PAGE))
        pages = [e.args for e in m.events[mark:] if e.name == "kvm_age_page"]
        assert [(p["gfn"], p["level"], p["referenced"]) for p in pages] == [
            (5, 1, young), (5, 2, False), (5, 3, False)
        ]


def test_rights_lost_to_the_log_are_flushed_only_where_there_were_any() -> None:
    for profile, first, second in (("linux-5.10", 1, 0), ("linux-6.18", 1, 1)):
        m = direct(profile=profile)
        m.run(("w", 0, 7))
        for expected in (first, second):
            before = m.kvm.stat["remote_tlb_flush_requests"]
            m.do(lambda m=m: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
            assert m.kvm.stat["remote_tlb_flush_requests"] - before == expected
            m.do(lambda m=m: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 0))


def test_a_huge_leaf_is_not_made_writable_without_mmu_lock() -> None:
    for profile, fast in (("linux-5.10", 0), ("linux-6.18", 1)):
        m = direct_huge(profile=profile)
        m.run(("w", 0, 7))
        m.do(lambda m=m: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
        slot = m.kvm.slots().gfn_to_memslot(0)
        assert slot is not None
        # The log is gone, and the fault comes before its end has zapped anything.
        slot.flags = 0
        m.run(("w", 0, 8))
        assert m.vcpus[0].stat["pf_fast"] == fast
        assert huge_in_2m(m)


@pytest.mark.parametrize(("broken", "truth"), [((), None), (("mmio-over-leaf",), "no-mmio-over-slot")])
def test_a_fault_that_saw_no_slot_takes_the_leaf_that_one_mapped_meanwhile(
    broken: tuple[str, ...], truth: str | None
) -> None:
    m = Machine(params={"kvm.tdp_mmu": "N"}, vcpus=2, breaks=broken)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    before = len(m.events)
    m.sched.set_strategy(SwitchOnce(m, lambda task, kind: task.name == "vcpu0" and kind == "seq"))
    late = m.spawn(("r", 0))
    create = m.sched.spawn("create", lambda: m.kvm.set_user_memory_region(0, 0, 16 * PAGE, BASE))
    tasks = late, create, m.spawn(("w", 0, 5), vcpu=1)
    if truth is not None:
        with pytest.raises(BrokenTruth) as error:
            m.finish(*tasks)
        assert error.value.truth == truth
        return
    m.finish(*tasks)
    # What emulates its load finds the new slot.
    assert (late.result.kind, m.cpu.out[0]) == ("hlt", [5])
    names = "mark_mmio_spte", "spte_install", "spte_zap", "kvm_flush_remote_tlbs"
    order = [e.name for e in m.events[before:] if e.name in names]
    assert order == ["spte_install", "spte_zap", "mark_mmio_spte", "kvm_flush_remote_tlbs"]
    assert m.run(("r", 0), vcpu=1) == [5]
    m.truths.sweep()
