"""A private trace instance: the kernel's `kvm` and `kvmmmu` events of this process, and marks between.

Source of truth: Documentation/trace/events.rst, Documentation/trace/ftrace.rst (instances).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path

__all__ = ["TRACEFS", "TraceInstance", "TraceLine"]

TRACEFS = Path("/sys/kernel/tracing")
SYSTEMS = ("kvm", "kvmmmu")
THREADS = ("ksmd", "khugepaged", "kcompactd", "kswapd")
"""The kernel's memory threads, whose notifier calls are about this process, too. A kdamond is watched only
where a scenario started it: the machine may have one of its own at work."""
BUFFER_KIB = 8192

_LINE = re.compile(r"\s*(.+)-(\d+)\s+\[\d+\] \S+\s+[\d.]+: (\w+): ?(.*)")
_LOST = "LOST"
_LONGEST_MARK = 900
_LONG_MARK = "long mark "

TraceLine = tuple[str, str]
"""(event, its text). The event of a mark is "mark"."""


_number = itertools.count()


def _sweep() -> None:
    """Remove what processes left behind that were killed."""
    for path in (TRACEFS / "instances").glob("refault-*"):
        owner = path.name.split("-")[1]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                path.rmdir()


class TraceInstance:
    """`/sys/kernel/tracing/instances/refault-PID-N`, off until `on()`. OSError where it cannot be made."""

    def __init__(self) -> None:
        _sweep()
        self.pid = os.getpid()
        self.path = TRACEFS / "instances" / f"refault-{self.pid}-{next(_number)}"
        self._marker = -1
        self._long_marks: list[str] = []
        self.path.mkdir()
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self._write("tracing_on", "0")
        self._write("buffer_size_kb", str(BUFFER_KIB))
        self._pids = [self.pid]
        self._threads = list(THREADS)
        self._filter()
        for system in SYSTEMS:
            self._write(f"events/{system}/enable", "1")
        self._marker = os.open(self.path / "trace_marker", os.O_WRONLY)

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def _filter(self) -> None:
        mine = [f"common_pid == {pid}" for pid in self._pids]
        mine += [f'comm ~ "{name}*"' for name in self._threads]
        for system in SYSTEMS:
            self._write(f"events/{system}/filter", " || ".join(mine))

    def watch(self, tid: int) -> None:
        """Another thread of this process."""
        self._pids.append(tid)
        self._filter()

    def watch_kernel_thread(self, name: str) -> None:
        """Threads of the kernel whose names begin so."""
        self._threads.append(name)
        self._filter()

    def on(self) -> None:
        """Begin, or begin again: what was before is forgotten."""
        self._write("trace", "")
        self._write("tracing_on", "1")

    def pause(self, paused: bool) -> None:
        """What happens while it is paused is no part of the sequence."""
        self._write("tracing_on", "0" if paused else "1")

    def off(self) -> None:
        """Stop; what was recorded stays."""
        self._write("tracing_on", "0")

    def mark(self, text: str) -> None:
        """Put a line among the events; of a long one, which the buffer would cut off, its number."""
        if len(text) > _LONGEST_MARK:
            self._long_marks.append(text)
            text = f"{_LONG_MARK}{len(self._long_marks) - 1}"
        os.write(self._marker, text.encode())

    def lines(self) -> list[TraceLine]:
        """What was recorded, oldest first. OSError if events were lost."""
        found: list[TraceLine] = []
        for raw in (self.path / "trace").read_text().splitlines():
            match = _LINE.match(raw)
            if match is None:
                if _LOST in raw:
                    raise OSError(f"events were lost: {raw.strip()}")
                continue
            event = "mark" if match[3] == "tracing_mark_write" else match[3]
            text = match[4]
            if event == "mark" and text.startswith(_LONG_MARK):
                text = self._long_marks[int(text.removeprefix(_LONG_MARK))]
            found.append((event, text))
        return found

    def close(self) -> None:
        """Stop and remove the instance."""
        if self._marker >= 0:
            os.close(self._marker)
            self._marker = -1
        # The kernel disables its events with it.
        self.path.rmdir()
