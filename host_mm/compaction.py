"""Memory compaction: movable pages go to one end of a zone, so that the other has large free blocks.

Source of truth: mm/compaction.c (compact_zone, __compact_finished, compaction_suitable, compaction_deferred,
try_to_compact_pages, compact_node), mm/vmstat.c: fragmentation_index; Linux 6.18. The scanners are in
compaction_scan.py.

Two scanners run towards each other until they meet or the wanted block is there; between them migrate_pages
moves what the one collected into what the other found.

Three users: a write to /proc/sys/vm/compact_memory (every zone, to the end), an allocation of several
pages that found none (direct; asynchronous first), and the daemon in kcompactd.py. Compaction that failed
is deferred for twice as many attempts each time.

Not modelled: proactive compaction, capture of the block that a direct compactor frees, defrag_mode.
"""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING

from host_mm.compaction_scan import CompactControl, isolate_migratepages
from host_mm.migrate import (
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    MIGRATE_SYNC_LIGHT,
    MR_COMPACTION,
    migrate_pages,
    putback_movable_pages,
)
from host_mm.mmzone import MAX_ORDER, PAGEBLOCK_NR_PAGES, PAGEBLOCK_ORDER
from host_mm.page_alloc import (
    COMPACT_DEFERRED,
    COMPACT_PRIO_ASYNC,
    COMPACT_PRIO_SYNC_FULL,
    COMPACT_SKIPPED,
    COMPACT_SUCCESS,
    PAGE_ALLOC_COSTLY_ORDER,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mmzone import Zone

__all__ = [
    "COMPACT_COMPLETE", "COMPACT_CONTINUE", "COMPACT_PARTIAL_SKIPPED", "compact_nodes", "compact_zone",
    "compaction_deferred", "compaction_suit_allocation_order", "defer_compaction",
    "reset_isolation_suitable", "try_to_compact_pages",
]

_MAX_DEFER_SHIFT = 6
_EXTFRAG_THRESHOLD = 500

# enum compact_result; the rest is in page_alloc.py.
COMPACT_NO_SUITABLE_PAGE, COMPACT_CONTINUE, COMPACT_COMPLETE = 3, 4, 5
COMPACT_PARTIAL_SKIPPED, COMPACT_CONTENDED = 6, 7


# -- one zone ---------------------------------------------------------------------------------------
def _fragmentation_index(zone: Zone, order: int) -> int:
    """Towards 0 a failure is for want of memory, towards 1000 for want of large blocks; -1000: none."""
    counts = [sum(map(len, types)) for types in zone.free_list]
    if not sum(counts):
        return 0
    if any(counts[order:]):
        return -1000
    free = sum(count << size for size, count in enumerate(counts))
    return 1000 - (1000 + free * 1000 // (1 << order)) // sum(counts)


def _compaction_suitable(zone: Zone, order: int) -> bool:
    """Whether compaction can run at all, and would help."""
    mark = zone.wmark_min + (2 << order)
    if order > PAGE_ALLOC_COSTLY_ORDER:
        mark += zone.wmark_low - zone.wmark_min
    if not zone.watermark_ok(mark, 0):
        return False
    if order <= PAGE_ALLOC_COSTLY_ORDER:
        return True
    return not 0 <= _fragmentation_index(zone, order) <= _EXTFRAG_THRESHOLD


def compaction_suit_allocation_order(zone: Zone, order: int) -> int:
    """COMPACT_CONTINUE if compaction should run for a block of this order; or why not."""
    if zone.watermark_ok(zone.wmark_min, order):
        return COMPACT_SUCCESS
    return COMPACT_CONTINUE if _compaction_suitable(zone, order) else COMPACT_SKIPPED


def _compact_finished(cc: CompactControl) -> int:
    zone = cc.zone
    if cc.scanners_met():
        zone.compact_cached_migrate_pfn = [zone.start, zone.start]
        zone.compact_cached_free_pfn = (zone.end - 1) & -PAGEBLOCK_NR_PAGES
        if cc.direct_compaction:
            zone.compact_blockskip_flush = True
        return COMPACT_COMPLETE if cc.whole_zone else COMPACT_PARTIAL_SKIPPED
    if cc.order < 0 or cc.migrate_pfn % PAGEBLOCK_NR_PAGES:
        return COMPACT_CONTINUE
    for order in range(cc.order, MAX_ORDER + 1):
        if zone.free_list[order][cc.migratetype]:
            return COMPACT_SUCCESS
        if zone.find_suitable_fallback(order, cc.migratetype, claimable=True) >= 0:
            return COMPACT_SUCCESS
    return COMPACT_CONTINUE


def _place_scanners(cc: CompactControl) -> None:
    zone = cc.zone
    last = (zone.end - 1) & -PAGEBLOCK_NR_PAGES
    if cc.whole_zone:
        cc.migrate_pfn, cc.free_pfn = zone.start, last
        return
    cc.migrate_pfn = zone.compact_cached_migrate_pfn[cc.mode != MIGRATE_ASYNC]
    cc.free_pfn = zone.compact_cached_free_pfn
    if not zone.start <= cc.free_pfn < zone.end:
        cc.free_pfn = zone.compact_cached_free_pfn = last
    if not zone.start <= cc.migrate_pfn < zone.end:
        cc.migrate_pfn = zone.start
        zone.compact_cached_migrate_pfn = [zone.start, zone.start]
    cc.whole_zone = cc.migrate_pfn <= zone.start


def compact_zone(cc: CompactControl) -> int:
    """Compact one zone as `cc` says; a COMPACT_* result."""
    host, zone = cc.host, cc.zone
    if cc.order >= 0 and (ret := compaction_suit_allocation_order(zone, cc.order)) != COMPACT_CONTINUE:
        return ret
    limit = 1 << zone.compact_defer_shift
    if (cc.order >= zone.compact_order_failed and zone.compact_defer_shift == _MAX_DEFER_SHIFT
            and zone.compact_considered >= limit):
        reset_isolation_suitable(zone)
    _place_scanners(cc)
    sync = cc.mode != MIGRATE_ASYNC
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.mm_compaction_begin) is not None:
        ctx.cause = t(zone.start, cc.migrate_pfn, cc.free_pfn, zone.end, sync)
    host.lru.lru_add_drain()
    ret = _compact_loop(cc)
    if cc.nr_freepages:
        block = cc.release_free_list() & -PAGEBLOCK_NR_PAGES
        zone.compact_cached_free_pfn = max(zone.compact_cached_free_pfn, block)
    if (t := host.trace.mm_compaction_end) is not None:
        t(zone.start, cc.migrate_pfn, cc.free_pfn, zone.end, sync, ret)
    ctx.cause = saved
    return ret


def _compact_loop(cc: CompactControl) -> int:
    last_migrated = 0
    while (ret := _compact_finished(cc)) == COMPACT_CONTINUE:
        # The second scan of a block takes all that is left of it.
        cc.finish_pageblock = last_migrated == cc.migrate_pfn & -PAGEBLOCK_NR_PAGES
        while isolate_migratepages(cc):
            last_migrated = max(cc.zone.start, (cc.migrate_pfn - 1) & -PAGEBLOCK_NR_PAGES)
            failed = _migrate_isolated(cc)
            if failed == -ENOMEM and not cc.scanners_met():
                return COMPACT_CONTENDED
            rest = cc.migrate_pfn % PAGEBLOCK_NR_PAGES and not cc.finish_pageblock
            if not failed or not rest or cc.ignore_skip_hint or cc.mode == MIGRATE_SYNC:
                break
            # Something in this block stays: scan the rest of it at once, and then not again soon.
            cc.finish_pageblock = True
        if cc.order > 0 and last_migrated and last_migrated < cc.migrate_pfn & -(1 << cc.order):
            cc.host.lru.lru_add_drain()
            last_migrated = 0
    return ret


def _migrate_isolated(cc: CompactControl) -> int:
    """Move what was collected; what migrate_pages answers. Those that stay go back to their lists."""
    host = cc.host
    nr = cc.nr_migratepages
    before = host.vmstat["pgmigrate_success"]
    err = migrate_pages(
        host, cc.migratepages, cc.compaction_alloc, MR_COMPACTION, cc.mode, cc.compaction_free
    )
    if (t := host.trace.mm_compaction_migratepages) is not None:
        moved = host.vmstat["pgmigrate_success"] - before
        t(moved, nr - moved)
    cc.nr_migratepages = 0
    putback_movable_pages(host, cc.migratepages)
    return err


# -- who compacts -----------------------------------------------------------------------------------
def reset_isolation_suitable(zone: Zone) -> None:
    """__reset_isolation_suitable: forget which blocks were given up, once a full run has ended."""
    if not zone.compact_blockskip_flush:
        return
    zone.compact_blockskip_flush = False
    blocks = range(zone.start >> PAGEBLOCK_ORDER, (zone.end >> PAGEBLOCK_ORDER) + 1)
    zone.blocks.skip.difference_update(blocks)
    zone.compact_cached_migrate_pfn = [zone.start, zone.start]
    zone.compact_cached_free_pfn = (zone.end - 1) & -PAGEBLOCK_NR_PAGES


def defer_compaction(host: HostMm, zone: Zone, order: int) -> None:
    """It failed: leave the zone alone for twice as many attempts as last time."""
    zone.compact_considered = 0
    zone.compact_defer_shift = min(zone.compact_defer_shift + 1, _MAX_DEFER_SHIFT)
    zone.compact_order_failed = min(zone.compact_order_failed, order)
    if (t := host.trace.mm_compaction_defer_compaction) is not None:
        t(zone.nid, zone.idx, order, 0, zone.compact_defer_shift, zone.compact_order_failed)


def compaction_deferred(zone: Zone, order: int) -> bool:
    """Whether this attempt is to be skipped; counts it."""
    if order < zone.compact_order_failed:
        return False
    limit = 1 << zone.compact_defer_shift
    zone.compact_considered += 1
    if zone.compact_considered >= limit:
        zone.compact_considered = limit
        return False
    return True


def try_to_compact_pages(host: HostMm, gfp: int, order: int, zonelist: list[Zone], prio: int) -> int:
    """Direct compaction for an allocation: the best COMPACT_* of the zones."""
    best = COMPACT_SKIPPED
    for zone in zonelist:
        if prio > COMPACT_PRIO_SYNC_FULL and compaction_deferred(zone, order):
            best = max(best, COMPACT_DEFERRED)
            continue
        mode = MIGRATE_ASYNC if prio == COMPACT_PRIO_ASYNC else MIGRATE_SYNC_LIGHT
        cc = CompactControl(host, zone, order, mode, gfp)
        cc.direct_compaction = True
        full = prio == COMPACT_PRIO_SYNC_FULL
        cc.whole_zone = cc.ignore_skip_hint = cc.ignore_block_suitable = full
        status = compact_zone(cc)
        best = max(best, status)
        if status == COMPACT_SUCCESS:
            zone.compact_order_failed = max(zone.compact_order_failed, order + 1)
            break
        if prio != COMPACT_PRIO_ASYNC and status in (COMPACT_COMPLETE, COMPACT_PARTIAL_SKIPPED):
            defer_compaction(host, zone, order)
    return best


def compact_nodes(host: HostMm) -> None:
    """A write to /proc/sys/vm/compact_memory: every zone of every node, from end to end."""
    host.lru.lru_add_drain_all()
    for node in host.allocator.nodes:
        for zone in node.zones:
            cc = CompactControl(host, zone, -1, MIGRATE_SYNC)
            cc.ignore_skip_hint = cc.whole_zone = True
            compact_zone(cc)
