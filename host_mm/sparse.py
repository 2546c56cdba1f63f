"""Holes of the real files behind the machine's own.

Source of truth: lseek(2) with SEEK_DATA, fallocate(2) with FALLOC_FL_PUNCH_HOLE.

A file system underneath that knows no holes has none: there a read takes its time everywhere, and a punched
range holds zeros.
"""

from __future__ import annotations

import ctypes
import os
from errno import ENXIO

__all__ = ["is_hole", "punch"]

_KEEP_SIZE_PUNCH_HOLE = 3
_ZEROS = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def is_hole(fd: int, start: int, length: int) -> bool:
    """Whether no byte of [start, start+length) was ever written, or it lies beyond the end."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= start + length
    except OSError as exc:
        return exc.errno == ENXIO


def punch(fd: int, start: int, end: int) -> None:
    """[start, end) reads as zeros, as far as the file goes, and is a hole where the file system can."""
    end = min(end, os.fstat(fd).st_size)
    if start >= end:
        return
    offset, length = ctypes.c_longlong(start), ctypes.c_longlong(end - start)
    if _libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, offset, length):
        for at in range(start, end, _ZEROS):
            os.pwrite(fd, bytes(min(_ZEROS, end - at)), at)
