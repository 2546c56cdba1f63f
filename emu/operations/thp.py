"""Transparent huge pages: allowing them, making them of small pages, parting them.

Source: mm/madvise.c, mm/khugepaged.c, mm/huge_memory.c (split_huge_pages of debugfs); Linux 6.18.

What the guest may see of it is the level of its EPT entries, which follows the host's: map_level says it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import page_hvas, spans
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

_RANGE = "(gpa=0x200000, pages=512)"


@operation(example="thp_enable" + _RANGE)
def thp_enable(board: Board, gpa: int, pages: int = 512) -> int:
    """madvise(MADV_HUGEPAGE) of the range: its faults map huge pages, and khugepaged collapses small ones."""
    from host_mm.madvise import MADV_HUGEPAGE

    for hva, length in spans(board, gpa, pages):
        board.vmm.madvise(hva, length, MADV_HUGEPAGE)
    return 0


@operation("CLEAR", example="collapse" + _RANGE)
def collapse(board: Board, gpa: int, pages: int = 512) -> int:
    """madvise(MADV_COLLAPSE) of the range; answers how many of its pages are parts of huge ones then."""
    from host_mm.madvise import MADV_COLLAPSE

    if not board.host.mm.profile.madv_collapse:
        raise KernelError(errno.ENOSYS, "this kernel has no MADV_COLLAPSE")
    for hva, length in spans(board, gpa, pages):
        board.vmm.madvise(hva, length, MADV_COLLAPSE)
    return sum(1 for hva in page_hvas(board, gpa, pages) if board.vmm.mapping_level(hva) == 2)


@operation("CLEAR", example="collapse" + _RANGE + "; vm.host.thp_split" + _RANGE)
def thp_split(board: Board, gpa: int, pages: int = 512) -> int:
    """Write the range to debugfs' split_huge_pages; answers how many huge pages became small ones."""
    return sum(board.vmm.split_huge_pages(hva, length) for hva, length in spans(board, gpa, pages))


@operation(example="thp_enable" + _RANGE + "; vm.host.khugepaged()")
def khugepaged(board: Board) -> int:
    """Wake khugepaged and wait until it has been everywhere; answers how often it collapsed 2 MiB."""
    return board.host.admin.khugepaged_round()
