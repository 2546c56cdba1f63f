"""Fork's copy of one VMA's page tables.

Source of truth: mm/memory.c (copy_page_range, copy_pte_range, copy_present_ptes, copy_present_page,
copy_nonpresent_pte, vma_needs_copy); Linux 6.18.

Private pages become shared: both entries lose the right to write and the page its exclusivity. A page
that may be pinned is copied for the child instead, so that the pin and the parent keep the same page.
The bracket is over the source mm's whole VMA; the flush comes at the end of dup_mmap, after it.

Not modelled: file mappings that need no copy at fork are skipped as in Linux.
"""

from __future__ import annotations

from errno import EAGAIN, ENOMEM
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_UFFD_WP,
    mk_pte,
    pmd_table,
    pte_mkclean,
    pte_mkdirty,
    pte_mkold,
    pte_present,
    pte_write,
    pte_wrprotect,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_EXCLUSIVE,
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    PTE_MARKER_UFFD_WP,
    SWP_MIGRATION_READ,
    SWP_PFN_MASK,
    SWP_PTE_MARKER,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_swap_pte,
    make_pte_marker,
    non_swap_entry,
    pte_marker_get,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)
from host_mm.huge_memory_map import copy_huge_pmd
from host_mm.hugetlb_copy import copy_hugetlb_page_range
from host_mm.kernel.costs import COST_COPY_PAGE, COST_WALK
from host_mm.memory_device import copy_device_private_entry, try_restore_exclusive_pte
from host_mm.memory_folio import folio_prealloc, maybe_mkwrite, vm_normal_page
from host_mm.mm_types import (
    MM_ANONPAGES,
    MM_SWAPENTS,
    VM_HUGETLB,
    VM_MAYWRITE,
    VM_PFNMAP,
    VM_SHARED,
    VM_UFFD_WP,
)
from host_mm.page import PG_anon, get_page, mm_counter, page_folio, put_page
from host_mm.pgtable_generic import (
    pmd_alloc,
    pmd_slots,
    pte_alloc,
    pte_lockptr,
    pte_offset_map,
    pte_offset_map_lock,
    ptep_set_wrprotect,
    set_pte,
)
from host_mm.pgtable_huge import pmdp_get
from host_mm.rmap import folio_add_new_anon_rmap, folio_dup_file_rmap_pte, folio_try_dup_anon_rmap_pte

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea

__all__ = ["copy_page_range", "is_cow_mapping"]

_DONE = 0
_NEED_PAGE = 1
_NEED_COUNT = 2
_BUSY = 3


def is_cow_mapping(flags: int) -> bool:
    """Private and possibly writable."""
    return flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE


def copy_page_range(dst_vma: VmArea, src_vma: VmArea) -> int:
    """Give the child's VMA the parent's entries; 0 or -ENOMEM."""
    if src_vma.anon_vma is None and not src_vma.flags & VM_PFNMAP and not dst_vma.flags & VM_UFFD_WP:
        return 0
    if src_vma.flags & VM_HUGETLB:
        return copy_hugetlb_page_range(dst_vma, src_vma)
    src_mm = src_vma.mm
    cow = is_cow_mapping(src_vma.flags)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_PROTECTION_PAGE, src_mm, src_vma.start, src_vma.end,
        order=mmu_notifier.ORDER_AFTER_END,
    )
    if cow:
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        src_mm.write_protect_seq += 1
    ret = 0
    for pmd, address, following in pmd_slots(src_mm, src_vma.start, src_vma.end):
        ret = -EAGAIN
        if not pmd_table(pmdp_get(src_mm, pmd)):
            ret = _copy_huge_pmd(dst_vma, src_vma, pmd, address)
        if ret == -EAGAIN:
            ret = _copy_pte_range(dst_vma, src_vma, pmd, address, following)
        if ret:
            break
    if cow:
        src_mm.write_protect_seq += 1
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return ret


def _copy_huge_pmd(dst_vma: VmArea, src_vma: VmArea, src_pmd: int, address: int) -> int:
    dst_pmd = pmd_alloc(dst_vma.mm, address)
    return copy_huge_pmd(dst_vma, src_vma, dst_pmd, src_pmd, address) if dst_pmd else -ENOMEM


def _copy_pte_range(dst_vma: VmArea, src_vma: VmArea, src_pmd: int, address: int, end: int) -> int:
    dst_mm, src_mm = dst_vma.mm, src_vma.mm
    host = src_mm.host
    spare = -1
    while address < end:
        dst_pmd = pmd_alloc(dst_mm, address)
        if not dst_pmd or not pte_alloc(dst_mm, dst_pmd):
            return -ENOMEM
        dst_pte = pte_offset_map_lock(dst_mm, dst_pmd, address)
        src_pte = pte_offset_map(src_mm, src_pmd, address)
        dst_ptl, src_ptl = pte_lockptr(dst_mm, dst_pte), pte_lockptr(src_mm, src_pte)
        src_ptl.lock(nested=True)
        address, spare, want = _copy_locked(dst_vma, src_vma, dst_pte, src_pte, address, end, spare)
        src_ptl.unlock()
        dst_ptl.unlock()
        if host.sched.preempt:
            host.sched.point("cond_resched")
        if want in (_NEED_COUNT, _BUSY):
            return -ENOMEM
        if want == _NEED_PAGE:
            spare = folio_prealloc(host, src_vma, zero=False)
            if spare < 0:
                return -ENOMEM
    if spare >= 0:
        put_page(host, spare)
    return 0


def _copy_locked(
    dst_vma: VmArea, src_vma: VmArea, dst_pte: int, src_pte: int, address: int, end: int, spare: int
) -> tuple[int, int, int]:
    """Copy entries under both locks; (next address, unused spare page, what stopped it)."""
    host = src_vma.mm.host
    u64 = host.ram.u64
    copied = 0
    want = _DONE
    while address < end:
        entry = u64[src_pte >> 3]
        if entry:
            if is_swap_pte(entry) and is_device_exclusive_entry(pte_to_swp_entry(entry)):
                if not try_restore_exclusive_pte(src_vma, address, src_pte, entry):
                    want = _BUSY
                    break
                entry = u64[src_pte >> 3]
            if not pte_present(entry):
                if not _copy_nonpresent(dst_vma, src_vma, dst_pte, src_pte, address, entry):
                    want = _NEED_COUNT
                    break
            else:
                done, spare = _copy_present(dst_vma, src_vma, dst_pte, src_pte, address, entry, spare)
                if not done:
                    want = _NEED_PAGE
                    break
            copied += 1
        dst_pte += 8
        src_pte += 8
        address += 4096
    host.sched.advance(copied * COST_WALK)
    return address, spare, want


def _copy_present(
    dst_vma: VmArea, src_vma: VmArea, dst_pte: int, src_pte: int, address: int, entry: int, spare: int
) -> tuple[bool, int]:
    """(copied, unused spare page); not copied: a spare page is needed for a pinned one."""
    host = src_vma.mm.host
    dst_mm = dst_vma.mm
    pfn = vm_normal_page(host, entry)
    if pfn >= 0:
        head = page_folio(host.pages, pfn)
        if not host.pages.flags[head] & PG_anon:
            get_page(host, pfn)
            folio_dup_file_rmap_pte(host, pfn, dst_vma)
            dst_mm.rss[mm_counter(host.pages, head)] += 1
        elif folio_try_dup_anon_rmap_pte(host, pfn, dst_vma, src_vma):
            get_page(host, pfn)
            dst_mm.rss[MM_ANONPAGES] += 1
        elif spare < 0:
            return False, -1
        else:
            _copy_present_page(dst_vma, dst_pte, address, pfn, spare)
            return True, -1
    if is_cow_mapping(src_vma.flags) and pte_write(entry):
        ptep_set_wrprotect(src_vma.mm, address, src_pte)
        entry = pte_wrprotect(entry)
    if src_vma.flags & VM_SHARED:
        entry = pte_mkclean(entry)
    if not dst_vma.flags & VM_UFFD_WP:
        entry &= ~_PAGE_UFFD_WP
    set_pte(dst_mm, address, dst_pte, pte_mkold(entry))
    return True, spare


def _copy_present_page(dst_vma: VmArea, dst_pte: int, address: int, pfn: int, new: int) -> None:
    host = dst_vma.mm.host
    host.ram.copy_page(new, pfn)
    host.sched.advance(COST_COPY_PAGE)
    folio_add_new_anon_rmap(host, new, dst_vma, address)
    host.lru.folio_add_lru_vma(new, dst_vma)
    dst_vma.mm.rss[MM_ANONPAGES] += 1
    entry = maybe_mkwrite(pte_mkdirty(mk_pte(new, dst_vma.page_prot)), dst_vma)
    set_pte(dst_vma.mm, address, dst_pte, entry)


def _copy_nonpresent(
    dst_vma: VmArea, src_vma: VmArea, dst_pte: int, src_pte: int, address: int, entry: int
) -> bool:
    src_mm, dst_mm = src_vma.mm, dst_vma.mm
    swp = pte_to_swp_entry(entry)
    if not non_swap_entry(swp):
        swap = src_mm.host.swap
        assert swap is not None
        if swap.swap_duplicate(swp) < 0:
            return False
        if entry & _PAGE_SWP_EXCLUSIVE:
            entry &= ~_PAGE_SWP_EXCLUSIVE
            set_pte(src_mm, address, src_pte, entry)
        dst_mm.rss[MM_SWAPENTS] += 1
    elif is_device_private_entry(swp):
        cow = is_cow_mapping(dst_vma.flags)
        entry = copy_device_private_entry(dst_vma, src_vma, src_pte, address, entry, cow=cow)
    elif is_migration_entry(swp):
        pages = src_mm.host.pages
        dst_mm.rss[mm_counter(pages, page_folio(pages, swp_offset(swp) & SWP_PFN_MASK))] += 1
        if swp_type(swp) != SWP_MIGRATION_READ and is_cow_mapping(dst_vma.flags):
            kept = entry & (_PAGE_SWP_SOFT_DIRTY | _PAGE_SWP_UFFD_WP)
            entry = swp_entry_to_pte(swp_entry(SWP_MIGRATION_READ, swp_offset(swp))) | kept
            set_pte(src_mm, address, src_pte, entry)
    elif swp_type(swp) == SWP_PTE_MARKER:
        marker = pte_marker_get(entry)
        if not dst_vma.flags & VM_UFFD_WP:
            marker &= ~PTE_MARKER_UFFD_WP
        if marker:
            set_pte(dst_mm, address, dst_pte, make_pte_marker(marker))
        return True
    if not dst_vma.flags & VM_UFFD_WP:
        entry &= ~_PAGE_SWP_UFFD_WP
    set_pte(dst_mm, address, dst_pte, entry)
    return True
