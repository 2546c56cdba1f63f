"""The swap cache: folios that have a swap slot, found by slot.

Source of truth: mm/swap_state.c (swap_cache_get_folio, swap_cache_add_folio, swap_cache_del_folio,
__read_swap_cache_async, free_swap_cache), mm/swapfile.c (folio_alloc_swap, folio_free_swap,
free_swap_and_cache_nr, __try_to_reclaim_swap); Linux 6.18.

The cache holds one reference to each of its folios and SWAP_HAS_CACHE on the slot. A folio enters
and leaves it locked. `private` of the folio is its swap entry.

Not modelled: shadow entries (workingset refaults), large folios. Readahead is in swap_readahead.py.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EEXIST, ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.swapops import swp_entry, swp_offset
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.kernel.errors import BrokenTruth
from host_mm.page import (
    PG_dirty,
    PG_locked,
    PG_swapbacked,
    PG_swapcache,
    PG_writeback,
    get_page,
    put_page,
    set_page_dirty,
    try_get_page,
)
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, alloc_pages
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct
    from host_mm.swapfile import SwapInfo

__all__ = [
    "TRACEPOINTS",
    "folio_alloc_swap",
    "folio_free_swap",
    "free_swap_and_cache",
    "free_swap_cache",
    "read_swap_cache",
    "swap_cache_add_folio",
    "swap_cache_del_folio",
    "swap_cache_get_folio",
    "swap_cache_replace_folio",
    "try_to_unuse",
]

SWAP_CACHE_ADD = Tracepoint(
    "refault", "swap_cache_add", ("pfn", "slot"),
    lambda pfn, slot: f"pfn={pfn:#x} slot={slot:#x}", doc="A folio enters the swap cache.",
)
SWAP_CACHE_DEL = Tracepoint(
    "refault", "swap_cache_del", ("pfn", "slot"),
    lambda pfn, slot: f"pfn={pfn:#x} slot={slot:#x}", doc="A folio leaves the swap cache.",
)
TRACEPOINTS = (SWAP_CACHE_ADD, SWAP_CACHE_DEL)

_RECLAIM_SCAN = 64
"""How many cached slots a full swap file's allocation looks at to get one back."""


def _swap(host: HostMm) -> SwapInfo:
    if host.swap is None:
        raise BrokenTruth("swap-cache", "a swap entry on a host without swap", host.stream.here())
    return host.swap


def swap_cache_get_folio(host: HostMm, entry: int) -> int:
    """The folio of this entry, with a reference and not locked, or -1.

    It may leave the cache at once: lock it and look again (folio_matches_swap_entry).
    """
    cached = _swap(host).cache[swp_offset(entry)]
    if cached and try_get_page(host, cached - 1):
        return int(cached - 1)
    return -1


def swap_cache_add_folio(host: HostMm, pfn: int, entry: int) -> None:
    """Put a locked folio into the cache; the slot's SWAP_HAS_CACHE is the caller's."""
    pages = host.pages
    swap = _swap(host)
    offset = swp_offset(entry)
    if not pages.flags[pfn] & PG_locked or pages.flags[pfn] & PG_swapcache:
        raise BrokenTruth(
            "swap-cache", f"pfn {pfn:#x} enters the swap cache unlocked or twice", host.stream.here()
        )
    if swap.cache[offset] or not swap.has_cache(offset):
        raise BrokenTruth("swap-cache", f"slot {offset} is taken or was not claimed", host.stream.here())
    swap.cache[offset] = pfn + 1
    get_page(host, pfn)
    pages.flags[pfn] |= PG_swapcache
    pages.private[pfn] = entry
    if (t := host.trace.swap_cache_add) is not None:
        t(pfn, offset)


def _swap_cache_forget(host: HostMm, pfn: int) -> int:
    """__swap_cache_del_folio: out of the table; the slot and the reference are the caller's."""
    pages = host.pages
    swap = _swap(host)
    flags = pages.flags[pfn]
    offset = swp_offset(pages.private[pfn])
    if not flags & PG_locked or not flags & PG_swapcache or flags & PG_writeback:
        raise BrokenTruth(
            "swap-cache", f"pfn {pfn:#x} leaves the swap cache unlocked or under writeback",
            host.stream.here(),
        )
    if swap.cache[offset] != pfn + 1:
        raise BrokenTruth("swap-cache", f"slot {offset} does not hold pfn {pfn:#x}", host.stream.here())
    swap.cache[offset] = 0
    pages.private[pfn] = 0
    pages.flags[pfn] = flags & ~PG_swapcache
    if (t := host.trace.swap_cache_del) is not None:
        t(pfn, offset)
    return offset


def swap_cache_del_folio(host: HostMm, pfn: int) -> None:
    """Take a locked folio out of the cache; its slot is freed if no entry holds it.

    The folio must be dirty or hold nothing its slot has not, or data is lost.
    """
    offset = _swap_cache_forget(host, pfn)
    _swap(host).put_cache(offset)
    put_page(host, pfn)


def swap_cache_del_frozen(host: HostMm, pfn: int) -> None:
    """__remove_mapping's part: the folio's references are frozen, the cache's one among them."""
    offset = _swap_cache_forget(host, pfn)
    _swap(host).put_cache(offset)


def swap_cache_replace_folio(host: HostMm, old: int, new: int) -> None:
    """Migration: `new` takes the place, the slot and the cache's reference of `old`; both locked."""
    pages = host.pages
    swap = _swap(host)
    entry = pages.private[old]
    offset = swp_offset(entry)
    if swap.cache[offset] != old + 1 or pages.flags[old] & PG_writeback:
        raise BrokenTruth(
            "swap-cache", f"slot {offset} does not hold pfn {old:#x} quietly", host.stream.here()
        )
    swap.cache[offset] = new + 1
    pages.private[new] = entry
    pages.flags[new] |= PG_swapcache
    pages.private[old] = 0
    pages.flags[old] &= ~PG_swapcache


# -- slots of folios ----------------------------------------------------------------------------


def folio_alloc_swap(host: HostMm, pfn: int) -> int:
    """Give a locked folio a slot and put it into the swap cache. 0 or -ENOMEM."""
    swap = host.swap
    if swap is None:
        return -ENOMEM
    offset = swap.alloc()
    if not offset:
        offset = _reclaim_cached_slot(host, swap)
    if not offset:
        return -ENOMEM
    if host.memcg.folios and host.memcg.try_charge_swap(pfn, offset):
        swap.put_cache(offset)
        return -ENOMEM
    swap_cache_add_folio(host, pfn, swp_entry(swap.type, offset))
    return 0


def folio_free_swap(host: HostMm, pfn: int) -> bool:
    """Give a locked folio's slot back if no page-table entry holds it. The folio becomes dirty."""
    pages = host.pages
    flags = pages.flags[pfn]
    if not flags & PG_swapcache or flags & PG_writeback:
        return False
    if _swap(host).swap_count(swp_offset(pages.private[pfn])):
        return False
    swap_cache_del_folio(host, pfn)
    set_page_dirty(host, pfn)
    return True


def _try_to_reclaim_swap(host: HostMm, swap: SwapInfo, offset: int, *, anyway: bool) -> bool:
    """__try_to_reclaim_swap: free a slot that only the swap cache holds, if its folio allows."""
    pages = host.pages
    pfn = swap_cache_get_folio(host, swp_entry(swap.type, offset))
    if pfn < 0:
        return False
    freed = False
    if folio_trylock(host, pfn):
        wanted = anyway or not pages.mapcount[pfn] or swap.vm_swap_full()
        if (
            wanted
            and pages.flags[pfn] & PG_swapcache
            and swp_offset(pages.private[pfn]) == offset
            and not pages.flags[pfn] & PG_writeback
            and not swap.swap_count(offset)
        ):
            swap_cache_del_folio(host, pfn)
            pages.flags[pfn] |= PG_dirty
            freed = True
        folio_unlock(host, pfn)
    put_page(host, pfn)
    return freed


def _reclaim_cached_slot(host: HostMm, swap: SwapInfo) -> int:
    # swap_reclaim_full_clusters: slots whose only holder is the swap cache can be had back.
    offset = 0
    for _ in range(_RECLAIM_SCAN):
        offset = swap.find_only_cached(offset + 1)
        if not offset:
            break
        if _try_to_reclaim_swap(host, swap, offset, anyway=True):
            found = swap.alloc()
            if found:
                return found
    return 0


def try_to_unuse(host: HostMm) -> None:
    """swapoff's second half: slots that only the swap cache holds are given back, and their folios."""
    swap = _swap(host)
    offset = swap.find_only_cached(1)
    while offset:
        _try_to_reclaim_swap(host, swap, offset, anyway=True)
        offset = swap.find_only_cached(offset + 1)


def free_swap_and_cache(host: HostMm, entry: int) -> None:
    """A page-table entry that held this swap entry is gone (munmap, DONTNEED, exit)."""
    swap = _swap(host)
    if swap.swap_free(entry):
        _try_to_reclaim_swap(host, swap, swp_offset(entry), anyway=False)


def free_swap_cache(host: HostMm, pfn: int) -> None:
    """The folio lost a mapping: if it was the last, its slot is given back too. Needs a reference."""
    pages = host.pages
    if pages.flags[pfn] & PG_swapcache and not pages.mapcount[pfn] and folio_trylock(host, pfn):
        folio_free_swap(host, pfn)
        folio_unlock(host, pfn)


def read_swap_cache(
    host: HostMm, entry: int, nid: int, read: Callable[[HostMm, int], None], gfp: int = GFP_HIGHUSER_MOVABLE,
    mm: MmStruct | None = None,
) -> int:
    """read_swap_cache_async: the entry's folio with a reference, being read if it was not cached.

    -1: no memory, or the entry is no longer in use. `read` is swap_read_folio. The memory cgroup that
    swapped the page out is charged, or, if it is gone, that of `mm`.
    """
    swap = _swap(host)
    sched = host.sched
    new = -1
    while True:
        pfn = swap_cache_get_folio(host, entry)
        if pfn >= 0 or not swap.swap_count(swp_offset(entry)):
            break
        if new < 0:
            new = alloc_pages(host, gfp | GFP_COMP, 0, nid)
            if new < 0:
                return -1
        err = swap.swapcache_prepare(entry)
        if err == -EEXIST:
            # Another task claimed the slot and will add its folio, or is letting go of it.
            sched.sleep(1000)
            continue
        if err:
            break
        if host.memcg.groups and host.memcg.swapin_charge(new, swp_offset(entry), mm, gfp):
            swap.put_cache(swp_offset(entry))
            put_page(host, new)
            return -1
        host.pages.flags[new] |= PG_locked | PG_swapbacked
        swap_cache_add_folio(host, new, entry)
        host.lru.folio_add_lru(new)
        read(host, new)
        return new
    if new >= 0:
        put_page(host, new)
    return pfn
