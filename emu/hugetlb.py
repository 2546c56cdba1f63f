"""Guest memory in huge pages: the files behind it, and a second process that maps them.

Source: what a VMM does with memfd_create(MFD_HUGETLB), mmap and KVM_SET_USER_MEMORY_REGION; Linux 6.18.

A region is a mapping of a file of its own, or private huge pages. The VMM places it at a multiple of
1 GiB, so that another mapping of the file can use the same page tables. The peer maps every file it is
asked about, at a multiple of 1 GiB too, and lives until the VM is closed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import msgspec

from emu.vmm import Vmm
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board
    from emu.memory import Region
    from host_mm.address_space import AddressSpace

__all__ = ["HugetlbMemory"]

HPAGE_SIZE = 2 << 20
GIB = 1 << 30
VMM_BASE = 0x6000_0000_0000
"""Where the VMM, and at the same place the peer, begin to map files."""


class _Mapping(msgspec.Struct):
    """A region's file, None if it is private, and where the peer maps it, 0 if it does not yet."""

    region: Region
    file: AddressSpace | None
    peer_hva: int = 0


class HugetlbMemory:
    """The VM's regions of huge pages."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.mappings: list[_Mapping] = []
        self.peer: Vmm | None = None
        self._next = VMM_BASE

    def _place(self, size: int) -> int:
        at = self._next
        self._next += -(-size // GIB) * GIB + GIB
        return at

    def create(self, gpa: int, size: int, *, shared: bool, reserve: bool) -> int:
        """A new region at `gpa`; its slot. KernelError: EINVAL, EEXIST, ENOMEM (no huge pages left)."""
        if gpa % HPAGE_SIZE or size % HPAGE_SIZE or size <= 0:
            raise KernelError(errno.EINVAL, f"gpa {gpa:#x}+{size:#x} is not made of huge pages")
        memory = self.board.memory
        memory.check_free(gpa, size)
        hva, file = self.map(size, shared=shared, reserve=reserve)
        region = memory.show(gpa, size, hva)
        self.note(region, file)
        return region.slot

    def map(self, size: int, *, shared: bool, reserve: bool) -> tuple[int, AddressSpace | None]:
        """Huge pages in the VMM: the address, and the file; to be noted. KernelError(ENOMEM)."""
        vmm = self.board.vmm
        file = vmm.memfd_hugetlb(size) if shared else None
        try:
            return vmm.mmap_hugetlb(size, self._place(size), file, reserve=reserve), file
        except KernelError:
            if file is not None:
                vmm.close_file(file)
            raise

    def note(self, region: Region, file: AddressSpace | None) -> None:
        """A region shows what map() made."""
        self.mappings.append(_Mapping(region, file))

    def _at(self, gpa: int) -> _Mapping:
        for mapping in self.mappings:
            region = mapping.region
            if not region.deleted and region.gpa <= gpa < region.gpa + region.size:
                return mapping
        raise KernelError(errno.EINVAL, f"gpa {gpa:#x} is not in memory of huge pages")

    def file_at(self, gpa: int) -> tuple[AddressSpace, int]:
        """The file that holds `gpa`, and where in it; KernelError(EINVAL) if there is none."""
        mapping = self._at(gpa)
        if mapping.file is None:
            raise KernelError(errno.EINVAL, f"gpa {gpa:#x} is in private memory")
        return mapping.file, gpa - mapping.region.gpa

    def hva(self, gpa: int) -> int:
        """The VMM's address of `gpa`; KernelError(EINVAL) if that is not in huge pages."""
        return self._at(gpa).region.hva + gpa - self._at(gpa).region.gpa

    def peer_address(self, gpa: int) -> tuple[Vmm, int]:
        """The peer, and its address of `gpa`; it maps the file with the first question about it."""
        file, offset = self.file_at(gpa)
        mapping = self._at(gpa)
        if self.peer is None:
            mm = self.board.host.mm
            self.peer = Vmm(mm, mm.create_process("peer"))
        if not mapping.peer_hva:
            place = mapping.region.hva + GIB * 1024
            mapping.peer_hva = self.peer.mmap_hugetlb(mapping.region.size, place, file, reserve=False)
        return self.peer, mapping.peer_hva + offset

    def exit_peer(self) -> None:
        """The peer goes."""
        if self.peer is not None:
            self.peer.exit()
            self.peer = None

    def close(self) -> None:
        """Close the files; nobody maps them any more."""
        for mapping in self.mappings:
            if mapping.file is not None:
                self.board.vmm.close_file(mapping.file)
        self.mappings.clear()
