"""Holes of real files (host_mm/sparse.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from host_mm import sparse
from host_mm.sparse import is_hole, punch

PAGE = 4096


def descriptor(path: Path, size: int) -> int:
    fd = os.open(path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    return fd


def test_what_was_never_written_or_lies_beyond_the_end_is_a_hole(tmp_path: Path) -> None:
    fd = descriptor(tmp_path, 8 * PAGE)
    os.pwrite(fd, b"x", 4 * PAGE)
    assert [is_hole(fd, page * PAGE, PAGE) for page in range(9)] == [page != 4 for page in range(9)]
    assert is_hole(fd, 0, 4 * PAGE)
    assert not is_hole(fd, 0, 5 * PAGE)


def test_a_punched_range_is_zeros_and_a_hole_and_the_size_stays(tmp_path: Path) -> None:
    fd = descriptor(tmp_path, 0)
    os.pwrite(fd, b"x" * (4 * PAGE + 1), 0)
    punch(fd, PAGE, 9 * PAGE)
    assert os.pread(fd, 9 * PAGE, 0) == b"x" * PAGE + bytes(3 * PAGE + 1)
    assert [is_hole(fd, page * PAGE, PAGE) for page in range(4)] == [False, True, True, True]


def test_where_the_file_system_cannot_punch_there_are_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        def fallocate(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(sparse, "_libc", Refuses())
    fd = descriptor(tmp_path, 0)
    os.pwrite(fd, b"x" * 4 * PAGE, 0)
    punch(fd, PAGE, 2 * PAGE)
    assert os.pread(fd, 4 * PAGE, 0) == b"x" * PAGE + bytes(PAGE) + b"x" * 2 * PAGE
    assert not is_hole(fd, PAGE, PAGE)
