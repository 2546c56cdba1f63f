"""What must hold of the counters of pages in /proc/vmstat, at rest: they are what can be counted.

Source of truth: include/linux/mmzone.h: enum node_stat_item and zone_stat_item (those that count pages, not
events), mm/rmap.c: __folio_mod_stat, mm/filemap.c: filemap_unaccount_folio, mm/mlock.c: mlock_folio,
include/linux/mm.h: __pagetable_ctor; Linux 6.18.

    vmstat         each counter of pages is the number of pages that it speaks of

Not modelled: counters by node and zone (the host has one of each), per-CPU differences.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.page import PG_anon, PG_head, PG_hugetlb, PG_mlocked, PG_swapbacked, PG_table, folio_nr_pages
from host_mm.rmap_large import mapped_stat

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["VmstatAudit"]

_COUNTED = (
    "nr_anon_pages", "nr_file_mapped", "nr_shmem_mapped", "nr_anon_transparent_hugepages",
    "nr_shmem_pmdmapped", "nr_file_pages", "nr_shmem", "nr_dirty", "nr_mlock", "nr_page_table_pages",
)


class VmstatAudit:
    """What was found, by the counter's name."""

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.found: Counter[str] = Counter()

    def folio(self, folio: int, flags: int) -> None:
        """A folio, not of hugetlb, that is in use."""
        pages, found = self.host.pages, self.found
        if flags & PG_table:
            found["nr_page_table_pages"] += 1
        if flags & PG_mlocked:
            found["nr_mlock"] += folio_nr_pages(pages, folio)
        if not flags & PG_head:
            if pages.mapcount[folio]:
                found[mapped_stat(flags)] += 1
            return
        nr = folio_nr_pages(pages, folio)
        if pages.entire_mapcount[folio]:
            found[mapped_stat(flags)] += nr
            found["nr_anon_transparent_hugepages" if flags & PG_anon else "nr_shmem_pmdmapped"] += 1
        else:
            found[mapped_stat(flags)] += sum(1 for page in range(folio, folio + nr) if pages.mapcount[page])

    def finish(self) -> None:
        """The files' pages, and then all counters."""
        host, found = self.host, self.found
        for mapping in host.mappings:
            found["nr_dirty"] += sum(folio_nr_pages(host.pages, mapping.i_pages[at]) for at in mapping.dirty)
            for head in mapping.i_pages.values():
                if head < 0 or host.pages.flags[head] & PG_hugetlb:
                    continue
                found["nr_file_pages"] += 1
                if host.pages.flags[head] & PG_swapbacked:
                    found["nr_shmem"] += 1
        for name in _COUNTED:
            if host.vmstat[name] != found[name]:
                raise BrokenTruth("vmstat", f"{name} is {host.vmstat[name]}, there are {found[name]}")
