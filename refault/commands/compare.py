"""Run a scenario here and put it beside what a real kernel did: every event of KVM's, side by side.

A difference is shown with `!`; one that a typed record explains with `~` and the record's reason. Exit code 0
if the two are equal or explained, 1 if not, 77 if this machine's KVM is asked for and cannot do it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refault.errors import UsageError
from refault.output import add_json_flag, columns, print_json, write_whole

if TYPE_CHECKING:
    from refault.scenarios.api import Scenario
    from refault.scenarios.comparison import Comparison
    from refault.scenarios.normal import Recording

__all__ = ["configure", "main"]

EXIT_SKIPPED = 77


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "scenario", nargs="?", help="a name of refault list scenarios, or FILE.py[:NAME] with your own"
    )
    parser.add_argument("--all", action="store_true", help="every recorded scenario, a line each")
    parser.add_argument(
        "--against", default="recorded", metavar="recorded|kvm|FILE",
        help="with what: the recording of Linux 6.18 (the default), this machine's KVM, a recording of yours",
    )
    parser.add_argument("--record", metavar="FILE", help="keep what this machine's KVM did")
    parser.add_argument(
        "--mmu", choices=("shadow", "ept"), default=None,
        help="of the guest here; with ept only what the host does is compared (default: shadow)",
    )
    parser.add_argument("--check", action="store_true", help="check the model's truths while it runs")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Compare one or all."""
    import refault.scenarios.linux_mm  # noqa: F401  (fills the registry)
    from refault.scenarios.recordings import recorded_names

    if args.all and (args.scenario or args.record):
        raise UsageError("--all takes no scenario and no --record")
    if args.record:
        args.against = "kvm"
    if args.against == "kvm":
        from refault.scenarios.live.probe import why_not

        if why := why_not():
            print(f"refault: skipped: {why}", file=sys.stderr)
            return EXIT_SKIPPED
    if args.all:
        return _all(args)
    if args.scenario is None:
        raise UsageError("name a scenario, or --all; see refault list scenarios")
    found = _scenario(args.scenario)
    if args.against == "recorded" and found.name not in recorded_names():
        raise UsageError(f"{args.scenario} has no recording; give one with --against FILE, or --against kvm")
    comparison = _compare(found, args)
    if args.json:
        print_json(_as_json(comparison))
    else:
        _print_beside(comparison, args.against)
        print(f"{found.name}: {comparison.verdict}")
    return int(comparison.verdict == "different")


class _Scenario:
    """A scenario that was asked for: of ours, or of the user's `file`."""

    def __init__(self, name: str, run: Callable[[Scenario], None], file: str = "") -> None:
        from refault.scenarios import MACHINES, REPEATS

        self.name = name
        self._run = run
        self.file = file
        self.machine: dict[str, Any] = MACHINES[name]
        self.repeats = REPEATS[name]

    def run(self, s: Scenario) -> None:
        """Run it. UsageError with the user's line where the user's code raises."""
        from refault.user_code import user_error

        try:
            self._run(s)
        except Exception as exc:
            if not self.file or hasattr(exc, "exit_code"):
                raise
            raise user_error(self.file, exc) from None


def _scenario(text: str) -> _Scenario:
    """By name, or from the user's own file."""
    from refault.scenarios import SCENARIOS

    path, _, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    if path.endswith(".py"):
        return _from_file(path, name)
    if text not in SCENARIOS:
        raise UsageError(f"no scenario {text!r}; see refault list scenarios")
    return _Scenario(text, SCENARIOS[text])


def _from_file(path: str, name: str) -> _Scenario:
    from refault.scenarios import MACHINES, REPEATS, SCENARIOS
    from refault.user_code import execute

    known: tuple[dict[str, Any], ...] = (dict(SCENARIOS), dict(MACHINES), dict(REPEATS))
    # A file may give its scenario the name of one of ours.
    SCENARIOS.clear()
    try:
        execute(path, _read(path), "scenarios")
        new = {each: _Scenario(each, run, path) for each, run in SCENARIOS.items()}
    finally:
        # Not ours: `refault list scenarios` and --all know nothing of them.
        registries: tuple[dict[str, Any], ...] = (SCENARIOS, MACHINES, REPEATS)
        for registry, before in zip(registries, known, strict=True):
            registry.clear()
            registry.update(before)
    if name and name not in new:
        raise UsageError(f"{path} has no function {name!r} under @refault.scenarios.scenario()")
    if not name and len(new) != 1:
        raise UsageError(f"{path} has {len(new)} scenarios; name one: {path}:NAME")
    return new[name or next(iter(new))]


def _compare(found: _Scenario, args: argparse.Namespace) -> Comparison:
    from refault.scenarios.comparison import compare
    from refault.scenarios.emulator import run_on_emulator

    theirs = _recording(found, args)
    machine = dict(found.machine)
    if args.against == "kvm":
        from refault.scenarios.live.machine import here

        machine["params"] = {**here(), **machine.get("params", {})}
    if args.mmu:
        machine["mmu"] = args.mmu
    backend = run_on_emulator(found.run, check=args.check, **machine)
    whole = backend.vm.config.mmu == "shadow"
    return compare(found.name, backend.recording(), theirs, repeats=found.repeats, whole=whole)


def _recording(found: _Scenario, args: argparse.Namespace) -> Recording:
    from refault.scenarios.normal import parse_recording
    from refault.scenarios.recordings import recording

    if args.against == "recorded":
        return recording(found.name)
    if args.against != "kvm":
        try:
            return parse_recording(_read(args.against))
        except ValueError as exc:
            raise UsageError(f"{args.against}: {exc}") from None
    from refault.scenarios.live.backend import run_on_kvm

    seen = run_on_kvm(found.run, **found.machine)
    if args.record:
        write_whole(Path(args.record), seen.text().encode())
    return seen


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: {getattr(exc, 'strerror', None) or exc}") from None


def _all(args: argparse.Namespace) -> int:
    from refault.scenarios import SCENARIOS

    counts = {"equal": 0, "explained": 0, "different": 0}
    for name in list(SCENARIOS):
        try:
            comparison = _compare(_Scenario(name, SCENARIOS[name]), args)
        except UsageError as exc:
            if args.against != "kvm":
                raise
            print(f"{name:<22} skipped: {exc}")
            continue
        counts[comparison.verdict] += 1
        lines = f"{len(comparison.theirs)} lines"
        print(f"{name:<22} {_shown(comparison)}  {lines}{_reasons(comparison)}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["different"] > 0)


def _shown(comparison: Comparison) -> str:
    verdict = comparison.verdict
    return verdict.upper() if verdict == "different" else verdict


def _reasons(comparison: Comparison) -> str:
    if comparison.broken:
        return f"  {comparison.broken[0]}"
    if comparison.unneeded:
        return f"  no longer needed: {comparison.unneeded[0].because}"
    if comparison.unexplained:
        first = comparison.unexplained[0]
        return f"  {len(comparison.unexplained)} differences; first: {first.ours!r} | {first.theirs!r}"
    reasons = dict.fromkeys(record.because.partition(":")[0] for _, record in comparison.excused)
    return "".join(f"  {reason}" for reason in reasons)


def _as_json(comparison: Comparison) -> dict[str, object]:
    return {
        "scenario": comparison.scenario, "verdict": comparison.verdict,
        "equal": comparison.verdict != "different", "ours": comparison.ours, "recorded": comparison.theirs,
        "explained": [
            {"ours": one.ours, "recorded": one.theirs, "because": record.because}
            for one, record in comparison.excused
        ],
        "different": [{"ours": one.ours, "recorded": one.theirs} for one in comparison.unexplained],
        "no_longer_needed": [record.because for record in comparison.unneeded],
        "broken": comparison.broken,
    }


def _print_beside(comparison: Comparison, against: str) -> None:
    from difflib import SequenceMatcher

    from refault.scenarios.invariants import INVARIANTS

    width = (columns() - 3) // 2
    title = {"recorded": "recorded, Linux 6.18", "kvm": "this machine's KVM"}.get(against, against)
    print(f"{'refault':<{width}} | {title}")
    excused = {(one.ours, one.theirs) for one, _ in comparison.excused}
    ours, theirs = comparison.ours, comparison.theirs
    by_chance = comparison.scenario in INVARIANTS
    for tag, a1, a2, b1, b2 in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        for i in range(max(a2 - a1, b2 - b1)):
            left = ours[a1 + i] if a1 + i < a2 else ""
            right = theirs[b1 + i] if b1 + i < b2 else ""
            known = (left, right) in excused or (("", right) in excused and ("", left) in excused)
            sign = " " if tag == "equal" or by_chance else "~" if known else "!"
            print(f"{left[:width]:<{width}} {sign} {right[:width]}")
    for record in dict.fromkeys(record for _, record in comparison.excused):
        print(f"~ {record.event} {record.field}: {record.because}")
    for record in comparison.unneeded:
        print(f"! explained, but not needed any more: {record.event} {record.field}: {record.because}")
    for why in comparison.broken:
        print(f"! {why}")
