"""Host weather: a task that does random things to the guest's memory while the guest runs.

Every operation it chooses is transparent: whatever happens, the guest must read what it wrote. The
choices come from the machine's seed; the times are logical. It ends with the VM.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.hostops import operation, perform
from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SHIFT

if TYPE_CHECKING:
    from emu.board import Board

__all__ = ["weather_task"]

MAX_PAGES = 16
FORK_LIFE = 12
"""A forked child lives for this many operations: long enough that the guest breaks some of its COW."""
WEIGHTS = {"migrate": 6, "swap_out": 4, "cold": 2, "age": 3, "reclaim": 2, "fork": 1}


def weather_task(board: Board, period: int) -> Callable[[], None]:
    """The body of the task; `period` is ns between two operations on average."""
    rng = random.Random(f"weather {board.config.seed}")
    region = board.memory.regions[0]
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    if board.host.mm.swap is None:
        weights[names.index("swap_out")] = 0
    if board.config.memory_backend == "hugetlb":
        # Reclaim has nothing to do with those pages, and madvise says so.
        weights[names.index("swap_out")] = weights[names.index("cold")] = 0

    def once() -> None:
        name = rng.choices(names, weights)[0]
        pages = rng.randint(1, MAX_PAGES)
        if name == "fork":
            if board.child is None:
                perform(board, "fork")
        elif name == "reclaim":
            perform(board, "reclaim", pages)
        else:
            first = rng.randrange((region.size >> PAGE_SHIFT) - pages)
            perform(board, name, region.gpa + (first << PAGE_SHIFT), pages)

    def body() -> None:
        age = 0
        while board.stop is None:
            board.host.sched.sleep(rng.randint(period // 2, period * 3 // 2))
            if board.stop is not None:
                break
            try:
                once()
                age = age + 1 if board.child is not None else 0
                if age > FORK_LIFE:
                    perform(board, "child_exit")
            except KernelError as exc:
                if exc.errno not in (errno.EBUSY, errno.ECHILD, errno.ENOMEM):
                    raise

    return body


@operation(example="weather(period=1000000)")
def weather(board: Board, period: int = 1_000_000) -> int:
    """Start random transparent operations, one every `period` ns of logical time, until the guest ends."""
    if period < 1000:
        raise KernelError(errno.EINVAL, f"period {period} ns: want at least 1000")
    if board.weather:
        raise KernelError(errno.EBUSY, "the weather is on already")
    board.weather = True
    board.host.sched.spawn("weather", weather_task(board, period))
    return 0
