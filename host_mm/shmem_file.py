"""Shmem files: their size, their holes, their end.

Source of truth: mm/shmem.c (shmem_undo_range, shmem_setattr, shmem_fallocate, shmem_evict_inode,
shmem_file_setup), Linux 6.18.

A hole takes pages and swap slots but no private copy; a shorter file takes those too. A page on its way
between swap and cache is met in the second pass, again and again until it is gone. While a hole is punched
faults on its pages wait.

Not modelled: what shmem.py does not; file times, seals, RLIMIT_FSIZE.
"""

from __future__ import annotations

from errno import EFBIG, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.address_space import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    MAX_LFS_FILESIZE,
    AddressSpace,
    AddressSpaceOperations,
    VmOperations,
    check_fallocate,
)
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.filemap_cache import (
    END_OF_FILE,
    NOT_CACHED,
    filemap_get_entry,
    filemap_lock_folio,
    find_get_entries,
)
from host_mm.filemap_fault import filemap_map_pages
from host_mm.huge_memory_file import shmem_allowable_huge_order
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import WaitQueue
from host_mm.memory_file import unmap_mapping_range
from host_mm.page import PG_uptodate, folio_nr_pages, put_page, set_page_dirty
from host_mm.shmem import (
    SGP_FALLOC,
    SGP_READ,
    SGP_WRITE,
    ShmemFalloc,
    shmem_fault,
    shmem_get_folio,
    shmem_writeout,
)
from host_mm.swap_state import free_swap_and_cache
from host_mm.truncate import find_lock_entries, truncate_inode_folio, truncate_inode_partial_folio

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea, VmFault

__all__ = ["shmem_file_setup", "shmem_undo_range"]


# -- taking pages out -----------------------------------------------------------------------------
def _free_swap(mapping: AddressSpace, index: int, value: int) -> bool:
    """shmem_free_swap: give the page's slot up; false if the page is something else by now."""
    if mapping.i_pages.get(index, NOT_CACHED) != value:
        return False
    del mapping.i_pages[index]
    free_swap_and_cache(mapping.host, ~value)
    return True


def shmem_undo_range(mapping: AddressSpace, lstart: int, lend: int, *, unfalloc: bool = False) -> None:
    """Free the pages and slots of bytes [lstart, lend]; lend -1: to the end. Zeros in partial pages.

    `unfalloc`: only what a failed allocation left.
    """
    host = mapping.host
    flags = host.pages.flags
    start = (lstart + 4095) >> 12
    end = END_OF_FILE if lend < 0 else (lend + 1) >> 12
    last = (END_OF_FILE << 12) - 1 if lend < 0 else lend
    for index, value in find_lock_entries(mapping, start, end):
        if value < 0:
            if not unfalloc:
                _free_swap(mapping, index, value)
            continue
        if not unfalloc or not flags[value] & PG_uptodate:
            truncate_inode_folio(mapping, value)
        folio_unlock(host, value)
        put_page(host, value)
        if host.sched.preempt:
            host.sched.point("cond_resched")
    if not unfalloc:
        start, end = _partials(mapping, lstart, last, start, end)
    while start < end and (found := find_get_entries(mapping, start, end)):
        done = [_remove(mapping, index, value, unfalloc) for index, value in found]
        if all(done) and (unfalloc or lend >= 0):
            break


def _remove(mapping: AddressSpace, index: int, value: int, unfalloc: bool) -> bool:
    """One page of the second pass; waits for its lock. False: it went between cache and swap, look again."""
    host = mapping.host
    if value < 0:
        return unfalloc or _free_swap(mapping, index, value)
    head = filemap_lock_folio(mapping, index)
    if head < 0:
        return index not in mapping.i_pages
    if not unfalloc or not host.pages.flags[head] & PG_uptodate:
        truncate_inode_folio(mapping, head)
    folio_unlock(host, head)
    put_page(host, head)
    return True


def _partials(mapping: AddressSpace, lstart: int, lend: int, start: int, end: int) -> tuple[int, int]:
    """The folios that the two ends of the range cut, read back from swap if need be; what is left to do."""
    host = mapping.host
    same = lstart >> 12 == lend >> 12
    head = _get_partial_folio(mapping, lstart >> 12)
    if head >= 0:
        base, nr = host.pages.index[head], folio_nr_pages(host.pages, head)
        same = lend < base + nr << 12
        set_page_dirty(host, head)
        if not truncate_inode_partial_folio(mapping, head, lstart, lend):
            start = base + nr
            if same:
                end = base
        folio_unlock(host, head)
        put_page(host, head)
    head = NOT_CACHED if same else _get_partial_folio(mapping, lend >> 12)
    if head >= 0:
        set_page_dirty(host, head)
        if not truncate_inode_partial_folio(mapping, head, lstart, lend):
            end = host.pages.index[head]
        folio_unlock(host, head)
        put_page(host, head)
    return start, end


def _get_partial_folio(mapping: AddressSpace, index: int) -> int:
    host = mapping.host
    head = filemap_get_entry(mapping, index)
    if head == NOT_CACHED:
        return head
    if head >= 0:
        folio_lock(host, head)
        if host.pages.mapping.get(head) is mapping:
            return head
        folio_unlock(host, head)
        put_page(host, head)
    return shmem_get_folio(mapping, index, SGP_READ)


# -- system calls ---------------------------------------------------------------------------------
def _punch_hole(mapping: AddressSpace, offset: int, length: int) -> None:
    unmap_start = (offset + 4095) & ~4095
    unmap_end = ((offset + length) & ~4095) - 1
    waitq = WaitQueue(mapping.host.sched, "shmem_falloc_waitq")
    mapping.private_data = ShmemFalloc(unmap_start >> 12, (unmap_end + 1) >> 12, waitq)
    if unmap_end > unmap_start:
        unmap_mapping_range(mapping, unmap_start, 1 + unmap_end - unmap_start, even_cows=False)
    shmem_undo_range(mapping, offset, offset + length - 1)
    mapping.private_data = None
    waitq.wake_all()


def _allocate(mapping: AddressSpace, offset: int, length: int) -> int:
    """Make every page of the range; 0, or a negative errno and nothing is left of the new ones."""
    host = mapping.host
    start, end = offset >> 12, (offset + length + 4095) >> 12
    falloc = mapping.private_data = ShmemFalloc(start, start)
    index, error = start, 0
    while index < end and not error:
        too_many = falloc.nr_unswapped > falloc.nr_falloced
        head = -ENOMEM if too_many else shmem_get_folio(mapping, index, SGP_FALLOC)
        if head < 0:
            error = head
            if index > start:
                shmem_undo_range(mapping, start << 12, (index << 12) - 1, unfalloc=True)
            break
        index = host.pages.index[head] + folio_nr_pages(host.pages, head)
        if not host.pages.flags[head] & PG_uptodate:
            falloc.nr_falloced += index - falloc.next
        falloc.next = index
        set_page_dirty(host, head)
        folio_unlock(host, head)
        put_page(host, head)
        if host.sched.preempt:
            host.sched.point("cond_resched")
    mapping.private_data = None
    return error


class ShmemVmOperations(VmOperations):
    """shmem_vm_ops."""

    map_pages = staticmethod(filemap_map_pages)

    def fault(self, vmf: VmFault) -> int:
        """shmem_fault."""
        return shmem_fault(vmf)

    def allowable_huge_order(self, vma: VmArea, forced: bool) -> bool:
        """shmem_allowable_huge_orders."""
        return shmem_allowable_huge_order(vma.file, vma, vma.pgoff, forced=forced)


class ShmemOperations(AddressSpaceOperations):
    """shmem_aops, shmem_file_operations, and the end of its inodes."""

    is_shmem = True

    def dropped_clean(self, mapping: AddressSpace, pfn: int) -> None:
        """A shmem page can go as clean only if nobody ever wrote to it: it holds a hole's zeros."""
        host = mapping.host
        if not host.ram.page_is_zero(pfn):
            raise BrokenTruth(
                "dirty-dropped", f"pfn {pfn:#x} of {mapping!r} is dropped as clean with bytes in it",
                host.stream.here(),
            )

    def write_begin(self, mapping: AddressSpace, index: int, inside: int, length: int) -> int:
        """shmem_write_begin."""
        return shmem_get_folio(mapping, index, SGP_WRITE)

    def read_begin(self, mapping: AddressSpace, index: int) -> int:
        """shmem_file_read_iter's part."""
        return shmem_get_folio(mapping, index, SGP_READ)

    def writeout(self, mapping: AddressSpace, pfn: int) -> bool:
        """shmem_writeout."""
        return shmem_writeout(mapping, pfn)

    def fallocate(self, mapping: AddressSpace, mode: int, offset: int, length: int) -> None:
        """shmem_fallocate."""
        check_fallocate(mode, offset, length)
        with mapping.i_rwsem:
            if mode & FALLOC_FL_PUNCH_HOLE:
                _punch_hole(mapping, offset, length)
                return
            error = _allocate(mapping, offset, length)
            if not error and not mode & FALLOC_FL_KEEP_SIZE:
                mapping.i_size = max(mapping.i_size, offset + length)
        if error:
            raise KernelError(-error, f"no memory for {length:#x} bytes of {mapping!r}")

    def set_size(self, mapping: AddressSpace, size: int) -> None:
        """shmem_setattr: two passes over private copies when the file gets shorter."""
        if size < 0:
            raise KernelError(EINVAL, f"{size} bytes")
        if size > MAX_LFS_FILESIZE:
            raise KernelError(EFBIG, f"{size:#x} bytes are more than a file can have")
        with mapping.i_rwsem:
            old, mapping.i_size = mapping.i_size, size
            if size > old:
                return
            holebegin = (size + 4095) & ~4095
            if old > holebegin:
                unmap_mapping_range(mapping, holebegin, 0, even_cows=True)
            shmem_undo_range(mapping, size, -1)
            if old > holebegin:
                unmap_mapping_range(mapping, holebegin, 0, even_cows=True)

    def evict_inode(self, mapping: AddressSpace) -> None:
        """shmem_evict_inode: nobody can ask for the pages any more."""
        mapping.i_size = 0
        shmem_undo_range(mapping, 0, -1)


_A_OPS = ShmemOperations()
_VM_OPS = ShmemVmOperations()


def shmem_file_setup(host: HostMm, name: str, size: int, nid: int = 0) -> AddressSpace:
    """A new shmem file of `size` bytes, all hole, with one descriptor."""
    return AddressSpace(host, name, size, _A_OPS, _VM_OPS, nid)
