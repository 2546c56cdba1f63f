"""trace-cmd's report line.

           CPU 0/KVM-1001  [000] .....     0.000001: kvm_exit:             vcpu 0 reason EPT_VIOLATION ...
    |comm, 16 columns|pid  |cpu  |flags |seconds.us| |name, padded to 20| |the event's print format

Source of truth: trace-cmd, tracecmd/trace-read.c: trace_show_data, print_event_name; libtraceevent
prints the comm, pid and cpu by "%16s-%-5d [%03d] %s". A task's pid is not part of an event: tasks
are numbered in the order in which they first appear in a trace, from 1000.

Not modelled: irq, need-resched, softirq and preempt-count flags (the column is always `.....`), and
trace-cmd's habit of leaving out the point in times below one second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from trace_events.event import Event
from trace_events.tracepoint import Tracepoint

__all__ = ["FIRST_PID", "TextReport", "format_args"]

FIRST_PID = 1000


def format_args(event: Event, tracepoint: Tracepoint | None) -> str:
    """The event's text: its tracepoint's print format, or `name=value` pairs where it is unknown."""
    args = event.args
    if tracepoint is not None and tuple(args) == tracepoint.fields:
        return tracepoint.format(tuple(args.values()))
    return " ".join(f"{name}={_plain(value)}" for name, value in args.items())


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 9:
        return hex(value)
    return str(value)


class TextReport:
    """Lines of one trace. `find` gives the tracepoint of a full event name, or None.

    All tasks of a trace are named first, so that pids do not depend on which events are shown.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        find: Callable[[str], Tracepoint | None],
        *,
        nanoseconds: bool = False,
        deltas: bool = False,
    ) -> None:
        self.pids: dict[str, int] = {}
        for task in tasks:
            self.pids.setdefault(task, FIRST_PID + len(self.pids))
        self._find = find
        self._nanoseconds = nanoseconds
        self._deltas = deltas
        self._last: int | None = None

    def line(self, event: Event) -> str:
        """One report line, without its newline."""
        pid = self.pids.setdefault(event.task, FIRST_PID + len(self.pids))
        head = f"{event.task:>16}-{pid:<5d} [{max(event.vcpu, 0):03d}] ..... {self._time(event.ts)}:"
        if self._deltas:
            head += f" {self._delta(event.ts):<8}"
        name = event.name
        # A newline in an argument must not forge a second line.
        text = format_args(event, self._find(event.event)).replace("\n", " ").rstrip()
        return f"{head} {name}: {' ' * max(20 - len(name), 0)}{text}"

    def lines(self, events: Iterable[Event]) -> Iterator[str]:
        """The lines of `events`."""
        return map(self.line, events)

    def _time(self, ts: int) -> str:
        if self._nanoseconds:
            return f"{ts // 1_000_000_000:5d}.{ts % 1_000_000_000:09d}"
        us = (ts + 500) // 1000
        return f"{us // 1_000_000:5d}.{us % 1_000_000:06d}"

    def _delta(self, ts: int) -> str:
        unit = ts if self._nanoseconds else (ts + 500) // 1000
        last, self._last = self._last, unit
        return "" if last is None else f"(+{unit - last})"
