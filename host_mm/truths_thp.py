"""What must hold of transparent huge pages, and of large folios of the page cache, at rest.

Source of truth: mm/rmap.c (the counts that __folio_add_rmap and __folio_remove_rmap keep), mm/huge_memory.c
(deferred_split_folio), mm/pgtable-generic.c (deposits), mm/memory.c: check_mm; Linux 6.18.

    thp-mapcount   entire_mapcount, large_mapcount, nr_pages_mapped and the counts by address space are
                   what the tables hold
    thp-deposit    beside each level-2 table hang as many empty tables as it has anonymous huge entries
    thp-deferred   only large anonymous folios that are not free are queued for a split
    thp-unsplit    no huge entry reaches beyond its VMA, and none is a migration entry

Not modelled: hugetlb, whose truths are in truths_hugetlb.py.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR, PMD_SIZE, is_swap_pmd, pmd_pfn
from host_mm.huge_mm import is_huge_zero_pmd, vma_is_anonymous
from host_mm.kernel.errors import BrokenTruth
from host_mm.page import ENTIRELY_MAPPED, PG_anon, PG_head, folio_nr_pages, mm_counter

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["ThpAudit"]


class ThpAudit:
    """The huge entries found: `maps` by folio, `mms` by folio and address space, `deposits` by table."""

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.maps: Counter[int] = Counter()
        self.mms: dict[int, Counter[MmStruct]] = {}
        self.deposits: Counter[int] = Counter()

    def huge_entry(self, vma: VmArea, pmd: int, address: int, following: int, rss: list[int]) -> None:
        """A level-2 entry of a VMA that is neither empty nor a table."""
        host = self.host
        entry = host.ram.u64[pmd >> 3]
        if following - address != PMD_SIZE or is_swap_pmd(entry):
            raise BrokenTruth("thp-unsplit", f"{vma!r} has entry {entry:#x} at {address:#x}")
        if vma_is_anonymous(vma):
            self.deposits[pmd >> 12] += 1
        if is_huge_zero_pmd(host, entry):
            return
        folio = pmd_pfn(entry)
        self.maps[folio] += 1
        self.entry_of(folio, vma.mm)
        rss[mm_counter(host.pages, folio)] += HPAGE_PMD_NR

    def entry_of(self, folio: int, mm: MmStruct) -> None:
        """An entry, of whatever level, maps the folio or a page of it."""
        self.mms.setdefault(folio, Counter())[mm] += 1

    def folio(self, folio: int, pte_maps: Counter[int]) -> None:
        """Compare the counts of a large folio with the entries that were found."""
        pages = self.host.pages
        nr = folio_nr_pages(pages, folio)
        found = [pte_maps[page] for page in range(folio, folio + nr)]
        entire = self.maps[folio]
        counted = (
            pages.entire_mapcount[folio], pages.large_mapcount[folio], pages.nr_pages_mapped[folio],
            pages.mapcount[folio : folio + nr].tolist(), dict(pages.mm_mapcount.get(folio, {})),
        )
        mapped = sum(1 for count in found if count) + (ENTIRELY_MAPPED if entire else 0)
        exists = entire, entire + sum(found), mapped, found, dict(self.mms.get(folio, {}))
        if counted != exists:
            raise BrokenTruth("thp-mapcount", f"folio {folio:#x} counts {counted}, there are {exists}")

    def finish(self) -> None:
        """The deposits and the queues."""
        thp, pages = self.host.thp, self.host.pages
        deposited = {table: len(tables) for table, tables in thp.deposited.items()}
        if deposited != dict(self.deposits):
            raise BrokenTruth("thp-deposit", f"deposited are {deposited}, needed {dict(self.deposits)}")
        queued = {folio for queue in thp.split_queues for folio in queue}
        for folio in queued | thp.partially_mapped:
            large = PG_head | PG_anon
            if pages.flags[folio] & large != large or pages.refcount[folio] <= 0 or folio not in queued:
                raise BrokenTruth("thp-deferred", f"folio {folio:#x} is queued for a split")
