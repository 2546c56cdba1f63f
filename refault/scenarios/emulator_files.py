"""What the emulator does for the scenarios of files: D is a memfd, or a file, mapped shared or private."""

from __future__ import annotations

from typing import Any

from emu import files
from refault.scenarios.emulator_hugetlb import HugetlbSteps
from refault.scenarios.layout import DATA_GPA, DATA_SIZE

__all__ = ["FILE_BYTE", "FileSteps"]

FILE_BYTE = b"\x11"
"""What a file holds at first, as far as it is not a hole."""


class FileSteps(HugetlbSteps):
    """The steps, for a back end that has `board`, `data_hva` and can enter the host."""

    def create_file(self, kind: str, filled: int) -> None:
        """The data slot: `kind` is memfd, shared (a file) or private (one); its first bytes are `filled`."""
        vmm, at = self.board.vmm, self.data_hva
        if kind == "memfd":
            files.mmap_memfd(vmm, DATA_SIZE, at)
        else:
            data = FILE_BYTE * filled
            files.mmap_file(vmm, DATA_SIZE, address=at, private=kind == "private", data=data)
        self.board.memory.show(DATA_GPA, DATA_SIZE, at)

    def fsync(self) -> Any:
        """fsync(2) of the file."""
        return self._host(lambda: files.fsync(self.board.vmm, self.data_hva))

    def pwrite(self, offset: int, data: bytes) -> Any:
        """pwrite(2): how many bytes."""
        return self._host(lambda: files.pwrite(self.board.vmm, self.data_hva + offset, data))

    def punch_hole(self, offset: int, length: int) -> Any:
        """A hole in the file: 0."""
        if self.memfd is not None:
            return super().punch_hole(offset, length)
        return self._host(lambda: files.punch_hole(self.board.vmm, self.data_hva + offset, length)) or 0

    def ftruncate(self, size: int) -> Any:
        """The file gets another size."""
        if self.memfd is not None:
            return super().ftruncate(size)
        return self._host(lambda: files.ftruncate(self.board.vmm, self.data_hva, size))
