"""What the emulator does for the scenarios of huge pages: D is made of them, as a memfd or private."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emu import files
from refault.scenarios.layout import DATA_GPA, DATA_SIZE

if TYPE_CHECKING:
    from emu.board import Board
    from host_mm.address_space import AddressSpace

__all__ = ["HugetlbSteps"]


class HugetlbSteps:
    """The steps, for a back end that has `board`, `data_hva` and can enter the host."""

    board: Board
    data_hva: int
    memfd: AddressSpace | None = None

    def _host(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def create_hugetlb(self, kind: str) -> None:
        """The data slot: `kind` is shared or private."""
        vmm = self.board.vmm
        self.memfd = vmm.memfd_hugetlb(DATA_SIZE) if kind == "shared" else None
        vmm.mmap_hugetlb(DATA_SIZE, self.data_hva, self.memfd, reserve=True)
        self.board.memory.show(DATA_GPA, DATA_SIZE, self.data_hva)

    def close_hugetlb(self) -> None:
        """The VMM closes the file; its mapping still holds it."""
        memfd, self.memfd = self.memfd, None
        if memfd is not None:
            self._host(lambda: self.board.vmm.close_file(memfd))

    def punch_hole(self, offset: int, length: int) -> Any:
        """A hole in the file: 0."""
        return self._host(lambda: files.punch_hole(self.board.vmm, self.data_hva + offset, length)) or 0

    def ftruncate(self, size: int) -> Any:
        """The file gets another size."""
        return self._host(lambda: files.ftruncate(self.board.vmm, self.data_hva, size))
