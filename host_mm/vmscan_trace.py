"""The kernel's vmscan tracepoints and the counts they print.

Source of truth: include/trace/events/vmscan.h, include/trace/events/mmflags.h (Linux 6.18).

A `page=%p` is printed as the
address in vmemmap that the pfn has without KASLR; the kernel prints a hash of it.

Not modelled: slab shrinker, node reclaim and LRU insertion tracepoints.
"""

from __future__ import annotations

from typing import Any

from host_mm.page_alloc import GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_KERNEL_ACCOUNT, GFP_NOWAIT
from trace_events.tracepoint import Tracepoint

__all__ = [
    "RECLAIM_WB_ANON",
    "RECLAIM_WB_ASYNC",
    "RECLAIM_WB_FILE",
    "TRACEPOINTS",
    "VMSCAN_THROTTLE_CONGESTED",
    "VMSCAN_THROTTLE_NOPROGRESS",
    "VMSCAN_THROTTLE_WRITEBACK",
    "ReclaimStat",
    "show_gfp_flags",
    "trace_reclaim_flags",
]

_VMEMMAP = 0xFFFFEA0000000000

RECLAIM_WB_ANON = 0x1
RECLAIM_WB_FILE = 0x2
RECLAIM_WB_ASYNC = 0x8

VMSCAN_THROTTLE_WRITEBACK = 0
VMSCAN_THROTTLE_NOPROGRESS = 2
VMSCAN_THROTTLE_CONGESTED = 3
_THROTTLE_NAMES = (
    "VMSCAN_THROTTLE_WRITEBACK", "VMSCAN_THROTTLE_ISOLATED", "VMSCAN_THROTTLE_NOPROGRESS",
    "VMSCAN_THROTTLE_CONGESTED",
)

_RECLAIM_NAMES = ((1, "RECLAIM_WB_ANON"), (2, "RECLAIM_WB_FILE"), (8, "RECLAIM_WB_ASYNC"))

# Most bits first: a mask that matches takes its bits away from those after it.
_GFP_NAMES = (
    (GFP_HIGHUSER_MOVABLE, "GFP_HIGHUSER_MOVABLE"), (GFP_KERNEL_ACCOUNT, "GFP_KERNEL_ACCOUNT"),
    (GFP_KERNEL, "GFP_KERNEL"), (GFP_ATOMIC, "GFP_ATOMIC"), (GFP_NOWAIT, "GFP_NOWAIT"),
    (1 << 10 | 1 << 11, "__GFP_RECLAIM"), (1 << 1, "__GFP_HIGHMEM"), (1 << 3, "__GFP_MOVABLE"),
    (1 << 5, "__GFP_HIGH"),
    (1 << 6, "__GFP_IO"), (1 << 7, "__GFP_FS"), (1 << 8, "__GFP_ZERO"), (1 << 10, "__GFP_DIRECT_RECLAIM"),
    (1 << 11, "__GFP_KSWAPD_RECLAIM"), (1 << 13, "__GFP_NOWARN"), (1 << 16, "__GFP_NORETRY"),
    (1 << 18, "__GFP_COMP"), (1 << 20, "__GFP_HARDWALL"), (1 << 21, "__GFP_THISNODE"),
    (1 << 22, "__GFP_ACCOUNT"),
)


def show_gfp_flags(gfp: int) -> str:
    """`GFP_KERNEL|__GFP_ZERO` and the like."""
    if not gfp:
        return "none"
    names = []
    for mask, name in _GFP_NAMES:
        if gfp & mask == mask:
            names.append(name)
            gfp &= ~mask
    if gfp:
        names.append(f"{gfp:#x}")
    return "|".join(names)


def trace_reclaim_flags(file: bool) -> int:
    """The flags word of the lru_shrink and write_folio events."""
    return (RECLAIM_WB_FILE if file else RECLAIM_WB_ANON) | RECLAIM_WB_ASYNC


def _show_reclaim_flags(flags: int) -> str:
    return "|".join(name for bit, name in _RECLAIM_NAMES if flags & bit) or "RECLAIM_WB_NONE"


class ReclaimStat:
    """struct reclaim_stat: what shrink_folio_list met."""

    __slots__ = (
        "nr_activate", "nr_congested", "nr_dirty", "nr_immediate", "nr_lazyfree_fail", "nr_pageout",
        "nr_ref_keep", "nr_unmap_fail", "nr_unqueued_dirty", "nr_writeback",
    )

    def __init__(self) -> None:
        self.nr_dirty = self.nr_unqueued_dirty = self.nr_congested = self.nr_writeback = 0
        self.nr_immediate = self.nr_pageout = self.nr_ref_keep = self.nr_unmap_fail = 0
        self.nr_lazyfree_fail = 0
        self.nr_activate = [0, 0]

    def args(self) -> tuple[int, ...]:
        """The counts in the order the tracepoints have them."""
        return (
            self.nr_dirty, self.nr_writeback, self.nr_congested, self.nr_immediate, self.nr_activate[0],
            self.nr_activate[1], self.nr_ref_keep, self.nr_unmap_fail,
        )


_STAT_FIELDS = (
    "nid", "nr_scanned", "nr_reclaimed", "nr_dirty", "nr_writeback", "nr_congested", "nr_immediate",
    "nr_activate0", "nr_activate1", "nr_ref_keep", "nr_unmap_fail",
)


def _fmt_stat(*a: Any) -> str:
    return (
        f"nid={a[0]} nr_scanned={a[1]} nr_reclaimed={a[2]} nr_dirty={a[3]} nr_writeback={a[4]} "
        f"nr_congested={a[5]} nr_immediate={a[6]} nr_activate_anon={a[7]} nr_activate_file={a[8]} "
        f"nr_ref_keep={a[9]} nr_unmap_fail={a[10]}"
    )


def _fmt_shrink_inactive(*a: Any) -> str:
    return f"{_fmt_stat(*a[:11])} priority={a[11]} flags={_show_reclaim_flags(a[12])}"


def _fmt_shrink_active(
    nid: int, taken: int, active: int, deactivated: int, referenced: int, priority: int, flags: int
) -> str:
    return (
        f"nid={nid} nr_taken={taken} nr_active={active} nr_deactivated={deactivated} "
        f"nr_referenced={referenced} priority={priority} flags={_show_reclaim_flags(flags)}"
    )


def _fmt_isolate(
    zone: int, order: int, requested: int, scanned: int, skipped: int, taken: int, lru: str
) -> str:
    return (
        f"classzone={zone} order={order} nr_requested={requested} nr_scanned={scanned} "
        f"nr_skipped={skipped} nr_taken={taken} lru={lru}"
    )


def _tp(name: str, fields: tuple[str, ...], fmt: Any, *, scope: bool = False) -> Tracepoint:
    return Tracepoint("vmscan", f"mm_vmscan_{name}", fields, fmt, scope=scope)


KSWAPD_SLEEP = _tp("kswapd_sleep", ("nid",), lambda nid: f"nid={nid}")
KSWAPD_WAKE = _tp(
    "kswapd_wake", ("nid", "zid", "order"), lambda nid, zid, order: f"nid={nid} order={order}", scope=True
)
WAKEUP_KSWAPD = _tp(
    "wakeup_kswapd", ("nid", "zid", "order", "gfp_flags"),
    lambda nid, zid, order, gfp: f"nid={nid} order={order} gfp_flags={show_gfp_flags(gfp)}",
)
DIRECT_RECLAIM_BEGIN = _tp(
    "direct_reclaim_begin", ("order", "gfp_flags"),
    lambda order, gfp: f"order={order} gfp_flags={show_gfp_flags(gfp)}", scope=True,
)
DIRECT_RECLAIM_END = _tp("direct_reclaim_end", ("nr_reclaimed",), lambda nr: f"nr_reclaimed={nr}")
MEMCG_RECLAIM_BEGIN = _tp(
    "memcg_reclaim_begin", ("order", "gfp_flags"),
    lambda order, gfp: f"order={order} gfp_flags={show_gfp_flags(gfp)}", scope=True,
)
MEMCG_RECLAIM_END = _tp("memcg_reclaim_end", ("nr_reclaimed",), lambda nr: f"nr_reclaimed={nr}")
LRU_ISOLATE = _tp(
    "lru_isolate",
    ("highest_zoneidx", "order", "nr_requested", "nr_scanned", "nr_skipped", "nr_taken", "lru"),
    _fmt_isolate,
)
WRITE_FOLIO = _tp(
    "write_folio", ("pfn", "reclaim_flags"),
    lambda pfn, flags: f"page={_VMEMMAP + (pfn << 6):016x} pfn={pfn:#x} flags={_show_reclaim_flags(flags)}",
)
RECLAIM_PAGES = _tp("reclaim_pages", _STAT_FIELDS, _fmt_stat)
LRU_SHRINK_INACTIVE = _tp(
    "lru_shrink_inactive", (*_STAT_FIELDS, "priority", "reclaim_flags"), _fmt_shrink_inactive
)
LRU_SHRINK_ACTIVE = _tp(
    "lru_shrink_active",
    ("nid", "nr_taken", "nr_active", "nr_deactivated", "nr_referenced", "priority", "reclaim_flags"),
    _fmt_shrink_active,
)
THROTTLED = _tp(
    "throttled", ("nid", "usec_timeout", "usec_delayed", "reason"),
    lambda nid, timeout, delayed, reason: (
        f"nid={nid} usec_timeout={timeout} usect_delayed={delayed} "
        f"reason={_THROTTLE_NAMES[reason.bit_length() - 1]}"
    ),
)

TRACEPOINTS = (
    KSWAPD_SLEEP, KSWAPD_WAKE, WAKEUP_KSWAPD, DIRECT_RECLAIM_BEGIN, DIRECT_RECLAIM_END,
    MEMCG_RECLAIM_BEGIN, MEMCG_RECLAIM_END, LRU_ISOLATE,
    WRITE_FOLIO, RECLAIM_PAGES, LRU_SHRINK_INACTIVE, LRU_SHRINK_ACTIVE, THROTTLED,
)
