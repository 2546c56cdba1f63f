"""The RDMA engine's control path: registering guest memory, and what its peer does to it.

Source: drivers/infiniband/core/verbs.c (ib_reg_user_mr, ib_dereg_mr), umem_odp.c; Linux 6.18.

Registration changes nothing that the guest sees. An on-demand region is reached by the device's own
page table, kept right by an interval notifier; a pinned one cannot be swapped or moved while it lives.
What the peer writes is in the guest's memory as if the guest had written it; no dirty log has it.

Not modelled: protection domains, connections; the peer is trusted with any key.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import LEAVES_GIVEN, operation
from emu.operations.arguments import check_scalar, flag, scalar_bytes, spans
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation(example="rdma_register(gpa=0x200000, pages=16)")
def rdma_register(board: Board, gpa: int, pages: int = 1, pinned: int = 0) -> int:
    """Register a range of guest memory with the RDMA engine, on demand or pinned; answers its key."""
    long = flag("pinned", pinned)
    pieces = spans(board, gpa, pages)
    if len(pieces) > 1:
        raise KernelError(errno.EFAULT, "a region lies in one memory slot")
    hva, length = pieces[0]
    return board.rdma.register(gpa, hva, length, pinned=long)


@operation(example="rdma_deregister(vm.host.rdma_register(gpa=0x200000, pages=16, pinned=1))")
def rdma_deregister(board: Board, key: int) -> int:
    """End a registration; pinned pages are given back, dirty."""
    board.rdma.deregister(key)
    return 0


@operation(example="rdma_peer_read(vm.host.rdma_register(gpa=0x200000), gpa=0x200000, size=8)")
def rdma_peer_read(board: Board, key: int, gpa: int, size: int = 8) -> int:
    """The engine's peer reads `size` bytes of a registered range; answers the value."""
    check_scalar(gpa, size)
    return int.from_bytes(board.rdma.dma_read(key, gpa, size), "little")


@operation(
    "CLEAR",
    example="fork(); vm.host.rdma_peer_write(vm.host.rdma_register(gpa=0x300000), gpa=0x300000, value=7)",
    leaves=LEAVES_GIVEN,
)
def rdma_peer_write(board: Board, key: int, gpa: int, value: int, size: int = 8) -> int:
    """The engine's peer stores the low `size` bytes of `value` in a registered range."""
    check_scalar(gpa, size)
    board.rdma.dma_write(key, gpa, scalar_bytes(value, size))
    return 0


@operation(
    example="rdma_peer_add(vm.host.rdma_register(gpa=0x300000), gpa=0x300000, value=1)",
    leaves=LEAVES_GIVEN,
)
def rdma_peer_add(board: Board, key: int, gpa: int, value: int = 1) -> int:
    """The engine's peer adds to 8 bytes of a registered range, at once; answers what was there."""
    return board.rdma.fetch_add(key, gpa, value)
