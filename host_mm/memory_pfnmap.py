"""Mappings of raw frame numbers: memory that no struct page counts.

Source of truth: mm/memory.c (remap_pfn_range, remap_pte_range, vmf_insert_pfn, insert_pfn,
follow_pfnmap_start, follow_pfnmap_end), mm/gup.c: fixup_user_fault; Linux 6.18.

Such a mapping has VM_PFNMAP and VM_IO: get_user_pages refuses it, fork copies its entries, and only who maps
the frames knows for how long they may be used. A driver that takes them back zaps the entries
(unmap_mapping_range), which tells every secondary MMU; who follows an entry must be such a one, or
forget the frame when follow_pfnmap_end returns.

Entries are special. In a private mapping a write copies the frame into an anonymous page; the VMA's pgoff is
then the first frame's number, so that the whole must be mapped at once.

Not modelled: huge entries, cache attributes and their tracking (pfnmap_track), VM_MIXEDMAP, write-notify
(pfn_mkwrite).
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_SPECIAL,
    mk_pte,
    pte_mkdirty,
    pte_mkyoung,
    pte_pfn,
    pte_present,
    pte_write,
)
from host_mm.kernel.errors import EHWPOISON, BrokenTruth
from host_mm.memory import handle_mm_fault
from host_mm.memory_copy import is_cow_mapping
from host_mm.memory_folio import maybe_mkwrite
from host_mm.memory_zap import zap_page_range_single
from host_mm.mm_types import (
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_WRITE,
    VM_DONTEXPAND,
    VM_FAULT_ERROR,
    VM_FAULT_HWPOISON,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_IO,
    VM_PFNMAP,
    VM_READ,
    VM_WRITE,
)
from host_mm.pgtable_generic import (
    pmd_alloc,
    pmd_offset,
    pte_alloc,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_get,
    ptep_set_access_flags,
    set_pte,
)

if TYPE_CHECKING:
    from host_mm.kernel.locks import Spinlock
    from host_mm.mm_types import MmStruct, VmArea, VmFault

__all__ = [
    "VM_PFNMAP_FLAGS", "FollowPfnmap", "fixup_user_fault", "follow_pfnmap_end", "follow_pfnmap_start",
    "remap_pfn_range", "vmf_insert_pfn",
]

VM_PFNMAP_FLAGS = VM_IO | VM_PFNMAP | VM_DONTEXPAND
"""What remap_pfn_range gives a VMA, and what a driver that maps on faults must."""


def remap_pfn_range(vma: VmArea, address: int, pfn: int, size: int, prot: int) -> int:
    """Map the frames from `pfn` on into a new VMA, at once; 0 or a negative errno, then nothing is mapped.

    mmap_lock is held for writing. -EINVAL: unaligned, or a part of a private mapping.
    """
    end = address + (size + 4095 & ~4095)
    if address & 4095 or not vma.start <= address < end <= vma.end:
        return -EINVAL
    if is_cow_mapping(vma.flags):
        if (address, end) != (vma.start, vma.end):
            return -EINVAL
        vma.pgoff = pfn
    vma.flags |= VM_PFNMAP_FLAGS
    for at in range(address, end, 4096):
        if not _remap_pte(vma.mm, at, pfn + (at - address >> 12), prot):
            # No counts are kept, so that what is half mapped could be freed under whoever uses it.
            zap_page_range_single(vma, address, end - address)
            return -ENOMEM
    return 0


def _remap_pte(mm: MmStruct, address: int, pfn: int, prot: int) -> bool:
    pmd = pmd_alloc(mm, address)
    if not pmd or not pte_alloc(mm, pmd):
        return False
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return False
    if ptep_get(mm, pte):
        raise BrokenTruth("remap-pfn", f"{address:#x} is mapped already", mm.host.stream.here())
    set_pte(mm, address, pte, mk_pte(pfn, prot) | _PAGE_SPECIAL)
    pte_lockptr(mm, pte).unlock()
    return True


def vmf_insert_pfn(vmf: VmFault, pfn: int) -> int:
    """A driver's fault handler maps one frame; VM_FAULT_NOPAGE or VM_FAULT_OOM. Shared mappings only."""
    vma, mm = vmf.vma, vmf.mm
    if not vma.flags & VM_PFNMAP or is_cow_mapping(vma.flags):
        raise BrokenTruth("remap-pfn", f"vmf_insert_pfn into {vma!r}", mm.host.stream.here())
    if not pte_alloc(mm, vmf.pmd):
        return VM_FAULT_OOM
    pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if not pte:
        return VM_FAULT_NOPAGE
    write = bool(vmf.flags & FAULT_FLAG_WRITE)
    old = ptep_get(mm, pte)
    if not old:
        set_pte(mm, vmf.address, pte, mk_pte(pfn, vma.page_prot) | _PAGE_SPECIAL)
    elif write and pte_present(old) and pte_pfn(old) == pfn:
        entry = maybe_mkwrite(pte_mkdirty(pte_mkyoung(old)), vma)
        ptep_set_access_flags(mm, vmf.address, pte, entry, True)
    pte_lockptr(mm, pte).unlock()
    return VM_FAULT_NOPAGE


class FollowPfnmap:
    """struct follow_pfnmap_args as start leaves it: valid until end, with the table's lock held."""

    __slots__ = ("lock", "pfn", "special", "writable")

    def __init__(self, lock: Spinlock, entry: int) -> None:
        self.lock = lock
        self.pfn = pte_pfn(entry)
        self.writable = pte_write(entry)
        self.special = bool(entry & _PAGE_SPECIAL)


def follow_pfnmap_start(vma: VmArea, address: int) -> FollowPfnmap | None:
    """What maps `address` in a VM_IO or VM_PFNMAP area, or None; mmap_lock is held for reading."""
    if not vma.start <= address < vma.end or not vma.flags & (VM_IO | VM_PFNMAP):
        return None
    mm = vma.mm
    pmd = pmd_offset(mm, address)
    pte = pte_offset_map_lock(mm, pmd, address) if pmd else 0
    if not pte:
        return None
    entry = ptep_get(mm, pte)
    lock = pte_lockptr(mm, pte)
    if not pte_present(entry):
        lock.unlock()
        return None
    return FollowPfnmap(lock, entry)


def follow_pfnmap_end(args: FollowPfnmap) -> None:
    """From here on only notifiers keep the frame right."""
    args.lock.unlock()


def fixup_user_fault(mm: MmStruct, address: int, *, write: bool) -> int:
    """Fault a page in without taking a reference; 0 or a negative errno. mmap_lock is held for reading."""
    vma = mm.vma_lookup(address)
    if vma is None or not vma.flags & (VM_WRITE if write else VM_READ):
        return -EFAULT
    ret = handle_mm_fault(vma, address, FAULT_FLAG_REMOTE | (FAULT_FLAG_WRITE if write else 0))
    if ret & VM_FAULT_ERROR:
        if ret & VM_FAULT_OOM:
            return -ENOMEM
        return -EHWPOISON if ret & VM_FAULT_HWPOISON else -EFAULT
    return 0
