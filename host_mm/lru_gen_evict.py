"""MGLRU eviction: reclaim the oldest generation, and age when too few are left.

Source of truth: mm/vmscan.c (sort_folio, isolate_folio, scan_folios, isolate_folios, evict_folios,
should_run_aging, get_nr_to_scan, should_abort_scan, try_to_shrink_lruvec, lru_gen_shrink_lruvec,
lru_gen_shrink_node, set_initial_priority, run_aging, run_eviction); Linux 6.18.

Folios are taken from the tail of the oldest generation. One that a walk promoted goes to the list it
belongs to, one that is under writeback waits in the next generation; the rest is isolated and given to
shrink_folio_list, which looks around each young entry that it meets.

Not modelled: min_ttl_ms, the lists of memory cgroups by generation (groups take turns), the PID
controller: file folios first, then anonymous ones.
"""

from __future__ import annotations

from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING

from host_mm.kernel.costs import COST_SCAN_PAGE
from host_mm.kernel.errors import KernelError
from host_mm.lru_gen import (
    ANON_AND_FILE,
    LRU_REFS_WIDTH,
    MAX_LRU_BATCH,
    MAX_NR_GENS,
    MIN_LRU_BATCH,
    MIN_NR_GENS,
    GenLruvec,
    MmWalk,
)
from host_mm.lru_gen_walk import evictable_types, try_to_inc_max_seq, try_to_inc_min_seq
from host_mm.page import (
    PG_active,
    PG_dirty,
    PG_lru,
    PG_mlocked,
    PG_reclaim,
    PG_referenced,
    PG_unevictable,
    PG_workingset,
    PG_writeback,
    folio_mapcount,
    try_get_page,
)
from host_mm.shrink_folio_list import DEF_PRIORITY, ScanControl, move_folios_to_lru, shrink_folio_list
from host_mm.vmscan_trace import trace_reclaim_flags

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["DEFAULT_SWAPPINESS", "lru_gen_shrink_lruvec", "lru_gen_shrink_node", "run_aging", "run_eviction"]

DEFAULT_SWAPPINESS = 60


def _swappiness(vec: GenLruvec, sc: ScanControl) -> int:
    swap = vec.host.swap
    if not sc.may_swap or swap is None:
        return 0
    free = swap.nr_free
    if vec.memcg is not None:
        free = min(free, vec.memcg.swap_max - vec.memcg.swap)
    return DEFAULT_SWAPPINESS if free >= MIN_LRU_BATCH else 0


def _evictable_min_seq(vec: GenLruvec, swappiness: int) -> int:
    return min(vec.min_seq[kind] for kind in evictable_types(swappiness))


# -- isolation ----------------------------------------------------------------------------------


def _sort_folio(vec: GenLruvec, pfn: int, kind: int) -> bool:
    """Whether the folio is not to be reclaimed now; then it is where it belongs."""
    host = vec.host
    gens, flags = host.gens, host.pages.flags
    if flags[pfn] & PG_mlocked:
        vec.del_folio(pfn, reclaiming=True)
        flags[pfn] |= PG_unevictable
        vec.add(pfn, flags[pfn])
        host.vmstat["unevictable_pgs_culled"] += 1
        return True
    gen = gens.gen[pfn] - 1
    if gen != vec.min_seq[kind] % MAX_NR_GENS:
        vec.move(pfn, gen)
        return True
    if gens.folio_refs(pfn) + bool(flags[pfn] & PG_workingset) == (1 << LRU_REFS_WIDTH) + 1:
        vec.move(pfn, vec.inc_gen(pfn, kind, reclaiming=False))
        return True
    if flags[pfn] & PG_writeback or (kind and flags[pfn] & PG_dirty):
        vec.move(pfn, vec.inc_gen(pfn, kind, reclaiming=True))
        return True
    return False


def _isolate_folio(vec: GenLruvec, pfn: int) -> bool:
    host = vec.host
    flags = host.pages.flags
    if not try_get_page(host, pfn):
        return False
    flags[pfn] &= ~(PG_lru | PG_reclaim)
    if not flags[pfn] & PG_referenced:
        host.gens.refs[pfn] = 0
    vec.del_folio(pfn, reclaiming=True)
    return True


def _scan_folios(vec: GenLruvec, nr_to_scan: int, sc: ScanControl, kind: int) -> tuple[list[int], int]:
    host = vec.host
    taken: list[int] = []
    skipped: list[int] = []
    scanned = sorted_ = 0
    remaining = min(nr_to_scan, MAX_LRU_BATCH)
    if vec.nr_gens(kind) == MIN_NR_GENS:
        return taken, 0
    gen = vec.min_seq[kind] % MAX_NR_GENS
    entries = vec.folios[gen][kind]
    while entries and remaining > 0 and max(len(taken), len(skipped)) < MIN_LRU_BATCH:
        pfn = next(iter(entries))
        remaining -= 1
        scanned += host.gens.pages_of(pfn)
        if _sort_folio(vec, pfn, kind):
            sorted_ += 1
        elif _isolate_folio(vec, pfn):
            taken.append(pfn)
        else:
            vec.take(pfn)
            skipped.append(pfn)
    for pfn in skipped:
        vec.put(pfn, gen, kind, tail=False)
    if sc.target_mem_cgroup is None:
        host.vmstat["pgscan_kswapd" if sc.is_kswapd else "pgscan_direct"] += len(taken)
        host.vmstat["pgrefill"] += sorted_
    host.vmstat["pgscan_file" if kind else "pgscan_anon"] += len(taken)
    if (t := host.trace.mm_vmscan_lru_isolate) is not None:
        name = "inactive_file" if kind else "inactive_anon"
        t(sc.reclaim_idx, sc.order, MAX_LRU_BATCH, scanned, len(skipped), len(taken), name)
    host.sched.advance(COST_SCAN_PAGE * scanned)
    return taken, scanned if taken or not remaining else 0


def _isolate_folios(
    vec: GenLruvec, nr_to_scan: int, sc: ScanControl, swappiness: int
) -> tuple[list[int], int, int]:
    for kind in reversed(evictable_types(swappiness)):
        taken, scanned = _scan_folios(vec, nr_to_scan, sc, kind)
        if scanned:
            return taken, scanned, kind
    return [], 0, 1


# -- eviction -----------------------------------------------------------------------------------


def _evict_folios(vec: GenLruvec, nr_to_scan: int, sc: ScanControl, swappiness: int) -> int:
    """Reclaim a batch of the oldest generation; how many folios were looked at, 0 if there are none."""
    with vec.lock:
        folios, scanned, kind = _isolate_folios(vec, nr_to_scan, sc, swappiness)
        scanned += try_to_inc_min_seq(vec, swappiness)
        if _evictable_min_seq(vec, swappiness) + MIN_NR_GENS > vec.max_seq:
            scanned = 0
    retry = True
    while folios:
        folios = _shrink_isolated(vec, folios, scanned, kind, sc, retry)
        retry = False
    return scanned


def _shrink_isolated(
    vec: GenLruvec, folios: list[int], scanned: int, kind: int, sc: ScanControl, retry: bool
) -> list[int]:
    """One pass of shrink_folio_list; with `retry`, the folios that came clean meanwhile come back."""
    host = vec.host
    flags = host.pages.flags
    reclaimed, stat, kept = shrink_folio_list(host, folios, sc)
    if stat.nr_unqueued_dirty == len(folios):
        host.flusher.wakeup()
    sc.nr_reclaimed += reclaimed
    sc.nr_writeback += stat.nr_writeback + stat.nr_pageout
    if (t := host.trace.mm_vmscan_lru_shrink_inactive) is not None:
        t(vec.nid, scanned, reclaimed, *stat.args(), sc.priority, trace_reclaim_flags(bool(kind)))
    clean: list[int] = []
    back: list[int] = []
    for pfn in kept:
        value = flags[pfn]
        unused = not value & (PG_mlocked | PG_active | PG_dirty | PG_writeback)
        if retry and unused and not folio_mapcount(host.pages, pfn):
            clean.append(pfn)
            continue
        if not value & PG_mlocked and vec.folio_seq(pfn, False) == vec.min_seq[kind]:
            # A folio that was rejected does not go back to the oldest generation.
            flags[pfn] = (value & ~PG_referenced) | PG_active
            host.gens.refs[pfn] = 0
        back.append(pfn)
    move_folios_to_lru(host, vec, back)
    walk = host.gens.walks.get(host.sched.current)
    if walk is not None and walk.batched:
        with vec.lock:
            walk.reset_batch_size(vec)
    if sc.target_mem_cgroup is None:
        host.vmstat["pgsteal_kswapd" if sc.is_kswapd else "pgsteal_direct"] += reclaimed
    host.vmstat["pgsteal_file" if kind else "pgsteal_anon"] += reclaimed
    return clean


def _nr_to_scan(vec: GenLruvec, sc: ScanControl, swappiness: int) -> int:
    """How many folios this pass looks at, aging first if it has to; -1: there is a new generation now."""
    max_seq = vec.max_seq
    oldest = _evictable_min_seq(vec, swappiness) + MIN_NR_GENS
    size = 0
    if oldest <= max_seq:
        for kind in evictable_types(swappiness):
            for seq in range(vec.min_seq[kind], max_seq + 1):
                size += max(vec.nr_pages[seq % MAX_NR_GENS][kind], 0)
    if size and vec.memcg is not None and not vec.memcg.online:
        return size
    if oldest < max_seq or sc.priority == DEF_PRIORITY:
        return size >> sc.priority
    return -1 if try_to_inc_max_seq(vec, max_seq, swappiness) else 0


def _should_abort_scan(vec: GenLruvec, sc: ScanControl) -> bool:
    if sc.target_mem_cgroup is not None:
        return False
    if sc.nr_reclaimed >= sc.nr_to_reclaim:
        return True
    if not sc.is_kswapd or sc.order:
        return False
    zone = vec.host.allocator.nodes[vec.nid].zone
    return bool(zone.watermark_ok(zone.wmark_high + MIN_LRU_BATCH, 0))


def _try_to_shrink_lruvec(vec: GenLruvec, sc: ScanControl) -> None:
    sched = vec.host.sched
    swappiness = _swappiness(vec, sc)
    scanned = 0
    while True:
        nr_to_scan = _nr_to_scan(vec, sc, swappiness)
        if nr_to_scan <= 0:
            return
        delta = _evict_folios(vec, nr_to_scan, sc, swappiness)
        scanned += delta
        if not delta or scanned >= nr_to_scan or _should_abort_scan(vec, sc):
            return
        if sched.preempt:
            sched.point("cond_resched")


def lru_gen_shrink_lruvec(vec: GenLruvec, sc: ScanControl) -> None:
    """Reclaim for a memory cgroup."""
    vec.host.lru.lru_add_drain()
    _try_to_shrink_lruvec(vec, sc)


def _set_initial_priority(host: HostMm, vecs: list[GenLruvec], sc: ScanControl) -> None:
    if sc.priority != DEF_PRIORITY or sc.nr_to_reclaim < MIN_LRU_BATCH:
        return
    kinds = range(0 if host.swap is not None and host.swap.nr_free else 1, ANON_AND_FILE)
    reclaimable = sum(
        vec.nr_pages[gen][kind]
        for vec in vecs for gen in range(MAX_NR_GENS) if not vec.is_active(gen) for kind in kinds
    )
    priority = reclaimable.bit_length() - 1 - (sc.nr_to_reclaim - 1).bit_length()
    sc.priority = min(max(priority, DEF_PRIORITY // 2), DEF_PRIORITY)


def lru_gen_shrink_node(host: HostMm, nid: int, sc: ScanControl) -> None:
    """Reclaim for the whole node: every group in turn until enough came free."""
    vecs = [vec for vec in host.memcg.iter(nid, None) if isinstance(vec, GenLruvec)]
    before = sc.nr_reclaimed
    host.lru.lru_add_drain()
    task = host.sched.current
    if sc.is_kswapd:
        host.gens.walks[task] = MmWalk()
        sc.nr_reclaimed = 0
    _set_initial_priority(host, vecs, sc)
    for number, vec in enumerate(vecs):
        _try_to_shrink_lruvec(vec, sc)
        if _should_abort_scan(vec, sc):
            host.memcg.iter_break(nid, number + 1)
            break
    if sc.is_kswapd:
        sc.nr_reclaimed += before
        del host.gens.walks[task]


# -- /sys/kernel/debug/lru_gen ------------------------------------------------------------------


def run_aging(vec: GenLruvec, seq: int, *, swappiness: int = DEFAULT_SWAPPINESS) -> None:
    """`+ memcg node seq`: open the generation after `seq`. KernelError(EINVAL, EEXIST)."""
    if seq > vec.max_seq:
        raise KernelError(EINVAL, f"generation {seq}: the youngest is {vec.max_seq}")
    if not try_to_inc_max_seq(vec, vec.max_seq, swappiness):
        raise KernelError(EEXIST, "somebody else opened a generation")


def run_eviction(vec: GenLruvec, seq: int, nr_to_reclaim: int, sc: ScanControl) -> int:
    """`- memcg node seq swappiness n`: evict generations up to `seq`; frames freed. KernelError(EINVAL)."""
    if seq + MIN_NR_GENS > vec.max_seq:
        raise KernelError(EINVAL, f"generation {seq}: the two youngest of {vec.max_seq} stay")
    swappiness = _swappiness(vec, sc)
    sc.nr_reclaimed = 0
    while seq >= _evictable_min_seq(vec, swappiness) and sc.nr_reclaimed < nr_to_reclaim:
        if not _evict_folios(vec, nr_to_reclaim - sc.nr_reclaimed, sc, swappiness):
            break
    return sc.nr_reclaimed
