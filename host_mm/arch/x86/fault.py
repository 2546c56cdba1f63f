"""The host CPU's own access to user memory: TLB, hardware walk, page fault.

Source of truth: arch/x86/mm/fault.c (do_user_addr_fault, access_error); SDM vol. 3A 5.8 (accessed and
dirty flags), 5.10 (what the TLB may cache); Linux 6.18.

Not modelled: per-VMA locks, stack growth, protection keys, kernel-mode exception tables (the caller
turns a refused access into an errno).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_PRESENT,
    _PAGE_RW,
    _PAGE_USER,
    HPAGE_PMD_NR,
    PFN_MASK,
    pmd_trans_huge,
)
from host_mm.kernel.costs import COST_WALK
from host_mm.memory import handle_mm_fault
from host_mm.mm_types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_KILLABLE,
    FAULT_FLAG_TRIED,
    FAULT_FLAG_USER,
    FAULT_FLAG_WRITE,
    VM_ACCESS_FLAGS,
    VM_FAULT_BADMAP,
    VM_FAULT_ERROR,
    VM_FAULT_RETRY,
    VM_WRITE,
)
from host_mm.pgtable_generic import pmd_offset, pte_offset_map

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from host_mm.tlb import HostTlb

__all__ = ["do_user_addr_fault", "hardware_walk", "translate", "translate_nofault"]


def do_user_addr_fault(mm: MmStruct, address: int, *, write: bool) -> int:
    """Resolve a user access that the tables refused: 0, or VM_FAULT_* bits that say why not."""
    flags = FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_KILLABLE | FAULT_FLAG_USER
    if write:
        flags |= FAULT_FLAG_WRITE
    while True:
        mm.mmap_lock.read_lock()
        vma = mm.vma_lookup(address)
        allowed = VM_WRITE if write else VM_ACCESS_FLAGS
        if vma is None or not vma.flags & allowed:
            mm.mmap_lock.read_unlock()
            return VM_FAULT_BADMAP
        ret = handle_mm_fault(vma, address, flags)
        if not ret & VM_FAULT_RETRY:
            mm.mmap_lock.read_unlock()
            return ret & VM_FAULT_ERROR
        flags |= FAULT_FLAG_TRIED


def hardware_walk(mm: MmStruct, address: int, write: bool, tlb: HostTlb) -> int:
    """The hardware walk with its A and D updates: a frame, which `tlb` learns, or -1 for a page fault."""
    pmd = pmd_offset(mm, address)
    if not pmd:
        return -1
    u64 = mm.host.ram.u64
    offset = 0
    at = pmd
    if pmd_trans_huge(u64[pmd >> 3]):
        offset = (address >> 12) & (HPAGE_PMD_NR - 1)
    else:
        at = pte_offset_map(mm, pmd, address)
        if not at:
            return -1
    entry = u64[at >> 3]
    wanted = _PAGE_PRESENT | _PAGE_USER | (_PAGE_RW if write else 0)
    if entry & wanted != wanted:
        return -1
    update = entry | _PAGE_ACCESSED | (_PAGE_DIRTY if write else 0)
    if update != entry:
        u64[at >> 3] = update
    pfn = ((entry & PFN_MASK) >> 12) + offset
    tlb.fill(address, pfn, bool(update & _PAGE_RW and update & _PAGE_DIRTY))
    return pfn


def translate_nofault(mm: MmStruct, address: int, *, write: bool) -> int:
    """The frame a user access reaches without a fault, or -1."""
    pfn: int = mm.tlb.lookup(address, write)
    if pfn >= 0:
        return pfn
    mm.host.sched.advance(COST_WALK)
    return hardware_walk(mm, address, write, mm.tlb)


def translate(mm: MmStruct, address: int, *, write: bool) -> int:
    """The frame a user access reaches, through the TLB, the tables and, if need be, faults.

    Negative: the VM_FAULT_* bits of the refusal, negated.
    """
    pfn: int = mm.tlb.lookup(address, write)
    if pfn >= 0:
        return pfn
    mm.host.sched.advance(COST_WALK)
    while True:
        pfn = hardware_walk(mm, address, write, mm.tlb)
        if pfn >= 0:
            return pfn
        ret = do_user_addr_fault(mm, address, write=write)
        if ret:
            return -ret
