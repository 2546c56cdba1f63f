"""VM exits of a trace, how often and how long, in the table of perf kvm stat report."""

from __future__ import annotations

import argparse

from refault.output import add_json_flag, print_json

__all__ = ["configure", "main"]

_KINDS = ("vmexit", "mmio", "ioport", "msr")
_KEYS = ("sample", "percent_sample", "time", "percent_time", "max_t", "min_t", "mean_t")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("trace", help="a trace file")
    parser.add_argument("--event", choices=_KINDS, default="vmexit", help="what to count (default: vmexit)")
    parser.add_argument("--vcpu", type=int, default=None, metavar="N", help="only this vCPU")
    parser.add_argument("-k", "--key", choices=_KEYS, default="sample", help="sort by this (default: sample)")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    from refault.exitstat import collect, format_table
    from trace_events.ndjson import read_trace

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
