"""Translate an address through both stages, entry by entry, at some point of a trace: the machine
of its header runs again up to that event."""

from __future__ import annotations

import argparse

from refault.output import add_json_flag, print_json

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from refault.numbers import number

    parser.add_argument("trace", help="a trace file")
    parser.add_argument("address", type=number, metavar="ADDR", help="a guest virtual address")
    parser.add_argument("--gpa", action="store_true", help="ADDR is guest physical: only the second stage")
    parser.add_argument(
        "--at", type=number, metavar="N", help="after event N (default: the end of the trace)"
    )
    parser.add_argument("--vcpu", type=number, default=0, metavar="N", help="whose registers (default: 0)")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Rerun and walk."""
    from refault.errors import UsageError
    from trace_events.ndjson import read_trace

    trace = read_trace(args.trace)
    if not trace.events:
        raise UsageError(f"{args.trace}: the trace holds no events to stop at")
    last = trace.events[-1].seq
    at = last if args.at is None else args.at
    if at > last:
        raise UsageError(f"{args.trace}: no event {at}; the last is {last}")
    if args.address >> 64:
        raise UsageError(f"{args.address:#x} is no address: it has more than 64 bits")
    vcpus = trace.machine.get("vcpus")
    if isinstance(vcpus, int) and args.vcpu >= vcpus:
        raise UsageError(f"{args.trace}: no vCPU {args.vcpu}; the machine has {vcpus}")
    # A wrong argument must not cost the import of the machine.
    from refault.machine import replay

    vm = replay(trace.header, until_event=at)
    try:
        where = {"gpa" if args.gpa else "gva": args.address}
        walk = vm.walk(vcpu=args.vcpu, **where)
        if args.json:
            print_json(walk)
        else:
            print(walk)
    finally:
        vm.abandon()
    return 0
