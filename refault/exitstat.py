"""The table of `perf kvm stat report`, from a trace of ours.

    VM-EXIT    Samples  Samples%     Time%    Min Time    Max Time         Avg time

Source of truth: tools/perf/builtin-kvm.c: print_result, handle_begin_event, handle_end_event;
tools/perf/arch/x86/util/kvm-stat.c (which events begin and end a sample, and its name);
tools/perf/util/stat.c: update_stats, stddev_stats; Linux 6.18. Time is the machine's logical time.

Not modelled: `--duration`, live mode, and perf's child events (none exist on x86).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from kvm_model.vmx.exits import EXIT_REASON_NAMES
from trace_events.event import Event

__all__ = ["KEYS", "KINDS", "ExitStat", "Row", "collect", "format_table"]

_NAME_WIDTH = 40
_MMIO_READ, _MMIO_WRITE = 1, 2


class Row(msgspec.Struct):
    """The samples of one name."""

    name: str
    samples: int = 0
    time: int = 0
    min: int = 0
    max: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, ns: int) -> None:
        """Welford's step, as perf does it."""
        self.samples += 1
        delta = ns - self.mean
        self.mean += delta / self.samples
        self.m2 += delta * (ns - self.mean)
        self.time += ns
        self.max = max(self.max, ns)
        self.min = ns if self.samples == 1 else min(self.min, ns)

    @property
    def rel_stddev(self) -> float:
        """The standard deviation of the mean, in percent of the mean."""
        if self.samples < 2 or not self.mean:
            return 0.0
        return 100.0 * math.sqrt(self.m2 / (self.samples - 1) / self.samples) / self.mean


class ExitStat(msgspec.Struct):
    """All rows of one kind of event."""

    kind: str
    rows: list[Row]
    vcpu: int | None = None

    @property
    def samples(self) -> int:
        """Samples in all rows."""
        return sum(row.samples for row in self.rows)

    @property
    def time(self) -> int:
        """Nanoseconds in all rows."""
        return sum(row.time for row in self.rows)


KEYS: dict[str, Callable[[Row], float]] = {
    "sample": lambda row: row.samples,
    "percent_sample": lambda row: row.samples,
    "time": lambda row: row.time,
    "percent_time": lambda row: row.time,
    "max_t": lambda row: row.max,
    "min_t": lambda row: row.min,
    "mean_t": lambda row: row.mean,
}


class _Kind(msgspec.Struct):
    """When a sample begins, when it ends, and what it is called. `begin` may give "" for a start
    whose name is known only at the end; `end` gives None for an event that ends nothing."""

    title: str
    begin: Callable[[Event], str | None]
    end: Callable[[Event], str | None]


def _exit_begin(event: Event) -> str | None:
    if event.event != "kvm:kvm_exit":
        return None
    reason: Any = event.args.get("exit_reason")
    if isinstance(reason, int):
        return EXIT_REASON_NAMES.get(reason & 0xFFFF, f"UNKNOWN({reason})")
    return str(reason)


def _entry_end(event: Event) -> str | None:
    return "" if event.event == "kvm:kvm_entry" else None


def _mmio_name(event: Event) -> str:
    return f"{event.args['gpa']:#x}:{'W' if event.args['type'] == _MMIO_WRITE else 'R'}"


def _mmio_begin(event: Event) -> str | None:
    if event.event == "kvm:kvm_exit":
        return ""
    if event.event == "kvm:kvm_mmio" and event.args.get("type") == _MMIO_WRITE:
        return _mmio_name(event)
    return None


def _mmio_end(event: Event) -> str | None:
    if event.event == "kvm:kvm_mmio" and event.args.get("type") == _MMIO_READ:
        return _mmio_name(event)
    return _entry_end(event)


def _ioport_begin(event: Event) -> str | None:
    if event.event != "kvm:kvm_pio":
        return None
    return f"{event.args['port']:#x}:{'POUT' if event.args['rw'] else 'PIN'}"


def _msr_begin(event: Event) -> str | None:
    if event.event != "kvm:kvm_msr":
        return None
    return f"{event.args['ecx']:#x}:{'W' if event.args['write'] else 'R'}"


KINDS: dict[str, _Kind] = {
    "vmexit": _Kind("VM-EXIT", _exit_begin, _entry_end),
    "mmio": _Kind("MMIO Access", _mmio_begin, _mmio_end),
    "ioport": _Kind("IO Port Access", _ioport_begin, _entry_end),
    "msr": _Kind("MSR Access", _msr_begin, _entry_end),
}


def collect(
    events: Iterable[Event], *, kind: str = "vmexit", vcpu: int | None = None, key: str = "sample"
) -> ExitStat:
    """The samples of `events`, sorted by `key`, largest first. A sample without an end is left out."""
    rules = KINDS[kind]
    rows: dict[str, Row] = {}
    started: dict[str, tuple[str, int]] = {}
    for event in events:
        if vcpu is not None and event.vcpu != vcpu:
            continue
        name = rules.begin(event)
        if name is not None:
            started[event.task] = (name, event.ts)
            continue
        ended = rules.end(event)
        if ended is None or event.task not in started:
            continue
        name, since = started.pop(event.task)
        if name or ended:
            rows.setdefault(name or ended, Row(name or ended)).add(event.ts - since)
    ordered = sorted(rows.values(), key=lambda row: (-KEYS[key](row), row.name))
    return ExitStat(kind, ordered, vcpu)


def format_table(stat: ExitStat) -> str:
    """perf's table, blank lines included."""
    who = "all VCPUs" if stat.vcpu is None else f"VCPU {stat.vcpu}"
    lines = [
        "",
        "",
        f"Analyze events for all VMs, {who}:",
        "",
        f"{KINDS[stat.kind].title:>{_NAME_WIDTH}} {'Samples':>10} {'Samples%':>9} {'Time%':>9} "
        f"{'Min Time':>11} {'Max Time':>11} {'Avg time':>16} ",
        "",
    ]
    samples, time = stat.samples, stat.time
    for row in stat.rows:
        lines.append(
            f"{row.name:>{_NAME_WIDTH}} {row.samples:>10} {row.samples / samples * 100:8.2f}% "
            f"{row.time / time * 100 if time else 0.0:8.2f}% {row.min / 1000:9.2f}us {row.max / 1000:9.2f}us "
            f"{row.time / row.samples / 1000:9.2f}us ( +-{row.rel_stddev:7.2f}% )"
        )
    lines += ["", f"Total Samples:{samples}, Total events handled time:{time / 1000:.2f}us.", "", ""]
    return "\n".join(lines)
