"""madvise's walks over folios: large ones that a call concerns in part are split before it goes on.

Source of truth: mm/madvise.c (madvise_cold_or_pageout_pte_range and madvise_free_pte_range, as far as
they have to do with large folios; madvise_folio_pte_batch), mm/internal.h: folio_pte_batch; Linux 6.18.

A folio that another process maps too, or that is locked or held, stays as it is.

Not modelled: hugetlb folios, which these calls refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    HPAGE_PMD_NR,
    PMD_SIZE,
    pmd_trans_huge,
    pte_mkold,
    pte_pfn,
    pte_present,
)
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock
from host_mm.huge_memory_map import pmd_folio
from host_mm.memory_folio import vm_normal_page
from host_mm.page import (
    PG_active,
    PG_referenced,
    PG_unevictable,
    PG_workingset,
    PG_young,
    folio_maybe_mapped_shared,
    folio_nr_pages,
    folio_test_large,
    get_page,
    page_folio,
    put_page,
)
from host_mm.pgtable_generic import pte_lockptr, pte_offset_map_lock, set_pmd
from host_mm.pgtable_huge import pmd_trans_huge_lock, pmdp_get, pmdp_invalidate

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea
    from host_mm.mmu_gather import MmuGather

__all__ = ["cold_or_pageout_huge_pmd", "deactivate_folio", "walk_folios"]

Present = Callable[[int, int, int, int, int], None]
"""Called with (address, pte, entry, folio, number of entries) for each folio, its table locked."""


def folio_pte_batch(host: HostMm, folio: int, pte: int, most: int) -> int:
    """How many entries from `pte` on map successive pages of a large folio, at most `most`."""
    u64 = host.ram.u64
    pfn = pte_pfn(u64[pte >> 3])
    most = min(most, folio + folio_nr_pages(host.pages, folio) - pfn)
    nr = 1
    while nr < most:
        entry = u64[(pte >> 3) + nr]
        if not pte_present(entry) or pte_pfn(entry) != pfn + nr:
            break
        nr += 1
    return nr


def walk_folios(
    vma: VmArea, pmd: int, address: int, end: int, present: Present,
    absent: Callable[[int, int, int], None] | None = None,
) -> None:
    """Call `present` for the folios of a level-1 table's part, `absent` (address, pte, entry) for others.

    A large folio is told once if the part has all of it, else it is split first; if it cannot be, it is
    passed over.
    """
    mm = vma.mm
    host = mm.host
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return
    ptl = pte_lockptr(mm, pte)
    _tlb.flush_tlb_batched_pending(mm)
    u64 = host.ram.u64
    while address < end:
        entry = u64[pte >> 3]
        nr = 1
        if entry and pte_present(entry):
            pfn = vm_normal_page(host, entry)
            folio = page_folio(host.pages, pfn) if pfn >= 0 else -1
            if folio >= 0 and folio_test_large(host.pages, folio):
                nr = folio_pte_batch(host, folio, pte, (end - address) >> 12)
                if nr < folio_nr_pages(host.pages, folio):
                    if folio_maybe_mapped_shared(host.pages, folio) or not folio_trylock(host, folio):
                        nr = 1
                    else:
                        get_page(host, folio)
                        ptl.unlock()
                        if not _split(host, folio):
                            nr = 0
                        pte = pte_offset_map_lock(mm, pmd, address)
                        if not pte:
                            return
                        ptl = pte_lockptr(mm, pte)
                        _tlb.flush_tlb_batched_pending(mm)
                    folio = -1
            if folio >= 0:
                present(address, pte, entry, folio, nr)
        elif entry and absent is not None:
            absent(address, pte, entry)
        pte += 8 * nr
        address += 4096 * nr
    ptl.unlock()


def _split(host: HostMm, folio: int) -> int:
    """split_folio of a locked folio to which the caller has a reference; both are given back."""
    err = host.split_folio(folio)
    folio_unlock(host, folio)
    put_page(host, folio)
    return err


# -- MADV_COLD and MADV_PAGEOUT of huge entries -------------------------------------------------
def deactivate_folio(host: HostMm, folio: int, isolated: list[int] | None) -> None:
    """Make a folio first in line for reclaim; or, with a list, take it off its LRU and put it there."""
    flags = host.pages.flags
    value = flags[folio] & ~(PG_referenced | PG_young)
    flags[folio] = value | (PG_workingset if value & PG_active else 0)
    if isolated is None:
        host.lru.folio_deactivate(folio)
    elif host.lru.folio_isolate_lru(folio):
        if flags[folio] & PG_unevictable:
            host.lru.folio_putback_lru(folio)
        else:
            isolated.append(folio)


def cold_or_pageout_huge_pmd(
    tlb: MmuGather, vma: VmArea, pmd: int, address: int, following: int, isolated: list[int] | None
) -> bool:
    """Do it to a huge page as a whole; false: there are small entries now, because a part was asked for."""
    mm = vma.mm
    host = mm.host
    ptl = pmd_trans_huge_lock(mm, pmd)
    if ptl is None:
        return not pmdp_get(mm, pmd)
    entry = pmdp_get(mm, pmd)
    folio = pmd_folio(mm, entry)
    if not pmd_trans_huge(entry) or folio < 0 or folio_maybe_mapped_shared(host.pages, folio):
        ptl.unlock()
        return True
    if following - address != PMD_SIZE:
        get_page(host, folio)
        ptl.unlock()
        folio_lock(host, folio)
        return bool(_split(host, folio))
    if isolated is None and entry & _PAGE_ACCESSED:
        old = pmdp_invalidate(mm, address, pmd)
        set_pmd(mm, address, pmd, pte_mkold(old))
        tlb.remove_tlb_entry(address, HPAGE_PMD_NR << 12)
    deactivate_folio(host, folio, isolated)
    ptl.unlock()
    return True
