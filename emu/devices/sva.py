"""A device that translates by the CPU's own page tables, through an IOMMU: shared virtual addressing.

Source of truth: drivers/iommu/intel/svm.c (intel_svm_domain_alloc, intel_arch_invalidate_secondary_tlbs,
intel_mm_release), drivers/iommu/iommu-sva.c: iommu_sva_handle_mm; Linux 6.18. In Linux 5.10
drivers/iommu/intel/svm.c: intel_invalidate_range.

The IOMMU walks the process's tables as they lie in RAM and caches what it finds in an IOTLB. It keeps no
page references and needs no brackets: it misses what is not present, as a CPU does. What it owes to
notifiers is one thing only, to forget what the CPU's TLB forgets: with each flush
(arch_invalidate_secondary_tlbs, 6.18), or where an entry changed and at each bracket's end
(invalidate_range, 5.10). A miss in the tables is a page request that the kernel answers by a fault.

Not modelled: PASIDs other than one for the process, ATS (the IOTLB is the IOMMU's), paging-structure
caches, page-request groups, the cost of an invalidation.
"""

from __future__ import annotations

from errno import EFAULT, EIO
from typing import TYPE_CHECKING

from host_mm.arch.x86.fault import hardware_walk
from host_mm.fork import mmput
from host_mm.kernel.costs import COST_WALK
from host_mm.kernel.errors import KernelError
from host_mm.memory import handle_mm_fault
from host_mm.mm_types import (
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_USER,
    FAULT_FLAG_WRITE,
    VM_FAULT_ERROR,
    VM_READ,
    VM_WRITE,
)
from host_mm.mmu_notifier import MmuNotifier
from host_mm.mmu_notifier_register import mmu_notifier_register, mmu_notifier_unregister
from host_mm.tlb import TLB_FLUSH_ALL, HostTlb
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from host_mm.process import Process

__all__ = ["TRACEPOINTS", "SvaDevice"]

IOTLB_FLUSH = Tracepoint(
    "refault", "iotlb_flush", ("start", "end", "pages"),
    lambda start, end, pages: f"{start:#x} -- {end:#x} {pages} pages",
    doc="An IOMMU that shares a process's page tables forgets translations (end -1: all of them).",
)
PAGE_REQUEST = Tracepoint(
    "refault", "page_request", ("address", "write", "success"),
    lambda address, write, success: (
        f"{address:#x} {'write' if write else 'read'} {'success' if success else 'invalid'}"
    ),
    doc="A device missed a translation in the shared tables and asked the kernel for the page.",
)
TRACEPOINTS = (IOTLB_FLUSH, PAGE_REQUEST)


class SvaDevice(MmuNotifier):
    """A device bound to a process (iommu_sva_bind_device). `iotlb` is what its IOMMU has cached."""

    def __init__(self, process: Process) -> None:
        """KernelError as mmu_notifier_register refuses."""
        host = process.host
        self.process = process
        self.host = host
        self.owning_mm = process.mm
        self.trace = host.stream.bind(TRACEPOINTS)
        self.iotlb = HostTlb()
        self.pasid_present = True
        self.release = self._mm_release
        if host.profile.invalidate_range:
            self.invalidate_range = self._invalidate
        else:
            self.arch_invalidate_secondary_tlbs = self._invalidate
        ret = mmu_notifier_register(self, self.owning_mm)
        if ret:
            raise KernelError(-ret, "the address space takes no such notifier")
        host.secondary_tables.add("an IOTLB", self.owning_mm, self.iotlb)

    def unbind(self) -> None:
        """iommu_sva_unbind_device."""
        mmu_notifier_unregister(self, self.owning_mm)
        self.host.secondary_tables.remove(self.iotlb)

    # -- notifier -----------------------------------------------------------------------------

    def _invalidate(self, mm: MmStruct, start: int, end: int) -> None:
        """Forget [start, end); in 6.18 the pages may have been freed already by whoever calls."""
        if end == TLB_FLUSH_ALL:
            pages = len(self.iotlb.entries)
            self.iotlb.clear()
        else:
            pages = self.iotlb.drop_range(start, end)
        if pages and (t := self.trace.iotlb_flush) is not None:
            t(start, end, pages)

    def _mm_release(self, mm: MmStruct) -> None:
        """intel_mm_release: the tables go away without another word, so stop walking them now."""
        self.pasid_present = False
        self.iotlb.clear()

    # -- the device's side --------------------------------------------------------------------

    def access(self, address: int, *, write: bool) -> int:
        """The frame that the device's access reaches. KernelError: EFAULT, EIO (no such process any more)."""
        sched = self.host.sched
        while True:
            pfn = self.iotlb.lookup(address, write)
            if pfn >= 0:
                return pfn
            if not self.pasid_present:
                raise KernelError(EIO, "the process is gone, its PASID entry is empty")
            sched.advance(COST_WALK)
            pfn = hardware_walk(self.owning_mm, address, write, self.iotlb)
            if pfn >= 0:
                return pfn
            if not self._iommu_sva_handle_mm(address, write):
                raise KernelError(EFAULT, f"page request for {address:#x}: invalid")

    def _iommu_sva_handle_mm(self, address: int, write: bool) -> bool:
        mm = self.owning_mm
        if not mm.mm_users:
            return False
        mm.mm_users += 1
        mm.mmap_lock.read_lock()
        vma = mm.vma_lookup(address)
        need = VM_WRITE if write else VM_READ
        success = vma is not None and bool(vma.flags & need)
        if vma is not None and success:
            flags = FAULT_FLAG_REMOTE | FAULT_FLAG_USER | (FAULT_FLAG_WRITE if write else 0)
            success = not handle_mm_fault(vma, address, flags) & VM_FAULT_ERROR
        mm.mmap_lock.read_unlock()
        mmput(mm)
        if (t := self.trace.page_request) is not None:
            t(address & ~0xFFF, write, success)
        return success

    def read(self, address: int, length: int) -> bytes:
        """Load within one page. KernelError."""
        pfn = self.access(address, write=False)
        return self.host.ram.read((pfn << 12) + (address & 4095), length)

    def write(self, address: int, data: bytes) -> None:
        """Store within one page. KernelError."""
        pfn = self.access(address, write=True)
        self.host.ram.write((pfn << 12) + (address & 4095), data)
