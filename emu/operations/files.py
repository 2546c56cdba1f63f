"""Guest memory that is a file's: shared memory, the page cache, and what happens to both.

Source: mm/shmem.c, mm/filemap.c, mm/truncate.c, mm/page-writeback.c, mm/fadvise.c, mm/madvise.c
(madvise_remove); Linux 6.18.

A slot of these operations is a memory slot as slot_create makes it. Where a page is not a file's the answer
is -EBADF.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu import files
from emu.hostops import LEAVES_GIVEN, LEAVES_ZEROS, operation
from emu.operations.arguments import check_range, check_scalar, flag, scalar_bytes, spans
from host_mm.ram import PAGE_SHIFT

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation(example="memfd_create(gpa=0xE0000000, pages=16)")
def memfd_create(board: Board, gpa: int, pages: int = 1) -> int:
    """A memfd, mapped shared, in a new memory slot at `gpa`; answers the slot's number."""
    check_range(gpa, pages)
    size = pages << PAGE_SHIFT
    board.memory.check_free(gpa, size)
    return board.memory.show(gpa, size, files.mmap_memfd(board.vmm, size)).slot


@operation(example="file_create(gpa=0xE0000000, pages=16)")
def file_create(board: Board, gpa: int, pages: int = 1, private: int = 0) -> int:
    """A fresh temporary file, mapped shared or private, in a new slot at `gpa`; answers the slot's number."""
    check_range(gpa, pages)
    own = flag("private", private)
    size = pages << PAGE_SHIFT
    board.memory.check_free(gpa, size)
    hva = files.mmap_file(board.vmm, size, private=own)
    return board.memory.show(gpa, size, hva).slot


_FILE = "file_create(gpa=0xE0000000, pages=16); vm.host.host_write(gpa=0xE0000000, value=7)"
_MEMFD = "memfd_create(gpa=0xE0000000, pages=16); vm.host.host_write(gpa=0xE0000000, value=7)"


@operation("PROTECTION_PAGE", example=f"{_FILE}; vm.host.fsync(gpa=0xE0000000)")
def fsync(board: Board, gpa: int) -> int:
    """fsync of the file behind `gpa`: each dirty page is cleaned in every mapping, then written."""
    files.fsync(board.vmm, board.memory.hva(gpa))
    return 0


@operation("CLEAR", example=f"{_MEMFD}; vm.host.punch_hole(gpa=0xE0000000, pages=4)", leaves=LEAVES_ZEROS)
def punch_hole(board: Board, gpa: int, pages: int = 1) -> int:
    """fallocate(PUNCH_HOLE) of the file behind the range: zeros from now on, but for private copies."""
    for hva, length in spans(board, gpa, pages):
        files.punch_hole(board.vmm, hva, length)
    return 0


@operation("CLEAR", example=f"{_MEMFD}; vm.host.remove(gpa=0xE0000000, pages=4)", leaves=LEAVES_ZEROS)
def remove(board: Board, gpa: int, pages: int = 1) -> int:
    """madvise(MADV_REMOVE): as punch_hole, asked for through a shared mapping."""
    from host_mm.madvise import MADV_REMOVE

    for hva, length in spans(board, gpa, pages):
        board.vmm.madvise(hva, length, MADV_REMOVE)
    return 0


@operation("CLEAR", example=f"{_FILE}; vm.host.truncate(gpa=0xE0000000)", leaves=LEAVES_ZEROS)
def truncate(board: Board, gpa: int) -> int:
    """ftruncate of the file behind `gpa` to end there, and back to its old size: private copies go too."""
    check_range(gpa, 1)
    hva = board.memory.hva(gpa)
    size = files.file_size(board.vmm, hva)
    _, pos = files.file_at(board.vmm, hva)
    files.ftruncate(board.vmm, hva, pos)
    files.ftruncate(board.vmm, hva, size)
    return 0


@operation(example=f"{_FILE}; vm.host.file_write(gpa=0xE0000000, value=9)", leaves=LEAVES_GIVEN)
def file_write(board: Board, gpa: int, value: int, size: int = 8) -> int:
    """pwrite of the low `size` bytes of `value` into the file under `gpa`; private copies keep theirs."""
    check_scalar(gpa, size)
    files.pwrite(board.vmm, board.memory.hva(gpa), scalar_bytes(value, size))
    return 0


@operation(example=f"{_MEMFD}; vm.host.peer_write(gpa=0xE0000000, value=9)", leaves=LEAVES_GIVEN)
def peer_write(board: Board, gpa: int, value: int, size: int = 8) -> int:
    """Another process maps the file behind `gpa` and stores the low `size` bytes of `value` there."""
    check_scalar(gpa, size)
    files.peer_write(board.vmm, board.memory.hva(gpa), scalar_bytes(value, size))
    return 0


@operation("PROTECTION_PAGE", example=f"{_FILE}; vm.host.fadvise_dontneed(gpa=0xE0000000, pages=16)")
def fadvise_dontneed(board: Board, gpa: int, pages: int = 1) -> int:
    """posix_fadvise(DONTNEED): start writing what is dirty, drop what is clean and unmapped of the range."""
    for hva, length in spans(board, gpa, pages):
        files.fadvise_dontneed(board.vmm, hva, length)
    return 0
