"""Run a guest: a payload by name, an ELF, multiboot or flat image, or assembler source (FILE.s).

The guest's serial port is stdout, the summary is stderr. Exit codes: 0 the guest passed, 1 it
reported FAIL, 3 it died or met a limit, 4 a truth of the model broke."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["configure", "configure_machine", "machine_options", "main", "word"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("payload", help="see refault list payloads, or a file")
    parser.add_argument(
        "words", nargs="*", default=[], type=word, metavar="NAME=VALUE",
        help="parameters of the payload, e.g. pages=512",
    )
    configure_machine(parser.add_argument_group("the machine"))
    _configure_watching(parser.add_argument_group("watching"))
    _configure_limits(parser.add_argument_group("limits"))


def configure_machine(machine: argparse._ArgumentGroup) -> None:
    """What the machine is; `machine_options` reads it."""
    from refault.numbers import number, size

    machine.add_argument(
        "--memory", type=size, default="64M", metavar="SIZE", help="guest memory (default: 64M)"
    )
    machine.add_argument(
        "--memory-backend", default="anon", metavar="KIND",
        help="what the guest's RAM is to the host: anon, memfd, hugetlb, file:PATH (default: anon)",
    )
    machine.add_argument(
        "--host-ram", type=size, metavar="SIZE", help="host memory (default: twice the guest's)"
    )
    machine.add_argument(
        "--swap", type=_swap, default="auto", metavar="SIZE|off",
        help="swap file (default: as large as the guest's memory)",
    )
    machine.add_argument("--vcpus", type=_count, default=1, metavar="N", help="default: 1")
    machine.add_argument(
        "--mmu", choices=("ept", "shadow"), default="ept",
        help="ept: a second stage; shadow: KVM shadows the guest's page tables (default: ept)",
    )
    machine.add_argument(
        "--profile", type=_profile, default="linux-6.18", metavar="KERNEL",
        help="whose behaviour (default: linux-6.18)",
    )
    machine.add_argument(
        "--param", type=_param, action="append", default=[], metavar="K=V",
        help="a module parameter; see refault list params; may be repeated",
    )
    machine.add_argument("--seed", type=number, default=1, help="all chance comes from it (default: 1)")
    machine.add_argument(
        "--break", dest="breaks", type=_switch, action="append", default=[], metavar="SWITCH",
        help="leave out one step of the protocol; see refault list switches; may be repeated",
    )
    machine.add_argument(
        "--host",
        dest="host_script",
        metavar="SCRIPT.py",
        help="a script of host operations to run beside the guest",
    )


def _configure_watching(watch: argparse._ArgumentGroup) -> None:
    watch.add_argument("--check", action="store_true", help="check the model's truths while running")
    watch.add_argument("--trace", metavar="FILE", help="write a trace")
    watch.add_argument(
        "--events",
        action="append",
        default=[],
        metavar="GLOB",
        help="what the trace keeps, e.g. 'kvm:*' (default: everything); may be repeated",
    )
    watch.add_argument(
        "--json",
        action="store_true",
        help="the summary as one JSON object on stdout; the serial port goes to stderr",
    )
    watch.add_argument("-q", "--quiet", action="store_true", help="no summary")


def _configure_limits(limits: argparse._ArgumentGroup) -> None:
    from refault.numbers import number

    limits.add_argument("--max-insns", type=number, metavar="N", help="stop after about N guest instructions")
    limits.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="stop after this much real time (default: 600)",
    )
    limits.add_argument(
        "--interpreted",
        action="store_true",
        help="walk page tables in Python instead of compiled code: slow, steppable",
    )


def word(text: str) -> str:
    """NAME=VALUE, a parameter of a payload."""
    if "=" not in text or text.startswith("=") or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return text


def _profile(text: str) -> str:
    from refault.registry import profiles

    if text not in profiles():
        raise argparse.ArgumentTypeError(f"no kernel {text!r}; there is {', '.join(profiles())}")
    return text


def _swap(text: str) -> int | str:
    from refault.numbers import size

    return text if text in ("off", "auto") else size(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 64")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _param(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return key, value


def _switch(text: str) -> str:
    from difflib import get_close_matches

    from refault.registry import switches

    known = switches()
    if text not in known:
        near = get_close_matches(text, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "see refault list switches"
        raise argparse.ArgumentTypeError(f"no protocol switch {text!r}; {hint}")
    return text


def machine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of RunOptions that `configure_machine` asked for."""
    return {
        "memory": args.memory,
        "memory_backend": args.memory_backend,
        "host_ram": args.host_ram if args.host_ram is not None else 2 * args.memory,
        "swap": {"off": None, "auto": args.memory}.get(args.swap, args.swap),
        "vcpus": args.vcpus,
        "mmu": args.mmu,
        "profile": args.profile,
        "params": dict(args.param),
        "seed": args.seed,
        "host_script": args.host_script,
        "breaks": frozenset(args.breaks),
    }


def main(args: argparse.Namespace) -> int:
    """Run it."""
    from refault.options import RunOptions
    from refault.runner import run

    code: int = run(
        RunOptions(
            payload=args.payload,
            words=tuple(args.words),
            **machine_options(args),
            events=tuple(args.events) or ("*",),
            trace=args.trace,
            check=args.check,
            json=args.json,
            quiet=args.quiet,
            max_insns=args.max_insns,
            timeout=args.timeout,
            interpreted=args.interpreted,
        )
    )
    return code
