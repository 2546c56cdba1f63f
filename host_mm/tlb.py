"""The host CPUs' TLB: a software TLB per address space, primary flushes, and the batched unmap flush.

Source of truth: arch/x86/mm/tlb.c (flush_tlb_mm_range, tlb_single_page_flush_ceiling),
mm/rmap.c (set_tlb_ubc_flush_pending, try_to_unmap_flush, flush_tlb_batched_pending); Linux 6.18.

Without it the four orders of "clear the entry, flush, free the page" could not be told apart. An entry
holds its frame and the right to write; it gets that right only from a dirty, writable PTE, as hardware
that keeps the dirty bit does. Entries leave only by a flush.

Not modelled: lazy TLB mode, ASIDs and context generations (each flush reaches every CPU), entries of
huge pages as one, the CPU's own evictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.kernel.costs import COST_TLB_FLUSH
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct

__all__ = [
    "TLB_FLUSH_ALL",
    "TRACEPOINTS",
    "HostTlb",
    "TlbUbc",
    "dec_tlb_flush_pending",
    "flush_pmd_tlb_range",
    "flush_tlb_batched_pending",
    "flush_tlb_mm",
    "flush_tlb_page",
    "flush_tlb_range",
    "inc_tlb_flush_pending",
    "mm_tlb_flush_nested",
    "mm_tlb_flush_pending",
    "set_tlb_ubc_flush_pending",
    "try_to_unmap_flush",
    "try_to_unmap_flush_dirty",
]

TLB_FLUSH_ALL = (1 << 64) - 1
TLB_SINGLE_PAGE_FLUSH_CEILING = 33
_WRITE = 1

PRIMARY_FLUSH = Tracepoint(
    "refault", "primary_flush", ("pid", "start", "end"),
    lambda pid, start, end: f"pid {pid} {start:#x} -- {end:#x}",
    doc="The host CPUs drop their translations of a range (end -1: of the whole address space).",
)
TRACEPOINTS = (PRIMARY_FLUSH,)


class HostTlb:
    """vpn -> (pfn << 1 | may write) of one address space; how many entries a frame has."""

    __slots__ = ("_frames", "entries")

    def __init__(self) -> None:
        self.entries: dict[int, int] = {}
        self._frames: dict[int, int] = {}

    def lookup(self, address: int, write: bool) -> int:
        """The frame that `address` translates to, or -1 if the tables must be walked."""
        entry = self.entries.get(address >> 12)
        if entry is None or (write and not entry & _WRITE):
            return -1
        return entry >> 1

    def fill(self, address: int, pfn: int, write: bool) -> None:
        """Remember a walk's answer."""
        vpn = address >> 12
        if vpn in self.entries:
            self.drop(vpn)
        self.entries[vpn] = pfn << 1 | write
        self._frames[pfn] = self._frames.get(pfn, 0) + 1

    def drop(self, vpn: int) -> None:
        """Forget a page, if it is known."""
        entry = self.entries.pop(vpn, None)
        if entry is not None:
            pfn = entry >> 1
            left = self._frames[pfn] - 1
            if left:
                self._frames[pfn] = left
            else:
                del self._frames[pfn]

    def known_in(self, start: int, end: int) -> list[int]:
        """The vpns of [start, end) that are known."""
        first, last = start >> 12, (end - 1) >> 12
        if last - first < len(self.entries):
            return [vpn for vpn in range(first, last + 1) if vpn in self.entries]
        return [vpn for vpn in self.entries if first <= vpn <= last]

    def drop_range(self, start: int, end: int) -> int:
        """Forget what lies in [start, end); how many pages that were."""
        gone = self.known_in(start, end)
        for vpn in gone:
            self.drop(vpn)
        return len(gone)

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self._frames.clear()

    def translations_of(self, pfn: int) -> list[tuple[int, int]]:
        """(vpn, entry) of everything that reaches the frame."""
        if pfn not in self._frames:
            return []
        return [(vpn, entry) for vpn, entry in self.entries.items() if entry >> 1 == pfn]


class TlbUbc:
    """struct tlbflush_unmap_batch of one task: whose translations wait for a flush.

    `writable` says that one of them was dirty, so that the flush must precede I/O.
    """

    __slots__ = ("mms", "writable")

    def __init__(self) -> None:
        self.mms: dict[MmStruct, None] = {}
        self.writable = False


def _flush(mm: MmStruct, start: int, end: int) -> None:
    """The CPUs' part; who walks their tables too is told by the caller."""
    host = mm.host
    sched = host.sched
    if sched.preempt:
        sched.point("tlb-flush")
    if (t := host.trace.primary_flush) is not None:
        t(mm.process.pid, start, end)
    sched.advance(COST_TLB_FLUSH)
    if "no-primary-flush" not in host.breaks:
        tlb = mm.tlb
        if end == TLB_FLUSH_ALL:
            tlb.clear()
        elif tlb.entries:
            first, last = start >> 12, (end + 0xFFF) >> 12
            if last - first > len(tlb.entries):
                for vpn in [vpn for vpn in tlb.entries if first <= vpn < last]:
                    tlb.drop(vpn)
            else:
                for vpn in range(first, last):
                    tlb.drop(vpn)


def flush_tlb_range(mm: MmStruct, start: int, end: int) -> None:
    """Flush [start, end); beyond 33 pages the whole address space is cheaper, as flush_tlb_mm_range.

    Secondary TLBs are told of the range that was asked for.
    """
    if end == TLB_FLUSH_ALL or (end - start) >> 12 > TLB_SINGLE_PAGE_FLUSH_CEILING:
        _flush(mm, 0, TLB_FLUSH_ALL)
    else:
        _flush(mm, start, end)
    mmu_notifier.mmu_notifier_arch_invalidate_secondary_tlbs(mm, start, end)


def flush_tlb_page(mm: MmStruct, address: int) -> None:
    """Flush one page."""
    page = address & ~0xFFF
    flush_tlb_range(mm, page, page + 4096)


def flush_pmd_tlb_range(mm: MmStruct, start: int, end: int) -> None:
    """Flush entries of 2 MiB each: it is their number that may be too many to flush one by one."""
    if (end - start) >> 21 > TLB_SINGLE_PAGE_FLUSH_CEILING:
        flush_tlb_range(mm, start, end)
        return
    _flush(mm, start, end)
    mmu_notifier.mmu_notifier_arch_invalidate_secondary_tlbs(mm, start, end)


def flush_tlb_mm(mm: MmStruct) -> None:
    """Flush the whole address space."""
    flush_tlb_range(mm, 0, TLB_FLUSH_ALL)


# -- pending flushes ----------------------------------------------------------------------------
def inc_tlb_flush_pending(mm: MmStruct) -> None:
    """Somebody changes entries now and flushes later."""
    mm.tlb_flush_pending += 1


def dec_tlb_flush_pending(mm: MmStruct) -> None:
    """That flush is done."""
    mm.tlb_flush_pending -= 1


def mm_tlb_flush_pending(mm: MmStruct) -> bool:
    """Whether a changed entry may still be cached."""
    return mm.tlb_flush_pending > 0


def mm_tlb_flush_nested(mm: MmStruct) -> bool:
    """Whether two change entries at once."""
    return mm.tlb_flush_pending > 1


# -- the batched unmap flush --------------------------------------------------------------------
def set_tlb_ubc_flush_pending(mm: MmStruct, dirty: bool) -> None:
    """The current task cleared an entry of `mm` and flushes before the page is freed or written."""
    host = mm.host
    task = host.sched.current
    ubc = host.tlb_ubc.get(task)
    if ubc is None:
        ubc = host.tlb_ubc[task] = TlbUbc()
    ubc.mms[mm] = None
    mmu_notifier.mmu_notifier_arch_invalidate_secondary_tlbs(mm, 0, TLB_FLUSH_ALL)
    mm.tlb_flush_batched += 1
    if dirty:
        ubc.writable = True


def try_to_unmap_flush(host: HostMm) -> None:
    """Flush what the current task's unmaps left pending. Secondary TLBs were told when it was noted."""
    ubc = host.tlb_ubc.pop(host.sched.current, None)
    if ubc is not None:
        for mm in ubc.mms:
            if mm.pgd:
                _flush(mm, 0, TLB_FLUSH_ALL)


def try_to_unmap_flush_dirty(host: HostMm) -> None:
    """The same if a pending translation could still be written through: before I/O."""
    ubc = host.tlb_ubc.get(host.sched.current)
    if ubc is not None and ubc.writable:
        try_to_unmap_flush(host)


def flush_tlb_batched_pending(mm: MmStruct) -> None:
    """Before changing entries under the page-table lock: reclaim may have cleared some unflushed."""
    seen = mm.tlb_flush_batched
    if seen:
        flush_tlb_mm(mm)
        # What was noted meanwhile is still to be flushed.
        if mm.tlb_flush_batched == seen:
            mm.tlb_flush_batched = 0
