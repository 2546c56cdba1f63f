"""What the VMM's process, or the kernel on its behalf, does to the memory behind the guest.

Source: mm/madvise.c, mm/mprotect.c, mm/migrate.c (move_pages), mm/rmap.c (folio_referenced),
fs/proc/task_mmu.c (clear_refs), mm/vmscan.c; Linux 6.18.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import LEAVES_EITHER, LEAVES_GIVEN, LEAVES_ZEROS, operation
from emu.operations.arguments import check_pages, check_scalar, page_hvas, scalar_bytes, spans
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

PROT_MASK = 7


def _madvise(board: Board, gpa: int, pages: int, advice: int) -> int:
    for hva, length in spans(board, gpa, pages):
        board.vmm.madvise(hva, length, advice)
    return 0


@operation("CLEAR", example="swap_out(gpa=0x200000, pages=16)")
def swap_out(board: Board, gpa: int, pages: int = 1) -> int:
    """madvise(MADV_PAGEOUT) of the range; answers how many of its pages have no frame afterwards."""
    from host_mm.madvise import MADV_PAGEOUT

    if board.host.mm.swap is None:
        raise KernelError(errno.ENOSYS, "this host has no swap")
    _madvise(board, gpa, pages, MADV_PAGEOUT)
    board.host.admin.wait_for_writeback()
    return sum(1 for hva in page_hvas(board, gpa, pages) if board.vmm.present_pfn(hva) < 0)


@operation("CLEAR", example="dontneed(gpa=0x300000, pages=4)", leaves=LEAVES_ZEROS)
def dontneed(board: Board, gpa: int, pages: int = 1) -> int:
    """madvise(MADV_DONTNEED): the range reads as zeros afterwards."""
    from host_mm.madvise import MADV_DONTNEED

    uffd = board.uffd
    if uffd is None:
        return _madvise(board, gpa, pages, MADV_DONTNEED)
    pieces = spans(board, gpa, pages)
    uffd.mutex.lock()
    try:
        for hva, length in pieces:
            uffd.forget(hva, length)
        return _madvise(board, gpa, pages, MADV_DONTNEED)
    finally:
        uffd.mutex.unlock()


@operation(example="cold(gpa=0x200000, pages=16)")
def cold(board: Board, gpa: int, pages: int = 1) -> int:
    """madvise(MADV_COLD): the pages are not young any more and first in line for reclaim."""
    from host_mm.madvise import MADV_COLD

    return _madvise(board, gpa, pages, MADV_COLD)


@operation("CLEAR", example="free(gpa=0x300000, pages=4)", leaves=LEAVES_EITHER)
def free(board: Board, gpa: int, pages: int = 1) -> int:
    """madvise(MADV_FREE): reclaim may drop the pages unless they are written again."""
    from host_mm.madvise import MADV_FREE

    return _madvise(board, gpa, pages, MADV_FREE)


@operation("CLEAR", example="migrate(gpa=0x200000, pages=16)")
def migrate(board: Board, gpa: int, pages: int = 1) -> int:
    """move_pages of each present page to another NUMA node; answers how many moved."""
    return board.vmm.move_to_other_node(list(page_hvas(board, gpa, pages)))


@operation("CLEAR", "PROTECTION_VMA", example="protect(gpa=0x200000, pages=1, prot=1)")
def protect(board: Board, gpa: int, pages: int = 1, prot: int = 7) -> int:
    """mprotect of the VMM's mapping; the first guest access it forbids lifts it again."""
    if prot & ~PROT_MASK:
        raise KernelError(errno.EINVAL, f"prot {prot:#x}: want PROT_READ 1 | PROT_WRITE 2 | PROT_EXEC 4")
    pieces = spans(board, gpa, pages)
    board.protection_faults = 0
    for hva, length in pieces:
        board.vmm.mprotect(hva, length, prot)
        board.protected.append((hva, length))
    return 0


@operation(example="protect_faults()")
def protect_faults(board: Board) -> int:
    """How many guest accesses met the protection since the last protect()."""
    return board.protection_faults


@operation(example="age(gpa=0x200000, pages=16)")
def age(board: Board, gpa: int, pages: int = 1) -> int:
    """Test and clear the accessed bits of each page, host PTE and SPTEs; answers how many were young."""
    young: dict[int, bool] = {}
    count = 0
    for hva in page_hvas(board, gpa, pages):
        # The first page of a large folio answers for all of it.
        folio = board.vmm.present_folio(hva)
        if folio not in young:
            young[folio] = board.vmm.test_and_clear_young(hva)
        count += young[folio]
    return count


@operation("SOFT_DIRTY", example="clear_refs(kind=4)")
def clear_refs(board: Board, kind: int = 4) -> int:
    """Write `kind` to /proc/PID/clear_refs of the VMM: 1 all referenced bits, 4 soft-dirty bits."""
    board.vmm.clear_refs(kind)
    return 0


@operation("CLEAR", example="reclaim(pages=32)")
def reclaim(board: Board, pages: int = 32) -> int:
    """Ask reclaim for `pages` frames, as a write to memory.reclaim does; answers how many came free."""
    check_pages(pages)
    return board.host.admin.reclaim(pages)


@operation(example="host_read(gpa=0x200000, size=8)")
def host_read(board: Board, gpa: int, size: int = 8) -> int:
    """The VMM reads `size` bytes through its own mapping; answers the value, zero-extended."""
    check_scalar(gpa, size)
    return int.from_bytes(board.memory.read(gpa, size), "little")


@operation(
    "CLEAR", example="host_read(gpa=0x700000); vm.host.host_write(gpa=0x700000, value=7)",
    leaves=LEAVES_GIVEN,
)
def host_write(board: Board, gpa: int, value: int, size: int = 8) -> int:
    """The VMM stores the low `size` bytes of `value` through its own mapping."""
    check_scalar(gpa, size)
    board.memory.write(gpa, scalar_bytes(value, size))
    return 0
