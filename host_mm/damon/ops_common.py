"""Making one mapping old and asking whether it is young, for both kinds of regions.

Source of truth: mm/damon/ops-common.c (damon_get_folio, damon_ptep_mkold, damon_pmdp_mkold,
damon_folio_mkold, damon_folio_young); Linux 6.18.

Not modelled: entries of device memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import _PAGE_ACCESSED, pmd_pfn, pte_pfn
from host_mm.page import PG_idle, PG_young, folio_mapcount, put_page
from host_mm.page_idle import page_idle_get_folio, rmap_walk_trylock
from host_mm.page_vma_mapped import PageVmaMappedWalk
from host_mm.pgtable_generic import ptep_get, ptep_test_and_clear_young
from host_mm.pgtable_huge import pmdp_clear_young_notify, pmdp_get

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "damon_folio_mkold", "damon_folio_young", "damon_pmdp_mkold", "damon_pte_young", "damon_ptep_mkold",
]


def damon_ptep_mkold(mm: MmStruct, address: int, pte: int) -> None:
    """Clear the accessed bit of a present entry, whose table is locked, here and in secondary MMUs."""
    host = mm.host
    folio = page_idle_get_folio(host, pte_pfn(ptep_get(mm, pte)))
    if folio < 0:
        return
    young = int(ptep_test_and_clear_young(mm, address, pte))
    young |= mmu_notifier.mmu_notifier_clear_young(mm, address, address + 4096)
    host.pages.flags[folio] |= PG_idle | (PG_young if young else 0)
    put_page(host, folio)


def damon_pmdp_mkold(mm: MmStruct, address: int, pmd: int) -> None:
    """The same for a huge entry, which is locked."""
    host = mm.host
    folio = page_idle_get_folio(host, pmd_pfn(pmdp_get(mm, pmd)))
    if folio < 0:
        return
    young = pmdp_clear_young_notify(mm, address, pmd)
    host.pages.flags[folio] |= PG_idle | (PG_young if young else 0)
    put_page(host, folio)


def damon_pte_young(mm: MmStruct, address: int, pte: int, folio: int) -> bool:
    """Whether a present entry, small or huge, was used since it was made old, by a CPU or a secondary MMU."""
    if ptep_get(mm, pte) & _PAGE_ACCESSED or not mm.host.pages.flags[folio] & PG_idle:
        return True
    return bool(mmu_notifier.mmu_notifier_test_young(mm, address))


def damon_folio_mkold(host: HostMm, folio: int) -> None:
    """Make every mapping of a folio old; the caller holds a reference."""

    def one(vma: VmArea, address: int) -> bool:
        walk = PageVmaMappedWalk(host, folio, vma, address)
        while walk.next():
            if walk.pte:
                damon_ptep_mkold(vma.mm, walk.address, walk.pte)
            else:
                damon_pmdp_mkold(vma.mm, walk.address, walk.pmd)
        return True

    if not folio_mapcount(host.pages, folio) or folio not in host.pages.mapping:
        host.pages.flags[folio] |= PG_idle
        return
    rmap_walk_trylock(host, folio, one)


def damon_folio_young(host: HostMm, folio: int) -> bool:
    """Whether any mapping of a folio is young; the caller holds a reference."""
    accessed = False

    def one(vma: VmArea, address: int) -> bool:
        nonlocal accessed
        accessed = False
        walk = PageVmaMappedWalk(host, folio, vma, address)
        while walk.next():
            accessed = damon_pte_young(vma.mm, walk.address, walk.pte or walk.pmd, folio)
            if accessed:
                walk.done()
                break
        return not accessed

    if not folio_mapcount(host.pages, folio) or folio not in host.pages.mapping:
        return not host.pages.flags[folio] & PG_idle
    rmap_walk_trylock(host, folio, one)
    return accessed
