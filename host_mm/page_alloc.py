"""The buddy allocator: two nodes, one zone each, watermarks, and the funnel every freed frame takes.

Source of truth: mm/page_alloc.c (get_page_from_freelist, __alloc_pages_slowpath, __free_one_page,
expand, free_pages_prepare, __setup_per_zone_wmarks, calculate_min_free_kbytes); Linux 6.18.

A free block is known by its first frame: PG_buddy, its order in `order`, its place in the zone's free
list of that order. At start the zone is cut into blocks of the highest order, so nothing is paid per
frame. Freeing poisons the frame, raises its generation and tells `host.free_hooks`.

The allocator never gives way in its own body, so the zone lock is not needed; only reclaim sleeps.

Not modelled: per-CPU lists, migrate types and page blocks, zones DMA and DMA32, highatomic reserves,
watermark boost, compaction on failure of a high order.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from host_mm.kernel.costs import COST_CLEAR_PAGE, COST_DIRECT_RECLAIM
from host_mm.kernel.errors import BrokenTruth, OutOfMemory
from host_mm.page import PAGE_FLAGS_CHECK_AT_FREE, PG_buddy, PG_head, PG_mlocked, PG_reserved, folio_nr_pages
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.sched import Task

__all__ = [
    "GFP_ATOMIC",
    "GFP_COMP",
    "GFP_DIRECT_RECLAIM",
    "GFP_HIGH",
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

MAX_ORDER = 10
"""The kernel's MAX_PAGE_ORDER: blocks of 4 MiB."""
NUMA_NO_NODE = -1
MAX_RECLAIM_RETRIES = 16
WATERMARK_SCALE_FACTOR = 10
_BAD_AT_FREE = PAGE_FLAGS_CHECK_AT_FREE | PG_buddy | PG_reserved

# The kernel's __GFP_* bits without the underscores, which Python would mangle inside a class.
GFP_HIGHMEM = 1 << 1
GFP_MOVABLE = 1 << 3
GFP_HIGH = 1 << 5
GFP_IO = 1 << 6
GFP_FS = 1 << 7
GFP_ZERO = 1 << 8
GFP_DIRECT_RECLAIM = 1 << 10
GFP_KSWAPD_RECLAIM = 1 << 11
GFP_NOWARN = 1 << 13
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
GFP_HIGHUSER_MOVABLE = GFP_KERNEL | GFP_HARDWALL | GFP_HIGHMEM | GFP_MOVABLE

# enum zone_type of x86-64. Every frame here is ZONE_NORMAL's, but requests name the zone they may go up to.
ZONE_NORMAL = 2
ZONE_MOVABLE = 3
ZONE_NAMES = {ZONE_NORMAL: "normal", ZONE_MOVABLE: "movable"}

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


class Zone:
    """struct zone: frames [start, end) of one node, free lists by order, watermarks in pages.

    A free list is a dict used as an ordered set: blocks are taken from its end (most recently freed
    first) and leave the middle in constant time when they merge.
    """

    __slots__ = (
        "end", "free_list", "managed", "name", "nid", "nr_free", "present", "start", "wmark_high",
        "wmark_low", "wmark_min",
    )

    def __init__(self, nid: int, start: int, end: int) -> None:
        self.nid = nid
        self.name = "Normal"
        self.start = start
        self.end = end
        self.present = end - start
        self.managed = 0
        self.nr_free = 0
        self.free_list: list[dict[int, None]] = [{} for _ in range(MAX_ORDER + 1)]
        self.wmark_min = self.wmark_low = self.wmark_high = 0

    def watermark_ok(self, mark: int, order: int) -> bool:
        """zone_watermark_ok: whether `mark` pages stay free after taking a block of `order`."""
        if self.nr_free - (1 << order) + 1 <= mark:
            return False
        if order == 0:
            return True
        return any(self.free_list[o] for o in range(order, MAX_ORDER + 1))


class PgData:
    """struct pglist_data: one NUMA node. vmscan keeps its own state in `vmscan`, lru in `lruvec`."""

    __slots__ = ("lruvec", "nid", "vmscan", "zone")

    def __init__(self, nid: int, zone: Zone) -> None:
        self.nid = nid
        self.zone = zone
        self.lruvec: object = None
        self.vmscan: object = None


class PageAllocator:
    """The buddy system of one host. `reserved` frames at the bottom are never handed out."""

    def __init__(self, host: HostMm, nr_frames: int, nr_nodes: int, reserved: int) -> None:
        self.host = host
        self.memalloc: set[Task] = set()
        self.nodes: list[PgData] = []
        per_node = (nr_frames // nr_nodes) >> MAX_ORDER << MAX_ORDER or nr_frames // nr_nodes
        for nid in range(nr_nodes):
            start = nid * per_node
            end = nr_frames if nid == nr_nodes - 1 else start + per_node
            self.nodes.append(PgData(nid, Zone(nid, start, end)))
        self._per_node = per_node
        for node in self.nodes:
            self._release_boot_memory(node.zone, max(node.zone.start, reserved))
        self._setup_per_zone_wmarks()

    def _release_boot_memory(self, zone: Zone, start: int) -> None:
        blocks: list[tuple[int, int]] = []
        pfn = start
        while pfn < zone.end:
            order = MAX_ORDER
            while pfn & ((1 << order) - 1) or pfn + (1 << order) > zone.end:
                order -= 1
            blocks.append((pfn, order))
            pfn += 1 << order
        # The lowest block last, so that it is taken first.
        for pfn, order in reversed(blocks):
            self._add_to_free_list(zone, pfn, order)
            zone.managed += 1 << order
            zone.nr_free += 1 << order

    def _setup_per_zone_wmarks(self) -> None:
        managed = sum(node.zone.managed for node in self.nodes)
        min_free_kbytes = min(max(isqrt(managed * 4 * 16), 128), 262144)
        for node in self.nodes:
            zone = node.zone
            zone.wmark_min = (min_free_kbytes >> 2) * zone.managed // max(managed, 1)
            gap = max(zone.wmark_min >> 2, zone.managed * WATERMARK_SCALE_FACTOR // 10000)
            zone.wmark_low = zone.wmark_min + gap
            zone.wmark_high = zone.wmark_low + gap

    def nid_of(self, pfn: int) -> int:
        """page_to_nid."""
        return min(pfn // self._per_node, len(self.nodes) - 1)

    def nr_free_pages(self) -> int:
        """Free frames of the whole host."""
        return sum(node.zone.nr_free for node in self.nodes)

    # -- free lists ---------------------------------------------------------------------------

    def _add_to_free_list(self, zone: Zone, pfn: int, order: int) -> None:
        pages = self.host.pages
        pages.flags[pfn] = PG_buddy
        pages.order[pfn] = order
        zone.free_list[order][pfn] = None

    def _rmqueue(self, zone: Zone, order: int) -> int:
        pages = self.host.pages
        for current in range(order, MAX_ORDER + 1):
            free = zone.free_list[current]
            if free:
                pfn, _ = free.popitem()
                while current > order:
                    current -= 1
                    self._add_to_free_list(zone, pfn + (1 << current), current)
                pages.flags[pfn] = 0
                zone.nr_free -= 1 << order
                return pfn
        return -1

    def _free_one_page(self, zone: Zone, pfn: int, order: int) -> None:
        pages = self.host.pages
        zone.nr_free += 1 << order
        while order < MAX_ORDER:
            buddy = pfn ^ (1 << order)
            if not zone.start <= buddy < zone.end:
                break
            if not pages.flags[buddy] & PG_buddy or pages.order[buddy] != order:
                break
            del zone.free_list[order][buddy]
            pages.flags[buddy] = 0
            pfn &= buddy
            order += 1
        self._add_to_free_list(zone, pfn, order)

    # -- freeing ------------------------------------------------------------------------------

    def free_frozen_pages(self, pfn: int, order: int) -> None:
        """Give back 2**order frames whose reference count is 0."""
        host = self.host
        if host.memcg.folios:
            host.memcg.uncharge(pfn, 1 << order)
        if order:
            host.thp.unqueue_deferred_split(pfn)
        for frame in range(pfn, pfn + (1 << order)):
            self._free_page_prepare(frame)
        pages = host.pages
        pages.order[pfn] = 0
        if (t := host.trace.frame_free) is not None:
            t(pfn, order, self.nid_of(pfn))
        for hook in host.free_hooks:
            hook(pfn, order)
        host.vmstat["pgfree"] += 1 << order
        self._free_one_page(self.nodes[self.nid_of(pfn)].zone, pfn, order)

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

    def _zonelist(self, nid: int, gfp: int) -> list[PgData]:
        if gfp & GFP_THISNODE:
            return [self.nodes[nid]]
        return self.nodes[nid:] + self.nodes[:nid]

    def _get_page_from_freelist(self, order: int, zonelist: list[PgData], mark: str | None) -> int:
        for node in zonelist:
            zone = node.zone
            if mark is not None and not zone.watermark_ok(getattr(zone, mark), order):
                continue
            pfn = self._rmqueue(zone, order)
            if pfn >= 0:
                return pfn
        return -1

    def alloc_pages(self, gfp: int, order: int = 0, nid: int = 0) -> int:
        """2**order frames with one reference, or -1. The first frame's pfn is aligned to the order."""
        zonelist = self._zonelist(max(nid, 0), gfp)
        pfn = self._get_page_from_freelist(order, zonelist, "wmark_low")
        if pfn < 0:
            pfn = self._slowpath(gfp, order, max(nid, 0), zonelist)
            if pfn < 0:
                return -1
        return self._prep_new_page(pfn, order, gfp)

    def _slowpath(self, gfp: int, order: int, nid: int, zonelist: list[PgData]) -> int:
        host = self.host
        task = host.sched.current
        self._wake_all_kswapds(gfp, order, zonelist)
        mark = "wmark_min"
        pfn = self._get_page_from_freelist(order, zonelist, mark)
        if pfn >= 0:
            return pfn
        if task in self.memalloc:
            # PF_MEMALLOC: reclaim itself may eat the reserves, or nothing would ever be freed.
            return self._get_page_from_freelist(order, zonelist, None)
        if not gfp & GFP_DIRECT_RECLAIM or task.no_preempt:
            return self._get_page_from_freelist(order, zonelist, None) if gfp & GFP_HIGH else -1
        no_progress = 0
        while True:
            host.sched.advance(COST_DIRECT_RECLAIM)
            freed = host.reclaim(order, nid, gfp)
            pfn = self._get_page_from_freelist(order, zonelist, mark)
            if pfn >= 0:
                return pfn
            no_progress = 0 if freed else no_progress + 1
            if gfp & GFP_NORETRY or (order > 3 and no_progress):
                return -1
            if no_progress > MAX_RECLAIM_RETRIES or (not freed and no_progress > 1):
                if gfp & GFP_THISNODE:
                    # Whoever was killed might have nothing on that node.
                    return -1
                if not host.out_of_memory(order, None):
                    raise OutOfMemory(f"no block of order {order}; {self.nr_free_pages()} frames are free")
                no_progress = 0
                pfn = self._get_page_from_freelist(order, zonelist, mark)
                if pfn >= 0:
                    return pfn
            self._wake_all_kswapds(gfp, order, zonelist)

    def _wake_all_kswapds(self, gfp: int, order: int, zonelist: list[PgData]) -> None:
        if gfp & GFP_KSWAPD_RECLAIM:
            for node in zonelist:
                self.host.wakeup_kswapd(node.nid, order, gfp)

    def _prep_new_page(self, pfn: int, order: int, gfp: int) -> int:
        host = self.host
        pages = host.pages
        host.vmstat["pgalloc_normal"] += 1 << order
        pages.refcount[pfn] = 1
        pages.order[pfn] = order if gfp & GFP_COMP else 0
        if order and gfp & GFP_COMP:
            pages.flags[pfn] = PG_head
            for distance in range(1, 1 << order):
                pages.tail[pfn + distance] = distance
        elif order:
            for frame in range(pfn + 1, pfn + (1 << order)):
                pages.refcount[frame] = 1
        if gfp & GFP_ZERO:
            for frame in range(pfn, pfn + (1 << order)):
                host.ram.clear_page(frame)
            host.sched.advance(COST_CLEAR_PAGE << order)
        return pfn


def alloc_pages(host: HostMm, gfp: int, order: int = 0, nid: int = 0) -> int:
    """2**order frames from `nid` or, failing that, another node; -1 if none can be had.

    With GFP_COMP one folio, else 2**order pages that are freed one by one.
    """
    return host.allocator.alloc_pages(gfp, order, nid)
