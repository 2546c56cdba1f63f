"""Swap I/O: a folio's bytes on their way to and from the swap file, in logical time.

Source of truth: mm/page_io.c: swap_writeout, __swap_writepage, end_swap_bio_write, swap_read_folio,
end_swap_bio_read (Linux 6.18, an asynchronous block device).

A read keeps the folio locked until it completes; a write keeps it under writeback, unlocked. The
device moves memory while the request is in flight, not at one instant: of a write, the first half
of the page is taken at submission and the second at completion, so that whoever changes the page
meanwhile without making it dirty again has torn the copy in the file. A read fills the frame at
completion. Requests overlap: one completes at most every COST / QUEUE_DEPTH.

Pages of zeros are not written: a bit in the zero map stands for them.

A synchronous device (zram) has done all that when the call returns, or has failed for want of memory:
then the folio is dirty again.

Not modelled: I/O errors of the file, merging of neighbouring requests, congestion, swap over a filesystem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.arch.x86.swapops import swp_offset
from host_mm.filemap import folio_end_writeback, folio_start_writeback, folio_unlock
from host_mm.kernel.costs import COST_DECOMPRESS_PAGE, COST_SWAP_READ, COST_SWAP_WRITE
from host_mm.kernel.errors import BrokenTruth
from host_mm.page import PG_locked, PG_reclaim, PG_swapcache, PG_uptodate, set_page_dirty
from host_mm.ram import PAGE_SIZE
from host_mm.swap_state import folio_free_swap
from trace_events.stream import TaskContext
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.swapfile import SwapInfo
    from host_mm.zram import Zram

__all__ = [
    "QUEUE_DEPTH", "SWAP_CLUSTER_MAX", "TRACEPOINTS", "SwapDevice", "swap_read_folio", "swap_writeout",
    "swap_writepage",
]

SWAP_CLUSTER_MAX = 32
QUEUE_DEPTH = 16
"""Requests the device works on at once."""

_HALF = PAGE_SIZE // 2


def _fmt(pfn: int, slot: int) -> str:
    return f"pfn={pfn:#x} slot={slot:#x}"


SWAP_WRITE_START = Tracepoint(
    "refault", "swap_write_start", ("pfn", "slot"), _fmt, doc="A folio goes under writeback."
)
SWAP_WRITE_END = Tracepoint(
    "refault", "swap_write_end", ("pfn", "slot"), _fmt, doc="Its bytes are in the file."
)
SWAP_READ_START = Tracepoint(
    "refault", "swap_read_start", ("pfn", "slot"), _fmt, doc="A locked folio waits for its bytes."
)
SWAP_READ_END = Tracepoint(
    "refault", "swap_read_end", ("pfn", "slot"), _fmt, doc="The bytes are there, the folio is unlocked."
)
SWAP_ZERO = Tracepoint(
    "refault", "swap_zero", ("pfn", "slot", "write"),
    lambda pfn, slot, write: f"pfn={pfn:#x} slot={slot:#x} {'out' if write else 'in'}",
    doc="A page of zeros is swapped without I/O.",
)

TRACEPOINTS = (SWAP_WRITE_START, SWAP_WRITE_END, SWAP_READ_START, SWAP_READ_END, SWAP_ZERO)


class SwapDevice:
    """The request queue of the swap file's device, or of the files'. `inflight` maps pfn to slot (page).

    Reclaimers that wait for writeback hang on `host.reclaim_wait`; `throttled_written` counts what
    completed since the first of them came.
    """

    __slots__ = ("host", "inflight", "last_read", "last_write", "name", "throttled_written")

    def __init__(self, host: HostMm, name: str = "swap-io") -> None:
        self.host = host
        self.name = name
        self.inflight: dict[int, int] = {}
        self.last_read = 0
        self.last_write = 0
        self.throttled_written = 0

    def submit_read(self, pfn: int, slot: int, done: Callable[[], None]) -> None:
        """Call `done` when the read would complete."""
        when = max(self.host.sched.now + COST_SWAP_READ, self.last_read + COST_SWAP_READ // QUEUE_DEPTH)
        self.last_read = when
        self._submit(pfn, slot, when, done)

    def submit_write(self, pfn: int, slot: int, done: Callable[[], None]) -> None:
        """Call `done` when the write would complete."""
        when = max(self.host.sched.now + COST_SWAP_WRITE, self.last_write + COST_SWAP_WRITE // QUEUE_DEPTH)
        self.last_write = when
        self._submit(pfn, slot, when, done)

    def drain(self) -> None:
        """Sleep until nothing is in flight: what quiescence means for swap."""
        while self.inflight:
            self.host.sched.sleep(COST_SWAP_READ)

    def _submit(self, pfn: int, slot: int, when: int, done: Callable[[], None]) -> None:
        sched = self.host.sched
        stream = self.host.stream
        self.inflight[pfn] = slot
        irq = TaskContext(self.name, cause=stream.ctx.cause)

        def complete() -> None:
            # An interrupt: it runs on top of whoever is current and may not be preempted.
            task, ctx = sched.current, stream.ctx
            stream.ctx = irq
            task.no_preempt += 1
            del self.inflight[pfn]
            done()
            self._acct_reclaim_writeback()
            task.no_preempt -= 1
            stream.ctx = ctx

        sched.after(when - sched.now, complete)


    def _acct_reclaim_writeback(self) -> None:
        """A cluster for each waiting reclaimer is done, or all there was: let them go on."""
        queue = self.host.reclaim_wait
        if queue.waiters:
            self.throttled_written += 1
            if not self.inflight or self.throttled_written > SWAP_CLUSTER_MAX * len(queue.waiters):
                queue.wake_all()


def _swap(host: HostMm) -> SwapInfo:
    if host.swap is None:
        raise BrokenTruth("swap-file", "swap I/O on a host without swap", host.stream.here())
    return host.swap


def swap_writeout(host: HostMm, pfn: int) -> None:
    """Write a locked, clean-marked swap cache folio out; unlocks it. It may need no I/O at all."""
    swap = _swap(host)
    if folio_free_swap(host, pfn):
        folio_unlock(host, pfn)
        return
    slot = swp_offset(host.pages.private[pfn])
    if host.ram.page_is_zero(pfn):
        swap.zeromap[slot] = 1
        host.vmstat["swpout_zero"] += 1
        if (t := host.trace.swap_zero) is not None:
            t(pfn, slot, True)
        folio_unlock(host, pfn)
        return
    swap.zeromap[slot] = 0
    if host.zswap.store(pfn):
        folio_unlock(host, pfn)
        return
    swap_writepage(host, pfn, slot)


def swap_writepage(host: HostMm, pfn: int, slot: int) -> None:
    """__swap_writepage: the locked folio's bytes go to the device; unlocks it."""
    swap = _swap(host)
    if host.checks is not None:
        host.checks.writeback_starts(pfn)
    host.vmstat["pswpout"] += 1
    folio_start_writeback(host, pfn)
    if (t := host.trace.swap_write_start) is not None:
        t(pfn, slot)
    pa = pfn << 12
    if swap.zram is not None:
        _write_sync(host, pfn, slot, swap.zram)
        return
    swap.pwrite_part(slot, 0, host.ram.b[pa : pa + _HALF])
    folio_unlock(host, pfn)

    def done() -> None:
        swap.pwrite_part(slot, _HALF, host.ram.b[pa + _HALF : pa + PAGE_SIZE])
        if (t := host.trace.swap_write_end) is not None:
            t(pfn, slot)
        folio_end_writeback(host, pfn)

    host.swap_device.submit_write(pfn, slot, done)


def _write_sync(host: HostMm, pfn: int, slot: int, zram: Zram) -> None:
    """swap_writepage_bdev_sync."""
    folio_unlock(host, pfn)
    stored = zram.write_page(slot, host.ram.read(pfn << 12, PAGE_SIZE))
    if not stored:
        # The bytes are nowhere else: the folio must not be dropped.
        set_page_dirty(host, pfn)
        host.pages.flags[pfn] &= ~PG_reclaim
    if (t := host.trace.swap_write_end) is not None:
        t(pfn, slot)
    folio_end_writeback(host, pfn)


def swap_read_folio(host: HostMm, pfn: int) -> None:
    """Fill a locked folio from its slot, `private`; it is unlocked, up to date, when that is done.

    It is in the swap cache, unless the device is synchronous and the slot was claimed for this read.
    """
    swap = _swap(host)
    pages = host.pages
    flags = pages.flags[pfn]
    if not flags & PG_locked or not (flags & PG_swapcache or swap.zram is not None):
        raise BrokenTruth(
            "swap-file", f"pfn {pfn:#x} is read without being locked in the swap cache", host.stream.here()
        )
    slot = swp_offset(pages.private[pfn])
    if swap.zeromap[slot]:
        host.vmstat["swpin_zero"] += 1
        host.ram.clear_page(pfn)
        pages.flags[pfn] |= PG_uptodate
        if (t := host.trace.swap_zero) is not None:
            t(pfn, slot, False)
        folio_unlock(host, pfn)
        return
    if (host.zswap.enabled or host.zswap.lru) and host.zswap.load(pfn):
        return
    host.vmstat["pswpin"] += 1
    if (t := host.trace.swap_read_start) is not None:
        t(pfn, slot)

    def done() -> None:
        host.ram.write(pfn << 12, swap.pread(slot))
        pages.flags[pfn] |= PG_uptodate
        if (t := host.trace.swap_read_end) is not None:
            t(pfn, slot)
        folio_unlock(host, pfn)

    if swap.zram is not None:
        host.sched.advance(COST_DECOMPRESS_PAGE)
        done()
        return
    host.swap_device.submit_read(pfn, slot, done)
