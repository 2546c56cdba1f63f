"""What the host's brackets and aging do to a VM."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_clear_flush_young,
    mmu_notifier_clear_young,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
    mmu_notifier_test_young,
)
from kvm_model.instrument import leaf_spte
from tests.kvm_model.machine import BASE, PAGE, Machine


def bracket(m: Machine, start: int, end: int) -> object:
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE + start, BASE + end)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    return range_


def close(m: Machine, range_: object) -> None:
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))  # type: ignore[arg-type]


def test_a_bracket_zaps_what_it_touches_and_nothing_else() -> None:
    m = Machine()
    m.run(*(("w", n * PAGE, n) for n in range(8)))
    close(m, bracket(m, 2 * PAGE + 100, 4 * PAGE + 1))
    assert [leaf_spte(m.kvm, n)[1] for n in range(8)] == [1, 1, 0, 0, 0, 1, 1, 1]


def test_a_bracket_beside_every_slot_takes_no_mmu_lock() -> None:
    m = Machine()
    other = m.do(lambda: do_mmap(m.mm, 0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS))
    m.run(("w", 0, 1))
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, other, other + PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    assert m.kvm.mn_active_invalidate_count == 1
    assert m.kvm.mmu_invalidate_in_progress == 0
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    assert m.kvm.mmu_invalidate_seq == 0
    assert "kvm_unmap_hva_range" in m.names()


def test_nested_brackets_join_into_one_range_until_the_last_ends() -> None:
    m = Machine()
    first, second = bracket(m, 0, PAGE), bracket(m, 5 * PAGE, 6 * PAGE)
    assert (m.kvm.mmu_invalidate_range_start, m.kvm.mmu_invalidate_range_end) == (0, 6)
    assert m.kvm.mmu_invalidate_in_progress == 2
    close(m, second)
    assert (m.kvm.mmu_invalidate_in_progress, m.kvm.mmu_invalidate_seq) == (1, 1)
    assert m.kvm.mmu_invalidate_range_end == 6
    close(m, first)
    assert (m.kvm.mmu_invalidate_in_progress, m.kvm.mmu_invalidate_seq) == (0, 2)
    m.truths.quiescent()


def test_a_zap_flushes_and_a_bracket_without_sptes_does_not() -> None:
    m = Machine()
    m.run(("w", 0, 1))
    close(m, bracket(m, PAGE, 2 * PAGE))
    assert m.kvm.stat["remote_tlb_flush_requests"] == 0
    close(m, bracket(m, 0, PAGE))
    assert m.kvm.stat["remote_tlb_flush_requests"] == 1
    assert m.vcpus[0].requests & 1
    flushes = m.cpu.flushes[0]
    m.run(("r", 0))
    assert m.cpu.flushes[0] == flushes + 1


def test_swapped_and_cow_pages_keep_their_bytes() -> None:
    m = Machine()
    m.run(*(("w", n * PAGE, n + 1) for n in range(16)))
    m.do(lambda: do_madvise(m.mm, BASE, 16 * PAGE, MADV_PAGEOUT))
    child = m.do(lambda: fork_process(m.process))
    got = m.run(*(("r", n * PAGE) for n in range(16)), ("w", 0, 99), ("r", 0))
    assert got == [*range(1, 17), 99]
    m.do(lambda: exit_process(child))
    m.truths.sweep()
    m.truths.quiescent()


def test_a_fork_write_protects_and_the_next_store_gets_its_own_copy() -> None:
    m = Machine()
    m.run(("w", 0, 1))
    before = m.leaf(0)
    child = m.do(lambda: fork_process(m.process))
    assert m.run(("r", 0)) == [1]
    assert m.leaf(0) & 2 == 0
    assert m.leaf(0) >> 57 & 3 == 0
    m.run(("w", 0, 2))
    assert m.leaf(0) >> 12 & 0xFFFFF != before >> 12 & 0xFFFFF
    m.do(lambda: exit_process(child))


def test_a_vcpu_in_guest_mode_leaves_it_before_its_next_access() -> None:
    m = Machine()
    m.run(("w", 0, 1))

    def drop() -> None:
        # On another CPU, while this one is in the guest with the translation in its TLB.
        do_madvise(m.mm, BASE, PAGE, MADV_DONTNEED)
        assert m.vcpus[0].kicked

    assert m.run(("r", 0), ("call", drop), ("r", 0)) == [1, 0]
    assert m.kvm.stat["remote_tlb_flush"] == 1


@pytest.mark.parametrize("eptad", ["1", "0"])
def test_aging_clears_accessed_once_and_needs_no_flush(eptad: str) -> None:
    m = Machine(params={"kvm_intel.eptad": eptad})
    m.run(("w", 0, 1), ("w", PAGE, 2))
    flushes = m.kvm.stat["remote_tlb_flush_requests"]

    def age() -> int:
        return int(m.do(lambda: mmu_notifier_clear_flush_young(m.mm, BASE, BASE + 2 * PAGE)))

    assert m.do(lambda: mmu_notifier_test_young(m.mm, BASE)) == 1
    assert age() == 1
    assert age() == 0
    assert m.do(lambda: mmu_notifier_test_young(m.mm, BASE)) == 0
    assert m.kvm.stat["remote_tlb_flush_requests"] == flushes
    m.cpu.tlb[0].clear()
    assert m.run(("r", 0)) == [1]
    assert m.do(lambda: mmu_notifier_clear_young(m.mm, BASE, BASE + PAGE)) == 1
    assert m.names().count("kvm_age_hva") == 3
    m.truths.sweep()


def test_without_ad_bits_an_aged_page_is_restored_by_the_fast_path() -> None:
    m = Machine(params={"kvm_intel.eptad": "0"})
    m.run(("w", 0, 1))
    m.do(lambda: mmu_notifier_clear_young(m.mm, BASE, BASE + PAGE))
    assert m.leaf(0) & 7 == 0
    m.cpu.tlb[0].clear()
    assert m.run(("r", 0)) == [1]
    assert m.last("fast_page_fault").args["ret"] == 5
    assert m.leaf(0) & 7 == 5
    assert m.run(("w", 0, 2), ("r", 0)) == [2]
    assert m.leaf(0) & 7 == 7
    assert m.vcpus[0].stat["pf_fast"] == 2


def test_the_end_of_the_vmm_drops_every_spte() -> None:
    m = Machine()
    m.run(("w", 0, 1), ("w", PAGE, 2))
    m.do(lambda: exit_process(m.process))
    assert m.truths.sweep() == 0
    m.do(m.kvm.destroy)


def test_freeing_a_frame_that_an_spte_maps_breaks_a_truth() -> None:
    m = Machine()
    m.run(("w", 0, 1))
    pfn = m.leaf(0) >> 12 & 0xFF_FFFF_FFFF
    hooks = list(m.host.free_hooks)

    def free() -> None:
        for hook in hooks:
            hook(pfn, 0)

    with pytest.raises(BrokenTruth, match=f"spte-of-freed-frame: pfn {pfn:#x} "):
        free()
