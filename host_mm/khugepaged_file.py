"""The small pages of 2 MiB of shared memory become one huge page, in the page cache and for all who map it.

Source of truth: mm/khugepaged.c (hpage_collapse_scan_file, collapse_file, retract_page_tables,
collapse_pte_mapped_thp, set_huge_pmd); Linux 6.18.

Each folio is locked, taken off the LRU and unmapped, its flush deferred, in a bracket of its own; when all
are there and flushed, their bytes are copied and the new folio takes their places in the cache. Who faults
waits for its lock, and finds it then. After that the page tables, which are empty, are taken away, each in a
bracket of 2 MiB: faults map the huge page. MADV_COLLAPSE maps it at once.

Not modelled: files with a backing store (READ_ONLY_THP_FOR_FS), memory errors during the copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.address_space import AddressSpace, vmas_of_pages
from host_mm.arch.x86.pgtable import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PFN_MASK, PMD_SIZE, pte_present
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.filemap_cache import NOT_CACHED, filemap_lock_folio
from host_mm.huge_memory_file import do_set_pmd
from host_mm.huge_mm import TVA_FORCED_COLLAPSE, thp_vma_allowable_order
from host_mm.kernel.costs import COST_COPY_HUGE_PAGE, COST_SCAN_PAGE
from host_mm.khugepaged_collapse import (
    CollapseControl,
    alloc_charge_folio,
    collapse_test_exit,
    find_pmd_or_thp_or_none,
    folio_expected_ref_count,
)
from host_mm.khugepaged_trace import (
    SCAN_DEL_PAGE_LRU,
    SCAN_EXCEED_NONE_PTE,
    SCAN_EXCEED_SWAP_PTE,
    SCAN_FAIL,
    SCAN_PAGE_COMPOUND,
    SCAN_PAGE_COUNT,
    SCAN_PAGE_FILLED,
    SCAN_PAGE_LOCK,
    SCAN_PAGE_LRU,
    SCAN_PAGE_NULL,
    SCAN_PMD_MAPPED,
    SCAN_PMD_NONE,
    SCAN_PMD_NULL,
    SCAN_PTE_MAPPED_HUGEPAGE,
    SCAN_PTE_NON_PRESENT,
    SCAN_PTE_UFFD_WP,
    SCAN_SUCCEED,
    SCAN_TRUNCATED,
    SCAN_VMA_CHECK,
)
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import VM_UFFD_MISSING, VM_UFFD_WP, VmFault
from host_mm.page import (
    PG_active,
    PG_locked,
    PG_lru,
    PG_swapbacked,
    PG_unevictable,
    PG_uptodate,
    folio_mapcount,
    folio_nr_pages,
    get_page,
    mm_counter,
    put_page,
    set_page_dirty,
    try_get_page,
)
from host_mm.pgtable_generic import (
    pmd_lock,
    pte_free,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_get,
    ptep_get_and_clear,
)
from host_mm.pgtable_huge import pmdp_collapse_flush
from host_mm.rmap import folio_remove_rmap_pte
from host_mm.rmap_unmap import TTU_BATCH_FLUSH, TTU_IGNORE_MLOCK, try_to_unmap
from host_mm.shmem import SGP_NOALLOC, shmem_get_folio
from host_mm.tlb import try_to_unmap_flush

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["collapse_pte_mapped_thp", "hpage_collapse_scan_file"]


def hpage_collapse_scan_file(
    mm: MmStruct, address: int, mapping: AddressSpace, start: int, cc: CollapseControl
) -> str:
    """Collapse the 2 MiB of the file from page `start` on, mapped at `address`, if worth it; no lock held."""
    host = mm.host
    cc.node_load.clear()
    present = swap = 0
    result, index = SCAN_SUCCEED, start
    while index < start + HPAGE_PMD_NR and result == SCAN_SUCCEED:
        folio = mapping.i_pages.get(index, NOT_CACHED)
        index += 1
        if folio < 0:
            swap += folio != NOT_CACHED
            if cc.is_khugepaged and swap > host.khugepaged.max_ptes_swap:
                result = SCAN_EXCEED_SWAP_PTE
        elif try_get_page(host, folio):
            result = _scan_folio(host, folio, start, cc)
            nr = folio_nr_pages(host.pages, folio)
            put_page(host, folio)
            present += nr if result == SCAN_SUCCEED else 0
            index += nr - 1
    host.sched.advance(COST_SCAN_PAGE * HPAGE_PMD_NR // 16)
    if result == SCAN_SUCCEED:
        if cc.is_khugepaged and present < HPAGE_PMD_NR - host.khugepaged.max_ptes_none:
            result = SCAN_EXCEED_NONE_PTE
        else:
            result = _Collapse(mm, address, mapping, start, cc).run()
    if (t := host.trace.mm_khugepaged_scan_file) is not None:
        t(mm.pgd, -1, mapping.name, present, swap, result)
    return result


def _scan_folio(host: HostMm, folio: int, start: int, cc: CollapseControl) -> str:
    pages = host.pages
    if pages.order[folio] == HPAGE_PMD_ORDER and pages.index[folio] == start:
        return SCAN_PTE_MAPPED_HUGEPAGE
    cc.node_load[host.allocator.nid_of(folio)] += 1
    if not pages.flags[folio] & PG_lru:
        return SCAN_PAGE_LRU
    if folio_expected_ref_count(host, folio) + 1 != pages.refcount[folio]:
        return SCAN_PAGE_COUNT
    return SCAN_SUCCEED


class _Collapse:
    """One call of collapse_file. `folios` are locked, isolated, unmapped, in the order of the file."""

    __slots__ = ("address", "cc", "folios", "host", "mapping", "mm", "new", "nr_none", "start")

    def __init__(
        self, mm: MmStruct, address: int, mapping: AddressSpace, start: int, cc: CollapseControl
    ) -> None:
        self.mm = mm
        self.host = mm.host
        self.address = address
        self.mapping = mapping
        self.start = start
        self.cc = cc
        self.new = -1
        self.nr_none = 0
        self.folios: list[int] = []

    def run(self) -> str:
        """SCAN_*."""
        host = self.host
        result, self.new = alloc_charge_folio(self.mm, self.cc)
        if result == SCAN_SUCCEED:
            host.pages.flags[self.new] |= PG_locked | PG_swapbacked
            result = self._take_all()
            try_to_unmap_flush(host)
            if result == SCAN_SUCCEED:
                self._copy()
                result = self._install()
            if result in (SCAN_SUCCEED, SCAN_PTE_MAPPED_HUGEPAGE) and self.folios_replaced:
                self._free_old()
            else:
                self._rollback()
        if (t := host.trace.mm_khugepaged_collapse_file) is not None:
            index = self.start + HPAGE_PMD_NR
            t(self.mm.pgd, self.new, index, self.address, True, self.mapping.name, HPAGE_PMD_NR, result)
        return result

    @property
    def folios_replaced(self) -> bool:
        """Whether the new folio is in the cache."""
        return self.mapping.i_pages.get(self.start, NOT_CACHED) == self.new

    def _take_all(self) -> str:
        index, end = self.start, self.start + HPAGE_PMD_NR
        while index < end:
            folio = self.mapping.i_pages.get(index, NOT_CACHED)
            if folio == NOT_CACHED:
                if index == self.start and not any(at in self.mapping.i_pages for at in range(index, end)):
                    return SCAN_TRUNCATED
                self.nr_none += 1
                index += 1
                continue
            result, folio = self._lock(folio, index)
            if result != SCAN_SUCCEED:
                return result
            result = self._take(folio)
            if result != SCAN_SUCCEED:
                folio_unlock(self.host, folio)
                put_page(self.host, folio)
                return result
            self.folios.append(folio)
            index += folio_nr_pages(self.host.pages, folio)
        return SCAN_SUCCEED

    def _lock(self, folio: int, index: int) -> tuple[str, int]:
        """(SCAN_*, the folio of page `index`, locked and with a reference), swapped in if it has to be."""
        host = self.host
        if folio < 0 or not host.pages.flags[folio] & PG_uptodate:
            folio = shmem_get_folio(self.mapping, index, SGP_NOALLOC)
            if folio < 0:
                return SCAN_FAIL, -1
            # A batch may have the folio, which would keep it from being isolated.
            host.lru.lru_add_drain()
            return SCAN_SUCCEED, folio
        if not folio_trylock(host, folio):
            return SCAN_PAGE_LOCK, -1
        get_page(host, folio)
        return SCAN_SUCCEED, folio

    def _take(self, folio: int) -> str:
        """Isolate and unmap a locked folio, to which nobody may have a reference of his own."""
        host, pages = self.host, self.host.pages
        if not pages.flags[folio] & PG_uptodate:
            return SCAN_FAIL
        if pages.order[folio] == HPAGE_PMD_ORDER and pages.index[folio] == self.start:
            return SCAN_PTE_MAPPED_HUGEPAGE
        if pages.mapping.get(folio) is not self.mapping:
            return SCAN_TRUNCATED
        if not host.lru.folio_isolate_lru(folio):
            return SCAN_DEL_PAGE_LRU
        if folio_mapcount(pages, folio):
            try_to_unmap(host, folio, TTU_IGNORE_MLOCK | TTU_BATCH_FLUSH)
        # The cache's, the isolation's and this task's.
        if pages.refcount[folio] != 2 + folio_nr_pages(pages, folio):
            host.lru.folio_putback_lru(folio)
            return SCAN_PAGE_COUNT
        return SCAN_SUCCEED

    def _copy(self) -> None:
        host, pages = self.host, self.host.pages
        if host.sched.preempt:
            host.sched.point("collapse-copy")
        filled: set[int] = set()
        for folio in self.folios:
            for inside in range(folio_nr_pages(pages, folio)):
                at = pages.index[folio] + inside - self.start
                filled.add(at)
                host.ram.copy_page(self.new + at, folio + inside)
        for at in range(HPAGE_PMD_NR):
            if at not in filled:
                host.ram.clear_page(self.new + at)
        host.sched.advance(COST_COPY_HUGE_PAGE)

    def _holes_stayed(self) -> str:
        """Whether what was a hole is one still, and nobody wants to be asked before it is filled."""
        mapping, end = self.mapping, self.start + HPAGE_PMD_NR
        mapping.i_mmap_rwsem.read_lock()
        holes = sum(1 for at in range(self.start, end) if at not in mapping.i_pages)
        result = SCAN_SUCCEED if holes == self.nr_none else SCAN_PAGE_FILLED
        if result == SCAN_SUCCEED and any(
            vma.flags & VM_UFFD_MISSING for vma in vmas_of_pages(mapping, self.start, end)
        ):
            result = SCAN_EXCEED_NONE_PTE
        mapping.i_mmap_rwsem.read_unlock()
        return result

    def _install(self) -> str:
        """Put the new folio into the cache and take the page tables away."""
        host, mapping, pages = self.host, self.mapping, self.host.pages
        if self.nr_none and (result := self._holes_stayed()) != SCAN_SUCCEED:
            return result
        new = self.new
        pages.flags[new] |= PG_uptodate
        pages.index[new] = self.start
        pages.mapping[new] = mapping
        get_page(host, new, HPAGE_PMD_NR - 1)
        set_page_dirty(host, new)
        host.lru.folio_add_lru(new)
        for at in range(self.start, self.start + HPAGE_PMD_NR):
            mapping.i_pages[at] = new
        mapping.top = max(mapping.top, self.start + HPAGE_PMD_NR)
        mapping.nrpages += self.nr_none
        host.vmstat["nr_file_pages"] += self.nr_none
        host.vmstat["nr_shmem"] += self.nr_none
        _retract_page_tables(mapping, self.start)
        folio_unlock(host, new)
        return SCAN_SUCCEED if self.cc.is_khugepaged else SCAN_PTE_MAPPED_HUGEPAGE

    def _free_old(self) -> None:
        pages = self.host.pages
        for folio in self.folios:
            pages.mapping.pop(folio, None)
            pages.flags[folio] &= ~(PG_active | PG_unevictable)
            folio_unlock(self.host, folio)
            put_page(self.host, folio, 2 + folio_nr_pages(pages, folio))

    def _rollback(self) -> None:
        host = self.host
        for folio in self.folios:
            folio_unlock(host, folio)
            host.lru.folio_putback_lru(folio)
            put_page(host, folio)
        folio_unlock(host, self.new)
        put_page(host, self.new)


# -- page tables --------------------------------------------------------------------------------
def _free_table(mm: MmStruct, entry: int) -> None:
    """pte_free_defer: the table may still be read by who walks without locks."""
    mm.pgtables_bytes -= 4096
    pte_free(mm, (entry & PFN_MASK) >> 12)


def _retract_page_tables(mapping: AddressSpace, start: int) -> None:
    """Take the empty level-1 tables away where the 2 MiB are mapped; the new folio is locked."""
    mapping.i_mmap_rwsem.read_lock()
    for vma in vmas_of_pages(mapping, start, start):
        address = vma.start + ((start - vma.pgoff) << 12)
        mm = vma.mm
        if vma.anon_vma is not None or address & (PMD_SIZE - 1) or vma.end < address + PMD_SIZE:
            continue
        result, pmd = find_pmd_or_thp_or_none(mm, address)
        if result == SCAN_SUCCEED and not collapse_test_exit(mm) and not vma.flags & VM_UFFD_WP:
            _retract(vma, address, pmd)
    mapping.i_mmap_rwsem.read_unlock()


def _bracket(mm: MmStruct, address: int) -> mmu_notifier.MmuNotifierRange | None:
    """Opened over the 2 MiB at `address`; None where a switch leaves it out."""
    if "retract-without-bracket" in mm.host.breaks:
        return None
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, address, address + PMD_SIZE
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    return range_


def _retract(vma: VmArea, address: int, pmd: int) -> None:
    mm = vma.mm
    range_ = _bracket(mm, address)
    entry = 0
    pml = pmd_lock(mm, pmd)
    if find_pmd_or_thp_or_none(mm, address)[0] == SCAN_SUCCEED:
        ptl = pte_lockptr(mm, ptep_get(mm, pmd) & PFN_MASK)
        ptl.lock()
        if vma.anon_vma is None and not vma.flags & VM_UFFD_WP:
            entry = pmdp_collapse_flush(mm, address, pmd)
        ptl.unlock()
    pml.unlock()
    if range_ is not None:
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    if entry:
        _free_table(mm, entry)


def collapse_pte_mapped_thp(mm: MmStruct, address: int, *, install: bool) -> str:
    """Map the huge folio of the file at `address` by no small entries any more; `install`: by a huge one.

    mmap_lock is held for reading.
    """
    host = mm.host
    vma = mm.vma_lookup(address)
    if vma is None or vma.file is None or vma.end < address + PMD_SIZE:
        return SCAN_VMA_CHECK
    result, pmd = find_pmd_or_thp_or_none(mm, address)
    if result == SCAN_PMD_MAPPED:
        return result
    if not thp_vma_allowable_order(vma, vma.flags, TVA_FORCED_COLLAPSE):
        return SCAN_VMA_CHECK
    if vma.flags & VM_UFFD_WP:
        return SCAN_PTE_UFFD_WP
    folio = filemap_lock_folio(vma.file, vma.pgoff + ((address - vma.start) >> 12))
    if folio < 0:
        return SCAN_PAGE_NULL
    result = SCAN_PAGE_COMPOUND
    if host.pages.order[folio] == HPAGE_PMD_ORDER:
        result, pmd = find_pmd_or_thp_or_none(mm, address)
        if result == SCAN_SUCCEED:
            result = _drop_table(vma, address, pmd, folio)
        if result in (SCAN_SUCCEED, SCAN_PMD_NULL, SCAN_PMD_NONE):
            result = _set_huge_pmd(vma, address, pmd, folio) if install else SCAN_SUCCEED
    folio_unlock(host, folio)
    put_page(host, folio)
    return result


def _set_huge_pmd(vma: VmArea, address: int, pmd: int, folio: int) -> str:
    if not pmd:
        return SCAN_FAIL
    vmf = VmFault(vma, address, 0)
    vmf.pmd = pmd
    if do_set_pmd(vmf, folio):
        return SCAN_FAIL
    get_page(vma.mm.host, folio)
    return SCAN_SUCCEED


def _wrong_entry(vma: VmArea, pte: int, folio: int) -> str:
    """SCAN_SUCCEED if the locked table maps nothing but the folio's pages, each where it belongs."""
    host = vma.mm.host
    for inside in range(HPAGE_PMD_NR):
        entry = ptep_get(vma.mm, pte + inside * 8)
        if not entry:
            continue
        if not pte_present(entry):
            return SCAN_PTE_NON_PRESENT
        if vm_normal_page(host, entry) != folio + inside:
            return SCAN_FAIL
    return SCAN_SUCCEED


def _drop_table(vma: VmArea, address: int, pmd: int, folio: int) -> str:
    """Unmap the locked folio's pages and take their table away, in one bracket."""
    mm = vma.mm
    host = mm.host
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return SCAN_FAIL
    ptl = pte_lockptr(mm, pte)
    result = _wrong_entry(vma, pte, folio)
    ptl.unlock()
    if result != SCAN_SUCCEED:
        return result
    range_ = _bracket(mm, address)
    pml = pmd_lock(mm, pmd)
    ptl.lock()
    # The folio's lock keeps more of its pages out, but a write may have made a copy meanwhile.
    result = _wrong_entry(vma, pte, folio)
    entry = mapped = 0
    if result == SCAN_SUCCEED:
        for inside in range(HPAGE_PMD_NR):
            at = pte + inside * 8
            if ptep_get(mm, at):
                ptep_get_and_clear(mm, address + inside * 4096, at)
                folio_remove_rmap_pte(host, folio + inside, vma)
                mapped += 1
        mm.rss[mm_counter(host.pages, folio)] -= mapped
        entry = pmdp_collapse_flush(mm, address, pmd)
    ptl.unlock()
    pml.unlock()
    if mapped:
        put_page(host, folio, mapped)
    if range_ is not None:
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    if entry:
        _free_table(mm, entry)
    return result
