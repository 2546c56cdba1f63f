"""The trace file: one JSON object a line.

    {"format":"refault-trace","version":1,"machine":{...},"events":["*"]}     the header
    {"seq":0,"ts":1200,"event":"kvm:kvm_entry","task":"CPU 0/KVM",...}        one event a line
    {"end":"complete","events":1}                                             the end record

`machine` is the canonical machine configuration, `events` the globs that chose what was kept; there
are no dates, paths or arguments, so that two runs of one machine give the same bytes. A trace is
written to a temporary file beside its destination and renamed when it is closed: what bears the
name of a trace is whole. A run that was cut off by its user or by a broken truth ends with
`"end":"interrupted"`.

Events are written as they arrive. An ancestor that a filter kept late bears a smaller number than
its neighbours; `read_trace` returns events by number.

Not modelled: compression, and traces larger than memory (a reader holds all events).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from trace_events.event import Event

__all__ = ["FORMAT", "VERSION", "Trace", "TraceError", "TraceWriter", "read_trace", "write_trace"]

FORMAT = "refault-trace"
VERSION = 1


class TraceError(Exception):
    """A trace file that cannot be read or written; the text is one line that names the file."""

    exit_code = 2


class Trace(msgspec.Struct):
    """A trace in memory: header, events by number, and how the run ended."""

    header: dict[str, Any]
    events: list[Event]
    end: str = "complete"
    path: str = ""

    @property
    def machine(self) -> dict[str, Any]:
        """The canonical machine configuration that made this trace."""
        machine: dict[str, Any] = self.header.get("machine", {})
        return machine

    @property
    def globs(self) -> tuple[str, ...]:
        """Which events the trace was asked to keep."""
        return tuple(self.header.get("events", ("*",)))


class _End(msgspec.Struct, forbid_unknown_fields=True):
    end: str
    events: int


def encode_header(machine: dict[str, Any], globs: Iterable[str] = ("*",)) -> bytes:
    """The header line, without its newline. Keys of `machine` are sorted at every depth."""
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION, "machine": machine, "events": list(globs)}
    head["machine"] = msgspec.Raw(msgspec.json.encode(machine, order="sorted"))
    return msgspec.json.encode(head)


class TraceWriter:
    """Writes one trace. `write` is a sink for a `Listener`; leaving a `with` block closes.

    Opening fails at once with a TraceError where the destination cannot be written, so that a long
    run does not find out at its end.
    """

    def __init__(
        self, path: str | os.PathLike[str], machine: dict[str, Any], globs: Iterable[str] = ("*",)
    ) -> None:
        self.path = Path(path)
        self.count = 0
        if self.path.is_dir():
            raise TraceError(f"cannot write trace {self.path}: it is a directory")
        # A device or a pipe takes the bytes as they come; a rename would put a file in its place.
        self._in_place = self.path.exists() and not self.path.is_file()
        # The file that a link names, so that the link stays one.
        self._target = self.path.resolve()
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.part")
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            destination = self.path if self._in_place else self._temporary
            self._file = open(destination, "wb", buffering=1 << 20)  # noqa: SIM115
        except OSError as exc:
            raise TraceError(f"cannot write trace {self.path}: {exc.strerror}") from exc
        self._encode_into = msgspec.json.Encoder().encode_into
        self._buffer = bytearray()
        self._emit(encode_header(machine, globs) + b"\n")

    def write(self, event: Event) -> None:
        """Append one event."""
        buffer = self._buffer
        self._encode_into(event, buffer)
        buffer += b"\n"
        self.count += 1
        self._emit(buffer)

    def close(self, end: str = "complete") -> None:
        """Write the end record and give the file its name. A second call does nothing."""
        if self._file.closed:
            return
        self._emit(msgspec.json.encode(_End(end, self.count)) + b"\n")
        try:
            self._file.close()
            if not self._in_place:
                os.replace(self._temporary, self._target)
        except OSError as exc:
            raise self._failed(exc) from exc

    def discard(self) -> None:
        """Give up: no trace is left behind."""
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _emit(self, data: bytes | bytearray) -> None:
        if self._file.closed:
            # It has failed and said so; what the run still fires while it unwinds is lost.
            return
        try:
            self._file.write(data)
        except OSError as exc:
            raise self._failed(exc) from exc

    def _failed(self, exc: OSError) -> TraceError:
        with suppress(OSError):
            self.discard()
        return TraceError(f"cannot write trace {self.path}: {exc.strerror}")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: object) -> None:
        self.close("complete" if kind is None else "interrupted")


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write `trace` to `path`, byte for byte as the run that made it would."""
    with TraceWriter(path, trace.machine, trace.globs) as writer:
        for event in trace.events:
            writer.write(event)
        writer.close(trace.end)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """The trace at `path`, or a TraceError that says in one line what is wrong with the file."""
    name = os.fspath(path)
    lines = _read_lines(name)
    header = _read_header(name, lines[0])
    decode_event = msgspec.json.Decoder(Event).decode
    events: list[Event] = []
    end: _End | None = None
    for number, line in enumerate(lines[1:], start=2):
        if end is not None:
            raise TraceError(f"{name}: line {number}: something follows the end record")
        try:
            event = decode_event(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            end = _read_end(line)
            if end is None:
                if number == len(lines):
                    raise TraceError(_cut(name, len(events))) from exc
                raise TraceError(f"{name}: line {number} is not an event: {_why(exc)}") from exc
            continue
        if any(link is not None and link >= event.seq for link in (event.cause, event.killed_by)):
            # Causes come first: with this checked, no reader can run in a circle.
            raise TraceError(f"{name}: line {number}: event {event.seq} names a later event as its cause")
        events.append(event)
    if end is None:
        raise TraceError(_cut(name, len(events)))
    if end.events != len(events):
        raise TraceError(f"{name}: the end record counts {end.events} events, the file holds {len(events)}")
    events.sort(key=lambda event: event.seq)
    for one, other in pairwise(events):
        if one.seq == other.seq:
            raise TraceError(f"{name}: event {one.seq} is there twice")
    return Trace(header, events, end.end, name)


def _read_lines(name: str) -> list[bytes]:
    try:
        with open(name, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise TraceError(f"{name}: no such trace file") from None
    except IsADirectoryError:
        raise TraceError(f"{name}: is a directory, not a trace file") from None
    except OSError as exc:
        raise TraceError(f"{name}: cannot be read: {exc.strerror}") from exc
    if not data:
        raise TraceError(f"{name}: the file is empty")
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _read_header(name: str, line: bytes) -> dict[str, Any]:
    try:
        header = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f'{name}: not a refault trace (line 1 is no header with "format":"{FORMAT}")')
    if header.get("version") != VERSION:
        raise TraceError(
            f"{name}: trace format version {header.get('version')}, this refault reads version {VERSION}"
        )
    globs = header.get("events")
    if not isinstance(header.get("machine"), dict) or not isinstance(globs, list):
        raise TraceError(f"{name}: line 1: the header has no machine configuration or no event globs")
    return header


def _read_end(line: bytes) -> _End | None:
    try:
        return msgspec.json.decode(line, type=_End)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _cut(name: str, events: int) -> str:
    return f"{name}: the trace is cut off after {events} events (no end record)"


def _why(exc: Exception) -> str:
    text = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    return text[:120]
