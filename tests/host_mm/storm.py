"""A process and somebody else at work on the same pages, while the kernel takes them away; in any order."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.process import Process
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, run

Read = Callable[[int], bytes]
Write = Callable[[int, bytes], object]


def storm(
    process: Process, base: int, pages: int, seed: int, read: Read, write: Write,
    beside: Callable[[Callable[[], bool]], None] | None = None, *, fork_may_fail: bool = False,
) -> None:
    """Run until both have made 60 accesses of 8 bytes, each at offsets of its own, and found their bytes.

    `read` and `write` are the other's, by offset from `base`; `beside` is one more task, which is told how to
    ask whether the two are still at work.
    """
    host = process.host
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    left = [2]

    # Both write everywhere, each every other 8 bytes, so that they share pages and never bytes.
    def user(phase: int, read: Read, write: Write) -> None:
        rng = random.Random(seed * 3 + phase)
        mine = bytearray(pages * PAGE)
        for _ in range(60):
            at = rng.randrange(pages * PAGE // 16) * 16 + phase * 8
            if rng.random() < 0.5:
                assert read(at) == mine[at : at + 8], f"user {phase} at {at:#x}"
            else:
                mine[at : at + 8] = rng.randbytes(8)
                write(at, bytes(mine[at : at + 8]))
            host.sched.point("user")
        left[0] -= 1

    def cpu() -> None:
        user(
            0, lambda at: copy_from_user(process, base + at, 8),
            lambda at, data: copy_to_user(process, base + at, data),
        )

    run(
        host, lambda: _kernel(process, base, pages, seed, lambda: left[0] > 0, fork_may_fail=fork_may_fail),
        *([] if beside is None else [lambda: beside(lambda: left[0] > 0)]),
        cpu, lambda: user(1, read, write),
    )
    host.sched.set_strategy(None)


def user(process: Process, base: int, pages: int, seed: int, number: int = 0, steps: int = 200) -> None:
    """Store and load 16 bytes at the user's own place in random pages, and find what was stored there."""
    host = process.host
    rng = random.Random(seed * 31 + number)
    mine: dict[int, bytes] = {}
    for step in range(steps):
        host.sched.advance(900)
        host.sched.point("user")
        at = base + rng.randrange(pages) * PAGE + (number + 1) * 64
        if rng.random() < 0.6:
            mine[at] = f"{number}:{step}".encode().ljust(16)
            copy_to_user(process, at, mine[at])
        else:
            assert copy_from_user(process, at, 16) == mine.get(at, bytes(16))


def _kernel(
    process: Process, base: int, pages: int, seed: int, busy: Callable[[], bool], *, fork_may_fail: bool
) -> None:
    rng = random.Random(seed)
    refused = contextlib.suppress(KernelError) if fork_may_fail else contextlib.nullcontext()
    children: list[Process] = []
    while busy():
        first = rng.randrange(pages)
        count = rng.randrange(1, pages + 1 - first)
        what = rng.randrange(4)
        if what == 0:
            do_madvise(process.mm, base + first * PAGE, count * PAGE, MADV_PAGEOUT)
        elif what == 1:
            addresses = [base + (first + n) * PAGE for n in range(count)]
            move_pages(process, addresses, [rng.randrange(2)] * count)
        elif what == 2 and not children:
            with refused:
                children.append(fork_process(process))
        elif children:
            exit_process(children.pop())
        process.host.sched.sleep(rng.randrange(1, 4000))
    for child in children:
        exit_process(child)
