"""madvise: dropping, ageing, paging out and populating ranges; fork flags.

Source of truth: mm/madvise.c (madvise_walk_vmas, madvise_dontneed_free, madvise_free_pte_range,
madvise_cold_or_pageout_pte_range, madvise_vma_behavior, madvise_populate); Linux 6.18.

DONTNEED and FREE bracket each VMA's part (CLEAR) and share one gather, which is flushed at the end; in 5.10
each VMA has its own.
COLD and PAGEOUT open no bracket of their own; PAGEOUT's reclaim brackets page by page. What these three do
to large folios is in madvise_folios.py.

MERGEABLE and UNMERGEABLE are in ksm.py, COLLAPSE is in khugepaged.py, REMOVE and what files do of WILLNEED
in madvise_file.py. Who maps a file may page it out: every process here may write to every file.

HWPOISON and SOFT_OFFLINE do to each page of the range what a memory error would.

Not modelled: guard pages, VMA names.
"""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from functools import partial
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    PMD_SIZE,
    ULONG_MAX,
    page_align,
    pmd_table,
    pte_dirty,
    pte_mkclean,
    pte_mkold,
    pte_present,
)
from host_mm.arch.x86.swapops import SWP_HWPOISON, non_swap_entry, pte_to_swp_entry, swp_type
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.gup_populate import faultin_page_range
from host_mm.gup_range import get_user_pages
from host_mm.huge_memory_map import madvise_free_huge_pmd
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.khugepaged import madvise_collapse
from host_mm.ksm import ksm_madvise
from host_mm.madvise_file import madvise_remove, madvise_willneed_file
from host_mm.madvise_folios import cold_or_pageout_huge_pmd, deactivate_folio, walk_folios
from host_mm.memory_failure import (
    MF_ACTION_REQUIRED,
    MF_COUNT_INCREASED,
    memory_failure,
    soft_offline_page,
)
from host_mm.memory_zap import zap_page_range_single_batched
from host_mm.mm_types import (
    MM_SWAPENTS,
    VM_DONTCOPY,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_IO,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_WIPEONFORK,
)
from host_mm.mmu_gather import MmuGather
from host_mm.page import PG_dirty, PG_lru, PG_swapcache, folio_mapcount, put_page
from host_mm.page_io import swap_read_folio
from host_mm.pgtable_generic import (
    pmd_entries,
    pmd_slots,
    pte_clear,
    pte_lockptr,
    pte_offset_map_lock,
    set_pte,
)
from host_mm.pgtable_huge import pmdp_get
from host_mm.swap_state import folio_free_swap, free_swap_and_cache, read_swap_cache
from host_mm.vma import vma_modify_flags, vma_set_page_prot

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "MADV_COLD", "MADV_COLLAPSE", "MADV_DOFORK", "MADV_DONTFORK", "MADV_DONTNEED", "MADV_FREE",
    "MADV_HUGEPAGE", "MADV_HWPOISON", "MADV_KEEPONFORK", "MADV_MERGEABLE", "MADV_NOHUGEPAGE", "MADV_NORMAL",
    "MADV_PAGEOUT",
    "MADV_POPULATE_READ", "MADV_POPULATE_WRITE", "MADV_RANDOM", "MADV_REMOVE", "MADV_SEQUENTIAL",
    "MADV_SOFT_OFFLINE",
    "MADV_UNMERGEABLE", "MADV_WILLNEED", "MADV_WIPEONFORK", "do_madvise",
]

MADV_NORMAL = 0
MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_WILLNEED = 3
MADV_DONTNEED = 4
MADV_FREE = 8
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_DOFORK = 11
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_WIPEONFORK = 18
MADV_KEEPONFORK = 19
MADV_COLD = 20
MADV_PAGEOUT = 21
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
MADV_HWPOISON = 100
MADV_SOFT_OFFLINE = 101

_READERS = frozenset({MADV_WILLNEED, MADV_DONTNEED, MADV_FREE, MADV_COLD, MADV_PAGEOUT, MADV_REMOVE})
_PAGES_ONLY = _READERS - {MADV_WILLNEED, MADV_REMOVE}
_VMA_FLAGS = {
    MADV_NORMAL: (0, VM_RAND_READ | VM_SEQ_READ), MADV_SEQUENTIAL: (VM_SEQ_READ, VM_RAND_READ),
    MADV_RANDOM: (VM_RAND_READ, VM_SEQ_READ), MADV_DONTFORK: (VM_DONTCOPY, 0), MADV_DOFORK: (0, VM_DONTCOPY),
    MADV_WIPEONFORK: (VM_WIPEONFORK, 0), MADV_KEEPONFORK: (0, VM_WIPEONFORK),
    MADV_HUGEPAGE: (VM_HUGEPAGE, VM_NOHUGEPAGE), MADV_NOHUGEPAGE: (VM_NOHUGEPAGE, VM_HUGEPAGE),
}
"""Advice -> (VM flags set, VM flags cleared)."""
_KSM = frozenset({MADV_MERGEABLE, MADV_UNMERGEABLE})


def do_madvise(mm: MmStruct, start: int, length: int, advice: int) -> None:
    """madvise(2). KernelError: EINVAL, ENOMEM (holes; the rest is done), EFAULT, EAGAIN.

    HWPOISON and SOFT_OFFLINE also EBUSY and EIO (memory_failure.py); pages before that one are done.
    """
    mm.host.sched.advance(COST_SYSCALL)
    size = page_align(length)
    end = start + size
    if start & 4095 or (length and not size) or end > ULONG_MAX:
        raise KernelError(EINVAL, f"{start:#x}+{length:#x} is not a page range")
    if advice in (MADV_POPULATE_READ, MADV_POPULATE_WRITE) and mm.host.profile.madv_populate:
        _populate(mm, start, end, advice == MADV_POPULATE_WRITE)
        return
    if advice in (MADV_HWPOISON, MADV_SOFT_OFFLINE):
        _inject_error(mm, start, end, advice)
        return
    collapse = advice == MADV_COLLAPSE and mm.host.profile.madv_collapse
    if advice not in _READERS | _KSM and advice not in _VMA_FLAGS and not collapse:
        raise KernelError(EINVAL, f"no advice {advice}")
    if start == end:
        return
    reader = advice in _READERS or collapse
    if reader:
        mm.mmap_lock.read_lock()
    else:
        mm.mmap_lock.lock()
    gathers = advice in (MADV_DONTNEED, MADV_FREE)
    tlb = MmuGather(mm) if gathers and mm.host.profile.madvise_gathers_once else None
    try:
        _walk_vmas(mm, start, end, advice, tlb)
    finally:
        if tlb is not None:
            tlb.finish()
        if reader:
            mm.mmap_lock.read_unlock()
        else:
            mm.mmap_lock.unlock()


def _inject_error(mm: MmStruct, start: int, end: int, advice: int) -> None:
    """madvise_inject_error: page by page, without mmap_lock; our reference goes to memory_failure."""
    for address in range(start, end, 4096):
        (pfn,) = get_user_pages(mm, address, 1)
        if advice == MADV_SOFT_OFFLINE:
            err = soft_offline_page(mm.host, pfn, MF_COUNT_INCREASED)
        else:
            err = memory_failure(mm.host, pfn, MF_ACTION_REQUIRED | MF_COUNT_INCREASED, mm.process)
        if err:
            raise KernelError(-err, f"the page at {address:#x} cannot be taken out of use")


def _walk_vmas(mm: MmStruct, start: int, end: int, advice: int, tlb: MmuGather | None) -> None:
    address = start
    hole = False
    while address < end:
        vma = mm.find_vma_intersection(address, end)
        if vma is None:
            hole = True
            break
        if address < vma.start:
            hole = True
            address = vma.start
        following = min(vma.end, end)
        _vma_behavior(vma, address, following, advice, tlb)
        address = following
    if hole:
        raise KernelError(ENOMEM, f"part of {start:#x}+{end - start:#x} is not mapped")


def _vma_behavior(vma: VmArea, start: int, end: int, advice: int, tlb: MmuGather | None) -> None:
    if advice in _PAGES_ONLY and vma.flags & (VM_LOCKED | VM_PFNMAP):
        raise KernelError(EINVAL, f"{vma!r} is locked or not made of pages")
    if vma.flags & VM_HUGETLB and advice in _PAGES_ONLY:
        if advice != MADV_DONTNEED or start & (PMD_SIZE - 1):
            raise KernelError(EINVAL, f"{vma!r} is made of huge pages")
        end &= ~(PMD_SIZE - 1)
        if start >= end:
            return
    if advice in (MADV_DONTNEED, MADV_FREE):
        gather = tlb if tlb is not None else MmuGather(vma.mm)
        if advice == MADV_DONTNEED:
            zap_page_range_single_batched(gather, vma, start, end - start)
        else:
            _free(gather, vma, start, end)
        if gather is not tlb:
            gather.finish()
    elif advice in (MADV_COLD, MADV_PAGEOUT):
        _cold_or_pageout(vma, start, end, pageout=advice == MADV_PAGEOUT)
    elif advice == MADV_WILLNEED:
        (_willneed if vma.file is None else madvise_willneed_file)(vma, start, end)
    elif advice == MADV_REMOVE:
        madvise_remove(vma, start, end)
    elif advice == MADV_COLLAPSE:
        if err := madvise_collapse(vma, start, end):
            raise KernelError(-err, f"{start:#x}+{end - start:#x} cannot become huge pages")
    else:
        _set_vma_flags(vma, start, end, advice)


def _set_vma_flags(vma: VmArea, start: int, end: int, advice: int) -> None:
    if advice == MADV_WIPEONFORK and (vma.file is not None or vma.flags & VM_SHARED):
        raise KernelError(EINVAL, "only private anonymous memory can be wiped on fork")
    if advice == MADV_DOFORK and vma.flags & VM_IO:
        raise KernelError(EINVAL, "a device mapping is never copied on fork")
    if advice in _KSM:
        err, flags = ksm_madvise(vma, start, end, mergeable=advice == MADV_MERGEABLE)
        if err:
            raise KernelError(-err, f"no memory to unmerge {start:#x}+{end - start:#x}")
    else:
        add, drop = _VMA_FLAGS[advice]
        flags = (vma.flags | add) & ~drop
        if advice == MADV_HUGEPAGE:
            vma.mm.host.khugepaged_enter_vma(vma, flags)
    if flags != vma.flags:
        vma = vma_modify_flags(vma, start, end, flags)
        vma.flags = flags
        vma_set_page_prot(vma)


def _populate(mm: MmStruct, start: int, end: int, write: bool) -> None:
    ret = faultin_page_range(mm, start, end, write=write)
    if ret:
        raise KernelError(-ret, f"cannot populate {start:#x}+{end - start:#x}")


def _willneed(vma: VmArea, start: int, end: int) -> None:
    """swapin_walk_pmd_entry: start reading what is in swap."""
    mm = vma.mm
    for pmd, address, following in pmd_entries(mm, start, end):
        for at in range(address, following, 4096):
            pte = pte_offset_map_lock(mm, pmd, at)
            if not pte:
                break
            entry = mm.host.ram.u64[pte >> 3]
            pte_lockptr(mm, pte).unlock()
            if entry and not pte_present(entry):
                swp = pte_to_swp_entry(entry)
                if not non_swap_entry(swp):
                    pfn = read_swap_cache(mm.host, swp, mm.process.home_node, swap_read_folio)
                    if pfn >= 0:
                        put_page(mm.host, pfn)
    mm.host.lru.lru_add_drain()


# -- MADV_FREE ------------------------------------------------------------------------------------
def _free(tlb: MmuGather, vma: VmArea, start: int, end: int) -> None:
    if vma.file is not None or vma.ops is not None or vma.flags & VM_SHARED:
        raise KernelError(EINVAL, "only private anonymous memory can be freed lazily")
    mm = vma.mm
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, start, end, order=mmu_notifier.ORDER_GATHER
    )
    mm.host.lru.lru_add_drain()
    mm.update_hiwater_rss()
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    for pmd, address, following in pmd_slots(mm, start, end):
        huge = not pmd_table(pmdp_get(mm, pmd))
        if not huge or not madvise_free_huge_pmd(tlb, vma, pmd, address, following):
            walk_folios(
                vma, pmd, address, following, partial(_free_present, tlb, mm), partial(_free_nonpresent, mm)
            )
        if mm.host.sched.preempt:
            mm.host.sched.point("cond_resched")
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)


def _free_nonpresent(mm: MmStruct, address: int, pte: int, entry: int) -> None:
    swp = pte_to_swp_entry(entry)
    if not non_swap_entry(swp):
        mm.rss[MM_SWAPENTS] -= 1
        free_swap_and_cache(mm.host, swp)
        pte_clear(mm, address, pte)
    elif swp_type(swp) == SWP_HWPOISON:
        pte_clear(mm, address, pte)


def _free_present(
    tlb: MmuGather, mm: MmStruct, address: int, pte: int, entry: int, folio: int, nr: int
) -> None:
    host = mm.host
    pages = host.pages
    if pages.flags[folio] & (PG_swapcache | PG_dirty):
        if not folio_trylock(host, folio):
            return
        # A page that others map too keeps its contents for them.
        keep = folio_mapcount(pages, folio) != nr
        if not keep and pages.flags[folio] & PG_swapcache:
            keep = not folio_free_swap(host, folio)
        if not keep:
            pages.flags[folio] &= ~PG_dirty
        folio_unlock(host, folio)
        if keep:
            return
    for at in range(nr):
        entry = host.ram.u64[(pte >> 3) + at]
        if entry & _PAGE_ACCESSED or pte_dirty(entry):
            set_pte(mm, address + (at << 12), pte + at * 8, pte_mkold(pte_mkclean(entry)))
            tlb.remove_tlb_entry(address + (at << 12))
    host.lru.folio_mark_lazyfree(folio)


# -- MADV_COLD and MADV_PAGEOUT -------------------------------------------------------------------
def _cold_or_pageout(vma: VmArea, start: int, end: int, *, pageout: bool) -> None:
    mm = vma.mm
    host = mm.host
    host.lru.lru_add_drain()
    tlb = MmuGather(mm)
    for pmd, address, following in pmd_slots(mm, start, end):
        isolated: list[int] | None = [] if pageout else None
        huge = not pmd_table(pmdp_get(mm, pmd))
        if not huge or not cold_or_pageout_huge_pmd(tlb, vma, pmd, address, following, isolated):
            walk_folios(vma, pmd, address, following, partial(_deactivate, tlb, mm, isolated))
        if isolated:
            host.reclaim_pages(isolated)
        if host.sched.preempt:
            host.sched.point("cond_resched")
    tlb.finish()


def _deactivate(
    tlb: MmuGather, mm: MmStruct, isolated: list[int] | None, address: int, pte: int, entry: int, folio: int,
    nr: int,
) -> None:
    host = mm.host
    if not host.pages.flags[folio] & PG_lru or folio_mapcount(host.pages, folio) != nr:
        return
    if isolated is None:
        for at in range(nr):
            entry = host.ram.u64[(pte >> 3) + at]
            if entry & _PAGE_ACCESSED:
                set_pte(mm, address + (at << 12), pte + at * 8, pte_mkold(entry))
                tlb.remove_tlb_entry(address + (at << 12))
    deactivate_folio(host, folio, isolated)
