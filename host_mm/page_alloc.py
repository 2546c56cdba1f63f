"""The page allocator: two nodes, watermarks, and the funnel every freed frame takes.

Source of truth: mm/page_alloc.c (get_page_from_freelist, __alloc_pages_slowpath,
__alloc_pages_direct_compact, should_compact_retry, free_pages_prepare, __setup_per_zone_wmarks,
calculate_min_free_kbytes, gfp_migratetype); Linux 6.18.

The free lists are in mmzone.py, what zones there are in mm_init.py. Freeing poisons the frame, raises its
generation and tells `host.free_hooks`. A poisoned frame (memory_failure.py) never comes back to the lists.

The allocator never gives way in its own body, so the zone lock is not needed; only reclaim and
compaction sleep.

Not modelled: per-CPU lists, lowmem reserves, highatomic reserves, watermark boost.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from host_mm.kernel.costs import COST_CLEAR_PAGE, COST_DIRECT_RECLAIM
from host_mm.kernel.errors import BrokenTruth, OutOfMemory
from host_mm.mm_init import free_area_init, memblock_free_all, node_spanned_pages
from host_mm.mmzone import (
    MAX_ORDER,
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    ZONE_MOVABLE,
    ZONE_NAMES,
    ZONE_NORMAL,
    PageBlocks,
    PgData,
    Zone,
)
from host_mm.page import (
    PAGE_FLAGS_CHECK_AT_FREE,
    PG_buddy,
    PG_head,
    PG_hwpoison,
    PG_mlocked,
    PG_reserved,
    folio_nr_pages,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.sched import Task

__all__ = [
    "GFP_ATOMIC",
    "GFP_COMP",
    "GFP_DIRECT_RECLAIM",
    "GFP_HIGH",
    "GFP_HIGHUSER",
    "GFP_HIGHUSER_MOVABLE",
    "GFP_KERNEL",
    "GFP_KERNEL_ACCOUNT",
    "GFP_KSWAPD_RECLAIM",
    "GFP_NORETRY",
    "GFP_NOWAIT",
    "GFP_NOWARN",
    "GFP_PGTABLE_USER",
    "GFP_THISNODE",
    "GFP_ZERO",
    "MAX_ORDER",
    "MAX_RECLAIM_RETRIES",
    "NUMA_NO_NODE",
    "TRACEPOINTS",
    "ZONE_MOVABLE",
    "ZONE_NAMES",
    "ZONE_NORMAL",
    "PageAllocator",
    "PgData",
    "Zone",
    "alloc_pages",
    "gfp_zone",
]

NUMA_NO_NODE = -1
MAX_RECLAIM_RETRIES = 16
MAX_COMPACT_RETRIES = 16
PAGE_ALLOC_COSTLY_ORDER = 3
WATERMARK_SCALE_FACTOR = 10
_YES = ("y", "yes", "1", "on", "true")
_BAD_AT_FREE = PAGE_FLAGS_CHECK_AT_FREE | PG_buddy | PG_reserved

# The kernel's __GFP_* bits without the underscores, which Python would mangle inside a class.
GFP_HIGHMEM = 1 << 1
GFP_MOVABLE = 1 << 3
GFP_RECLAIMABLE = 1 << 4
GFP_HIGH = 1 << 5
GFP_IO = 1 << 6
GFP_FS = 1 << 7
GFP_ZERO = 1 << 8
GFP_DIRECT_RECLAIM = 1 << 10
GFP_KSWAPD_RECLAIM = 1 << 11
GFP_NOWARN = 1 << 13
GFP_RETRY_MAYFAIL = 1 << 14
GFP_NORETRY = 1 << 16
GFP_COMP = 1 << 18
GFP_HARDWALL = 1 << 20
GFP_THISNODE = 1 << 21
GFP_ACCOUNT = 1 << 22
GFP_ATOMIC = GFP_HIGH | GFP_KSWAPD_RECLAIM
GFP_NOWAIT = GFP_KSWAPD_RECLAIM | GFP_NOWARN
GFP_KERNEL = GFP_DIRECT_RECLAIM | GFP_KSWAPD_RECLAIM | GFP_IO | GFP_FS
GFP_KERNEL_ACCOUNT = GFP_KERNEL | GFP_ACCOUNT
GFP_PGTABLE_USER = GFP_KERNEL_ACCOUNT | GFP_ZERO
GFP_USER = GFP_KERNEL | GFP_HARDWALL
GFP_HIGHUSER = GFP_KERNEL | GFP_HARDWALL | GFP_HIGHMEM
GFP_HIGHUSER_MOVABLE = GFP_HIGHUSER | GFP_MOVABLE

# enum compact_priority, lower is harder, and what of enum compact_result the allocator asks about.
COMPACT_PRIO_SYNC_FULL, COMPACT_PRIO_SYNC_LIGHT, COMPACT_PRIO_ASYNC = range(3)
COMPACT_SKIPPED, COMPACT_DEFERRED, COMPACT_SUCCESS = 1, 2, 8

FRAME_FREE = Tracepoint(
    "refault", "frame_free", ("pfn", "order", "nid"),
    lambda pfn, order, nid: f"pfn {pfn:#x} order {order} nid {nid}",
    doc="A frame goes back to the allocator: whoever still translates to it is wrong from here on.",
)
TRACEPOINTS = (FRAME_FREE,)


def gfp_zone(gfp: int) -> int:
    """The highest zone that a request with these flags may use."""
    movable = GFP_HIGHMEM | GFP_MOVABLE
    return ZONE_MOVABLE if gfp & movable == movable else ZONE_NORMAL


class PageAllocator:
    """The buddy system of one host. `reserved` frames at the bottom are never handed out.

    Out of it are `hwpoisoned` frames (to the number of references that memory_failure keeps on each) and
    `offline` memory (first frame to number of frames). A task in `memalloc` may eat the reserves, one in
    `memalloc_pin` gets nothing movable.
    """

    def __init__(self, host: HostMm, nr_frames: int, nr_nodes: int, reserved: int) -> None:
        self.host = host
        self.memalloc: set[Task] = set()
        self.memalloc_pin: set[Task] = set()
        self.blocks = PageBlocks(nr_frames)
        self.hwpoisoned: dict[int, int] = {}
        self.offline: dict[int, int] = {}
        self.page_group_by_mobility = host.params.get("mm.page_group_by_mobility", "N").lower() in _YES
        per_node = node_spanned_pages(nr_frames, nr_nodes)
        self.nodes = free_area_init(host, self.blocks, nr_frames, nr_nodes)
        self._per_node = per_node
        self._zonelists: dict[tuple[int, int, int], list[Zone]] = {}
        self.highest_zoneidx = max(zone.idx for zone in self.zones)
        for zone in self.zones:
            memblock_free_all(zone, max(zone.start, reserved))
        self.setup_per_zone_wmarks()

    @property
    def zones(self) -> list[Zone]:
        """Every zone of every node."""
        return [zone for node in self.nodes for zone in node.zones]

    def setup_per_zone_wmarks(self) -> None:
        """Watermarks by the size of the zones; again when memory goes offline or comes online."""
        managed = sum(node.zone.managed for node in self.nodes)
        min_free_kbytes = min(max(isqrt(managed * 4 * 16), 128), 262144)
        for zone in self.zones:
            share = managed if zone.idx == ZONE_NORMAL else sum(z.managed for z in self.zones)
            zone.wmark_min = (min_free_kbytes >> 2) * zone.managed // max(share, 1)
            gap = max(zone.wmark_min >> 2, zone.managed * WATERMARK_SCALE_FACTOR // 10000)
            zone.wmark_low = zone.wmark_min + gap
            zone.wmark_high = zone.wmark_low + gap

    def nid_of(self, pfn: int) -> int:
        """page_to_nid."""
        return min(pfn // self._per_node, len(self.nodes) - 1)

    def zone_of(self, pfn: int) -> Zone:
        """page_zone."""
        zones = self.nodes[self.nid_of(pfn)].zones
        return zones[-1] if pfn >= zones[-1].start else zones[0]

    def nr_free_pages(self) -> int:
        """Free frames of the whole host, isolated ones apart."""
        return sum(zone.nr_free for node in self.nodes for zone in node.zones)

    def gfp_migratetype(self, gfp: int) -> int:
        """Which blocks a request with these flags takes from first."""
        if not self.page_group_by_mobility or gfp & GFP_MOVABLE:
            return MIGRATE_MOVABLE
        return MIGRATE_RECLAIMABLE if gfp & GFP_RECLAIMABLE else MIGRATE_UNMOVABLE

    # -- freeing ------------------------------------------------------------------------------

    def free_frozen_pages(self, pfn: int, order: int) -> None:
        """Give back 2**order frames whose reference count is 0."""
        host = self.host
        if host.memcg.folios:
            host.memcg.uncharge(pfn, 1 << order)
        if order:
            host.thp.unqueue_deferred_split(pfn)
        pages = host.pages
        if pages.flags[pfn] & PG_hwpoison and not order:
            # Whoever found the error keeps the frame out of the lists for good.
            self.free_pages_prepare(pfn, 0)
            pages.flags[pfn] = PG_hwpoison
            self.hwpoisoned.setdefault(pfn, 0)
            return
        failed = [p for p in self.hwpoisoned if pfn <= p < pfn + (1 << order)] if order else []
        self.free_pages_prepare(pfn, order)
        if (t := host.trace.frame_free) is not None:
            t(pfn, order, self.nid_of(pfn))
        host.vmstat["pgfree"] += 1 << order
        if failed:
            self._free_but(pfn, order, failed)
        else:
            self.zone_of(pfn).free_one_page(pfn, order, self.blocks.migratetype(pfn))

    def _free_but(self, pfn: int, order: int, failed: list[int]) -> None:
        """The frames of a block go to the lists, but those that failed while it was in use."""
        for frame in range(pfn, pfn + (1 << order)):
            if frame in failed:
                self.host.pages.flags[frame] = PG_hwpoison
            else:
                self.zone_of(frame).free_one_page(frame, 0, self.blocks.migratetype(frame))

    def free_pages_prepare(self, pfn: int, order: int) -> None:
        """free_pages_prepare: 2**order frames lose what they were. Whoever watches frees is told."""
        for frame in range(pfn, pfn + (1 << order)):
            self._free_page_prepare(frame)
        self.host.pages.order[pfn] = 0
        for hook in self.host.free_hooks:
            hook(pfn, order)

    def _free_page_prepare(self, pfn: int) -> None:
        host = self.host
        pages = host.pages
        flags = pages.flags[pfn]
        mapped = (
            pages.mapcount[pfn] or pages.entire_mapcount[pfn] or pages.large_mapcount[pfn]
            or pages.nr_pages_mapped[pfn]
        )
        if flags & _BAD_AT_FREE or pages.refcount[pfn] or mapped:
            raise BrokenTruth(
                "bad-page-state",
                f"pfn {pfn:#x} is freed with flags {flags:#x}, refcount {pages.refcount[pfn]}, "
                f"mapcount {mapped}",
            )
        mapping = pages.mapping.get(pfn)
        if mapping is not None:
            del pages.mapping[pfn]
        if flags & PG_mlocked:
            nr_pages = folio_nr_pages(pages, pfn)
            host.vmstat["nr_mlock"] -= nr_pages
            host.vmstat["unevictable_pgs_cleared"] += nr_pages
        pages.flags[pfn] = 0
        pages.private[pfn] = 0
        pages.index[pfn] = 0
        pages.tail[pfn] = 0
        pages.generation[pfn] = (pages.generation[pfn] + 1) & 0xFFFFFFFF
        host.ram.poison_page(pfn)

    # -- allocating ---------------------------------------------------------------------------

    def zonelist(self, nid: int, gfp: int) -> list[Zone]:
        """The zones that a request may take from, the best first."""
        highest = gfp_zone(gfp)
        known = self._zonelists.get((nid, gfp & GFP_THISNODE, highest))
        if known is None:
            nodes = [self.nodes[nid]] if gfp & GFP_THISNODE else self.nodes[nid:] + self.nodes[:nid]
            known = [zone for node in nodes for zone in reversed(node.zones) if zone.idx <= highest]
            self._zonelists[nid, gfp & GFP_THISNODE, highest] = known
        return known

    def _get_page_from_freelist(self, gfp: int, order: int, zonelist: list[Zone], mark: str | None) -> int:
        migratetype = self.gfp_migratetype(gfp)
        for zone in zonelist:
            if mark is not None and not zone.watermark_ok(getattr(zone, mark), order):
                continue
            pfn = zone.rmqueue(order, migratetype)
            if pfn >= 0:
                return pfn
        return -1

    def alloc_pages(self, gfp: int, order: int = 0, nid: int = 0) -> int:
        """2**order frames with one reference, or -1. The first frame's pfn is aligned to the order."""
        if self.host.sched.current in self.memalloc_pin:
            gfp &= ~GFP_MOVABLE
        zonelist = self.zonelist(max(nid, 0), gfp)
        pfn = self._get_page_from_freelist(gfp, order, zonelist, "wmark_low")
        if pfn < 0:
            pfn = self._slowpath(gfp, order, max(nid, 0), zonelist)
            if pfn < 0:
                return -1
        return self.prep_new_page(pfn, order, gfp)

    def _slowpath(self, gfp: int, order: int, nid: int, zonelist: list[Zone]) -> int:
        host = self.host
        task = host.sched.current
        self._wake_all_kswapds(gfp, order, zonelist)
        mark = "wmark_min"
        pfn = self._get_page_from_freelist(gfp, order, zonelist, mark)
        if pfn >= 0:
            return pfn
        if task in self.memalloc:
            # PF_MEMALLOC: reclaim itself may eat the reserves, or nothing would ever be freed.
            return self._get_page_from_freelist(gfp, order, zonelist, None)
        if not gfp & GFP_DIRECT_RECLAIM or task.no_preempt:
            return self._get_page_from_freelist(gfp, order, zonelist, None) if gfp & GFP_HIGH else -1
        compact = _Compact(self, gfp, order, zonelist)
        if order > PAGE_ALLOC_COSTLY_ORDER or (order and self.gfp_migratetype(gfp) != MIGRATE_MOVABLE):
            pfn = compact.direct(COMPACT_PRIO_ASYNC)
            if pfn >= 0 or compact.hopeless_without_retry():
                return pfn
        return self._reclaim_and_retry(gfp, order, nid, zonelist, compact)

    def _reclaim_and_retry(
        self, gfp: int, order: int, nid: int, zonelist: list[Zone], compact: _Compact
    ) -> int:
        host = self.host
        mark = "wmark_min"
        no_progress = 0
        while True:
            host.sched.advance(COST_DIRECT_RECLAIM)
            freed = host.reclaim(order, nid, gfp)
            pfn = self._get_page_from_freelist(gfp, order, zonelist, mark)
            if pfn < 0:
                pfn = compact.direct(compact.priority)
            if pfn >= 0:
                return pfn
            no_progress = 0 if freed else no_progress + 1
            if gfp & GFP_NORETRY or (order > PAGE_ALLOC_COSTLY_ORDER and not gfp & GFP_RETRY_MAYFAIL):
                return -1
            if freed and order and not compact.should_retry():
                return -1
            if no_progress > MAX_RECLAIM_RETRIES or (not freed and no_progress > 1):
                if gfp & (GFP_THISNODE | GFP_RETRY_MAYFAIL) or order > PAGE_ALLOC_COSTLY_ORDER:
                    # Whoever was killed might have nothing on that node, or nothing in one piece.
                    return -1
                if not host.out_of_memory(order, None):
                    raise OutOfMemory(f"no block of order {order}; {self.nr_free_pages()} frames are free")
                no_progress = 0
                pfn = self._get_page_from_freelist(gfp, order, zonelist, mark)
                if pfn >= 0:
                    return pfn
            self._wake_all_kswapds(gfp, order, zonelist)

    def _wake_all_kswapds(self, gfp: int, order: int, zonelist: list[Zone]) -> None:
        if gfp & GFP_KSWAPD_RECLAIM:
            for nid in dict.fromkeys(zone.nid for zone in zonelist):
                self.host.wakeup_kswapd(nid, order, gfp)

    def prep_isolated_page(self, pfn: int, order: int) -> int:
        """A block that compaction took off the lists becomes a folio with one reference; its pfn."""
        pages = self.host.pages
        pages.refcount[pfn] = 1
        if order:
            self._prep_compound_page(pfn, order)
        return pfn

    def _prep_compound_page(self, pfn: int, order: int) -> None:
        pages = self.host.pages
        pages.order[pfn] = order
        pages.flags[pfn] = PG_head
        for distance in range(1, 1 << order):
            pages.tail[pfn + distance] = distance

    def prep_new_page(self, pfn: int, order: int, gfp: int) -> int:
        host = self.host
        pages = host.pages
        host.vmstat["pgalloc_normal"] += 1 << order
        pages.refcount[pfn] = 1
        if order and gfp & GFP_COMP:
            self._prep_compound_page(pfn, order)
        elif order:
            for frame in range(pfn + 1, pfn + (1 << order)):
                pages.refcount[frame] = 1
        if gfp & GFP_ZERO:
            for frame in range(pfn, pfn + (1 << order)):
                host.ram.clear_page(frame)
            host.sched.advance(COST_CLEAR_PAGE << order)
        return pfn


class _Compact:
    """What an allocation of several pages knows of its attempts to have memory compacted."""

    __slots__ = ("allocator", "gfp", "order", "priority", "result", "retries", "zonelist")

    def __init__(self, allocator: PageAllocator, gfp: int, order: int, zonelist: list[Zone]) -> None:
        self.allocator = allocator
        self.gfp = gfp
        self.order = order
        self.zonelist = zonelist
        self.priority = COMPACT_PRIO_SYNC_LIGHT
        self.result = COMPACT_SKIPPED
        self.retries = 0

    def direct(self, priority: int) -> int:
        """__alloc_pages_direct_compact: compact, then try again; a frame or -1."""
        if not self.order:
            return -1
        allocator = self.allocator
        host = allocator.host
        task = host.sched.current
        allocator.memalloc.add(task)
        self.result = host.try_to_compact_pages(self.gfp, self.order, self.zonelist, priority)
        allocator.memalloc.discard(task)
        if self.result == COMPACT_SKIPPED:
            return -1
        host.vmstat["compact_stall"] += 1
        pfn = allocator._get_page_from_freelist(self.gfp, self.order, self.zonelist, "wmark_min")
        if pfn < 0:
            host.vmstat["compact_fail"] += 1
            return -1
        zone = allocator.zone_of(pfn)
        zone.compact_blockskip_flush = False
        zone.compact_considered = zone.compact_defer_shift = 0
        zone.compact_order_failed = max(zone.compact_order_failed, self.order + 1)
        host.vmstat["compact_success"] += 1
        return pfn

    def hopeless_without_retry(self) -> bool:
        """A costly request that must not retry gives up where compaction could not even begin."""
        if self.order <= PAGE_ALLOC_COSTLY_ORDER or not self.gfp & GFP_NORETRY:
            return False
        self.priority = COMPACT_PRIO_ASYNC
        return self.result in (COMPACT_SKIPPED, COMPACT_DEFERRED)

    def should_retry(self) -> bool:
        """should_compact_retry: after some success, or with a harder kind of compaction."""
        costly = self.order > PAGE_ALLOC_COSTLY_ORDER
        if self.result == COMPACT_SKIPPED:
            return True
        if self.result == COMPACT_SUCCESS:
            self.retries += 1
            if self.retries <= (MAX_COMPACT_RETRIES // 4 if costly else MAX_COMPACT_RETRIES):
                return True
        if self.priority > (COMPACT_PRIO_SYNC_LIGHT if costly else COMPACT_PRIO_SYNC_FULL):
            self.priority -= 1
            self.retries = 0
            return True
        return False


def alloc_pages(host: HostMm, gfp: int, order: int = 0, nid: int = 0) -> int:
    """2**order frames from `nid` or, failing that, another node; -1 if none can be had.

    With GFP_COMP one folio, else 2**order pages that are freed one by one.
    """
    return host.allocator.alloc_pages(gfp, order, nid)
