"""Generations: where a folio enters, what uses count, and the look around a young entry."""

from __future__ import annotations

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_COLD, MADV_FREE, do_madvise
from host_mm.mlock import do_mlock, do_munlock
from host_mm.mmu_notifier_register import mmu_notifier_unregister
from host_mm.page import PG_active, PG_referenced, PG_workingset
from host_mm.rmap import folio_referenced
from host_mm.truths import audit
from tests.host_mm.gens import machine, make_old, seq_of, vec_of
from tests.host_mm.machine import PAGE, Vmm, run
from tests.host_mm.young import YoungMmu


def referenced(vmm: Vmm, page: int) -> int:
    """folio_referenced of an isolated folio, as shrink_folio_list asks; then it is put back."""
    host, pfn = vmm.host, vmm.pfn(page * PAGE)
    answer: list[int] = []

    def body() -> None:
        host.lru.lru_add_drain_all()
        assert host.lru.folio_isolate_lru(pfn)
        answer.append(folio_referenced(host, pfn)[0])
        host.lru.folio_putback_lru(pfn)
        host.lru.lru_add_drain_all()

    run(host, body)
    return answer[0]


def test_a_faulted_page_enters_the_second_youngest_generation_and_shows_no_active_flag() -> None:
    vmm, _ = machine(2)
    assert seq_of(vmm, 0) == vec_of(vmm).max_seq - 1
    assert not vmm.host.pages.flags[vmm.pfn(0)] & PG_active
    audit(vmm.host)


def test_the_generation_by_flags() -> None:
    vmm, _ = machine(1)
    vec, pfn, flags = vec_of(vmm), vmm.pfn(0), vmm.host.pages.flags
    vec.max_seq, vec.min_seq = 11, [8, 8]
    assert vec.folio_seq(pfn, False) == 10, "an anonymous folio without a slot"
    flags[pfn] |= PG_active
    assert vec.folio_seq(pfn, False) == 10
    flags[pfn] |= PG_workingset
    assert vec.folio_seq(pfn, False) == 11
    flags[pfn] &= ~(PG_active | PG_workingset)
    assert vec.folio_seq(pfn, True) == 8, "reclaim puts it into the oldest"
    vec.max_seq, vec.min_seq = 3, [0, 0]


def test_isolating_a_young_folio_sets_active_so_that_it_comes_back_young() -> None:
    vmm, _ = machine(1)
    host, pfn = vmm.host, vmm.pfn(0)
    assert host.lru.folio_isolate_lru(pfn)
    assert host.pages.flags[pfn] & PG_active
    assert host.gens.gen[pfn] == 0
    host.lru.folio_putback_lru(pfn)
    host.lru.lru_add_drain_all()
    assert seq_of(vmm, 0) == vec_of(vmm).max_seq - 1
    audit(host)


def test_cold_pages_leave_the_young_generations_and_lazily_freed_ones_become_file() -> None:
    vmm, _ = machine(4)
    host = vmm.host
    pfn = vmm.pfn(2 * PAGE)

    def body() -> None:
        do_madvise(vmm.mm, vmm.base, PAGE, MADV_COLD)
        do_madvise(vmm.mm, vmm.base + 2 * PAGE, PAGE, MADV_FREE)
        host.lru.lru_add_drain_all()

    run(host, body)
    assert vec_of(vmm, 2).where(pfn)[0].endswith("file")
    audit(host)


def test_locked_pages_are_in_no_generation() -> None:
    vmm, _ = machine(2)
    host = vmm.host
    run(host, lambda: (do_mlock(vmm.mm, vmm.base, PAGE, 0), host.lru.lru_add_drain_all()))
    assert vec_of(vmm).where(vmm.pfn(0)) == ["unevictable"]
    audit(host)
    run(host, lambda: (do_munlock(vmm.mm, vmm.base, PAGE), host.lru.lru_add_drain_all()))
    assert vec_of(vmm).where(vmm.pfn(0))[0].startswith("gen")
    audit(host)


def test_accesses_by_reference_climb_to_workingset() -> None:
    vmm, _ = machine(1)
    host, pfn = vmm.host, vmm.pfn(0)
    gens, flags = host.gens, host.pages.flags
    flags[pfn] &= ~(PG_referenced | PG_workingset)
    seen = []
    for _ in range(6):
        host.mark_page_accessed(pfn)
        seen.append((gens.folio_refs(pfn), bool(flags[pfn] & PG_workingset)))
    assert seen == [(1, False), (2, False), (3, False), (4, False), (4, True), (4, True)]


def test_look_around_asks_clear_young_for_each_page_of_the_window_and_for_itself_first() -> None:
    vmm, mmu = machine(8)
    assert isinstance(mmu, YoungMmu)
    mmu.young.update((3, 5))
    assert referenced(vmm, 3) == 1
    # Itself, then the window in order; its own folio is isolated and so in no generation.
    assert mmu.take() == [("clear_young", page, 1) for page in (3, 0, 1, 2, 4, 5, 6, 7)]
    assert mmu.young == set()
    assert mmu.brackets == 0
    assert vmm.host.pages.flags[vmm.pfn(5 * PAGE)] & PG_referenced
    assert not vmm.host.pages.flags[vmm.pfn(4 * PAGE)] & PG_referenced


def test_an_entry_that_is_old_everywhere_is_not_looked_around() -> None:
    vmm, mmu = machine(8)
    assert isinstance(mmu, YoungMmu)
    mmu.young.add(5)
    assert referenced(vmm, 3) == 0
    assert mmu.take() == [("clear_young", 3, 1)]
    assert mmu.young == {5}


def test_without_a_secondary_mmu_only_entries_that_are_young_are_touched() -> None:
    vmm = Vmm(params={"mm.lru_gen": "Y"})
    from tests.host_mm.gens import fill

    mmu_notifier_unregister(vmm.notifier, vmm.mm)
    run(vmm.host, lambda: fill(vmm, 4))
    stores: list[int] = []
    for page in (0, 2):
        vmm.host.ram.u64[vmm.pte(page * PAGE) >> 3] |= 0x20
    vmm.host.pte_hooks.append(lambda mm, address, old, new: stores.append((address - vmm.base) // PAGE))
    assert referenced(vmm, 0) == 1
    assert stores == [0, 2]


@pytest.mark.parametrize(("page", "first", "last"), [(10, 0, 63), (100, 68, 131), (255, 192, 255)])
def test_the_window_is_a_batch_around_the_entry_within_its_vma(page: int, first: int, last: int) -> None:
    vmm, mmu = machine(256)
    assert isinstance(mmu, YoungMmu)
    from host_mm.mmap import do_munmap

    run(vmm.host, lambda: do_munmap(vmm.mm, vmm.base + 256 * PAGE, 8 << 20 - 20))
    mmu.young.add(page)
    referenced(vmm, page)
    asked = {start for _, start, _ in mmu.take()}
    assert (min(asked), max(asked)) == (first, last)


def test_the_second_time_a_neighbour_is_young_it_is_promoted() -> None:
    vmm, mmu = machine(8)
    assert isinstance(mmu, YoungMmu)
    vec = vec_of(vmm)
    before = seq_of(vmm, 5)
    for _ in range(2):
        mmu.young.update((3, 5))
        referenced(vmm, 3)
    assert seq_of(vmm, 5) == vec.max_seq > before
    audit(vmm.host)


def test_the_audit_finds_a_wrong_count() -> None:
    vmm, _ = machine(2)
    make_old(vmm, range(2))
    vec_of(vmm).nr_pages[0][0] += 1
    with pytest.raises(BrokenTruth, match="by generation"):
        audit(vmm.host)
