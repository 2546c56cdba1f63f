"""Swap readahead: the slots, or the addresses, around a fault are read along with it.

Source of truth: mm/swap_state.c (swapin_readahead, swap_cluster_readahead, swap_vma_readahead,
swapin_nr_pages, __swapin_nr_pages, swap_vma_ra_win, swap_update_readahead); Linux 6.18.

The window is at most 2**page_cluster pages and grows with hits: faults that find a folio in the swap
cache that was read ahead (PG_readahead). By VMA (the default) the window lies around the address and
each VMA counts for itself; otherwise around the slot.

    --param vm.page_cluster=N           0: no readahead (the default here; 3 in Linux)
    --param swap.vma_ra_enabled=N       by slot

Not modelled: rotating disks, which Linux reads by slot whatever is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.swapops import (
    is_swap_pte,
    non_swap_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_offset,
    swp_type,
)
from host_mm.page import PG_readahead, put_page
from host_mm.page_io import swap_read_folio
from host_mm.pgtable_generic import pte_offset_map, ptep_get
from host_mm.swap_state import read_swap_cache

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea, VmFault

__all__ = ["SwapReadahead", "swap_update_readahead", "swapin_nr_pages", "swapin_readahead"]

SWAP_RA_ORDER_CEILING = 5
SWAP_RA_HITS_MAX = 63
INITIAL_HITS = 4
"""So that a VMA's first window is a small one, not none."""
_PMD = 1 << 21


class SwapReadahead:
    """The settings, and what readahead by slot remembers of the whole host."""

    __slots__ = ("by_vma", "hits", "last_pages", "page_cluster", "prev_offset")

    def __init__(self, params: dict[str, str]) -> None:
        self.page_cluster = int(params.get("vm.page_cluster", "0"))
        self.by_vma = params.get("swap.vma_ra_enabled", "Y").lower() in ("y", "1", "on", "yes", "true")
        self.prev_offset = self.hits = self.last_pages = 0


def swapin_nr_pages(prev: int, now: int, hits: int, max_pages: int, prev_win: int) -> int:
    """__swapin_nr_pages: the window for a fault at `now` (a slot or a page number) after one at `prev`."""
    pages = hits + 2
    if pages == 2:
        # No hits to judge by: only a fault beside the last one is taken for a sequence.
        if now not in (prev + 1, prev - 1):
            pages = 1
    else:
        roundup = 4
        while roundup < pages:
            roundup <<= 1
        pages = roundup
    return max(min(pages, max_pages), prev_win // 2)


def swapin_readahead(vmf: VmFault, entry: int, nid: int) -> int:
    """Read a slot and what is around it: the slot's folio with a reference, or -1."""
    host = vmf.mm.host
    ra = host.swap_readahead
    if ra.page_cluster:
        around = _vma_window(vmf) if ra.by_vma else _slot_window(host, entry)
        for other in around:
            _read_ahead(vmf.mm, other, nid, target=other == entry)
        if around:
            host.lru.lru_add_drain()
    return read_swap_cache(host, entry, nid, swap_read_folio, mm=vmf.mm)


def _read_ahead(mm: MmStruct, entry: int, nid: int, *, target: bool) -> None:
    def read(where: HostMm, pfn: int) -> None:
        swap_read_folio(where, pfn)
        if not target:
            where.pages.flags[pfn] |= PG_readahead
            where.vmstat["swap_ra"] += 1

    pfn = read_swap_cache(mm.host, entry, nid, read, mm=mm)
    if pfn >= 0:
        put_page(mm.host, pfn)


def _slot_window(host: HostMm, entry: int) -> list[int]:
    ra, swap = host.swap_readahead, host.swap
    assert swap is not None
    offset = swp_offset(entry)
    hits, ra.hits = ra.hits, 0
    pages = swapin_nr_pages(ra.prev_offset, offset, hits, 1 << ra.page_cluster, ra.last_pages)
    if not hits:
        ra.prev_offset = offset
    ra.last_pages = pages
    mask = pages - 1
    if not mask:
        return []
    first, last = offset & ~mask or 1, min(offset | mask, swap.max - 1)
    return [swp_entry(swp_type(entry), slot) for slot in range(first, last + 1) if swap.swap_count(slot)]


def _vma_window(vmf: VmFault) -> list[int]:
    vma, mm, address = vmf.vma, vmf.mm, vmf.address
    max_win = 1 << min(mm.host.swap_readahead.page_cluster, SWAP_RA_ORDER_CEILING)
    prev, prev_win, hits = vma.swap_readahead_info
    win = swapin_nr_pages(prev >> 12, address >> 12, hits, max_win, prev_win)
    vma.swap_readahead_info = address, win, 0
    if win == 1:
        return []
    if address == prev + 4096:
        left = address
    elif prev == address + 4096:
        left = address - (win << 12) + 4096
    else:
        left = address - ((win - 1) // 2 << 12)
    table = address & ~(_PMD - 1)
    start, end = max(left, vma.start, table), min(left + (win << 12), vma.end, table + _PMD)
    found: list[int] = []
    pte = pte_offset_map(mm, vmf.pmd, start)
    for at in range(pte, pte + (end - start >> 9), 8) if pte else ():
        value = ptep_get(mm, at)
        if is_swap_pte(value) and not non_swap_entry(entry := pte_to_swp_entry(value)):
            found.append(entry)
    return found


def swap_update_readahead(host: HostMm, pfn: int, vma: VmArea, address: int) -> None:
    """A fault found its folio in the swap cache: count a hit if it was read ahead."""
    ra = host.swap_readahead
    flags = host.pages.flags
    hit = bool(flags[pfn] & PG_readahead)
    flags[pfn] &= ~PG_readahead
    if ra.by_vma:
        _, win, hits = vma.swap_readahead_info
        vma.swap_readahead_info = address, win, min(hits + hit, SWAP_RA_HITS_MAX)
    elif hit:
        ra.hits += 1
    if hit:
        host.vmstat["swap_ra_hit"] += 1
