"""Where in one VMA a folio is mapped.

Source of truth: mm/page_vma_mapped.c (page_vma_mapped_walk, map_pte, check_pte, check_pmd),
mm/internal.h (vma_address, vma_address_end); Linux 6.18.

    walk = PageVmaMappedWalk(host, folio, vma, address)
    while walk.next():
        ...

At each turn `address` is where the folio or a page of it is mapped, and the entry there is locked: `pte`
is the physical address of a 4 KiB entry, or 0 if `pmd` is a huge one. To stop early call `done`.

Not modelled: hugetlb (its entries are one a folio), entries at level 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    HPAGE_PMD_NR,
    PMD_SIZE,
    is_swap_pmd,
    pmd_pfn,
    pmd_trans_huge,
    pte_pfn,
    pte_present,
)
from host_mm.arch.x86.swapops import (
    SWP_PFN_MASK,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_swap_pte,
    pte_to_swp_entry,
    swp_offset,
)
from host_mm.page import folio_nr_pages
from host_mm.pgtable_generic import mm_find_pmd, pmd_lock, pte_lockptr, pte_offset_map, pte_offset_map_lock

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.locks import Spinlock
    from host_mm.mm_types import VmArea

__all__ = ["PageVmaMappedWalk", "vma_address"]


def vma_address(vma: VmArea, index: int, nr_pages: int) -> int:
    """Where pages [index, index + nr_pages) of the anon_vma or file begin in the VMA, or -1."""
    if index >= vma.pgoff:
        return vma.address_of_index(index)
    return vma.start if index + nr_pages > vma.pgoff else -1


class PageVmaMappedWalk:
    """struct page_vma_mapped_walk. `end` is where the folio's part of the VMA ends.

    With `migration` it looks for migration entries instead; with `sync` it waits for who is clearing one.
    """

    __slots__ = (
        "address", "crossed", "end", "host", "migration", "nr_pages", "pfn", "pmd", "pte", "ptl", "sync",
        "vma",
    )

    def __init__(
        self, host: HostMm, pfn: int, vma: VmArea, address: int, *, migration: bool = False,
        sync: bool = False, nr_pages: int = 0,
    ) -> None:
        self.host = host
        self.pfn = pfn
        self.vma = vma
        self.address = address
        self.migration = migration
        self.sync = sync
        self.nr_pages = nr = nr_pages or folio_nr_pages(host.pages, pfn)
        # A page that belongs to no VMA's file or anon_vma any more is looked for at one address.
        self.end = address + 4096 if nr == 1 else min(
            vma.end, vma.start + ((host.pages.index[pfn] + nr - vma.pgoff) << 12)
        )
        self.pmd = self.pte = 0
        self.ptl: Spinlock | None = None
        self.crossed = False

    def done(self) -> None:
        """Stop: unlock."""
        if self.ptl is not None:
            self.ptl.unlock()
            self.ptl = None

    def restart(self) -> None:
        """page_vma_mapped_walk_restart: look at the same address again, after it was changed here."""
        self.done()
        self.pmd = self.pte = 0

    def next(self) -> bool:
        """Go on to the next entry that maps the folio; false: there is none, nothing is locked."""
        if self.pte:
            self.address += 4096
            self.pte += 8
        elif self.pmd:
            self.done()
            return False
        while self.address < self.end:
            if not self.pte and not self._enter():
                if self.ptl is not None:
                    return True
                self.address = (self.address & ~(PMD_SIZE - 1)) + PMD_SIZE
                continue
            stop = min(self.end, (self.address & ~(PMD_SIZE - 1)) + PMD_SIZE)
            u64 = self.host.ram.u64
            while self.address < stop:
                entry = u64[self.pte >> 3]
                if entry and self._check_pte(entry):
                    return True
                self.address += 4096
                self.pte += 8
            self.done()
            self.pte = 0
            self.crossed = True
        self.done()
        return False

    def _enter(self) -> bool:
        """Lock the table at `address`, at its first entry that may be one. False: there is none here, or
        `pmd` is a huge entry of the folio and locked."""
        mm = self.vma.mm
        self.pmd = 0
        pmd = mm_find_pmd(mm, self.address) if mm.pgd else 0
        if not pmd:
            return False
        value = self.host.ram.u64[pmd >> 3]
        if pmd_trans_huge(value) or is_swap_pmd(value):
            ptl = pmd_lock(mm, pmd)
            value = self.host.ram.u64[pmd >> 3]
            if pmd_trans_huge(value) or is_swap_pmd(value):
                if self._check_pmd(value):
                    self.pmd = pmd
                    self.ptl = ptl
                else:
                    ptl.unlock()
                return False
            # It was split meanwhile.
            ptl.unlock()
        if not value:
            if self.sync and self.nr_pages >= HPAGE_PMD_NR:
                # Who has cleared it may not have counted that yet.
                pmd_lock(mm, pmd).unlock()
            return False
        return self._map_pte(pmd)

    def _map_pte(self, pmd: int) -> bool:
        mm = self.vma.mm
        if not self.sync:
            pte = pte_offset_map(mm, pmd, self.address)
            if not pte:
                return False
            stop = min(self.end, (self.address & ~(PMD_SIZE - 1)) + PMD_SIZE)
            u64 = self.host.ram.u64
            address = self.address
            while address < stop and not u64[pte >> 3]:
                address += 4096
                pte += 8
            if address >= stop:
                return False
            self.address = address
        pte = pte_offset_map_lock(mm, pmd, self.address)
        if not pte:
            return False
        self.pte = pte
        self.ptl = pte_lockptr(mm, pte)
        return True

    def _check_pte(self, entry: int) -> bool:
        if self.migration:
            if not is_swap_pte(entry):
                return False
            swp = pte_to_swp_entry(entry)
            if not is_migration_entry(swp):
                return False
            pfn = swp_offset(swp) & SWP_PFN_MASK
        elif pte_present(entry):
            pfn = pte_pfn(entry)
        else:
            # A page that a device has counts as mapped.
            swp = pte_to_swp_entry(entry)
            if not is_device_private_entry(swp) and not is_device_exclusive_entry(swp):
                return False
            pfn = swp_offset(swp) & SWP_PFN_MASK
        return self.pfn <= pfn < self.pfn + self.nr_pages

    def _check_pmd(self, value: int) -> bool:
        if is_swap_pmd(value):
            if not self.migration:
                return False
            pfn = swp_offset(pte_to_swp_entry(value)) & SWP_PFN_MASK
        elif self.migration:
            return False
        else:
            pfn = pmd_pfn(value)
        return pfn < self.pfn + self.nr_pages and self.pfn < pfn + HPAGE_PMD_NR
