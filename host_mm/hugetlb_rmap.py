"""Map counts of huge pages, the entries that are made for them, and their place in the page cache.

Source of truth: include/linux/rmap.h (hugetlb_try_dup_anon_rmap, hugetlb_try_share_anon_rmap,
hugetlb_add_file_rmap, hugetlb_remove_rmap), mm/rmap.c: hugetlb_add_new_anon_rmap, mm/hugetlb.c
(make_huge_pte, set_huge_ptep_writable, hugetlb_add_to_page_cache, folio_zero_user),
fs/hugetlbfs/inode.c: hugetlb_delete_from_page_cache; Linux 6.18.

A huge page is mapped as a whole or not at all: its map counts are the head's. An entry of a table that is
shared counts once. The page cache has a reference for each of its 512 small pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    HPAGE_PMD_NR,
    mk_pmd,
    pte_mkdirty,
    pte_mkwrite,
    pte_mkyoung,
    pte_wrprotect,
)
from host_mm.filemap_cache import filemap_remove_folio, page_cache_store
from host_mm.hugetlb import HPG_restore_reserve
from host_mm.kernel.costs import COST_CLEAR_PAGE, COST_COPY_PAGE
from host_mm.kernel.errors import BrokenTruth
from host_mm.mm_types import MMF_HAS_PINNED, VM_WRITE
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_locked,
    PG_swapbacked,
    PG_uptodate,
    folio_maybe_dma_pinned,
)
from host_mm.pgtable_generic import set_pmd

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = [
    "copy_huge_folio", "hugetlb_add_anon_rmap", "hugetlb_add_file_rmap", "hugetlb_add_new_anon_rmap",
    "hugetlb_add_to_page_cache", "hugetlb_delete_from_page_cache",
    "hugetlb_remove_rmap", "hugetlb_try_dup_anon_rmap", "hugetlb_try_share_anon_rmap", "make_huge_pte",
    "set_huge_ptep_writable", "zero_huge_folio",
]


# -- bytes ----------------------------------------------------------------------------------------
def zero_huge_folio(host: HostMm, pfn: int) -> None:
    """folio_zero_user: 2 MiB of zeros, up to date."""
    for frame in range(pfn, pfn + HPAGE_PMD_NR):
        host.ram.clear_page(frame)
    host.sched.advance(COST_CLEAR_PAGE * HPAGE_PMD_NR)
    host.pages.flags[pfn] |= PG_uptodate


def copy_huge_folio(host: HostMm, dst: int, src: int) -> None:
    """copy_user_large_folio; may sleep between small pages."""
    for number in range(HPAGE_PMD_NR):
        host.ram.copy_page(dst + number, src + number)
    host.sched.advance(COST_COPY_PAGE * HPAGE_PMD_NR)
    if host.sched.preempt:
        host.sched.point("cond_resched")
    host.pages.flags[dst] |= PG_uptodate


# -- map counts -----------------------------------------------------------------------------------
def _map(host: HostMm, pfn: int) -> None:
    pages = host.pages
    pages.entire_mapcount[pfn] += 1
    pages.large_mapcount[pfn] += 1


def hugetlb_add_new_anon_rmap(host: HostMm, pfn: int, vma: VmArea, address: int) -> None:
    """First mapping of a private page nobody else knows."""
    pages = host.pages
    if vma.anon_vma is None:
        raise BrokenTruth("anon-vma", f"a private huge page at {address:#x} without an anon_vma")
    pages.mapping[pfn] = vma.anon_vma
    pages.index[pfn] = vma.page_index(address)
    pages.private[pfn] &= ~HPG_restore_reserve
    pages.flags[pfn] |= PG_anon | PG_swapbacked | PG_anon_exclusive
    _map(host, pfn)


def hugetlb_add_anon_rmap(host: HostMm, pfn: int, *, exclusive: bool) -> None:
    """One more entry maps a private page again after a migration."""
    if exclusive:
        host.pages.flags[pfn] |= PG_anon_exclusive
    _map(host, pfn)


def hugetlb_add_file_rmap(host: HostMm, pfn: int) -> None:
    """One more entry maps a page of a file."""
    _map(host, pfn)


def hugetlb_remove_rmap(host: HostMm, pfn: int) -> None:
    """One entry less maps the page."""
    pages = host.pages
    if not pages.entire_mapcount[pfn]:
        raise BrokenTruth("page-mapcount", f"huge page {pfn:#x} loses an entry it does not have")
    pages.entire_mapcount[pfn] -= 1
    pages.large_mapcount[pfn] -= 1


def hugetlb_try_dup_anon_rmap(host: HostMm, pfn: int, src_vma: VmArea) -> bool:
    """Fork shares the page with the child; false if it may be pinned and must be copied."""
    pages = host.pages
    if pages.flags[pfn] & PG_anon_exclusive:
        if src_vma.mm.flags & MMF_HAS_PINNED and folio_maybe_dma_pinned(pages, pfn):
            return False
        pages.flags[pfn] &= ~PG_anon_exclusive
    _map(host, pfn)
    return True


def hugetlb_try_share_anon_rmap(host: HostMm, pfn: int) -> bool:
    """Give up exclusivity before the page leaves its entry; false if it may be pinned."""
    pages = host.pages
    if folio_maybe_dma_pinned(pages, pfn):
        return False
    pages.flags[pfn] &= ~PG_anon_exclusive
    return True


# -- entries --------------------------------------------------------------------------------------
def make_huge_pte(vma: VmArea, pfn: int, *, try_mkwrite: bool) -> int:
    """A young entry for the page, writable and dirty if asked for and the VMA is."""
    entry = mk_pmd(pfn, vma.page_prot)
    if try_mkwrite and vma.flags & VM_WRITE:
        return pte_mkyoung(pte_mkwrite(pte_mkdirty(entry)))
    return pte_mkyoung(pte_wrprotect(entry))


def set_huge_ptep_writable(vma: VmArea, address: int, pmd: int) -> None:
    """Let the entry write; growing rights need no flush."""
    entry = vma.mm.host.ram.u64[pmd >> 3]
    writable = pte_mkwrite(pte_mkdirty(entry))
    if writable != entry:
        set_pmd(vma.mm, address, pmd, writable)


# -- the page cache -------------------------------------------------------------------------------
def hugetlb_add_to_page_cache(mapping: AddressSpace, pfn: int, index: int) -> bool:
    """The file has the page as its huge page `index`, locked and dirty; false: it has another one there."""
    pages = mapping.host.pages
    pages.flags[pfn] |= PG_locked
    if page_cache_store(mapping, pfn, index << 9):
        pages.flags[pfn] &= ~PG_locked
        return False
    pages.private[pfn] &= ~HPG_restore_reserve
    pages.flags[pfn] |= PG_dirty
    return True


def hugetlb_delete_from_page_cache(mapping: AddressSpace, pfn: int) -> None:
    """The file has a hole there; the folio lock and a reference are held."""
    mapping.host.pages.flags[pfn] &= ~(PG_dirty | PG_uptodate)
    filemap_remove_folio(mapping, pfn)
