"""One call of migrate_pages: folios are unmapped, moved, tried again or split.

Source of truth: mm/migrate.c: migrate_folio_unmap, migrate_folio_move, __migrate_folio,
folio_migrate_flags, migrate_pages_batch, migrate_pages_sync, try_split_folio; Linux 6.18, and 5.10.7.

A batch first replaces every mapping by migration entries (asynchronously, one flush for all), then
moves what could be unmapped. A folio with more references than its mappings, the swap cache and the
caller explain is in use by somebody who would not notice the move: it is tried again, then left.
Who faults on a migration entry waits for the source folio's lock. Linux 5.10 unmaps and moves one page after
the other, the flush of each inside its bracket.

A large folio moves as a whole, by huge migration entries where it is mapped as a whole. One that is mapped
in part, or for which there is no memory in one piece, is split and its pages are moved after the others.

    break migrate-ignore-refs     move folios although somebody holds a reference
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock, folio_wait_writeback
from host_mm.filemap_cache import page_cache_replace
from host_mm.hugetlb_migrate import migrate_hugetlbs
from host_mm.kernel.costs import COST_COPY_HUGE_PAGE, COST_MIGRATE_PAGE
from host_mm.kernel.errors import BrokenTruth
from host_mm.ksm_types import folio_migrate_ksm
from host_mm.migrate_types import (
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    MIGRATE_SYNC_LIGHT,
    MR_MEMORY_FAILURE,
    NewFolio,
    PutFolio,
)
from host_mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
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
    folio_nr_pages,
    folio_ref_freeze,
    folio_ref_unfreeze,
    folio_test_large,
    get_page,
    put_page,
)
from host_mm.rmap_unmap import TTU_BATCH_FLUSH, remove_migration_ptes, try_to_migrate
from host_mm.swap_state import swap_cache_replace_folio
from host_mm.tlb import try_to_unmap_flush

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import AnonVma

__all__ = ["NR_RETRY", "MigrationBatch", "folio_migrate_flags"]

NR_RETRY = 10
_NR_ASYNC_RETRY = 3
_NR_SYNC_RETRY = NR_RETRY - _NR_ASYNC_RETRY
_NR_UNFORCED = 3
"""Linux 5.10: passes that wait for nobody."""

_COPIED_FLAGS = (
    PG_referenced | PG_uptodate | PG_active | PG_unevictable | PG_workingset | PG_swapbacked
    | PG_young | PG_idle | PG_anon | PG_ksm
)


class _Unmapped:
    """A source that was replaced by migration entries, with its destination; both locked."""

    __slots__ = ("anon_vma", "dst", "src", "was_mapped", "was_mlocked")

    def __init__(self, src: int, dst: int, anon_vma: AnonVma | None, was_mlocked: bool) -> None:
        self.src = src
        self.dst = dst
        self.anon_vma = anon_vma
        self.was_mapped = False
        self.was_mlocked = was_mlocked


class MigrationBatch:
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
        if cached and pages.mapping[src].a_ops.unevictable:
            return -EOPNOTSUPP
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
        for nr in range(NR_RETRY):
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
