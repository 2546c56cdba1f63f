"""Run the machine of a recorded trace again and compare every event. Exit code 1 if they differ."""

from __future__ import annotations

import argparse
import sys

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("golden", nargs="+", help="recorded traces")
    parser.add_argument(
        "--update",
        action="store_true",
        help="where a rerun differs, show how and write it over the recording",
    )


def main(args: argparse.Namespace) -> int:
    """Check all of them; a summary in the words of kvm-unit-tests."""
    failed = sum(not _check(path, args.update) for path in args.golden)
    print(
        f"SUMMARY: {len(args.golden)} tests" + (f", {failed} unexpected failures" if failed else ""),
        file=sys.stderr,
    )
    return int(failed > 0)


def _check(path: str, update: bool) -> bool:
    from refault.commands.diff import print_difference
    from refault.compare import first_difference
    from trace_events.ndjson import Trace, read_trace, write_trace
    from trace_events.stream import Listener

    golden = read_trace(path)
    # A file that is no trace must not cost the import of the machine.
    from refault.machine import replay

    again = Trace(golden.header, [], golden.end)
    # An interrupted recording is compared as far as it goes.
    last = golden.events[-1].seq if golden.end != "complete" and golden.events else None
    listener = Listener(golden.globs, again.events.append)
    vm = replay(golden.header, until_event=last, listener=listener)
    vm.board.host.stream.unlisten(listener)
    vm.abandon()
    again.events.sort(key=lambda event: event.seq)
    if last is not None:
        again.events = [event for event in again.events if event.seq <= last]
    difference = first_difference(golden.events, again.events)
    if difference is None:
        print(f"PASS: {path}: {len(golden.events)} events")
        return True
    print_difference(golden, again, difference, path, "the rerun", 5)
    print(f"run it again:\n  refault check {path}")
    if update:
        write_trace(path, again)
        print(f"UPDATED: {path}: {len(again.events)} events")
        return True
    print(f"FAIL: {path}: differs at event {difference.index} in {difference.field}")
    return False
