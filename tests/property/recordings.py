"""Machines whose traces must repeat byte for byte, and how one is recorded.

    python tests/property/recordings.py DIRECTORY [NAME ...]

writes NAME.ndjson for each: for comparing processes with each other.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

import refault
from trace_events.ndjson import TraceWriter
from trace_events.stream import Listener

__all__ = ["CASES", "Case", "record", "sleepy_slices"]


class Case(msgspec.Struct, frozen=True):
    """A payload with its words on a machine."""

    payload: str
    words: tuple[str, ...] = ()
    options: dict[str, Any] = {}


CASES = {
    "pressure": Case("swap-storm", ("mib=2", "passes=2", "weather=0"), {"memory": "4M", "host_ram": "2M"}),
    "weather": Case("swap-storm", ("mib=2", "weather=200000"), {"memory": "6M", "host_ram": "4M"}),
    "smp": Case("smp", ("count=1000",), {"memory": "8M", "vcpus": 2}),
    "smp-random": Case(
        "smp", ("count=1000",),
        {"memory": "8M", "vcpus": 2, "params": {"sched.strategy": "random", "sched.period": "4"}},
    ),
    "timer": Case("timer", ("ticks=3",), {"memory": "8M"}),
    "guest-paging": Case("guest-paging", ("pages=8",), {"memory": "8M"}),
    "migrate": Case("migrate", ("pages=8",), {"memory": "8M"}),
}


def record(name: str, path: Path, globs: tuple[str, ...] = ("*",), **options: Any) -> bytes:
    """Run a case to its end with seed 3 and give the bytes of its trace."""
    case = CASES[name]
    with refault.VM(seed=3, **{**case.options, **options}) as vm:
        image = vm.prepare(case.payload, *case.words)
        with TraceWriter(path, vm.header()["machine"], globs) as writer:
            recorder = Listener(globs, writer.write)
            vm.board.host.stream.listen(recorder)
            vm.board.load(image)
            stop = vm.run(timeout=200)
            vm.board.host.stream.unlisten(recorder)
        assert (stop.kind, stop.status) == ("exit", 0), (stop, vm.serial)
    return path.read_bytes()


def sleepy_slices(run_slice: Any) -> Any:
    """`UnicornCpu._run_slice` on a machine that stalls: 60 ms now and then, never twice at the same place."""
    rng = random.Random()
    rest = [20]

    def stalling(*args: Any) -> Any:
        if rest[0] and rng.random() < 0.03:
            rest[0] -= 1
            time.sleep(0.06)
        return run_slice(*args)

    return stalling


if __name__ == "__main__":
    for wanted in sys.argv[2:] or CASES:
        record(wanted, Path(sys.argv[1]) / f"{wanted}.ndjson")
