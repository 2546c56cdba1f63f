"""NOR flash in the manner of QEMU's pflash: memory for reads, a device for writes.

Source of truth: qemu hw/block/pflash_cfi01.c (commands 0x10, 0x20, 0x40, 0x50, 0x70, 0xff), and
memory_region_rom_device_set_romd; KVM_MEM_READONLY in Documentation/virt/kvm/api.rst, Linux 6.18.

The array is a read-only memory slot: the guest reads and runs it as memory, a write is an MMIO exit and a
command. While a command is open the slot is deleted, so that reads are exits, too, and answer the status.

Not modelled: CFI and IDs, locks, buffered writes, widths (a command is the lowest byte, and data are as
wide as the store), busy times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.locks import Mutex

if TYPE_CHECKING:
    from emu.board import Board
    from emu.memory import Region

__all__ = ["ERASE_BLOCK", "Flash"]

ERASE_BLOCK = 4096
READ_ARRAY, READ_STATUS, CLEAR_STATUS = 0xFF, 0x70, 0x50
PROGRAM, ERASE, CONFIRM = (0x10, 0x40), (0x20, 0x28), 0xD0
STATUS_READY, STATUS_BAD_SEQUENCE = 0x80, 0x30


class Flash:
    """The flash behind `region`, which shows its array in a memory slot while no command is open."""

    def __init__(self, board: Board, region: Region) -> None:
        self.board = board
        self.region = region
        self.status = STATUS_READY
        self._command = READ_ARRAY
        self._second = False
        self._mutex = Mutex(board.host.sched, "flash")

    def covers(self, gpa: int) -> bool:
        """Whether the flash answers at `gpa`."""
        return self.region.gpa <= gpa < self.region.gpa + self.region.size

    def read(self, gpa: int, size: int) -> int:
        """A load while a command is open, or one whose exit was on its way when it was closed."""
        if self._command == READ_ARRAY:
            return int.from_bytes(self.board.vmm.read(self._hva(gpa), size), "little")
        return self.status

    def write(self, gpa: int, size: int, value: int) -> None:
        """A command, or the second store that one asks for."""
        with self._mutex:
            self._write(gpa, size, value)

    def _write(self, gpa: int, size: int, value: int) -> None:
        if not self._second:
            self._first(gpa, value & 0xFF)
            return
        self._second = False
        if self._command in PROGRAM:
            self._program(gpa, size, value)
        elif value & 0xFF != CONFIRM:
            self.status |= STATUS_BAD_SEQUENCE
            self._show_array()

    def _first(self, gpa: int, command: int) -> None:
        self._hide_array()
        self._command = command
        if command in PROGRAM:
            self._second = True
        elif command in ERASE:
            start = gpa & -ERASE_BLOCK
            self.board.vmm.write(self._hva(start), b"\xff" * ERASE_BLOCK)
            self.status |= STATUS_READY
            self._second = True
        elif command == CLEAR_STATUS:
            self.status = STATUS_READY
            self._show_array()
        elif command != READ_STATUS:
            self._show_array()

    def _program(self, gpa: int, size: int, value: int) -> None:
        hva = self._hva(gpa)
        old = int.from_bytes(self.board.vmm.read(hva, size), "little")
        self.board.vmm.write(hva, (old & value).to_bytes(size, "little"))
        self.status |= STATUS_READY

    def _hva(self, gpa: int) -> int:
        return self.region.hva + gpa - self.region.gpa

    def _hide_array(self) -> None:
        if not self.region.deleted:
            self.board.memory.delete(self.region.slot)

    def _show_array(self) -> None:
        self._command = READ_ARRAY
        if self.region.deleted:
            self.board.memory.restore(self.region.slot)
