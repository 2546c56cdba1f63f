"""Memory slots and the dirty log, as the VMM's ioctls. Source: virt/kvm/kvm_main.c; Linux 6.18."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import check_range, flag
from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SHIFT

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

MAX_DIRTY_PAGES = 32_768


@operation(example="dirty_log(gpa=0x200000, on=1)")
def dirty_log(board: Board, gpa: int, on: int = 1) -> int:
    """Turn the dirty log of the slot that holds `gpa` on or off."""
    board.memory.set_logging(board.memory.region_of(gpa), flag("on", on))
    return 0


@operation(example="dirty_log(gpa=0x200000, on=1); vm.host.get_dirty(gpa=0x200000, pages=64)")
def get_dirty(board: Board, gpa: int, pages: int = 1, buffer: int = 0) -> int:
    """KVM_GET_DIRTY_LOG of the slot that holds `gpa`; answers the dirty pages of the range."""
    check_range(gpa, pages)
    if pages > MAX_DIRTY_PAGES:
        raise KernelError(errno.EINVAL, f"{pages} pages: want at most {MAX_DIRTY_PAGES}")
    region = board.memory.region_of(gpa)
    first = (gpa - region.gpa) >> PAGE_SHIFT
    if first + pages > region.size >> PAGE_SHIFT:
        raise KernelError(errno.EFAULT, f"{pages} pages at gpa {gpa:#x} reach beyond their slot")
    whole = int.from_bytes(board.kvm.get_dirty_log(region.slot), "little")
    bits = (whole >> first) & ((1 << pages) - 1)
    if buffer:
        board.memory.write(buffer, bits.to_bytes((pages + 7) // 8, "little"))
    return bits.bit_count()


@operation(example="slot_create(gpa=0xE0000000, pages=16)")
def slot_create(board: Board, gpa: int, pages: int = 1) -> int:
    """Fresh zeroed memory in a new memory slot at `gpa`; answers the slot's number."""
    check_range(gpa, pages)
    return board.memory.create(gpa, pages << PAGE_SHIFT).slot


@operation(example="slot_delete(vm.host.slot_create(gpa=0xE0000000, pages=16))")
def slot_delete(board: Board, slot: int) -> int:
    """Delete a slot that slot_create made; the VMM keeps its memory."""
    board.memory.delete(slot)
    return 0


@operation(example="slot_delete(vm.host.slot_create(gpa=0xE0000000, pages=16)); vm.host.slot_restore(1)")
def slot_restore(board: Board, slot: int) -> int:
    """Show a deleted slot's memory again where it last was."""
    board.memory.restore(slot)
    return 0


@operation(example="slot_move(vm.host.slot_create(gpa=0xE0000000, pages=16), gpa=0xE0100000)")
def slot_move(board: Board, slot: int, gpa: int) -> int:
    """Show the same memory at another guest physical address."""
    check_range(gpa, 1)
    board.memory.move(slot, gpa)
    return 0
