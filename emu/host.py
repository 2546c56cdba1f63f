"""One host: its RAM, its scheduler and clock, its event stream, its mm, and the VMs on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.administrator import Administrator
from host_mm.host import HostMm
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.profile import PROFILES
from trace_events.stream import TraceStream

if TYPE_CHECKING:
    from emu.board import Board
    from emu.checker import Checker

__all__ = ["Host"]


class Host:
    """A host with `ram` bytes of memory and `swap` bytes of swap file (None: no swap).

    `params` are module parameters under the kernel's names plus `sched.strategy=random` and
    `sched.period=N`, which make the scheduler switch at one point in N, decided by `seed`.
    `profile` names the kernel. `breaks` are the protocol steps left out. With `checks` every truth is
    checked while running.
    """

    def __init__(
        self,
        *,
        ram: int,
        swap: int | None,
        seed: int = 0,
        nodes: int = 2,
        profile: str = "linux-6.18",
        params: dict[str, str] | None = None,
        breaks: frozenset[str] = frozenset(),
        checks: bool = False,
        swap_path: str | None = None,
    ) -> None:
        self.seed = seed
        self.profile = profile
        self.params = dict(params or {})
        self.breaks = breaks
        self.stream = TraceStream()
        self.sched = Scheduler(self.stream)
        if self.params.get("sched.strategy") == "random":
            self.sched.set_strategy(RandomStrategy(seed, int(self.params.get("sched.period", "8"))))
        self.mm = HostMm(
            self.sched,
            self.stream,
            ram_bytes=ram,
            swap_bytes=swap,
            swap_path=swap_path,
            nodes=nodes,
            seed=seed,
            profile=PROFILES[profile],
            params=self.params,
            breaks=breaks,
            checks=checks,
        )
        self.admin = Administrator(self.mm)
        self.mm.start_daemons()
        self.boards: list[Board] = []
        self.checker: Checker | None = None
        if checks:
            self.sched.lockdep = {}
            from emu.checker import Checker

            self.checker = Checker(self)

    def close(self) -> None:
        """Destroy the VMs in good order, kill every task, give the memory back.

        With checks: nothing may be left of the VMs, or BrokenTruth says what it is.
        """
        checker = self.checker
        for board in list(self.boards):
            board.quiesce()
        if checker is not None:
            # Without I/O under way, so that exit leaves no folio behind in the swap cache.
            checker.rest()
            checker.sweep()
        for board in list(self.boards):
            board.close()
        if checker is not None:
            checker.audit()
            checker.leaks()
        self.abandon()

    def abandon(self) -> None:
        """Give the memory back without any good order: after an error in the middle of the model."""
        self.sched.close()
        for board in self.boards:
            board.cpu.close()
        self.boards.clear()
        self.mm.close()
