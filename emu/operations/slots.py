"""Memory slots and the dirty log, as the VMM's ioctls. Source: virt/kvm/kvm_main.c; Linux 6.18.

`--param kvm_intel.pml=Y` makes the CPU log what it dirties instead of faults on protected pages;
`--param vmm.dirty_ring_size=N` replaces the bitmaps by rings of N entries. get_dirty answers alike.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import check_range, flag
from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SHIFT
from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY

if TYPE_CHECKING:
    from emu.board import Board
    from emu.memory import Region

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
    whole = _fetch(board, region)
    bits = (whole >> first) & ((1 << pages) - 1)
    if buffer:
        board.memory.write(buffer, bits.to_bytes((pages + 7) // 8, "little"))
    return bits.bit_count()


def _fetch(board: Board, region: Region) -> int:
    if not board.dirty_rings.entries:
        return int.from_bytes(board.kvm.get_dirty_log(region.slot), "little")
    if not region.flags & KVM_MEM_LOG_DIRTY_PAGES:
        raise KernelError(errno.ENOENT, f"slot {region.slot} keeps no dirty log")
    return board.dirty_rings.take(region.slot)


@operation(example="manual_dirty(value=1)")
def manual_dirty(board: Board, value: int) -> int:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 1 get_dirty clears nothing, 3 and new logs start full, 0 neither."""
    from kvm_model.dirty_log import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2

    board.kvm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, value)
    return 0


@operation(
    example="manual_dirty(1); vm.host.dirty_log(gpa=0x200000, on=1); vm.host.clear_dirty(gpa=0x200000)"
)
def clear_dirty(board: Board, gpa: int, pages: int = 1) -> int:
    """KVM_CLEAR_DIRTY_LOG: the range's pages are no longer dirty; their next write is logged."""
    check_range(gpa, pages)
    region = board.memory.region_of(gpa)
    first = (gpa - region.gpa) >> PAGE_SHIFT
    npages = region.size >> PAGE_SHIFT
    if first + pages > npages:
        raise KernelError(errno.EFAULT, f"{pages} pages at gpa {gpa:#x} reach beyond their slot")
    # KVM wants whole words of the bitmap; pages beside the range are not in the mask.
    start = first & ~63
    count = min((first + pages + 63) & ~63, npages) - start
    mask = ((1 << pages) - 1) << (first - start)
    board.kvm.clear_dirty_log(region.slot, start, mask.to_bytes((count + 63) // 64 * 8, "little"), count)
    return 0


@operation(example="harvest_rings()")
def harvest_rings(board: Board, reset: int = 1) -> int:
    """Harvest the vCPUs' dirty rings and, if `reset`, give them back to KVM; answers the entries found."""
    rings = board.dirty_rings
    return rings.collect_and_reset() if flag("reset", reset) else rings.collect()


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


@operation(example="flash(gpa=0xE0000000, pages=2, source=0x200000)")
def flash(board: Board, gpa: int, pages: int, source: int) -> int:
    """NOR flash with a copy of the pages at `source`: reads are memory's, stores are commands. The slot."""
    from emu.devices.flash import Flash

    check_range(gpa, pages)
    check_range(source, pages)
    if board.flash is not None:
        raise KernelError(errno.EEXIST, "there is a flash already")
    if board.kvm.has_private_mem:
        raise KernelError(errno.EINVAL, "a slot of guest_memfd cannot be read-only")
    image = board.memory.read(source, pages << PAGE_SHIFT)
    region = board.memory.create(gpa, pages << PAGE_SHIFT, flags=KVM_MEM_READONLY)
    board.memory.write(gpa, image)
    board.flash = Flash(board, region)
    return region.slot


@operation(example="slot_move(vm.host.slot_create(gpa=0xE0000000, pages=16), gpa=0xE0100000)")
def slot_move(board: Board, slot: int, gpa: int) -> int:
    """Show the same memory at another guest physical address."""
    check_range(gpa, 1)
    board.memory.move(slot, gpa)
    return 0
