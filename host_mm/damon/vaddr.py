"""Regions of a process's addresses.

Source of truth: mm/damon/vaddr.c (damon_va_mkold, damon_va_young, __damon_va_check_access); Linux 6.18.

Regions that were sampled in the same folio share one answer within a pass.

Not modelled: huge pages of hugetlbfs, following the VMAs of the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pmd_pfn, pmd_trans_huge, pte_pfn, pte_present
from host_mm.damon.core import DamonRegion
from host_mm.damon.ops_common import damon_pmdp_mkold, damon_pte_young, damon_ptep_mkold
from host_mm.fork import mmput
from host_mm.kernel.costs import COST_WALK
from host_mm.page import folio_nr_pages, put_page
from host_mm.page_idle import page_idle_get_folio
from host_mm.pgtable_generic import mm_find_pmd, pte_lockptr, pte_offset_map_lock, ptep_get
from host_mm.pgtable_huge import pmd_trans_huge_lock, pmdp_get

if TYPE_CHECKING:
    from host_mm.kernel.locks import Spinlock
    from host_mm.mm_types import MmStruct

__all__ = ["VaddrOperations"]


class VaddrOperations:
    """DAMON_OPS_VADDR (and FVADDR) for one process."""

    __slots__ = ("last_accessed", "last_page", "last_size", "mm")

    def __init__(self, mm: MmStruct) -> None:
        self.mm = mm
        self.last_page = -1
        self.last_size = 1
        self.last_accessed = False

    def _entry(self, address: int) -> tuple[int, Spinlock | None, bool]:
        """(the present entry of an address, its lock, taken, whether it is huge); mmap_lock is held."""
        mm = self.mm
        mm.host.sched.advance(COST_WALK)
        if not mm.pgd or mm.vma_lookup(address) is None:
            return 0, None, False
        pmd = mm_find_pmd(mm, address)
        if pmd and (lock := pmd_trans_huge_lock(mm, pmd)) is not None:
            if pmd_trans_huge(pmdp_get(mm, pmd)):
                return pmd, lock, True
            lock.unlock()
            return 0, None, False
        pte = pte_offset_map_lock(mm, pmd, address) if pmd else 0
        if not pte:
            return 0, None, False
        lock = pte_lockptr(mm, pte)
        if not pte_present(ptep_get(mm, pte)):
            lock.unlock()
            return 0, None, False
        return pte, lock, False

    def mkold(self, region: DamonRegion) -> None:
        """damon_va_mkold."""
        mm = self.mm
        if mm.mm_users == 0:
            return
        mm.mm_users += 1
        address = region.sampling_addr & ~0xFFF
        mm.mmap_lock.read_lock()
        entry, lock, huge = self._entry(address)
        if lock is not None:
            (damon_pmdp_mkold if huge else damon_ptep_mkold)(mm, address, entry)
            lock.unlock()
        mm.mmap_lock.read_unlock()
        mmput(mm)

    def check_access(self, region: DamonRegion, first: bool) -> bool:
        """__damon_va_check_access."""
        page = region.sampling_addr >> 12
        if first or page // self.last_size != self.last_page // self.last_size:
            self.last_accessed = self._young(page << 12)
            self.last_page = page
        return self.last_accessed

    def _young(self, address: int) -> bool:
        mm = self.mm
        if mm.mm_users == 0:
            return False
        mm.mm_users += 1
        young = False
        mm.mmap_lock.read_lock()
        entry, lock, huge = self._entry(address)
        if lock is not None:
            value = ptep_get(mm, entry)
            folio = page_idle_get_folio(mm.host, pmd_pfn(value) if huge else pte_pfn(value))
            if folio >= 0:
                young = damon_pte_young(mm, address, entry, folio)
                self.last_size = folio_nr_pages(mm.host.pages, folio)
                put_page(mm.host, folio)
            lock.unlock()
        mm.mmap_lock.read_unlock()
        mmput(mm)
        return young
