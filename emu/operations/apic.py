"""The APIC-access page, which is memory of the VMM that KVM mapped for itself. Source: mm/madvise.c,
mm/migrate.c (move_pages), arch/x86/kvm/lapic.c: kvm_alloc_apic_access_page; Linux 6.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import flag
from kvm_model.lapic import apic_access_page_slot

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation(example="apic_page(move=0)")
def apic_page(board: Board, move: int = 0) -> int:
    """MADV_PAGEOUT of the APIC-access page, with `move` move_pages; answers the pages taken (no APIC: 0)."""
    from host_mm.madvise import MADV_PAGEOUT

    elsewhere = flag("move", move)
    slot = board.kvm.slots().id_hash.get(apic_access_page_slot(board.kvm))
    if slot is None:
        return 0
    hva = slot.userspace_addr
    if elsewhere:
        return board.vmm.move_to_other_node([hva])
    board.vmm.madvise(hva, 4096, MADV_PAGEOUT)
    board.host.admin.wait_for_writeback()
    return int(board.vmm.present_pfn(hva) < 0)
