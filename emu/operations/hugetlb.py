"""Huge pages: the host's pool of them, and guest memory made of them.

Source: Documentation/admin-guide/mm/hugetlbpage.rst, fs/hugetlbfs/inode.c, mm/hugetlb.c; Linux 6.18.

A region of huge pages is taken down with the VM. Its pages are the pool's: they are not swapped, and what
would cut one of them is refused with EINVAL. punch_hole, remove and truncate work on a shared one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import LEAVES_GIVEN, operation
from emu.operations.arguments import check_range, check_scalar, flag, scalar_bytes
from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SHIFT

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

MAX_HUGE_PAGES = 1 << 20
_READY = "nr_hugepages(2); vm.host.hugetlb_create(gpa=0x80000000, pages=512)"
_GIB = "nr_hugepages(2); vm.host.hugetlb_create(gpa=0x80000000, pages=0x40000, reserve=0); "
_SHARED = _GIB + "vm.host.host_write(0x80000000, 7); vm.host.hugetlb_peer_read(gpa=0x80000000)"


@operation(example="nr_hugepages(count=2)")
def nr_hugepages(board: Board, count: int) -> int:
    """Write `count` to /proc/sys/vm/nr_hugepages; answers how many the pool has then."""
    from host_mm.hugetlb_pool import set_max_huge_pages

    if not 0 <= count <= MAX_HUGE_PAGES:
        raise KernelError(errno.EINVAL, f"{count} huge pages")
    return set_max_huge_pages(board.host.mm, count)


@operation(example=_READY)
def hugetlb_create(board: Board, gpa: int, pages: int, shared: int = 1, reserve: int = 1) -> int:
    """Fresh memory of huge pages, of a memfd or private, in a new memory slot; answers its number."""
    check_range(gpa, pages)
    return board.hugetlb.create(
        gpa, pages << PAGE_SHIFT, shared=flag("shared", shared), reserve=flag("reserve", reserve)
    )


@operation(example=_SHARED)
def hugetlb_peer_read(board: Board, gpa: int, size: int = 8) -> int:
    """Another process that maps the same file reads `size` bytes; it may share the VMM's page tables then."""
    check_scalar(gpa, size)
    peer, address = board.hugetlb.peer_address(gpa)
    return int.from_bytes(peer.read(address, size), "little")


@operation(example=_GIB + "vm.host.hugetlb_peer_write(gpa=0x80000000, value=7)", leaves=LEAVES_GIVEN)
def hugetlb_peer_write(board: Board, gpa: int, value: int, size: int = 8) -> int:
    """That process stores the low `size` bytes of `value`."""
    check_scalar(gpa, size)
    peer, address = board.hugetlb.peer_address(gpa)
    peer.write(address, scalar_bytes(value, size))
    return 0


@operation(example=_SHARED + "; vm.host.hugetlb_sharers(gpa=0x80000000)")
def hugetlb_sharers(board: Board, gpa: int) -> int:
    """How many other processes use the VMM's level-2 page table of `gpa`."""
    return board.vmm.pt_share_count(board.hugetlb.hva(gpa))


@operation("CLEAR", example=_SHARED + "; vm.host.hugetlb_unshare(gpa=0x80000000)")
def hugetlb_unshare(board: Board, gpa: int) -> int:
    """Give up the VMM's shared tables of the whole region, as registering userfaultfd there does."""
    board.vmm.hugetlb_unshare(board.hugetlb.hva(gpa))
    return 0
