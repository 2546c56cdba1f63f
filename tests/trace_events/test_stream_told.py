"""What a stream can say of the event that is to blame."""

from __future__ import annotations

from typing import Any

from host_mm.kernel.errors import BrokenTruth
from trace_events.stream import Listener, TraceStream
from trace_events.tracepoint import Tracepoint

SCOPE = Tracepoint("refault", "outer", ("a",), lambda a: f"a {a}", scope=True)
PLAIN = Tracepoint("refault", "inner", ("b",), lambda b: f"b {b}")


def machine() -> tuple[TraceStream, Any]:
    stream = TraceStream()
    return stream, stream.bind((SCOPE, PLAIN))


def test_nobody_is_to_blame_while_nobody_listens() -> None:
    stream, _ = machine()
    assert stream.here() is None
    assert stream.told(None) == stream.told(7) == ""


def test_the_enclosing_scope_is_to_blame_and_else_the_last_event() -> None:
    stream, trace = machine()
    stream.listen(Listener(("*",), lambda event: None))
    first = trace.outer(1)
    last = trace.inner(2)
    assert (stream.here(), stream.told(last)) == (last, "refault:inner b 2")
    stream.ctx.cause = first
    assert (stream.here(), stream.told(first)) == (first, "refault:outer a 1")
    trace.inner(3)
    assert stream.told(last) == ""


def test_a_broken_truth_names_its_event_and_the_first_of_several_counts() -> None:
    first, second = BrokenTruth("one", "what"), BrokenTruth("two", "what", 4)
    assert str(first) == "one: what"
    second.__context__ = first
    assert second.first() is first
    assert str(second) == "two: what (event 4)"
    second.event = "refault:inner b 2"
    assert str(second) == "two: what (event 4: refault:inner b 2)"
