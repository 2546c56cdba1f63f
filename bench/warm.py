"""Guest speed where nothing misses: the whole machine against bare Unicorn."""

from __future__ import annotations

from collections.abc import Callable

from bench.bare import CODE, DATA, TrivialCpu
from bench.code import ALU, CALLS, HALT, INSNS, MEMORY
from bench.lab import STACK, Lab
from bench.report import Group, Measure
from bench.timing import best_of_each

__all__ = ["GROUP"]

ROUNDS = {"alu": 2_000_000, "memory": 1_000_000, "calls": 600_000}
LOOPS = {"alu": ALU, "memory": MEMORY, "calls": CALLS}


def _bare(counted: bool) -> dict[str, Callable[[], None]]:
    cpu = TrivialCpu(counted=counted)
    runs: dict[str, Callable[[], None]] = {}
    for index, (name, code) in enumerate(LOOPS.items()):
        at = CODE + 0x1000 * index
        cpu.ram.b[at : at + len(code) + 2] = code + HALT
        registers = {1: ROUNDS[name], 3: DATA, 7: 0, 4: STACK}
        runs[name] = lambda at=at, registers=registers: cpu.run(at, registers)
    return runs


def measure() -> dict[str, float]:
    """Ratios of time, and millions of instructions a second."""
    counted, uncounted = _bare(True), _bare(False)
    values: dict[str, float] = {}
    with Lab() as lab:
        for name in LOOPS:
            runs = {
                "machine": lambda name=name: lab.run(name, ROUNDS[name]),
                "counted": counted[name],
                "bare": uncounted[name],
            }
            for run in runs.values():
                run()
            least = best_of_each(runs)
            values[f"warm_{name}"] = least["counted"] / least["machine"]
            values[f"warm_{name}_uncounted"] = least["bare"] / least["machine"]
            values[f"warm_{name}_mips"] = ROUNDS[name] * INSNS[name] / least["machine"] / 1e6
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
