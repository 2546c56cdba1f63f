"""An RDMA engine: work requests on memory that was registered with it, in the background.

Source: the InfiniBand architecture's verbs (send queue, completion queue, RDMA WRITE, READ, FETCH AND
ADD) as include/rdma/ib_verbs.h names them; Linux 6.18. Registers and queue formats are its own, see
emu/abi.py.

The queue pair is a loopback: both ends of a request are regions of this device. Requests are taken from
the send ring in order and done by a task of the device's own, page by page, each page's DMA landing a
little later. The rings lie in a region like all else: the device reaches them by its page table, and
they may be swapped out as well. A request that fails stops the queue (error state); those behind it are
flushed. A host that talks to the device directly (the peer's end of a connection) uses `dma_read`,
`dma_write` and `fetch_add`.

Not modelled: more than one queue pair, interrupts, a network, ordering other than in order, retries.
"""

from __future__ import annotations

import struct
from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING

from emu.abi import (
    RDMA_COMPLETED,
    RDMA_CQ,
    RDMA_CQE_SIZE,
    RDMA_DOORBELL,
    RDMA_ERROR,
    RDMA_FETCH_ADD,
    RDMA_GPA,
    RDMA_MAX_BYTES,
    RDMA_READ,
    RDMA_READY,
    RDMA_RESET,
    RDMA_RING_ENTRIES,
    RDMA_RING_KEY,
    RDMA_SIZE,
    RDMA_SQ,
    RDMA_STATE,
    RDMA_WQE_SIZE,
    RDMA_WRITE,
    WC_LOC_PROT_ERR,
    WC_LOC_QP_OP_ERR,
    WC_REM_ACCESS_ERR,
    WC_SUCCESS,
    WC_WR_FLUSH_ERR,
)
from emu.devices.rdma_mr import MemoryRegion, OdpRegion, PinnedRegion
from host_mm.kernel.errors import KernelError
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.process import Process

__all__ = ["TRACEPOINTS", "RdmaDevice"]

DMA_NS = 500
"""From the moment a page's DMA is let through until its bytes have landed."""
_WQE = struct.Struct("<IIIIQQIIQ")
_CQE = struct.Struct("<IIQ")
_NAMES = {RDMA_WRITE: "write", RDMA_READ: "read", RDMA_FETCH_ADD: "fetch-add"}

RDMA_REQUEST = Tracepoint(
    "refault", "rdma_request", ("number", "op", "length"),
    lambda number, op, length: f"{number} {op} {length} bytes",
    scope=True, doc="The RDMA engine begins a work request.",
)
RDMA_COMPLETION = Tracepoint(
    "refault", "rdma_completion", ("number", "status"), lambda number, status: f"{number} status {status}",
    doc="... and has written its completion.",
)
TRACEPOINTS = (RDMA_REQUEST, RDMA_COMPLETION)


class _Failed(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class RdmaDevice:
    """The device of one VM. With `closing` set no request begins; `running`: one is under way."""

    def __init__(self, host: HostMm, process: Process) -> None:
        self.host = host
        self.process = process
        self.trace = host.stream.bind(TRACEPOINTS)
        self.regions: dict[int, MemoryRegion] = {}
        self.last_key = 0
        self.running = False
        self.closing = False
        self.sq = self.cq = self.ring_key = 0
        self.state = RDMA_RESET
        self.produced = self.completed = self.resets = 0

    # -- regions ------------------------------------------------------------------------------

    def register(self, iova: int, address: int, length: int, *, pinned: bool, writable: bool = True) -> int:
        """ib_reg_user_mr: a key for `length` bytes at the process's `address`. KernelError."""
        kind = PinnedRegion if pinned else OdpRegion
        key = self.last_key + 1
        self.regions[key] = kind(self.process, key, iova, address, length, writable)
        self.last_key = key
        return key

    def deregister(self, key: int) -> None:
        """ib_dereg_mr. KernelError(ENOENT)."""
        region = self.region(key)
        del self.regions[key]
        region.wait_unused()
        region.release()

    def region(self, key: int) -> MemoryRegion:
        """What the key opens. KernelError(ENOENT)."""
        region = self.regions.get(key)
        if region is None:
            raise KernelError(ENOENT, f"no memory region has key {key}")
        return region

    def close(self) -> None:
        """The device's file is closed: every region goes, as they do after the process is gone."""
        for key in list(self.regions):
            self.deregister(key)

    # -- DMA ----------------------------------------------------------------------------------

    def dma_read(self, key: int, iova: int, length: int) -> bytes:
        """Bytes of a region, by DMA. KernelError: ENOENT, EFAULT."""
        region = self.region(key)
        hva = region.hva(iova, length, write=False)
        parts: list[bytes] = []
        with region:
            while length:
                step = min(length, 4096 - (hva & 4095))
                pfn = region.begin(hva, length, write=False)
                self.host.sched.sleep(DMA_NS)
                parts.append(self.host.ram.read((pfn << 12) + (hva & 4095), step))
                region.end(hva)
                hva += step
                length -= step
        return b"".join(parts)

    def dma_write(self, key: int, iova: int, data: bytes) -> None:
        """Store bytes into a region, by DMA. KernelError: ENOENT, EFAULT, EPERM."""
        region = self.region(key)
        hva = region.hva(iova, len(data), write=True)
        done = 0
        with region:
            while done < len(data):
                step = min(len(data) - done, 4096 - (hva & 4095))
                pfn = region.begin(hva, len(data) - done, write=True)
                self.host.sched.sleep(DMA_NS)
                self.host.ram.write((pfn << 12) + (hva & 4095), data[done : done + step])
                region.end(hva)
                hva += step
                done += step

    def fetch_add(self, key: int, iova: int, operand: int) -> int:
        """Add to 8 aligned bytes at once; what was there. KernelError: ENOENT, EFAULT, EPERM, EINVAL."""
        region = self.region(key)
        if iova & 7:
            raise KernelError(EINVAL, f"{iova:#x} is not aligned to 8")
        hva = region.hva(iova, 8, write=True)
        with region:
            pfn = region.begin(hva, 8, write=True)
            self.host.sched.sleep(DMA_NS)
            at = (pfn << 12) + (hva & 4095)
            old = int.from_bytes(self.host.ram.read(at, 8), "little")
            self.host.ram.write(at, (old + operand & (1 << 64) - 1).to_bytes(8, "little"))
            region.end(hva)
        return old

    # -- registers ----------------------------------------------------------------------------

    def covers(self, gpa: int) -> bool:
        """Whether the device answers at `gpa`."""
        return RDMA_GPA <= gpa < RDMA_GPA + RDMA_SIZE

    def read(self, gpa: int, size: int) -> int:
        """A load from a register; all ones where there is none."""
        registers = {
            RDMA_SQ: self.sq, RDMA_CQ: self.cq, RDMA_RING_KEY: self.ring_key, RDMA_STATE: self.state,
            RDMA_DOORBELL: self.produced, RDMA_COMPLETED: self.completed,
        }
        return registers.get(gpa - RDMA_GPA, -1) & (1 << 8 * size) - 1

    def write(self, gpa: int, size: int, value: int) -> None:
        """A store to a register; ignored where there is none or it is for reading."""
        offset = gpa - RDMA_GPA
        if offset == RDMA_SQ:
            self.sq = value
            self.resets += 1
            self.produced = self.completed = 0
            self.state = RDMA_READY
        elif offset == RDMA_CQ:
            self.cq = value
        elif offset == RDMA_RING_KEY:
            self.ring_key = value
        elif offset == RDMA_DOORBELL and self.state != RDMA_RESET:
            self.produced = value
            self._kick()

    # -- the queue ----------------------------------------------------------------------------

    def _kick(self) -> None:
        if not self.running and self.completed < self.produced:
            self.running = True
            self.host.sched.spawn("rdma", self._engine)

    def _engine(self) -> None:
        try:
            while self.completed < self.produced and not self.closing:
                self._one(self.completed)
        finally:
            self.running = False

    def _one(self, number: int) -> None:
        """Do request `number` and write its completion; the rings' own failure stops without one."""
        slot = number % RDMA_RING_ENTRIES
        resets = self.resets
        try:
            wqe = self.dma_read(self.ring_key, self.sq + slot * RDMA_WQE_SIZE, _WQE.size)
        except KernelError:
            self._broken(resets)
            return
        opcode, wr_id, lkey, rkey, laddr, raddr, length, _, operand = _WQE.unpack(wqe)
        ctx = self.host.stream.ctx
        saved = ctx.cause
        if (t := self.trace.rdma_request) is not None:
            ctx.cause = t(number, _NAMES.get(opcode, "unknown"), length)
        status = WC_WR_FLUSH_ERR
        if self.state == RDMA_READY:
            try:
                self._do(opcode, lkey, rkey, laddr, raddr, length, operand)
                status = WC_SUCCESS
            except _Failed as exc:
                status = exc.status
                if self.resets == resets:
                    self.state = RDMA_ERROR
        try:
            cqe = _CQE.pack(wr_id, status, number + 1)
            self.dma_write(self.ring_key, self.cq + slot * RDMA_CQE_SIZE, cqe)
            if self.resets == resets:
                self.completed = number + 1
            if (t := self.trace.rdma_completion) is not None:
                t(number, status)
        except KernelError:
            self._broken(resets)
        ctx.cause = saved

    def _broken(self, resets: int) -> None:
        if self.resets == resets:
            self.state = RDMA_ERROR
            self.completed = self.produced

    def _do(
        self, opcode: int, lkey: int, rkey: int, laddr: int, raddr: int, length: int, operand: int
    ) -> None:
        if opcode not in _NAMES or length > RDMA_MAX_BYTES:
            raise _Failed(WC_LOC_QP_OP_ERR)
        if opcode == RDMA_WRITE:
            data = self._end_of(WC_LOC_PROT_ERR, lkey, laddr, length)
            self._end_of(WC_REM_ACCESS_ERR, rkey, raddr, data)
        elif opcode == RDMA_READ:
            data = self._end_of(WC_REM_ACCESS_ERR, rkey, raddr, length)
            self._end_of(WC_LOC_PROT_ERR, lkey, laddr, data)
        else:
            try:
                old = self.fetch_add(rkey, raddr, operand)
            except KernelError:
                raise _Failed(WC_REM_ACCESS_ERR) from None
            self._end_of(WC_LOC_PROT_ERR, lkey, laddr, old.to_bytes(8, "little"))

    def _end_of(self, status: int, key: int, iova: int, what: int | bytes) -> bytes:
        """Read so many bytes or write these; `status` is what a failure of this end is called."""
        try:
            if isinstance(what, int):
                return self.dma_read(key, iova, what)
            self.dma_write(key, iova, what)
        except KernelError:
            raise _Failed(status) from None
        return b""
