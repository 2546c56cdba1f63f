"""Dirty pages of files, and how they are written back.

Source of truth: mm/page-writeback.c (filemap_dirty_folio, folio_clear_dirty_for_io, writeback_iter,
folio_account_cleaned), mm/rmap.c (folio_mkclean, page_mkclean_one, page_vma_mkclean_one), mm/filemap.c
(filemap_fdatawrite_range, filemap_fdatawait_range, file_write_and_wait_range), fs/fs-writeback.c
(wakeup_flusher_threads, wb_writeback); Linux 6.18.

Only a page that the file knows to be dirty may be mapped writable: the first write of each page faults.
Before its bytes go out the page is made clean and read-only in every shared mapping, each in a bracket of
its own (PROTECTION_PAGE) in which the entry is cleared and flushed, so that the next write faults again and
makes it dirty again. All this happens under the folio lock, which the faults take, too. The I/O itself runs
without the lock: who writes meanwhile makes the page dirty, and it goes out once more.

The flusher is a work item that reclaim queues when it meets nothing but dirty pages of files.

Not modelled: huge entries of files with a device to write to, periodic writeback and limits on dirty pages
(only reclaim, fsync and the end of a file write), cgroup writeback, errors, per-device bandwidth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import pte_dirty, pte_mkclean, pte_write, pte_wrprotect
from host_mm.filemap import folio_unlock, folio_wait_writeback
from host_mm.filemap_cache import END_OF_FILE, filemap_lock_folio
from host_mm.mm_types import VM_SHARED
from host_mm.page import PG_dirty, PG_writeback, folio_mapcount, folio_nr_pages, put_page, set_page_dirty
from host_mm.page_vma_mapped import PageVmaMappedWalk
from host_mm.pgtable_generic import ptep_clear_flush, ptep_get, set_pte
from host_mm.rmap import rmap_walk

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = [
    "Flusher", "file_write_and_wait_range", "filemap_cancel_dirty", "filemap_dirty_folio",
    "folio_clear_dirty_for_io", "folio_mkclean", "write_cache_pages",
]


# -- the dirty mark -------------------------------------------------------------------------------
def filemap_dirty_folio(mapping: AddressSpace, head: int) -> bool:
    """A folio of the file was written to; true if it was clean."""
    host = mapping.host
    flags = host.pages.flags
    if flags[head] & PG_dirty:
        return False
    flags[head] |= PG_dirty
    mapping.dirty[host.pages.index[head]] = None
    host.vmstat["nr_dirty"] += folio_nr_pages(host.pages, head)
    return True


def filemap_cancel_dirty(mapping: AddressSpace, head: int) -> bool:
    """The folio is clean from now on; true if it was dirty."""
    host = mapping.host
    flags = host.pages.flags
    if not flags[head] & PG_dirty:
        return False
    flags[head] &= ~PG_dirty
    del mapping.dirty[host.pages.index[head]]
    host.vmstat["nr_dirty"] -= folio_nr_pages(host.pages, head)
    return True


# -- cleaning through rmap ------------------------------------------------------------------------
def folio_mkclean(host: HostMm, head: int) -> int:
    """Make a locked folio clean and read-only wherever it is mapped shared; how many entries that was."""
    cleaned = 0

    def one(vma: VmArea, address: int) -> bool:
        nonlocal cleaned
        if vma.flags & VM_SHARED:
            cleaned += _page_vma_mkclean_one(host, head, vma, address)
        return True

    if folio_mapcount(host.pages, head):
        rmap_walk(host, head, one)
    return cleaned


def _page_vma_mkclean_one(host: HostMm, head: int, vma: VmArea, address: int) -> int:
    mm = vma.mm
    walk = PageVmaMappedWalk(host, head, vma, address, sync=True)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_PROTECTION_PAGE, mm, address, walk.end, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    cleaned = 0
    while walk.next():
        entry = ptep_get(mm, walk.pte)
        if not pte_dirty(entry) and not pte_write(entry):
            continue
        if "mkclean-no-flush" not in host.breaks:
            entry = ptep_clear_flush(mm, walk.address, walk.pte)
        set_pte(mm, walk.address, walk.pte, pte_mkclean(pte_wrprotect(entry)))
        cleaned += 1
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return cleaned


def folio_clear_dirty_for_io(mapping: AddressSpace, head: int) -> bool:
    """Take the dirty mark of a locked folio, so that it can be written; false if it was clean.

    What only page tables know about writes is put into the mark first.
    """
    host = mapping.host
    if folio_mkclean(host, head):
        set_page_dirty(host, head)
    return filemap_cancel_dirty(mapping, head)


# -- writing back ---------------------------------------------------------------------------------
def _tagged(mapping: AddressSpace, start: int, end: int) -> list[int]:
    """tag_pages_for_writeback: what is dirty now, so that a writer cannot keep this writeback busy."""
    return sorted(index for index in mapping.dirty if start <= index < end)


def write_cache_pages(mapping: AddressSpace, start: int, end: int, *, wait: bool) -> None:
    """Start writing every dirty page of [start, end). With `wait` (WB_SYNC_ALL) also those that are being
    written already: their I/O may have begun before the last store."""
    host = mapping.host
    flags = host.pages.flags
    for index in _tagged(mapping, start, end):
        head = filemap_lock_folio(mapping, index)
        if head < 0:
            continue
        if flags[head] & PG_writeback and wait:
            folio_wait_writeback(host, head)
        if flags[head] & (PG_dirty | PG_writeback) == PG_dirty and folio_clear_dirty_for_io(mapping, head):
            mapping.a_ops.writepage(mapping, head)
        else:
            folio_unlock(host, head)
        put_page(host, head)
        if host.sched.preempt:
            host.sched.point("cond_resched")


def _fdatawait(mapping: AddressSpace, start: int, end: int) -> None:
    host = mapping.host
    for index in sorted(index for index in mapping.writeback if start <= index < end):
        head = filemap_lock_folio(mapping, index)
        if head >= 0:
            folio_unlock(host, head)
            folio_wait_writeback(host, head)
            put_page(host, head)


def file_write_and_wait_range(mapping: AddressSpace, start: int = 0, end: int = END_OF_FILE) -> None:
    """Write the dirty pages of [start, end) and sleep until the last byte is out: fsync(2) of the data."""
    write_cache_pages(mapping, start, end, wait=True)
    _fdatawait(mapping, start, end)


class Flusher:
    """The worker that writes back what reclaim found dirty. `running` while it is at it."""

    __slots__ = ("host", "running")

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.running = False

    def wakeup(self) -> None:
        """wakeup_flusher_threads: write back every dirty page there is; not twice at a time."""
        if not self.running:
            self.running = True
            self.host.sched.spawn("kworker/flush", self._work)

    def _work(self) -> None:
        for mapping in list(self.host.mappings):
            if mapping.a_ops.can_writeback and mapping.dirty:
                mapping.f_count += 1
                write_cache_pages(mapping, 0, END_OF_FILE, wait=False)
                self.host.fput(mapping)
        self.running = False
