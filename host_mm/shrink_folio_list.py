"""What becomes of folios that reclaim isolated: freed, written, kept or activated.

Source of truth: mm/vmscan.c: shrink_folio_list, folio_check_references, pageout, writeout,
__remove_mapping, move_folios_to_lru; Linux 6.18.

The protocol, in the order of class 2: try_to_unmap replaces every page-table entry by the swap entry
inside its own bracket and only notes that a flush is due; before the bytes go out a folio that may
have been written through a stale writable translation waits for try_to_unmap_flush_dirty, and
before any frame is given back try_to_unmap_flush has run.

    break skip-batched-flush           neither flush runs
    break no-flush-before-io           only the first is left out
    break free-before-batched-flush    frames are freed before the last flush
    break skip-dirty-check             a folio that is dirty again is dropped

A large folio is split before it goes to swap; one of MADV_FREE goes as a whole.

Not modelled: swapping large folios out as a whole (THP_SWAP), demotion to slower nodes,
PGDAT_WRITEBACK (kswapd does not stall on folios marked for immediate reclaim: nr_immediate stays 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.kernel.costs import COST_SCAN_PAGE
from host_mm.mm_types import VM_EXEC, VM_LOCKED
from host_mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
    PG_lru,
    PG_mlocked,
    PG_reclaim,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
    PG_writeback,
    folio_mapcount,
    folio_maybe_dma_pinned,
    folio_nr_pages,
    folio_ref_freeze,
    folio_ref_unfreeze,
    folio_test_large,
    put_page,
    set_page_dirty,
)
from host_mm.page_alloc import gfp_zone
from host_mm.page_io import swap_writeout
from host_mm.rmap import folio_referenced
from host_mm.rmap_unmap import TTU_BATCH_FLUSH, TTU_SPLIT_HUGE_PMD, TTU_SYNC, try_to_unmap
from host_mm.swap_state import folio_alloc_swap, folio_free_swap, swap_cache_del_frozen
from host_mm.tlb import try_to_unmap_flush, try_to_unmap_flush_dirty
from host_mm.truncate import remove_mapping
from host_mm.vmscan_trace import ReclaimStat, trace_reclaim_flags

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.lru import Lruvec
    from host_mm.memcontrol import MemCgroup

__all__ = ["DEF_PRIORITY", "FREE_BATCH", "ScanControl", "move_folios_to_lru", "shrink_folio_list"]

DEF_PRIORITY = 12

FREE_BATCH = 31
"""Frames freed together after one flush: FOLIO_BATCH_SIZE."""

# enum folio_references, and what may become of a folio.
_RECLAIM, _RECLAIM_CLEAN, _KEEP, _ACTIVATE = range(4)
_KEPT_LOCKED, _KEPT, _ACTIVATED, _FREED = range(4)
_UNQUEUED = PG_dirty | PG_writeback | PG_swapbacked | PG_anon


class ScanControl:
    """struct scan_control."""

    __slots__ = (
        "force_deactivate", "gfp_mask", "is_kswapd", "may_deactivate", "may_swap",
        "may_writepage", "nr_congested", "nr_immediate", "nr_reclaimed", "nr_scanned", "nr_taken",
        "nr_to_reclaim", "nr_writeback", "order", "priority", "reclaim_idx", "skipped_deactivate",
        "target_mem_cgroup",
    )

    def __init__(self, gfp_mask: int, *, order: int = 0, nr_to_reclaim: int = 0) -> None:
        self.gfp_mask = gfp_mask
        self.reclaim_idx = gfp_zone(gfp_mask)
        self.order = order
        self.nr_to_reclaim = nr_to_reclaim
        self.priority = DEF_PRIORITY
        self.is_kswapd = False
        self.may_writepage = True
        self.may_swap = True
        self.may_deactivate = 0
        self.force_deactivate = False
        self.skipped_deactivate = False
        self.target_mem_cgroup: MemCgroup | None = None
        self.nr_scanned = self.nr_reclaimed = self.nr_taken = 0
        self.nr_writeback = self.nr_congested = self.nr_immediate = 0


class _Shrink:
    """One call of shrink_folio_list."""

    __slots__ = (
        "asks_twice", "free", "host", "ignore_references", "reclaimed", "sc", "stat", "todo",
    )

    def __init__(
        self, host: HostMm, folios: list[int], sc: ScanControl, ignore_references: bool
    ) -> None:
        self.todo = folios[::-1]
        self.reclaimed = 0
        self.host = host
        self.sc = sc
        self.ignore_references = ignore_references
        self.asks_twice = host.profile.reclaim_asks_for_pins_twice
        self.stat = ReclaimStat()
        self.free: list[int] = []

    def check_references(self, pfn: int) -> int:
        """folio_check_references: a mapped folio gets a second trip, one used twice is activated."""
        host = self.host
        referenced_ptes, vm_flags = folio_referenced(
            host, pfn, is_locked=True, memcg=self.sc.target_mem_cgroup
        )
        if vm_flags & VM_LOCKED:
            return _ACTIVATE
        if referenced_ptes == -1:
            return _KEEP
        if host.lru_gen_enabled:
            if not referenced_ptes:
                return _RECLAIM
            return _ACTIVATE if host.gens.set_refs(pfn) else _KEEP
        flags = host.pages.flags
        referenced_folio = flags[pfn] & PG_referenced
        flags[pfn] &= ~PG_referenced
        file = not flags[pfn] & PG_swapbacked
        if referenced_ptes:
            flags[pfn] |= PG_referenced
            if referenced_folio or referenced_ptes > 1 or (vm_flags & VM_EXEC and file):
                return _ACTIVATE
            return _KEEP
        return _RECLAIM_CLEAN if referenced_folio and file else _RECLAIM

    def one(self, pfn: int) -> int:
        """What becomes of one isolated, locked folio."""
        host = self.host
        flags = host.pages.flags
        self.sc.nr_scanned += folio_nr_pages(host.pages, pfn)
        if flags[pfn] & PG_mlocked:
            return _ACTIVATED
        self.stat.nr_unqueued_dirty += flags[pfn] & _UNQUEUED == PG_dirty
        if flags[pfn] & PG_writeback:
            return self._under_writeback(pfn)
        references = _RECLAIM
        if not self.ignore_references:
            references = self.check_references(pfn)
        if references == _ACTIVATE:
            return _ACTIVATED
        if references == _KEEP:
            self.stat.nr_ref_keep += folio_nr_pages(host.pages, pfn)
            return _KEPT_LOCKED
        if flags[pfn] & (PG_anon | PG_swapbacked | PG_swapcache) == PG_anon | PG_swapbacked:
            if folio_maybe_dma_pinned(host.pages, pfn):
                return _KEPT_LOCKED
            if folio_test_large(host.pages, pfn) and not self._split(pfn):
                return _ACTIVATED
            if folio_alloc_swap(host, pfn):
                return _ACTIVATED
            set_page_dirty(host, pfn)
        if folio_mapcount(host.pages, pfn) and not self._unmap(pfn):
            return _ACTIVATED
        if self.asks_twice and folio_maybe_dma_pinned(host.pages, pfn):
            return _ACTIVATED
        if flags[pfn] & PG_dirty and (flags[pfn] & PG_swapbacked or not flags[pfn] & PG_anon):
            kept = self._pageout(pfn, references)
            if kept != _FREED:
                return kept
        return self._remove(pfn)

    def _split(self, pfn: int) -> bool:
        """Large folios are swapped out page by page; the others of this one come next, last first."""
        if self.host.split_folio(pfn, self.todo):
            return False
        self.host.vmstat["thp_swpout_fallback"] += 1
        self.sc.nr_scanned -= HPAGE_PMD_NR - 1
        return True

    def _under_writeback(self, pfn: int) -> int:
        flags = self.host.pages.flags
        flags[pfn] |= PG_reclaim
        self.stat.nr_writeback += folio_nr_pages(self.host.pages, pfn)
        return _ACTIVATED

    def _unmap(self, pfn: int) -> bool:
        host = self.host
        was_swapbacked = host.pages.flags[pfn] & PG_swapbacked
        large = folio_test_large(host.pages, pfn)
        try_to_unmap(host, pfn, TTU_BATCH_FLUSH | (TTU_SPLIT_HUGE_PMD | TTU_SYNC if large else 0))
        if not folio_mapcount(host.pages, pfn):
            return True
        nr_pages = folio_nr_pages(host.pages, pfn)
        self.stat.nr_unmap_fail += nr_pages
        if not was_swapbacked and host.pages.flags[pfn] & PG_swapbacked:
            self.stat.nr_lazyfree_fail += nr_pages
        return False

    def _pageout(self, pfn: int, references: int) -> int:
        """pageout: _FREED means that the folio is clean now and locked."""
        host = self.host
        pages = host.pages
        if not pages.flags[pfn] & PG_swapbacked:
            # Of a file system's pages only the flusher writes any; at the end of that this one goes first.
            pages.flags[pfn] |= PG_reclaim
            host.vmstat["nr_vmscan_immediate_reclaim"] += 1
            return _ACTIVATED
        if references == _RECLAIM_CLEAN or not self.sc.may_writepage:
            return _KEPT_LOCKED
        if not host.breaks & {"skip-batched-flush", "no-flush-before-io"}:
            try_to_unmap_flush_dirty(host)
        # is_page_cache_freeable: the isolation's reference and those of the page or swap cache.
        mapping = None if pages.flags[pfn] & PG_anon else pages.mapping.get(pfn)
        freeable = pages.refcount[pfn] == 1 + folio_nr_pages(pages, pfn)
        if not freeable or (mapping is None and not pages.flags[pfn] & PG_swapcache):
            return _KEPT_LOCKED
        if folio_test_large(pages, pfn) and host.split_folio(pfn, self.todo):
            return _ACTIVATED
        pages.flags[pfn] = (pages.flags[pfn] & ~PG_dirty) | PG_reclaim
        if mapping is None:
            swap_writeout(host, pfn)
        elif not mapping.a_ops.writeout(mapping, pfn):
            pages.flags[pfn] &= ~PG_reclaim
            return _ACTIVATED
        if not pages.flags[pfn] & PG_writeback:
            pages.flags[pfn] &= ~PG_reclaim
        if (t := host.trace.mm_vmscan_write_folio) is not None:
            t(pfn, trace_reclaim_flags(False))
        host.vmstat["nr_vmscan_write"] += 1
        self.stat.nr_pageout += 1
        if pages.flags[pfn] & (PG_writeback | PG_dirty):
            return _KEPT
        if not folio_trylock(host, pfn):
            return _KEPT
        if pages.flags[pfn] & (PG_writeback | PG_dirty):
            return _KEPT_LOCKED
        return _FREED

    def _remove(self, pfn: int) -> int:
        """__remove_mapping: freeze the references, look at PG_dirty after that, drop the swap cache."""
        host = self.host
        pages = host.pages
        if host.sched.preempt:
            host.sched.point("ref-freeze")
        flags = pages.flags[pfn]
        if flags & PG_anon and not flags & PG_swapbacked:
            if not folio_ref_freeze(pages, pfn, 1):
                return _KEPT_LOCKED
            host.vmstat["pglazyfreed"] += folio_nr_pages(pages, pfn)
        elif not flags & (PG_anon | PG_swapcache):
            mapping = pages.mapping.get(pfn)
            if mapping is None or not remove_mapping(mapping, pfn):
                return _KEPT_LOCKED
            pages.refcount[pfn] = 0
        else:
            if not flags & PG_swapcache or not folio_ref_freeze(pages, pfn, 2):
                return _KEPT_LOCKED
            if pages.flags[pfn] & PG_dirty:
                folio_ref_unfreeze(pages, pfn, 2)
                return _KEPT_LOCKED
            if host.checks is not None:
                host.checks.folio_dropped_clean(pfn)
            swap_cache_del_frozen(host, pfn)
        folio_unlock(host, pfn)
        self.reclaimed += folio_nr_pages(pages, pfn)
        self.free.append(pfn)
        if len(self.free) >= FREE_BATCH:
            self.free_batch()
        return _FREED

    def free_batch(self) -> None:
        """Flush what is pending, then give the frames back."""
        host = self.host
        early = "free-before-batched-flush" in host.breaks
        if not early and "skip-batched-flush" not in host.breaks:
            try_to_unmap_flush(host)
        frames, self.free = self.free, []
        for pfn in frames:
            host.pages.flags[pfn] &= ~(PG_active | PG_unevictable)
            host.allocator.free_frozen_pages(pfn, host.pages.order[pfn])
        if early:
            try_to_unmap_flush(host)


def shrink_folio_list(
    host: HostMm, folios: list[int], sc: ScanControl, *, ignore_references: bool = False
) -> tuple[int, ReclaimStat, list[int]]:
    """Reclaim isolated folios: (frames freed, what was met, the folios that stay, still isolated)."""
    shrink = _Shrink(host, folios, sc, ignore_references)
    sched = host.sched
    kept: list[int] = []
    while shrink.todo:
        pfn = shrink.todo.pop()
        sched.advance(COST_SCAN_PAGE)
        if sched.preempt:
            sched.point("cond_resched")
        if not folio_trylock(host, pfn):
            kept.append(pfn)
            continue
        fate = shrink.one(pfn)
        if fate == _FREED:
            continue
        if fate == _ACTIVATED:
            _activate_locked(host, pfn, shrink.stat)
        if fate != _KEPT:
            folio_unlock(host, pfn)
        kept.append(pfn)
    shrink.free_batch()
    host.vmstat["pgactivate"] += sum(shrink.stat.nr_activate)
    return shrink.reclaimed, shrink.stat, kept


def move_folios_to_lru(host: HostMm, vec: Lruvec, folios: list[int]) -> int:
    """Put isolated folios back at the heads of their lists and drop the isolation's references."""
    flags = host.pages.flags
    refcount = host.pages.refcount
    moved = 0
    for pfn in folios:
        if flags[pfn] & PG_mlocked:
            host.lru.folio_putback_lru(pfn)
            continue
        if refcount[pfn] == 1:
            flags[pfn] &= ~PG_active
            put_page(host, pfn)
            continue
        with vec.lock:
            flags[pfn] |= PG_lru
            vec.add(pfn, flags[pfn])
        moved += folio_nr_pages(host.pages, pfn)
        put_page(host, pfn)
    return moved


def _activate_locked(host: HostMm, pfn: int, stat: ReclaimStat) -> None:
    flags = host.pages.flags
    swap = host.swap
    if flags[pfn] & PG_swapcache and swap is not None and (swap.vm_swap_full() or flags[pfn] & PG_mlocked):
        folio_free_swap(host, pfn)
    if not flags[pfn] & PG_mlocked:
        flags[pfn] |= PG_active
        stat.nr_activate[0 if flags[pfn] & PG_swapbacked else 1] += folio_nr_pages(host.pages, pfn)

