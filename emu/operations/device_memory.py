"""A device with memory of its own in the VMM's address space: pages go there, or are its alone.

Source: lib/test_hmm.c, mm/migrate_device.c, mm/rmap.c: make_device_exclusive; Linux 6.18.

All of it is transparent: a page in device memory, or one that is the device's alone, comes back with the
next touch of the guest or the VMM, with what the device stored. A fork that meets the device at work on a
page fails with -ENOMEM, as in Linux.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.hostops import LEAVES_GIVEN, operation
from emu.operations.arguments import check_scalar, scalar_bytes, spans

if TYPE_CHECKING:
    from emu.board import Board
    from emu.devices.hmm_device import HmmDevice

__all__: list[str] = []

DEVICE_PAGES = 256
"""Pages of device memory beside each memory slot."""


def _device(board: Board, gpa: int) -> tuple[HmmDevice, int]:
    """The device of the region that holds `gpa`, attached with its first use, and the hva."""
    region = board.memory.region_of(gpa)
    device = board.hmm_devices.get(region.slot)
    if device is None:
        from emu.devices.hmm_device import HmmDevice

        device = HmmDevice(board.process, DEVICE_PAGES)
        device.open(region.hva, region.size)
        board.hmm_devices[region.slot] = device
    return device, region.hva + gpa - region.gpa


@operation("MIGRATE", example="device_migrate(gpa=0x300000, pages=4)")
def device_migrate(board: Board, gpa: int, pages: int = 1) -> int:
    """Pages of the range go to a device's memory, as far as it has room; answers how many are there."""
    moved = 0
    for hva, length in spans(board, gpa, pages):
        device, _ = _device(board, gpa)
        moved += device.migrate_to_device(hva, length >> 12)
        gpa += length
    return moved


@operation(example="device_migrate(gpa=0x300000); vm.host.device_read(gpa=0x300000)")
def device_read(board: Board, gpa: int, size: int = 8) -> int:
    """That device reads `size` bytes from its memory, or from RAM where the page is there."""
    check_scalar(gpa, size)
    device, hva = _device(board, gpa)
    return int.from_bytes(device.read(hva, size), "little")


@operation(
    example="device_migrate(gpa=0x300000); vm.host.device_write(gpa=0x300000, value=7)",
    leaves=LEAVES_GIVEN,
)
def device_write(board: Board, gpa: int, value: int, size: int = 8) -> int:
    """That device stores the low `size` bytes of `value`, in its memory or in RAM."""
    check_scalar(gpa, size)
    device, hva = _device(board, gpa)
    device.write(hva, scalar_bytes(value, size))
    return 0


@operation("EXCLUSIVE", example="device_add(gpa=0x300000, value=1)", leaves=LEAVES_GIVEN)
def device_add(board: Board, gpa: int, value: int = 1) -> int:
    """That device adds to 8 bytes while it has the page for itself; answers what was there."""
    check_scalar(gpa, 8)
    device, hva = _device(board, gpa)
    return device.fetch_add(hva, value)
