"""Print a trace, one line an event, as trace-cmd report does."""

from __future__ import annotations

import argparse
import sys

from refault.output import add_json_flag, print_json

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("trace", help="a trace file")
    parser.add_argument(
        "-F",
        dest="filters",
        action="append",
        default=[],
        metavar="FILTER",
        help="only events that a filter names and that it holds for: "
        "'kvm/kvm_exit : exit_reason == 48 && CPU == 0'; "
        "also !=, <, <=, >, >=, ~ (glob), &, ranges 0x200..0x2ff, || and parentheses; may be repeated",
    )
    parser.add_argument(
        "--event", action="append", default=[], metavar="GLOB", help="only events that match, e.g. 'kvmmmu:*'"
    )
    parser.add_argument("-t", dest="nanoseconds", action="store_true", help="times in nanoseconds")
    parser.add_argument("--ts-diff", action="store_true", help="show the time since the line before")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Print the trace."""
    from refault.registry import check_globs, find_tracepoint
    from trace_events.filters import compile_filter, compile_globs
    from trace_events.ndjson import read_trace
    from trace_events.text import TextReport

    holds = compile_filter(args.filters) if args.filters else None
    wanted = compile_globs(args.event) if args.event else None
    trace = read_trace(args.trace)
    check_globs(args.event, {event.event for event in trace.events})
    lines = TextReport(
        (event.task for event in trace.events),
        find_tracepoint,
        nanoseconds=args.nanoseconds,
        deltas=args.ts_diff,
    )
    if not args.json:
        print(f"cpus={1 + max((event.vcpu for event in trace.events), default=0)}")
    shown = 0
    for event in trace.events:
        if (wanted is None or wanted(event.event)) and (holds is None or holds(event)):
            shown += 1
            if args.json:
                print_json(event)
            else:
                print(lines.line(event))
    if not shown:
        print(f"none of the {len(trace.events)} events of {args.trace} is wanted", file=sys.stderr)
    return 0
