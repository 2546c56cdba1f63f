"""What must hold of the host's mm at rest; what must while it runs is in truths_running.py.

Source of truth: the rules themselves; in Linux they are spread over mm/page_alloc.c: bad_page,
mm/memory.c: check_mm and mm/swapfile.c's warnings.

    frame-refcount           a frame is free or has exactly the references that exist
    frame-mapcount, rss      ... and the mappings, per frame and per process
    memcg-charge             ... and a memory cgroup counts the folios and slots that are its own
    swap-count, swap-cache   ... and a swap slot the entries and the cache that hold it
    ksm-writable             ... and no entry grants writing to a KSM page
    page-cache, i-mmap, file-dirty  ... and files know their pages, mappings and dirt (truths_files.py)
    uffd-wp                  ... and only where userfaultfd write-protects do entries say so, and not writable
    lru                      ... and PG_lru says where the folio is
    hwpoison, offline        ... and what is out of use is nobody's, and all that is marked so is out of use
    free-count               ... and a zone's free pages are those on its lists
    tlb-stale                ... and every host TLB entry and device's translation is what the tables say
    leak                     when the host goes down, every frame and swap slot is free

`audit` checks them when nobody is inside mm. References that are neither mappings, page tables, swap
cache nor LRU batches come from `host.frame_holders`: callables that give a dict of pfn to count (KVM's
tables, pins).

The truths of huge pages are in truths_hugetlb.py and truths_thp.py, of reverse mapping and mlock in
truths_rmap.py, of counters in truths_vmstat.py.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_RW,
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    PFN_MASK,
    pmd_pfn,
    pmd_table,
    pte_pfn,
    pte_present,
)
from host_mm.arch.x86.swapops import (
    is_migration_entry,
    non_swap_entry,
    pte_swp_uffd_wp_any,
    pte_to_swp_entry,
    swp_offset,
)
from host_mm.huge_mm import is_huge_zero_pmd
from host_mm.kernel.errors import BrokenTruth
from host_mm.memory_device import device_entry_pfn
from host_mm.mm_types import MM_ANONPAGES, MM_SWAPENTS, VM_HUGETLB, VM_UFFD_WP
from host_mm.page import (
    PG_buddy,
    PG_head,
    PG_hugetlb,
    PG_hwpoison,
    PG_ksm,
    PG_lru,
    PG_reserved,
    PG_swapcache,
    decode_page_flags,
    folio_test_large,
    mm_counter,
    page_folio,
)
from host_mm.pgtable_generic import pmd_slots
from host_mm.swapfile import SWAP_MAP_BAD
from host_mm.truths_files import check_file_entry, check_mappings, check_page_cache
from host_mm.truths_hugetlb import HugetlbAudit
from host_mm.truths_rmap import RmapAudit
from host_mm.truths_running import address_spaces, pid_of, translation
from host_mm.truths_thp import ThpAudit
from host_mm.truths_vmstat import VmstatAudit

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.tlb import HostTlb

__all__ = ["audit", "nothing_left"]

_RSS = ("file", "anon", "swap", "shmem")


class _Audit:
    """One audit: what the tables of all processes hold, to be compared with the counts."""

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.maps: Counter[int] = Counter()
        self.refs: Counter[int] = Counter()
        self.slots: Counter[int] = Counter()
        self.thp = ThpAudit(host)
        self.hugetlb = HugetlbAudit(host)
        self.rmap = RmapAudit(host)
        self.vmstat = VmstatAudit(host)

    def tables(self, mm: MmStruct) -> None:
        """Every page table holds one reference to itself."""
        u64 = self.host.ram.u64
        level = [mm.pgd]
        for depth in range(3, -1, -1):
            if depth == 1:
                level = [table for table in level if self.hugetlb.first_user(table)]
            self.refs.update(table >> 12 for table in level)
            if depth:
                words = [word for at in level for word in u64[at >> 3 : (at >> 3) + 512].tolist()]
                level = [word & PFN_MASK for word in words if pmd_table(word)]

    def entries(self, mm: MmStruct) -> None:
        """Count present entries, swap entries and migration entries, and compare with rss."""
        host = self.host
        u64 = host.ram.u64
        rss = [0] * len(mm.rss)
        for vma in mm.vmas:
            self.rmap.vma(vma)
            for pmd, address, following in pmd_slots(mm, vma.start, vma.end):
                if not pmd_table(u64[pmd >> 3]):
                    if not vma.flags & VM_HUGETLB:
                        self._huge(vma, pmd, address, following, rss)
                    continue
                first = ((u64[pmd >> 3] & PFN_MASK) >> 3) + ((address >> 12) & 511)
                for at, entry in enumerate(u64[first : first + ((following - address) >> 12)].tolist()):
                    if not entry:
                        continue
                    self._uffd_wp(vma, entry)
                    if pte_present(entry):
                        self._present(vma, address + (at << 12), entry, rss)
                    elif (pfn := device_entry_pfn(entry)) >= 0:
                        self.maps[pfn] += 1
                        self.rmap.entry(vma, address + (at << 12), pfn)
                        rss[MM_ANONPAGES] += 1
                    elif not non_swap_entry(swp := pte_to_swp_entry(entry)):
                        self.slots[swp_offset(swp)] += 1
                        rss[MM_SWAPENTS] += 1
                    elif is_migration_entry(swp):
                        raise BrokenTruth("frame-mapcount", f"a migration entry is left in pid {pid_of(mm)}")
        if mm.rss != rss:
            raise BrokenTruth("rss", f"pid {pid_of(mm)} counts {mm.rss} pages, has {rss} ({', '.join(_RSS)})")

    def _uffd_wp(self, vma: VmArea, entry: int) -> None:
        present = pte_present(entry)
        if not (entry & _PAGE_UFFD_WP if present else pte_swp_uffd_wp_any(entry)):
            return
        if not vma.flags & VM_UFFD_WP or (present and entry & _PAGE_RW):
            raise BrokenTruth("uffd-wp", f"pid {pid_of(vma.mm)} {vma!r} has entry {entry:#x}")

    def _huge(self, vma: VmArea, pmd: int, address: int, following: int, rss: list[int]) -> None:
        self.thp.huge_entry(vma, pmd, address, following, rss)
        entry = self.host.ram.u64[pmd >> 3]
        if not is_huge_zero_pmd(self.host, entry):
            self.rmap.entry(vma, address, pmd_pfn(entry))

    def _present(self, vma: VmArea, address: int, entry: int, rss: list[int]) -> None:
        pfn = pte_pfn(entry)
        if entry & _PAGE_SPECIAL or self.host.pages.flags[pfn] & PG_reserved:
            return
        self.maps[pfn] += 1
        if self.host.pages.flags[pfn] & PG_ksm and entry & _PAGE_RW:
            raise BrokenTruth("ksm-writable", f"KSM page {pfn:#x} is mapped by writable entry {entry:#x}")
        check_file_entry(self.host, pfn, entry)
        folio = page_folio(self.host.pages, pfn)
        rss[mm_counter(self.host.pages, folio)] += 1
        if folio_test_large(self.host.pages, folio):
            self.thp.entry_of(folio, vma.mm)
        self.rmap.entry(vma, address, pfn)

    def tlb(self, mm: MmStruct) -> None:
        """At rest no flush is pending, so that nobody's TLB has a right that the tables have not."""
        tables = [("TLB", mm.tlb)]
        tables += [(who, table) for who, of, table in self.host.secondary_tables.tables if of is mm]
        for who, table in tables:
            self._translations(mm, who, table)

    def _translations(self, mm: MmStruct, who: str, table: HostTlb) -> None:
        for vpn, cached in table.entries.items():
            pfn, writable, entry = translation(mm, vpn << 12, device=table is not mm.tlb)
            if pfn != cached >> 1 or (cached & 1 and not writable):
                raise BrokenTruth(
                    "tlb-stale", f"pid {pid_of(mm)} {vpn << 12:#x}: {who} {cached:#x}, entry {entry:#x}"
                )

    def frames(self) -> None:
        """Walk all frames that are not free."""
        host = self.host
        pages = host.pages
        refs = self.refs
        for holder in (lambda: self.maps, lambda: self.thp.maps, *host.frame_holders):
            for pfn, count in holder().items():
                refs[page_folio(pages, pfn)] += count
        refs.update(host.lru.batched())
        check_page_cache(host, refs, self.slots)
        for zone in host.zones:
            free = 0
            pfn = zone.start
            while pfn < zone.end:
                flags = pages.flags[pfn]
                if flags & PG_buddy:
                    free += 1 << pages.order[pfn]
                    pfn += 1 << pages.order[pfn]
                    continue
                if not flags & PG_reserved and (pages.refcount[pfn] or pfn not in host.allocator.hwpoisoned):
                    self._frame(pfn, flags)
                pfn += 1
            if free != zone.nr_free + zone.nr_isolated:
                raise BrokenTruth(
                    "free-count", f"zone {zone.name} of node {zone.nid} has {free} free frames, counts "
                    f"{zone.nr_free} and {zone.nr_isolated} isolated",
                )
        for pgmap in host.device_frames.pgmaps:
            for pfn in range(pgmap.start, pgmap.start + pgmap.nr):
                if pages.refcount[pfn] or refs[pfn]:
                    self._frame(pfn, pages.flags[pfn])

    def out_of_use(self) -> None:
        """Memory that is offline and frames that have failed are nobody's."""
        allocator, pages = self.host.allocator, self.host.pages
        for start, nr in allocator.offline.items():
            for pfn in range(start, start + nr):
                if pages.flags[pfn] & PG_hwpoison:
                    continue
                if not pages.flags[pfn] & PG_reserved or pages.refcount[pfn] or self.maps[pfn]:
                    raise BrokenTruth("offline", f"pfn {pfn:#x} is offline and somebody's")
        for pfn, held in allocator.hwpoisoned.items():
            flags = pages.flags[pfn]
            # One that could not be taken from its user stays on its list.
            on_list = PG_buddy | PG_lru if held else PG_buddy
            if not flags & PG_hwpoison or flags & on_list or pages.refcount[pfn] < held:
                who = decode_page_flags(flags)
                raise BrokenTruth("hwpoison", f"pfn {pfn:#x} has failed and is {who}, {pages.refcount[pfn]}")

    def _frame(self, pfn: int, flags: int) -> None:
        pages = self.host.pages
        if pages.tail[pfn]:
            return
        if flags & PG_head and not flags & PG_hugetlb:
            self.thp.folio(pfn, self.maps)
        who = f"pfn {pfn:#x} ({decode_page_flags(flags)})"
        expected = self.refs[pfn] + (1 if flags & PG_swapcache else 0)
        count, maps = pages.refcount[pfn], pages.mapcount[pfn]
        if flags & PG_hugetlb:
            self.hugetlb.frame(pfn, flags, self.refs[pfn])
            return
        self.rmap.folio(pfn, flags)
        self.vmstat.folio(pfn, flags)
        if count != expected or not expected:
            raise BrokenTruth("frame-refcount", f"{who} has refcount {count}, {expected} references exist")
        if maps != self.maps[pfn] and not flags & PG_head:
            raise BrokenTruth("frame-mapcount", f"{who} has mapcount {maps}, {self.maps[pfn]} entries map it")
        listed = self.host.lru.lruvec(pfn).where(pfn)
        if len(listed) != (1 if flags & PG_lru else 0):
            raise BrokenTruth("lru", f"{who} is on {listed}")

    def memcg(self) -> None:
        """Compare every group's counts with what is charged to it."""
        host = self.host
        pages: Counter[object] = Counter()
        for pfn, group in host.memcg.folios.items():
            if host.pages.flags[pfn] & PG_buddy or not host.pages.refcount[pfn]:
                raise BrokenTruth("memcg-charge", f"pfn {pfn:#x} is free and charged to {group!r}")
            pages[group] += 1 << host.pages.order[pfn]
        slots = Counter(host.memcg.slots.values())
        for group in host.memcg.groups:
            found = pages[group] + host.memcg.stocked(group)
            if (group.usage, group.swap) != (found, slots[group]):
                raise BrokenTruth("memcg-charge", f"{group!r} has {found} pages, {slots[group]} slots")

    def swap(self) -> None:
        """Compare every slot's count and cache with the entries that were found."""
        swap = self.host.swap
        if swap is None:
            if self.slots:
                raise BrokenTruth("swap-count", "there are swap entries but no swap")
            return
        pages = self.host.pages
        for slot in self.host.zswap.lru:
            if not swap.swap_map[slot]:
                raise BrokenTruth("swap-count", f"zswap keeps slot {slot:#x}, which is free")
        used = 0
        for offset, value in enumerate(swap.swap_map):
            if value == SWAP_MAP_BAD:
                continue
            used += bool(value)
            count, found = swap.swap_count(offset), self.slots[offset]
            if count != found:
                raise BrokenTruth("swap-count", f"slot {offset:#x} counts {count}, {found} entries hold it")
            cached = swap.cache[offset]
            if bool(cached) != swap.has_cache(offset):
                raise BrokenTruth("swap-cache", f"slot {offset:#x}: swap_map {value:#x}, table {cached:#x}")
            pfn = cached - 1
            if cached and (not pages.flags[pfn] & PG_swapcache or swp_offset(pages.private[pfn]) != offset):
                raise BrokenTruth("swap-cache", f"slot {offset:#x} holds pfn {pfn:#x}, which says otherwise")
        if used != swap.inuse_pages:
            raise BrokenTruth("swap-count", f"{swap.inuse_pages} slots are counted as in use, {used} are")


def nothing_left(host: HostMm) -> None:
    """After HostMm.shutdown: no frame and no swap slot is anybody's. Raises BrokenTruth."""
    pages = host.pages
    for zone in host.zones:
        lost = sum(1 for pfn in host.allocator.hwpoisoned if zone.start <= pfn < zone.end)
        if zone.nr_free == zone.managed - lost:
            continue
        pfn = zone.start
        while pages.flags[pfn] & (PG_buddy | PG_reserved | PG_hwpoison):
            pfn += 1 << pages.order[pfn] if pages.flags[pfn] & PG_buddy else 1
        who = f"pfn {pfn:#x} ({decode_page_flags(pages.flags[pfn])})"
        raise BrokenTruth("leak", f"{zone.managed - zone.nr_free} frames were not given back, {who} first")
    if host.swap is not None and host.swap.inuse_pages:
        raise BrokenTruth("leak", f"{host.swap.inuse_pages} swap slots were not given back")


def audit(host: HostMm) -> None:
    """Check the host at rest: nobody is inside a fault, reclaim or migration. Raises BrokenTruth."""
    check = _Audit(host)
    for mm in address_spaces(host):
        check.tables(mm)
        check.entries(mm)
        check.tlb(mm)
        check.hugetlb.vmas(mm)
    check_mappings(host)
    check.frames()
    check.out_of_use()
    check.hugetlb.finish()
    check.thp.finish()
    check.rmap.finish()
    check.vmstat.finish()
    check.memcg()
    for node in host.allocator.nodes:
        for vec in host.memcg.iter(node.nid, None):
            vec.audit()
    check.swap()
