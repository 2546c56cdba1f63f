"""D as a memfd, a file or huge pages on a real machine, and what can be done to that file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refault.scenarios.layout import DATA_SIZE
from refault.scenarios.live import libc, machine

__all__ = ["FileSteps"]

_FILE_BYTE = b"\x11"
_MFD_HUGETLB = 4
_PUNCH_HOLE = 3
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE"""


class FileSteps:
    """The steps, for a back end that has `data`, the address of D, and what it undoes at the end."""

    data: int
    file: int = -1
    _undo: contextlib.ExitStack

    def _map(self, offset: int, size: int, flags: int = 0, fd: int = -1) -> int:
        raise NotImplementedError

    def _call(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def create_data(self, file: str, filled: int, hugetlb: str) -> None:
        """The data slot's memory: `file` is memfd, shared or private; `hugetlb` shared or private."""
        if hugetlb == "private":
            self._map(0, DATA_SIZE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_HUGETLB)
        elif hugetlb or file:
            self.file = self._open(file, filled, hugetlb)
            self._undo.callback(os.close, self.file)
            self._map(0, DATA_SIZE, libc.MAP_PRIVATE if file == "private" else libc.MAP_SHARED, self.file)
        else:
            self._map(0, DATA_SIZE)

    def _open(self, file: str, filled: int, hugetlb: str) -> int:
        if hugetlb or file == "memfd":
            descriptor = os.memfd_create("refault", _MFD_HUGETLB if hugetlb else 0)
        else:
            # A file of a real file system: what is written back and read again differs from tmpfs.
            descriptor, path = tempfile.mkstemp(prefix="refault-", dir=machine.on_disk())
            Path(path).unlink()
        os.ftruncate(descriptor, DATA_SIZE)
        if filled:
            os.pwrite(descriptor, _FILE_BYTE * filled, 0)
            os.fsync(descriptor)
        return descriptor

    def punch_hole(self, offset: int, length: int) -> Any:
        """A hole in the file."""
        return self._call(lambda: libc.fallocate(self.file, _PUNCH_HOLE, offset, length)) or 0

    def ftruncate(self, size: int) -> Any:
        """The file gets another size."""
        return self._call(lambda: os.ftruncate(self.file, size))

    def fsync(self) -> Any:
        """fsync(2) of the file."""
        return self._call(lambda: os.fsync(self.file))

    def pwrite(self, offset: int, data: bytes) -> Any:
        """pwrite(2): how many bytes."""
        return self._call(lambda: os.pwrite(self.file, data, offset))
