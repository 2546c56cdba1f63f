"""Two more who translate the VMM's addresses: the VMM itself on an EPT of its own, a device on its tables.

Source: Dune (kern/ept.c); drivers/iommu/intel/svm.c, drivers/iommu/iommu-sva.c, Linux 6.18.

Both see the guest's memory as it is, whatever the host does, the one by brackets and a retry (emu/dune.py),
the other by being told of each flush (emu/devices/sva.py). They attach with their first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.hostops import LEAVES_GIVEN, operation
from emu.operations.arguments import check_scalar, scalar_bytes

if TYPE_CHECKING:
    from emu.board import Board
    from emu.devices.sva import SvaDevice
    from emu.dune import Dune

__all__: list[str] = []


def _dune(board: Board) -> Dune:
    if board.dune is None:
        from emu.dune import Dune

        board.dune = Dune(board.process)
    return board.dune


def _sva(board: Board) -> SvaDevice:
    if board.sva is None:
        from emu.devices.sva import SvaDevice

        board.sva = SvaDevice(board.process)
    return board.sva


@operation(example="dune_read(gpa=0x200000, size=8)")
def dune_read(board: Board, gpa: int, size: int = 8) -> int:
    """The VMM reads `size` bytes in Dune mode, through an EPT of its own; answers the value."""
    check_scalar(gpa, size)
    hva = board.memory.hva(gpa)
    return int.from_bytes(_dune(board).load(hva, size), "little")


@operation(
    "CLEAR", example="fork(); vm.host.dune_read(0x300000); vm.host.dune_write(gpa=0x300000, value=7)",
    leaves=LEAVES_GIVEN,
)
def dune_write(board: Board, gpa: int, value: int, size: int = 8) -> int:
    """The VMM stores the low `size` bytes of `value` in Dune mode."""
    check_scalar(gpa, size)
    hva = board.memory.hva(gpa)
    _dune(board).store(hva, scalar_bytes(value, size))
    return 0


@operation(example="sva_read(gpa=0x200000, size=8)")
def sva_read(board: Board, gpa: int, size: int = 8) -> int:
    """A device behind an IOMMU that walks the VMM's page tables reads `size` bytes; answers the value."""
    check_scalar(gpa, size)
    hva = board.memory.hva(gpa)
    return int.from_bytes(_sva(board).read(hva, size), "little")


@operation("CLEAR", example="fork(); vm.host.sva_write(gpa=0x300000, value=7)", leaves=LEAVES_GIVEN)
def sva_write(board: Board, gpa: int, value: int, size: int = 8) -> int:
    """That device stores the low `size` bytes of `value`."""
    check_scalar(gpa, size)
    hva = board.memory.hva(gpa)
    _sva(board).write(hva, scalar_bytes(value, size))
    return 0
