"""mlock and munlock: memory that reclaim leaves where it is.

Source of truth: mm/mlock.c (do_mlock, apply_vma_lock_flags, mlock_fixup, mlock_vma_pages_range,
mlock_pte_range, apply_mlockall_flags); Linux 6.18. The folios' side, counts and batches, is in
mlock_folio.py.

A locked VMA is one with VM_LOCKED: the range is split off (which brackets its 2 MiB, see vma.py), the
pages that are there move to the unevictable list, and what is missing is faulted in, for writing where
that is allowed. No entry loses a right, so that mlock opens no bracket of its own; migration still
moves locked pages.

Not modelled: RLIMIT_MEMLOCK and CAP_IPC_LOCK, hence EPERM, ENOMEM for the limit and mm->locked_vm;
mprotect's populate of a locked VMA that becomes writable; MADV_DONTNEED_LOCKED.
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import TASK_SIZE, ULONG_MAX, page_align, pmd_trans_huge, pte_pfn, pte_present
from host_mm.gup_populate import mm_populate
from host_mm.huge_memory_map import pmd_folio
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import (
    VM_IO,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_LOCKONFAULT,
    VM_SOFTDIRTY,
    VM_SPECIAL,
)
from host_mm.page import folio_nr_pages, folio_test_large, page_folio
from host_mm.pgtable_generic import pmd_slots, pte_lockptr, pte_offset_map_lock
from host_mm.pgtable_huge import pmd_trans_huge_lock, pmdp_get
from host_mm.vma import vma_modify_flags

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "MCL_CURRENT", "MCL_FUTURE", "MCL_ONFAULT", "MLOCK_ONFAULT", "do_mlock", "do_mlockall", "do_munlock",
    "do_munlockall",
]

MLOCK_ONFAULT = 1
MCL_CURRENT = 1
MCL_FUTURE = 2
MCL_ONFAULT = 4


def do_mlock(mm: MmStruct, start: int, length: int, flags: int = 0) -> None:
    """mlock2(2): every page that [start, start+length) touches; with MLOCK_ONFAULT nothing is faulted in.

    KernelError: EINVAL, ENOMEM (a hole, what lies before it is locked; or no access), EAGAIN (no memory).
    """
    if flags & ~MLOCK_ONFAULT:
        raise KernelError(EINVAL, f"no mlock2 flags {flags:#x}")
    start, end = _whole_pages(start, length)
    _apply_vma_lock_flags(mm, start, end, VM_LOCKED | (VM_LOCKONFAULT if flags & MLOCK_ONFAULT else 0))
    ret = mm_populate(mm, start, end - start, ignore_errors=False)
    if ret:
        # POSIX: what may not be accessed is ENOMEM, what memory is missing for EAGAIN.
        errno = {-EFAULT: ENOMEM, -ENOMEM: EAGAIN}.get(ret, -ret)
        raise KernelError(errno, f"cannot populate {start:#x}+{end - start:#x}")


def do_munlock(mm: MmStruct, start: int, length: int) -> None:
    """munlock(2): every page that [start, start+length) touches. KernelError: EINVAL, ENOMEM (a hole)."""
    start, end = _whole_pages(start, length)
    _apply_vma_lock_flags(mm, start, end, 0)


def do_mlockall(mm: MmStruct, flags: int) -> None:
    """mlockall(2): what is mapped now (MCL_CURRENT), what will be (MCL_FUTURE). KernelError(EINVAL)."""
    if not flags or flags & ~(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) or flags == MCL_ONFAULT:
        raise KernelError(EINVAL, f"no mlockall flags {flags:#x}")
    _apply_mlockall_flags(mm, flags)
    if flags & MCL_CURRENT:
        mm_populate(mm, 0, TASK_SIZE)


def do_munlockall(mm: MmStruct) -> None:
    """munlockall(2)."""
    _apply_mlockall_flags(mm, 0)


def _whole_pages(start: int, length: int) -> tuple[int, int]:
    first = start & ~4095
    end = first + page_align(length + (start & 4095))
    if end > ULONG_MAX:
        raise KernelError(EINVAL, f"{start:#x}+{length:#x} wraps around")
    return first, end


def _apply_vma_lock_flags(mm: MmStruct, start: int, end: int, flags: int) -> None:
    mm.host.sched.advance(COST_SYSCALL)
    mm.mmap_lock.lock()
    try:
        address = start
        while address < end:
            vma = mm.vma_lookup(address)
            if vma is None:
                raise KernelError(ENOMEM, f"nothing is mapped at {address:#x}")
            following = min(vma.end, end)
            _mlock_fixup(vma, address, following, (vma.flags & ~VM_LOCKED_MASK) | flags)
            address = following
    finally:
        mm.mmap_lock.unlock()


def _apply_mlockall_flags(mm: MmStruct, flags: int) -> None:
    mm.host.sched.advance(COST_SYSCALL)
    locked = VM_LOCKED | (VM_LOCKONFAULT if flags & MCL_ONFAULT else 0)
    mm.mmap_lock.lock()
    mm.def_flags = (mm.def_flags & ~VM_LOCKED_MASK) | (locked if flags & MCL_FUTURE else 0)
    if flags & MCL_CURRENT or not flags & MCL_FUTURE:
        address = 0
        while (vma := mm.find_vma(address)) is not None:
            address = vma.end
            wanted = (vma.flags & ~VM_LOCKED_MASK) | (locked if flags & MCL_CURRENT else 0)
            _mlock_fixup(vma, vma.start, vma.end, wanted)
            if mm.host.sched.preempt:
                mm.host.sched.point("cond_resched")
    mm.mmap_lock.unlock()


def _mlock_fixup(vma: VmArea, start: int, end: int, flags: int) -> None:
    """Give a part of the VMA these flags; VM_SPECIAL VMAs are left alone."""
    old = vma.flags
    if flags == old or old & VM_SPECIAL:
        return
    vma = vma_modify_flags(vma, start, end, flags)
    flags |= vma.flags & VM_SOFTDIRTY
    if flags & VM_LOCKED and old & VM_LOCKED:
        # Only ONFAULT differs: counting the pages again would be wrong.
        vma.flags = flags
    else:
        _mlock_vma_pages_range(vma, start, end, flags)


def _mlock_vma_pages_range(vma: VmArea, start: int, end: int, flags: int) -> None:
    mm = vma.mm
    host = mm.host
    # VM_IO beside VM_LOCKED tells rmap walkers, who do not take mmap_lock, that this walk will count
    # the page: they must not count it as well.
    vma.flags = flags | VM_IO if flags & VM_LOCKED else flags
    host.lru.lru_add_drain()
    for pmd, address, following in pmd_slots(mm, start, end):
        if (ptl := pmd_trans_huge_lock(mm, pmd)) is not None:
            folio = pmd_folio(mm, pmdp_get(mm, pmd)) if pmd_trans_huge(pmdp_get(mm, pmd)) else -1
            if folio >= 0:
                _mlock_or_munlock(vma, folio)
            ptl.unlock()
            continue
        _mlock_pte_range(vma, pmd, address, following)
        if host.sched.preempt:
            host.sched.point("cond_resched")
    host.lru.lru_add_drain()
    vma.flags = flags


def _mlock_pte_range(vma: VmArea, pmd: int, address: int, end: int) -> None:
    mm = vma.mm
    host = mm.host
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return
    first = pte >> 3
    last = -1
    for at, entry in enumerate(host.ram.u64[first : first + ((end - address) >> 12)].tolist()):
        if entry and pte_present(entry) and (pfn := vm_normal_page(host, entry)) >= 0:
            folio = page_folio(host.pages, pfn)
            if folio_test_large(host.pages, folio):
                most = (end - address >> 12) - at
                if folio == last or not _allow_mlock_munlock(vma, folio, pte + at * 8, most):
                    continue
                last = folio
            _mlock_or_munlock(vma, folio)
    pte_lockptr(mm, pte).unlock()


def _mlock_or_munlock(vma: VmArea, folio: int) -> None:
    mlock = vma.mm.host.lru.mlock
    if vma.flags & VM_LOCKED:
        mlock.mlock_folio(folio)
    else:
        mlock.munlock_folio(folio)


def _allow_mlock_munlock(vma: VmArea, folio: int, pte: int, most: int) -> bool:
    """Only a large folio that is mapped as a whole from here on is locked; any may be unlocked."""
    host = vma.mm.host
    if not vma.flags & VM_LOCKED:
        return True
    nr = folio_nr_pages(host.pages, folio)
    entries = host.ram.u64[pte >> 3 : (pte >> 3) + min(nr, most)].tolist()
    mapped = [pte_pfn(entry) for entry in entries if pte_present(entry)]
    return mapped == list(range(folio, folio + nr))
