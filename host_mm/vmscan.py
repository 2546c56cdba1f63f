"""Reclaim: aging and shrinking the LRU lists, by who allocates and by MADV_PAGEOUT.

Source of truth: mm/vmscan.c: isolate_lru_folios, shrink_inactive_list, shrink_active_list,
move_folios_to_lru, inactive_is_low, shrink_lruvec, do_try_to_free_pages, reclaim_throttle, reclaim_pages;
Linux 6.18. kswapd is in vmscan_kswapd.py. The classic LRU; with mm.lru_gen=Y the lists are lru_gen's.

Folios enter the inactive list; one found referenced there once stays, twice is activated; the tail
of the active list is deactivated while the inactive one is small. Priority goes from 12 to 0: a pass
looks at size >> priority of each list.

A reclaimer that made no progress while I/O is in flight waits for some of it to complete (the
kernel's VMSCAN_THROTTLE_WRITEBACK), so that out of memory means that nothing is left.

Not modelled: swappiness and the anon/file cost balance (the file lists go first), workingset refaults,
reclaim that goes on or stops for the sake of compaction, slab shrinkers other than those of shrinker.py
and zswap.py, too_many_isolated, pfmemalloc throttling, node reclaim.
"""

from __future__ import annotations

from itertools import groupby
from math import isqrt
from typing import TYPE_CHECKING

from host_mm.kernel.costs import COST_SCAN_PAGE
from host_mm.kernel.sched import WaitQueue
from host_mm.lru import (
    LRU_ACTIVE_ANON,
    LRU_ACTIVE_FILE,
    LRU_INACTIVE_ANON,
    LRU_INACTIVE_FILE,
    LRU_NAMES,
    Lruvec,
)
from host_mm.lru_gen import GenLruvec
from host_mm.lru_gen_evict import lru_gen_shrink_lruvec, lru_gen_shrink_node
from host_mm.mm_types import VM_EXEC
from host_mm.page import (
    PG_active,
    PG_lru,
    PG_mlocked,
    PG_swapbacked,
    PG_workingset,
    folio_nr_pages,
    try_get_page,
)
from host_mm.page_alloc import (
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_THISNODE,
    ZONE_MOVABLE,
    ZONE_NAMES,
)
from host_mm.page_io import SWAP_CLUSTER_MAX
from host_mm.rmap import folio_referenced
from host_mm.shrink_folio_list import DEF_PRIORITY, ScanControl, move_folios_to_lru, shrink_folio_list
from host_mm.vmscan_trace import VMSCAN_THROTTLE_WRITEBACK, trace_reclaim_flags

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.memcontrol import MemCgroup

__all__ = [
    "DEF_PRIORITY", "reclaim_pages", "try_to_free_mem_cgroup_pages", "try_to_free_pages",
]

_THROTTLE_NS = 100_000_000
"""HZ / 10: how long a reclaimer waits at most for writeback."""

_FILE = 1 << 1
_ANON = 1 << 0


class Kswapd:
    """What struct pglist_data keeps for its kswapd."""

    __slots__ = ("cause", "failures", "highest_zoneidx", "order", "wait", "woken")

    def __init__(self, host: HostMm, nid: int) -> None:
        self.wait = WaitQueue(host.sched, f"kswapd{nid}")
        self.order = 0
        self.highest_zoneidx = -1
        self.woken = False
        self.failures = 0
        self.cause: int | None = None


# -- lists --------------------------------------------------------------------------------------


def _isolate_lru_folios(
    host: HostMm, vec: Lruvec, lru: int, nr_to_scan: int, sc: ScanControl
) -> tuple[list[int], int]:
    """Take up to `nr_to_scan` folios from the tail of a list, under lru_lock: (folios, number scanned)."""
    source = vec.lists[lru]
    flags = host.pages.flags
    taken: list[int] = []
    scanned = skipped = nr_taken = 0
    zone_of = host.allocator.zone_of if sc.reclaim_idx < host.allocator.highest_zoneidx else None
    left = len(source)
    while scanned < nr_to_scan and source:
        pfn = next(iter(source))
        nr_pages = folio_nr_pages(host.pages, pfn)
        if zone_of is not None:
            if not left:
                break
            left -= 1
            if zone_of(pfn).idx > sc.reclaim_idx:
                # A frame there would be of no use to this request.
                skipped += nr_pages
                source.move_to_end(pfn)
                continue
        scanned += nr_pages
        if not try_get_page(host, pfn):
            # On its way to be freed: whoever frees it takes it off the list.
            source.move_to_end(pfn)
            continue
        vec.remove(pfn, flags[pfn])
        flags[pfn] &= ~PG_lru
        taken.append(pfn)
        nr_taken += nr_pages
    sc.nr_taken += nr_taken
    if (t := host.trace.mm_vmscan_lru_isolate) is not None:
        t(sc.reclaim_idx, sc.order, nr_to_scan, scanned + skipped, skipped, nr_taken, LRU_NAMES[lru])
    if lru & 1:
        host.vmstat["pgrefill"] += scanned
    else:
        host.vmstat[f"pgscan_{_reclaimer(sc)}"] += scanned
        host.vmstat["pgscan_file" if lru >= LRU_INACTIVE_FILE else "pgscan_anon"] += scanned
    host.sched.advance(COST_SCAN_PAGE * len(taken))
    return taken, scanned


def _reclaimer(sc: ScanControl) -> str:
    return "kswapd" if sc.is_kswapd else "direct"


def _shrink_inactive_list(host: HostMm, vec: Lruvec, lru: int, nr_to_scan: int, sc: ScanControl) -> int:
    host.lru.lru_add_drain()
    with vec.lock:
        folios, scanned = _isolate_lru_folios(host, vec, lru, nr_to_scan, sc)
    if not folios:
        return 0
    file = lru >= LRU_INACTIVE_FILE
    reclaimed, stat, kept = shrink_folio_list(host, folios, sc)
    if stat.nr_unqueued_dirty == len(folios):
        # Nothing but dirty pages of files at the end of the list: somebody must write them.
        host.flusher.wakeup()
    move_folios_to_lru(host, vec, kept)
    host.vmstat[f"pgsteal_{_reclaimer(sc)}"] += reclaimed
    host.vmstat["pgsteal_file" if file else "pgsteal_anon"] += reclaimed
    sc.nr_writeback += stat.nr_writeback + stat.nr_pageout
    sc.nr_congested += stat.nr_congested
    sc.nr_immediate += stat.nr_immediate
    if (t := host.trace.mm_vmscan_lru_shrink_inactive) is not None:
        t(vec.nid, scanned, reclaimed, *stat.args(), sc.priority, trace_reclaim_flags(file))
    return reclaimed


def _shrink_active_list(host: HostMm, vec: Lruvec, lru: int, nr_to_scan: int, sc: ScanControl) -> None:
    sched = host.sched
    flags = host.pages.flags
    host.lru.lru_add_drain()
    with vec.lock:
        folios, _ = _isolate_lru_folios(host, vec, lru, nr_to_scan, sc)
    nr_taken = sum(folio_nr_pages(host.pages, pfn) for pfn in folios)
    nr_rotated = 0
    active: list[int] = []
    inactive: list[int] = []
    for pfn in folios:
        if sched.preempt:
            sched.point("cond_resched")
        if flags[pfn] & PG_mlocked:
            host.lru.folio_putback_lru(pfn)
            continue
        referenced, vm_flags = folio_referenced(host, pfn, memcg=sc.target_mem_cgroup)
        if referenced and vm_flags & VM_EXEC and not flags[pfn] & PG_swapbacked:
            active.append(pfn)
            nr_rotated += folio_nr_pages(host.pages, pfn)
            continue
        flags[pfn] = (flags[pfn] & ~PG_active) | PG_workingset
        inactive.append(pfn)
    nr_active = move_folios_to_lru(host, vec, active)
    nr_deactivated = move_folios_to_lru(host, vec, inactive)
    host.vmstat["pgdeactivate"] += nr_deactivated
    if (t := host.trace.mm_vmscan_lru_shrink_active) is not None:
        file = lru >= LRU_INACTIVE_FILE
        t(
            vec.nid, nr_taken, nr_active, nr_deactivated, nr_rotated, sc.priority,
            trace_reclaim_flags(file),
        )


def _inactive_is_low(vecs: list[Lruvec], inactive_lru: int) -> bool:
    """The inactive lists should hold 1 / sqrt(10 * GiB) of both, half of them below 1 GiB."""
    inactive = sum(vec.sizes[inactive_lru] for vec in vecs)
    active = sum(vec.sizes[inactive_lru + 1] for vec in vecs)
    gb = (inactive + active) >> (30 - 12)
    ratio = isqrt(10 * gb) if gb else 1
    return inactive * ratio < active


def _scan_counts(host: HostMm, vec: Lruvec, sc: ScanControl) -> list[int]:
    """get_scan_count: how many folios of each list this pass looks at.

    Without a free slot not even folios that have theirs are looked at; Linux does the same.
    """
    swappable = sc.may_swap and host.swap is not None and host.swap.nr_free > 0
    nr = []
    for lru in range(4):
        anon = lru <= LRU_ACTIVE_ANON
        nr.append(0 if anon and not swappable else vec.sizes[lru] >> sc.priority)
    return nr


def _shrink_lruvec(host: HostMm, vec: Lruvec, sc: ScanControl) -> None:
    if host.lru_gen_enabled:
        assert isinstance(vec, GenLruvec)
        lru_gen_shrink_lruvec(vec, sc)
        return
    nr = _scan_counts(host, vec, sc)
    sched = host.sched
    # Who reclaims directly does all of the first, light pass: kswapd does not keep up.
    whole = not sc.is_kswapd and sc.priority == DEF_PRIORITY and sc.target_mem_cgroup is None
    reclaimed = 0
    while nr[LRU_INACTIVE_ANON] or nr[LRU_ACTIVE_FILE] or nr[LRU_INACTIVE_FILE]:
        for lru in (LRU_INACTIVE_FILE, LRU_ACTIVE_FILE, LRU_INACTIVE_ANON, LRU_ACTIVE_ANON):
            if not nr[lru]:
                continue
            nr_to_scan = min(nr[lru], SWAP_CLUSTER_MAX)
            nr[lru] -= nr_to_scan
            if not lru & 1:
                reclaimed += _shrink_inactive_list(host, vec, lru, nr_to_scan, sc)
            elif sc.may_deactivate & (_FILE if lru == LRU_ACTIVE_FILE else _ANON):
                _shrink_active_list(host, vec, lru, nr_to_scan, sc)
            else:
                sc.skipped_deactivate = True
        if sched.preempt:
            sched.point("cond_resched")
        if reclaimed >= sc.nr_to_reclaim and not whole:
            break
    sc.nr_reclaimed += reclaimed
    kswapd_age_node(host, vec, sc)


def kswapd_age_node(host: HostMm, vec: Lruvec, sc: ScanControl) -> None:
    """Rebalance the anonymous lists whether or not any of them is reclaimed."""
    if host.swap is not None and _inactive_is_low([vec], LRU_INACTIVE_ANON):
        _shrink_active_list(host, vec, LRU_ACTIVE_ANON, SWAP_CLUSTER_MAX, sc)


def shrink_node(host: HostMm, nid: int, sc: ScanControl) -> None:
    before = sc.nr_reclaimed
    if host.lru_gen_enabled and sc.target_mem_cgroup is None:
        lru_gen_shrink_node(host, nid, sc)
    else:
        _shrink_node_memcgs(host, nid, sc)
    if host.zswap.shrinker_enabled:
        host.zswap.shrink_slab(sc.priority)
    host.shrink_slab(nid, sc.priority)
    state = host.allocator.nodes[nid].vmscan
    if sc.nr_reclaimed > before and isinstance(state, Kswapd):
        state.failures = 0


def _shrink_node_memcgs(host: HostMm, nid: int, sc: ScanControl) -> None:
    vecs = host.memcg.iter(nid, sc.target_mem_cgroup)
    sc.may_deactivate = _ANON | _FILE
    if not sc.force_deactivate:
        if not _inactive_is_low(vecs, LRU_INACTIVE_ANON):
            sc.may_deactivate &= ~_ANON
        if not _inactive_is_low(vecs, LRU_INACTIVE_FILE):
            sc.may_deactivate &= ~_FILE
    for number, vec in enumerate(vecs):
        _shrink_lruvec(host, vec, sc)
        # kswapd always goes through all groups; another one leaves the rest to the next.
        if len(vecs) > 1 and not sc.is_kswapd and sc.nr_reclaimed >= sc.nr_to_reclaim:
            host.memcg.iter_break(nid, number + 1)
            break


# -- who reclaims -------------------------------------------------------------------------------


def reclaim_throttle(host: HostMm, nid: int) -> None:
    """Wait until a cluster of folios was written, or HZ / 10."""
    sched = host.sched
    queue = host.reclaim_wait
    begin = sched.now
    woken = False

    def timeout() -> None:
        nonlocal woken
        if not woken:
            queue.wake_all()

    if not queue.waiters:
        host.swap_device.throttled_written = 0
    sched.after(_THROTTLE_NS, timeout)
    queue.wait()
    woken = True
    host.vmstat["nr_throttled"] += 1
    if (t := host.trace.mm_vmscan_throttled) is not None:
        t(nid, _THROTTLE_NS // 1000, (sched.now - begin) // 1000, 1 << VMSCAN_THROTTLE_WRITEBACK)


def _zonelist(host: HostMm, nid: int, gfp: int) -> list[int]:
    if gfp & GFP_THISNODE:
        return [nid]
    nodes = [node.nid for node in host.allocator.nodes]
    return nodes[nid:] + nodes[:nid]


def _do_try_to_free_pages(host: HostMm, nid: int, sc: ScanControl) -> int:
    retried = False
    while True:
        if sc.target_mem_cgroup is None:
            host.vmstat[f"allocstall_{ZONE_NAMES[sc.reclaim_idx]}"] += 1
        sc.priority = DEF_PRIORITY
        while sc.priority >= 0:
            sc.nr_scanned = 0
            for node in _zonelist(host, nid, sc.gfp_mask):
                shrink_node(host, node, sc)
            if sc.nr_reclaimed >= sc.nr_to_reclaim:
                break
            sc.priority -= 1
        if sc.nr_reclaimed:
            return sc.nr_reclaimed
        if sc.skipped_deactivate and not sc.force_deactivate:
            sc.force_deactivate, sc.skipped_deactivate = True, False
            continue
        if host.swap_device is not None and host.swap_device.inflight and not retried:
            reclaim_throttle(host, nid)
            # Once more for what was just written; if nothing at all is in flight then, give up.
            retried = not host.swap_device.inflight
            continue
        return 0


def try_to_free_pages(host: HostMm, order: int, nid: int, gfp: int = GFP_HIGHUSER_MOVABLE) -> int:
    """Direct reclaim for an allocation from `nid`; how many frames came free. May sleep."""
    sc = ScanControl(gfp, order=order, nr_to_reclaim=SWAP_CLUSTER_MAX)
    task = host.sched.current
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.mm_vmscan_direct_reclaim_begin) is not None:
        ctx.cause = t(order, gfp)
    host.allocator.memalloc.add(task)
    try:
        reclaimed = _do_try_to_free_pages(host, nid, sc)
        if (t := host.trace.mm_vmscan_direct_reclaim_end) is not None:
            t(reclaimed)
        return reclaimed
    finally:
        host.allocator.memalloc.discard(task)
        ctx.cause = saved


def try_to_free_mem_cgroup_pages(host: HostMm, memcg: MemCgroup, nr_pages: int, gfp: int) -> int:
    """Reclaim from one group, at least a cluster; how many frames came free. May sleep."""
    sc = ScanControl(gfp, nr_to_reclaim=max(nr_pages, SWAP_CLUSTER_MAX))
    sc.reclaim_idx = ZONE_MOVABLE
    sc.target_mem_cgroup = memcg
    task = host.sched.current
    nested = task in host.allocator.memalloc
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.mm_vmscan_memcg_reclaim_begin) is not None:
        ctx.cause = t(0, gfp)
    host.allocator.memalloc.add(task)
    try:
        reclaimed = _do_try_to_free_pages(host, 0, sc)
        if (t := host.trace.mm_vmscan_memcg_reclaim_end) is not None:
            t(reclaimed)
        return reclaimed
    finally:
        if not nested:
            host.allocator.memalloc.discard(task)
        ctx.cause = saved


def reclaim_pages(host: HostMm, pfns: list[int]) -> int:
    """MADV_PAGEOUT: reclaim folios that the caller isolated, whatever their age; frames freed."""
    task = host.sched.current
    nested = task in host.allocator.memalloc
    host.allocator.memalloc.add(task)
    flags = host.pages.flags
    total = 0
    try:
        # One call for each run of folios of one node.
        for nid, run in groupby(pfns, host.allocator.nid_of):
            folios = list(run)
            for pfn in folios:
                flags[pfn] &= ~PG_active
            sc = ScanControl(GFP_KERNEL)
            reclaimed, stat, kept = shrink_folio_list(host, folios, sc, ignore_references=True)
            for pfn in kept:
                host.lru.folio_putback_lru(pfn)
            if (t := host.trace.mm_vmscan_reclaim_pages) is not None:
                t(nid, sc.nr_scanned, reclaimed, *stat.args())
            total += reclaimed
    finally:
        if not nested:
            host.allocator.memalloc.discard(task)
    return total
