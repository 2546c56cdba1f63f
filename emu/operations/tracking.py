"""Who uses which page: the idle bitmap and DAMON. They clear accessed bits and take no mapping away.

Source: mm/page_idle.c, mm/damon; Linux 6.18.
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

MAX_NS = 10_000_000_000


@operation(example="page_idle_set(gpa=0x200000, pages=16)")
def page_idle_set(board: Board, gpa: int, pages: int = 1) -> int:
    """Set the range's bits in /sys/kernel/mm/page_idle/bitmap; answers how many frames took it."""
    from host_mm.page_idle import page_set_idle

    pfns = [board.vmm.present_pfn(hva) for hva in page_hvas(board, gpa, pages)]
    return sum(1 for pfn in pfns if pfn >= 0 and page_set_idle(board.host.mm, pfn))


@operation(example="page_idle_set(gpa=0x200000, pages=16); vm.host.page_idle_get(gpa=0x200000, pages=16)")
def page_idle_get(board: Board, gpa: int, pages: int = 1) -> int:
    """Read the range's bits in the idle bitmap; answers how many frames nobody used since they were set."""
    from host_mm.page_idle import page_is_idle

    pfns = [board.vmm.present_pfn(hva) for hva in page_hvas(board, gpa, pages)]
    return sum(1 for pfn in pfns if pfn >= 0 and page_is_idle(board.host.mm, pfn))


@operation(example="damon(gpa=0x200000, pages=256, ns=2000000, sample_ns=50000)")
def damon(board: Board, gpa: int, pages: int, ns: int = 200_000_000, sample_ns: int = 5_000_000) -> int:
    """kdamond watches the range for `ns`; answers the pages of the regions that it found in use."""
    if not 0 < sample_ns <= ns <= MAX_NS:
        raise KernelError(errno.EINVAL, f"ns {ns}, sample_ns {sample_ns}: want 0 < sample_ns <= ns")
    return board.vmm.damon([(hva, hva + length) for hva, length in spans(board, gpa, pages)], ns, sample_ns)
