"""Huge-page entries that fork copies and mremap moves.

Source of truth: mm/hugetlb.c (copy_hugetlb_page_range, hugetlb_install_folio, move_hugetlb_page_tables,
move_huge_pte); Linux 6.18.

Fork brackets the whole source VMA if it is private, as CLEAR where other memory has PROTECTION_PAGE. A page
that may be pinned is copied for the child at once; the child was promised no page for that.

Not modelled: userfaultfd markers, poisoned entries.
"""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import PMD_SIZE, pmd_pfn, pte_present, pte_wrprotect
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    SWP_MIGRATION_READ,
    is_migration_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)
from host_mm.hugetlb import HPG_migratable
from host_mm.hugetlb_resv import alloc_hugetlb_folio, restore_reserve_on_error
from host_mm.hugetlb_rmap import (
    copy_huge_folio,
    hugetlb_add_file_rmap,
    hugetlb_add_new_anon_rmap,
    hugetlb_try_dup_anon_rmap,
    make_huge_pte,
)
from host_mm.hugetlb_share import (
    adjust_range_if_pmd_sharing_possible,
    flush_hugetlb_tlb_range,
    huge_pmd_unshare,
    huge_pte_alloc,
    hugetlb_vma_lock_read,
    hugetlb_vma_lock_write,
    hugetlb_vma_unlock_read,
    hugetlb_vma_unlock_write,
    hugetlb_walk,
    last_huge_page,
)
from host_mm.mm_types import VM_MAYWRITE, VM_SHARED
from host_mm.page import PG_anon, get_page, put_page
from host_mm.pgtable_generic import pmd_lock, pmd_lockptr, set_pmd

if TYPE_CHECKING:
    from host_mm.kernel.locks import Spinlock
    from host_mm.mm_types import VmArea

__all__ = ["copy_hugetlb_page_range", "move_hugetlb_page_tables"]


# -- fork -----------------------------------------------------------------------------------------
def copy_hugetlb_page_range(dst_vma: VmArea, src_vma: VmArea) -> int:
    """Give the child's VMA the parent's huge pages; 0 or a negative errno."""
    src_mm = src_vma.mm
    cow = src_vma.flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, src_mm, src_vma.start, src_vma.end, order=mmu_notifier.ORDER_AFTER_END
    )
    if cow:
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        src_mm.write_protect_seq += 1
    else:
        hugetlb_vma_lock_read(src_vma)
    ret = 0
    address = src_vma.start
    while address < src_vma.end and not ret:
        src_pmd = hugetlb_walk(src_vma, address)
        if not src_pmd:
            address = last_huge_page(address) + PMD_SIZE
            continue
        dst_pmd = huge_pte_alloc(dst_vma, address)
        if not dst_pmd:
            ret = -ENOMEM
        elif src_mm.host.pages.private[dst_pmd >> 12]:
            # The child uses the parent's table: nothing is left to copy.
            address = last_huge_page(address)
        else:
            ret = _copy_one(dst_vma, src_vma, dst_pmd, src_pmd, address, cow)
        address += PMD_SIZE
    if cow:
        src_mm.write_protect_seq += 1
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    else:
        hugetlb_vma_unlock_read(src_vma)
    return ret


def _lock_both(dst_vma: VmArea, src_vma: VmArea, dst_pmd: int, src_pmd: int) -> tuple[Spinlock, Spinlock]:
    dst_ptl = pmd_lock(dst_vma.mm, dst_pmd)
    src_ptl = pmd_lockptr(src_vma.mm, src_pmd)
    src_ptl.lock(nested=True)
    return dst_ptl, src_ptl


def _copy_one(
    dst_vma: VmArea, src_vma: VmArea, dst_pmd: int, src_pmd: int, address: int, cow: bool
) -> int:
    """Copy one entry; a pinned page is copied with the locks dropped, so the entry is looked at again."""
    host = src_vma.mm.host
    spare, copied_from = -1, 0
    dst_ptl, src_ptl = _lock_both(dst_vma, src_vma, dst_pmd, src_pmd)
    while True:
        entry = host.ram.u64[src_pmd >> 3]
        if spare >= 0 and entry != copied_from:
            restore_reserve_on_error(dst_vma, address, spare)
            put_page(host, spare)
            spare = -1
        if not entry or not pte_present(entry):
            if entry:
                _copy_migration(dst_vma, src_vma, dst_pmd, src_pmd, address, entry, cow)
            break
        if spare >= 0:
            _install(dst_vma, dst_pmd, address, spare)
            break
        if _share(dst_vma, src_vma, dst_pmd, src_pmd, address, entry, cow):
            break
        pfn = pmd_pfn(entry)
        get_page(host, pfn)
        src_ptl.unlock()
        dst_ptl.unlock()
        spare, copied_from = alloc_hugetlb_folio(dst_vma, address), entry
        if spare >= 0:
            copy_huge_folio(host, spare, pfn)
        put_page(host, pfn)
        if spare < 0:
            return spare
        dst_ptl, src_ptl = _lock_both(dst_vma, src_vma, dst_pmd, src_pmd)
    src_ptl.unlock()
    dst_ptl.unlock()
    return 0


def _share(
    dst_vma: VmArea, src_vma: VmArea, dst_pmd: int, src_pmd: int, address: int, entry: int, cow: bool
) -> bool:
    """Map the parent's page in the child as well; false: it may be pinned."""
    host = src_vma.mm.host
    pfn = pmd_pfn(entry)
    if not host.pages.flags[pfn] & PG_anon:
        hugetlb_add_file_rmap(host, pfn)
    elif not hugetlb_try_dup_anon_rmap(host, pfn, src_vma):
        return False
    get_page(host, pfn)
    if cow:
        entry = pte_wrprotect(entry)
        set_pmd(src_vma.mm, address, src_pmd, entry)
    set_pmd(dst_vma.mm, address, dst_pmd, entry)
    return True


def _install(vma: VmArea, pmd: int, address: int, pfn: int) -> None:
    """hugetlb_install_folio: the child's own copy of a pinned page."""
    hugetlb_add_new_anon_rmap(vma.mm.host, pfn, vma, address)
    set_pmd(vma.mm, address, pmd, make_huge_pte(vma, pfn, try_mkwrite=True))
    vma.mm.host.pages.private[pfn] |= HPG_migratable


def _copy_migration(
    dst_vma: VmArea, src_vma: VmArea, dst_pmd: int, src_pmd: int, address: int, entry: int, cow: bool
) -> None:
    swp = pte_to_swp_entry(entry)
    if is_migration_entry(swp) and swp_type(swp) != SWP_MIGRATION_READ and cow:
        soft = entry & _PAGE_SWP_SOFT_DIRTY
        entry = swp_entry_to_pte(swp_entry(SWP_MIGRATION_READ, swp_offset(swp))) | soft
        set_pmd(src_vma.mm, address, src_pmd, entry)
    set_pmd(dst_vma.mm, address, dst_pmd, entry)


# -- mremap ---------------------------------------------------------------------------------------
def move_hugetlb_page_tables(vma: VmArea, new_vma: VmArea, old: int, new: int, length: int) -> int:
    """Move the entries of `length` bytes; how many bytes are done, fewer only if there was no memory.

    What a shared table maps is not moved: faults at the new place find it in the file. The new place has a
    table of its own; Linux 6.18 looks for one to share there, too, for which it takes i_mmap_rwsem, that it
    holds: moving an unshared 1 GiB of a shared mapping to another multiple of 1 GiB never ends.
    """
    mm = vma.mm
    end = old + length
    wide = adjust_range_if_pmd_sharing_possible(vma, old, end)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, *wide, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    hugetlb_vma_lock_write(vma)
    vma.file.i_mmap_rwsem.lock()
    shared = False
    address, offset = old, new - old
    while address < end:
        src = hugetlb_walk(vma, address)
        if not src:
            address = last_huge_page(address) + PMD_SIZE
            continue
        if mm.host.ram.u64[src >> 3]:
            if huge_pmd_unshare(vma, address, src):
                shared = True
                address = last_huge_page(address) + PMD_SIZE
                continue
            dst = huge_pte_alloc(new_vma, address + offset, share=False)
            if not dst:
                break
            _move_one(vma, src, dst, address, address + offset)
        address += PMD_SIZE
    flush_hugetlb_tlb_range(vma, *(wide if shared else (old, end)))
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    vma.file.i_mmap_rwsem.unlock()
    hugetlb_vma_unlock_write(vma)
    return min(address, end) - old


def _move_one(vma: VmArea, src: int, dst: int, old: int, new: int) -> None:
    mm = vma.mm
    dst_ptl = pmd_lock(mm, dst)
    src_ptl = pmd_lockptr(mm, src)
    if src_ptl is not dst_ptl:
        src_ptl.lock(nested=True)
    entry = mm.host.ram.u64[src >> 3]
    set_pmd(mm, old, src, 0)
    set_pmd(mm, new, dst, entry)
    if src_ptl is not dst_ptl:
        src_ptl.unlock()
    dst_ptl.unlock()
