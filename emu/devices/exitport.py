"""The exit port: a payload ends the run by writing its status (QEMU's isa-debug-exit)."""

from __future__ import annotations

from collections.abc import Callable

from emu.devices.bus import all_ones

__all__ = ["ExitPort"]


class ExitPort:
    """Calls `on_exit(status)` at every write; reads all ones."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self.on_exit = on_exit

    def read(self, port: int, size: int) -> int:
        """All ones."""
        return all_ones(size)

    def write(self, port: int, size: int, value: int) -> None:
        """Report the status."""
        self.on_exit(value)
