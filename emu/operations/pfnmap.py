"""A PCI function's memory in a slot: frames mapped raw, which their driver can take back.

Source: drivers/vfio/pci/vfio_pci_core.c, mm/memory.c (vmf_insert_pfn, unmap_mapping_range),
virt/kvm/kvm_main.c: hva_to_pfn_remapped; Linux 6.18.

Swap, migration and reclaim leave such frames alone; fork shares them. Revoking is not transparent: what the
guest had stored there is gone, as after the reset of a device that it drives.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import LEAVES_ZEROS, operation
from emu.operations.arguments import check_range
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation(example="pfnmap_create(gpa=0xE0000000, pages=16)")
def pfnmap_create(board: Board, gpa: int, pages: int = 1) -> int:
    """Memory of a PCI function, zeroed, in a new slot at `gpa`; answers the slot's number."""
    check_range(gpa, pages)
    board.memory.check_free(gpa, pages << 12)
    from emu.devices.pci_bar import PciBar

    bar = PciBar(board.host.mm, pages)
    slot = board.memory.show(gpa, pages << 12, bar.mmap(board.process)).slot
    board.bars[slot] = bar
    return slot


@operation(
    "CLEAR", example="pfnmap_revoke(vm.host.pfnmap_create(gpa=0xE0000000, pages=16))",
    leaves=LEAVES_ZEROS,
)
def pfnmap_revoke(board: Board, slot: int) -> int:
    """The function is reset: its memory goes from VMM and guest, and comes back as other frames of zeros."""
    bar = board.bars.get(slot)
    if bar is None:
        raise KernelError(errno.ENOENT, f"slot {slot} was not made by pfnmap_create")
    bar.revoke()
    return 0
