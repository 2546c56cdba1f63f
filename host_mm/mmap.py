"""mmap and munmap.

Source of truth: mm/mmap.c (do_mmap, __get_unmapped_area), mm/vma.c (__mmap_region,
vms_gather_munmap_vmas, vms_complete_munmap_vmas), mm/huge_memory.c: thp_get_unmapped_area; Linux 6.18.

Not modelled: address space randomisation, overcommit accounting, rlimits, guard gaps of stacks.
"""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENODEV, ENOMEM, EOVERFLOW
from typing import TYPE_CHECKING, Any

from host_mm.address_space import flush_delayed_fput, fput
from host_mm.arch.x86.pgtable import PMD_SIZE, TASK_SIZE, page_align
from host_mm.gup_populate import mm_populate
from host_mm.hugetlbfs import hugetlb_file_setup
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.memory_zap import free_pgtables, unmap_vmas
from host_mm.mm_types import (
    VM_ACCOUNT,
    VM_EXEC,
    VM_LOCKED,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_NORESERVE,
    VM_READ,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
    VmArea,
)
from host_mm.mmu_gather import MmuGather
from host_mm.vma import insert_vma, remove_vma, split_vma, vma_close, vma_merge_new_range, vma_set_page_prot

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = [
    "MAP_ANONYMOUS", "MAP_FIXED", "MAP_FIXED_NOREPLACE", "MAP_HUGETLB", "MAP_LOCKED", "MAP_NORESERVE",
    "MAP_PRIVATE", "MAP_SHARED", "PROT_EXEC", "PROT_NONE", "PROT_READ", "PROT_WRITE", "do_mmap", "do_munmap",
    "do_vmi_munmap", "get_unmapped_area",
]

PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_LOCKED = 0x2000
MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000
MAP_HUGE_SHIFT = 26
MAP_FIXED_NOREPLACE = 0x100000

MMAP_BASE = 0x7FFFF7FFF000
"""Where the top-down search starts, without randomisation (arch/x86/mm/mmap.c: mmap_base)."""
MMAP_MIN_ADDR = 0x10000
MAX_PGOFF = 1 << 51
"""Files have positions below 2^63."""


def do_mmap(
    mm: MmStruct, addr: int, length: int, prot: int, flags: int, *,
    file: Any = None, ops: Any = None, pgoff: int | None = None, vm_flags: int = 0,
) -> int:
    """Map `length` bytes; returns the address.

    `file` and `pgoff`, the page of the file that comes first, for file mappings; `ops` for what a driver
    maps. MAP_SHARED | MAP_ANONYMOUS is a file of its own in shmem. KernelError: EINVAL, ENOMEM, EEXIST,
    ENODEV (shared, but neither anonymous nor of a file), EOVERFLOW.
    """
    mm.host.sched.advance(COST_SYSCALL)
    size = page_align(length)
    huge = bool(flags & MAP_HUGETLB) or (file is not None and file.a_ops.is_hugetlb)
    if huge:
        _check_hugetlb(file, flags)
        size = (size + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
    if length <= 0 or bool(flags & MAP_SHARED) == bool(flags & MAP_PRIVATE):
        raise KernelError(EINVAL, "length must be positive and exactly one of shared and private given")
    if not size or size > TASK_SIZE:
        raise KernelError(ENOMEM, f"{length:#x} bytes are more than the user address space has")
    if (pgoff or 0) + (size >> 12) > MAX_PGOFF:
        raise KernelError(EOVERFLOW, f"page {pgoff:#x} of a file and {size:#x} bytes on")
    if flags & MAP_SHARED and ops is None and file is None:
        if not flags & MAP_ANONYMOUS:
            raise KernelError(ENODEV, "a shared mapping needs a file")
        pgoff = 0
    shmem = None
    if huge and file is None:
        file = shmem = hugetlb_file_setup(mm.host, "anon_hugepage", size)
    mm.mmap_lock.lock()
    try:
        place = get_unmapped_area(mm, addr, size, flags, huge=huge)
        vm_flags |= _vm_flags(mm, prot, flags)
        if not huge and vm_flags & (VM_NORESERVE | VM_SHARED | VM_WRITE) == VM_WRITE:
            # accountable_mapping: nobody counts here, but VMAs that differ in it do not merge.
            vm_flags |= VM_ACCOUNT
        if flags & MAP_SHARED and ops is None and file is None:
            file = shmem = mm.host.shmem_file_setup("dev/zero", size, mm.process.home_node)
        if file is not None and ops is None:
            ops = file.vm_ops
        if pgoff is None:
            pgoff = place >> 12 if file is None else 0
        _mmap_region(mm, place, size, vm_flags, file, ops, pgoff)
    finally:
        mm.mmap_lock.unlock()
        if shmem is not None:
            fput(shmem)
        flush_delayed_fput(mm.host)
    if vm_flags & VM_LOCKED:
        mm_populate(mm, place, size)
    return place


def _check_hugetlb(file: Any, flags: int) -> None:
    if file is not None and not file.a_ops.is_hugetlb:
        raise KernelError(EINVAL, "MAP_HUGETLB with a file of small pages")
    size = flags >> MAP_HUGE_SHIFT & 63
    if file is None and size not in (0, 21):
        raise KernelError(EINVAL, f"there are no pages of 2**{size} bytes")


def get_unmapped_area(mm: MmStruct, addr: int, size: int, flags: int, *, huge: bool = False) -> int:
    """The place of a new mapping. `addr` is a hint, or with MAP_FIXED the place. KernelError.

    `huge`: of huge pages, so its place and size are multiples of 2 MiB.
    """
    if huge:
        if size & (PMD_SIZE - 1) or (flags & MAP_FIXED and addr & (PMD_SIZE - 1)):
            raise KernelError(EINVAL, f"{addr:#x}+{size:#x} are not whole huge pages")
        addr = (addr + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
    if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
        if addr + size > TASK_SIZE:
            raise KernelError(ENOMEM, f"{addr:#x}+{size:#x} is beyond the user address space")
        if addr & 4095:
            raise KernelError(EINVAL, f"{addr:#x} is not page-aligned")
        if flags & MAP_FIXED_NOREPLACE and mm.find_vma_intersection(addr, addr + size) is not None:
            raise KernelError(EEXIST, f"something is mapped in {addr:#x}+{size:#x}")
        return addr
    hint = addr & ~4095
    if MMAP_MIN_ADDR <= hint <= TASK_SIZE - size and mm.find_vma_intersection(hint, hint + size) is None:
        return hint
    # Anonymous mappings of whole 2 MiB get 2 MiB alignment, so that huge pages could fit.
    align = PMD_SIZE if size % PMD_SIZE == 0 and not hint else 4096
    return _unmapped_area_topdown(mm, size, align)


def _unmapped_area_topdown(mm: MmStruct, size: int, align: int) -> int:
    top = MMAP_BASE
    for vma in reversed(mm.vmas):
        if vma.start >= top:
            continue
        if vma.end < top:
            start = (top - size) & ~(align - 1)
            if start >= vma.end:
                return start
        top = vma.start
    start = (top - size) & ~(align - 1)
    if start < MMAP_MIN_ADDR:
        raise KernelError(ENOMEM, f"no hole of {size:#x} bytes")
    return start


def _vm_flags(mm: MmStruct, prot: int, flags: int) -> int:
    vm_flags = mm.def_flags | VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC
    vm_flags |= (VM_READ if prot & PROT_READ else 0) | (VM_WRITE if prot & PROT_WRITE else 0)
    vm_flags |= VM_EXEC if prot & PROT_EXEC else 0
    if flags & MAP_SHARED:
        vm_flags |= VM_SHARED | VM_MAYSHARE
    if flags & MAP_NORESERVE:
        vm_flags |= VM_NORESERVE
    if flags & MAP_LOCKED:
        vm_flags |= VM_LOCKED
    return vm_flags


def _mmap_region(
    mm: MmStruct, addr: int, size: int, vm_flags: int, file: Any, ops: Any, pgoff: int
) -> int:
    if mm.find_vma_intersection(addr, addr + size) is not None:
        do_vmi_munmap(mm, addr, addr + size, downgrade=False)
    vma = VmArea(mm, addr, addr + size, vm_flags | VM_SOFTDIRTY, pgoff)
    vma.file = file
    vma.ops = ops
    merged = vma_merge_new_range(mm, addr, addr + size, vma.flags, vma)
    if merged is None:
        if file is not None:
            file.a_ops.mmap(file, vma)
        vma_set_page_prot(vma)
        insert_vma(vma)
        if vma.file is not None:
            mm.host.khugepaged_enter_vma(vma, vma.flags)
    else:
        merged.flags |= VM_SOFTDIRTY
    return addr


def do_munmap(mm: MmStruct, addr: int, length: int) -> None:
    """Unmap every page of [addr, addr+length); holes are fine. KernelError(EINVAL)."""
    mm.host.sched.advance(COST_SYSCALL)
    size = page_align(length)
    if addr & 4095 or addr > TASK_SIZE or length > TASK_SIZE - addr or not size:
        raise KernelError(EINVAL, f"cannot unmap {addr:#x}+{length:#x}")
    mm.mmap_lock.lock()
    if mm.find_vma_intersection(addr, addr + size) is None:
        mm.mmap_lock.unlock()
        return
    try:
        do_vmi_munmap(mm, addr, addr + size, downgrade=True)
    except KernelError:
        mm.mmap_lock.unlock()
        raise
    mm.mmap_lock.read_unlock()
    flush_delayed_fput(mm.host)


def do_vmi_munmap(mm: MmStruct, start: int, end: int, *, downgrade: bool) -> None:
    """Unmap [start, end), which is not all hole, under mmap_lock for write, with `downgrade` then read.

    KernelError(EINVAL), before that and with nothing unmapped: a huge page would have to be cut.
    """
    first = mm.find_vma_intersection(start, end)
    assert first is not None
    if first.start < start:
        split_vma(first, start, new_below=True)
    last = mm.vma_lookup(end - 1)
    if last is not None and last.end > end:
        split_vma(last, end, new_below=False)
    vmas = mm.vmas_in(start, end)
    for vma in vmas:
        remove_vma(vma)
    below = mm.vma_lookup_below(start)
    above = mm.find_vma(end)
    if downgrade:
        # The range belongs to nobody now, so that faults elsewhere need not wait for the zap.
        mm.mmap_lock.downgrade()
    tlb = MmuGather(mm)
    unmap_vmas(tlb, vmas, start, end)
    free_pgtables(tlb, vmas, below, above.start if above is not None else 0)
    tlb.finish()
    for vma in vmas:
        vma_close(vma)
