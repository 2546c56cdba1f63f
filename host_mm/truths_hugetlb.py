"""What must hold of huge pages and of the tables that address spaces share, at rest.

    hugetlb-pool       the pool's counts agree with its lists, by node and in all, and with its pages
    hugetlb-reserve    as many pages are promised as mappings and files have promises left
    frame-refcount     a huge page has exactly the references that exist; a free one has none
    frame-mapcount     ... and the mappings, an entry of a shared table counting once
    shared-table       a level-2 table knows how many more address spaces use it

Not modelled: subpools.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.address_space import AddressSpace
from host_mm.arch.x86.pgtable import pmd_pfn, pmd_trans_huge, pte_present
from host_mm.hugetlb import HPG_freed, HPG_restore_reserve
from host_mm.hugetlb_resv import (
    HPAGE_RESV_OWNER,
    HugetlbInode,
    is_vma_resv_set,
    vma_hugecache_offset,
    vma_resv_map,
)
from host_mm.kernel.errors import BrokenTruth
from host_mm.mm_types import VM_HUGETLB
from host_mm.page import PG_hugetlb, decode_page_flags
from host_mm.pgtable_generic import pmd_slots

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["HugetlbAudit"]


class HugetlbAudit:
    """The part of an audit that is about huge pages; `truths.audit` asks it."""

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.users: Counter[int] = Counter()
        self.entries: set[int] = set()
        self.maps: Counter[int] = Counter()
        self.promised = 0

    def first_user(self, table: int) -> bool:
        """Note that somebody uses the level-2 table; whether nobody did before."""
        self.users[table >> 12] += 1
        return self.users[table >> 12] == 1

    def vmas(self, mm: MmStruct) -> None:
        """Count the huge-page entries of one address space, and what it has been promised."""
        for vma in mm.vmas:
            if vma.flags & VM_HUGETLB:
                self._vma(vma)

    def _vma(self, vma: VmArea) -> None:
        for pmd, address, _ in pmd_slots(vma.mm, vma.start, vma.end):
            entry = self.host.ram.u64[pmd >> 3]
            if not pte_present(entry):
                raise BrokenTruth("frame-mapcount", f"{address:#x} is still under migration: {entry:#x}")
            if not pmd_trans_huge(entry) or not self.host.pages.flags[pmd_pfn(entry)] & PG_hugetlb:
                raise BrokenTruth("frame-mapcount", f"{address:#x} has {entry:#x}, which is no huge page")
            if pmd not in self.entries:
                self.entries.add(pmd)
                self.maps[pmd_pfn(entry)] += 1
        if is_vma_resv_set(vma, HPAGE_RESV_OWNER) and (resv := vma_resv_map(vma)) is not None:
            first, last = vma_hugecache_offset(vma, vma.start), vma_hugecache_offset(vma, vma.end)
            self.promised += last - first - resv.count(first, last)

    def _files(self) -> None:
        for mapping in self.host.mappings:
            inode = mapping.private_data
            if not isinstance(inode, HugetlbInode):
                continue
            resv = inode.resv_map
            if resv.adds_in_progress:
                raise BrokenTruth("hugetlb-reserve", f"{mapping!r}: {resv.adds_in_progress} changes begun")
            cached = [small >> 9 for small in mapping.i_pages if not small & 511]
            # Beyond the end of the file is what a fault brought in while that was moved.
            inside = [index for index in cached if index < mapping.i_size >> 21]
            missing = [index for index in inside if not resv.count(index, index + 1)]
            if missing:
                raise BrokenTruth("hugetlb-reserve", f"{mapping!r} has pages {missing} beside its map")
            self.promised += sum(to - at for at, to in resv.regions) - len(cached)

    def frame(self, pfn: int, flags: int, references: int) -> None:
        """One huge page, by its head; `references`: who holds it beside its mappings."""
        pages = self.host.pages
        who = f"huge page {pfn:#x} ({decode_page_flags(flags)})"
        count, expected = pages.refcount[pfn], references + self.maps[pfn]
        free = pages.private[pfn] & HPG_freed
        if count != expected or bool(free) == bool(count):
            raise BrokenTruth("frame-refcount", f"{who} has refcount {count}, {expected} references exist")
        if not pages.entire_mapcount[pfn] == pages.large_mapcount[pfn] == self.maps[pfn]:
            raise BrokenTruth(
                "frame-mapcount", f"{who} has mapcount {pages.large_mapcount[pfn]}, {self.maps[pfn]} map it"
            )
        if not free and pages.private[pfn] & HPG_restore_reserve:
            # Unmapped by its owner but still held: the promise is kept when it is freed.
            self.promised -= 1
        if not free and isinstance(pages.mapping.get(pfn), AddressSpace):
            if pages.private[pfn] & HPG_restore_reserve:
                raise BrokenTruth("hugetlb-reserve", f"{who} is a file's and would restore a promise")

    def finish(self) -> None:
        """What needs all address spaces and frames to be seen."""
        pages = self.host.pages
        for table, users in self.users.items():
            if pages.private[table] != users - 1:
                raise BrokenTruth(
                    "shared-table", f"table {table:#x} knows {pages.private[table]} more users, has {users}"
                )
        self._files()
        self._pool()

    def _pool(self) -> None:
        h = self.host.hstate
        freed = [pfn for free in h.freelists for pfn in free]
        sums = h.nr == sum(h.nr_node) and h.free == sum(h.free_node) and h.surplus == sum(h.surplus_node)
        lists = [len(free) for free in h.freelists] == h.free_node and h.nr == len(freed) + len(h.active)
        marked = all(self.host.pages.private[pfn] & HPG_freed for pfn in freed)
        if not sums or not lists or not marked:
            raise BrokenTruth(
                "hugetlb-pool", f"nr {h.nr_node}, free {h.free_node}, surplus {h.surplus_node}, "
                f"lists {[len(free) for free in h.freelists]}, {len(h.active)} in use",
            )
        if h.resv != self.promised:
            raise BrokenTruth("hugetlb-reserve", f"{h.resv} pages are reserved, {self.promised} promised")
