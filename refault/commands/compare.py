"""Run a scenario here and put it beside what a real kernel did: host-side lines, side by side.
Exit code 0 if they are equal, 1 if not, 77 if this machine's KVM is asked for and cannot do it."""

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
    parser.add_argument("--check", action="store_true", help="check the model's truths while it runs")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Compare one or all."""
    import refault.scenarios.linux_mm  # noqa: F401  (fills the registry)
    from refault.scenarios.recordings import recorded_names

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
    name, run, machine = _scenario(args.scenario)
    if args.against == "recorded" and name not in recorded_names():
        raise UsageError(f"{args.scenario} has no recording; give one with --against FILE, or --against kvm")
    ours, theirs = _both(name, run, machine, args)
    if args.json:
        print_json({"scenario": name, "equal": ours == theirs, "ours": ours, "recorded": theirs})
    else:
        _print_beside(ours, theirs, args.against)
        print(f"{name}: {'equal' if ours == theirs else 'different'}")
    return int(ours != theirs)


Found = tuple[str, "Callable[[Scenario], None]", dict[str, Any]]


def _scenario(text: str) -> Found:
    """By name, or from the user's own file: (name, function, its machine's options)."""
    from refault.scenarios import MACHINES, SCENARIOS

    path, _, name = text.partition(":")
    if path.endswith(".py"):
        return _from_file(path, name)
    if text not in SCENARIOS:
        raise UsageError(f"no scenario {text!r}; see refault list scenarios")
    return text, SCENARIOS[text], MACHINES[text]


def _from_file(path: str, name: str) -> Found:
    from refault.scenarios import MACHINES, SCENARIOS
    from refault.user_code import execute

    known = set(SCENARIOS)
    execute(path, _read(path), "scenarios")
    # Not ours: `refault list scenarios` and --all know nothing of them.
    found = {new: (SCENARIOS.pop(new), MACHINES.pop(new)) for new in list(SCENARIOS) if new not in known}
    if name and name not in found:
        raise UsageError(f"{path} has no function {name!r} under @refault.scenarios.scenario()")
    if not name and len(found) != 1:
        raise UsageError(f"{path} has {len(found)} scenarios; name one: {path}:NAME")
    name = name or next(iter(found))
    return name, *found[name]


def _both(
    name: str, run: Callable[[Scenario], None], machine: dict[str, Any], args: argparse.Namespace
) -> tuple[list[str], list[str]]:
    from refault.scenarios.emulator import run_on_emulator
    from refault.scenarios.normal import normal_recorded

    theirs = normal_recorded(_recording(name, run, machine, args))
    return run_on_emulator(run, check=args.check, **machine).lines, theirs


def _recording(
    name: str, run: Callable[[Scenario], None], machine: dict[str, Any], args: argparse.Namespace
) -> str:
    from refault.scenarios.recordings import recording

    if args.against == "recorded":
        return recording(name)
    if args.against != "kvm":
        return _read(args.against)
    from refault.scenarios.live.backend import run_on_kvm

    text = run_on_kvm(run, **machine)
    if args.record:
        write_whole(Path(args.record), text.encode())
    return text


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: {getattr(exc, 'strerror', None) or exc}") from None


def _all(args: argparse.Namespace) -> int:
    from refault.scenarios import MACHINES, SCENARIOS

    different = 0
    for name in list(SCENARIOS):
        ours, theirs = _both(name, SCENARIOS[name], MACHINES[name], args)
        different += ours != theirs
        print(f"{name:<20} {'equal' if ours == theirs else 'DIFFERENT'}  {len(theirs)} lines")
    print(f"{len(SCENARIOS) - different} equal, {different} different")
    return int(different > 0)


def _print_beside(ours: list[str], theirs: list[str], against: str) -> None:
    from difflib import SequenceMatcher

    width = (columns() - 3) // 2
    title = {"recorded": "recorded, Linux 6.18", "kvm": "this machine's KVM"}.get(against, against)
    print(f"{'refault':<{width}} | {title}")
    for tag, a1, a2, b1, b2 in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        for i in range(max(a2 - a1, b2 - b1)):
            left = ours[a1 + i] if a1 + i < a2 else ""
            right = theirs[b1 + i] if b1 + i < b2 else ""
            print(f"{left[:width]:<{width}} {' ' if tag == 'equal' else '!'} {right[:width]}")
