"""MGLRU aging: walk the page tables of all processes, promote what was used, open a new generation.

Source of truth: mm/vmscan.c (try_to_inc_max_seq, iterate_mm_list, walk_mm, walk_pmd_range,
walk_pte_range, should_skip_vma, inc_max_seq, inc_min_seq, try_to_inc_min_seq); Linux 6.18.

The walk takes mmap_lock and each table's lock only if they are free: what is busy is left for the next
generation. Every accessed bit that it finds is cleared by clear_young, page by page, so that a secondary
MMU's accessed bits count like the CPU's. Folios are promoted in place; their lists are put right later,
by eviction. Several tasks may age one lruvec: each takes the next process, and who takes the last one
opens the generation.

Not modelled: Bloom filters, accessed bits of upper levels, huge entries, the note of which process ran
since the last walk (each is taken for one that did).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pte_dirty
from host_mm.fork import mmput
from host_mm.kernel.costs import COST_WALK
from host_mm.lru_gen import (
    ANON_AND_FILE,
    MAX_LRU_BATCH,
    MAX_NR_GENS,
    MIN_NR_GENS,
    GenLruvec,
    MmWalk,
    ptep_clear_young_notify,
)
from host_mm.mm_types import (
    VM_ACCESS_FLAGS,
    VM_LOCKED,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SPECIAL,
)
from host_mm.pgtable_generic import pmd_entries, pte_lockptr, pte_offset_map, ptep_get
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["TRACEPOINTS", "evictable_types", "try_to_inc_max_seq", "try_to_inc_min_seq"]

NEW_GENERATION = Tracepoint(
    "refault", "lru_gen_new_generation", ("nid", "memcg", "max_seq", "leaf_total", "leaf_young"),
    lambda nid, memcg, max_seq, total, young: (
        f"nid {nid} memcg {memcg or '/'} max_seq {max_seq} entries {total} young {young}"
    ),
    doc="MGLRU has walked the page tables and opened a generation.",
)
TRACEPOINTS = (NEW_GENERATION,)


def evictable_types(swappiness: int) -> range:
    """The types that may be reclaimed: without swappiness only file folios."""
    return range(0 if swappiness else 1, ANON_AND_FILE)


# -- the walk -----------------------------------------------------------------------------------


def _should_skip_vma(vma: VmArea, swappiness: int) -> bool:
    if not vma.flags & VM_ACCESS_FLAGS or vma.flags & (VM_LOCKED | VM_SPECIAL | VM_SEQ_READ | VM_RAND_READ):
        return True
    return vma.file is None and not swappiness


def _walk_pte_range(
    host: HostMm, walk: MmWalk, vec: GenLruvec, vma: VmArea, pmd: int, start: int, end: int
) -> None:
    mm, gens = vma.mm, host.gens
    pte = pte_offset_map(mm, pmd, start)
    if not pte:
        return
    ptl = pte_lockptr(mm, pte)
    if not ptl.trylock():
        return
    gen = vec.max_seq % MAX_NR_GENS
    last, dirty = -1, False
    for address in range(start, end, 4096):
        value = ptep_get(mm, pte)
        walk.leaf_total += 1
        folio = gens.folio_of_entry(mm, value, vec.nid, vec.memcg) if value else -1
        if folio >= 0 and ptep_clear_young_notify(mm, address, pte):
            if folio != last:
                if last >= 0:
                    gens.update_folio(walk, last, gen, dirty)
                last, dirty = folio, False
            dirty = dirty or pte_dirty(value)
            walk.leaf_young += 1
        pte += 8
    if last >= 0:
        gens.update_folio(walk, last, gen, dirty)
    ptl.unlock()
    host.sched.advance(COST_WALK * ((end - start) >> 12) // 8)


def _walk_mm(host: HostMm, mm: MmStruct, walk: MmWalk, vec: GenLruvec) -> None:
    if walk.seq != vec.max_seq or not mm.mmap_lock.read_trylock():
        return
    for vma in list(mm.vmas):
        if _should_skip_vma(vma, walk.swappiness):
            continue
        for pmd, address, following in pmd_entries(mm, vma.start, vma.end):
            _walk_pte_range(host, walk, vec, vma, pmd, address, following)
            if walk.batched >= MAX_LRU_BATCH:
                _flush_batch(walk, vec)
            if host.sched.preempt:
                host.sched.point("cond_resched")
    mm.mmap_lock.read_unlock()
    if walk.batched:
        _flush_batch(walk, vec)


def _flush_batch(walk: MmWalk, vec: GenLruvec) -> None:
    with vec.lock:
        walk.reset_batch_size(vec)


def _next_mm(vec: GenLruvec, walk: MmWalk) -> tuple[MmStruct | None, bool]:
    """iterate_mm_list: the next address space, its user count raised; and whether the list is through."""
    host = vec.host
    if walk.seq <= vec.mm_seq:
        return None, False
    if vec.mm_pending is None:
        vec.mm_pending = [p.mm for p in reversed(host.processes) if p.memcg is vec.memcg]
    while vec.mm_pending:
        mm = vec.mm_pending.pop()
        if mm.mm_users > 0:
            mm.mm_users += 1
            return mm, False
    vec.mm_pending = None
    vec.mm_seq += 1
    return None, True


def _mmput_async(host: HostMm, mm: MmStruct) -> None:
    # Reclaim cannot tear an address space down: that takes locks which it may be called under.
    if mm.mm_users > 1:
        mm.mm_users -= 1
    else:
        host.sched.spawn("mmput_async", lambda: mmput(mm))


def try_to_inc_max_seq(vec: GenLruvec, seq: int, swappiness: int) -> bool:
    """Age: walk the page tables for generation `seq`, then open the next; false if somebody else did."""
    host = vec.host
    gens, task = host.gens, host.sched.current
    if seq <= vec.mm_seq:
        return False
    walk = gens.walks.get(task)
    borrowed = walk is not None
    if walk is None:
        walk = gens.walks[task] = MmWalk()
    walk.vec, walk.seq, walk.swappiness = vec, seq, swappiness
    walk.leaf_total = walk.leaf_young = 0
    while True:
        mm, last = _next_mm(vec, walk)
        if mm is None:
            break
        _walk_mm(host, mm, walk, vec)
        _mmput_async(host, mm)
    opened = last and _inc_max_seq(vec, seq, swappiness)
    if opened and (t := host.trace.lru_gen_new_generation) is not None:
        name = vec.memcg.name if vec.memcg is not None else ""
        t(vec.nid, name, vec.max_seq, walk.leaf_total, walk.leaf_young)
    if not borrowed:
        del gens.walks[task]
    return opened


# -- sequence numbers ---------------------------------------------------------------------------


def _inc_max_seq(vec: GenLruvec, seq: int, swappiness: int) -> bool:
    host = vec.host
    while seq >= vec.max_seq:
        with vec.lock:
            if seq != vec.max_seq:
                return False
            full = [kind for kind in range(ANON_AND_FILE) if vec.nr_gens(kind) == MAX_NR_GENS]
            if all(_inc_min_seq(vec, kind, swappiness) for kind in full):
                vec.timestamps[(vec.max_seq + 1) % MAX_NR_GENS] = host.sched.now
                vec.max_seq += 1
                return True
        if host.sched.preempt:
            host.sched.point("cond_resched")
    return False


def _inc_min_seq(vec: GenLruvec, kind: int, swappiness: int) -> bool:
    """The oldest generation joins the next one; false if there is more to move than one go allows."""
    if kind in evictable_types(swappiness):
        oldest = vec.folios[vec.min_seq[kind] % MAX_NR_GENS][kind]
        for _ in range(MAX_LRU_BATCH):
            if not oldest:
                break
            pfn = next(iter(oldest))
            vec.move(pfn, vec.inc_gen(pfn, kind, reclaiming=False), tail=True)
        if oldest:
            return False
    vec.min_seq[kind] += 1
    return True


def try_to_inc_min_seq(vec: GenLruvec, swappiness: int) -> bool:
    """Give up the oldest generations that are empty; their lists are locked."""
    found = list(vec.min_seq)
    for kind in evictable_types(swappiness):
        while found[kind] + MIN_NR_GENS <= vec.max_seq and not vec.folios[found[kind] % MAX_NR_GENS][kind]:
            found[kind] += 1
    if found == vec.min_seq:
        return False
    if swappiness:
        # Neither type may run ahead of the other, or its folios would look younger than they are.
        most = vec.max_seq - MIN_NR_GENS
        if found[0] > most > found[1]:
            found[0] = most
        elif found[1] > most > found[0]:
            found[1] = most
    success = False
    for kind in evictable_types(swappiness):
        if found[kind] > vec.min_seq[kind]:
            vec.min_seq[kind] = found[kind]
            success = True
    return success
