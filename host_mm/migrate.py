"""Page migration: a folio's contents move to another frame and its mappings follow.

Source of truth: mm/migrate.c: migrate_folio_unmap, migrate_folio_move, __migrate_folio,
folio_migrate_flags, migrate_pages_batch, migrate_pages_sync, migrate_pages, do_pages_move; Linux 6.18.

A batch first replaces every mapping by migration entries (asynchronously, one flush for all), then
moves what could be unmapped. A folio with more references than its mappings, the swap cache and the
caller explain is in use by somebody who would not notice the move: it is tried again, then left.
Who faults on a migration entry waits for the source folio's lock. Linux 5.10 unmaps and moves one page after
the other, the flush of each inside its bracket.

A large folio moves as a whole, by huge migration entries where it is mapped as a whole. One that is mapped
in part, or for which there is no memory in one piece, is split and its pages are moved after the others.

    break migrate-ignore-refs     move folios although somebody holds a reference

Not modelled: movable_ops pages.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EACCES, EAGAIN, EBUSY, EFAULT, ENODEV, ENOENT, ENOMEM
from functools import partial
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR, pmd_pfn, pmd_trans_huge, pte_pfn, pte_present
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock, folio_wait_writeback
from host_mm.filemap_cache import page_cache_replace
from host_mm.huge_memory_map import pmd_folio
from host_mm.huge_mm import GFP_TRANSHUGE
from host_mm.hugetlb import folio_isolate_hugetlb, folio_putback_hugetlb
from host_mm.hugetlb_migrate import migrate_hugetlbs
from host_mm.hugetlb_share import hugetlb_vma_lock_read, hugetlb_vma_unlock_read
from host_mm.kernel.costs import COST_COPY_HUGE_PAGE, COST_MIGRATE_PAGE, COST_SYSCALL
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.ksm_types import folio_migrate_ksm
from host_mm.mm_types import VM_HUGETLB, VM_IO, VM_PFNMAP
from host_mm.mmzone import ZONE_MOVABLE
from host_mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
    PG_hugetlb,
    PG_idle,
    PG_ksm,
    PG_mlocked,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
    PG_uptodate,
    PG_workingset,
    PG_writeback,
    PG_young,
    folio_mapcount,
    folio_maybe_mapped_shared,
    folio_nr_pages,
    folio_ref_freeze,
    folio_ref_unfreeze,
    folio_test_large,
    get_page,
    page_folio,
    put_page,
)
from host_mm.page_alloc import (
    GFP_COMP,
    GFP_DIRECT_RECLAIM,
    GFP_HIGHMEM,
    GFP_HIGHUSER_MOVABLE,
    GFP_KSWAPD_RECLAIM,
    GFP_THISNODE,
    alloc_pages,
)
from host_mm.pgtable_generic import pmd_lock, pmd_offset, pte_lockptr, pte_offset_map_lock, ptep_get
from host_mm.pgtable_huge import pmd_trans_huge_lock, pmdp_get
from host_mm.rmap_unmap import TTU_BATCH_FLUSH, remove_migration_ptes, try_to_migrate
from host_mm.swap_state import swap_cache_replace_folio
from host_mm.tlb import try_to_unmap_flush
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import AnonVma, MmStruct, VmArea
    from host_mm.process import Process

__all__ = [
    "MIGRATE_ASYNC",
    "MIGRATE_SYNC",
    "MIGRATE_SYNC_LIGHT",
    "MR_COMPACTION",
    "MR_CONTIG_RANGE",
    "MR_LONGTERM_PIN",
    "MR_MEMORY_FAILURE",
    "MR_MEMORY_HOTPLUG",
    "MR_MEMPOLICY_MBIND",
    "MR_NUMA_MISPLACED",
    "MR_SYSCALL",
    "TRACEPOINTS",
    "MigrationTarget",
    "folio_migrate_flags",
    "migrate_pages",
    "move_pages",
    "putback_movable_pages",
]

MIGRATE_ASYNC = 0
MIGRATE_SYNC_LIGHT = 1
MIGRATE_SYNC = 2
_MODES = ("MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC")

MR_COMPACTION = 0
MR_MEMORY_FAILURE = 1
MR_MEMORY_HOTPLUG = 2
MR_SYSCALL = 3
MR_MEMPOLICY_MBIND = 4
MR_NUMA_MISPLACED = 5
MR_CONTIG_RANGE = 6
MR_LONGTERM_PIN = 7
_REASONS = (
    "compaction", "memory_failure", "memory_hotplug", "syscall_or_cpuset", "mempolicy_mbind",
    "numa_misplaced", "contig_range", "longterm_pin", "demotion", "damon",
)

_NR_MAX_BATCHED = 512
_NR_RETRY = 10
_NR_ASYNC_RETRY = 3
_NR_SYNC_RETRY = _NR_RETRY - _NR_ASYNC_RETRY
_NR_UNFORCED = 3
"""Linux 5.10: passes that wait for nobody."""

_COPIED_FLAGS = (
    PG_referenced | PG_uptodate | PG_active | PG_unevictable | PG_workingset | PG_swapbacked
    | PG_young | PG_idle | PG_anon | PG_ksm
)


MM_MIGRATE_PAGES = Tracepoint(
    "migrate", "mm_migrate_pages",
    (
        "succeeded", "failed", "thp_succeeded", "thp_failed", "thp_split", "large_folio_split", "mode",
        "reason",
    ),
    lambda ok, bad, thp_ok, thp_bad, thp_split, split, mode, reason: (
        f"nr_succeeded={ok} nr_failed={bad} nr_thp_succeeded={thp_ok} nr_thp_failed={thp_bad} "
        f"nr_thp_split={thp_split} nr_split={split} mode={_MODES[mode]} reason={_REASONS[reason]}"
    ),
)
MM_MIGRATE_PAGES_START = Tracepoint(
    "migrate", "mm_migrate_pages_start", ("mode", "reason"),
    lambda mode, reason: f"mode={_MODES[mode]} reason={_REASONS[reason]}", scope=True,
)
MIGRATE_FOLIO = Tracepoint(
    "refault", "migrate_folio", ("src", "dst", "result"),
    lambda src, dst, result: f"pfn {src:#x} to {dst:#x} {result}",
    doc="One attempt to move one folio, after it was unmapped: moved, again (extra references), undone.",
)
TRACEPOINTS = (MM_MIGRATE_PAGES, MM_MIGRATE_PAGES_START, MIGRATE_FOLIO)

class MigrationTarget:
    """struct migration_target_control: a node (-1: the page's own), request flags, the nodes allowed."""

    __slots__ = ("gfp", "nid", "nodes")

    def __init__(self, nid: int, gfp: int, nodes: frozenset[int] | None = None) -> None:
        self.nid = nid
        self.gfp = gfp
        self.nodes = nodes


NewFolio = Callable[[int], int]
"""From the source pfn to a new frame with one reference, or -1."""
PutFolio = Callable[[int], None]
"""Takes a new frame back that was not used."""


class _Unmapped:
    """A source that was replaced by migration entries, with its destination; both locked."""

    __slots__ = ("anon_vma", "dst", "src", "was_mapped", "was_mlocked")

    def __init__(self, src: int, dst: int, anon_vma: AnonVma | None, was_mlocked: bool) -> None:
        self.src = src
        self.dst = dst
        self.anon_vma = anon_vma
        self.was_mapped = False
        self.was_mlocked = was_mlocked


class _Batch:
    """One call of migrate_pages: its counts and the folios that failed for good."""

    __slots__ = (
        "get_new_folio", "host", "nr_failed_pages", "nr_succeeded", "nr_thp_failed", "nr_thp_split",
        "nr_thp_succeeded", "put_new_folio", "reason", "ret_folios", "split_folios",
    )

    def __init__(self, host: HostMm, get_new_folio: NewFolio, put_new_folio: PutFolio, reason: int) -> None:
        self.host = host
        self.get_new_folio = get_new_folio
        self.put_new_folio = put_new_folio
        self.reason = reason
        self.ret_folios: list[int] = []
        self.split_folios: list[int] = []
        self.nr_thp_succeeded = self.nr_thp_failed = self.nr_thp_split = 0
        self.nr_succeeded = 0
        self.nr_failed_pages = 0

    # -- large folios -------------------------------------------------------------------------

    def try_split(self, src: int) -> bool:
        """try_split_folio: the pages of an isolated folio are migrated one by one, after the others."""
        host = self.host
        folio_lock(host, src)
        err = host.split_folio(src, self.split_folios)
        folio_unlock(host, src)
        if not err:
            self.split_folios.append(src)
            self.nr_thp_split += 1
        return not err

    def _failed(self, src: int) -> None:
        """The folio stays: count its pages."""
        pages = self.host.pages
        self.nr_failed_pages += folio_nr_pages(pages, src)
        self.nr_thp_failed += folio_test_large(pages, src)

    def finish_split(self, mode: int) -> None:
        """One pass, without waiting, for what was split: its failures are counted as one already."""
        folios, self.split_folios = self.split_folios, []
        counted = self.nr_failed_pages
        _, left = self.run(folios, min(mode, MIGRATE_ASYNC), 1)
        self.nr_failed_pages = counted
        self.ret_folios += left

    # -- one folio ----------------------------------------------------------------------------

    def _lock_source(self, src: int, mode: int, force: bool) -> bool:
        host = self.host
        if folio_trylock(host, src):
            return True
        if not force or mode == MIGRATE_ASYNC or host.sched.current in host.allocator.memalloc:
            return False
        reading = not host.pages.flags[src] & PG_uptodate
        if reading and mode == MIGRATE_SYNC_LIGHT and host.profile.migrate_batches:
            return False
        folio_lock(host, src)
        return True

    def unmap(self, src: int, mode: int, *, force: bool = True) -> _Unmapped | int:
        """migrate_folio_unmap: lock both, install migration entries; or a negative errno.

        Without `force` it waits neither for the source's lock nor for its writeback.
        """
        host = self.host
        pages = host.pages
        dst = self.get_new_folio(src)
        if dst < 0:
            return -ENOMEM
        if not self._lock_source(src, mode, force):
            self.put_new_folio(dst)
            return -EAGAIN
        if pages.flags[src] & PG_writeback:
            if mode != MIGRATE_SYNC or not force:
                folio_unlock(host, src)
                self.put_new_folio(dst)
                return -EAGAIN if mode == MIGRATE_SYNC else -EBUSY
            folio_wait_writeback(host, src)
        if not folio_trylock(host, dst):
            raise BrokenTruth(
                "migrate", f"the new frame {dst:#x} is locked by somebody else", host.stream.here()
            )
        # A KSM page has no anon_vma of its own; its stable node leads to all of them.
        pinned = folio_mapcount(pages, src) and pages.flags[src] & (PG_anon | PG_ksm) == PG_anon
        anon_vma = pages.mapping.get(src) if pinned else None
        item = _Unmapped(src, dst, anon_vma, bool(pages.flags[src] & PG_mlocked))
        if folio_mapcount(pages, src):
            batched = mode == MIGRATE_ASYNC and host.profile.migrate_batches
            try_to_migrate(host, src, TTU_BATCH_FLUSH if batched else 0)
            item.was_mapped = True
        if not folio_mapcount(pages, src):
            return item
        self.undo(item)
        return -EAGAIN

    def undo(self, item: _Unmapped) -> None:
        """migrate_folio_undo_src and _dst: mappings back to the source, the new frame back."""
        host = self.host
        if item.was_mapped:
            remove_migration_ptes(host, item.src, item.src, item.anon_vma)
        folio_unlock(host, item.src)
        folio_unlock(host, item.dst)
        self.put_new_folio(item.dst)

    def _move_to_new_folio(self, src: int, dst: int) -> int:
        """__migrate_folio: copy, then give the new frame the old one's identity."""
        host = self.host
        pages = host.pages
        flags = pages.flags
        cached = not flags[src] & (PG_anon | PG_swapcache) and src in pages.mapping
        held = folio_nr_pages(pages, src) if cached else bool(flags[src] & PG_swapcache)
        expected = 1 + held + folio_mapcount(pages, src)
        ignore = "migrate-ignore-refs" in host.breaks
        if pages.refcount[src] != expected and not ignore:
            return -EAGAIN
        nr_pages = folio_nr_pages(pages, src)
        for at in range(nr_pages):
            if host.checks is not None:
                host.checks.folio_moves(src + at)
            host.ram.copy_page(dst + at, src + at)
        host.sched.advance(COST_MIGRATE_PAGE if nr_pages == 1 else COST_COPY_HUGE_PAGE)
        if host.sched.preempt:
            host.sched.point("migrate-copy")
        if flags[src] & PG_swapcache and not self._replace_in_swap_cache(src, dst, expected, ignore):
            return -EAGAIN
        if cached and not page_cache_replace(pages.mapping[src], src, dst, expected):
            return -EAGAIN
        pages.index[dst] = pages.index[src]
        mapping = pages.mapping.get(src)
        if mapping is not None:
            pages.mapping[dst] = mapping
        folio_migrate_ksm(host, dst, src)
        if nr_pages > 1:
            host.thp.unqueue_deferred_split(src)
        folio_migrate_flags(host, dst, src)
        return 0

    def _replace_in_swap_cache(self, src: int, dst: int, expected: int, ignore: bool) -> bool:
        host = self.host
        pages = host.pages
        count = pages.refcount[src] if ignore else expected
        if not folio_ref_freeze(pages, src, count):
            return False
        get_page(host, dst)
        swap_cache_replace_folio(host, src, dst)
        folio_ref_unfreeze(pages, src, count - 1)
        return True

    def move(self, item: _Unmapped) -> int:
        """migrate_folio_move: 0, or -EAGAIN and nothing changed."""
        host = self.host
        src, dst = item.src, item.dst
        rc = self._move_to_new_folio(src, dst)
        if (t := host.trace.migrate_folio) is not None:
            t(src, dst, "again" if rc else "moved")
        if rc:
            return rc
        host.lru.folio_add_lru(dst)
        if item.was_mlocked:
            # On its list before the entries come back: each of those then counts as a lock.
            host.lru.lru_add_drain()
        if item.was_mapped:
            remove_migration_ptes(host, src, dst, item.anon_vma)
        folio_unlock(host, dst)
        put_page(host, dst)
        folio_unlock(host, src)
        self.nr_succeeded += folio_nr_pages(host.pages, src)
        self.nr_thp_succeeded += folio_test_large(host.pages, src)
        self._done(src)
        return 0

    def _done(self, src: int) -> None:
        """migrate_folio_done: the old frame goes, or is left to who wants it for nobody (memory_failure)."""
        if self.reason != MR_MEMORY_FAILURE:
            put_page(self.host, src)

    # -- batches ------------------------------------------------------------------------------

    def run(self, folios: list[int], mode: int, nr_pass: int) -> tuple[int, list[int]]:
        """migrate_pages_batch: (failed or a negative errno, those worth another try)."""
        host = self.host
        sched = host.sched
        left = folios
        unmapped: list[_Unmapped] = []
        saved = failed = 0
        for _ in range(nr_pass):
            again: list[int] = []
            for index, src in enumerate(left):
                if sched.preempt:
                    sched.point("cond_resched")
                if host.pages.refcount[src] == 1:
                    # Freed from under us: only the isolation's reference is left.
                    host.pages.flags[src] &= ~(PG_active | PG_unevictable)
                    self._done(src)
                    self.nr_succeeded += 1
                    continue
                if src in host.thp.partially_mapped and self.try_split(src):
                    continue
                item = self.unmap(src, mode)
                if isinstance(item, _Unmapped):
                    unmapped.append(item)
                elif item == -EAGAIN:
                    again.append(src)
                elif item == -ENOMEM and folio_test_large(host.pages, src) and self.try_split(src):
                    failed += 1
                elif item == -ENOMEM:
                    saved = item
                    # Those not looked at stay too, but nobody counts them.
                    for stays in [src, *again]:
                        self._failed(stays)
                    again += left[index:]
                    break
                else:
                    failed += 1
                    self._failed(src)
                    self.ret_folios.append(src)
            left = again
            if saved or not left:
                break
        if not saved:
            for stays in left:
                self._failed(stays)
        if "skip-batched-flush" not in host.breaks:
            try_to_unmap_flush(host)
        for _ in range(nr_pass):
            unmapped = [item for item in unmapped if self.move(item)]
            if not unmapped:
                break
        for item in unmapped:
            if (t := host.trace.migrate_folio) is not None:
                t(item.src, item.dst, "undone")
            self.undo(item)
            self._failed(item.src)
        left += [item.src for item in unmapped]
        return saved or failed + len(left), left

    def hugetlbs(self, folios: list[int], nid: int, mode: int) -> int:
        """migrate_hugetlbs: how many stayed, or -ENOMEM."""
        rc, moved, left = migrate_hugetlbs(self.host, folios, nid, sync=mode == MIGRATE_SYNC)
        self.nr_succeeded += moved * HPAGE_PMD_NR
        self.nr_failed_pages += len(left) * HPAGE_PMD_NR
        self.ret_folios += left
        return rc

    def sync(self, folios: list[int], mode: int) -> int:
        """migrate_pages_sync: all at once without waiting, then the rest one by one."""
        earlier, self.ret_folios = self.ret_folios, []
        counted = self.nr_failed_pages
        rc, left = self.run(folios, MIGRATE_ASYNC, _NR_ASYNC_RETRY)
        left += self.ret_folios
        self.ret_folios = earlier
        if rc < 0:
            self.ret_folios += left
            return rc
        # They are tried again: what failed so far has not failed yet.
        self.nr_failed_pages = counted
        failed = 0
        for index, src in enumerate(left):
            rc, again = self.run([src], mode, _NR_SYNC_RETRY)
            self.ret_folios += again
            if rc < 0:
                self.ret_folios += left[index + 1 :]
                return rc
            failed += rc
        return failed


    def one_by_one(self, folios: list[int], mode: int) -> int:
        """Linux 5.10's migrate_pages: how many stayed, or -ENOMEM."""
        host = self.host
        left = folios
        for nr in range(_NR_RETRY):
            again: list[int] = []
            for index, src in enumerate(left):
                if host.sched.preempt:
                    host.sched.point("cond_resched")
                rc = self._unmap_and_move(src, mode, force=nr >= _NR_UNFORCED)
                if rc == -ENOMEM and folio_test_large(host.pages, src) and self.try_split(src):
                    continue
                if rc == -ENOMEM:
                    self.nr_failed_pages += 1
                    self.ret_folios += again + left[index:]
                    return rc
                if rc == -EAGAIN:
                    again.append(src)
                elif rc:
                    self.nr_failed_pages += 1
                    self.ret_folios.append(src)
            left = again
            if not left:
                break
        self.nr_failed_pages += len(left)
        self.ret_folios += left
        return self.nr_failed_pages

    def _unmap_and_move(self, src: int, mode: int, *, force: bool) -> int:
        host = self.host
        if host.pages.refcount[src] == 1:
            host.pages.flags[src] &= ~(PG_active | PG_unevictable)
            self._done(src)
            self.nr_succeeded += 1
            return 0
        item = self.unmap(src, mode, force=force)
        if not isinstance(item, _Unmapped):
            return item
        rc = self.move(item)
        if rc:
            self.undo(item)
        return rc


def folio_migrate_flags(host: HostMm, dst: int, src: int) -> None:
    """The new frame has the old one's state and its charge."""
    flags = host.pages.flags
    flags[dst] |= flags[src] & (_COPIED_FLAGS | PG_dirty)
    flags[src] &= ~(PG_active | PG_unevictable | PG_dirty)
    host.memcg.migrate(src, dst)


def alloc_migration_target(host: HostMm, src: int, target: MigrationTarget) -> int:
    """A frame for the page `src`, or -1; no process dies for it."""
    allocator = host.allocator
    nid = target.nid if target.nid >= 0 else allocator.nid_of(src)
    gfp = target.gfp | GFP_COMP
    order = 0
    if folio_test_large(host.pages, src):
        gfp = (gfp & ~(GFP_DIRECT_RECLAIM | GFP_KSWAPD_RECLAIM)) | GFP_TRANSHUGE
        order = host.pages.order[src]
    if allocator.zone_of(src).idx == ZONE_MOVABLE:
        gfp |= GFP_HIGHMEM
    if target.nodes is None:
        return alloc_pages(host, gfp, order, nid)
    for node in (nid, *(node.nid for node in allocator.nodes if node.nid != nid)):
        if node in target.nodes and (pfn := alloc_pages(host, gfp | GFP_THISNODE, order, node)) >= 0:
            return pfn
    return -1


def _new_folio(host: HostMm, target: MigrationTarget, src: int) -> int:
    return alloc_migration_target(host, src, target)


def putback_movable_pages(host: HostMm, pfns: list[int]) -> None:
    """Give folios that stay where they are back to their lists."""
    for pfn in pfns:
        if host.pages.flags[pfn] & PG_hugetlb:
            folio_putback_hugetlb(host, pfn)
        else:
            host.lru.folio_putback_lru(pfn)
    pfns.clear()


def migrate_pages(
    host: HostMm, pfns: list[int], target: int | MigrationTarget | NewFolio, reason: int, mode: int,
    put_new_folio: PutFolio | None = None,
) -> int:
    """Move isolated folios to a `target`. How many stayed, or -ENOMEM; those are left in `pfns`.

    The caller isolated them from the LRU and gives what stays to putback_movable_pages. A target is exactly
    one node, or a MigrationTarget, or who gives new frames; unused ones then go to `put_new_folio`.
    """
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.mm_migrate_pages_start) is not None:
        ctx.cause = t(mode, reason)
    if isinstance(target, int):
        target = MigrationTarget(target, GFP_HIGHUSER_MOVABLE | GFP_THISNODE)
    if isinstance(target, MigrationTarget):
        get_new_folio: NewFolio = partial(_new_folio, host, target)
    else:
        get_new_folio = target
    batch = _Batch(host, get_new_folio, put_new_folio or partial(put_page, host), reason)
    rc_gather = 0
    todo = [pfn for pfn in pfns if not host.pages.flags[pfn] & PG_hugetlb]
    if len(todo) < len(pfns):
        huge = [pfn for pfn in pfns if host.pages.flags[pfn] & PG_hugetlb]
        nid = target.nid if isinstance(target, MigrationTarget) else -1
        rc_gather = batch.hugetlbs(huge, nid if nid >= 0 else host.allocator.nid_of(huge[0]), mode)
        if rc_gather < 0:
            batch.ret_folios += todo
            todo = []
    pfns[:] = []
    if not host.profile.migrate_batches:
        rc_gather += batch.one_by_one(todo, mode)
        todo = []
    while todo:
        folios, todo = todo[:_NR_MAX_BATCHED], todo[_NR_MAX_BATCHED:]
        if mode == MIGRATE_ASYNC:
            rc, left = batch.run(folios, mode, _NR_RETRY)
            batch.ret_folios += left
        else:
            rc = batch.sync(folios, mode)
        if rc < 0:
            rc_gather = rc
            break
        rc_gather += rc
    if batch.split_folios:
        batch.finish_split(mode)
    pfns += batch.ret_folios + todo
    host.vmstat["pgmigrate_success"] += batch.nr_succeeded
    host.vmstat["pgmigrate_fail"] += batch.nr_failed_pages
    if (t := host.trace.mm_migrate_pages) is not None:
        thps = batch.nr_thp_succeeded, batch.nr_thp_failed, batch.nr_thp_split
        t(batch.nr_succeeded, batch.nr_failed_pages, *thps, batch.nr_thp_split, mode, reason)
    ctx.cause = saved
    return rc_gather


# -- move_pages(2) ------------------------------------------------------------------------------


def _add_folio_for_migration(mm: MmStruct, address: int, nid: int, pagelist: list[int], every: bool) -> int:
    """Isolate the page at `address`. 1: queued; 0: on that node already; or a negative errno."""
    host = mm.host
    mm.mmap_lock.read_lock()
    vma = mm.vma_lookup(address)
    if vma is None or vma.flags & (VM_IO | VM_PFNMAP):
        mm.mmap_lock.read_unlock()
        return -EFAULT
    ret = -ENOENT
    if vma.flags & VM_HUGETLB:
        ret = _add_huge_page_for_migration(vma, address, nid, pagelist, every)
        mm.mmap_lock.read_unlock()
        return ret
    pmd = pmd_offset(mm, address)
    if pmd and (lock := pmd_trans_huge_lock(mm, pmd)) is not None:
        folio = pmd_folio(mm, pmdp_get(mm, pmd))
        if pmd_trans_huge(pmdp_get(mm, pmd)):
            ret = _isolate_for_migration(host, folio, nid, pagelist, every) if folio >= 0 else -EFAULT
        lock.unlock()
        mm.mmap_lock.read_unlock()
        return ret
    pte = pte_offset_map_lock(mm, pmd, address) if pmd else 0
    if pte:
        entry = ptep_get(mm, pte)
        if pte_present(entry):
            ret = _isolate_for_migration(host, pte_pfn(entry), nid, pagelist, every)
        pte_lockptr(mm, pte).unlock()
    mm.mmap_lock.read_unlock()
    return ret


def _add_huge_page_for_migration(
    vma: VmArea, address: int, nid: int, pagelist: list[int], every: bool
) -> int:
    mm = vma.mm
    host = mm.host
    hugetlb_vma_lock_read(vma)
    pmd = pmd_offset(mm, address)
    ret = -ENOENT
    if pmd:
        lock = pmd_lock(mm, pmd)
        entry = host.ram.u64[pmd >> 3]
        if pte_present(entry):
            ret = _isolate_for_migration(host, pmd_pfn(entry), nid, pagelist, every)
        lock.unlock()
    hugetlb_vma_unlock_read(vma)
    return ret


def _isolate_for_migration(host: HostMm, pfn: int, nid: int, pagelist: list[int], every: bool) -> int:
    if pfn == host.zero_pfn:
        return -EFAULT
    pfn = page_folio(host.pages, pfn)
    if host.allocator.nid_of(pfn) == nid:
        return 0
    if folio_maybe_mapped_shared(host.pages, pfn) and not every:
        return -EACCES
    if host.pages.flags[pfn] & PG_hugetlb:
        if not folio_isolate_hugetlb(host, pfn):
            return -EBUSY
        pagelist.append(pfn)
        return 1
    if not host.lru.folio_isolate_lru(pfn):
        return -EBUSY
    pagelist.append(pfn)
    return 1


def move_pages(process: Process, hvas: list[int], nodes: list[int], *, move_all: bool = False) -> list[int]:
    """move_pages(2): each page to its node; per page the node it is on, or a negative errno.

    With `move_all` (MPOL_MF_MOVE_ALL) pages that other processes map too are moved. A page that stays
    because it is in use has -EBUSY, where Linux leaves its status alone, stops after the migrate_pages
    call it was in and returns how many were not moved.
    KernelError: ENODEV for a node that does not exist.
    """
    mm = process.mm
    host = mm.host
    host.sched.advance(COST_SYSCALL)
    for nid in nodes:
        if not 0 <= nid < len(host.allocator.nodes):
            raise KernelError(ENODEV, f"there is no node {nid}")
    status = [0] * len(hvas)
    host.lru.lru_cache_disable()
    index = 0
    while index < len(hvas):
        # One call of migrate_pages for each run of addresses that go to one node and could be queued.
        nid = nodes[index]
        pagelist: list[int] = []
        queued: list[tuple[int, int]] = []
        while index < len(hvas) and nodes[index] == nid:
            ret = _add_folio_for_migration(mm, hvas[index], nid, pagelist, move_all)
            status[index] = nid if ret >= 0 else ret
            index += 1
            if ret <= 0:
                break
            queued.append((index - 1, pagelist[-1]))
        if pagelist:
            migrate_pages(host, pagelist, nid, MR_SYSCALL, MIGRATE_SYNC)
        stayed = set(pagelist)
        for at, pfn in queued:
            if pfn in stayed:
                status[at] = -EBUSY
        putback_movable_pages(host, pagelist)
    host.lru.lru_cache_enable()
    return status
