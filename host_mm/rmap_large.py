"""How often a large folio is mapped: as a whole, and page by page.

Source of truth: mm/rmap.c (__folio_add_rmap, __folio_remove_rmap, __folio_mod_stat,
folio_add_new_anon_rmap), include/linux/rmap.h (folio_add_large_mapcount and its like,
folio_try_dup_anon_rmap_pmd, folio_try_share_anon_rmap_pmd); Linux 6.18 with CONFIG_PAGE_MAPCOUNT.

An entry of 2 MiB counts in entire_mapcount of the head, an entry of 4 KiB in mapcount of its page; both
in large_mapcount. An anonymous folio of which some page has lost its last entry while others are mapped
is queued for a split. Small folios are counted in rmap.py.

Not modelled: CONFIG_NO_PAGE_MAPCOUNT, entries at level 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.huge_mm import deferred_split_folio
from host_mm.kernel.errors import BrokenTruth
from host_mm.mm_types import MMF_HAS_PINNED, VM_LOCKED
from host_mm.page import ENTIRELY_MAPPED, PG_anon, PG_anon_exclusive, PG_swapbacked, folio_maybe_dma_pinned

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "folio_add_anon_rmap_pmd", "folio_add_anon_rmap_ptes", "folio_add_large_rmap_pmd",
    "folio_add_large_rmap_ptes", "folio_remove_large_rmap_pte", "folio_remove_rmap_pmd",
    "folio_try_dup_anon_rmap_pmd", "folio_try_share_anon_rmap_pmd", "mapped_stat", "set_new_large_rmap",
]


def _count(host: HostMm, folio: int, mm: MmStruct, nr: int) -> None:
    """folio_add_large_mapcount, folio_sub_large_mapcount."""
    pages = host.pages
    pages.large_mapcount[folio] += nr
    mms = pages.mm_mapcount.setdefault(folio, {})
    left = mms.get(mm, 0) + nr
    if left > 0:
        mms[mm] = left
    else:
        if left:
            raise BrokenTruth(
                "page-mapcount", f"folio {folio:#x} loses an entry it does not have", host.stream.here()
            )
        del mms[mm]
        if not mms:
            del pages.mm_mapcount[folio]


def mapped_stat(flags: int) -> str:
    """The counter of mapped pages whose folio has these flags."""
    if flags & PG_anon:
        return "nr_anon_pages"
    return "nr_shmem_mapped" if flags & PG_swapbacked else "nr_file_mapped"


def _mod_stat(host: HostMm, folio: int, nr: int, nr_thps: int) -> None:
    flags = host.pages.flags[folio]
    host.vmstat[mapped_stat(flags)] += nr
    if nr_thps:
        host.vmstat["nr_anon_transparent_hugepages" if flags & PG_anon else "nr_shmem_pmdmapped"] += nr_thps


# -- one more ---------------------------------------------------------------------------------------
def set_new_large_rmap(host: HostMm, folio: int, vma: VmArea) -> None:
    """folio_add_new_anon_rmap's counts: the first mapping, as a whole, of a folio nobody else knows."""
    pages = host.pages
    pages.entire_mapcount[folio] = 1
    pages.nr_pages_mapped[folio] = ENTIRELY_MAPPED
    _count(host, folio, vma.mm, 1)
    _mod_stat(host, folio, 1 << pages.order[folio], 1)


def folio_add_large_rmap_ptes(host: HostMm, folio: int, page: int, nr: int, mm: MmStruct) -> None:
    """`nr` more entries of `mm` map the pages from `page` on."""
    pages = host.pages
    mapcount = pages.mapcount
    first = 0
    for at in range(page, page + nr):
        if not mapcount[at]:
            first += 1
        mapcount[at] += 1
    pages.nr_pages_mapped[folio] += first
    _count(host, folio, mm, nr)
    if pages.nr_pages_mapped[folio] < ENTIRELY_MAPPED:
        _mod_stat(host, folio, first, 0)


def folio_add_large_rmap_pmd(host: HostMm, folio: int, mm: MmStruct) -> None:
    """One more entry of `mm` maps the folio as a whole."""
    pages = host.pages
    pages.entire_mapcount[folio] += 1
    _count(host, folio, mm, 1)
    if pages.entire_mapcount[folio] == 1:
        mapped = pages.nr_pages_mapped[folio]
        pages.nr_pages_mapped[folio] = mapped + ENTIRELY_MAPPED
        _mod_stat(host, folio, (1 << pages.order[folio]) - mapped, 1)


def folio_add_anon_rmap_ptes(
    host: HostMm, folio: int, page: int, nr: int, vma: VmArea, *, exclusive: bool
) -> None:
    """folio_add_large_rmap_ptes for anonymous pages, which become `exclusive`."""
    folio_add_large_rmap_ptes(host, folio, page, nr, vma.mm)
    if exclusive and host.profile.anon_exclusive:
        flags = host.pages.flags
        for at in range(page, page + nr):
            flags[at] |= PG_anon_exclusive


def folio_add_anon_rmap_pmd(host: HostMm, folio: int, vma: VmArea, *, exclusive: bool) -> None:
    """folio_add_large_rmap_pmd for an anonymous folio, which becomes `exclusive`."""
    folio_add_large_rmap_pmd(host, folio, vma.mm)
    if exclusive and host.profile.anon_exclusive:
        host.pages.flags[folio] |= PG_anon_exclusive


# -- one less ---------------------------------------------------------------------------------------
def folio_remove_large_rmap_pte(host: HostMm, folio: int, page: int, vma: VmArea) -> None:
    """One entry of `vma` less maps this page of the folio."""
    pages = host.pages
    count = pages.mapcount[page] - 1
    if count < 0:
        raise BrokenTruth(
            "page-mapcount", f"pfn {page:#x} loses an entry it does not have", host.stream.here()
        )
    _count(host, folio, vma.mm, -1)
    pages.mapcount[page] = count
    nr = left = 0
    if not count:
        left = pages.nr_pages_mapped[folio] = pages.nr_pages_mapped[folio] - 1
        nr = 1 if left < ENTIRELY_MAPPED else 0
    _removed(host, folio, vma, nr, 0, partially_mapped=bool(nr and left))


def folio_remove_rmap_pmd(host: HostMm, folio: int, vma: VmArea) -> None:
    """One entry of `vma` less maps the folio as a whole."""
    pages = host.pages
    _count(host, folio, vma.mm, -1)
    pages.entire_mapcount[folio] -= 1
    if pages.entire_mapcount[folio] < 0:
        raise BrokenTruth(
            "page-mapcount", f"folio {folio:#x} loses a huge entry it does not have", host.stream.here()
        )
    nr = nr_pages = 0
    if not pages.entire_mapcount[folio]:
        nr_pages = 1 << pages.order[folio]
        left = pages.nr_pages_mapped[folio] = pages.nr_pages_mapped[folio] - ENTIRELY_MAPPED
        nr = nr_pages - left
    _removed(host, folio, vma, nr, 1 if nr_pages else 0, partially_mapped=0 < nr < nr_pages)


def _removed(
    host: HostMm, folio: int, vma: VmArea, nr: int, nr_thps: int, *, partially_mapped: bool
) -> None:
    if partially_mapped and host.pages.flags[folio] & PG_anon and folio not in host.thp.partially_mapped:
        deferred_split_folio(host, folio, partially_mapped=True)
    _mod_stat(host, folio, -nr, -nr_thps)
    if vma.flags & VM_LOCKED:
        host.lru.mlock.munlock_folio(folio)


# -- sharing ------------------------------------------------------------------------------------
def folio_try_dup_anon_rmap_pmd(host: HostMm, folio: int, dst_vma: VmArea, src_vma: VmArea) -> bool:
    """Fork shares the folio as a whole with the child; false if it may be pinned and must be copied."""
    pages = host.pages
    if pages.flags[folio] & PG_anon_exclusive or not host.profile.anon_exclusive:
        if src_vma.mm.flags & MMF_HAS_PINNED and folio_maybe_dma_pinned(pages, folio):
            return False
        pages.flags[folio] &= ~PG_anon_exclusive
    folio_add_large_rmap_pmd(host, folio, dst_vma.mm)
    return True


def folio_try_share_anon_rmap_pmd(host: HostMm, folio: int) -> bool:
    """Give up exclusivity before the folio leaves its huge entry; false if it may be pinned."""
    pages = host.pages
    if folio_maybe_dma_pinned(pages, folio):
        return False
    pages.flags[folio] &= ~PG_anon_exclusive
    return True
