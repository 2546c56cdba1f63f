"""Pages faulted in ahead of their use, without a reference that stays: MADV_POPULATE_* and mlock.

Source of truth: mm/gup.c (faultin_page_range, populate_vma_page_range, __mm_populate); Linux 6.18.

Not modelled: fatal signals, which end a range early.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.gup import (
    FOLL_FORCE,
    FOLL_HWPOISON,
    FOLL_TOUCH,
    FOLL_TRIED,
    FOLL_WRITE,
    check_vma_flags,
    get_user_page_locked,
    gup_slow,
)
from host_mm.mm_types import VM_ACCESS_FLAGS, VM_IO, VM_LOCKONFAULT, VM_PFNMAP, VM_SHARED, VM_WRITE
from host_mm.page import put_page

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["faultin_page_range", "mm_populate"]


def faultin_page_range(mm: MmStruct, start: int, end: int, *, write: bool) -> int:
    """MADV_POPULATE_*: fault every page in, keep no reference; 0 or a negative errno.

    -ENOMEM: a hole or no memory, -EINVAL: the mapping does not allow it, -EFAULT: the fault failed.
    """
    flags = FOLL_HWPOISON | (FOLL_WRITE if write else 0)
    for addr in range(start, end, 4096):
        vma = mm.vma_lookup(addr)
        if vma is None:
            return -ENOMEM
        if not check_vma_flags(vma, flags):
            return -EINVAL
        pfns, err = gup_slow(mm, addr, 1, flags)
        if err:
            return err
        put_page(mm.host, pfns[0])
    return 0


def mm_populate(mm: MmStruct, start: int, length: int, *, ignore_errors: bool = True) -> int:
    """Fault in what is mapped of the range, for mlock; 0 or a negative errno. Holes are skipped.

    Private memory that may be written is faulted for writing, so that its COW is done. With
    `ignore_errors` a VMA that fails is left and the next one tried.
    """
    address, end = start, start + length
    tried = ret = 0
    mm.mmap_lock.read_lock()
    while address < end and not ret:
        vma = mm.find_vma_intersection(address, end)
        if vma is None:
            break
        address = max(address, vma.start)
        if vma.flags & (VM_IO | VM_PFNMAP | VM_LOCKONFAULT):
            address = vma.end
            continue
        pfn, locked = _populate_page(vma, address, tried)
        tried = 0
        if not locked:
            mm.mmap_lock.read_lock()
            tried = FOLL_TRIED
        elif pfn >= 0:
            put_page(mm.host, pfn)
            address += 4096
        elif ignore_errors:
            address = vma.end
        else:
            ret = pfn
    mm.mmap_lock.read_unlock()
    mm.host.lru.lru_add_drain()
    return ret


def _populate_page(vma: VmArea, address: int, flags: int) -> tuple[int, bool]:
    """populate_vma_page_range for one page; as get_user_page_locked."""
    if not vma.flags & VM_ACCESS_FLAGS:
        return -EFAULT, True
    write = vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE
    return get_user_page_locked(vma.mm, address, flags | FOLL_TOUCH | (FOLL_WRITE if write else FOLL_FORCE))
