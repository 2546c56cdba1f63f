"""khugepaged, which looks for memory that could be huge pages, and MADV_COLLAPSE, which asks for it.

Source of truth: mm/khugepaged.c (hpage_collapse_scan_pmd, khugepaged_scan_mm_slot, khugepaged_do_scan,
khugepaged_wait_work, madvise_collapse, madvise_collapse_errno, hugepage_madvise); Linux 6.18.

The daemon starts with the first address space that may have huge pages. A round looks at pages_to_scan
entries, then it sleeps. It collapses 2 MiB in which something was used of late and not too much is
missing, swapped out or shared (max_ptes_*); MADV_COLLAPSE asks for none of that. The collapse itself is in
khugepaged_collapse.py, that of shared memory in khugepaged_file.py.

Not modelled: recommended min_free_kbytes, changing the policy while the machine runs.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.address_space import fput, get_file
from host_mm.arch.x86.pgtable import _PAGE_UFFD_WP, HPAGE_PMD_NR, PMD_SIZE, pte_pfn
from host_mm.arch.x86.swapops import is_swap_pte, pte_swp_uffd_wp_any
from host_mm.huge_mm import TVA_FORCED_COLLAPSE, TVA_KHUGEPAGED, thp_vma_allowable_order, vma_is_anonymous
from host_mm.kernel.costs import COST_SCAN_PAGE
from host_mm.khugepaged_collapse import (
    CollapseControl,
    collapse_huge_page,
    collapse_test_exit,
    find_pmd_or_thp_or_none,
    folio_expected_ref_count,
    hugepage_vma_revalidate,
    pte_is_young,
)
from host_mm.khugepaged_file import collapse_pte_mapped_thp, hpage_collapse_scan_file
from host_mm.khugepaged_trace import (
    SCAN_ALLOC_HUGE_PAGE_FAIL,
    SCAN_CGROUP_CHARGE_FAIL,
    SCAN_DEL_PAGE_LRU,
    SCAN_EXCEED_NONE_PTE,
    SCAN_EXCEED_SHARED_PTE,
    SCAN_EXCEED_SWAP_PTE,
    SCAN_FAIL,
    SCAN_LACK_REFERENCED_PAGE,
    SCAN_PAGE_ANON,
    SCAN_PAGE_COMPOUND,
    SCAN_PAGE_COUNT,
    SCAN_PAGE_FILLED,
    SCAN_PAGE_LOCK,
    SCAN_PAGE_LRU,
    SCAN_PAGE_NULL,
    SCAN_PMD_MAPPED,
    SCAN_PMD_NULL,
    SCAN_PTE_MAPPED_HUGEPAGE,
    SCAN_PTE_NON_PRESENT,
    SCAN_PTE_UFFD_WP,
    SCAN_SUCCEED,
)
from host_mm.memory_folio import vm_normal_page
from host_mm.page import PG_anon, PG_locked, PG_lru, folio_maybe_mapped_shared, page_folio
from host_mm.pgtable_generic import pte_lockptr, pte_offset_map_lock
from host_mm.userfaultfd_k import userfaultfd_armed

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "hpage_collapse_scan_pmd", "khugepaged", "khugepaged_do_scan", "madvise_collapse",
    "scan_sleep_millisecs_store",
]

_MSEC = 1_000_000
_GOES_ON = frozenset({
    SCAN_PMD_NULL, SCAN_PTE_NON_PRESENT, SCAN_PTE_UFFD_WP, SCAN_LACK_REFERENCED_PAGE, SCAN_PAGE_NULL,
    SCAN_PAGE_COUNT, SCAN_PAGE_LOCK, SCAN_PAGE_LRU, SCAN_DEL_PAGE_LRU, SCAN_PAGE_COMPOUND,
})
"""MADV_COLLAPSE does the rest of its range after one of these."""
_ERRNO = {
    SCAN_ALLOC_HUGE_PAGE_FAIL: ENOMEM, SCAN_CGROUP_CHARGE_FAIL: EBUSY, SCAN_EXCEED_NONE_PTE: EBUSY,
    SCAN_PAGE_COUNT: EAGAIN, SCAN_PAGE_LOCK: EAGAIN, SCAN_PAGE_LRU: EAGAIN, SCAN_DEL_PAGE_LRU: EAGAIN,
    SCAN_PAGE_FILLED: EAGAIN,
}


class _Scan:
    """One table under examination: what was counted so far, and the folio that was looked at last."""

    __slots__ = ("cc", "folio", "none_or_zero", "referenced", "shared", "unmapped", "vma")

    def __init__(self, vma: VmArea, cc: CollapseControl) -> None:
        self.vma = vma
        self.cc = cc
        self.folio = -1
        self.none_or_zero = self.shared = self.unmapped = self.referenced = 0

    def table(self, pte: int, start: int) -> str:
        """Every entry of the locked table."""
        u64 = self.vma.mm.host.ram.u64
        for index in range(HPAGE_PMD_NR):
            result = self._entry(u64[(pte >> 3) + index], start + index * 4096)
            if result != SCAN_SUCCEED:
                return result
        few = not self.referenced or (self.unmapped and self.referenced < HPAGE_PMD_NR // 2)
        return SCAN_LACK_REFERENCED_PAGE if self.cc.is_khugepaged and few else SCAN_SUCCEED

    def _entry(self, entry: int, address: int) -> str:
        host, cc = self.vma.mm.host, self.cc
        most = host.khugepaged
        if is_swap_pte(entry):
            self.unmapped += 1
            if cc.is_khugepaged and self.unmapped > most.max_ptes_swap:
                host.vmstat["thp_scan_exceed_swap_pte"] += 1
                return SCAN_EXCEED_SWAP_PTE
            return SCAN_PTE_UFFD_WP if pte_swp_uffd_wp_any(entry) else SCAN_SUCCEED
        if not entry or pte_pfn(entry) == host.zero_pfn:
            self.none_or_zero += 1
            over = cc.is_khugepaged and self.none_or_zero > most.max_ptes_none
            if not over and not userfaultfd_armed(self.vma):
                return SCAN_SUCCEED
            host.vmstat["thp_scan_exceed_none_pte"] += 1
            return SCAN_EXCEED_NONE_PTE
        if entry & _PAGE_UFFD_WP:
            return SCAN_PTE_UFFD_WP
        pfn = vm_normal_page(host, entry)
        if pfn < 0:
            return SCAN_PAGE_NULL
        return self._page(page_folio(host.pages, pfn), entry, address)

    def _page(self, folio: int, entry: int, address: int) -> str:
        host, cc = self.vma.mm.host, self.cc
        pages = host.pages
        self.folio = folio
        if not pages.flags[folio] & PG_anon:
            return SCAN_PAGE_ANON
        if folio_maybe_mapped_shared(pages, folio):
            self.shared += 1
            if cc.is_khugepaged and self.shared > host.khugepaged.max_ptes_shared:
                host.vmstat["thp_scan_exceed_share_pte"] += 1
                return SCAN_EXCEED_SHARED_PTE
        cc.node_load[host.allocator.nid_of(folio)] += 1
        if not pages.flags[folio] & PG_lru:
            return SCAN_PAGE_LRU
        if pages.flags[folio] & PG_locked:
            return SCAN_PAGE_LOCK
        if folio_expected_ref_count(host, folio) != pages.refcount[folio]:
            return SCAN_PAGE_COUNT
        if cc.is_khugepaged and pte_is_young(self.vma.mm, entry, folio, address):
            self.referenced += 1
        return SCAN_SUCCEED


def hpage_collapse_scan_pmd(vma: VmArea, start: int, cc: CollapseControl) -> tuple[str, bool]:
    """Collapse the 2 MiB of anonymous memory at `start` if they are worth it.

    (SCAN_*, whether mmap_lock, which is held for reading, still is).
    """
    mm = vma.mm
    host = mm.host
    cc.node_load.clear()
    scan = _Scan(vma, cc)
    locked = True
    result, pmd = find_pmd_or_thp_or_none(mm, start)
    if result == SCAN_SUCCEED:
        pte = pte_offset_map_lock(mm, pmd, start)
        result = SCAN_PMD_NULL
        if pte:
            result = scan.table(pte, start)
            pte_lockptr(mm, pte).unlock()
            host.sched.advance(COST_SCAN_PAGE * HPAGE_PMD_NR // 16)
        if result == SCAN_SUCCEED:
            locked = False
            result = collapse_huge_page(mm, start, scan.referenced, scan.unmapped, cc)
    if (t := host.trace.mm_khugepaged_scan_pmd) is not None:
        t(mm.pgd, scan.folio, scan.referenced, scan.none_or_zero, result, scan.unmapped)
    return result, locked


# -- the daemon ---------------------------------------------------------------------------------
def _scan_mm(mm: MmStruct, pages: int, cc: CollapseControl) -> tuple[int, str, bool]:
    """khugepaged_scan_mm_slot under mmap_lock: (entries looked at, SCAN_*, whether the mm is done)."""
    state = mm.host.khugepaged
    result, progress = SCAN_FAIL, 0
    if not mm.mmap_lock.read_trylock():
        # Whoever changes the address space will be some time.
        return progress, result, True
    progress = 1
    if collapse_test_exit(mm):
        mm.mmap_lock.read_unlock()
        return progress, result, True
    for vma in [vma for vma in mm.vmas if vma.end > state.address]:
        if mm.host.sched.preempt:
            mm.host.sched.point("cond_resched")
        if collapse_test_exit(mm):
            break
        end = vma.end & ~(PMD_SIZE - 1)
        if not thp_vma_allowable_order(vma, vma.flags, TVA_KHUGEPAGED) or state.address > end:
            progress += 1
            continue
        state.address = max(state.address, (vma.start + PMD_SIZE - 1) & ~(PMD_SIZE - 1))
        while state.address < end:
            result, locked = _scan_one(vma, state.address, cc)
            state.pages_collapsed += result == SCAN_SUCCEED
            state.address += PMD_SIZE
            progress += HPAGE_PMD_NR
            if not locked:
                return progress, result, False
            if progress >= pages:
                mm.mmap_lock.read_unlock()
                return progress, result, False
            if mm.host.sched.preempt:
                mm.host.sched.point("cond_resched")
            if collapse_test_exit(mm):
                mm.mmap_lock.read_unlock()
                return progress, result, False
    mm.mmap_lock.read_unlock()
    return progress, result, True


def _scan_one(vma: VmArea, address: int, cc: CollapseControl) -> tuple[str, bool]:
    """(SCAN_*, whether mmap_lock is still held)."""
    if vma_is_anonymous(vma):
        return hpage_collapse_scan_pmd(vma, address, cc)
    mm, mapping = vma.mm, vma.file
    index = vma.pgoff + ((address - vma.start) >> 12)
    get_file(mapping)
    mm.mmap_lock.read_unlock()
    result = hpage_collapse_scan_file(mm, address, mapping, index, cc)
    fput(mapping)
    if result == SCAN_PTE_MAPPED_HUGEPAGE:
        mm.mmap_lock.read_lock()
        if not (cc.is_khugepaged and collapse_test_exit(mm)):
            result = collapse_pte_mapped_thp(mm, address, install=not cc.is_khugepaged)
            if cc.is_khugepaged and result == SCAN_PMD_MAPPED:
                result = SCAN_SUCCEED
        mm.mmap_lock.read_unlock()
    return result, False


def _khugepaged_scan_mm_slot(host: HostMm, pages: int, cc: CollapseControl) -> tuple[int, str]:
    """(entries looked at, SCAN_* of the last). mm_lock is held, and is released meanwhile."""
    state = host.khugepaged
    if state.mm is None:
        state.mm = state.mms[0]
        state.address = 0
    mm = state.mm
    state.mm_lock.unlock()
    progress, result, done = _scan_mm(mm, pages, cc)
    state.mm_lock.lock()
    if collapse_test_exit(mm) or done:
        at = state.mms.index(mm) + 1
        state.mm = state.mms[at] if at < len(state.mms) else None
        state.address = 0
        if state.mm is None:
            state.full_scans += 1
        if collapse_test_exit(mm):
            state.mms.remove(mm)
            mm.mmdrop()
    return progress, result


def khugepaged_do_scan(host: HostMm) -> None:
    """Look at pages_to_scan entries, but at no address space twice."""
    state = host.khugepaged
    cc = CollapseControl(is_khugepaged=True)
    pages, progress, rounds = state.pages_to_scan, 0, 0
    slept = False
    host.lru.lru_add_drain_all()
    while progress < pages:
        if host.sched.preempt:
            host.sched.point("cond_resched")
        state.mm_lock.lock()
        rounds += state.mm is None
        result = SCAN_SUCCEED
        if state.mms and host.thp.enabled != "never" and rounds < 2:
            did, result = _khugepaged_scan_mm_slot(host, pages - progress, cc)
            progress += did
        else:
            progress = pages
        state.mm_lock.unlock()
        if result == SCAN_ALLOC_HUGE_PAGE_FAIL and progress < pages:
            if slept:
                return
            slept = True
            host.sched.sleep(state.alloc_sleep_millisecs * _MSEC)


def khugepaged(host: HostMm) -> None:
    """The daemon: scan, sleep. Never returns."""
    state = host.khugepaged
    while True:
        state.scanning = True
        khugepaged_do_scan(host)
        state.scanning = False
        _wait_work(host)


def _wait_work(host: HostMm) -> None:
    state = host.khugepaged
    if not state.mms:
        state.wait.wait_event(lambda: bool(state.mms))
    elif state.scan_sleep_millisecs:
        delay = state.scan_sleep_millisecs * _MSEC
        state.sleep_expire = host.sched.now + delay
        host.sched.after(delay, state.wait.wake_all)
        state.wait.wait_event(lambda: host.sched.now >= state.sleep_expire)
    else:
        host.sched.yield_()


def scan_sleep_millisecs_store(host: HostMm, milliseconds: int) -> None:
    """Write the daemon's file of that name, which also wakes it up now."""
    state = host.khugepaged
    state.scan_sleep_millisecs = milliseconds
    state.sleep_expire = 0
    state.wait.wake_all()


# -- MADV_COLLAPSE ------------------------------------------------------------------------------
def madvise_collapse(vma: VmArea, start: int, end: int) -> int:
    """Collapse all whole 2 MiB in [start, end) of the VMA. 0 or -errno.

    mmap_lock is held for reading; it may have been dropped meanwhile.
    """
    mm = vma.mm
    host = mm.host
    if not thp_vma_allowable_order(vma, vma.flags, TVA_FORCED_COLLAPSE):
        return -EINVAL
    cc = CollapseControl(is_khugepaged=False)
    host.lru.lru_add_drain_all()
    first = (start + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
    last = end & ~(PMD_SIZE - 1)
    collapsed, failure, locked = 0, SCAN_FAIL, True
    for address in range(first, last, PMD_SIZE):
        if not locked:
            if host.sched.preempt:
                host.sched.point("cond_resched")
            mm.mmap_lock.read_lock()
            locked = True
            result, found = hugepage_vma_revalidate(mm, address, cc, expect_anon=False)
            if found is None:
                failure = result
                break
            vma = found
            last = min(last, vma.end & ~(PMD_SIZE - 1))
        result, locked = _scan_one(vma, address, cc)
        if result in (SCAN_SUCCEED, SCAN_PMD_MAPPED):
            collapsed += 1
            continue
        failure = result
        if result not in _GOES_ON:
            break
    if not locked:
        mm.mmap_lock.read_lock()
    if collapsed == (last - first) >> 21:
        return 0
    return -_ERRNO.get(failure, EINVAL)
