"""userfaultfd: guest memory that comes when it is asked for, snapshots, and who wrote what.

Source: fs/userfaultfd.c, mm/userfaultfd.c, fs/proc/task_mmu.c (PAGEMAP_SCAN); Linux 6.18. The VMM's thread
that serves the faults is in emu/uffd.py.

One userfaultfd is served at a time: the next operation that wants one ends the one before, as do mremap and
pagemap_scan. The VMM brings what is elsewhere before it forks.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import check_scalar, flag, spans
from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SIZE

if TYPE_CHECKING:
    from emu.board import Board
    from emu.uffd import UffdHandler

__all__ = ["end_uffd"]


def _need(board: Board, feature: int) -> None:
    profile = board.host.mm.profile
    if not profile.userfaultfd_features & feature:
        raise KernelError(errno.ENOSYS, f"{profile.name} cannot do this")


def _begin(board: Board, pieces: list[tuple[int, int]], kind: type[UffdHandler]) -> int:
    with board.uffd_control:
        end_uffd(board)
        for hva, length in pieces:
            board.vmm.unregister_wp_async(hva, length)
        handler = board.uffd = kind(board, pieces)
        try:
            return handler.begin()
        except KernelError:
            board.uffd = None
            handler.finish()
            raise


def end_uffd(board: Board) -> int:
    """End the userfaultfd that is served, if any; its answer, or -1. The caller holds uffd_control."""
    handler, board.uffd = board.uffd, None
    return handler.finish() if handler is not None else -1


@operation("CLEAR", "PROTECTION_VMA", "CLEAR", example="uffd_missing(gpa=0x200000, pages=16)")
def uffd_missing(board: Board, gpa: int, pages: int = 1) -> int:
    """Post-copy: keep the range's bytes, drop it, bring each page when it is touched; answers how many."""
    from emu.uffd import PostCopy

    return _begin(board, spans(board, gpa, pages), PostCopy)


@operation("CLEAR", "PROTECTION_VMA", example="uffd_wp(gpa=0x200000, pages=16)")
def uffd_wp(board: Board, gpa: int, pages: int = 1) -> int:
    """Snapshot: write-protect the range; each page is saved before its first write; see uffd_end()."""
    from emu.uffd import Snapshot

    return _begin(board, spans(board, gpa, pages), Snapshot)


@operation("CLEAR", example="uffd_move(gpa=0x200000, pages=16)")
def uffd_move(board: Board, gpa: int, pages: int = 1) -> int:
    """UFFDIO_MOVE of the range's pages elsewhere, and of each back when it is touched; answers how many."""
    from emu.uffd import Lend
    from host_mm.userfaultfd import UFFD_FEATURE_MOVE

    _need(board, UFFD_FEATURE_MOVE)
    return _begin(board, spans(board, gpa, pages), Lend)


@operation(
    "CLEAR", example="memfd_create(gpa=0xE0000000, pages=16); vm.host.uffd_minor(gpa=0xE0000000, pages=16)"
)
def uffd_minor(board: Board, gpa: int, pages: int = 1) -> int:
    """Unmap a range of a memfd_create; each page is mapped by UFFDIO_CONTINUE when it is touched.

    Where the range is not shared memory: KernelError(EINVAL).
    """
    from emu.uffd import Minor
    from host_mm.userfaultfd import UFFD_FEATURE_MINOR_SHMEM

    _need(board, UFFD_FEATURE_MINOR_SHMEM)
    return _begin(board, spans(board, gpa, pages), Minor)


@operation("PROTECTION_VMA", example="uffd_wp(gpa=0x200000, pages=16); vm.host.uffd_end()")
def uffd_end(board: Board) -> int:
    """End the userfaultfd; what is elsewhere comes back. Answers pages written (wp), else faults served."""
    with board.uffd_control:
        answer = end_uffd(board)
    if answer < 0:
        raise KernelError(errno.ENOENT, "no userfaultfd is served")
    return answer


@operation(example="uffd_wp(gpa=0x200000, pages=16); vm.host.uffd_read(gpa=0x200000, size=8)")
def uffd_read(board: Board, gpa: int, size: int = 8) -> int:
    """As host_read, but of the snapshot that uffd_wp took."""
    from emu.uffd import Snapshot

    check_scalar(gpa, size)
    if not isinstance(board.uffd, Snapshot):
        raise KernelError(errno.ENOENT, "there is no snapshot; uffd_wp() first")
    return int.from_bytes(board.uffd.read(board.memory.hva(gpa), size), "little")


@operation("CLEAR", "PROTECTION_VMA", example="pagemap_scan(gpa=0x200000, pages=16)")
def pagemap_scan(board: Board, gpa: int, pages: int = 1, protect: int = 1) -> int:
    """PAGEMAP_SCAN: how many pages were written since a scan with protect=1 protected them last.

    The first one finds every page written that is there. With `protect` what was found is protected again.
    """
    from host_mm.pagemap_scan import (
        PAGE_IS_PRESENT,
        PAGE_IS_SWAPPED,
        PAGE_IS_WRITTEN,
        PM_SCAN_WP_MATCHING,
        PmScanArg,
    )
    from host_mm.userfaultfd_k import UFFD_FEATURE_WP_ASYNC

    _need(board, UFFD_FEATURE_WP_ASYNC)
    flags = PM_SCAN_WP_MATCHING if flag("protect", protect) else 0
    pieces = spans(board, gpa, pages)
    both = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    found = 0
    with board.uffd_control:
        end_uffd(board)
        for hva, length in pieces:
            board.vmm.register_wp_async(hva, length)
            arg = PmScanArg(
                hva, hva + length, flags=flags, vec_len=pages,
                category_mask=PAGE_IS_WRITTEN, category_anyof_mask=both, return_mask=PAGE_IS_WRITTEN,
            )
            found += sum((region.end - region.start) // PAGE_SIZE for region in board.vmm.pagemap_scan(arg))
    return found
