"""What changes the VMM's mappings of guest memory and leaves its bytes alone.

Source: mm/mlock.c, mm/mremap.c; Linux 6.18.

While `mremap` has pages elsewhere, a vCPU that needs one leaves KVM_RUN with -EFAULT; its thread waits
until they are back and enters again, as a VMM does that pauses its vCPUs.

Not modelled: mlockall and mlock2's MLOCK_ONFAULT as operations; a VMM that keeps the pages at their new
address and tells KVM by moving the slot.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import spans
from emu.operations.userfaultfd import end_uffd
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation("CLEAR", example="mlock(gpa=0x200000, pages=16)")
def mlock(board: Board, gpa: int, pages: int = 1) -> int:
    """mlock of the range: its pages are faulted in and reclaim leaves them where they are."""
    for hva, length in spans(board, gpa, pages):
        board.vmm.mlock(hva, length)
    return 0


@operation(example="mlock(gpa=0x200000, pages=16); vm.host.munlock(gpa=0x200000, pages=16)")
def munlock(board: Board, gpa: int, pages: int = 1) -> int:
    """munlock of the range."""
    for hva, length in spans(board, gpa, pages):
        board.vmm.munlock(hva, length)
    return 0


@operation("UNMAP", "CLEAR", "UNMAP", example="mremap(gpa=0x200000, pages=16)")
def mremap(board: Board, gpa: int, pages: int = 1) -> int:
    """mremap of the range to another place of the VMM's address space, and back again."""
    pieces = spans(board, gpa, pages)
    if board.moving:
        raise KernelError(errno.EBUSY, "another mremap is under way")
    board.moving = True
    try:
        with board.uffd_control:
            end_uffd(board)
            for hva, length in pieces:
                _away_and_back(board, hva, length)
    finally:
        board.moving = False
        board.moves += 1
        board.moved_back.wake_all()
    return 0


def _away_and_back(board: Board, hva: int, length: int) -> None:
    from host_mm.mmap import PROT_NONE
    from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE

    vmm = board.vmm
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    away = vmm.mmap(length, PROT_NONE)
    vmm.mremap(hva, length, length, flags, away)
    vmm.mremap(away, length, length, flags, hva)
