"""A PCI function's memory, shown to a guest by its VMM: mapped raw, and taken back when the function resets.

Source of truth: drivers/vfio/pci/vfio_pci_core.c (vfio_pci_core_mmap, vfio_pci_mmap_page_fault,
vfio_pci_zap_bars, vfio_pci_core_disable), drivers/char/mem.c: mmap_mem (remap_pfn_range at mmap); Linux 6.18.

A BAR's frames are no RAM and nobody counts who maps them. The VMM maps them shared; a fault enters one frame.
`revoke` takes memory_lock, zaps every mapping (each in its bracket, CLEAR, so that KVM drops its SPTEs) and
lets the BAR answer elsewhere, with its memory zeroed, as after a reset. Until then a fault waits.

Not modelled: config space, other regions, IRQs, PCI power states, huge faults.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from host_mm.address_space import AddressSpace, AddressSpaceOperations, VmOperations, fput
from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import RwSem
from host_mm.memory_file import unmap_mapping_range
from host_mm.memory_pfnmap import VM_PFNMAP_FLAGS, remap_pfn_range, vmf_insert_pfn
from host_mm.memremap import release_reserved, request_reserved
from host_mm.mm_types import VM_FAULT_SIGBUS
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, do_mmap

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmFault
    from host_mm.process import Process

__all__ = ["PciBar"]


class _NoPages(AddressSpaceOperations):
    def evict_inode(self, mapping: AddressSpace) -> None:
        """Nothing is cached."""


class _OnFault(VmOperations):
    """vfio_pci_mmap_ops."""

    def __init__(self, bar: PciBar) -> None:
        self.bar = bar

    def fault(self, vmf: VmFault) -> int:
        """vfio_pci_mmap_page_fault: the frame that answers now, or a bus error."""
        bar = self.bar
        bar.memory_lock.read_lock()
        ret = VM_FAULT_SIGBUS
        if bar.enabled and vmf.pgoff < bar.nr:
            ret = vmf_insert_pfn(vmf, bar.first + vmf.pgoff)
        bar.memory_lock.read_unlock()
        return ret


class _AtMmap(VmOperations):
    """What remap_pfn_range filled: no fault handler."""

    fault = None  # type: ignore[assignment]


class PciBar:
    """`nr` pages of device memory at frames [first, first + nr). `enabled`: whether it answers."""

    def __init__(self, host: HostMm, nr: int) -> None:
        """KernelError(ENOSPC)."""
        self.host = host
        self.nr = nr
        self.first = request_reserved(host, nr)
        self.enabled = True
        self.memory_lock = RwSem(host.sched, "memory_lock")
        self.mapping = AddressSpace(host, "vfio-pci", nr << 12, _NoPages(), _OnFault(self))

    def close(self) -> None:
        """The driver lets go of the function: nobody may map the BAR any more."""
        self.disable()
        fput(self.mapping)
        release_reserved(self.host, self.first, self.nr)

    def mmap(self, process: Process) -> int:
        """vfio_pci_core_mmap: the whole BAR, shared; faults map it. The address. KernelError."""
        prot = PROT_READ | PROT_WRITE
        return do_mmap(
            process.mm, 0, self.nr << 12, prot, MAP_SHARED, file=self.mapping, vm_flags=VM_PFNMAP_FLAGS
        )

    def mmap_at_once(self, process: Process, *, shared: bool = True) -> int:
        """As /dev/mem does: every entry is there when mmap returns, and a private mapping may be had."""
        mm = process.mm
        prot, flags = PROT_READ | PROT_WRITE, MAP_SHARED if shared else MAP_PRIVATE
        address = do_mmap(mm, 0, self.nr << 12, prot, flags, file=self.mapping, ops=_AtMmap())
        mm.mmap_lock.lock()
        vma = mm.vma_lookup(address)
        assert vma is not None
        ret = remap_pfn_range(vma, address, self.first, self.nr << 12, vma.page_prot)
        mm.mmap_lock.unlock()
        if ret:
            raise KernelError(-ret, "the BAR cannot be mapped")
        return address

    def _zap(self) -> None:
        """vfio_pci_zap_bars."""
        unmap_mapping_range(self.mapping, 0, self.nr << 12, even_cows=True)

    def disable(self) -> None:
        """vfio_pci_zap_and_down_write_memory_lock: the function's memory does not answer any more."""
        self.memory_lock.lock()
        self._zap()
        self.enabled = False
        self.memory_lock.unlock()

    def revoke(self) -> None:
        """A reset: all mappings go, and the BAR is at other frames, zeroed. KernelError(EINVAL)."""
        if not self.enabled:
            raise KernelError(EINVAL, "the function's memory is disabled")
        new = request_reserved(self.host, self.nr)
        self.memory_lock.lock()
        self._zap()
        old, self.first = self.first, new
        self.memory_lock.unlock()
        release_reserved(self.host, old, self.nr)
