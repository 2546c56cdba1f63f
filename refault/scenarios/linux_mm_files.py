"""Scenarios of files and shared memory, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import DATA_SIZE, PAGE, Scenario

__all__: list[str] = []


@scenario(file="shared")
def pageout_file(s: Scenario) -> None:
    """fsync brackets each dirty page, reclaim a clean one; a file that is cut unmaps what is behind twice."""
    s.st(0x3000, 1)
    s.ld(0x4000)
    s.st(0x4000, 2, "page_mkwrite")
    s.fsync()
    s.st(0x3000, 2, "after writeback")
    s.fsync()
    s.madv(0x3000, PAGE, "PAGEOUT")
    s.ld(0x3000)
    s.ftruncate(0x3000, "host msync/fdatasync+ftruncate")
    s.ld(0x3000, "beyond EOF")


@scenario(file="memfd")
def memfd_punch(s: Scenario) -> None:
    """A hole in a memfd unmaps it in one bracket, however it is asked for."""
    s.st(0x3000, 1)
    s.st(0x4000, 1)
    s.punch_hole(0x3000, PAGE, "fallocate PUNCH_HOLE 0x3000")
    s.ld(0x3000)
    s.madv(0x4000, PAGE, "REMOVE")
    s.st(0x4000, 2)


@scenario(file="private", file_bytes=0x10000, repeats="but for frames")
def private_file(s: Scenario) -> None:
    """A private page of a file is copied by a write, and outlives a hole but not the end of the file."""
    s.ld(0x3000, "page cache")
    s.st(0x3000, 1, "file COW")
    s.st(0x3000, 2)
    s.st(0x4000, 3, "write first")
    s.ld(0x5000)
    s.pwrite(0x5000, b"\x22" * 8, "pwrite under it 0x5000")
    s.ld(0x5000, "sees it")
    s.pwrite(0x3000, b"\x22" * 8, "pwrite under COWed 0x3000")
    s.ld(0x3000, "does not")
    s.punch_hole(0x3000, 0x3000, "PUNCH_HOLE 0x3000..0x5fff")
    s.ld(0x3000, "COWed copy survives?")
    s.ld(0x5000)
    s.madv(0x3000, PAGE, "DONTNEED")
    s.ld(0x3000, "back to file")
    s.ftruncate(0x4000, "ftruncate 0x4000")
    s.ld(0x3000)
    s.ld(0x4000, "COWed copy, beyond EOF")
    s.st(0x4000, 9)
    s.ftruncate(DATA_SIZE, "ftruncate 8M")
    s.ld(0x4000)
