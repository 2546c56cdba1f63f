"""What the emulator does for the scenarios of userfaultfd."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emu.uffd import UffdHandler
from refault.scenarios.layout import DATA_SIZE, PAGE

if TYPE_CHECKING:
    from emu.board import Board
    from host_mm.userfaultfd_k import UffdMsg

__all__ = ["UffdSteps"]

COPIED = 0xABC
"""The first word of the page that is copied in."""


class _Thread(UffdHandler):
    """The VMM's thread, which marks what it reads and what it answers."""

    def __init__(self, steps: UffdSteps) -> None:
        super().__init__(steps.board, [(steps.data_hva, DATA_SIZE)])
        self.steps = steps
        self.kind = ""
        self.source = self.vmm.mmap(PAGE, 3)
        self.vmm.write(self.source, COPIED.to_bytes(8, "little"))

    def answer(self, msg: UffdMsg) -> bool:
        """COPY or ZEROPAGE, as the scenario said."""
        offset = msg.address - self.steps.data_hva
        self.steps.mark(f">> uffd event {msg.event:#x} flags {msg.flags:#x} D+{offset:#x}")
        self.steps.mark(f"<< uffd answering {self.kind}")
        self.give(msg.address, self.source if self.kind == "copy" else 0)
        return True


class UffdSteps:
    """The steps, for a back end that has `board`, `data_hva` and can enter the host."""

    board: Board
    data_hva: int
    thread: _Thread | None = None

    def _host(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def mark(self, text: str) -> None:
        """Put a line into the event sequence."""
        raise NotImplementedError

    def uffd_api(self) -> Any:
        """A userfaultfd with its thread."""

        def make() -> None:
            self.thread = _Thread(self)
            self.thread.start()

        self._host(make)
        return 0

    def uffd_register(self, mode: int) -> Any:
        """The data slot is registered."""
        assert self.thread is not None
        thread = self.thread
        return self._host(lambda: thread.register(mode))

    def uffd_answer(self, kind: str) -> None:
        """How the thread answers."""
        assert self.thread is not None
        self.thread.kind = kind

    def uffd_copy(self, offset: int) -> Any:
        """The page of the thread's source, without a fault."""
        assert self.thread is not None
        thread = self.thread
        self._host(lambda: thread.give(self.data_hva + offset, thread.source))
        return 0

    def uffd_close(self) -> None:
        """The thread ends and the userfaultfd is closed."""
        if self.thread is not None:
            self._host(self.thread.stop)
            self.thread = None
