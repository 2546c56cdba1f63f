"""A range of a process that an RDMA device reaches without pins, by its own page table.

Source of truth: drivers/infiniband/core/umem_odp.c (ib_umem_odp_get, ib_umem_odp_map_dma_and_lock,
ib_umem_odp_unmap_dma_pages, ib_umem_odp_free), drivers/infiniband/hw/mlx5/odp.c:
mlx5_ib_invalidate_range, pagefault_real_mr; Linux 6.18.

`table` is the device's page table (mlx5's MTT). It is filled after a page fault of the device, under
umem_mutex and only if read_retry says no; a bracket empties it, waits for the DMA that is under way
there, and then marks dirty what the device could write: nobody else knows that it did.

    break no-interval-retry     the device publishes without asking
    break odp-no-dirty          an invalidation does not mark what the device could write
    break odp-no-drain          an invalidation does not wait for DMA under way

Not modelled: implicit regions (the whole address space as one), huge pages in the device's table,
bus addresses (a frame's is its own), the cost of telling the device.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EINVAL
from typing import TYPE_CHECKING

from host_mm.fork import mmput
from host_mm.hmm import (
    HMM_PFN_FLAGS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HMM_RANGE_DEFAULT_TIMEOUT,
    HmmRange,
    hmm_range_fault,
)
from host_mm.interval_notifier import (
    MmuIntervalNotifier,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import Mutex
from host_mm.kernel.sched import WaitQueue
from host_mm.mmu_notifier import mmu_notifier_range_blockable
from host_mm.page import set_page_dirty
from host_mm.tlb import HostTlb
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mmu_notifier import MmuNotifierRange
    from host_mm.process import Process

__all__ = ["TRACEPOINTS", "UmemOdp"]

ODP_MAP = Tracepoint(
    "refault", "odp_map", ("start", "end", "pages", "write", "seq"),
    lambda start, end, pages, write, seq: (
        f"{start:#x} -- {end:#x} {pages} pages {'write' if write else 'read'} seq {seq}"
    ),
    doc="An RDMA device publishes translations of a range without pinning its pages.",
)
ODP_UNMAP = Tracepoint(
    "refault", "odp_unmap", ("start", "end", "pages", "dirty"),
    lambda start, end, pages, dirty: f"{start:#x} -- {end:#x} {pages} pages {dirty} dirty",
    doc="A bracket takes an RDMA device's translations; DMA to them has ended.",
)
TRACEPOINTS = (ODP_MAP, ODP_UNMAP)


class UmemOdp(MmuIntervalNotifier):
    """struct ib_umem_odp: [address, address + length) of a process, page-aligned.

    DMA goes page by page between `begin_dma` and `end_dma`; a bracket waits for those inside.
    """

    who = "an RDMA device"

    def __init__(self, process: Process, address: int, length: int, *, writable: bool) -> None:
        """ib_umem_odp_get. KernelError: EINVAL, EOVERFLOW."""
        super().__init__()
        host = process.host
        self.host = host
        self.process = process
        self.owning_mm = process.mm
        self.trace = host.stream.bind(TRACEPOINTS)
        self.address = address & ~0xFFF
        self.end = (address + length + 0xFFF) & ~0xFFF
        self.writable = writable
        self.umem_mutex = Mutex(host.sched, "umem_mutex")
        self.table = HostTlb()
        self.inflight: dict[int, int] = {}
        self.dma = HostTlb()
        self.idle = WaitQueue(host.sched, "odp_dma")
        ret = mmu_interval_notifier_insert(self, self.owning_mm, self.address, self.end - self.address)
        if ret:
            raise KernelError(-ret, f"cannot watch {self.address:#x} -- {self.end:#x}")
        host.secondary_tables.add(self.who, self.owning_mm, self.table)
        host.secondary_tables.add("DMA under way", self.owning_mm, self.dma)

    def release(self) -> None:
        """ib_umem_odp_release: the device has stopped."""
        with self.umem_mutex:
            self.unmap_dma_pages(self.address, self.end)
        mmu_interval_notifier_remove(self)
        self.host.secondary_tables.remove(self.table)
        self.host.secondary_tables.remove(self.dma)

    # -- the driver's side --------------------------------------------------------------------

    def map_dma_and_lock(self, user_virt: int, bcnt: int, *, write: bool, fault: bool = True) -> int:
        """ib_umem_odp_map_dma_and_lock: pages mapped, and umem_mutex is held; or a negative errno.

        -EFAULT: outside the region or nothing that may be mapped; -EPERM; -EINVAL: the process is gone;
        -EBUSY: invalidated for HMM_RANGE_DEFAULT_TIMEOUT on end. Without `fault` only what is mapped is.
        """
        if user_virt < self.address or user_virt + bcnt > self.end:
            return -EFAULT
        mm = self.owning_mm
        if not self.process.alive or not mm.mm_users:
            return -EINVAL
        mm.mm_users += 1
        range_ = HmmRange(self, user_virt & ~0xFFF, (user_virt + bcnt + 0xFFF) & ~0xFFF)
        if fault:
            range_.default_flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        ret = self._fault_and_lock(range_)
        mmput(mm)
        return ret

    def _fault_and_lock(self, range_: HmmRange) -> int:
        mm, host = self.owning_mm, self.host
        timeout = host.sched.now + HMM_RANGE_DEFAULT_TIMEOUT
        while True:
            seq = range_.notifier_seq = mmu_interval_read_begin(self)
            mm.mmap_lock.read_lock()
            ret = hmm_range_fault(range_)
            mm.mmap_lock.read_unlock()
            if ret == -EBUSY and host.sched.now <= timeout:
                continue
            if ret:
                return ret
            self.umem_mutex.lock()
            if "no-interval-retry" in host.breaks or not mmu_interval_read_retry(self, seq):
                break
            self.umem_mutex.unlock()
        return self._publish(range_)

    def _publish(self, range_: HmmRange) -> int:
        host = self.host
        if host.checks is not None:
            host.checks.interval_published(self, range_.notifier_seq)
        for index, word in enumerate(range_.hmm_pfns):
            if word & HMM_PFN_VALID:
                address, pfn = range_.start + (index << 12), word & ~HMM_PFN_FLAGS
                write = self.writable and bool(word & HMM_PFN_WRITE)
                if host.checks is not None:
                    host.checks.translation_published(self.who, self.owning_mm, address, pfn, write)
                self.table.fill(address, pfn, write)
        pages = len(range_.hmm_pfns)
        if (t := self.trace.odp_map) is not None:
            write = bool(range_.default_flags & HMM_PFN_REQ_WRITE)
            t(range_.start, range_.end, pages, write, range_.notifier_seq)
        return pages

    def unmap_dma_pages(self, virt: int, bound: int) -> None:
        """ib_umem_odp_unmap_dma_pages, umem_mutex held: empty the table, stop the DMA, mark dirty.

        What the device wrote is known to others only from here on.
        """
        host, table = self.host, self.table
        virt, bound = max(virt, self.address), min(bound, self.end)
        first, last = virt >> 12, (bound - 1) >> 12
        gone = [(vpn, table.entries[vpn]) for vpn in table.known_in(virt, bound)]
        for vpn, _ in gone:
            table.drop(vpn)
        if "odp-no-drain" not in host.breaks:
            self.idle.wait_event(lambda: not any(first <= vpn <= last for vpn in self.inflight))
        dirty = [entry >> 1 for _, entry in gone if entry & 1]
        if "odp-no-dirty" not in host.breaks:
            for pfn in dirty:
                set_page_dirty(host, pfn)
        if gone and (t := self.trace.odp_unmap) is not None:
            t(virt, bound, len(gone), len(dirty))

    def invalidate(self, range_: MmuNotifierRange, cur_seq: int) -> bool:
        """mlx5_ib_invalidate_range."""
        if not mmu_notifier_range_blockable(range_):
            return False
        self.umem_mutex.lock()
        mmu_interval_set_seq(self, cur_seq)
        self.unmap_dma_pages(range_.start, range_.end)
        self.umem_mutex.unlock()
        return True

    # -- the device's side --------------------------------------------------------------------

    def begin_dma(self, address: int, *, write: bool) -> int:
        """The frame that the device's table gives, with DMA to it under way; -1: a page fault."""
        pfn = self.table.lookup(address, write)
        if pfn >= 0:
            vpn = address >> 12
            self.inflight[vpn] = self.inflight.get(vpn, 0) + 1
            self.dma.fill(address, pfn, write)
        return pfn

    def end_dma(self, address: int) -> None:
        """The DMA that begin_dma let through has landed."""
        vpn = address >> 12
        left = self.inflight[vpn] - 1
        if left:
            self.inflight[vpn] = left
        else:
            del self.inflight[vpn]
            self.dma.drop(vpn)
            self.idle.wake_all()
