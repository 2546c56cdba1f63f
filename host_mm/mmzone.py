"""Zones, nodes and page blocks, and the free lists of the buddy system.

Source of truth: include/linux/mmzone.h (struct zone, enum migratetype), mm/page_alloc.c (__free_one_page,
__rmqueue_smallest, __rmqueue_claim, __rmqueue_steal, try_to_claim_block, should_try_claim_block,
__isolate_free_page), include/linux/pageblock-flags.h; Linux 6.18.

A page block is 2 MiB and has a migrate type: which requests its free pages are for. The type is a hint
that keeps what cannot move from being strewn over all blocks: a request that finds no block of its type
claims another's if much of it is free, or else takes only what it needs. An isolated block is on nobody's
list: its free pages are not counted and none of them is handed out.

A free block is known by its first frame: PG_buddy, its order in `order`, its place in the free list of that
order and type. Merging stops between blocks of different types only where one of them is isolated.

`mm.page_group_by_mobility=Y` turns grouping on. Without it all blocks are movable and so is every request,
so that pages of all kinds lie in the order in which they were asked for. (Linux turns it off by itself
where a machine has fewer than 3,072 pages, and calls all of them unmovable then.)

Not modelled: CMA and high-atomic blocks, watermark boosts by stealing, the tail placement of blocks that
will soon merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.page import Pages, PG_buddy, PG_lru

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MAX_ORDER", "MIGRATE_ISOLATE", "MIGRATE_MOVABLE", "MIGRATE_RECLAIMABLE", "MIGRATE_UNMOVABLE",
    "PAGEBLOCK_NR_PAGES", "PAGEBLOCK_ORDER", "ZONE_MOVABLE", "ZONE_NAMES", "ZONE_NORMAL", "PageBlocks",
    "PgData", "Zone",
]

MAX_ORDER = 10
"""The kernel's MAX_PAGE_ORDER: blocks of 4 MiB."""
PAGEBLOCK_ORDER = 9
PAGEBLOCK_NR_PAGES = 1 << PAGEBLOCK_ORDER

# enum migratetype, but for high-atomic and CMA.
MIGRATE_UNMOVABLE, MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE, MIGRATE_ISOLATE = range(4)
_TYPES = 4
_FALLBACKS = {
    MIGRATE_UNMOVABLE: (MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE),
    MIGRATE_MOVABLE: (MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE),
    MIGRATE_RECLAIMABLE: (MIGRATE_UNMOVABLE, MIGRATE_MOVABLE),
}
_TOO_SMALL = -2

# enum zone_type of x86-64.
ZONE_NORMAL = 2
ZONE_MOVABLE = 3
ZONE_NAMES = {ZONE_NORMAL: "normal", ZONE_MOVABLE: "movable"}


class PageBlocks:
    """What the kernel keeps for each page block: its type, whether it is isolated, compaction's skip hint."""

    __slots__ = ("isolated", "skip", "type")

    def __init__(self, nr_frames: int) -> None:
        self.type = bytearray([MIGRATE_MOVABLE]) * ((nr_frames >> PAGEBLOCK_ORDER) + 1)
        self.isolated: set[int] = set()
        self.skip: set[int] = set()

    def migratetype(self, pfn: int) -> int:
        """get_pageblock_migratetype."""
        block = pfn >> PAGEBLOCK_ORDER
        return MIGRATE_ISOLATE if block in self.isolated else self.type[block]


class Zone:
    """struct zone: frames [start, end) of one node, free lists by order and type, watermarks in pages.

    A free list is a dict used as an ordered set: blocks are taken from its end (most recently freed
    first) and leave the middle in constant time when they merge. `nr_free` is without isolated pages.
    """

    __slots__ = (
        "blocks", "compact_blockskip_flush", "compact_cached_free_pfn", "compact_cached_migrate_pfn",
        "compact_considered", "compact_defer_shift", "compact_order_failed", "end", "free_list", "idx",
        "managed", "name", "nid", "nr_free", "nr_isolated", "pages", "present", "start", "wmark_high",
        "wmark_low", "wmark_min",
    )

    def __init__(self, pages: Pages, blocks: PageBlocks, nid: int, idx: int, start: int, end: int) -> None:
        self.pages = pages
        self.blocks = blocks
        self.nid = nid
        self.idx = idx
        self.name = ZONE_NAMES[idx].capitalize()
        self.start = start
        self.end = end
        self.present = end - start
        self.managed = 0
        self.nr_free = 0
        self.nr_isolated = 0
        self.free_list: list[list[dict[int, None]]] = [
            [{} for _ in range(_TYPES)] for _ in range(MAX_ORDER + 1)
        ]
        self.wmark_min = self.wmark_low = self.wmark_high = 0
        self.compact_cached_free_pfn = (end - 1) & -PAGEBLOCK_NR_PAGES
        self.compact_cached_migrate_pfn = [start, start]
        self.compact_blockskip_flush = False
        self.compact_considered = 0
        self.compact_defer_shift = 0
        self.compact_order_failed = 0

    def watermark_ok(self, mark: int, order: int) -> bool:
        """zone_watermark_ok: whether `mark` pages stay free after taking a block of `order`."""
        if self.nr_free - (1 << order) + 1 <= mark:
            return False
        if order == 0:
            return True
        lists = self.free_list
        return any(any(lists[o][:MIGRATE_ISOLATE]) for o in range(order, MAX_ORDER + 1))

    # -- lists --------------------------------------------------------------------------------

    def add_to_free_list(self, pfn: int, order: int, migratetype: int) -> None:
        """__add_to_free_list and its account; the frames are nobody's."""
        self.pages.flags[pfn] = PG_buddy
        self.pages.order[pfn] = order
        self.free_list[order][migratetype][pfn] = None
        if migratetype == MIGRATE_ISOLATE:
            self.nr_isolated += 1 << order
        else:
            self.nr_free += 1 << order

    def del_from_free_list(self, pfn: int, migratetype: int) -> int:
        """del_page_from_free_list; the block's order."""
        order = self.pages.order[pfn]
        del self.free_list[order][migratetype][pfn]
        self.pages.flags[pfn] = 0
        self.pages.order[pfn] = 0
        if migratetype == MIGRATE_ISOLATE:
            self.nr_isolated -= 1 << order
        else:
            self.nr_free -= 1 << order
        return order

    def free_one_page(self, pfn: int, order: int, migratetype: int) -> None:
        """__free_one_page: merge with free buddies, then on the list of this type."""
        pages = self.pages
        while order < MAX_ORDER:
            buddy = pfn ^ (1 << order)
            if not self.start <= buddy < self.end:
                break
            if not pages.flags[buddy] & PG_buddy or pages.order[buddy] != order:
                break
            buddy_type = migratetype
            if order >= PAGEBLOCK_ORDER:
                buddy_type = self.blocks.migratetype(buddy)
                if buddy_type != migratetype and MIGRATE_ISOLATE in (buddy_type, migratetype):
                    break
            self.del_from_free_list(buddy, buddy_type)
            if buddy_type != migratetype:
                self.blocks.type[buddy >> PAGEBLOCK_ORDER] = migratetype
            pfn &= buddy
            order += 1
        self.add_to_free_list(pfn, order, migratetype)

    def expand(self, pfn: int, low: int, high: int, migratetype: int) -> None:
        """Of a block of order `high` that was taken, give back all but its first 2**low frames."""
        while high > low:
            high -= 1
            self.add_to_free_list(pfn + (1 << high), high, migratetype)

    def free_blocks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(pfn, order) of each free block that begins in [start, end)."""
        flags, orders = self.pages.flags, self.pages.order
        pfn = start
        while pfn < end:
            if flags[pfn] & PG_buddy:
                order = orders[pfn]
                yield pfn, order
                pfn += 1 << order
            else:
                pfn += 1

    def buddy_of(self, pfn: int) -> int:
        """The first frame of the free block that holds `pfn`, or -1."""
        for order in range(MAX_ORDER + 1):
            head = pfn & -(1 << order)
            if self.pages.flags[head] & PG_buddy and self.pages.order[head] >= order:
                return head
        return -1

    # -- taking -------------------------------------------------------------------------------

    def rmqueue(self, order: int, migratetype: int) -> int:
        """__rmqueue: a block of 2**order frames for this type of request, never an isolated one, or -1."""
        pfn = self._rmqueue_smallest(order, migratetype)
        if pfn < 0:
            pfn = self._rmqueue_claim(order, migratetype)
        if pfn < 0:
            pfn = self._rmqueue_steal(order, migratetype)
        return pfn

    def _take(self, pfn: int, order: int, migratetype: int) -> int:
        self.expand(pfn, order, self.del_from_free_list(pfn, migratetype), migratetype)
        return pfn

    def _rmqueue_smallest(self, order: int, migratetype: int) -> int:
        for size in range(order, MAX_ORDER + 1):
            blocks = self.free_list[size][migratetype]
            if blocks:
                pfn, _ = blocks.popitem()
                pages = self.pages
                pages.flags[pfn] = 0
                pages.order[pfn] = 0
                self.nr_free -= 1 << size
                if size > order:
                    self.expand(pfn, order, size, migratetype)
                return pfn
        return -1

    def find_suitable_fallback(self, order: int, migratetype: int, *, claimable: bool) -> int:
        """The other type that has a block of exactly this order; -1: none, -2: too small to claim."""
        if claimable and order < PAGEBLOCK_ORDER // 2 and migratetype == MIGRATE_MOVABLE:
            return _TOO_SMALL
        for other in _FALLBACKS[migratetype]:
            if self.free_list[order][other]:
                return other
        return -1

    def _rmqueue_claim(self, order: int, migratetype: int) -> int:
        """Of other types' blocks the largest first, with the whole page block if most of it is free."""
        for current in range(MAX_ORDER, order - 1, -1):
            other = self.find_suitable_fallback(current, migratetype, claimable=True)
            if other == _TOO_SMALL:
                break
            if other >= 0:
                head = next(reversed(self.free_list[current][other]))
                pfn = self._try_to_claim_block(head, current, order, migratetype, other)
                if pfn >= 0:
                    return pfn
        return -1

    def _try_to_claim_block(self, head: int, current: int, order: int, migratetype: int, other: int) -> int:
        blocks = self.blocks
        if current >= PAGEBLOCK_ORDER:
            self.del_from_free_list(head, other)
            for block in range(head >> PAGEBLOCK_ORDER, (head + (1 << current)) >> PAGEBLOCK_ORDER):
                blocks.type[block] = migratetype
            self.expand(head, order, current, migratetype)
            return head
        start = head & -PAGEBLOCK_NR_PAGES
        end = start + PAGEBLOCK_NR_PAGES
        if start < self.start or end > self.end:
            return -1
        found = list(self.free_blocks(start, end))
        free = sum(1 << size for _, size in found)
        movable = sum(1 for pfn in range(start, end) if self.pages.flags[pfn] & PG_lru)
        if migratetype == MIGRATE_MOVABLE:
            alike = movable
        else:
            # What is neither free nor movable is of either kind in a movable block, of one in the others.
            alike = PAGEBLOCK_NR_PAGES - free - movable if other == MIGRATE_MOVABLE else 0
        if free + alike < 1 << (PAGEBLOCK_ORDER - 1):
            return -1
        self.move_freepages_block(start, other, migratetype)
        blocks.type[start >> PAGEBLOCK_ORDER] = migratetype
        return self._rmqueue_smallest(order, migratetype)

    def move_freepages_block(self, start: int, old: int, new: int) -> int:
        """Put the free pages of a page block on another type's lists; how many pages."""
        moved = 0
        for pfn, _ in list(self.free_blocks(start, min(start + PAGEBLOCK_NR_PAGES, self.end))):
            order = self.del_from_free_list(pfn, old)
            self.add_to_free_list(pfn, order, new)
            moved += 1 << order
        return moved

    def _rmqueue_steal(self, order: int, migratetype: int) -> int:
        for current in range(order, MAX_ORDER + 1):
            other = self.find_suitable_fallback(current, migratetype, claimable=False)
            if other >= 0:
                return self._take(next(reversed(self.free_list[current][other])), order, other)
        return -1

    def isolate_free_page(self, pfn: int, migratetype: int) -> int:
        """__isolate_free_page: take a whole free block; its order, or -1 below the low watermark."""
        order = self.pages.order[pfn]
        if migratetype != MIGRATE_ISOLATE and not self.watermark_ok(self.wmark_min + (1 << order), 0):
            return -1
        self.del_from_free_list(pfn, migratetype)
        if order >= PAGEBLOCK_ORDER - 1:
            for block in range(pfn >> PAGEBLOCK_ORDER, (pfn + (1 << order) - 1 >> PAGEBLOCK_ORDER) + 1):
                self.blocks.type[block] = MIGRATE_MOVABLE
        return order


    def take_page_off_buddy(self, pfn: int) -> bool:
        """Take one frame out of the free block that it is in; false if it is in none."""
        head = self.buddy_of(pfn)
        if head < 0:
            return False
        migratetype = self.blocks.migratetype(head)
        order = self.del_from_free_list(head, migratetype)
        while order:
            order -= 1
            upper = head + (1 << order)
            if pfn < upper:
                self.add_to_free_list(upper, order, migratetype)
            else:
                self.add_to_free_list(head, order, migratetype)
                head = upper
        return True


class PgData:
    """struct pglist_data: one NUMA node. vmscan keeps its own state in `vmscan`, lru in `lruvec`.

    `zone` is the normal zone; `zones` has the movable one behind it, where the host has one.
    """

    __slots__ = ("kcompactd", "lruvec", "nid", "vmscan", "zone", "zones")

    def __init__(self, nid: int, zones: list[Zone]) -> None:
        self.nid = nid
        self.zone = zones[0]
        self.zones = zones
        self.lruvec: object = None
        self.vmscan: object = None
        self.kcompactd: object = None
