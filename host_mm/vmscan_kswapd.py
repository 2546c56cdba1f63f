"""kswapd: a node's own reclaimer, woken when an allocation finds the node short.

Source of truth: mm/vmscan.c (kswapd, balance_pgdat, pgdat_balanced, wakeup_kswapd); Linux 6.18.

Not modelled: kswapd's short first sleep, watermark boost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.page_alloc import GFP_DIRECT_RECLAIM, GFP_KERNEL, MAX_RECLAIM_RETRIES, ZONE_NORMAL, gfp_zone
from host_mm.page_io import SWAP_CLUSTER_MAX
from host_mm.shrink_folio_list import ScanControl
from host_mm.vmscan import Kswapd, kswapd_age_node, reclaim_throttle, shrink_node

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["kswapd", "kswapd_asleep", "wakeup_kswapd"]


def _balanced(host: HostMm, nid: int, order: int, zoneidx: int) -> bool:
    """pgdat_balanced: one zone that such a request may use has enough."""
    zones = host.allocator.nodes[nid].zones
    return any(zone.watermark_ok(zone.wmark_high, order) for zone in zones if zone.idx <= zoneidx)


def wakeup_kswapd(host: HostMm, nid: int, order: int, gfp: int) -> None:
    """Wake the node's kswapd if it runs at all, the node is short and reclaim is not hopeless."""
    state = host.allocator.nodes[nid].vmscan
    if not isinstance(state, Kswapd):
        return
    state.order = max(state.order, order)
    state.highest_zoneidx = max(state.highest_zoneidx, gfp_zone(gfp))
    if state.woken or not state.wait.waiters:
        return
    if state.failures >= MAX_RECLAIM_RETRIES or _balanced(host, nid, order, gfp_zone(gfp)):
        # There may be enough of it, in pieces.
        if not gfp & GFP_DIRECT_RECLAIM:
            host.wakeup_kcompactd(nid, order, gfp_zone(gfp))
        return
    if (t := host.trace.mm_vmscan_wakeup_kswapd) is not None:
        t(nid, gfp_zone(gfp), order, gfp)
    state.woken = True
    state.cause = host.stream.ctx.cause
    state.wait.wake_all()


def _balance_pgdat(host: HostMm, nid: int, state: Kswapd, order: int, zoneidx: int) -> None:
    """Reclaim until the node is above its high watermark or priority runs out."""
    zone = host.allocator.nodes[nid].zone
    sc = ScanControl(GFP_KERNEL, order=order)
    sc.reclaim_idx = zoneidx
    sc.is_kswapd = True
    host.vmstat["pageoutrun"] += 1
    while sc.priority >= 1:
        if _balanced(host, nid, order, zoneidx):
            return
        for vec in host.memcg.iter(nid, None) if not host.lru_gen_enabled else ():
            kswapd_age_node(host, vec, sc)
        before = sc.nr_reclaimed
        sc.nr_scanned = 0
        sc.nr_to_reclaim = max(zone.wmark_high, SWAP_CLUSTER_MAX)
        sc.nr_writeback = sc.nr_taken = 0
        shrink_node(host, nid, sc)
        progress = sc.nr_reclaimed - before
        if not progress and sc.nr_writeback and host.swap_device.inflight:
            reclaim_throttle(host, nid)
        if not progress or max(sc.nr_scanned, progress) < sc.nr_to_reclaim:
            sc.priority -= 1
    if not sc.nr_reclaimed:
        state.failures += 1


def kswapd_asleep(host: HostMm, nid: int) -> bool:
    """Whether the node has no kswapd at work."""
    state = host.allocator.nodes[nid].vmscan
    return not isinstance(state, Kswapd) or bool(state.wait.waiters)


def kswapd(host: HostMm, nid: int) -> None:
    """The body of a node's kswapd task: sleep until woken, balance, sleep again. Never returns."""
    state = Kswapd(host, nid)
    host.allocator.nodes[nid].vmscan = state
    task = host.sched.current
    host.allocator.memalloc.add(task)
    ctx = task.ctx
    order, zoneidx = 0, ZONE_NORMAL
    alloc_order = 0
    while True:
        # prepare_kswapd_sleep: a node that is still short gets another round unless that is hopeless.
        if _balanced(host, nid, order, zoneidx) or state.failures >= MAX_RECLAIM_RETRIES:
            host.reset_isolation_suitable(nid)
            host.wakeup_kcompactd(nid, alloc_order, zoneidx)
            if (t := host.trace.mm_vmscan_kswapd_sleep) is not None:
                t(nid)
            ctx.cause = None
            while not state.woken:
                state.wait.wait()
            ctx.cause = state.cause
        state.woken = False
        order, state.order = max(order, state.order), 0
        if state.highest_zoneidx >= 0:
            zoneidx, state.highest_zoneidx = state.highest_zoneidx, -1
        if (t := host.trace.mm_vmscan_kswapd_wake) is not None:
            ctx.cause = t(nid, zoneidx, order)
        _balance_pgdat(host, nid, state, order, zoneidx)
        # A higher order that was not reached is not asked for again by itself.
        alloc_order, order = order, 0
