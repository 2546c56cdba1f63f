"""/proc/PID/clear_refs: forgetting accesses and soft-dirty bits.

Source of truth: fs/proc/task_mmu.c (clear_refs_write, clear_refs_pte_range, clear_soft_dirty); Linux 6.18.

Kinds 1 to 3 clear accessed bits and tell nobody. Kind 4 write-protects everything that is mapped inside
one bracket over the whole address space, and flushes after its end. Kind 5 makes the peak of the resident
set what it is now. The pagemap is in pagemap.py.

    --param mm.soft_dirty=N     a kernel without CONFIG_MEM_SOFT_DIRTY: of kind 4 bracket and flush remain

Not modelled: the files that only report (maps, smaps, numa_maps).
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import _PAGE_SOFT_DIRTY, pte_present, pte_wrprotect
from host_mm.arch.x86.swapops import _PAGE_SWP_SOFT_DIRTY
from host_mm.huge_memory_map import clear_refs_huge_pmd
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.memory_copy import is_cow_mapping
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import MMF_HAS_PINNED, VM_PFNMAP, VM_SOFTDIRTY
from host_mm.page import PG_referenced, PG_young, folio_maybe_dma_pinned, page_folio
from host_mm.pgtable_generic import (
    pmd_slots,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_get_and_clear,
    ptep_test_and_clear_young,
    set_pte,
)
from host_mm.vma import vma_set_page_prot

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "CLEAR_REFS_ALL", "CLEAR_REFS_ANON", "CLEAR_REFS_MAPPED", "CLEAR_REFS_MM_HIWATER_RSS",
    "CLEAR_REFS_SOFT_DIRTY", "clear_refs_write",
]

CLEAR_REFS_ALL = 1
CLEAR_REFS_ANON = 2
CLEAR_REFS_MAPPED = 3
CLEAR_REFS_SOFT_DIRTY = 4
CLEAR_REFS_MM_HIWATER_RSS = 5
_ULONG_MAX = (1 << 64) - 1


def clear_refs_write(mm: MmStruct, kind: int) -> None:
    """Write `kind` to the process's clear_refs. KernelError(EINVAL)."""
    if not CLEAR_REFS_ALL <= kind <= CLEAR_REFS_MM_HIWATER_RSS:
        raise KernelError(EINVAL, f"no kind {kind}")
    mm.host.sched.advance(COST_SYSCALL)
    mm.mmap_lock.lock()
    if kind == CLEAR_REFS_MM_HIWATER_RSS:
        mm.hiwater_rss = mm.get_mm_rss()
        mm.mmap_lock.unlock()
        return
    soft_dirty = kind == CLEAR_REFS_SOFT_DIRTY
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_SOFT_DIRTY, mm, 0, _ULONG_MAX, order=mmu_notifier.ORDER_AFTER_END
    )
    supported = mm.host.soft_dirty
    if soft_dirty:
        for vma in mm.vmas if supported else ():
            if vma.flags & VM_SOFTDIRTY:
                vma.flags &= ~VM_SOFTDIRTY
                vma_set_page_prot(vma)
        _tlb.inc_tlb_flush_pending(mm)
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    for vma in mm.vmas:
        every = kind in (CLEAR_REFS_ALL, CLEAR_REFS_SOFT_DIRTY)
        wanted = every or (kind == CLEAR_REFS_ANON) == (vma.file is None)
        # Where the kernel has no such bit it walks in vain, and sees nothing that was changed.
        if wanted and not vma.flags & VM_PFNMAP and (supported or not soft_dirty):
            _clear_vma(vma, soft_dirty)
    if soft_dirty:
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        _tlb.flush_tlb_mm(mm)
        _tlb.dec_tlb_flush_pending(mm)
    mm.mmap_lock.unlock()


def _clear_vma(vma: VmArea, soft_dirty: bool) -> None:
    mm = vma.mm
    u64 = mm.host.ram.u64
    for pmd, address, following in pmd_slots(mm, vma.start, vma.end):
        if clear_refs_huge_pmd(vma, pmd, address, soft_dirty=soft_dirty):
            continue
        pte = pte_offset_map_lock(mm, pmd, address)
        if not pte:
            continue
        ptl = pte_lockptr(mm, pte)
        while address < following:
            entry = u64[pte >> 3]
            if entry:
                if soft_dirty:
                    _clear_soft_dirty(vma, address, pte, entry)
                elif pte_present(entry):
                    _clear_young(mm, address, pte, entry)
            pte += 8
            address += 4096
        ptl.unlock()
        if mm.host.sched.preempt:
            mm.host.sched.point("cond_resched")


def _clear_young(mm: MmStruct, address: int, pte: int, entry: int) -> None:
    host = mm.host
    pfn = vm_normal_page(host, entry)
    if pfn >= 0:
        ptep_test_and_clear_young(mm, address, pte)
        host.pages.flags[page_folio(host.pages, pfn)] &= ~(PG_young | PG_referenced)


def _clear_soft_dirty(vma: VmArea, address: int, pte: int, entry: int) -> None:
    mm = vma.mm
    if not pte_present(entry):
        set_pte(mm, address, pte, entry & ~_PAGE_SWP_SOFT_DIRTY)
        return
    if _is_pinned(vma, entry):
        return
    old = ptep_get_and_clear(mm, address, pte)
    set_pte(mm, address, pte, pte_wrprotect(old) & ~_PAGE_SOFT_DIRTY)


def _is_pinned(vma: VmArea, entry: int) -> bool:
    """A pinned private page must stay writable, or the next write would COW it away from the pin."""
    host = vma.mm.host
    if not entry & 2 or not is_cow_mapping(vma.flags) or not vma.mm.flags & MMF_HAS_PINNED:
        return False
    pfn = vm_normal_page(host, entry)
    return pfn >= 0 and folio_maybe_dma_pinned(host.pages, pfn)
