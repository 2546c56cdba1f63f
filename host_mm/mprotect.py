"""mprotect and NUMA hinting: changing the rights of mapped entries.

Source of truth: mm/mprotect.c (do_mprotect_pkey, mprotect_fixup, change_protection_range,
change_pud_range, change_pte_range, can_change_private_pte_writable), arch/x86/include/asm/tlbflush.h:
pte_needs_flush; Linux 6.18.

The bracket is opened at the first populated level-3 entry and reaches to the end of the enclosing
512 GiB or of the call: a call over nothing populated fires none, one over pages never touched whose
neighbourhood is populated fires one. Linux 5.10 opens it in the level-2 walker, to the end of the 1 GiB.
The flush follows the bracket's end: what a gather found to need one, in 5.10 the VMA's whole range.

Not modelled: protection keys, userfaultfd write-protection, huge entries, prot_none_walk.
"""

from __future__ import annotations

from errno import EACCES, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_NX,
    _PAGE_PRESENT,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_USER,
    PFN_MASK,
    PGDIR_SIZE,
    PUD_SIZE,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    is_writable_migration_entry,
    pte_mkwrite,
    pte_modify,
    pte_present,
    pte_protnone,
    pte_to_swp_entry,
    pte_write,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
)
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.memory import vm_normal_page
from host_mm.mm_types import VM_ACCESS_FLAGS, VM_EXEC, VM_READ, VM_SHARED, VM_SOFTDIRTY, VM_WRITE
from host_mm.mmu_gather import MmuGather
from host_mm.page import PG_anon, PG_anon_exclusive, PG_ksm
from host_mm.pgtable_generic import (
    pmd_entries,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_get_and_clear,
    pud_entries,
    set_pte,
)
from host_mm.vma import vm_get_page_prot, vma_modify_flags

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["MM_CP_PROT_NUMA", "MM_CP_TRY_CHANGE_WRITABLE", "change_protection", "do_mprotect"]

MM_CP_TRY_CHANGE_WRITABLE = 1 << 0
MM_CP_PROT_NUMA = 1 << 1
_PAGE_NONE = vm_get_page_prot(0)
_FLUSH_ON_CLEAR = _PAGE_DIRTY | _PAGE_PRESENT | _PAGE_ACCESSED
_FLUSH_ON_CHANGE = _PAGE_RW | _PAGE_USER | _PAGE_NX


def _pte_needs_flush(old: int, new: int) -> bool:
    if not old & _PAGE_PRESENT:
        return False
    diff = old ^ new
    return bool(diff & old & _FLUSH_ON_CLEAR or diff & (_FLUSH_ON_CHANGE | PFN_MASK))


def do_mprotect(mm: MmStruct, start: int, length: int, prot: int) -> None:
    """Give [start, start+length) the rights `prot`. KernelError: EINVAL, ENOMEM (a hole), EACCES.

    What lies before a hole has been changed by then, as in Linux.
    """
    mm.host.sched.advance(COST_SYSCALL)
    end = start + ((length + 4095) & ~4095)
    if start & 4095:
        raise KernelError(EINVAL, f"{start:#x} is not page-aligned")
    if end == start:
        return
    mm.mmap_lock.lock()
    tlb = MmuGather(mm)
    try:
        address = start
        while address < end:
            vma = mm.vma_lookup(address)
            if vma is None:
                raise KernelError(ENOMEM, f"nothing is mapped at {address:#x}")
            wanted = (prot & 1 and VM_READ) | (prot & 2 and VM_WRITE) | (prot & 4 and VM_EXEC)
            if wanted & ~(vma.flags >> 4) & VM_ACCESS_FLAGS:
                raise KernelError(EACCES, f"the mapping at {address:#x} may not get these rights")
            following = min(vma.end, end)
            _mprotect_fixup(tlb, vma, address, following, (vma.flags & ~VM_ACCESS_FLAGS) | wanted)
            address = following
    finally:
        tlb.finish()
        mm.mmap_lock.unlock()


def _mprotect_fixup(tlb: MmuGather, vma: VmArea, start: int, end: int, flags: int) -> None:
    if flags == vma.flags:
        return
    vma = vma_modify_flags(vma, start, end, flags)
    vma.flags = flags | (vma.flags & VM_SOFTDIRTY)
    vma.page_prot = vm_get_page_prot(flags)
    cp = MM_CP_TRY_CHANGE_WRITABLE if flags & VM_WRITE and not flags & VM_SHARED else 0
    change_protection(tlb, vma, start, end, cp)


def change_protection(tlb: MmuGather, vma: VmArea, start: int, end: int, cp_flags: int) -> int:
    """Apply the VMA's rights (or, for NUMA hinting, none) to its entries; returns how many changed."""
    newprot = _PAGE_NONE if cp_flags & MM_CP_PROT_NUMA else vma.page_prot
    mm = vma.mm
    profile = mm.host.profile
    span = PGDIR_SIZE if profile.mprotect_bracket_level == 3 else PUD_SIZE
    gather = tlb if profile.mprotect_gathers else None
    if gather is None:
        _tlb.inc_tlb_flush_pending(mm)
    pages = 0
    address = start
    while address < end:
        following = min(end, (address & ~(span - 1)) + span)
        pages += _change_span(gather, vma, address, following, newprot, cp_flags, by_pud=span == PGDIR_SIZE)
        address = following
    if gather is None:
        if pages:
            _tlb.flush_tlb_range(mm, start, end)
        _tlb.dec_tlb_flush_pending(mm)
    return pages


def _change_span(
    tlb: MmuGather | None, vma: VmArea, start: int, end: int, newprot: int, cp_flags: int, *, by_pud: bool
) -> int:
    mm = vma.mm
    if by_pud:
        populated = pud_entries(mm, start, end)
        first = populated[0][1] if populated else end
    else:
        entries = pmd_entries(mm, start, end)
        first = entries[0][1] if entries else end
    if first >= end:
        return 0
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_PROTECTION_VMA, mm, first, end, order=mmu_notifier.ORDER_AFTER_END
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    pages = 0
    for pmd, address, following in pmd_entries(mm, first, end):
        pages += _change_pte_range(tlb, vma, pmd, address, following, newprot, cp_flags)
        if mm.host.sched.preempt:
            mm.host.sched.point("cond_resched")
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return pages


def _change_pte_range(
    tlb: MmuGather | None, vma: VmArea, pmd: int, address: int, end: int, newprot: int, cp_flags: int
) -> int:
    mm = vma.mm
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return 0
    ptl = pte_lockptr(mm, pte)
    _tlb.flush_tlb_batched_pending(mm)
    u64 = mm.host.ram.u64
    pages = 0
    while address < end:
        entry = u64[pte >> 3]
        if entry:
            if pte_present(entry):
                pages += _change_present(tlb, vma, address, pte, entry, newprot, cp_flags)
            else:
                pages += _change_nonpresent(mm, address, pte, entry)
        pte += 8
        address += 4096
    ptl.unlock()
    return pages


def _change_present(
    tlb: MmuGather | None, vma: VmArea, address: int, pte: int, entry: int, newprot: int, cp_flags: int
) -> int:
    mm = vma.mm
    host = mm.host
    pfn = vm_normal_page(host, entry)
    if cp_flags & MM_CP_PROT_NUMA and (pfn < 0 or pte_protnone(entry) or host.pages.flags[pfn] & PG_ksm):
        return 0
    old = ptep_get_and_clear(mm, address, pte)
    new = pte_modify(old, newprot)
    if cp_flags & MM_CP_TRY_CHANGE_WRITABLE and not pte_write(new) and _can_be_writable(vma, pfn, new):
        new = pte_mkwrite(new)
    set_pte(mm, address, pte, new)
    if tlb is not None and _pte_needs_flush(old, new):
        tlb.remove_tlb_entry(address)
    return 1


def _can_be_writable(vma: VmArea, pfn: int, entry: int) -> bool:
    """can_change_private_pte_writable: an exclusive page needs no COW, so no fault either."""
    if pte_protnone(entry) or pfn < 0:
        return False
    if not vma.flags & VM_SOFTDIRTY and not entry & _PAGE_SOFT_DIRTY:
        return False
    flags = vma.mm.host.pages.flags[pfn]
    return flags & (PG_anon | PG_anon_exclusive) == PG_anon | PG_anon_exclusive


def _change_nonpresent(mm: MmStruct, address: int, pte: int, entry: int) -> int:
    swp = pte_to_swp_entry(entry)
    if not is_writable_migration_entry(swp):
        return 0
    kind = SWP_MIGRATION_READ_EXCLUSIVE if mm.host.profile.anon_exclusive else SWP_MIGRATION_READ
    new = swp_entry_to_pte(swp_entry(kind, swp_offset(swp)))
    set_pte(mm, address, pte, new | (entry & _PAGE_SWP_SOFT_DIRTY))
    return 1
