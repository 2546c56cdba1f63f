"""Run a scenario here and put it beside what a real kernel did: host-side lines, side by side.
Exit code 0 if they are equal, 1 if not."""

from __future__ import annotations

import argparse

from refault.output import add_json_flag, columns, print_json

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("scenario", nargs="?", help="see refault list scenarios")
    parser.add_argument("--all", action="store_true", help="every recorded scenario, a line each")
    parser.add_argument(
        "--against", default="recorded", choices=("recorded",), help="with what (default: recorded)"
    )
    parser.add_argument("--check", action="store_true", help="check the model's truths while it runs")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Compare one or all."""
    import refault.scenarios.linux_mm  # noqa: F401  (fills the registry)
    from refault.errors import UsageError
    from refault.scenarios import SCENARIOS

    if args.all:
        return _all(args)
    if args.scenario is None:
        raise UsageError("name a scenario, or --all; see refault list scenarios")
    if args.scenario not in SCENARIOS:
        raise UsageError(f"no scenario {args.scenario!r}; see refault list scenarios")
    ours, theirs = _both(args.scenario, args.check)
    if args.json:
        print_json({"scenario": args.scenario, "equal": ours == theirs, "ours": ours, "recorded": theirs})
    else:
        _print_beside(ours, theirs)
        print(f"{args.scenario}: {'equal' if ours == theirs else 'different'}")
    return int(ours != theirs)


def _both(name: str, check: bool) -> tuple[list[str], list[str]]:
    from refault.scenarios import MACHINES, SCENARIOS
    from refault.scenarios.emulator import run_on_emulator
    from refault.scenarios.normal import normal_recorded
    from refault.scenarios.recordings import recording

    ours = run_on_emulator(SCENARIOS[name], check=check, **MACHINES[name]).lines
    return ours, normal_recorded(recording(name))


def _all(args: argparse.Namespace) -> int:
    from refault.scenarios import SCENARIOS

    different = 0
    for name in SCENARIOS:
        ours, theirs = _both(name, args.check)
        different += ours != theirs
        print(f"{name:<20} {'equal' if ours == theirs else 'DIFFERENT'}  {len(theirs)} lines")
    print(f"{len(SCENARIOS) - different} equal, {different} different")
    return int(different > 0)


def _print_beside(ours: list[str], theirs: list[str]) -> None:
    from difflib import SequenceMatcher

    width = (columns() - 3) // 2
    print(f"{'refault':<{width}} | recorded, Linux 6.18")
    for tag, a1, a2, b1, b2 in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        for i in range(max(a2 - a1, b2 - b1)):
            left = ours[a1 + i] if a1 + i < a2 else ""
            right = theirs[b1 + i] if b1 + i < b2 else ""
            print(f"{left[:width]:<{width}} {' ' if tag == 'equal' else '!'} {right[:width]}")
