"""madvise on mappings of files: MADV_REMOVE and MADV_WILLNEED.

Source of truth: mm/madvise.c (madvise_remove, madvise_willneed, shmem_swapin_range); Linux 6.18.

Both are the file's business: mmap_lock is dropped for it, the file kept open, and what the range maps
afterwards is looked up anew.

Not modelled: userfaultfd's REMOVE event, DAX.
"""

from __future__ import annotations

from errno import EACCES, EINVAL
from typing import TYPE_CHECKING

from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, AddressSpace, fput, get_file
from host_mm.filemap_cache import NOT_CACHED, find_get_entries
from host_mm.filemap_rw import POSIX_FADV_WILLNEED, generic_fadvise
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import VM_LOCKED, VM_MAYWRITE, VM_SHARED
from host_mm.page import put_page
from host_mm.page_io import swap_read_folio
from host_mm.swap_state import read_swap_cache

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea

__all__ = ["madvise_remove", "madvise_willneed_file"]


def madvise_remove(vma: VmArea, start: int, end: int) -> None:
    """Punch a hole into the file that the VMA maps. KernelError: EINVAL, EACCES, what fallocate says."""
    mapping: AddressSpace | None = vma.file
    if vma.flags & VM_LOCKED or mapping is None:
        raise KernelError(EINVAL, f"{vma!r} is locked or maps no file")
    if vma.flags & (VM_SHARED | VM_MAYWRITE) != VM_SHARED | VM_MAYWRITE:
        raise KernelError(EACCES, f"{vma!r} is private or may not be written")
    mm, offset = vma.mm, (start - vma.start) + (vma.pgoff << 12)
    get_file(mapping)
    mm.mmap_lock.read_unlock()
    try:
        mapping.a_ops.fallocate(mapping, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, end - start)
    finally:
        fput(mapping)
        mm.mmap_lock.read_lock()


def madvise_willneed_file(vma: VmArea, start: int, end: int) -> None:
    """Start reading the pages that the range maps, from the file or, for shmem, from swap."""
    mapping: AddressSpace = vma.file
    mm, host = vma.mm, vma.mm.host
    first, last = vma.page_index(start), vma.page_index(end)
    if mapping.a_ops.is_shmem:
        for _, value in find_get_entries(mapping, first, last):
            if NOT_CACHED < value < 0:
                pfn = read_swap_cache(host, ~value, mapping.nid, swap_read_folio)
                if pfn >= 0:
                    put_page(host, pfn)
        host.lru.lru_add_drain()
        return
    get_file(mapping)
    mm.mmap_lock.read_unlock()
    generic_fadvise(mapping, first << 12, end - start, POSIX_FADV_WILLNEED)
    fput(mapping)
    mm.mmap_lock.read_lock()
