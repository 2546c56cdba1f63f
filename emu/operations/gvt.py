"""A GPU that the guest shares, whose tables in guest memory KVM tracks writes to.

Source: drivers/gpu/drm/i915/gvt/kvmgt.c, arch/x86/kvm/mmu/page_track.c; Linux 6.18.

Each device is a node of its own on the VM's page-track head; two may shadow the same table.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import check_range
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board
    from emu.devices.gvt import VirtualGpu

__all__: list[str] = []

MAX_GPUS = 8


def _device(board: Board, device: int) -> VirtualGpu:
    found = board.gpus.get(device)
    if found is None:
        raise KernelError(errno.ENOENT, f"there is no device {device}")
    return found


@operation(example="gvt_close(vm.host.gvt_open())")
def gvt_open(board: Board) -> int:
    """A GPU for the guest, which registers with KVM's page tracking; answers its number, from 1 on."""
    from emu.devices.gvt import VirtualGpu

    number = next(n for n in range(1, MAX_GPUS + 2) if n not in board.gpus)
    if number > MAX_GPUS:
        raise KernelError(errno.ENODEV, f"there are {MAX_GPUS} devices already")
    board.gpus[number] = VirtualGpu(board.kvm, number)
    return number


@operation(example="gvt_close(vm.host.gvt_open())")
def gvt_close(board: Board, device: int) -> int:
    """The GPU goes, and with it its hold on tables and pages."""
    gpu = _device(board, device)
    del board.gpus[device]
    gpu.close()
    return 0


@operation(example="gvt_shadow(vm.host.gvt_open(), gpa=0x200000)")
def gvt_shadow(board: Board, device: int, gpa: int) -> int:
    """The GPU translates by the table of 512 entries in this page and follows the guest's writes to it."""
    check_range(gpa, 1)
    _device(board, device).shadow(gpa >> 12)
    return 0


@operation(example="gvt_shadow(vm.host.gvt_open(), gpa=0x200000); vm.host.gvt_unshadow(1, gpa=0x200000)")
def gvt_unshadow(board: Board, device: int, gpa: int) -> int:
    """The GPU forgets the table."""
    check_range(gpa, 1)
    _device(board, device).unshadow(gpa >> 12)
    return 0


@operation(example="gvt_stale(vm.host.gvt_open())")
def gvt_stale(board: Board, device: int) -> int:
    """How many entries of the GPU's tables are not what the guest's memory holds."""
    return _device(board, device).stale()


@operation(example="gvt_told(vm.host.gvt_open())")
def gvt_told(board: Board, device: int) -> int:
    """How many writes of the guest to its tables the GPU was told of."""
    return _device(board, device).told


@operation(
    example="host_write(gpa=0x700000, value=0x701001); "
    "vm.host.gvt_shadow(vm.host.gvt_open(), gpa=0x700000); vm.host.gvt_read(1, gpa=0x700000, index=0)"
)
def gvt_read(board: Board, device: int, gpa: int, index: int, offset: int = 0) -> int:
    """The GPU reads 8 bytes at `offset` of the page that entry `index` of a table maps."""
    check_range(gpa, 1)
    if not 0 <= index < 512 or offset & 7 or not 0 <= offset < 4096:
        raise KernelError(errno.EINVAL, f"entry {index}, offset {offset:#x}: no such place")
    return _device(board, device).read(gpa >> 12, index, offset)
