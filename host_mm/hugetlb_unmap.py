"""Huge-page entries that go: unmapping, and changing rights.

Source of truth: mm/hugetlb.c (__unmap_hugepage_range, unmap_hugepage_range, __hugetlb_zap_begin,
__hugetlb_zap_end, unmap_ref_private, hugetlb_change_protection); Linux 6.18, 5.10.

The caller's bracket covers an unmapping; one that comes from the file (unmap_hugepage_range) has a bracket
of its own, widened to 1 GiB where tables may be shared. Linux 5.10 opens one, an UNMAP, in every unmapping,
inside the caller's. A shared table is unhooked as a whole, and flushed before i_mmap_rwsem is dropped,
since its last user may then free it.

Not modelled: userfaultfd markers, poisoned entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.address_space import vmas_of_pages
from host_mm.arch.x86.pgtable import (
    _PAGE_PSE,
    PMD_SIZE,
    PUD_SIZE,
    pmd_pfn,
    pte_dirty,
    pte_modify,
    pte_present,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_PFN_MASK,
    is_writable_migration_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
)
from host_mm.hugetlb import HPG_restore_reserve
from host_mm.hugetlb_resv import (
    HPAGE_RESV_OWNER,
    HPAGE_RESV_UNMAPPED,
    hugetlb_vma_lock_free,
    is_vma_resv_set,
    set_vma_resv_flags,
    vma_add_reservation,
    vma_end_reservation,
    vma_needs_reservation,
)
from host_mm.hugetlb_rmap import hugetlb_remove_rmap
from host_mm.hugetlb_share import (
    adjust_range_if_pmd_sharing_possible,
    flush_hugetlb_tlb_range,
    huge_pmd_unshare,
    hugetlb_vma_lock_write,
    hugetlb_vma_unlock_write,
    hugetlb_walk,
    last_huge_page,
    vma_private_lock,
)
from host_mm.mm_types import VM_MAYSHARE
from host_mm.mmu_gather import MmuGather
from host_mm.page import PG_anon, set_page_dirty
from host_mm.pgtable_generic import pmd_lock, set_pmd

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea

__all__ = [
    "hugetlb_change_protection", "hugetlb_zap_begin", "hugetlb_zap_end", "unmap_hugepage_range",
    "unmap_hugepages", "unmap_ref_private",
]


def unmap_hugepages(tlb: MmuGather, vma: VmArea, start: int, end: int, folio: int = -1) -> None:
    """__unmap_hugepage_range: clear the entries of [start, end), inside the caller's bracket.

    With `folio` only that one goes, and the VMA is marked as having lost a page. The VMA's hugetlb lock
    and i_mmap_rwsem are held for writing.
    """
    mm = vma.mm
    nested = None
    if mm.host.profile.hugetlb_unmap_brackets:
        nested = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_UNMAP, mm, *adjust_range_if_pmd_sharing_possible(vma, start, end),
            order=mmu_notifier.ORDER_GATHER,
        )
        mmu_notifier.mmu_notifier_invalidate_range_start(nested)
    unshared = False
    address = start
    while address < end:
        pmd = hugetlb_walk(vma, address)
        if not pmd:
            address = last_huge_page(address) + PMD_SIZE
            continue
        lock = pmd_lock(mm, pmd)
        if huge_pmd_unshare(vma, address, pmd):
            lock.unlock()
            base = address & ~(PUD_SIZE - 1)
            if "hugetlb-narrow-unshare" in mm.host.breaks:
                tlb.remove_tlb_entry(address, PMD_SIZE)
            else:
                tlb.remove_tlb_entry(base, PUD_SIZE)
            unshared = True
            address = last_huge_page(address) + PMD_SIZE
            continue
        found = _clear_entry(tlb, vma, address, pmd, folio)
        lock.unlock()
        if found >= 0:
            _restore_reserve(vma, address, found)
            if tlb.remove_page(found):
                tlb.flush()
            if folio >= 0:
                break
        address += PMD_SIZE
    if unshared:
        tlb.flush_tlbonly()
    if nested is not None:
        mmu_notifier.mmu_notifier_invalidate_range_end(nested)


def _clear_entry(tlb: MmuGather, vma: VmArea, address: int, pmd: int, folio: int) -> int:
    """Empty the locked entry; the page that lost it, or -1."""
    mm = vma.mm
    host = mm.host
    entry = host.ram.u64[pmd >> 3]
    if not entry:
        return -1
    if not pte_present(entry):
        # A page under migration is unmapped already.
        set_pmd(mm, address, pmd, 0)
        return -1
    pfn = pmd_pfn(entry)
    if folio >= 0:
        if pfn != folio:
            return -1
        set_vma_resv_flags(vma, HPAGE_RESV_UNMAPPED)
    set_pmd(mm, address, pmd, 0)
    tlb.remove_tlb_entry(address, PMD_SIZE)
    if pte_dirty(entry):
        set_page_dirty(host, pfn)
    hugetlb_remove_rmap(host, pfn)
    return pfn


def _restore_reserve(vma: VmArea, address: int, pfn: int) -> None:
    """A private page of the owner goes: the promise holds again, or somebody could take the page."""
    host = vma.mm.host
    h = host.hstate
    h.lock.lock()
    restore = not h.surplus and vma_private_lock(vma) and host.pages.flags[pfn] & PG_anon
    if restore:
        host.pages.private[pfn] |= HPG_restore_reserve
    h.lock.unlock()
    if restore:
        if vma_needs_reservation(vma, address):
            vma_add_reservation(vma, address)
        else:
            vma_end_reservation(vma, address)


# -- the callers' frame ---------------------------------------------------------------------------
def hugetlb_zap_begin(vma: VmArea, start: int, end: int) -> tuple[int, int]:
    """Before a zap of [start, end): take the locks; the range that it may unmap."""
    start, end = adjust_range_if_pmd_sharing_possible(vma, start, end)
    hugetlb_vma_lock_write(vma)
    vma.file.i_mmap_rwsem.lock()
    return start, end


def hugetlb_zap_end(vma: VmArea, *, final: bool) -> None:
    """After it. `final`: the VMA goes, and may not share its tables any more."""
    if final and vma.flags & VM_MAYSHARE and vma.private_data is not None:
        hugetlb_vma_lock_free(vma, locked=True)
    else:
        hugetlb_vma_unlock_write(vma)
    vma.file.i_mmap_rwsem.unlock()


def unmap_hugepage_range(vma: VmArea, start: int, end: int, folio: int = -1) -> None:
    """Unmap [start, end) on behalf of the file; both locks are held for writing."""
    mm = vma.mm
    range_ = None
    if not mm.host.profile.hugetlb_unmap_brackets:
        range_ = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_CLEAR, mm, *adjust_range_if_pmd_sharing_possible(vma, start, end),
            order=mmu_notifier.ORDER_GATHER,
        )
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    tlb = MmuGather(mm)
    unmap_hugepages(tlb, vma, start, end, folio)
    if range_ is not None:
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    tlb.finish()


def unmap_ref_private(vma: VmArea, pfn: int, address: int) -> None:
    """The owner of a private mapping has no page to copy to: take this one from its children.

    A child that comes back for the page is killed (VM_FAULT_SIGBUS).
    """
    mapping = vma.file
    index = vma.page_index(address)
    mapping.i_mmap_rwsem.lock()
    for other in vmas_of_pages(mapping, index, index):
        if other is vma or other.flags & VM_MAYSHARE or is_vma_resv_set(other, HPAGE_RESV_OWNER):
            continue
        there = other.address_of_index(index)
        unmap_hugepage_range(other, there, there + PMD_SIZE, pfn)
    mapping.i_mmap_rwsem.unlock()


# -- mprotect -------------------------------------------------------------------------------------
def hugetlb_change_protection(vma: VmArea, start: int, end: int, newprot: int) -> int:
    """Give the entries of [start, end) other rights, in one bracket; how many small pages changed."""
    mm = vma.mm
    wide = adjust_range_if_pmd_sharing_possible(vma, start, end)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_PROTECTION_VMA, mm, *wide, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    hugetlb_vma_lock_write(vma)
    vma.file.i_mmap_rwsem.lock()
    changed = 0
    unshared = False
    address = start
    while address < end:
        pmd = hugetlb_walk(vma, address)
        if not pmd:
            address = last_huge_page(address) + PMD_SIZE
            continue
        lock = pmd_lock(mm, pmd)
        if huge_pmd_unshare(vma, address, pmd):
            changed += 1
            unshared = True
            address = last_huge_page(address)
        else:
            changed += _change_entry(vma, address, pmd, newprot)
        lock.unlock()
        if mm.host.sched.preempt:
            mm.host.sched.point("cond_resched")
        address += PMD_SIZE
    flush_hugetlb_tlb_range(vma, *(wide if unshared else (start, end)))
    vma.file.i_mmap_rwsem.unlock()
    hugetlb_vma_unlock_write(vma)
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return changed << 9


def _change_entry(vma: VmArea, address: int, pmd: int, newprot: int) -> int:
    mm = vma.mm
    entry = mm.host.ram.u64[pmd >> 3]
    if not entry:
        return 0
    if pte_present(entry):
        set_pmd(mm, address, pmd, 0)
        set_pmd(mm, address, pmd, pte_modify(entry, newprot) | _PAGE_PSE)
        return 1
    swp = pte_to_swp_entry(entry)
    if not is_writable_migration_entry(swp):
        return 0
    anon = mm.host.pages.flags[swp_offset(swp) & SWP_PFN_MASK] & PG_anon
    kind = SWP_MIGRATION_READ_EXCLUSIVE if anon else SWP_MIGRATION_READ
    value = swp_entry_to_pte(swp_entry(kind, swp_offset(swp)))
    set_pmd(mm, address, pmd, value | (entry & _PAGE_SWP_SOFT_DIRTY))
    return 1
