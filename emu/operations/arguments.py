"""What the arguments of operations mean and which are refused, for all of them. KernelError is the answer."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from emu.board import Board

__all__ = [
    "check_pages", "check_range", "check_scalar", "flag", "page_hvas", "scalar_bytes", "spans",
]


def check_pages(pages: int, least: int = 1) -> None:
    """EINVAL for a count below `least`."""
    if pages < least:
        raise KernelError(errno.EINVAL, f"{pages} pages: want at least {least}")


def check_range(gpa: int, pages: int) -> None:
    """EINVAL unless `gpa` is page-aligned and `pages` positive."""
    if gpa % PAGE_SIZE or gpa < 0:
        raise KernelError(errno.EINVAL, f"gpa {gpa:#x} is not a multiple of {PAGE_SIZE}")
    check_pages(pages)


def spans(board: Board, gpa: int, pages: int) -> list[tuple[int, int]]:
    """The (hva, length) pieces behind [gpa, gpa + pages): one per memory region; EFAULT in a hole."""
    check_range(gpa, pages)
    found: list[tuple[int, int]] = []
    end = gpa + (pages << PAGE_SHIFT)
    while gpa < end:
        region = board.memory.region_of(gpa)
        stop = min(end, region.gpa + region.size)
        found.append((region.hva + gpa - region.gpa, stop - gpa))
        gpa = stop
    return found


def page_hvas(board: Board, gpa: int, pages: int) -> Iterator[int]:
    """The hva of each page of the range."""
    for hva, length in spans(board, gpa, pages):
        yield from range(hva, hva + length, PAGE_SIZE)


def check_scalar(gpa: int, size: int) -> None:
    """EINVAL unless `size` is that of a register or a part of it, and `gpa` aligned to it."""
    if size not in (1, 2, 4, 8):
        raise KernelError(errno.EINVAL, f"size {size}: want 1, 2, 4 or 8 bytes")
    if gpa % size:
        raise KernelError(errno.EINVAL, f"gpa {gpa:#x} is not aligned to {size}")


def scalar_bytes(value: int, size: int) -> bytes:
    """The low `size` bytes of `value`."""
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def flag(name: str, value: int) -> bool:
    """What the guest can say as 0 or 1 only; EINVAL for anything else."""
    if value not in (0, 1):
        raise KernelError(errno.EINVAL, f"{name} = {value}: want 0 or 1")
    return bool(value)
