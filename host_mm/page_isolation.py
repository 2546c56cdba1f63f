"""Isolating page blocks, so that what is freed there stays there and nothing is given out.

Source of truth: mm/page_isolation.c (start_isolate_page_range, isolate_single_pageblock,
set_migratetype_isolate, has_unmovable_pages, test_pages_isolated), mm/page_alloc.c:
__move_freepages_block_isolate; include/trace/events/page_isolation.h; Linux 6.18.

Who wants a range of frames for himself isolates its page blocks first, then moves away what is in it, then
looks whether everything in it is free. A block with a page that cannot be moved is refused at once; in
ZONE_MOVABLE everything but reserved frames is taken to be movable.

Not modelled: large folios that straddle two blocks, unaccepted memory, CMA blocks.
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING

from host_mm.mmzone import MAX_ORDER, MIGRATE_ISOLATE, PAGEBLOCK_NR_PAGES, PAGEBLOCK_ORDER, ZONE_MOVABLE
from host_mm.page import PG_buddy, PG_head, PG_hugetlb, PG_hwpoison, PG_lru, PG_reserved
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mmzone import Zone

__all__ = [
    "PB_ISOLATE_MODE_MEM_OFFLINE", "PB_ISOLATE_MODE_OTHER", "TRACEPOINTS", "has_unmovable_pages",
    "start_isolate_page_range", "test_pages_isolated", "undo_isolate_page_range",
]

PB_ISOLATE_MODE_MEM_OFFLINE, PB_ISOLATE_MODE_OTHER = range(2)

TEST_PAGES_ISOLATED = Tracepoint(
    "page_isolation", "test_pages_isolated", ("start_pfn", "end_pfn", "fin_pfn"),
    lambda start_pfn, end_pfn, fin_pfn: (
        f"start_pfn={start_pfn:#x} end_pfn={end_pfn:#x} fin_pfn={fin_pfn:#x} "
        f"ret={'success' if end_pfn <= fin_pfn else 'fail'}"
    ),
)
TRACEPOINTS = (TEST_PAGES_ISOLATED,)


def has_unmovable_pages(host: HostMm, start: int, end: int, mode: int) -> int:
    """The first frame of [start, end) that cannot be moved away, or -1."""
    pages = host.pages
    movable_zone = host.allocator.zone_of(start).idx == ZONE_MOVABLE
    pfn = start
    while pfn < end:
        flags = pages.flags[pfn]
        if flags & PG_reserved:
            return pfn
        size = 1
        if movable_zone:
            pass
        elif flags & PG_buddy or (flags & PG_head and flags & (PG_lru | PG_hugetlb)):
            size = 1 << pages.order[pfn]
        elif pages.refcount[pfn] and not flags & PG_lru:
            if not (mode == PB_ISOLATE_MODE_MEM_OFFLINE and flags & PG_hwpoison):
                return pfn
        pfn += size
    return -1


def _set_migratetype_isolate(host: HostMm, block: int, mode: int, start: int, end: int) -> bool:
    """Isolate the page block that begins at `block`, if what of [start, end) is in it can move."""
    zone = host.allocator.zone_of(block)
    number = block >> PAGEBLOCK_ORDER
    following = block + PAGEBLOCK_NR_PAGES
    if number in zone.blocks.isolated or block < zone.start or following > zone.end:
        return False
    if has_unmovable_pages(host, max(block, start), min(following, end), mode) >= 0:
        return False
    _split_large_buddy(zone, block)
    zone.move_freepages_block(block, zone.blocks.type[number], MIGRATE_ISOLATE)
    zone.blocks.isolated.add(number)
    return True


def _split_large_buddy(zone: Zone, block: int) -> None:
    """A free block larger than a page block is cut: its parts will be on different lists."""
    head = zone.buddy_of(block)
    if head < 0 or zone.pages.order[head] <= PAGEBLOCK_ORDER:
        return
    order = zone.del_from_free_list(head, zone.blocks.migratetype(head))
    for pfn in range(head, head + (1 << order), PAGEBLOCK_NR_PAGES):
        zone.add_to_free_list(pfn, PAGEBLOCK_ORDER, zone.blocks.migratetype(pfn))


def _unset_migratetype_isolate(host: HostMm, block: int) -> None:
    zone = host.allocator.zone_of(block)
    number = block >> PAGEBLOCK_ORDER
    if number not in zone.blocks.isolated:
        return
    pages = host.pages
    kind = zone.blocks.type[number]
    if pages.flags[block] & PG_buddy and pages.order[block] >= PAGEBLOCK_ORDER:
        # Free as a whole: it may merge with its neighbour again.
        order = zone.del_from_free_list(block, MIGRATE_ISOLATE)
        zone.blocks.isolated.discard(number)
        zone.free_one_page(block, order, kind)
        return
    zone.move_freepages_block(block, MIGRATE_ISOLATE, kind)
    zone.blocks.isolated.discard(number)


def start_isolate_page_range(host: HostMm, start: int, end: int, mode: int) -> int:
    """Isolate every page block that has a frame of [start, end): 0, or -EBUSY and nothing is isolated.

    The first and the last block must have nothing unmovable at all, those between them in the range.
    """
    first = start & -PAGEBLOCK_NR_PAGES
    last = (end - 1) & -PAGEBLOCK_NR_PAGES
    done: list[int] = []
    for block in dict.fromkeys((first, last, *range(first + PAGEBLOCK_NR_PAGES, last, PAGEBLOCK_NR_PAGES))):
        edge = block in (first, last)
        low, high = (block, block + PAGEBLOCK_NR_PAGES) if edge else (start, end)
        if not _set_migratetype_isolate(host, block, mode, low, high):
            for other in done:
                _unset_migratetype_isolate(host, other)
            return -EBUSY
        done.append(block)
    return 0


def undo_isolate_page_range(host: HostMm, start: int, end: int) -> None:
    """End what start_isolate_page_range began; blocks that are not isolated are left alone."""
    for block in range(start & -PAGEBLOCK_NR_PAGES, end, PAGEBLOCK_NR_PAGES):
        _unset_migratetype_isolate(host, block)


def test_pages_isolated(host: HostMm, start: int, end: int, mode: int) -> int:
    """0 if every frame of [start, end) is free and isolated, else -EBUSY."""
    pages, blocks = host.pages, host.allocator.blocks
    pfn = start
    numbers = range(start >> PAGEBLOCK_ORDER, (end - 1 >> PAGEBLOCK_ORDER) + 1)
    if blocks.isolated.issuperset(numbers):
        while pfn < end:
            flags = pages.flags[pfn]
            if flags & PG_buddy:
                pfn += 1 << min(pages.order[pfn], MAX_ORDER)
            elif mode == PB_ISOLATE_MODE_MEM_OFFLINE and flags & PG_hwpoison:
                pfn += 1
            else:
                break
    if (t := host.trace.test_pages_isolated) is not None:
        t(start, end, pfn)
    return 0 if pfn >= end else -EBUSY
