"""Random scenarios on the emulator and on this machine's KVM: `make fuzz-live`, as root.

    python -m tests.live.random_scenarios --group tables --from 100 --count 50

What differs is run again: only what this machine does every time is a difference. Then steps are left out
for as long as it stays, and what remains is printed with the command that repeats it. Exit status 1 if
there was one; 77: this machine cannot, in one line.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from difflib import unified_diff

import msgspec

from refault.errors import UsageError
from refault.scenarios.api import Scenario
from refault.scenarios.comparison import Comparison, compare
from refault.scenarios.emulator import run_on_emulator
from refault.scenarios.live.backend import run_on_kvm
from refault.scenarios.live.machine import here
from refault.scenarios.live.probe import why_not
from refault.scenarios.normal import Recording
from tests.live.random_steps import GROUPS, Step, perform, plan

__all__ = ["Case", "Result", "main", "run"]

AGAIN = 3
GOOD = ("equal", "explained", "chance")


class Case(msgspec.Struct, frozen=True):
    """Steps of a group."""

    group: str
    steps: list[Step]

    def __call__(self, s: Scenario) -> None:
        perform(s, [*GROUPS[self.group].first, *self.steps])


class Result(msgspec.Struct, frozen=True):
    """`verdict` is a comparison's, or `chance`, or `error`; `why` says it in lines."""

    verdict: str
    why: list[str] = []

    @property
    def good(self) -> bool:
        """Whether nothing is to be done about it."""
        return self.verdict in GOOD


def _here(case: Case) -> Recording:
    machine = GROUPS[case.group].machine
    params = {**here(), **machine.get("params", {})}
    return run_on_emulator(case, check=True, **{**machine, "params": params}).recording()


def _there(case: Case) -> Recording:
    return run_on_kvm(case, **GROUPS[case.group].machine)


def _result(found: Comparison) -> Result:
    if found.verdict != "different":
        return Result(found.verdict)
    diff = unified_diff(found.theirs, found.ours, "kvm", "emulator", n=8, lineterm="")
    return Result("different", [*diff])


def _once(case: Case) -> Result:
    try:
        theirs = _there(case)
    except OSError as exc:
        return Result("error", [f"this machine: {exc}"])
    try:
        ours = _here(case)
    except UsageError:
        raise
    except Exception as exc:
        # Whatever breaks the emulator is what is looked for.
        return Result("error", [f"the emulator: {type(exc).__name__}: {exc}"])
    return _result(compare("random", ours, theirs))


def run(case: Case) -> Result:
    """Compare; what differs not every time is chance."""
    result = _once(case)
    for _ in range(0 if result.good else AGAIN):
        again = _once(case)
        if again.good:
            return Result("chance", result.why)
    return result


def shrink(case: Case, result: Result, seconds: float) -> tuple[Case, Result]:
    """Without steps that the difference does not need, as many as are found in `seconds`."""
    until = time.monotonic() + seconds
    size = len(case.steps) // 2
    while size:
        first = 0
        while first < len(case.steps) and time.monotonic() < until:
            smaller = Case(case.group, case.steps[:first] + case.steps[first + size :])
            found = _once(smaller)
            if found.verdict == result.verdict:
                case, result = smaller, found
            else:
                first += size
        size //= 2
    return case, result


def _report(group: str, seed: int, case: Case, result: Result) -> None:
    print(f"{group} {seed}: {result.verdict}")
    for name, args in [*GROUPS[group].first, *case.steps]:
        print(f"    s.{name}({', '.join(map(repr, args))})")
    print(*result.why, sep="\n")
    command = "python -m tests.live.random_scenarios"
    print(f"repeat: {command} --count 1 --group {group} --from {seed}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.live.random_scenarios")
    parser.add_argument("--group", action="append", choices=GROUPS, help="only this one; may be repeated")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=10, help="how many seeds of each group")
    parser.add_argument("--shrink", type=float, default=60, help="seconds to shrink each difference for")
    options = parser.parse_args(argv)
    reason = why_not()
    if reason is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return 77
    # What was changed of the machine is put back then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bad = 0
    for group in options.group or GROUPS:
        seen: Counter[str] = Counter()
        for seed in range(options.first, options.first + options.count):
            case = Case(group, plan(group, seed))
            try:
                result = run(case)
            except UsageError as exc:
                print(f"{group}: {exc}")
                break
            seen[result.verdict] += 1
            if not result.good:
                bad += 1
                _report(group, seed, *shrink(case, result, options.shrink))
        last = options.first + options.count - 1
        print(f"{group}, seeds {options.first} to {last}: {dict(seen)}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
