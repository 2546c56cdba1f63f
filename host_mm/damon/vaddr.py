"""Regions of a process's addresses.

Source of truth: mm/damon/vaddr.c (damon_va_mkold, damon_va_young, __damon_va_check_access); Linux 6.18.

Regions that were sampled in the same page share one answer within a pass.

Not modelled: huge pages, following the VMAs of the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pte_pfn, pte_present
from host_mm.damon.core import DamonRegion
from host_mm.damon.ops_common import damon_pte_young, damon_ptep_mkold
from host_mm.fork import mmput
from host_mm.kernel.costs import COST_WALK
from host_mm.page import put_page
from host_mm.page_idle import page_idle_get_folio
from host_mm.pgtable_generic import mm_find_pmd, pte_lockptr, pte_offset_map_lock, ptep_get

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = ["VaddrOperations"]


class VaddrOperations:
    """DAMON_OPS_VADDR (and FVADDR) for one process."""

    __slots__ = ("last_accessed", "last_page", "mm")

    def __init__(self, mm: MmStruct) -> None:
        self.mm = mm
        self.last_page = -1
        self.last_accessed = False

    def _entry(self, address: int) -> int:
        """The level-1 entry of an address with its table locked, or 0: mmap_lock is held."""
        mm = self.mm
        mm.host.sched.advance(COST_WALK)
        if not mm.pgd or mm.vma_lookup(address) is None:
            return 0
        pmd = mm_find_pmd(mm, address)
        pte = pte_offset_map_lock(mm, pmd, address) if pmd else 0
        if pte and not pte_present(ptep_get(mm, pte)):
            pte_lockptr(mm, pte).unlock()
            return 0
        return pte

    def mkold(self, region: DamonRegion) -> None:
        """damon_va_mkold."""
        mm = self.mm
        if mm.mm_users == 0:
            return
        mm.mm_users += 1
        address = region.sampling_addr & ~0xFFF
        mm.mmap_lock.read_lock()
        pte = self._entry(address)
        if pte:
            damon_ptep_mkold(mm, address, pte)
            pte_lockptr(mm, pte).unlock()
        mm.mmap_lock.read_unlock()
        mmput(mm)

    def check_access(self, region: DamonRegion, first: bool) -> bool:
        """__damon_va_check_access."""
        page = region.sampling_addr >> 12
        if first or page != self.last_page:
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
        pte = self._entry(address)
        if pte:
            folio = page_idle_get_folio(mm.host, pte_pfn(ptep_get(mm, pte)))
            if folio >= 0:
                young = damon_pte_young(mm, address, pte, folio)
                put_page(mm.host, folio)
            pte_lockptr(mm, pte).unlock()
        mm.mmap_lock.read_unlock()
        mmput(mm)
        return young
