"""Guest speed where nothing misses: the whole machine against bare Unicorn.

A run of some ms on each in turn, less a short run, so that what starting and ending costs is out. The
ratio is the median of the turns' ratios: on a shared machine the least times of two things may come
from two speeds.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from functools import partial

from bench.bare import DATA, TrivialCpu
from bench.code import ALU, CALLS, HALT, INSNS, MEMORY
from bench.lab import ENTRY, STACK, Lab
from bench.report import Group, Measure
from bench.timing import in_turns

__all__ = ["GROUP"]

ROUNDS = {"alu": 1_600_000, "memory": 1_000_000, "calls": 320_000}
SHORT = 8
INSTANCES = 5
"""How often everything is made anew: where native code and tables happen to lie makes 5 %."""
LOOPS = {"alu": ALU, "memory": MEMORY, "calls": CALLS}


Run = Callable[[int], None]


def _run_bare(cpu: TrivialCpu, at: int, rounds: int) -> None:
    cpu.run(at, {1: rounds, 3: DATA, 7: 0, 4: STACK})


def _bare(counted: bool) -> dict[str, Run]:
    cpu = TrivialCpu(counted=counted)
    runs: dict[str, Run] = {}
    for name, code in LOOPS.items():
        at = ENTRY[name]
        cpu.ram.b[at : at + len(code) + 2] = code + HALT
        runs[name] = partial(_run_bare, cpu, at)
    return runs


def _net(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of the loops proper: a long run less a short one."""
    turns: dict[str, Callable[[], None]] = {}
    for name, run in runs.items():
        run(rounds)
        turns[name] = partial(run, rounds + rounds // SHORT)
        turns[f"{name} short"] = partial(run, rounds // SHORT)
    times = in_turns(turns)
    return {name: [a - b for a, b in zip(times[name], times[f"{name} short"])] for name in runs}


def _median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def measure() -> dict[str, float]:
    """Ratios of time, and millions of instructions a second."""
    found: dict[str, list[list[float]]] = {name: [] for name in LOOPS}
    for _ in range(INSTANCES):
        counted, uncounted = _bare(True), _bare(False)
        with Lab() as lab:
            for name, rounds in ROUNDS.items():
                machine: Run = functools.partial(lab.run, name)
                net = _net({"machine": machine, "counted": counted[name], "bare": uncounted[name]}, rounds)
                ratios = [_median_ratio(net[other], net["machine"]) for other in ("counted", "bare")]
                found[name].append([*ratios, rounds * INSNS[name] / min(net["machine"]) / 1e6])
    values: dict[str, float] = {}
    for name, rows in found.items():
        for suffix, column in zip(("", "_uncounted", "_mips"), zip(*rows, strict=True), strict=True):
            values[f"warm_{name}{suffix}"] = statistics.median(column)
    return values


def _measures(name: str, what: str) -> tuple[Measure, ...]:
    return (
        Measure(f"warm_{name}", "", f"speed of {what} / bare Unicorn with the block counter", True),
        Measure(f"warm_{name}_uncounted", "", "the same / bare Unicorn that counts nothing", True),
        Measure(f"warm_{name}_mips", "MIPS", "the same, guest instructions", True),
    )


GROUP = Group(
    "warm",
    (
        *_measures("alu", "arithmetic"),
        *_measures("memory", "loads and stores to 16 pages"),
        *_measures("calls", "calls and returns"),
    ),
    measure,
)
