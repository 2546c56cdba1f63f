"""Compaction's two scanners: what can move, from the bottom; where it can go, from the top.

Source of truth: mm/compaction.c (isolate_migratepages_block, isolate_migratepages, isolate_freepages_block,
isolate_freepages, compaction_alloc, compaction_free, suitable_migration_source and _target); Linux 6.18.

The migration scanner collects up to a cluster of pages and the free scanner, when a destination is asked
for, as many frames. A block that is free as a whole is no target: it is what is wanted. What was isolated
last is at the head of the list, so that the highest frame of a batch is moved first.

There are no per-CPU lists here: what was moved away merges with its free neighbours at once, so that a scan
which goes on may find itself inside a free block.

Not modelled: the fast searches in the free lists and the sampling that goes with them, throttling by the
number of isolated pages, lock contention, movable_ops pages.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from host_mm.kernel.costs import COST_SCAN_PAGE
from host_mm.migrate import MIGRATE_ASYNC, MIGRATE_SYNC, putback_movable_pages
from host_mm.mmzone import (
    MAX_ORDER,
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
)
from host_mm.page import (
    PG_anon,
    PG_buddy,
    PG_head,
    PG_hwpoison,
    PG_ksm,
    PG_lru,
    PG_swapcache,
    PG_writeback,
    folio_mapcount,
    put_page,
)
from host_mm.page_alloc import GFP_KERNEL

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mmzone import Zone

__all__ = ["COMPACT_CLUSTER_MAX", "CompactControl", "isolate_migratepages", "isolate_migratepages_block"]

COMPACT_CLUSTER_MAX = 32


class CompactControl:
    """struct compact_control: one run of compaction over one zone. `order` -1: no size is wanted."""

    __slots__ = (
        "alloc_contig", "direct_compaction", "finish_pageblock", "free_pfn", "freepages", "gfp_mask", "host",
        "ignore_block_suitable", "ignore_skip_hint", "migrate_pfn", "migratepages", "migratetype", "mode",
        "nr_freepages", "nr_migratepages", "order", "whole_zone", "zone",
    )

    def __init__(self, host: HostMm, zone: Zone, order: int, mode: int, gfp_mask: int = GFP_KERNEL) -> None:
        self.host = host
        self.zone = zone
        self.order = order
        self.mode = mode
        self.gfp_mask = gfp_mask
        self.migratetype = host.allocator.gfp_migratetype(gfp_mask)
        self.direct_compaction = False
        self.whole_zone = False
        self.ignore_skip_hint = False
        self.ignore_block_suitable = False
        self.alloc_contig = False
        self.finish_pageblock = False
        self.migrate_pfn = zone.start
        self.free_pfn = zone.end
        self.freepages: list[deque[int]] = [deque() for _ in range(MAX_ORDER + 1)]
        self.migratepages: list[int] = []
        self.nr_freepages = self.nr_migratepages = 0

    def scanners_met(self) -> bool:
        """compact_scanners_met: both are in one page block, or have passed each other."""
        return self.free_pfn >> PAGEBLOCK_ORDER <= self.migrate_pfn >> PAGEBLOCK_ORDER

    def isolation_suitable(self, pfn: int) -> bool:
        """Whether the block was not given up before."""
        return self.ignore_skip_hint or pfn >> PAGEBLOCK_ORDER not in self.zone.blocks.skip

    # -- where the moved pages go -------------------------------------------------------------

    def compaction_alloc(self, src: int) -> int:
        """A frame for `src` from the isolated ones, of its order; -1 where the scanners met."""
        pages = self.host.pages
        order = pages.order[src]
        if not any(self.freepages[order:]):
            _isolate_freepages(self)
        for start_order in range(order, MAX_ORDER + 1):
            if self.freepages[start_order]:
                break
        else:
            return -1
        pfn = self.freepages[start_order].popleft()
        while start_order > order:
            start_order -= 1
            self.freepages[start_order].appendleft(pfn + (1 << start_order))
        self.nr_freepages -= 1 << order
        self.nr_migratepages -= 1 << order
        return self.host.allocator.prep_isolated_page(pfn, order)

    def compaction_free(self, dst: int) -> None:
        """A destination that was not used goes back to the isolated frames."""
        pages = self.host.pages
        order = pages.order[dst]
        self.nr_migratepages += 1 << order
        if pages.flags[dst] & PG_hwpoison:
            put_page(self.host, dst)
            return
        pages.refcount[dst] -= 1
        if not pages.refcount[dst]:
            self.host.allocator.free_pages_prepare(dst, order)
            self.freepages[order].appendleft(dst)
            self.nr_freepages += 1 << order

    def release_free_list(self) -> int:
        """Give what is left of the isolated frames back to the allocator; the highest of them."""
        high = 0
        zone = self.zone
        for order, frames in enumerate(self.freepages):
            for pfn in frames:
                zone.free_one_page(pfn, order, zone.blocks.migratetype(pfn))
                high = max(high, pfn)
            frames.clear()
        self.nr_freepages = 0
        return high


# -- the free scanner -----------------------------------------------------------------------------
def _isolate_freepages_block(cc: CompactControl, start: int, end: int) -> int:
    """Take free blocks of [start, end) until there are enough; where it stopped."""
    zone, pages = cc.zone, cc.zone.pages
    pfn, taken, scanned = start, 0, 0
    while pfn < end:
        scanned += 1
        if not pages.flags[pfn] & PG_buddy:
            pfn += 1 << pages.order[pfn] if pages.flags[pfn] & PG_head else 1
            continue
        order = zone.isolate_free_page(pfn, zone.blocks.migratetype(pfn))
        if order < 0:
            break
        taken += 1 << order
        cc.nr_freepages += 1 << order
        cc.freepages[order].append(pfn)
        pfn += 1 << order
        if cc.nr_migratepages <= cc.nr_freepages:
            break
    pfn = min(pfn, end)
    if (t := cc.host.trace.mm_compaction_isolate_freepages) is not None:
        t(start, pfn, scanned, taken)
    return pfn


def _suitable_migration_target(cc: CompactControl, pfn: int) -> bool:
    """Not a block that is free in the wanted size already, and one of movable pages."""
    pages = cc.zone.pages
    if pages.flags[pfn] & PG_buddy and pages.order[pfn] >= (cc.order if cc.order > 0 else PAGEBLOCK_ORDER):
        return False
    migratetype = cc.zone.blocks.migratetype(pfn)
    return migratetype == MIGRATE_MOVABLE or (cc.ignore_block_suitable and migratetype != MIGRATE_ISOLATE)


def _isolate_freepages(cc: CompactControl) -> None:
    zone = cc.zone
    sched = cc.host.sched
    at = cc.free_pfn
    block = at & -PAGEBLOCK_NR_PAGES
    end = min(block + PAGEBLOCK_NR_PAGES, zone.end)
    low = (cc.migrate_pfn & -PAGEBLOCK_NR_PAGES) + PAGEBLOCK_NR_PAGES
    while block >= low:
        if sched.preempt:
            sched.point("cond_resched")
        if _suitable_migration_target(cc, block) and cc.isolation_suitable(block):
            at = _isolate_freepages_block(cc, at, end)
            if at == end:
                zone.blocks.skip.add(block >> PAGEBLOCK_ORDER)
                zone.compact_cached_free_pfn = min(zone.compact_cached_free_pfn, block - PAGEBLOCK_NR_PAGES)
            if cc.nr_freepages >= cc.nr_migratepages:
                if at >= end:
                    at = block - PAGEBLOCK_NR_PAGES
                break
            if at < end:
                break
        end, block = block, block - PAGEBLOCK_NR_PAGES
        at = block
    cc.free_pfn = at


# -- the migration scanner --------------------------------------------------------------------------
def _may_isolate(cc: CompactControl, pfn: int, flags: int) -> bool:
    """Whether the page is on a list and nobody but its mappings seems to use it."""
    pages = cc.host.pages
    if not flags & PG_lru or pages.refcount[pfn] <= 0:
        return False
    anonymous = flags & (PG_anon | PG_ksm) or pfn not in pages.mapping
    if anonymous and not flags & PG_swapcache and pages.refcount[pfn] > folio_mapcount(pages, pfn):
        return False
    if not anonymous and pages.mapping[pfn].a_ops.unevictable:
        return False
    # A dirty page may be taken in any mode: nothing here needs I/O to be moved.
    return cc.mode == MIGRATE_SYNC or not flags & PG_writeback


def _skip_on_order(cc: CompactControl, order: int) -> bool:
    """skip_isolation_on_order: a block of the wanted size is not torn from where it is."""
    if cc.alloc_contig or not order:
        return False
    return order >= PAGEBLOCK_ORDER or 0 <= cc.order <= order


class _BlockScan:
    """One call of isolate_migratepages_block."""

    __slots__ = ("cc", "end", "isolated", "next_skip", "pfn", "run", "skip_updated", "start", "valid")

    def __init__(self, cc: CompactControl, low: int, end: int) -> None:
        self.cc = cc
        self.start = self.pfn = low
        if (head := cc.zone.buddy_of(low)) >= 0:
            self.pfn = head + (1 << cc.host.pages.order[head])
        self.end = end
        self.isolated = 0
        # A direct compactor that must not wait gives an order-aligned run up at its first fixed page.
        self.run = -(1 << cc.order) if cc.direct_compaction and cc.mode == MIGRATE_ASYNC else 0
        self.next_skip = (low & self.run) - self.run
        self.valid = not low % PAGEBLOCK_NR_PAGES or low == cc.zone.start
        self.skip_updated = False

    def isolate(self, pfn: int, size: int) -> bool:
        """Take the page. False: the block was given up by somebody meanwhile, or the page went."""
        cc = self.cc
        if not self.skip_updated and self.valid:
            self.skip_updated = True
            if not cc.ignore_skip_hint:
                block = pfn >> PAGEBLOCK_ORDER
                skip = block in cc.zone.blocks.skip
                if not cc.alloc_contig:
                    cc.zone.blocks.skip.add(block)
                if skip and not cc.finish_pageblock:
                    self.pfn = self.end
                    return False
        if not cc.host.lru.folio_isolate_lru(pfn):
            return False
        cc.host.sched.advance(COST_SCAN_PAGE)
        cc.migratepages.insert(0, pfn)
        cc.nr_migratepages += size
        self.isolated += size
        return True

    def failed(self) -> None:
        """A page stays: with it the whole run that was to become one free block."""
        cc = self.cc
        if not self.run:
            return
        if self.isolated:
            putback_movable_pages(cc.host, cc.migratepages)
            cc.nr_migratepages = self.isolated = 0
        if self.pfn < self.next_skip:
            self.pfn = self.next_skip
            self.next_skip -= self.run

    def finish(self) -> None:
        """Leave a hint for the next scan if nothing came of this one."""
        cc = self.cc
        self.pfn = min(self.pfn, self.end)
        done = self.pfn == self.end and (not self.isolated or cc.finish_pageblock)
        if done and not cc.alloc_contig:
            if self.valid and not self.skip_updated:
                cc.zone.blocks.skip.add(self.start >> PAGEBLOCK_ORDER)
            _update_cached_migrate(cc, self.pfn)


def isolate_migratepages_block(cc: CompactControl, low: int, end: int) -> None:
    """Collect movable pages of [low, end), at most a cluster; cc.migrate_pfn is where it stopped."""
    host, pages = cc.host, cc.host.pages
    sched = host.sched
    scan = _BlockScan(cc, low, end)
    scanned = 0
    while scan.pfn < end:
        pfn = scan.pfn
        if scan.run and pfn >= scan.next_skip:
            if scan.isolated:
                break
            scan.next_skip = (pfn & scan.run) - scan.run
        if not pfn % COMPACT_CLUSTER_MAX and sched.preempt:
            sched.point("cond_resched")
        flags = pages.flags[pfn]
        size = 1 << pages.order[pfn] if flags & (PG_buddy | PG_head) else 1
        scanned += size
        scan.pfn += size
        if flags & PG_buddy:
            continue
        taken = False
        if not _skip_on_order(cc, pages.order[pfn] if size > 1 else 0) and _may_isolate(cc, pfn, flags):
            taken = scan.isolate(pfn, size)
        if not taken:
            scan.failed()
        elif cc.nr_migratepages >= COMPACT_CLUSTER_MAX and not cc.finish_pageblock:
            break
    scan.finish()
    if (t := host.trace.mm_compaction_isolate_migratepages) is not None:
        t(low, scan.pfn, scanned, scan.isolated)
    host.vmstat["compact_migrate_scanned"] += scanned
    cc.migrate_pfn = scan.pfn


def _update_cached_migrate(cc: CompactControl, pfn: int) -> None:
    pfn = (pfn & -PAGEBLOCK_NR_PAGES) + PAGEBLOCK_NR_PAGES
    cached = cc.zone.compact_cached_migrate_pfn
    cached[0] = max(cached[0], pfn)
    if cc.mode != MIGRATE_ASYNC:
        cached[1] = max(cached[1], pfn)


def _suitable_migration_source(cc: CompactControl, block: int) -> bool:
    pages = cc.zone.pages
    if pages.flags[block] & PG_head and pages.order[block] >= PAGEBLOCK_ORDER:
        return False
    if cc.mode != MIGRATE_ASYNC or not cc.direct_compaction:
        return True
    return cc.zone.blocks.migratetype(block) == cc.migratetype


def isolate_migratepages(cc: CompactControl) -> bool:
    """Go to the first suitable block and collect there; whether anything was collected."""
    low = cc.migrate_pfn
    end = (low & -PAGEBLOCK_NR_PAGES) + PAGEBLOCK_NR_PAGES
    while end <= cc.free_pfn:
        first = not low % PAGEBLOCK_NR_PAGES or low == cc.zone.start
        if not first or cc.isolation_suitable(low):
            block = max(low & -PAGEBLOCK_NR_PAGES, cc.zone.start)
            if _suitable_migration_source(cc, block):
                isolate_migratepages_block(cc, low, end)
                break
            _update_cached_migrate(cc, end)
        cc.migrate_pfn = low = end
        end += PAGEBLOCK_NR_PAGES
    return bool(cc.nr_migratepages)
