"""The small pages of 2 MiB of anonymous memory become one huge page.

Source of truth: mm/khugepaged.c (collapse_huge_page, __collapse_huge_page_isolate,
__collapse_huge_page_copy, __collapse_huge_page_swapin, alloc_charge_folio, hugepage_vma_revalidate,
find_pmd_or_thp_or_none); Linux 6.18.

    allocate        without any lock; then look again whether the VMA is still what it was
    swap in         under mmap_lock for reading, if anything is swapped out
    unhook          under mmap_lock for writing and the anon_vma's lock: the level-2 entry is cleared and
                    flushed in a bracket (CLEAR, 2 MiB), which ends at once; nobody finds the table now
    isolate         every page is locked and taken off the LRU; one that somebody holds ends it, and the
                    table is hooked in again, without a bracket
    copy            outside of all brackets: no fault gets past mmap_lock, no rmap walk past the folio lock
    install         the table is put by, and the huge entry set: without a bracket, nothing was mapped

Not modelled: memory errors during the copy, node_reclaim_mode, PR_SET_THP_DISABLE.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_UFFD_WP,
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    PFN_MASK,
    PMD_SIZE,
    is_swap_pmd,
    pmd_present,
    pmd_trans_huge,
    pte_pfn,
    pte_present,
)
from host_mm.arch.x86.swapops import is_swap_pte
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.huge_memory import map_anon_folio_pmd
from host_mm.huge_mm import (
    GFP_TRANSHUGE,
    TVA_FORCED_COLLAPSE,
    TVA_KHUGEPAGED,
    deferred_split_folio,
    thp_vma_allowable_order,
    thp_vma_suitable_order,
    vma_is_anonymous,
)
from host_mm.kernel.costs import COST_COPY_HUGE_PAGE, COST_SCAN_PAGE
from host_mm.khugepaged_trace import (
    SCAN_ADDRESS_RANGE,
    SCAN_ALLOC_HUGE_PAGE_FAIL,
    SCAN_ANY_PROCESS,
    SCAN_CGROUP_CHARGE_FAIL,
    SCAN_DEL_PAGE_LRU,
    SCAN_EXCEED_NONE_PTE,
    SCAN_EXCEED_SHARED_PTE,
    SCAN_FAIL,
    SCAN_LACK_REFERENCED_PAGE,
    SCAN_PAGE_ANON,
    SCAN_PAGE_COUNT,
    SCAN_PAGE_LOCK,
    SCAN_PAGE_NULL,
    SCAN_PMD_MAPPED,
    SCAN_PMD_NONE,
    SCAN_PMD_NULL,
    SCAN_PTE_NON_PRESENT,
    SCAN_PTE_UFFD_WP,
    SCAN_SUCCEED,
    SCAN_VMA_CHECK,
    SCAN_VMA_NULL,
)
from host_mm.ksm_types import ksm_might_unmap_zero_page
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import (
    FAULT_FLAG_ALLOW_RETRY,
    MM_ANONPAGES,
    VM_FAULT_ERROR,
    VM_FAULT_RETRY,
    VmFault,
)
from host_mm.page import (
    PG_anon,
    PG_referenced,
    PG_swapcache,
    PG_uptodate,
    PG_young,
    folio_mapcount,
    folio_maybe_mapped_shared,
    folio_nr_pages,
    page_folio,
    put_page,
)
from host_mm.page_alloc import GFP_THISNODE, alloc_pages
from host_mm.pgtable_generic import (
    mm_find_pmd,
    pmd_lock,
    pte_lockptr,
    pte_offset_map,
    ptep_get,
    ptep_get_and_clear,
)
from host_mm.pgtable_huge import pgtable_trans_huge_deposit, pmd_populate, pmdp_collapse_flush, pmdp_get
from host_mm.rmap import folio_remove_rmap_pte
from host_mm.swap_state import free_swap_cache
from host_mm.swapin import do_swap_page
from host_mm.userfaultfd_k import userfaultfd_armed

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.locks import Spinlock
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "CollapseControl", "alloc_charge_folio", "collapse_huge_page", "collapse_test_exit",
    "find_pmd_or_thp_or_none", "folio_expected_ref_count", "hugepage_vma_revalidate", "pte_is_young",
]


class CollapseControl:
    """struct collapse_control: who collapses, and on which nodes the pages are."""

    __slots__ = ("is_khugepaged", "node_load")

    def __init__(self, *, is_khugepaged: bool) -> None:
        self.is_khugepaged = is_khugepaged
        self.node_load: Counter[int] = Counter()


def collapse_test_exit(mm: MmStruct) -> bool:
    """Whether the address space is about to go."""
    return mm.mm_users == 0


def folio_expected_ref_count(host: HostMm, folio: int) -> int:
    """The references of the page cache, the swap cache and the page tables."""
    pages = host.pages
    flags = pages.flags[folio]
    nr = folio_nr_pages(pages, folio)
    held = nr if flags & PG_swapcache or (not flags & PG_anon and folio in pages.mapping) else 0
    return held + folio_mapcount(pages, folio)


def pte_is_young(mm: MmStruct, entry: int, folio: int, address: int) -> bool:
    """Whether the page was used, by what any of the CPUs' and devices' accessed bits say."""
    flags = mm.host.pages.flags[folio]
    return bool(
        entry & _PAGE_ACCESSED or flags & (PG_young | PG_referenced)
        or mmu_notifier.mmu_notifier_test_young(mm, address)
    )


def alloc_charge_folio(mm: MmStruct, cc: CollapseControl) -> tuple[str, int]:
    """(SCAN_*, a huge folio of the node that most of the pages are on)."""
    host = mm.host
    most = max(cc.node_load.values(), default=0)
    nodes = [node.nid for node in host.nodes if cc.node_load[node.nid] == most]
    folio = -1
    if len(nodes) == len(host.nodes):
        folio = alloc_pages(host, GFP_TRANSHUGE, HPAGE_PMD_ORDER, nodes[0])
    else:
        for nid in nodes:
            folio = alloc_pages(host, GFP_TRANSHUGE | GFP_THISNODE, HPAGE_PMD_ORDER, nid)
            if folio >= 0:
                break
    if folio < 0:
        host.vmstat["thp_collapse_alloc_failed"] += 1
        return SCAN_ALLOC_HUGE_PAGE_FAIL, -1
    host.vmstat["thp_collapse_alloc"] += 1
    if host.memcg.charge(folio, mm, GFP_TRANSHUGE):
        put_page(host, folio)
        return SCAN_CGROUP_CHARGE_FAIL, -1
    return SCAN_SUCCEED, folio


# -- is it still there? -------------------------------------------------------------------------
def hugepage_vma_revalidate(
    mm: MmStruct, address: int, cc: CollapseControl, *, expect_anon: bool
) -> tuple[str, VmArea | None]:
    """mmap_lock was dropped: (SCAN_*, the VMA)."""
    if collapse_test_exit(mm):
        return SCAN_ANY_PROCESS, None
    vma = mm.find_vma(address)
    if vma is None:
        return SCAN_VMA_NULL, None
    if not thp_vma_suitable_order(vma, address):
        return SCAN_ADDRESS_RANGE, None
    tva = TVA_KHUGEPAGED if cc.is_khugepaged else TVA_FORCED_COLLAPSE
    if not thp_vma_allowable_order(vma, vma.flags, tva):
        return SCAN_VMA_CHECK, None
    if expect_anon and (vma.anon_vma is None or not vma_is_anonymous(vma)):
        return SCAN_PAGE_ANON, None
    return SCAN_SUCCEED, vma


def find_pmd_or_thp_or_none(mm: MmStruct, address: int) -> tuple[str, int]:
    """(SCAN_SUCCEED, the level-2 entry) if a table hangs there, else what is there instead."""
    pmd = mm_find_pmd(mm, address) if mm.pgd else 0
    if not pmd:
        return SCAN_PMD_NULL, 0
    entry = pmdp_get(mm, pmd)
    if not entry:
        return SCAN_PMD_NONE, pmd
    if is_swap_pmd(entry) or pmd_trans_huge(entry):
        return SCAN_PMD_MAPPED, pmd
    return (SCAN_SUCCEED if pmd_present(entry) else SCAN_PMD_NULL), pmd


# -- the collapse -------------------------------------------------------------------------------
def _swapin(mm: MmStruct, vma: VmArea, start: int, pmd: int, referenced: int) -> str:
    """__collapse_huge_page_swapin: unless it succeeds, mmap_lock is released."""
    host = mm.host
    swapped_in, result = 0, SCAN_SUCCEED
    for address in range(start, start + PMD_SIZE, 4096):
        pte = pte_offset_map(mm, pmd, address)
        if not pte:
            mm.mmap_lock.read_unlock()
            result = SCAN_PMD_NULL
            break
        vmf = VmFault(vma, address, FAULT_FLAG_ALLOW_RETRY)
        vmf.pmd = pmd
        vmf.orig_pte = ptep_get(mm, pte)
        if not is_swap_pte(vmf.orig_pte):
            continue
        ret = do_swap_page(vmf)
        if ret & VM_FAULT_RETRY:
            result = SCAN_PAGE_LOCK
            break
        if ret & VM_FAULT_ERROR:
            mm.mmap_lock.read_unlock()
            result = SCAN_FAIL
            break
        swapped_in += 1
    else:
        if swapped_in:
            host.lru.lru_add_drain()
    if (t := host.trace.mm_collapse_huge_page_swapin) is not None:
        t(mm.pgd, swapped_in, referenced, result)
    return result


def collapse_huge_page(
    mm: MmStruct, address: int, referenced: int, unmapped: int, cc: CollapseControl
) -> str:
    """Collapse the 2 MiB at `address`; mmap_lock is held for reading and released. SCAN_*."""
    host = mm.host
    mm.mmap_lock.read_unlock()
    result, folio = alloc_charge_folio(mm, cc)
    if result == SCAN_SUCCEED:
        result = _collapse_into(mm, address, folio, referenced, unmapped, cc)
        if result != SCAN_SUCCEED:
            put_page(host, folio)
    if (t := host.trace.mm_collapse_huge_page) is not None:
        t(mm.pgd, int(result == SCAN_SUCCEED), result)
    return result


def _collapse_into(
    mm: MmStruct, address: int, folio: int, referenced: int, unmapped: int, cc: CollapseControl
) -> str:
    mm.mmap_lock.read_lock()
    result, vma = hugepage_vma_revalidate(mm, address, cc, expect_anon=True)
    pmd = 0
    if vma is not None:
        result, pmd = find_pmd_or_thp_or_none(mm, address)
    if vma is None or result != SCAN_SUCCEED:
        mm.mmap_lock.read_unlock()
        return result
    if unmapped:
        result = _swapin(mm, vma, address, pmd, referenced)
        if result != SCAN_SUCCEED:
            return result
    mm.mmap_lock.read_unlock()
    mm.mmap_lock.lock()
    result, vma = hugepage_vma_revalidate(mm, address, cc, expect_anon=True)
    if vma is not None:
        result, still = find_pmd_or_thp_or_none(mm, address)
        if result == SCAN_SUCCEED and still != pmd:
            result = SCAN_FAIL
        if result == SCAN_SUCCEED:
            result = _collapse_locked(vma, address, pmd, folio, cc)
    mm.mmap_lock.unlock()
    return result


def _collapse_locked(vma: VmArea, address: int, pmd: int, folio: int, cc: CollapseControl) -> str:
    """mmap_lock is held for writing, and `pmd` has a table."""
    mm = vma.mm
    host = mm.host
    anon_vma = vma.anon_vma
    assert anon_vma is not None
    anon_vma.root.rwsem.lock()
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, address, address + PMD_SIZE
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    pmd_ptl = pmd_lock(mm, pmd)
    table = (pmdp_collapse_flush(mm, address, pmd) & PFN_MASK) >> 12
    pmd_ptl.unlock()
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    pte = table << 12
    ptl = pte_lockptr(mm, pte)
    ptl.lock()
    result = _isolate(vma, address, pte, cc)
    ptl.unlock()
    if result != SCAN_SUCCEED:
        pmd_ptl.lock()
        pmd_populate(mm, address, pmd, table)
        pmd_ptl.unlock()
        anon_vma.root.rwsem.unlock()
        return result
    anon_vma.root.rwsem.unlock()
    _copy(vma, address, pte, folio, ptl)
    host.pages.flags[folio] |= PG_uptodate
    pmd_ptl.lock()
    pgtable_trans_huge_deposit(mm, pmd, table)
    map_anon_folio_pmd(vma, address, pmd, folio)
    deferred_split_folio(host, folio, partially_mapped=False)
    pmd_ptl.unlock()
    return SCAN_SUCCEED


def _isolate(vma: VmArea, start: int, pte: int, cc: CollapseControl) -> str:
    """__collapse_huge_page_isolate: lock every page and take it off the LRU, or give all of them back."""
    host = vma.mm.host
    large: list[int] = []
    isolated: list[int] = []
    counts = [0, 0, 0]
    result, folio = SCAN_SUCCEED, -1
    for index in range(HPAGE_PMD_NR):
        entry = host.ram.u64[(pte >> 3) + index]
        result, folio = _isolate_one(vma, start + index * 4096, entry, cc, counts, large, isolated)
        if result != SCAN_SUCCEED:
            break
    none_or_zero, _, referenced = counts
    if result == SCAN_SUCCEED and cc.is_khugepaged and not referenced:
        result = SCAN_LACK_REFERENCED_PAGE
    if result != SCAN_SUCCEED:
        for taken in isolated:
            folio_unlock(host, taken)
            host.lru.folio_putback_lru(taken)
    if (t := host.trace.mm_collapse_huge_page_isolate) is not None:
        t(folio, none_or_zero, referenced, result)
    return result


def _isolate_one(
    vma: VmArea, address: int, entry: int, cc: CollapseControl, counts: list[int], large: list[int],
    isolated: list[int],
) -> tuple[str, int]:
    """(SCAN_*, the folio). `counts`: none or zero, shared, referenced."""
    host = vma.mm.host
    pages = host.pages
    most = host.khugepaged
    if not entry or (pte_present(entry) and pte_pfn(entry) == host.zero_pfn):
        counts[0] += 1
        if not userfaultfd_armed(vma) and (not cc.is_khugepaged or counts[0] <= most.max_ptes_none):
            return SCAN_SUCCEED, isolated[-1] if isolated else -1
        host.vmstat["thp_scan_exceed_none_pte"] += 1
        return SCAN_EXCEED_NONE_PTE, -1
    if not pte_present(entry):
        return SCAN_PTE_NON_PRESENT, -1
    if entry & _PAGE_UFFD_WP:
        return SCAN_PTE_UFFD_WP, -1
    pfn = vm_normal_page(host, entry)
    if pfn < 0:
        return SCAN_PAGE_NULL, -1
    folio = page_folio(pages, pfn)
    if folio_maybe_mapped_shared(pages, folio):
        counts[1] += 1
        if cc.is_khugepaged and counts[1] > most.max_ptes_shared:
            host.vmstat["thp_scan_exceed_share_pte"] += 1
            return SCAN_EXCEED_SHARED_PTE, folio
    if folio not in large:
        if not folio_trylock(host, folio):
            return SCAN_PAGE_LOCK, folio
        # New references come only from other processes now, which cannot write to the page.
        if folio_expected_ref_count(host, folio) != pages.refcount[folio]:
            folio_unlock(host, folio)
            return SCAN_PAGE_COUNT, folio
        if not host.lru.folio_isolate_lru(folio):
            folio_unlock(host, folio)
            return SCAN_DEL_PAGE_LRU, folio
        isolated.append(folio)
        if folio_nr_pages(pages, folio) > 1:
            large.append(folio)
    if cc.is_khugepaged and pte_is_young(vma.mm, entry, folio, address):
        counts[2] += 1
    return SCAN_SUCCEED, folio


def _copy(vma: VmArea, address: int, pte: int, folio: int, ptl: Spinlock) -> None:
    """__collapse_huge_page_copy: nobody can write to the pages, nobody finds their entries."""
    mm = vma.mm
    host = mm.host
    if host.sched.preempt:
        host.sched.point("collapse-copy")
    first = pte >> 3
    for index in range(HPAGE_PMD_NR):
        entry = host.ram.u64[first + index]
        if not entry or pte_pfn(entry) == host.zero_pfn:
            host.ram.clear_page(folio + index)
        else:
            host.ram.copy_page(folio + index, pte_pfn(entry))
    host.sched.advance(COST_COPY_HUGE_PAGE)
    large: list[int] = []
    for index in range(HPAGE_PMD_NR):
        entry = host.ram.u64[first + index]
        at, where = pte + index * 8, address + index * 4096
        if not entry or pte_pfn(entry) == host.zero_pfn:
            if entry:
                ptl.lock()
                ptep_get_and_clear(mm, where, at)
                ptl.unlock()
                ksm_might_unmap_zero_page(mm, entry)
            continue
        src = page_folio(host.pages, pte_pfn(entry))
        if folio_nr_pages(host.pages, src) == 1:
            folio_unlock(host, src)
            host.lru.folio_putback_lru(src)
        elif src not in large:
            large.append(src)
        ptl.lock()
        ptep_get_and_clear(mm, where, at)
        folio_remove_rmap_pte(host, pte_pfn(entry), vma)
        ptl.unlock()
        mm.rss[MM_ANONPAGES] -= 1
        free_swap_cache(host, src)
        put_page(host, src)
    for src in large:
        folio_unlock(host, src)
        free_swap_cache(host, src)
        host.lru.folio_putback_lru(src)
    host.sched.advance(COST_SCAN_PAGE)
