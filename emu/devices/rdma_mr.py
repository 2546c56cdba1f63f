"""Memory regions of the RDMA device: what a key opens, with pages pinned or on demand.

Source of truth: drivers/infiniband/core/umem.c (ib_umem_get, __ib_umem_release),
drivers/infiniband/core/verbs.c: ib_reg_user_mr; drivers/infiniband/hw/mlx5/odp.c: pagefault_real_mr;
Linux 6.18. On-demand regions are umem_odp.py's.

A region shows `length` bytes of a process at the device's address `iova`. A pinned one holds every page
by FOLL_LONGTERM from its registration to its end: the host can neither swap nor move them, and the
device never faults. An on-demand one holds nothing.

Not modelled: RLIMIT_MEMLOCK, scatter-gather tables, dma-buf regions, re-registration.
"""

from __future__ import annotations

from errno import EFAULT, EPERM
from typing import TYPE_CHECKING

from emu.devices.umem_odp import UmemOdp
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import WaitQueue

if TYPE_CHECKING:
    from host_mm.process import Process

__all__ = ["MemoryRegion", "OdpRegion", "PinnedRegion"]

PREFETCH = 16
"""Pages that one fault of the device asks for, at most: the rest of the request it is working on."""


class MemoryRegion:
    """struct ib_mr. DMA to one page at a time, between `begin` and `end`."""

    def __init__(
        self, process: Process, key: int, iova: int, address: int, length: int, writable: bool
    ) -> None:
        self.process = process
        self.host = process.host
        self.key = key
        self.iova = iova
        self.address = address
        self.length = length
        self.writable = writable
        self.users = 0
        self.unused = WaitQueue(process.host.sched, "rdma_mr")

    def hva(self, iova: int, length: int, *, write: bool) -> int:
        """The process's address behind a device address. KernelError: EFAULT (outside), EPERM (read-only)."""
        if not self.iova <= iova <= self.iova + self.length - length:
            raise KernelError(EFAULT, f"{iova:#x}+{length:#x} is outside the region of key {self.key}")
        if write and not self.writable:
            raise KernelError(EPERM, f"key {self.key} is for reading")
        return iova - self.iova + self.address

    def __enter__(self) -> None:
        """One more request works on the region."""
        self.users += 1

    def __exit__(self, *exc: object) -> None:
        self.users -= 1
        if not self.users:
            self.unused.wake_all()

    def wait_unused(self) -> None:
        """Wait until no request works on it; the key is gone, so that none begins."""
        self.unused.wait_event(lambda: not self.users)

    def begin(self, hva: int, length: int, *, write: bool) -> int:
        """The frame of `hva`, safe from the host until `end(hva)`. `length` bytes follow. KernelError."""
        raise NotImplementedError

    def end(self, hva: int) -> None:
        """This page's DMA has landed."""

    def release(self) -> None:
        """ib_dereg_mr: nobody uses the key any more."""


class OdpRegion(MemoryRegion):
    """IB_ACCESS_ON_DEMAND."""

    def __init__(
        self, process: Process, key: int, iova: int, address: int, length: int, writable: bool
    ) -> None:
        super().__init__(process, key, iova, address, length, writable)
        self.umem = UmemOdp(process, address, length, writable=writable)

    def begin(self, hva: int, length: int, *, write: bool) -> int:
        """Faults as often as the host takes the page away again."""
        umem = self.umem
        while (pfn := umem.begin_dma(hva, write=write)) < 0:
            ret = umem.map_dma_and_lock(hva, min(length, PREFETCH << 12), write=write)
            if ret < 0:
                raise KernelError(-ret, f"the device cannot reach {hva:#x}")
            umem.umem_mutex.unlock()
        return pfn

    def end(self, hva: int) -> None:
        """Whoever invalidates may go on."""
        self.umem.end_dma(hva)

    def release(self) -> None:
        """ib_umem_odp_release."""
        self.umem.release()


class PinnedRegion(MemoryRegion):
    """The default: pinned for good."""

    def __init__(
        self, process: Process, key: int, iova: int, address: int, length: int, writable: bool
    ) -> None:
        """ib_umem_get. KernelError as pin_user_pages refuses; then nothing stays pinned."""
        super().__init__(process, key, iova, address, length, writable)
        self.pfns: list[int] = []
        flags = FOLL_LONGTERM | (FOLL_WRITE if writable else 0)
        for hva in range(address, address + length, 4096):
            pfn = pin_user_page(process.mm, hva, flags)
            if pfn < 0:
                self.release()
                raise KernelError(-pfn, f"no page to pin at {hva:#x}")
            self.pfns.append(pfn)

    def begin(self, hva: int, length: int, *, write: bool) -> int:
        """The pinned frame."""
        return self.pfns[(hva - self.address) >> 12]

    def release(self) -> None:
        """__ib_umem_release: dirty, if the device could write."""
        pfns, self.pfns = self.pfns, []
        for pfn in pfns:
            unpin_user_page(self.host, pfn, dirty=self.writable)
