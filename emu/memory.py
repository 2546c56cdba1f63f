"""The guest's memory as its VMM keeps it: regions of the VMM's address space behind memory slots.

RAM lies at gpa 0; above 3 GiB it continues at 4 GiB, so that devices and test slots have their
place below. Slot 0 (and 1, where RAM is that large) are the board's; operations make more.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import msgspec

from emu import files
from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SIZE
from kvm_model.guest_memfd import GUEST_MEMFD_FLAG_MMAP
from kvm_model.memslots import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES

if TYPE_CHECKING:
    from emu.board import Board

__all__ = ["LOW_RAM_LIMIT", "PROT_RW", "GuestMemory", "Region"]

LOW_RAM_LIMIT = 3 << 30
HIGH_RAM_BASE = 4 << 30
PROT_RW = 3


class Region(msgspec.Struct):
    """`size` bytes of the VMM at `hva`, shown to the guest at `gpa` by memory slot `slot`.

    `guest_memfd`: the slot is bound to this file, from its beginning.
    """

    slot: int
    gpa: int
    size: int
    hva: int
    flags: int = 0
    deleted: bool = False
    guest_memfd: Any = None


class GuestMemory:
    """The VMM's view. Reads and writes go through its own mapping, faulting pages in."""

    def __init__(self, board: Board, size: int) -> None:
        self.board = board
        self.size = size
        self.regions: list[Region] = []
        low = min(size, LOW_RAM_LIMIT)
        self._add_ram(0, low, 0)
        if size > low:
            self._add_ram(HIGH_RAM_BASE, size - low, low)
        self.first_test_slot = len(self.regions)

    def _add_ram(self, gpa: int, size: int, offset: int) -> None:
        """RAM of the board, `offset` bytes into its backend."""
        vmm, backend = self.board.vmm, self.board.config.memory_backend
        if backend == "anon":
            self._add(gpa, size)
        elif backend == "hugetlb":
            hva, file = self.board.hugetlb.map(size, shared=True, reserve=True)
            self.board.hugetlb.note(self._show(gpa, size, hva), file)
        elif backend == "memfd":
            self._show(gpa, size, files.mmap_memfd(vmm, size))
        else:
            path = backend.removeprefix("file:")
            self._show(gpa, size, files.mmap_file(vmm, size, path, pgoff=offset >> 12))

    def _add(self, gpa: int, size: int, hva: int = 0, flags: int = 0) -> Region:
        return self._show(gpa, size, self.board.vmm.mmap(size, PROT_RW, hva), flags)

    def _show(self, gpa: int, size: int, hva: int, flags: int = 0) -> Region:
        region = Region(len(self.regions), gpa, size, hva, flags)
        if self.board.kvm.has_private_mem:
            self._bind(region, 0)
        else:
            self.board.kvm.set_user_memory_region(region.slot, gpa, size, hva, flags)
        self.regions.append(region)
        return region

    def _bind(self, region: Region, flags: int) -> None:
        """A slot with a fresh guest_memfd of KVM_CREATE_GUEST_MEMFD's `flags`, mapped if they allow it."""
        board = self.board
        file = board.kvm.create_guest_memfd(region.size, flags)
        board.guest_memfds.append(file)
        region.flags |= KVM_MEM_GUEST_MEMFD
        region.guest_memfd = file
        if not region.hva:
            region.hva = board.vmm.mmap_file(file, region.size)
        self._set(region)

    def _set(self, region: Region) -> None:
        self.board.kvm.set_user_memory_region2(
            region.slot, region.gpa, region.size, region.hva, region.flags, region.guest_memfd
        )

    def create_guest_memfd(self, gpa: int, size: int, flags: int) -> Region:
        """A slot of guest_memfd at `gpa`; KernelError(EEXIST) on overlap, EINVAL for unknown `flags`."""
        self.check_free(gpa, size)
        mapped = flags & GUEST_MEMFD_FLAG_MMAP
        region = Region(len(self.regions), gpa, size, 0 if mapped else self.board.vmm.mmap(size, PROT_RW))
        self._bind(region, flags)
        self.regions.append(region)
        return region

    def punch_guest_memfd(self, gpa: int, size: int) -> None:
        """fallocate(PUNCH_HOLE) of the files behind [gpa, gpa + size); KernelError(EINVAL) where none is."""
        end = gpa + size
        while gpa < end:
            region = self.region_of(gpa)
            if region.guest_memfd is None:
                raise KernelError(errno.EINVAL, f"gpa {gpa:#x} is in no guest_memfd")
            stop = min(end, region.gpa + region.size)
            file = region.guest_memfd
            file.a_ops.fallocate(
                file, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, gpa - region.gpa, stop - gpa
            )
            gpa = stop

    def region_at(self, gpa: int) -> Region | None:
        """The live region that shows memory at `gpa`."""
        for region in self.regions:
            if not region.deleted and region.gpa <= gpa < region.gpa + region.size:
                return region
        return None

    def region_of(self, gpa: int) -> Region:
        """As region_at; KernelError(EFAULT) where there is no memory."""
        region = self.region_at(gpa)
        if region is None:
            raise KernelError(errno.EFAULT, f"gpa {gpa:#x} is not in a memory slot")
        return region

    def hva(self, gpa: int) -> int:
        """The VMM's address of `gpa`; KernelError(EFAULT) where there is no memory."""
        region = self.region_of(gpa)
        return region.hva + gpa - region.gpa

    def gpa(self, hva: int) -> int:
        """Where the guest sees the VMM's `hva`, or -1."""
        for region in self.regions:
            if not region.deleted and region.hva <= hva < region.hva + region.size:
                return region.gpa + hva - region.hva
        return -1

    def read(self, gpa: int, length: int) -> bytes:
        """`length` bytes at `gpa`, read by the VMM."""
        board = self.board
        parts: list[bytes] = []
        while length > 0:
            step = min(length, PAGE_SIZE - gpa % PAGE_SIZE)
            parts.append(board.vmm.read(self.hva(gpa), step))
            gpa += step
            length -= step
        return b"".join(parts)

    def write(self, gpa: int, data: bytes) -> None:
        """Store `data` at `gpa`, as the VMM."""
        board = self.board
        at = 0
        while at < len(data):
            step = min(len(data) - at, PAGE_SIZE - (gpa + at) % PAGE_SIZE)
            board.vmm.write(self.hva(gpa + at), data[at : at + step])
            at += step

    def set_logging(self, region: Region, on: bool) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES of the region's slot."""
        flags = region.flags | KVM_MEM_LOG_DIRTY_PAGES if on else region.flags & ~KVM_MEM_LOG_DIRTY_PAGES
        self.board.kvm.set_user_memory_region(region.slot, region.gpa, region.size, region.hva, flags)
        region.flags = flags
        if not on:
            # Rings keep what was written while the slot was logged; nobody asks for it any more.
            self.board.dirty_rings.take(region.slot)

    def _test_region(self, slot: int) -> Region:
        if not self.first_test_slot <= slot < len(self.regions):
            raise KernelError(errno.ENOENT, f"slot {slot} was not made by slot_create")
        return self.regions[slot]

    def check_free(self, gpa: int, size: int, but: Region | None = None) -> None:
        """KernelError(EEXIST) if a slot shows something there."""
        for other in self.regions:
            if other is but or other.deleted:
                continue
            if gpa < other.gpa + other.size and other.gpa < gpa + size:
                raise KernelError(errno.EEXIST, f"gpa {gpa:#x} overlaps slot {other.slot} at {other.gpa:#x}")

    def create(self, gpa: int, size: int, hva: int = 0, flags: int = 0) -> Region:
        """A new region at `gpa`, at the VMM's `hva` if that is not 0; KernelError(EEXIST) on overlap."""
        self.check_free(gpa, size)
        return self._add(gpa, size, hva, flags)

    def show(self, gpa: int, size: int, hva: int) -> Region:
        """A new region at `gpa` of memory that the VMM has mapped; KernelError(EEXIST) on overlap."""
        self.check_free(gpa, size)
        return self._show(gpa, size, hva)

    def delete(self, slot: int) -> None:
        """KVM_SET_USER_MEMORY_REGION with size 0; the memory stays the VMM's."""
        region = self._test_region(slot)
        if region.deleted:
            raise KernelError(errno.ENOENT, f"slot {slot} is deleted already")
        self.board.kvm.set_user_memory_region(slot, region.gpa, 0, region.hva, 0)
        region.deleted = True

    def restore(self, slot: int) -> None:
        """Bring a deleted slot back where it last was."""
        region = self._test_region(slot)
        if not region.deleted:
            raise KernelError(errno.EEXIST, f"slot {slot} is not deleted")
        self.check_free(region.gpa, region.size, region)
        self._set(region)
        region.deleted = False

    def move(self, slot: int, gpa: int) -> None:
        """The same memory at another gpa."""
        region = self._test_region(slot)
        if region.deleted:
            raise KernelError(errno.ENOENT, f"slot {slot} is deleted")
        self.check_free(gpa, region.size, region)
        self.board.kvm.set_user_memory_region(slot, gpa, region.size, region.hva, region.flags)
        region.gpa = gpa
