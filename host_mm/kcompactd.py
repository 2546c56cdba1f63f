"""kcompactd: a node's daemon that compacts for whoever wanted a large block and did not get it.

Source of truth: mm/compaction.c (wakeup_kcompactd, kcompactd, kcompactd_do_work); Linux 6.18.

kswapd wakes it when it goes to sleep, and instead of itself where it has nothing to do. The task is started
by the first request for it; until then it would only sleep.

Not modelled: proactive compaction and its timeout, freezing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from host_mm.compaction import (
    COMPACT_COMPLETE,
    COMPACT_CONTINUE,
    COMPACT_PARTIAL_SKIPPED,
    compact_zone,
    compaction_deferred,
    compaction_suit_allocation_order,
    defer_compaction,
)
from host_mm.compaction_scan import CompactControl
from host_mm.kernel.sched import WaitQueue
from host_mm.migrate import MIGRATE_SYNC_LIGHT
from host_mm.page_alloc import COMPACT_SUCCESS

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["Kcompactd", "kcompactd", "kcompactd_asleep", "wakeup_kcompactd"]


class Kcompactd:
    """What struct pglist_data keeps for its kcompactd."""

    __slots__ = ("cause", "highest_zoneidx", "max_order", "sleeping", "wait")

    def __init__(self, host: HostMm, nid: int) -> None:
        self.wait = WaitQueue(host.sched, f"kcompactd{nid}")
        self.max_order = 0
        self.highest_zoneidx = host.allocator.nodes[nid].zones[-1].idx
        self.sleeping = True
        self.cause: int | None = None


def wakeup_kcompactd(host: HostMm, nid: int, order: int, zoneidx: int) -> None:
    """Have the node compacted for blocks of `order`, if its daemon sleeps and compaction makes sense."""
    if not order:
        return
    node = host.allocator.nodes[nid]
    state = node.kcompactd
    if not isinstance(state, Kcompactd):
        state = node.kcompactd = Kcompactd(host, nid)
        host.daemons.append(host.sched.spawn(f"kcompactd{nid}", partial(kcompactd, host, nid, state)))
    state.max_order = max(state.max_order, order)
    state.highest_zoneidx = min(state.highest_zoneidx, zoneidx)
    if not state.sleeping:
        return
    suits = [
        compaction_suit_allocation_order(zone, state.max_order)
        for zone in node.zones if zone.idx <= state.highest_zoneidx
    ]
    if COMPACT_CONTINUE not in suits:
        return
    if (t := host.trace.mm_compaction_wakeup_kcompactd) is not None:
        t(nid, order, zoneidx)
    state.cause = host.stream.ctx.cause
    state.sleeping = False
    state.wait.wake_all()


def kcompactd_asleep(host: HostMm, nid: int) -> bool:
    """Whether the node has no kcompactd at work."""
    state = host.allocator.nodes[nid].kcompactd
    return not isinstance(state, Kcompactd) or state.sleeping


def _do_work(host: HostMm, nid: int, state: Kcompactd) -> None:
    order, idx = state.max_order, state.highest_zoneidx
    ctx = host.sched.current.ctx
    if (t := host.trace.mm_compaction_kcompactd_wake) is not None:
        ctx.cause = t(nid, order, idx)
    host.vmstat["compact_daemon_wake"] += 1
    for zone in host.allocator.nodes[nid].zones:
        if zone.idx > idx or compaction_deferred(zone, order):
            continue
        if compaction_suit_allocation_order(zone, order) != COMPACT_CONTINUE:
            continue
        status = compact_zone(CompactControl(host, zone, order, MIGRATE_SYNC_LIGHT))
        if status == COMPACT_SUCCESS:
            zone.compact_order_failed = max(zone.compact_order_failed, order + 1)
        elif status in (COMPACT_PARTIAL_SKIPPED, COMPACT_COMPLETE):
            defer_compaction(host, zone, order)
    if state.max_order <= order:
        state.max_order = 0
    if state.highest_zoneidx >= idx:
        state.highest_zoneidx = host.allocator.nodes[nid].zones[-1].idx


def kcompactd(host: HostMm, nid: int, state: Kcompactd) -> None:
    """The body of a node's kcompactd task: sleep until an order is wanted, compact for it. Never returns."""
    ctx = host.sched.current.ctx
    while True:
        if state.sleeping:
            ctx.cause = None
            if (t := host.trace.mm_compaction_kcompactd_sleep) is not None:
                t(nid)
            state.wait.wait_event(lambda: not state.sleeping)
        ctx.cause = state.cause
        _do_work(host, nid, state)
        state.sleeping = True
