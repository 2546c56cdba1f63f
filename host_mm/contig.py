"""alloc_contig_range: exactly these frames, whoever has them now.

Source of truth: mm/page_alloc.c (alloc_contig_range_noprof, __alloc_contig_migrate_range,
alloc_contig_pages_noprof, free_contig_range), mm/compaction.c (isolate_migratepages_range,
isolate_freepages_range); Linux 6.18.

The page blocks around the range are isolated, what is in the range is migrated away (at most five attempts
for what does not want to go), and if everything is free then, the frames are taken off the lists. Free frames
before and behind the range that hang together with it go back.

Not modelled: __GFP_COMP (the frames are single pages), dissolving hugetlb folios, CMA areas, dropping clean
page-cache pages first.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.compaction_scan import COMPACT_CLUSTER_MAX, CompactControl, isolate_migratepages_block
from host_mm.kernel.errors import KernelError
from host_mm.migrate import (
    MIGRATE_SYNC,
    MR_CONTIG_RANGE,
    MigrationTarget,
    migrate_pages,
    putback_movable_pages,
)
from host_mm.mmzone import MIGRATE_ISOLATE, PAGEBLOCK_NR_PAGES
from host_mm.page import PG_buddy, PG_reserved, put_page
from host_mm.page_alloc import GFP_MOVABLE, GFP_RETRY_MAYFAIL, GFP_USER, gfp_zone
from host_mm.page_isolation import (
    PB_ISOLATE_MODE_OTHER,
    start_isolate_page_range,
    test_pages_isolated,
    undo_isolate_page_range,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mmzone import Zone

__all__ = ["alloc_contig_pages", "alloc_contig_range", "free_contig_range"]

_TRIES = 5


def alloc_contig_range(host: HostMm, start: int, end: int) -> None:
    """Take the frames [start, end) of one zone, each with one reference; migrates what is in them. May sleep.

    KernelError: EINVAL (no such frames), EBUSY (something in the way cannot be moved), ENOMEM (no place for
    it). The holder accounts for the frames in host.held until free_contig_range.
    """
    allocator = host.allocator
    inside = 0 <= start < end <= host.pages.nr_frames
    if not inside or allocator.zone_of(start) is not allocator.zone_of(end - 1):
        raise KernelError(EINVAL, f"frames {start:#x} to {end:#x} are not in one zone")
    err = start_isolate_page_range(host, start, end, PB_ISOLATE_MODE_OTHER)
    if not err:
        err = _migrate_range(host, start, end)
        if err in (0, -EBUSY):
            # What was busy may have become free meanwhile.
            err = _take(host, allocator.zone_of(start), start, end)
        undo_isolate_page_range(host, start, end)
    if err:
        raise KernelError(-err, f"frames {start:#x} to {end:#x} cannot be cleared")
    for pfn in range(start, end):
        host.held[pfn] += 1


def _migrate_range(host: HostMm, start: int, end: int) -> int:
    """__alloc_contig_migrate_range: 0, -EBUSY if something stays after all attempts, or -ENOMEM."""
    zone = host.allocator.zone_of(start)
    cc = CompactControl(host, zone, -1, MIGRATE_SYNC)
    cc.alloc_contig = cc.ignore_skip_hint = True
    target = MigrationTarget(zone.nid, GFP_USER | GFP_MOVABLE | GFP_RETRY_MAYFAIL)
    host.lru.lru_cache_disable()
    pfn, tries, err = start, 0, 0
    while pfn < end or cc.migratepages:
        if not cc.migratepages:
            cc.nr_migratepages = 0
            pfn = _isolate_range(cc, pfn, end)
            tries = 0
        else:
            tries += 1
            if tries == _TRIES:
                err = -EBUSY
                break
        err = migrate_pages(host, cc.migratepages, target, MR_CONTIG_RANGE, MIGRATE_SYNC)
        if err == -ENOMEM:
            break
    host.lru.lru_cache_enable()
    if cc.migratepages:
        putback_movable_pages(host, cc.migratepages)
    return min(err, 0)


def _isolate_range(cc: CompactControl, pfn: int, end: int) -> int:
    """isolate_migratepages_range: a cluster of movable pages from `pfn` on; where it stopped."""
    while pfn < end:
        isolate_migratepages_block(cc, pfn, min((pfn & -PAGEBLOCK_NR_PAGES) + PAGEBLOCK_NR_PAGES, end))
        pfn = cc.migrate_pfn
        if cc.nr_migratepages >= COMPACT_CLUSTER_MAX:
            break
    return pfn


def _take(host: HostMm, zone: Zone, start: int, end: int) -> int:
    """Take [start, end) off the isolated lists, if all of it is there; 0 or -EBUSY."""
    pages = host.pages
    head = zone.buddy_of(start)
    pfn = outer_start = head if head >= 0 else start
    if test_pages_isolated(host, outer_start, end, PB_ISOLATE_MODE_OTHER):
        return -EBUSY
    while pfn < end:
        pfn += 1 << zone.del_from_free_list(pfn, MIGRATE_ISOLATE)
    for frame in (*range(outer_start, start), *range(end, pfn)):
        zone.free_one_page(frame, 0, MIGRATE_ISOLATE)
    for frame in range(start, end):
        pages.refcount[frame] = 1
    return 0


def alloc_contig_pages(host: HostMm, nr_pages: int, gfp: int, nid: int) -> int:
    """The first frame of a range of `nr_pages`, aligned to its size, that could be cleared; or -1."""
    allocator = host.allocator
    for zone in allocator.zonelist(nid, gfp):
        if zone.idx > gfp_zone(gfp):
            continue
        pfn = -(-zone.start // nr_pages) * nr_pages
        while pfn + nr_pages <= zone.end:
            if not any(host.pages.flags[frame] & PG_reserved for frame in range(pfn, pfn + nr_pages)):
                try:
                    alloc_contig_range(host, pfn, pfn + nr_pages)
                except KernelError:
                    pass
                else:
                    return pfn
            pfn += nr_pages
    return -1


def free_contig_range(host: HostMm, start: int, nr_pages: int) -> None:
    """Give the frames back. KernelError(EINVAL) for frames that alloc_contig_range did not give."""
    frames = range(start, start + nr_pages)
    if any(not host.held[pfn] or host.pages.flags[pfn] & PG_buddy for pfn in frames):
        raise KernelError(EINVAL, f"frames {start:#x} to {start + nr_pages:#x} were not taken")
    for pfn in frames:
        host.held[pfn] -= 1
        put_page(host, pfn)
