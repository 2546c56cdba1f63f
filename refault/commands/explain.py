"""Why event N of a trace happened, back to the host operation, and what came of it; with --gfn or
--gpa the story of one guest page, without either the most refaulted pages; with --refaults all of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from refault.output import add_json_flag, print_json, wrapped

if TYPE_CHECKING:
    from refault.analysis import Analysis

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from refault.numbers import number

    parser.add_argument("trace", help="a trace file")
    parser.add_argument(
        "event", nargs="?", type=number, metavar="N", help="the event's number (seq, as in --json output)"
    )
    parser.add_argument("--gfn", type=number, help="the story of this guest frame number")
    parser.add_argument("--gpa", type=number, help="the story of the page at this guest physical address")
    parser.add_argument(
        "--refaults", action="store_true",
        help="every refault: who took the mapping, the SPTE before and after, GUP's answer, retries",
    )
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Explain."""
    from refault.analysis import Analysis
    from trace_events.ndjson import read_trace

    trace = read_trace(args.trace)
    analysis = Analysis(trace.events)
    if args.refaults:
        return _refaults(analysis, args)
    if args.event is not None:
        return _explain_event(analysis, args)
    gfn = args.gpa >> 12 if args.gpa is not None else args.gfn
    if gfn is not None:
        return _tell_story(analysis, gfn, args.json)
    return _overview(analysis, args)


def _explain_event(analysis: Analysis, args: argparse.Namespace) -> int:
    from refault.errors import UsageError
    from refault.registry import find_tracepoint
    from refault.story import explain

    event = analysis.by_seq.get(args.event)
    if event is None:
        numbers = list(analysis.by_seq)
        span = (
            f"it holds {len(numbers)} events, numbers {numbers[0]} to {numbers[-1]}"
            if numbers
            else "it is empty"
        )
        raise UsageError(f"{args.trace}: no event {args.event}; {span}")
    if args.json:
        killer = analysis.killer(event)
        print_json(
            {
                "event": event,
                "causes": analysis.chain(event)[:-1],
                "killed_by": killer,
                "killer_causes": analysis.chain(killer)[:-1] if killer else [],
                "answers": analysis.answers(event.seq),
                "below": list(analysis.descendants(event.seq)),
            }
        )
        return 0
    head, text, blank, prose, *rest = explain(analysis, event, find_tracepoint)
    print("\n".join([head, text, blank, wrapped(prose), *rest]))
    return 0


def _refaults(analysis: Analysis, args: argparse.Namespace) -> int:
    """One JSON object a refault, or two lines."""
    from refault.refaults import tell_all

    gfn = args.gpa >> 12 if args.gpa is not None else args.gfn
    for told in tell_all(analysis):
        if gfn is not None and told.gfn != gfn:
            continue
        if args.json:
            print_json(told)
        else:
            print("\n".join(told.lines()))
    return 0


def _tell_story(analysis: Analysis, gfn: int, as_json: bool) -> int:
    from refault.story import story

    lines = story(analysis, gfn)
    if as_json:
        print_json({"gfn": gfn, "story": lines})
    else:
        print("\n".join(lines))
    return 0


def _overview(analysis: Analysis, args: argparse.Namespace) -> int:
    from refault.story import duration

    refaults, reasons, top = analysis.refaults(), analysis.reasons(), analysis.most_refaulted()
    if args.json:
        print_json(
            {
                "events": len(analysis.events),
                "refaults": len(refaults),
                "reasons": reasons,
                "most_refaulted": top,
            }
        )
        return 0
    unanswered = len(analysis.unanswered())
    print(f"{len(analysis.events)} events, {len(refaults)} refaults, {unanswered} zaps not answered")
    if reasons:
        print("\nrefaults by who took the mapping away:")
        for reason, count in reasons.items():
            print(f"  {count:>8}  {reason}")
        print("\nguest pages that refaulted most:")
        for gfn, count in top:
            print(f"  {count:>8}  gfn {gfn:#x}")
        gfn = top[0][0]
        first = next(refault for refault in refaults if refault.gfn == gfn)
        print(f"\n{gfn:#x} first refaulted {duration(first.gap)} after the zap, event {first.fault.seq}:")
        print(f"  refault explain {args.trace} {first.fault.seq}")
        print(f"  refault explain {args.trace} --gfn {gfn:#x}")
    return 0
