"""Binding, numbering, causes and ancestors (trace_events/stream.py, tracepoint.py, event.py)."""

from __future__ import annotations

import pytest

from trace_events import stream as stream_module
from trace_events.event import Event
from trace_events.stream import Listener, TaskContext, TraceStream
from trace_events.tracepoint import Tracepoint

OUTER = Tracepoint("refault", "outer", ("n",), lambda n: f"n={n}", scope=True)
INNER = Tracepoint("refault", "inner", ("n",), lambda n: f"n={n}", scope=True)
LEAF = Tracepoint("kvm", "leaf", ("a", "b"), lambda a, b: f"{a:#x} -- {b:#x}")
ALL = (OUTER, INNER, LEAF)


def listen(stream: TraceStream, *globs: str, ancestors: bool = True) -> list[Event]:
    got: list[Event] = []
    stream.listen(Listener(globs, got.append, ancestors=ancestors))
    return got


def test_a_tracepoint_is_none_while_nobody_listens() -> None:
    stream = TraceStream()
    trace = stream.bind(ALL)
    assert trace.leaf is None
    listener = Listener(("kvm:*",), lambda event: None)
    stream.listen(listener)
    assert trace.leaf is not None
    stream.unlisten(listener)
    assert trace.leaf is None
    assert not stream.active


def test_a_binding_made_while_somebody_listens_is_live() -> None:
    stream = TraceStream()
    got = listen(stream, "*")
    stream.bind(ALL).leaf(1, 2)
    assert [event.event for event in got] == ["kvm:leaf"]


def test_a_misspelt_tracepoint_is_an_error_and_not_silence() -> None:
    trace = TraceStream().bind(ALL)
    with pytest.raises(AttributeError, match="leef"):
        _ = trace.leef


def test_an_event_says_when_who_and_why() -> None:
    stream = TraceStream(now=lambda: 77)
    stream.ctx = TaskContext("vcpu3", 3, cause=None)
    got = listen(stream, "*")
    trace = stream.bind(ALL)
    stream.ctx.cause = trace.outer(5)
    trace.leaf(1, 2, killed_by=9)
    assert got[1] == Event(1, 77, "kvm:leaf", "vcpu3", 3, 0, 9, {"a": 1, "b": 2})
    assert (got[1].system, got[1].name) == ("kvm", "leaf")
    assert LEAF.format(tuple(got[1].args.values())) == "0x1 -- 0x2"


def test_a_wrong_number_of_fields_is_an_error() -> None:
    stream = TraceStream()
    listen(stream, "*")
    with pytest.raises(ValueError, match="argument"):
        stream.bind(ALL).leaf(1)


def test_numbers_do_not_depend_on_the_filter() -> None:
    def numbers(*globs: str) -> list[int]:
        stream = TraceStream()
        got = listen(stream, *globs)
        trace = stream.bind(ALL)
        for n in range(3):
            trace.outer(n)
            trace.leaf(n, n)
        return [event.seq for event in got if event.event == "kvm:leaf"]

    assert numbers("*") == numbers("kvm:*") == [1, 3, 5]


def test_a_filtered_listener_gets_each_ancestor_once_before_the_first_descendant() -> None:
    stream = TraceStream()
    got = listen(stream, "kvm:*")
    trace = stream.bind(ALL)
    stream.ctx.cause = trace.outer(0)
    stream.ctx.cause = trace.inner(1)
    trace.leaf(2, 2)
    trace.leaf(3, 3)
    assert [event.seq for event in got] == [0, 1, 2, 3]


def test_killed_by_is_an_ancestor_too() -> None:
    stream = TraceStream()
    got = listen(stream, "kvm:*")
    trace = stream.bind(ALL)
    zap = trace.inner(0)
    trace.outer(1)
    trace.leaf(2, 2, killed_by=zap)
    assert [event.event for event in got] == ["refault:inner", "kvm:leaf"]


def test_who_wants_no_ancestors_gets_none() -> None:
    stream = TraceStream()
    got = listen(stream, "kvm:*", ancestors=False)
    trace = stream.bind(ALL)
    stream.ctx.cause = trace.outer(0)
    trace.leaf(1, 1)
    assert [event.seq for event in got] == [1]


def test_two_listeners_hear_what_each_asked_for() -> None:
    stream = TraceStream()
    kvm, ours = listen(stream, "kvm:*"), listen(stream, "refault:outer")
    trace = stream.bind(ALL)
    trace.outer(0)
    trace.leaf(1, 1)
    assert [event.seq for event in kvm] == [1]
    assert [event.seq for event in ours] == [0]


def test_old_scopes_are_forgotten_and_new_ones_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "SCOPES_KEPT", 4)
    stream = TraceStream()
    listen(stream, "kvm:*")
    trace = stream.bind(ALL)
    for n in range(20):
        trace.outer(n)
    assert stream.ancestor(0) is None
    assert stream.ancestor(None) is None
    newest = stream.ancestor(19)
    assert newest is not None
    assert newest.args == {"n": 19}


def test_tracepoints_are_listed_once_and_in_order() -> None:
    stream = TraceStream()
    stream.bind(ALL)
    stream.bind((LEAF,))
    assert [tp.full_name for tp in stream.tracepoints()] == ["kvm:leaf", "refault:inner", "refault:outer"]
