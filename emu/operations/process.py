"""fork and exit of the VMM's process. Source: kernel/fork.c dup_mmap, kernel/exit.c; Linux 6.18."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import check_scalar
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation("PROTECTION_PAGE", example="fork()")
def fork(board: Board) -> int:
    """fork of the VMM; the child keeps the guest's bytes of this moment and never runs."""
    with board.uffd_control:
        if board.child is not None:
            raise KernelError(errno.EBUSY, "the child of an earlier fork lives")
        if board.uffd is not None:
            board.uffd.bring_all()
        board.child = board.vmm.fork()
    return 0


@operation(example="fork(); vm.host.child_read(gpa=0x200000, size=8)")
def child_read(board: Board, gpa: int, size: int = 8) -> int:
    """As host_read, but through the forked child's address space."""
    check_scalar(gpa, size)
    if board.child is None:
        raise KernelError(errno.ECHILD, "there is no child; fork() first")
    hva = board.memory.hva(gpa)
    return int.from_bytes(board.child.read(hva, size), "little")


@operation(example="fork(); vm.host.child_exit()")
def child_exit(board: Board) -> int:
    """The forked child exits: its address space is torn down."""
    if board.child is None:
        raise KernelError(errno.ECHILD, "there is no child; fork() first")
    child, board.child = board.child, None
    child.exit()
    return 0
