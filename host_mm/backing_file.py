"""Files on a file system, with their bytes in a real file.

Source of truth: what of fs/ext4/inode.c (ext4_page_mkwrite, ext4_setattr, ext4_punch_hole,
ext4_zero_partial_blocks), fs/buffer.c: block_write_full_folio, try_to_free_buffers, fs/iomap/buffered-io.c,
fs/ext4/readpage.c: ext4_mpage_readpages and fs/sync.c mm can see; Linux 6.18.

The file system here has files of 4 KiB blocks without names. Reads and writes take logical time on
`host.file_device`; a page that is being read is locked, one that is being written is under writeback, and the
device takes its first half when the write begins and its second half when it ends, so that a store that
nobody noticed tears the page in the file. A folio that lies in a hole of the file takes no time to read: it
is cleared and unlocked at once, so that a fault that may not wait gets it.

invalidate_lock is held for writing while pages and blocks go away together, and for reading by who makes
pages: else a page read from a block that is being freed could stay in the cache.

Not modelled: journals, extents and allocation (a write never fails with ENOSPC), direct I/O, metadata,
large folios made by readahead.
"""

from __future__ import annotations

import os
import tempfile
from errno import EFBIG, EINVAL
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
from host_mm.filemap import (
    folio_end_writeback,
    folio_lock,
    folio_start_writeback,
    folio_unlock,
    folio_wait_locked,
    folio_wait_writeback,
)
from host_mm.filemap_cache import filemap_add_folio, filemap_lock_folio
from host_mm.filemap_fault import filemap_fault, filemap_map_pages
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.mm_types import VM_FAULT_LOCKED, VM_FAULT_NOPAGE
from host_mm.page import PG_uptodate, folio_nr_pages, page_folio, put_page, set_page_dirty
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, alloc_pages
from host_mm.page_writeback import (
    file_write_and_wait_range,
    filemap_cancel_dirty,
    filemap_dirty_folio,
)
from host_mm.ram import PAGE_SIZE
from host_mm.sparse import is_hole, punch
from host_mm.truncate import (
    folio_zero_range,
    truncate_inode_pages_range,
    truncate_pagecache,
    truncate_pagecache_range,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmFault

__all__ = ["TRACEPOINTS", "get_block_folio", "open_file"]

MAX_PAGECACHE_ORDER = 9


def _fmt(file: str, index: int, pfn: int) -> str:
    return f"{file} page {index:#x} pfn {pfn:#x}"


_FIELDS = ("file", "index", "pfn")
FILE_READ_START = Tracepoint(
    "refault", "file_read_start", _FIELDS, _fmt, doc="A locked page-cache folio waits for its bytes."
)
FILE_READ_END = Tracepoint(
    "refault", "file_read_end", _FIELDS, _fmt, doc="The bytes are there, the folio is unlocked."
)
FILE_WRITE_START = Tracepoint(
    "refault", "file_write_start", _FIELDS, _fmt, doc="A page-cache folio goes under writeback."
)
FILE_WRITE_END = Tracepoint(
    "refault", "file_write_end", _FIELDS, _fmt, doc="Its bytes are in the file."
)
TRACEPOINTS = (FILE_READ_START, FILE_READ_END, FILE_WRITE_START, FILE_WRITE_END)


class BlockVmOperations(VmOperations):
    """ext4_file_vm_ops."""

    map_pages = staticmethod(filemap_map_pages)

    def __init__(self) -> None:
        self.page_mkwrite = self._page_mkwrite

    def fault(self, vmf: VmFault) -> int:
        """filemap_fault."""
        return filemap_fault(vmf)

    def _page_mkwrite(self, vmf: VmFault) -> int:
        """A shared page is written for the first time since it was clean: note it, with the folio locked.

        VM_FAULT_NOPAGE: it left the file meanwhile.
        """
        mapping: AddressSpace = vmf.vma.file
        host = mapping.host
        head = page_folio(host.pages, vmf.page)
        mapping.invalidate_lock.read_lock()
        folio_lock(host, head)
        ret = VM_FAULT_LOCKED
        if host.pages.mapping.get(head) is not mapping or host.pages.index[head] << 12 >= mapping.i_size:
            folio_unlock(host, head)
            ret = VM_FAULT_NOPAGE
        else:
            set_page_dirty(host, head)
        mapping.invalidate_lock.read_unlock()
        return ret


class BlockOperations(AddressSpaceOperations):
    """ext4_aops and ext4_file_operations. `private_data` of the mapping is the real file's descriptor."""

    can_writeback = True

    def dirty_folio(self, mapping: AddressSpace, pfn: int) -> bool:
        """block_dirty_folio: every block of the folio."""
        mapping.dirty_blocks.update(_blocks(mapping, pfn))
        return filemap_dirty_folio(mapping, pfn)

    def write_end(self, mapping: AddressSpace, pfn: int, offset: int, length: int) -> None:
        """block_write_end: the blocks that were written."""
        base, blocks = mapping.host.pages.index[pfn], mapping.dirty_blocks
        clean = set(_blocks(mapping, pfn)) - blocks
        set_page_dirty(mapping.host, pfn)
        blocks -= clean - set(range(base + (offset >> 12), base + (offset + length + 4095 >> 12)))

    def cancel_dirty(self, mapping: AddressSpace, pfn: int) -> None:
        """The folio goes: it needs no writing any more."""
        mapping.dirty_blocks.difference_update(_blocks(mapping, pfn))
        filemap_cancel_dirty(mapping, pfn)

    def invalidate_folio(self, mapping: AddressSpace, pfn: int, offset: int, length: int) -> None:
        """block_invalidate_folio: blocks that went as a whole need no writing."""
        base = mapping.host.pages.index[pfn]
        first, last = base + (offset + 4095 >> 12), base + (offset + length >> 12)
        mapping.dirty_blocks.difference_update(range(first, last))

    def release_folio(self, mapping: AddressSpace, pfn: int) -> bool:
        """try_to_free_buffers: not while the buffer of a block is dirty."""
        return mapping.dirty_blocks.isdisjoint(_blocks(mapping, pfn))

    # -- I/O ----------------------------------------------------------------------------------

    def read_folio(self, mapping: AddressSpace, pfn: int) -> None:
        """Fill a locked folio from the file; it is unlocked when that is done."""
        host = mapping.host
        index, fd = host.pages.index[pfn], mapping.private_data
        size = folio_nr_pages(host.pages, pfn) * PAGE_SIZE
        if is_hole(fd, index << 12, size):
            folio_zero_range(host, pfn, 0, size)
            host.pages.flags[pfn] |= PG_uptodate
            folio_unlock(host, pfn)
            return
        if (t := host.trace.file_read_start) is not None:
            t(mapping.name, index, pfn)

        def done() -> None:
            host.ram.write(pfn << 12, os.pread(fd, size, index << 12).ljust(size, b"\0"))
            host.pages.flags[pfn] |= PG_uptodate
            if (t := host.trace.file_read_end) is not None:
                t(mapping.name, index, pfn)
            folio_unlock(host, pfn)

        host.vmstat["pgpgin"] += size >> 10
        host.file_device.submit_read(pfn, index, done)

    def write_begin(self, mapping: AddressSpace, index: int, inside: int, length: int) -> int:
        """ext4_write_begin, with folios as large as the write where they are new."""
        # Beyond the end of the file there is nothing to keep.
        whole = not inside and (length >= PAGE_SIZE or (index << 12) + length >= mapping.i_size)
        order = max((inside + length).bit_length() - 13, 0)
        return get_block_folio(mapping, index, read=not whole, order=min(order, MAX_PAGECACHE_ORDER))

    def read_begin(self, mapping: AddressSpace, index: int) -> int:
        """filemap_get_pages."""
        return get_block_folio(mapping, index, read=True)

    def writepage(self, mapping: AddressSpace, pfn: int) -> None:
        """Write a locked folio that was made clean; unlocks it. What lies beyond the end becomes zeros."""
        host = mapping.host
        mapping.dirty_blocks.difference_update(_blocks(mapping, pfn))
        index, fd = host.pages.index[pfn], mapping.private_data
        size = folio_nr_pages(host.pages, pfn) * PAGE_SIZE
        length = min(size, mapping.i_size - (index << 12))
        if length <= 0:
            folio_unlock(host, pfn)
            return
        if length < size:
            folio_zero_range(host, pfn, length, size - length)
        if host.checks is not None:
            host.checks.writeback_starts(pfn)
        folio_start_writeback(host, pfn)
        mapping.writeback[index] = None
        if (t := host.trace.file_write_start) is not None:
            t(mapping.name, index, pfn)
        pa, half = pfn << 12, length // 2
        os.pwrite(fd, host.ram.b[pa : pa + half], index << 12)
        folio_unlock(host, pfn)

        def done() -> None:
            os.pwrite(fd, host.ram.b[pa + half : pa + length], (index << 12) + half)
            if (t := host.trace.file_write_end) is not None:
                t(mapping.name, index, pfn)
            del mapping.writeback[index]
            folio_end_writeback(host, pfn)

        host.vmstat["pgpgout"] += size >> 10
        host.file_device.submit_write(pfn, index, done)

    def dropped_clean(self, mapping: AddressSpace, pfn: int) -> None:
        """What a clean folio holds up to the end of the file is what the file has."""
        host = mapping.host
        start = host.pages.index[pfn] << 12
        length = max(0, min(folio_nr_pages(host.pages, pfn) * PAGE_SIZE, mapping.i_size - start))
        kept = os.pread(mapping.private_data, length, start).ljust(length, b"\0")
        held = bytes(host.ram.b[pfn << 12 : (pfn << 12) + length])
        if host.pages.flags[pfn] & PG_uptodate and held != kept:
            raise BrokenTruth(
                "dirty-dropped", f"pfn {pfn:#x} is dropped as clean, {mapping!r} has other bytes",
                host.stream.here(),
            )

    # -- system calls -------------------------------------------------------------------------

    def fsync(self, mapping: AddressSpace) -> None:
        """fsync(2)."""
        file_write_and_wait_range(mapping)

    def set_size(self, mapping: AddressSpace, size: int) -> None:
        """ftruncate(2). KernelError: EINVAL, EFBIG."""
        if size < 0:
            raise KernelError(EINVAL, f"{size} bytes")
        if size > MAX_LFS_FILESIZE:
            raise KernelError(EFBIG, f"{size:#x} bytes are more than a file can have")
        with mapping.i_rwsem, mapping.invalidate_lock:
            old, mapping.i_size = mapping.i_size, size
            if size < old:
                truncate_pagecache(mapping, size)
                # ext4_truncate comes after: a folio that this had made dirty could not be split.
                if size & 4095:
                    self._zero(mapping, size, 4096 - (size & 4095))
            elif old & 4095:
                # What a mapping stored beyond the old end must not show up now.
                self._zero(mapping, old, 4096 - (old & 4095))
            os.ftruncate(mapping.private_data, size)

    def fallocate(self, mapping: AddressSpace, mode: int, offset: int, length: int) -> None:
        """fallocate(2): allocation, or with FALLOC_FL_PUNCH_HOLE a hole. KernelError."""
        check_fallocate(mode, offset, length)
        hole = mode & FALLOC_FL_PUNCH_HOLE
        with mapping.i_rwsem:
            if hole:
                with mapping.invalidate_lock:
                    self._punch_hole(mapping, offset, offset + length)
            elif not mode & FALLOC_FL_KEEP_SIZE and offset + length > mapping.i_size:
                mapping.i_size = offset + length
                os.ftruncate(mapping.private_data, mapping.i_size)

    def _punch_hole(self, mapping: AddressSpace, start: int, end: int) -> None:
        """Pages out, partial ones zeroed and so dirty, whole blocks out of the file."""
        end = min(end, (mapping.i_size + 4095) & ~4095)
        if start >= end:
            return
        truncate_pagecache_range(mapping, start, end - 1)
        first, last = (start + 4095) & ~4095, end & ~4095
        if start >> 12 == (end - 1) >> 12 and (start & 4095 or end & 4095):
            self._zero(mapping, start, end - start)
            return
        if start & 4095:
            self._zero(mapping, start, first - start)
        if end & 4095:
            self._zero(mapping, last, end - last)
        punch(mapping.private_data, first, last)

    def _zero(self, mapping: AddressSpace, start: int, length: int) -> None:
        """ext4_zero_partial_blocks: clear part of a page, in the cache; writeback takes it to the file."""
        host = mapping.host
        head = get_block_folio(mapping, start >> 12, read=True)
        if head < 0:
            raise KernelError(-head, f"no memory for page {start >> 12:#x} of {mapping!r}")
        folio_wait_writeback(host, head)
        folio_zero_range(host, head, start - (host.pages.index[head] << 12), length)
        set_page_dirty(host, head)
        folio_unlock(host, head)
        put_page(host, head)

    def abandon(self, mapping: AddressSpace) -> None:
        """Close the real file as it is."""
        os.close(mapping.private_data)

    def evict_inode(self, mapping: AddressSpace) -> None:
        """Nobody uses the file: write it back, drop its pages, close the real file."""
        file_write_and_wait_range(mapping)
        truncate_inode_pages_range(mapping, 0, -1)
        os.close(mapping.private_data)


def _blocks(mapping: AddressSpace, pfn: int) -> range:
    """The blocks of a folio, by their place in the file."""
    pages = mapping.host.pages
    return range(pages.index[pfn], pages.index[pfn] + folio_nr_pages(pages, pfn))


def get_block_folio(mapping: AddressSpace, index: int, *, read: bool, order: int = 0) -> int:
    """__filemap_get_folio with FGP_LOCK and FGP_CREAT: the page's folio, locked and with a reference.

    A new one has at most 2**order pages. With `read` it is up to date. -ENOMEM.
    """
    host = mapping.host
    while True:
        head = filemap_lock_folio(mapping, index)
        if head < 0:
            if index & ((1 << order) - 1):
                order = (index & -index).bit_length() - 1
            head = alloc_pages(host, GFP_HIGHUSER_MOVABLE | GFP_COMP, order, mapping.nid)
            if head < 0:
                if not order:
                    return -12
                order -= 1
                continue
            if filemap_add_folio(mapping, head, index):
                put_page(host, head)
                order = max(order - 1, 0)
                continue
        if not read or host.pages.flags[head] & PG_uptodate:
            return head
        mapping.a_ops.read_folio(mapping, head)
        folio_wait_locked(host, head)
        put_page(host, head)


_A_OPS = BlockOperations()
_VM_OPS = BlockVmOperations()


def open_file(host: HostMm, size: int = 0, path: str | None = None, nid: int = 0) -> AddressSpace:
    """A file whose bytes are in the real file at `path` (made if missing), or in a temporary one.

    It grows to `size`; to be closed with fput. OSError if the real file cannot be used.
    """
    if path is None:
        fd, name = tempfile.mkstemp(prefix="refault-file-")
        os.unlink(name)
        name = "tmpfile"
    else:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        name = os.path.basename(path)
    if os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)
    mapping = AddressSpace(host, name, os.fstat(fd).st_size, _A_OPS, _VM_OPS, nid)
    mapping.private_data = fd
    return mapping
