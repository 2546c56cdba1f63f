"""read(2) and write(2) on files, through the page cache; and posix_fadvise(2).

Source of truth: mm/filemap.c (generic_perform_write, filemap_read, __filemap_get_folio), mm/fadvise.c:
generic_fadvise, fs/buffer.c and mm/shmem.c (their write_begin and write_end); Linux 6.18.

A write goes into the cached folio, locked; who has it mapped sees the bytes at once, and no bracket is fired.
A page that is not cached is read first, unless all of it is written. New folios are as large as the write.

Not modelled: direct I/O, O_APPEND, the position of a descriptor, readahead by read(2), short writes.
"""

from __future__ import annotations

from errno import EFBIG, EINVAL
from typing import TYPE_CHECKING

from host_mm.address_space import MAX_LFS_FILESIZE
from host_mm.filemap import folio_unlock
from host_mm.filemap_cache import NOT_CACHED
from host_mm.kernel.costs import COST_COPY_PAGE, COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.page import PG_uptodate, folio_nr_pages, put_page
from host_mm.page_writeback import write_cache_pages
from host_mm.readahead import page_cache_ra
from host_mm.truncate import folio_zero_range, invalidate_mapping_pages

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace

__all__ = ["POSIX_FADV_DONTNEED", "POSIX_FADV_WILLNEED", "file_read", "file_write", "generic_fadvise"]

POSIX_FADV_WILLNEED = 3
POSIX_FADV_DONTNEED = 4


def file_write(mapping: AddressSpace, pos: int, data: bytes) -> int:
    """pwrite(2): how many bytes, all of them. KernelError: EINVAL, EFBIG, ENOMEM."""
    host = mapping.host
    host.sched.advance(COST_SYSCALL)
    if pos < 0:
        raise KernelError(EINVAL, f"position {pos}")
    if pos + len(data) > MAX_LFS_FILESIZE:
        raise KernelError(EFBIG, f"{pos:#x}+{len(data):#x} is beyond the largest file")
    done = 0
    with mapping.i_rwsem:
        while done < len(data):
            done += _write_folio(mapping, pos + done, data[done:])
    return done


def _write_folio(mapping: AddressSpace, pos: int, data: bytes) -> int:
    host = mapping.host
    index, inside = pos >> 12, pos & 4095
    head = mapping.a_ops.write_begin(mapping, index, inside, len(data))
    if head < 0:
        raise KernelError(-head, f"no memory for page {index:#x} of {mapping!r}")
    offset = pos - (host.pages.index[head] << 12)
    size = folio_nr_pages(host.pages, head) << 12
    length = min(len(data), size - offset)
    if not host.pages.flags[head] & PG_uptodate:
        # A new folio: what the write leaves is a hole's.
        folio_zero_range(host, head, 0, offset)
        folio_zero_range(host, head, offset + length, size - offset - length)
        host.pages.flags[head] |= PG_uptodate
    host.ram.write((head << 12) + offset, data[:length])
    host.sched.advance(COST_COPY_PAGE)
    mapping.i_size = max(mapping.i_size, pos + length)
    mapping.a_ops.write_end(mapping, head, offset, length)
    folio_unlock(host, head)
    put_page(host, head)
    return length


def file_read(mapping: AddressSpace, pos: int, length: int) -> bytes:
    """pread(2): fewer bytes than asked for at the end of the file. KernelError: EINVAL, ENOMEM."""
    host = mapping.host
    host.sched.advance(COST_SYSCALL)
    if pos < 0 or length < 0:
        raise KernelError(EINVAL, f"{length} bytes at {pos}")
    parts: list[bytes] = []
    end = min(pos + length, mapping.i_size)
    while pos < end:
        step = min(end - pos, 4096 - (pos & 4095))
        head = mapping.a_ops.read_begin(mapping, pos >> 12)
        if head == NOT_CACHED:
            parts.append(bytes(step))
        elif head < 0:
            raise KernelError(-head, f"no memory for page {pos >> 12:#x} of {mapping!r}")
        else:
            at = (head << 12) + pos - (host.pages.index[head] << 12)
            parts.append(host.ram.read(at, step))
            folio_unlock(host, head)
            put_page(host, head)
        host.sched.advance(COST_COPY_PAGE)
        pos += step
    return b"".join(parts)


def generic_fadvise(mapping: AddressSpace, pos: int, length: int, advice: int) -> None:
    """posix_fadvise(2): WILLNEED starts reading the range, DONTNEED drops what is clean and unmapped.

    DONTNEED first starts writing what is dirty, and drops whole pages only. Other advice changes nothing.
    KernelError(EINVAL).
    """
    host = mapping.host
    host.sched.advance(COST_SYSCALL)
    if length < 0 or not 0 <= advice <= 5:
        raise KernelError(EINVAL, f"advice {advice} on {length} bytes")
    end = pos + length if length else MAX_LFS_FILESIZE
    if mapping.a_ops.is_shmem or mapping.a_ops.unevictable:
        return
    if advice == POSIX_FADV_WILLNEED:
        page_cache_ra(mapping, pos >> 12, ((end + 4095) >> 12) - (pos >> 12), None)
    elif advice == POSIX_FADV_DONTNEED:
        write_cache_pages(mapping, pos >> 12, (end + 4095) >> 12, wait=False)
        first = (pos + 4095) >> 12
        last = end >> 12 if end < mapping.i_size else mapping.file_end
        if last > first:
            host.lru.lru_add_drain()
            invalidate_mapping_pages(mapping, first, last)
