"""Zapping: entries out, pages into a gather.

Source of truth: mm/memory.c (zap_pte_range, zap_present_ptes, zap_nonpresent_ptes, unmap_vmas,
zap_page_range_single_batched, free_pgtables); Linux 6.18.

The bracket's class is mmu_gather: start, entries cleared and pages queued, end, then the flush and the
free; but a full gather flushes and frees within the bracket.

A huge page that is zapped in part is split first, in a bracket of its own within.

Not modelled: PT_RECLAIM, delayed rmap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.address_space import i_mmap_remove
from host_mm.arch.x86.pgtable import PMD_SIZE, pmd_table, pte_dirty, pte_present, pte_young
from host_mm.arch.x86.swapops import (
    SWP_PFN_MASK,
    is_migration_entry,
    non_swap_entry,
    pte_to_swp_entry,
    swp_offset,
)
from host_mm.huge_memory_map import zap_huge_pmd
from host_mm.huge_memory_pmd import split_huge_pmd
from host_mm.hugetlb_unmap import hugetlb_zap_begin, hugetlb_zap_end, unmap_hugepages
from host_mm.ksm_types import ksm_might_unmap_zero_page
from host_mm.memory_device import device_entry_pfn, zap_device_entry
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import MM_SWAPENTS, VM_HUGETLB, VM_RAND_READ, VM_SEQ_READ, VM_UFFD_WP
from host_mm.mmu_gather import MmuGather
from host_mm.page import PG_anon, mm_counter, page_folio, set_page_dirty
from host_mm.pgtable_generic import (
    free_pgd_range,
    pmd_slots,
    pte_clear,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_get_and_clear,
)
from host_mm.pgtable_huge import pmdp_get
from host_mm.rmap import folio_remove_rmap_pte
from host_mm.rmap_anon_vma import unlink_anon_vmas
from host_mm.swap_state import free_swap_and_cache
from host_mm.userfaultfd_k import pte_install_uffd_wp_if_needed

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = [
    "free_pgtables", "unmap_page_range", "unmap_vmas",
    "zap_page_range_single", "zap_page_range_single_batched",
]


def unmap_page_range(
    tlb: MmuGather, vma: VmArea, start: int, end: int, *, even_cows: bool = True, drop_markers: bool = False
) -> None:
    """Clear every entry of [start, end), inside the caller's bracket; without `even_cows` no private copy.

    Write-protections of userfaultfd in a file's mapping stay behind as markers, unless `drop_markers`.
    """
    mm = vma.mm
    sched = mm.host.sched
    for pmd, address, following in pmd_slots(mm, start, end):
        if not pmd_table(pmdp_get(mm, pmd)) and _zap_huge(tlb, vma, pmd, address, following):
            continue
        at = address
        while at < following:
            at = _zap_pte_range(tlb, vma, pmd, at, following, even_cows, drop_markers)
            if sched.preempt:
                sched.point("cond_resched")


def _zap_huge(tlb: MmuGather, vma: VmArea, pmd: int, address: int, following: int) -> bool:
    """Clear a huge entry, or split it if a part of it shall stay; false: there are small entries now."""
    if following - address == PMD_SIZE:
        return zap_huge_pmd(tlb, vma, pmd, address)
    split_huge_pmd(vma, pmd, address)
    return False


def _zap_pte_range(
    tlb: MmuGather, vma: VmArea, pmd: int, address: int, end: int, even_cows: bool, drop_markers: bool
) -> int:
    """Clear entries until `end` or until the gather is full; returns the first address not done."""
    mm = vma.mm
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return end
    ptl = pte_lockptr(mm, pte)
    _tlb.flush_tlb_batched_pending(mm)
    force_flush = False
    u64 = mm.host.ram.u64
    keep_wp = not drop_markers and bool(vma.flags & VM_UFFD_WP)
    while address < end:
        entry = u64[pte >> 3]
        if entry and (even_cows or _should_zap(mm.host, entry)):
            if pte_present(entry):
                force_flush = _zap_present(tlb, vma, address, pte)
            else:
                _zap_nonpresent(vma, address, pte, entry)
            if keep_wp:
                pte_install_uffd_wp_if_needed(vma, address, pte, entry)
        pte += 8
        address += 4096
        if force_flush:
            break
    if force_flush:
        tlb.flush_tlbonly()
    ptl.unlock()
    if force_flush:
        tlb.flush()
    return address


def _should_zap(host: HostMm, entry: int) -> bool:
    """should_zap_folio: not a private copy, whether it is present, in swap or on its way."""
    flags = host.pages.flags
    if pte_present(entry):
        pfn = vm_normal_page(host, entry)
        return pfn < 0 or not flags[page_folio(host.pages, pfn)] & PG_anon
    swp = pte_to_swp_entry(entry)
    if not is_migration_entry(swp):
        return False
    return not flags[page_folio(host.pages, swp_offset(swp) & SWP_PFN_MASK)] & PG_anon


def _zap_present(tlb: MmuGather, vma: VmArea, address: int, pte: int) -> bool:
    mm = vma.mm
    host = mm.host
    old = ptep_get_and_clear(mm, address, pte)
    tlb.remove_tlb_entry(address)
    pfn = vm_normal_page(host, old)
    if pfn < 0:
        ksm_might_unmap_zero_page(mm, old)
        return False
    head = page_folio(host.pages, pfn)
    mm.rss[mm_counter(host.pages, head)] -= 1
    if not host.pages.flags[head] & PG_anon:
        if pte_dirty(old):
            set_page_dirty(host, head)
        if pte_young(old) and vma_has_recency(vma):
            host.lru.folio_mark_accessed(head)
    folio_remove_rmap_pte(host, pfn, vma)
    return tlb.remove_page(pfn)


def vma_has_recency(vma: VmArea) -> bool:
    """Whether what this VMA used should count as used: not with MADV_SEQUENTIAL or MADV_RANDOM."""
    return not vma.flags & (VM_SEQ_READ | VM_RAND_READ)


def _zap_nonpresent(vma: VmArea, address: int, pte: int, old: int) -> None:
    mm = vma.mm
    entry = pte_to_swp_entry(old)
    if (pfn := device_entry_pfn(old)) >= 0:
        zap_device_entry(vma, pfn)
    elif not non_swap_entry(entry):
        mm.rss[MM_SWAPENTS] -= 1
        free_swap_and_cache(mm.host, entry)
    elif is_migration_entry(entry):
        head = page_folio(mm.host.pages, swp_offset(entry) & SWP_PFN_MASK)
        mm.rss[mm_counter(mm.host.pages, head)] -= 1
    pte_clear(mm, address, pte)


def unmap_vmas(tlb: MmuGather, vmas: list[VmArea], start: int, end: int) -> None:
    """munmap and exit: one bracket over [start, end), then each VMA's part of it."""
    mm = tlb.mm
    mm.update_hiwater_rss()
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_UNMAP, mm, start, end, order=mmu_notifier.ORDER_GATHER
    )
    late = "start-after-clear" in mm.host.breaks
    if not late:
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    for vma in vmas:
        first, last = max(vma.start, start), min(vma.end, end)
        if first < last and vma.flags & VM_HUGETLB:
            hugetlb_zap_begin(vma, first, last)
            unmap_hugepages(tlb, vma, first, last)
            hugetlb_zap_end(vma, final=True)
        elif first < last:
            unmap_page_range(tlb, vma, first, last, drop_markers=True)
    if late:
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)


def zap_page_range_single(
    vma: VmArea, address: int, size: int, *, even_cows: bool = True, drop_markers: bool = False
) -> None:
    """Clear a part of one VMA in a bracket, with a gather of its own."""
    tlb = MmuGather(vma.mm)
    zap_page_range_single_batched(tlb, vma, address, size, even_cows=even_cows, drop_markers=drop_markers)
    tlb.finish()


def zap_page_range_single_batched(
    tlb: MmuGather, vma: VmArea, address: int, size: int, *, even_cows: bool = True,
    drop_markers: bool = False,
) -> None:
    """Clear a part of one VMA inside a bracket, into the caller's gather."""
    mm = vma.mm
    mm.update_hiwater_rss()
    huge = bool(vma.flags & VM_HUGETLB)
    start, end = address, address + size
    if huge:
        start, end = hugetlb_zap_begin(vma, start, end)
    if mm.host.profile.hugetlb_unmap_brackets:
        # There each unmapping of huge pages has a wide bracket of its own.
        start, end = address, address + size
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, start, end, order=mmu_notifier.ORDER_GATHER
    )
    late = "start-after-clear" in mm.host.breaks
    if not late:
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    if huge:
        unmap_hugepages(tlb, vma, address, address + size)
    else:
        end = address + size
        unmap_page_range(tlb, vma, address, end, even_cows=even_cows, drop_markers=drop_markers)
    if late:
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    if huge:
        hugetlb_zap_end(vma, final=False)


def free_pgtables(tlb: MmuGather, vmas: list[VmArea], floor: int, ceiling: int) -> None:
    """Hide the VMAs from rmap and unhook the tables that only they used; ceiling 0 is the top."""
    mm = tlb.mm
    for index, vma in enumerate(vmas):
        unlink_anon_vmas(vma)
        if vma.file is not None:
            with vma.file.i_mmap_rwsem:
                i_mmap_remove(vma)
        above = vmas[index + 1].start if index + 1 < len(vmas) else ceiling
        tables: list[int] = []
        free_pgd_range(mm, tables, vma.start, vma.end, floor, above)
        for pfn in tables:
            tlb.remove_table(pfn, vma.start)

