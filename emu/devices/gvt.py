"""A GPU that the guest shares: its translation tables lie in guest memory and are shadowed by write tracking.

Source of truth: drivers/gpu/drm/i915/gvt/kvmgt.c (intel_gvt_page_track_add, intel_gvt_page_track_remove,
kvmgt_page_track_write, kvmgt_page_track_remove_region; 5.10: kvmgt_page_track_flush_slot), gtt.c
(ppgtt_populate_spt, ppgtt_handle_guest_write_page_table_bytes), dma by vfio_pin_pages; Linux 6.18.

A table is one guest page of 512 entries: bit 0 says present, bits 12 to 51 are a guest page. The device goes
by its own copy, in which each present entry has a frame that stays pinned as long as the entry is there. So
it must hear of every write of the guest to the table: the page is tracked, each write is emulated, and
afterwards KVM tells the device, which reads the entries that it touched again. Memory that the host changes
under the guest it does not hear of.

Not modelled: levels of tables, partial writes put off until the next workload, GGTT, workloads.
"""

from __future__ import annotations

from errno import EEXIST, EFAULT, ENOENT
from typing import TYPE_CHECKING

from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import KernelError
from host_mm.uaccess import copy_from_user
from kvm_model.memslots import KVM_MEMSLOT_INVALID
from kvm_model.mmu.page_track import (
    KvmPageTrackNotifierNode,
    kvm_page_track_register_notifier,
    kvm_page_track_unregister_notifier,
    kvm_write_track_add_gfn,
    kvm_write_track_remove_gfn,
    slot_write_track_remove_gfn,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot
    from kvm_model.vcpu import Vcpu

__all__ = ["TRACEPOINTS", "VirtualGpu"]

ENTRIES = 512
_PRESENT = 1
_ADDRESS = (1 << 52) - 1 & ~0xFFF

GVT_SHADOW = Tracepoint(
    "refault", "gvt_shadow", ("device", "gfn", "index", "entry", "pfn"),
    lambda device, gfn, index, entry, pfn:
        f"device {device} gfn {gfn:x} entry {index} = {entry:x} pfn {pfn:x}",
    doc="A shared GPU follows a guest's write to one of its tables (pfn -1: nothing is mapped).",
)
TRACEPOINTS = (GVT_SHADOW,)


class _Table:
    """The device's copy of one guest table."""

    __slots__ = ("entries", "pfns")

    def __init__(self) -> None:
        self.entries = [0] * ENTRIES
        self.pfns = [-1] * ENTRIES


class VirtualGpu(KvmPageTrackNotifierNode):
    """struct intel_vgpu. `told` counts the guest's writes to its tables."""

    def __init__(self, kvm: Kvm, number: int) -> None:
        """intel_vgpu_open_device; KernelError as kvm_page_track_register_notifier refuses."""
        self.kvm = kvm
        self.host = kvm.host
        self.number = number
        self.told = 0
        self.tables: dict[int, _Table] = {}
        self.trace = kvm.stream.bind(TRACEPOINTS)
        ret = kvm_page_track_register_notifier(kvm, self, kvm.mm)
        if ret:
            raise KernelError(-ret, "the VM takes no tracker")

    def close(self) -> None:
        """intel_vgpu_close_device: no table is shadowed any more."""
        for gfn in list(self.tables):
            self.unshadow(gfn)
        kvm_page_track_unregister_notifier(self.kvm, self)

    # -- tables -------------------------------------------------------------------------------

    def shadow(self, gfn: int) -> None:
        """Follow the table in guest page `gfn`. KernelError: EEXIST, EINVAL where there is no memory."""
        if gfn in self.tables:
            raise KernelError(EEXIST, f"gfn {gfn:#x} is shadowed already")
        ret = kvm_write_track_add_gfn(self.kvm, gfn)
        if ret:
            raise KernelError(-ret, f"gfn {gfn:#x} has no memslot")
        # From here on no write is missed, so that it can be read in peace.
        self.tables[gfn] = _Table()
        self._follow(gfn, range(ENTRIES))

    def unshadow(self, gfn: int) -> None:
        """Let the table be. KernelError(ENOENT)."""
        self._drop(gfn)
        kvm_write_track_remove_gfn(self.kvm, gfn)

    def _drop(self, gfn: int) -> None:
        table = self.tables.pop(gfn, None)
        if table is None:
            raise KernelError(ENOENT, f"gfn {gfn:#x} is not shadowed")
        for pfn in table.pfns:
            if pfn >= 0:
                unpin_user_page(self.host, pfn, dirty=True)

    def _follow(self, gfn: int, indices: range) -> None:
        data = self._read(gfn << 12 | indices.start * 8, len(indices) * 8)
        for at, index in enumerate(indices):
            self._set(gfn, index, int.from_bytes(data[8 * at : 8 * at + 8], "little"))

    def _set(self, gfn: int, index: int, entry: int) -> None:
        table = self.tables.get(gfn)
        if table is None or table.entries[index] == entry:
            return
        new = self._pin(entry)
        old, table.pfns[index] = table.pfns[index], new
        table.entries[index] = entry
        if old >= 0:
            unpin_user_page(self.host, old, dirty=True)
        if (t := self.trace.gvt_shadow) is not None:
            t(self.number, gfn, index, entry, new)

    def _hva(self, gfn: int) -> int:
        slot = self.kvm.slots().gfn_to_memslot(gfn)
        if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
            return -1
        return slot.gfn_to_hva(gfn)

    def _pin(self, entry: int) -> int:
        """vfio_pin_pages of what the entry maps; -1: nothing."""
        hva = self._hva((entry & _ADDRESS) >> 12) if entry & _PRESENT else -1
        if hva < 0:
            return -1
        return max(pin_user_page(self.kvm.mm, hva, FOLL_WRITE | FOLL_LONGTERM), -1)

    def _read(self, gpa: int, length: int) -> bytes:
        """intel_gvt_read_gpa, of one page. KernelError(EFAULT)."""
        hva = self._hva(gpa >> 12)
        if hva < 0:
            raise KernelError(EFAULT, f"no memory at gpa {gpa:#x}")
        return copy_from_user(self.kvm.process, hva | gpa & 0xFFF, length)

    # -- what KVM tells -----------------------------------------------------------------------

    def track_write(self, vcpu: Vcpu, gpa: int, new: bytes) -> None:
        """kvmgt_page_track_write: if it is one of its tables, read again what the write touched."""
        gfn = gpa >> 12
        if gfn not in self.tables:
            return
        self.told += 1
        first = (gpa & 0xFFF) >> 3
        last = ((gpa & 0xFFF) + len(new) - 1) >> 3
        self._follow(gfn, range(first, last + 1))

    def track_remove_region(self, gfn: int, npages: int) -> None:
        """kvmgt_page_track_remove_region (6.18): the counts went with the slot."""
        for each in [g for g in self.tables if gfn <= g < gfn + npages]:
            self._drop(each)

    def track_flush_slot(self, kvm: Kvm, slot: KvmMemorySlot) -> None:
        """kvmgt_page_track_flush_slot (5.10)."""
        gone = [g for g in self.tables if slot.base_gfn <= g < slot.end_gfn]
        with kvm.mmu_lock:
            for gfn in gone:
                slot_write_track_remove_gfn(kvm, slot, gfn)
        for gfn in gone:
            self._drop(gfn)

    # -- the device's side --------------------------------------------------------------------

    def stale(self) -> int:
        """How many entries of its tables are not what the guest's memory says."""
        count = 0
        for gfn, table in self.tables.items():
            data = self._read(gfn << 12, 4096)
            want = [int.from_bytes(data[n : n + 8], "little") for n in range(0, 4096, 8)]
            count += sum(have != entry for have, entry in zip(table.entries, want, strict=True))
        return count

    def read(self, gfn: int, index: int, offset: int) -> int:
        """Eight bytes at `offset` of the page that an entry maps, by DMA. KernelError: ENOENT, EFAULT."""
        table = self.tables.get(gfn)
        if table is None:
            raise KernelError(ENOENT, f"gfn {gfn:#x} is not shadowed")
        pfn = table.pfns[index]
        if pfn < 0:
            raise KernelError(EFAULT, f"entry {index} maps nothing")
        return int.from_bytes(self.host.ram.read((pfn << 12) + offset, 8), "little")
