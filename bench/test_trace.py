"""What tracing costs: unheard, heard, written, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_events.event import Event
from trace_events.filters import compile_filter
from trace_events.ndjson import Trace, TraceWriter, read_trace, write_trace
from trace_events.stream import Listener, TraceStream
from trace_events.tracepoint import Tracepoint

TP = Tracepoint("kvm", "kvm_page_fault", ("vcpu_id", "rip", "address", "code"), lambda *args: str(args))
COUNT = 2_000
MACHINE = {"seed": 1}


def _fire(binding: Any) -> None:
    for i in range(COUNT):
        if (t := binding.kvm_page_fault) is not None:
            t(0, 0x1000, i << 12, 2)


def test_event_nobody_wants(benchmark: Any) -> None:
    benchmark(_fire, TraceStream().bind((TP,)))


def test_event_kept(benchmark: Any) -> None:
    stream = TraceStream()
    binding = stream.bind((TP,))
    kept: list[Event] = []
    stream.listen(Listener(("*",), kept.append))
    benchmark(_fire, binding)


def test_event_written(benchmark: Any, tmp_path: Path) -> None:
    stream = TraceStream()
    binding = stream.bind((TP,))
    with TraceWriter(tmp_path / "t", MACHINE) as writer:
        stream.listen(Listener(("*",), writer.write))
        benchmark(_fire, binding)


def test_trace_read(benchmark: Any, tmp_path: Path) -> None:
    events = [Event(i, i, "kvm:kvm_page_fault", "vcpu0", 0, args={"address": i}) for i in range(COUNT)]
    write_trace(tmp_path / "t", Trace({"machine": MACHINE, "events": ["*"]}, events))
    benchmark(read_trace, tmp_path / "t")


def test_trace_filtered(benchmark: Any) -> None:
    events = [Event(i, i, "kvm:kvm_page_fault", "vcpu0", 0, args={"address": i}) for i in range(COUNT)]
    match = compile_filter(["kvm/kvm_page_fault : address >= 0x100 && CPU == 0"])
    benchmark(lambda: sum(map(match, events)))
