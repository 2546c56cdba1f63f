"""Where KVM of Linux 5.10 does otherwise than that of 6.18."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.arch.x86.pgtable import pte_wrprotect
from host_mm.kernel.sched import Task
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_change_pte,
    mmu_notifier_clear_flush_young,
    mmu_notifier_clear_young,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from host_mm.page import PG_dirty, PG_referenced
from host_mm.pgtable_generic import pmd_offset, pte_offset_map, set_pte
from kvm_model.instrument import leaf_spte
from kvm_model.mmu.spte import PT_WRITABLE_MASK, spte_to_pfn
from tests.kvm_model.machine import BASE, PAGE, Machine
from tests.kvm_model.test_breaks import SwitchOnce

RW = PROT_READ | PROT_WRITE


def machine(**options: Any) -> Machine:
    return Machine(**{"profile": "linux-5.10"} | options)


def tdp_machine(eptad: str = "1") -> Machine:
    """5.10's other MMU, which is not its default."""
    return machine(params={"kvm.tdp_mmu": "Y", "kvm_intel.eptad": eptad})


def test_only_5_10_maps_by_direct_pages_unless_told_otherwise() -> None:
    assert not machine().kvm.tdp_mmu_enabled
    assert tdp_machine().kvm.tdp_mmu_enabled
    assert Machine().kvm.tdp_mmu_enabled


def opened(m: Machine, start: int, end: int) -> Any:
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, start, end)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    return range_


def closed(m: Machine, range_: Any) -> None:
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))


def unmarked_frame(m: Machine, gfn: int) -> int:
    """The frame behind a mapped gfn, struct page without the marks that mm itself made."""
    pfn = spte_to_pfn(m.leaf(gfn))
    m.do(m.host.lru.lru_add_drain_all)
    m.host.pages.flags[pfn] &= ~(PG_dirty | PG_referenced)
    return pfn


def elsewhere(m: Machine) -> int:
    return int(m.do(lambda: do_mmap(m.mm, 0, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS)))


@pytest.mark.parametrize(("profile", "retries"), [("linux-6.18", False), ("linux-5.10", True)])
def test_a_bracket_anywhere_in_the_process_makes_every_fault_retry(profile: str, retries: bool) -> None:
    m = Machine(profile=profile)
    other = elsewhere(m)
    range_ = opened(m, other, other + PAGE)
    assert m.kvm.mmu_invalidate_in_progress == retries
    task = m.spawn(("w", 0, 7))
    m.do(lambda: m.sched.sleep(1_000_000))
    assert task.done != retries
    closed(m, range_)
    m.finish(task)
    assert m.run(("r", 0)) == [7]
    assert m.kvm.mmu_invalidate_seq == retries


def test_an_access_to_no_memslot_retries_too() -> None:
    m = machine()
    other = elsewhere(m)
    range_ = opened(m, other, other + PAGE)
    task = m.spawn(("r", 1 << 30))
    m.do(lambda: m.sched.sleep(1_000_000))
    assert not task.done
    closed(m, range_)
    m.sched.run_until(lambda: task.done)


@pytest.mark.parametrize("eptad", ["0", "1"])
def test_what_the_spte_knows_goes_to_the_page_when_it_is_dropped(eptad: str) -> None:
    m = machine(params={"kvm_intel.eptad": eptad})
    m.run(("w", 0, 7))
    pfn = unmarked_frame(m, 0)
    assert not m.host.pages.flags[pfn] & PG_dirty
    range_ = opened(m, BASE, BASE + PAGE)
    assert m.host.pages.flags[pfn] & PG_dirty
    assert m.host.pages.flags[pfn] & PG_referenced
    closed(m, range_)


def test_6_18_marks_nothing_when_an_spte_is_dropped() -> None:
    m = Machine()
    m.run(("w", 0, 7))
    pfn = unmarked_frame(m, 0)
    closed(m, opened(m, BASE, BASE + PAGE))
    assert not m.host.pages.flags[pfn] & (PG_dirty | PG_referenced)


def test_a_page_that_was_only_read_is_dropped_clean() -> None:
    m = machine()
    m.do(lambda: do_madvise(m.mm, BASE, PAGE, MADV_DONTNEED))
    m.run(("w", 0, 7))
    m.do(lambda: do_madvise(m.mm, BASE, PAGE, MADV_PAGEOUT))
    m.do(m.host.swap_device.drain)
    # Swapped in by a read it is mapped without the right to write.
    m.run(("r", 0))
    assert not m.leaf(0) & PT_WRITABLE_MASK
    pfn = unmarked_frame(m, 0)
    closed(m, opened(m, BASE, BASE + PAGE))
    assert not m.host.pages.flags[pfn] & PG_dirty


@pytest.mark.parametrize("eptad", ["0", "1"])
def test_the_tdp_mmus_aging_takes_the_dirty_bit_to_the_page_but_not_the_accessed_one(eptad: str) -> None:
    m = tdp_machine(eptad)
    m.run(("w", 0, 7))
    pfn = unmarked_frame(m, 0)
    assert m.do(lambda: mmu_notifier_clear_young(m.mm, BASE, BASE + PAGE))
    flags = m.host.pages.flags[pfn]
    assert flags & PG_dirty
    assert not flags & PG_referenced
    assert not m.kvm.spte.is_accessed_spte(m.leaf(0))
    if eptad == "1":
        assert not m.leaf(0) & m.kvm.spte.dirty
    m.cpu.tlb.clear()
    m.run(("w", 0, 8))
    m.host.pages.flags[pfn] &= ~PG_dirty
    closed(m, opened(m, BASE, BASE + PAGE))
    assert m.host.pages.flags[pfn] & PG_dirty, "written since"


def test_clear_flush_young_flushes_and_clear_young_does_not() -> None:
    m = machine(params={"kvm_intel.eptad": "1"})
    for age, flushes in ((mmu_notifier_clear_young, 0), (mmu_notifier_clear_flush_young, 1)):
        m.cpu.tlb.clear()
        m.run(("w", 0, 7))
        before = m.kvm.stat["remote_tlb_flush_requests"]
        m.do(lambda age=age: age(m.mm, BASE, BASE + PAGE))
        assert m.kvm.stat["remote_tlb_flush_requests"] - before == flushes


def test_an_age_in_the_tdp_mmu_shows_as_a_line_for_each_level_of_empty_rmaps() -> None:
    m = tdp_machine()
    m.run(("w", 5 * PAGE, 7))
    m.do(lambda: mmu_notifier_clear_young(m.mm, BASE + 5 * PAGE, BASE + 6 * PAGE))
    lines = [event.args for event in m.events if event.name == "kvm_age_page"]
    assert lines == [
        {"hva": BASE + 5 * PAGE, "gfn": 5, "level": level, "referenced": False} for level in (1, 2, 3)
    ]
    assert "kvm_age_hva" not in m.names()
    assert "kvm_unmap_hva_range" not in m.names()


def test_in_the_tdp_mmu_rights_come_back_by_the_slow_path_only() -> None:
    m = tdp_machine("0")
    m.run(("w", 0, 7))
    m.do(lambda: mmu_notifier_clear_flush_young(m.mm, BASE, BASE + PAGE))
    m.run(("w", 0, 8))
    assert m.vcpus[0].stat["pf_fast"] == 0
    assert m.run(("r", 0)) == [8]


def test_a_memslot_update_waits_for_no_bracket() -> None:
    m = machine()
    m.run(("w", 0, 7))
    range_ = opened(m, BASE, BASE + PAGE)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert m.kvm.mmu_invalidate_in_progress == 1
    closed(m, range_)
    assert m.kvm.mmu_invalidate_in_progress == 0
    m.truths.quiescent()


def change(m: Machine, gfn: int, pte: int) -> None:
    """set_pte_at_notify without a bracket, as out-of-tree code did it."""

    def set_pte_at_notify() -> None:
        mm = m.mm
        at = pte_offset_map(mm, pmd_offset(mm, BASE + gfn * PAGE), BASE + gfn * PAGE)
        mmu_notifier_change_pte(mm, BASE + gfn * PAGE, pte)
        set_pte(mm, BASE + gfn * PAGE, at, pte)

    m.do(set_pte_at_notify)


def host_pte(m: Machine, gfn: int) -> int:
    mm = m.mm
    at = pte_offset_map(mm, pmd_offset(mm, BASE + gfn * PAGE), BASE + gfn * PAGE)
    return int(m.host.ram.u64[at >> 3])


def test_change_pte_makes_the_spte_follow_a_read_only_entry() -> None:
    m = machine()
    m.run(("w", 0, 7))
    before, seq = m.leaf(0), m.kvm.mmu_invalidate_seq
    change(m, 0, pte_wrprotect(host_pte(m, 0)))
    spte, masks = m.leaf(0), m.kvm.spte
    assert spte_to_pfn(spte) == spte_to_pfn(before)
    assert not spte & (PT_WRITABLE_MASK | masks.host_writable | masks.accessed)
    assert spte & masks.mmu_writable
    assert m.kvm.mmu_invalidate_seq == seq + 1
    m.truths.sweep()
    assert m.run(("r", 0)) == [7]


def test_change_pte_drops_the_spte_if_the_new_entry_is_writable() -> None:
    m = machine()
    m.run(("w", 0, 7))
    change(m, 0, host_pte(m, 0))
    assert leaf_spte(m.kvm, 0) == (0, 0)


def test_the_writable_state_that_only_change_pte_makes_is_none_of_6_18() -> None:
    from host_mm.kernel.errors import BrokenTruth

    for profile in ("linux-5.10", "linux-6.18"):
        m = Machine(profile=profile)
        m.run(("w", 0, 7))
        masks = m.kvm.spte
        odd = m.leaf(0) & ~(PT_WRITABLE_MASK | masks.host_writable)
        if profile == "linux-5.10":
            m.truths._check_state(0, odd)
        else:
            with pytest.raises(BrokenTruth, match="four states"):
                m.truths._check_state(0, odd)


def test_aging_is_not_blamed_for_what_another_task_zapped_and_will_flush() -> None:
    m = machine()
    m.run(("w", 0, 7), ("w", PAGE, 7))
    zapping = m.sched.spawn("zapping", lambda: (m.truths.note_flush_due(), m.sched.sleep(1000)))
    m.do(lambda: m.sched.sleep(10))
    m.do(lambda: mmu_notifier_clear_flush_young(m.mm, BASE + PAGE, BASE + 2 * PAGE))
    m.finish(zapping)


@pytest.mark.parametrize("tdp_mmu", ["Y", "N"])
@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
def test_a_fault_on_a_slot_being_deleted_makes_an_mmio_spte_in_5_10_and_is_retried_in_6_18(
    profile: str, tdp_mmu: str
) -> None:
    m = Machine(profile=profile, params={"kvm.tdp_mmu": tdp_mmu})
    m.run(("r", 0))

    def here(task: Task, kind: str) -> bool:
        slot = m.kvm.slots().gfn_to_memslot(0)
        return task.name == "update" and slot is not None and slot.flags & 1 << 16 != 0

    m.sched.set_strategy(SwitchOnce(m, here))
    update = m.sched.spawn("update", lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    m.finish(update, m.spawn(("w", 0, 5)))
    retries = [event.args for event in m.events if event.args.get("reason") == "invalid-slot"]
    assert bool(retries) == (profile == "linux-6.18")
    m.truths.sweep()


@pytest.mark.parametrize(("profile", "valid"), [("linux-6.18", False), ("linux-5.10", True)])
def test_a_deleted_slot_leaves_a_tdp_mmus_root_valid_and_empty_in_5_10(profile: str, valid: bool) -> None:
    m = Machine(profile=profile, params={"kvm.tdp_mmu": "Y"})
    m.run(("w", 0, 7))
    (root,) = m.kvm.tdp_mmu_roots
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert root.invalid != valid
    assert leaf_spte(m.kvm, 0) == (0, 0)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 16 * PAGE, BASE))
    assert m.run(("r", 0)) == [7]
    assert (root in m.kvm.tdp_mmu_roots) == valid
    m.truths.sweep()
