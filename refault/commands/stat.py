"""VM exits of a trace, how often and how long, in the table of perf kvm stat report.

With --kvm a payload is run instead, and KVM's own statistics are printed under the kernel's names."""

from __future__ import annotations

import argparse

from refault.output import add_json_flag, print_json

__all__ = ["configure", "main"]

_KINDS = ("vmexit", "mmio", "ioport", "msr")
_KEYS = ("sample", "percent_sample", "time", "percent_time", "max_t", "min_t", "mean_t")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from refault.commands.run import configure_machine, word

    parser.add_argument("trace", help="a trace file; with --kvm a payload (refault list payloads) or a file")
    parser.add_argument(
        "words", nargs="*", default=[], type=word, metavar="NAME=VALUE",
        help="with --kvm: parameters of the payload",
    )
    parser.add_argument("--kvm", action="store_true", help="run a payload and print KVM's own statistics")
    parser.add_argument("--event", choices=_KINDS, default="vmexit", help="what to count (default: vmexit)")
    parser.add_argument("--vcpu", type=int, default=None, metavar="N", help="only this vCPU")
    parser.add_argument("-k", "--key", choices=_KEYS, default="sample", help="sort by this (default: sample)")
    add_json_flag(parser)
    configure_machine(parser.add_argument_group("the machine, with --kvm"))


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    from refault.errors import UsageError
    from refault.exitstat import collect, format_table
    from trace_events.ndjson import read_trace

    if args.kvm:
        return _kvm(args)
    if args.words:
        raise UsageError(f"{args.words[0]} is a parameter of a payload; give --kvm to run one")
    stat = collect(read_trace(args.trace).events, kind=args.event, vcpu=args.vcpu, key=args.key)
    if not args.json:
        print(format_table(stat))
        return 0
    for row in stat.rows:
        print_json(
            {
                "event": row.name,
                "samples": row.samples,
                "time_ns": row.time,
                "min_ns": row.min,
                "max_ns": row.max,
                "mean_ns": row.mean,
                "rel_stddev_percent": row.rel_stddev,
            }
        )
    return 0


def _kvm(args: argparse.Namespace) -> int:
    """Run the payload; the guest's serial port goes to stderr. Its exit code is the run's."""
    from refault.commands.run import machine_options
    from refault.errors import UsageError
    from refault.kvmstat import KvmStat, format_kvm
    from refault.options import RunOptions
    from refault.runner import run

    if args.vcpu is not None and not 0 <= args.vcpu < args.vcpus:
        raise UsageError(f"--vcpu {args.vcpu}: the machine has {args.vcpus}")
    found: list[KvmStat] = []
    options = RunOptions(
        payload=args.trace, words=tuple(args.words), **machine_options(args), quiet=True, kvm_stat=found
    )
    code: int = run(options)
    for stat in found:
        shown = stat if args.vcpu is None else KvmStat(stat.vm, [stat.vcpus[args.vcpu]])
        if args.json:
            print_json({"vm": shown.vm, "vcpus": shown.vcpus})
        else:
            print(format_kvm(shown))
    return code
