"""What the emulator does for the scenarios of guest_memfd: one file of KVM's, mapped by the VMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from kvm_model.memslots import KVM_MEM_GUEST_MEMFD
from refault.scenarios.layout import DATA_GPA

if TYPE_CHECKING:
    from emu.board import Board
    from host_mm.address_space import AddressSpace

__all__ = ["GmemSteps"]


class GmemSteps:
    """The steps, for a back end that has `board` and can enter the host."""

    board: Board
    gmem: AddressSpace
    gmem_at: int = 0

    def _ioctl(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def create_guest_memfd(self, size: int, flags: int) -> Any:
        """KVM_CREATE_GUEST_MEMFD; the board closes the file at the end."""
        file = self._ioctl(lambda: self.board.kvm.create_guest_memfd(size, flags))
        if isinstance(file, str):
            return file
        self.gmem = file
        self.board.guest_memfds.append(file)
        return "fd"

    def mmap_guest_memfd(self) -> Any:
        """A shared mapping of it."""
        at = self._ioctl(lambda: self.board.vmm.mmap_file(self.gmem, self.gmem.i_size))
        if isinstance(at, str):
            return at
        self.gmem_at = at
        return "address"

    def set_guest_memfd_slot(self, slot: int, offset: int) -> Any:
        """KVM_SET_USER_MEMORY_REGION2."""
        gpa, size = DATA_GPA + offset, self.gmem.i_size
        return self._ioctl(lambda: self.board.kvm.set_user_memory_region2(
            slot, gpa, size, self.gmem_at, KVM_MEM_GUEST_MEMFD, self.gmem
        ))

    def read_guest_memfd(self, offset: int) -> Any:
        """A load through the mapping."""
        data = self._ioctl(lambda: self.board.vmm.read(self.gmem_at + offset, 8))
        return data if isinstance(data, str) else hex(int.from_bytes(data, "little"))

    def punch_guest_memfd(self, offset: int, length: int) -> Any:
        """A hole."""
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        return self._ioctl(lambda: self.gmem.a_ops.fallocate(self.gmem, mode, offset, length)) or 0
