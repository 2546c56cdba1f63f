"""The truths that are checked where they could break: models call them through `host.checks`.

Source of truth: the rules themselves; in Linux they are spread over mm/page_alloc.c: bad_page and
Documentation/mm/mmu_notifier.rst.

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
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import _PAGE_PRESENT, _PAGE_PSE, _PAGE_RW, HPAGE_PMD_NR, pte_pfn, walk_lockless
from host_mm.arch.x86.swapops import SWP_DEVICE_READ, is_swap_pte, pte_to_swp_entry, swp_offset, swp_type
from host_mm.kernel.errors import BrokenTruth
from host_mm.memory_device import device_entry_pfn
from host_mm.ram import PAGE_SIZE

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.interval_notifier import MmuIntervalNotifier
    from host_mm.mm_types import MmStruct
    from host_mm.tlb import HostTlb

__all__ = ["HostTruths", "address_spaces", "pid_of", "translation"]


class HostTruths:
    """The checks that models call where the rule could break; `host.checks` when they are on."""

    __slots__ = ("host",)

    def __init__(self, host: HostMm) -> None:
        self.host = host

    def frame_freed(self, pfn: int, order: int) -> None:
        """A free hook: whoever still translates to the frame will read or write another's memory."""
        for mm in address_spaces(self.host):
            tlb = mm.tlb
            if not tlb.entries:
                continue
            for frame in range(pfn, pfn + (1 << order)):
                for vpn, _ in tlb.translations_of(frame):
                    raise BrokenTruth(
                        "freed-frame-translated",
                        f"pfn {frame:#x} is freed, but pid {pid_of(mm)} translates {vpn << 12:#x} to it",
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
        for mm in address_spaces(self.host):
            for vpn, entry in mm.tlb.translations_of(pfn):
                if entry & 1:
                    raise BrokenTruth(
                        "io-while-writable",
                        f"pfn {pfn:#x} is written out, but pid {pid_of(mm)} can write it at {vpn << 12:#x}",
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
                    f"the entry of {vpn << 12:#x} moved, but pid {pid_of(mm)} still translates it",
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
            who = who or f"pid {pid_of(mm)}"
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
        tables = [(f"pid {pid_of(mm)}", mm.tlb)]
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
        mapped, may_write, entry = translation(mm, address, device=True)
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


def translation(mm: MmStruct, address: int, *, device: bool) -> tuple[int, bool, int]:
    """(frame or -1, whether it may be written, entry) by the tables; with `device` also what a device has."""
    entry, level = walk_lockless(mm.host.ram, mm.pgd, address)
    if entry & _PAGE_PRESENT:
        within = (1 << 9 * (level - 1)) - 1 if level > 1 else 0
        return (pte_pfn(entry) & ~within) + (address >> 12 & within), bool(entry & _PAGE_RW), entry
    if not device or level > 1 or not is_swap_pte(entry):
        return -1, False, entry
    return device_entry_pfn(entry), swp_type(pte_to_swp_entry(entry)) != SWP_DEVICE_READ, entry


def address_spaces(host: HostMm) -> list[MmStruct]:
    """Those that have tables."""
    return [process.mm for process in host.processes if process.mm.pgd]


def pid_of(mm: MmStruct) -> int:
    """For messages."""
    return mm.process.pid if mm.process is not None else 0
