"""What must hold of the host's mm, checked while it runs and at rest.

Source of truth: the rules themselves; in Linux they are spread over mm/page_alloc.c: bad_page,
mm/memory.c: check_mm, mm/swapfile.c's warnings and Documentation/mm/mmu_notifier.rst.

    freed-frame-translated   no host TLB entry and no device's translation reaches a frame that is being freed
    io-while-writable        no writable one reaches a folio whose write-out begins
    dirty-dropped            a folio dropped as clean has the bytes that its swap slot has
    held-frame-moved         no frame is migrated that somebody writes to by a reference of his own
    held-frame-merged        ... nor taken by KSM
    moved-still-translated   no translation of an entry that mremap moved outlives the page-table locks
    flush-before-set         no entry gets another frame while a host TLB entry or a device's translation
                             still reaches the old one, unless a flush is pending
    secondary-stale          nothing is published to a device that the tables do not say
    interval-publish         nothing is published under a sequence number that has moved on
    frame-refcount           at rest, a frame is free or has exactly the references that exist
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

The first seven raise from the place where they break; `audit` checks the others when nobody is
inside mm. References that are neither mappings, page tables, swap cache nor LRU batches come from
`host.frame_holders`: callables that give a dict of pfn to count (KVM's tables, pins).

The truths of huge pages are in truths_hugetlb.py and truths_thp.py.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_PRESENT,
    _PAGE_PSE,
    _PAGE_RW,
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    HPAGE_PMD_NR,
    PFN_MASK,
    SWP_DEVICE_READ,
    is_migration_entry,
    is_swap_pte,
    non_swap_entry,
    pmd_table,
    pte_pfn,
    pte_present,
    pte_swp_uffd_wp_any,
    pte_to_swp_entry,
    swp_offset,
    swp_type,
    walk_lockless,
)
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
from host_mm.ram import PAGE_SIZE
from host_mm.swapfile import SWAP_MAP_BAD
from host_mm.truths_files import check_file_entry, check_mappings, check_page_cache
from host_mm.truths_hugetlb import HugetlbAudit
from host_mm.truths_thp import ThpAudit

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.interval_notifier import MmuIntervalNotifier
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.tlb import HostTlb

__all__ = ["HostTruths", "audit", "nothing_left"]

_RSS = ("file", "anon", "swap", "shmem")


class HostTruths:
    """The checks that models call where the rule could break; `host.checks` when they are on."""

    __slots__ = ("host",)

    def __init__(self, host: HostMm) -> None:
        self.host = host

    def frame_freed(self, pfn: int, order: int) -> None:
        """A free hook: whoever still translates to the frame will read or write another's memory."""
        for mm in _mms(self.host):
            tlb = mm.tlb
            if not tlb.entries:
                continue
            for frame in range(pfn, pfn + (1 << order)):
                for vpn, _ in tlb.translations_of(frame):
                    raise BrokenTruth(
                        "freed-frame-translated",
                        f"pfn {frame:#x} is freed, but pid {_pid(mm)} translates {vpn << 12:#x} to it",
                        self.host.stream.here(),
                    )
        for frame in range(pfn, pfn + (1 << order)):
            for who, address, _ in self.host.secondary_tables.reaching(frame):
                raise BrokenTruth(
                    "freed-frame-translated",
                    f"pfn {frame:#x} is freed, but {who} translates {address:#x} to it",
                    self.host.stream.here(),
                )

    def writeback_starts(self, pfn: int) -> None:
        """Bytes written through a stale translation from now on would be lost."""
        for mm in _mms(self.host):
            for vpn, entry in mm.tlb.translations_of(pfn):
                if entry & 1:
                    raise BrokenTruth(
                        "io-while-writable",
                        f"pfn {pfn:#x} is written out, but pid {_pid(mm)} can write it at {vpn << 12:#x}",
                        self.host.stream.here(),
                    )

        for who, address, writable in self.host.secondary_tables.reaching(pfn):
            if writable:
                raise BrokenTruth(
                    "io-while-writable",
                    f"pfn {pfn:#x} is written out, but {who} can write it at {address:#x}",
                    self.host.stream.here(),
                )

    def folio_moves(self, pfn: int) -> None:
        """Migration gives the folio's identity to another frame: nobody may write to the old one."""
        host = self.host
        if host.pins[pfn] or host.held[pfn]:
            raise BrokenTruth(
                "held-frame-moved", f"pfn {pfn:#x} is migrated although its user still writes to it",
                host.stream.here(),
            )

    def folio_merges(self, pfn: int) -> None:
        """KSM write-protects the page to share it: nobody may write to it past its entries."""
        host = self.host
        if host.pins[pfn] or host.held[pfn]:
            raise BrokenTruth(
                "held-frame-merged", f"KSM takes pfn {pfn:#x} although its user still writes to it",
                host.stream.here(),
            )

    def entries_moved(self, mm: MmStruct, start: int, end: int) -> None:
        """The locks of both places are about to be dropped: then the page may go from the new one."""
        tlb = mm.tlb.entries
        pages = range(start >> 12, end >> 12)
        for vpn in pages if len(pages) < len(tlb) else [vpn for vpn in tlb if vpn in pages]:
            if vpn in tlb:
                raise BrokenTruth(
                    "moved-still-translated",
                    f"the entry of {vpn << 12:#x} moved, but pid {_pid(mm)} still translates it",
                    self.host.stream.here(),
                )

    def pte_set(self, mm: MmStruct, address: int, old: int, new: int) -> None:
        """A pte hook: whoever still has the old translation would go on with the old frame."""
        if not new & _PAGE_PRESENT or mm.tlb_flush_pending or mm.tlb_flush_batched:
            return
        self._still_reaches(mm.tlb, "", mm, address, pte_pfn(new))
        for who, of, table in self.host.secondary_tables.tables:
            if of is mm:
                self._still_reaches(table, who, mm, address, pte_pfn(new))

    def _still_reaches(self, table: HostTlb, who: str, mm: MmStruct, address: int, pfn: int) -> None:
        cached = table.entries.get(address >> 12)
        if cached is not None and cached >> 1 != pfn:
            who = who or f"pid {_pid(mm)}"
            raise BrokenTruth(
                "flush-before-set",
                f"{address:#x} gets pfn {pfn:#x}, {who} still reaches pfn {cached >> 1:#x}",
                self.host.stream.here(),
            )

    def pmd_set(self, mm: MmStruct, address: int, old: int, new: int) -> None:
        """A pmd hook: the same for all that a huge entry maps."""
        if not new & _PAGE_PRESENT or not new & _PAGE_PSE or mm.tlb_flush_pending or mm.tlb_flush_batched:
            return
        first, pfn = address >> 12, pte_pfn(new)
        tables = [(f"pid {_pid(mm)}", mm.tlb)]
        tables += [(who, table) for who, of, table in self.host.secondary_tables.tables if of is mm]
        for who, table in tables:
            for vpn, cached in table.entries.items():
                if 0 <= vpn - first < HPAGE_PMD_NR and cached >> 1 != pfn + vpn - first:
                    raise BrokenTruth(
                        "flush-before-set",
                        f"{address:#x} gets the huge page at pfn {pfn:#x}, {who} still reaches pfn "
                        f"{cached >> 1:#x} at {vpn << 12:#x}", self.host.stream.here(),
                    )

    def folio_dropped_clean(self, pfn: int) -> None:
        """The folio goes; what it holds must be in its swap slot."""
        host = self.host
        swap = host.swap
        if swap is None:
            raise BrokenTruth("dirty-dropped", f"pfn {pfn:#x} is dropped on a host without swap")
        slot = swp_offset(host.pages.private[pfn])
        if not swap.swap_count(slot):
            # Its last entry was unmapped while the folio was busy: nobody can ever ask for the bytes.
            return
        kept = bytes(PAGE_SIZE) if swap.zeromap[slot] else host.zswap.data(slot) or swap.pread(slot)
        if host.ram.read(pfn << 12, PAGE_SIZE) != kept:
            raise BrokenTruth(
                "dirty-dropped", f"pfn {pfn:#x} is dropped as clean, slot {slot:#x} has other bytes",
                host.stream.here(),
            )

    def translation_published(
        self, who: str, mm: MmStruct, address: int, pfn: int, writable: bool
    ) -> None:
        """A secondary MMU gets a translation: no bracket is open there, so it is what the tables say."""
        mapped, may_write, entry = _translation(mm, address, device=True)
        if mapped != pfn or (writable and not may_write):
            raise BrokenTruth(
                "secondary-stale",
                f"{who} gets {address:#x} as pfn {pfn:#x}{' to write' if writable else ''}, "
                f"the entry is {entry:#x}",
                self.host.stream.here(),
            )

    def interval_published(self, sub: MmuIntervalNotifier, seq: int) -> None:
        """A user of an interval notifier publishes what it read since mmu_interval_read_begin."""
        if sub.invalidate_seq != seq:
            raise BrokenTruth(
                "interval-publish",
                f"{sub.start:#x} -- {sub.last:#x}: published under seq {seq}, now {sub.invalidate_seq}",
                self.host.stream.here(),
            )


def _translation(mm: MmStruct, address: int, *, device: bool) -> tuple[int, bool, int]:
    """(frame or -1, whether it may be written, entry) by the tables; with `device` also what a device has."""
    entry, level = walk_lockless(mm.host.ram, mm.pgd, address)
    if entry & _PAGE_PRESENT:
        within = (1 << 9 * (level - 1)) - 1 if level > 1 else 0
        return (pte_pfn(entry) & ~within) + (address >> 12 & within), bool(entry & _PAGE_RW), entry
    if not device or level > 1 or not is_swap_pte(entry):
        return -1, False, entry
    return device_entry_pfn(entry), swp_type(pte_to_swp_entry(entry)) != SWP_DEVICE_READ, entry


def _mms(host: HostMm) -> list[MmStruct]:
    return [process.mm for process in host.processes if process.mm.pgd]


def _pid(mm: MmStruct) -> int:
    return mm.process.pid if mm.process is not None else 0


class _Audit:
    """One audit: what the tables of all processes hold, to be compared with the counts."""

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.maps: Counter[int] = Counter()
        self.refs: Counter[int] = Counter()
        self.slots: Counter[int] = Counter()
        self.thp = ThpAudit(host)
        self.hugetlb = HugetlbAudit(host)

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
            for pmd, address, following in pmd_slots(mm, vma.start, vma.end):
                if not pmd_table(u64[pmd >> 3]):
                    if not vma.flags & VM_HUGETLB:
                        self.thp.huge_entry(vma, pmd, address, following, rss)
                    continue
                first = ((u64[pmd >> 3] & PFN_MASK) >> 3) + ((address >> 12) & 511)
                for entry in u64[first : first + ((following - address) >> 12)].tolist():
                    if not entry:
                        continue
                    self._uffd_wp(vma, entry)
                    if pte_present(entry):
                        self._present(mm, entry, rss)
                    elif (pfn := device_entry_pfn(entry)) >= 0:
                        self.maps[pfn] += 1
                        rss[MM_ANONPAGES] += 1
                    elif not non_swap_entry(swp := pte_to_swp_entry(entry)):
                        self.slots[swp_offset(swp)] += 1
                        rss[MM_SWAPENTS] += 1
                    elif is_migration_entry(swp):
                        raise BrokenTruth("frame-mapcount", f"a migration entry is left in pid {_pid(mm)}")
        if mm.rss != rss:
            raise BrokenTruth("rss", f"pid {_pid(mm)} counts {mm.rss} pages, has {rss} ({', '.join(_RSS)})")

    def _uffd_wp(self, vma: VmArea, entry: int) -> None:
        present = pte_present(entry)
        if not (entry & _PAGE_UFFD_WP if present else pte_swp_uffd_wp_any(entry)):
            return
        if not vma.flags & VM_UFFD_WP or (present and entry & _PAGE_RW):
            raise BrokenTruth("uffd-wp", f"pid {_pid(vma.mm)} {vma!r} has entry {entry:#x}")

    def _present(self, mm: MmStruct, entry: int, rss: list[int]) -> None:
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
            self.thp.entry_of(folio, mm)

    def tlb(self, mm: MmStruct) -> None:
        """At rest no flush is pending, so that nobody's TLB has a right that the tables have not."""
        tables = [("TLB", mm.tlb)]
        tables += [(who, table) for who, of, table in self.host.secondary_tables.tables if of is mm]
        for who, table in tables:
            self._translations(mm, who, table)

    def _translations(self, mm: MmStruct, who: str, table: HostTlb) -> None:
        for vpn, cached in table.entries.items():
            pfn, writable, entry = _translation(mm, vpn << 12, device=table is not mm.tlb)
            if pfn != cached >> 1 or (cached & 1 and not writable):
                raise BrokenTruth(
                    "tlb-stale", f"pid {_pid(mm)} {vpn << 12:#x}: {who} {cached:#x}, entry {entry:#x}"
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
            if host.pages.flags[pfn] & PG_buddy:
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
    for mm in _mms(host):
        check.tables(mm)
        check.entries(mm)
        check.tlb(mm)
        check.hugetlb.vmas(mm)
    check_mappings(host)
    check.frames()
    check.out_of_use()
    check.hugetlb.finish()
    check.thp.finish()
    check.memcg()
    for node in host.allocator.nodes:
        for vec in host.memcg.iter(node.nid, None):
            vec.audit()
    check.swap()
