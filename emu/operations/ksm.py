"""Samepage merging: what is written to /sys/kernel/mm/ksm, and its advice.

Source: mm/ksm.c, Documentation/admin-guide/mm/ksm.rst; Linux 6.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import flag, page_hvas, spans

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

_EQUAL = "host_write(gpa=0x700000, value=7); vm.host.host_write(gpa=0x701000, value=7); vm.host."
_MERGE = f"{_EQUAL}ksm_merge(gpa=0x700000, pages=2)"


@operation("CLEAR", example=_MERGE)
def ksm_merge(board: Board, gpa: int, pages: int = 1, zero_pages: int = 0) -> int:
    """madvise(MADV_MERGEABLE), then ksmd scans until nothing changes; answers the range's merged pages."""
    from host_mm.madvise import MADV_MERGEABLE

    zero = flag("zero_pages", zero_pages)
    for hva, length in spans(board, gpa, pages):
        board.vmm.madvise(hva, length, MADV_MERGEABLE)
    board.host.admin.ksm_scan(use_zero_pages=zero)
    return sum(1 for hva in page_hvas(board, gpa, pages) if board.vmm.is_merged(hva))


@operation("CLEAR", example=f"{_MERGE}; vm.host.ksm_unmerge(gpa=0x700000, pages=2)")
def ksm_unmerge(board: Board, gpa: int, pages: int = 1) -> int:
    """madvise(MADV_UNMERGEABLE): every merged page of the range gets a frame of its own again."""
    from host_mm.madvise import MADV_UNMERGEABLE

    for hva, length in spans(board, gpa, pages):
        board.vmm.madvise(hva, length, MADV_UNMERGEABLE)
    return 0
