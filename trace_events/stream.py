"""The event stream of one machine: binding, numbering, causes, listeners.

A model holds a `Binding` whose attributes are the tracepoints by name. While nobody listens each
is None, so that the price of tracing is one attribute test:

    if (t := self.trace.kvm_exit) is not None:
        t(vcpu_id, reason, ...)

An emitter returns the event's sequence number, which is what causes are made of:

    ctx = stream.ctx
    saved = ctx.cause
    if (t := self.trace.mn_range_start) is not None:
        ctx.cause = t(...)
    ...
    ctx.cause = saved

When anybody listens to anything, every event is built and numbered, so that the numbers do not
depend on the filter; a listener sees what its globs match, preceded by those ancestors (causes and
`killed_by`) it has not seen yet. Such an ancestor arrives late, with its own smaller number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from trace_events.event import Event
from trace_events.filters import compile_globs
from trace_events.tracepoint import Tracepoint

__all__ = ["SCOPES_KEPT", "Binding", "Listener", "TaskContext", "TraceStream"]

SCOPES_KEPT = 1 << 17
"""How many of the newest scope events can still be named as late ancestors."""


class TaskContext:
    """Who is running: the task's name, its vCPU number (-1: none) and the event that caused this."""

    __slots__ = ("cause", "name", "vcpu")

    def __init__(self, name: str, vcpu: int = -1, cause: int | None = None) -> None:
        self.name = name
        self.vcpu = vcpu
        self.cause = cause


class Binding:
    """Tracepoints as attributes: None while nobody listens, else the emitter."""

    def __init__(self, tracepoints: Iterable[Tracepoint], absent: frozenset[str] = frozenset()) -> None:
        every = tuple(tracepoints)
        for tp in every:
            setattr(self, tp.name, None)
        self._tracepoints = tuple(tp for tp in every if tp.full_name not in absent)

    def __getattr__(self, name: str) -> Any:
        # Reached only for a name that was never bound: a misspelt event must not pass as silence.
        raise AttributeError(f"no tracepoint named {name!r} is bound here")


class Listener:
    """One consumer of events. `sink` is called with each event its globs match and its ancestors.

    With `ancestors=False` only matching events arrive.
    """

    def __init__(
        self, globs: Iterable[str], sink: Callable[[Event], None], *, ancestors: bool = True
    ) -> None:
        self.globs = tuple(globs)
        self.match = compile_globs(self.globs)
        self.sink = sink
        # A listener that takes everything has had the ancestors already, and may listen for hours.
        takes_all = any(part.strip() in ("*", "*:*") for glob in self.globs for part in glob.split(","))
        self.ancestors = ancestors and not takes_all
        self.seen: set[int] = set()


class TraceStream:
    """Numbers events and hands them to listeners. One per machine."""

    def __init__(self, now: Callable[[], int] = lambda: 0) -> None:
        self.now = now
        self.seq = 0
        self.ctx = TaskContext("main")
        self._bindings: list[Binding] = []
        self._listeners: list[Listener] = []
        self._scopes: dict[int, Event] = {}
        self._last: Event | None = None
        self._wanted: dict[str, list[Listener]] = {}

    def bind(self, tracepoints: Iterable[Tracepoint], absent: frozenset[str] = frozenset()) -> Binding:
        """A new binding of these tracepoints, live at once if anybody listens; `absent` ones never."""
        binding = Binding(tracepoints, absent)
        self._bindings.append(binding)
        self._rebind(binding)
        return binding

    def tracepoints(self) -> list[Tracepoint]:
        """Every bound tracepoint once, sorted by full name."""
        found = {tp.full_name: tp for b in self._bindings for tp in b._tracepoints}
        return [found[name] for name in sorted(found)]

    def listen(self, listener: Listener) -> None:
        """Start delivering to `listener`."""
        self._listeners.append(listener)
        self._rebind_all()

    def unlisten(self, listener: Listener) -> None:
        """Stop delivering to `listener`; unknown listeners are ignored."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self._rebind_all()

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def ancestor(self, seq: int | None) -> Event | None:
        """The scope event numbered `seq`, if it was fired while somebody listened and not long ago."""
        return None if seq is None else self._scopes.get(seq)

    def here(self) -> int | None:
        """The event to blame for what is found now: the enclosing scope, else the last one built."""
        if self.ctx.cause is not None:
            return self.ctx.cause
        return None if self._last is None else self._last.seq

    def told(self, seq: int | None) -> str:
        """Name and text of event `seq`, if it is the last one built or a scope of late; else nothing."""
        event = self.ancestor(seq)
        if event is None and self._last is not None and self._last.seq == seq:
            event = self._last
        if event is None:
            return ""
        fmt = next(tp.fmt for tp in self.tracepoints() if tp.full_name == event.event)
        return f"{event.event} {fmt(*event.args.values())}"

    def _rebind_all(self) -> None:
        self._wanted.clear()
        for binding in self._bindings:
            self._rebind(binding)

    def _rebind(self, binding: Binding) -> None:
        for tp in binding._tracepoints:
            self._wanted[tp.full_name] = [x for x in self._listeners if x.match(tp.full_name)]
            setattr(binding, tp.name, self._emitter(tp) if self._listeners else None)

    def _emitter(self, tp: Tracepoint) -> Callable[..., int]:
        fields, full_name, scope = tp.fields, tp.full_name, tp.scope
        wanted = self._wanted[full_name]
        scopes = self._scopes

        def number(*args: Any, killed_by: int | None = None) -> int:
            seq = self.seq
            self.seq = seq + 1
            return seq

        def emit(*args: Any, killed_by: int | None = None) -> int:
            seq = self.seq
            self.seq = seq + 1
            ctx = self.ctx
            event = Event(
                seq, self.now(), full_name, ctx.name, ctx.vcpu, ctx.cause, killed_by,
                dict(zip(fields, args, strict=True)),
            )
            self._last = event
            if scope:
                scopes[seq] = event
                if len(scopes) > 2 * SCOPES_KEPT:
                    self._forget_old_scopes()
            for listener in wanted:
                self._deliver(listener, event)
            return seq

        return emit if wanted or scope else number

    def _forget_old_scopes(self) -> None:
        for seq in list(self._scopes)[:SCOPES_KEPT]:
            del self._scopes[seq]
        for listener in self._listeners:
            listener.seen.intersection_update(self._scopes)

    def _deliver(self, listener: Listener, event: Event) -> None:
        if listener.ancestors:
            self._deliver_ancestors(listener, event)
        listener.sink(event)

    def _deliver_ancestors(self, listener: Listener, event: Event) -> None:
        seen = listener.seen
        if event.seq in self._scopes:
            seen.add(event.seq)
        late: list[Event] = []
        todo = [event.cause, event.killed_by]
        while todo:
            seq = todo.pop()
            if seq is None or seq in seen:
                continue
            seen.add(seq)
            parent = self._scopes.get(seq)
            if parent is not None:
                late.append(parent)
                todo += [parent.cause, parent.killed_by]
        for parent in sorted(late, key=lambda e: e.seq):
            listener.sink(parent)
