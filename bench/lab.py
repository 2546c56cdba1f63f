"""A real machine whose guest runs one routine at a time, for measuring.

    with Lab() as lab:
        lab.read_pages(GPA, 512)

A routine ends with an OUT to a port of ours, whose device pauses the VM, so that the next one can be
started. What is timed is all of it: VM entry, the guest, its exits, the model, the scheduler.
"""

from __future__ import annotations

from types import TracebackType

import refault
from bench.code import ALU, CALLS, END, INVLPG_PAGES, MEMORY, PAUSE, READ_PAGES, WRITE_PAGES
from emu.board import Stop
from emu.loaders.image import FLAT_BASE
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)

__all__ = ["ENTRY", "GPA", "STACK", "Lab"]

GPA = 0x40_0000
"""Where routines work: far from the code and the boot structures."""
STACK = 0x1F_0000
PORT = PAUSE[1]
_ROUTINES = {
    "read": READ_PAGES, "write": WRITE_PAGES, "alu": ALU, "memory": MEMORY, "calls": CALLS,
    "invlpg": INVLPG_PAGES,
}
ENTRY = {name: FLAT_BASE + 64 * index for index, name in enumerate(_ROUTINES, 1)}
"""Where each routine is in guest memory."""


class _PausePort:
    """The device: an OUT ends `Board.run` without ending the guest."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def read(self, port: int, size: int) -> int:
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        self.lab.vm.board.stop = Stop("pause")


class Lab:
    """A VM, by default of 64 MiB on a host with room for it."""

    def __init__(
        self, *, memory: str = "64M", host_ram: str = "128M", swap: str = "auto", check: bool = False,
        mmu: str = "ept",
    ) -> None:
        self.vm = refault.VM(memory=memory, host_ram=host_ram, swap=swap, check=check, mmu=mmu)
        board = self.vm.board
        board.bus.register(PORT, PORT, _PausePort(self))
        image = bytearray(PAUSE)
        for name, code in _ROUTINES.items():
            image += b"\x90" * (ENTRY[name] - FLAT_BASE - len(image)) + code + END
        self.vm.load(bytes(image))
        board.run()

    def run(self, routine: str, rounds: int, base: int = GPA) -> None:
        """Run a routine to its end: `rounds` rounds, data at `base`."""
        board = self.vm.board
        cpu, vcpu = board.cpu, board.vcpus[0]
        for name, value in (
            ("rip", ENTRY[routine]), ("rcx", rounds), ("rbx", base), ("rdi", 0), ("rsp", STACK),
        ):
            cpu.set_reg(vcpu, name, value)
        stop = board.run()
        if stop.kind != "pause":
            raise RuntimeError(f"the guest stopped: {stop}")

    def read_pages(self, pages: int, gpa: int = GPA) -> None:
        """The guest reads a word of each page."""
        self.run("read", pages, gpa)

    def write_pages(self, pages: int, gpa: int = GPA) -> None:
        """The guest writes a word of each page."""
        self.run("write", pages, gpa)

    def bracket(self, pages: int, gpa: int = GPA) -> None:
        """A notifier bracket over the pages around nothing: SPTEs go, frames stay."""
        board = self.vm.board

        def body() -> None:
            mm = board.process.mm
            hva = board.memory.hva(gpa)
            range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, mm, hva, hva + (pages << 12))
            mmu_notifier_invalidate_range_start(range_)
            mmu_notifier_invalidate_range_end(range_)

        board.host.sched.run_task("bench", body)

    def close(self) -> None:
        """Destroy the machine."""
        self.vm.close()

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
