"""What there is: guest payloads, host operations, trace events, scenarios, protocol switches, module
parameters, kernels."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from refault.output import add_json_flag, print_json, wrapped

__all__ = ["KINDS", "configure", "main"]

Entry = dict[str, object]

LEAVES = {
    "zeros": "the range reads as zeros afterwards",
    "either": "each page of the range reads as before or as zeros, until it is written again",
}
"""What is said of operations after which the guest reads something else than it stored."""

_ANNOTATION = re.compile(r": '?[\w ]+(\| None)?'?(?=$| =)")


def _payloads() -> Iterable[Entry]:
    from guest_payloads.builder import payloads

    for info in payloads():
        yield {
            "name": info.name,
            "what": info.title,
            "params": [f"{param.name}={param.default}" for param in info.params],
            "vmcalls": list(info.vmcalls),
        }


def _operations() -> Iterable[Entry]:
    import emu.operations  # noqa: F401  (fills the registry)
    from emu.abi import vmcall_by_name
    from emu.hostops import OPERATIONS

    for name, operation in sorted(OPERATIONS.items()):
        args = (_ANNOTATION.sub("", arg).replace(" = ", "=") for arg in operation.args)
        yield {
            "name": f"{name}({', '.join(args)})",
            "what": operation.summary,
            "leaves": operation.leaves,
            "notifier_events": [event.lower().replace("_", "-") for event in operation.events],
            "example": f"vm.host.{operation.example}",
            "vmcall": vmcall_by_name(name).nr,
        }


def _events() -> Iterable[Entry]:
    from refault.registry import all_tracepoints

    for tracepoint in all_tracepoints():
        yield {
            "name": tracepoint.full_name,
            "what": tracepoint.doc or ", ".join(tracepoint.fields),
            "fields": list(tracepoint.fields),
        }


def _switches() -> Iterable[Entry]:
    from refault.registry import switches
    from refault.switch_runs import switch_runs

    runs = switch_runs()
    for name, what in switches().items():
        run = runs[name]
        yield {"name": name, "what": what, "truth": run.truth, "command": run.command(name)}


def _scenarios() -> Iterable[Entry]:
    import refault.scenarios.linux_mm  # noqa: F401  (fills the registry)
    from refault.scenarios import SCENARIOS
    from refault.scenarios.recordings import recorded_names

    recorded = set(recorded_names())
    for name, scenario in sorted(SCENARIOS.items()):
        claim = " ".join((scenario.__doc__ or "").split("\n\n")[0].split())
        yield {"name": name, "what": claim, "recorded": name in recorded}


def _profiles() -> Iterable[Entry]:
    import msgspec

    from host_mm.profile import PROFILES as MM
    from kvm_model.profile import PROFILES as KVM
    from refault.registry import profiles

    default = profiles()[0]
    for name in profiles():
        models = {"mm": msgspec.to_builtins(MM[name]), "kvm": msgspec.to_builtins(KVM[name])}
        usual = {"mm": msgspec.to_builtins(MM[default]), "kvm": msgspec.to_builtins(KVM[default])}
        other = [
            f"{model}.{field}={value}" for model, fields in models.items() for field, value in fields.items()
            if field not in ("name", "absent_events") and value != usual[model][field]
        ]
        yield {"name": name, "what": f"differs in {', '.join(other)}" if other else "the default", **models}


def _params() -> Iterable[Entry]:
    from refault.params import PARAMS

    for name, param in PARAMS.items():
        yield {"name": f"{name}={param.default}", "what": param.doc, "takes": param.takes}


KINDS: dict[str, Callable[[], Iterable[Entry]]] = {
    "payloads": _payloads,
    "operations": _operations,
    "events": _events,
    "scenarios": _scenarios,
    "switches": _switches,
    "params": _params,
    "profiles": _profiles,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("kind", nargs="?", choices=tuple(KINDS), help="default: all of them")
    parser.add_argument("glob", nargs="?", default="*", help="only names that match, e.g. 'kvm:*'")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """List."""
    for kind in [args.kind] if args.kind else KINDS:
        entries = [e for e in KINDS[kind]() if _matches(str(e["name"]), args.glob)]
        if args.json:
            for entry in entries:
                print_json({"kind": kind, **entry})
            continue
        if not args.kind:
            print(f"{kind}:")
        if args.kind == "operations":
            _print_operations(entries)
        elif args.kind == "switches":
            _print_switches(entries)
        elif args.kind == "profiles":
            _print_profiles(entries)
        else:
            _print_entries(entries, "  " if not args.kind else "")
        if not entries and args.kind:
            print(f"no {kind} match {args.glob!r}", file=sys.stderr)
    return 0


def _matches(name: str, glob: str) -> bool:
    """Whether the name, or what of it comes before its arguments or its value, matches."""
    return any(fnmatchcase(text, glob) for text in (name, re.split(r"[(=]", name, maxsplit=1)[0]))


def _print_operations(entries: list[Entry]) -> None:
    for entry in entries:
        print(entry["name"])
        print(wrapped(str(entry["what"]), indent=4))
        if entry["leaves"] in LEAVES:
            print(f"    {LEAVES[str(entry['leaves'])]}")
        events = entry["notifier_events"]
        if isinstance(events, list) and events:
            print(f"    notifier brackets: {', '.join(events)}")
        print(f"    {entry['example']}")


def _print_switches(entries: list[Entry]) -> None:
    for entry in entries:
        print(entry["name"])
        print(wrapped(str(entry["what"]), indent=4))
        print(f"    breaks {entry['truth']}, for example in:")
        print(f"    {entry['command']}")


def _print_profiles(entries: list[Entry]) -> None:
    for entry in entries:
        print(entry["name"])
        print(wrapped(str(entry["what"]), indent=4))


def _print_entries(entries: list[Entry], indent: str) -> None:
    width = min(40, max((len(str(entry["name"])) for entry in entries), default=0))
    for entry in entries:
        print(f"{indent}{entry['name']!s:<{width}}  {entry['what']}".rstrip())
