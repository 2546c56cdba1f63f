"""The first place where two traces part: both records, what came before, what caused them. Exit
code 1 if they differ."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from refault.output import add_json_flag, print_json

if TYPE_CHECKING:
    from refault.compare import Difference
    from trace_events.ndjson import Trace

__all__ = ["configure", "main", "print_difference"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from refault.numbers import number

    parser.add_argument("left", help="a trace file")
    parser.add_argument("right", help="another")
    parser.add_argument(
        "--ignore",
        default="",
        metavar="FIELD,...",
        help="fields that may differ: ts, seq, task, ... or an argument's name",
    )
    parser.add_argument(
        "--context",
        type=number,
        default=5,
        metavar="N",
        help="events to show before the difference (default: 5)",
    )
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Compare."""
    from refault.compare import first_difference, header_differences
    from trace_events.ndjson import read_trace

    left, right = read_trace(args.left), read_trace(args.right)
    ignore = {name.strip() for name in args.ignore.split(",") if name.strip()}
    settings = header_differences(left.machine, right.machine)
    if left.globs != right.globs:
        settings.append(f"events kept: {','.join(left.globs)} != {','.join(right.globs)}")
    difference = first_difference(left.events, right.events, ignore)
    if args.json:
        at = (
            None
            if difference is None
            else {name: getattr(difference, name) for name in ("index", "field", "left", "right")}
        )
        print_json({"settings": settings, "difference": at})
        return int(difference is not None)
    for line in settings:
        print(f"machines differ in {line}")
    if difference is None:
        print(f"the {len(left.events)} events are the same")
        return 0
    print_difference(left, right, difference, args.left, args.right, args.context)
    print("run it again:")
    print(f"  refault check {args.left}")
    record, name = (difference.left, args.left) if difference.left else (difference.right, args.right)
    if record is not None:
        print(f"  refault explain {name} {record.seq}")
    return 1


def print_difference(
    left: Trace, right: Trace, difference: Difference, left_name: str, right_name: str, context: int
) -> None:
    """Both records, the events before them, the causes of each."""
    from refault.analysis import Analysis
    from refault.registry import find_tracepoint
    from trace_events.text import TextReport

    index = difference.index
    tasks = [event.task for event in left.events]
    lines = TextReport(tasks, find_tracepoint, nanoseconds=True)
    lengths = f"{len(left.events)} and {len(right.events)}"
    print(f"the traces part at event {index} of {lengths}: {difference.field} differs")
    print(f"--- {left_name}")
    print(f"+++ {right_name}")
    for event in left.events[max(0, index - context) : index]:
        print(f"  #{event.seq:<7} {lines.line(event)}")
    for sign, record in (("-", difference.left), ("+", difference.right)):
        print(f"{sign} #{record.seq:<7} {lines.line(record)}" if record else f"{sign} (the trace has ended)")
    for name, trace, record in ((left_name, left, difference.left), (right_name, right, difference.right)):
        if record is None:
            continue
        analysis = Analysis(trace.events)
        killer = analysis.killer(record)
        chain = (analysis.chain(killer) if killer else []) + analysis.chain(record)
        if len(chain) > 1:
            print(f"in {name} it came about by")
        for link in chain if len(chain) > 1 else ():
            print(f"  #{link.seq:<7} {lines.line(link)}")
