"""The table that `refault run` ends with, on stderr, or the same as one JSON object."""

from __future__ import annotations

import os
import sys
from typing import IO, Any

import msgspec

from refault.story import duration

__all__ = ["RunSummary", "print_summary", "render"]

TOP = 6


class RunSummary(msgspec.Struct, kw_only=True):
    """What a run came to. Counters keep the names that KVM's statistics and vmstat give them.

    `exits` counts VM exits by reason; `zaps` dropped mappings by who asked; `refaults` faults on a
    page whose mapping had been taken away, None where nobody counted. `truths` tells what was
    checked: how often entries were compared, and full sweeps.
    """

    payload: str
    outcome: str
    exit_code: int
    seed: int
    instructions: int
    logical_ns: int
    wall_seconds: float
    memory: int
    host_ram: int
    swap: int | None = None
    exits: dict[str, int] = msgspec.field(default_factory=dict)
    kvm: dict[str, int] = msgspec.field(default_factory=dict)
    host: dict[str, int] = msgspec.field(default_factory=dict)
    zaps: dict[str, int] = msgspec.field(default_factory=dict)
    refaults: int | None = None
    truths: dict[str, int] | None = None
    trace: str | None = None
    trace_events: int = 0


def render(summary: RunSummary) -> Any:
    """The summary as a rich table of two columns."""
    from rich.table import Table

    good = summary.exit_code == 0
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("guest", f"{summary.payload}: [{'green' if good else 'red'}]{summary.outcome}[/]")
    table.add_row("machine", _machine(summary))
    mips = summary.instructions / summary.wall_seconds / 1e6 if summary.wall_seconds > 0 else 0.0
    table.add_row(
        "time",
        f"{duration(summary.logical_ns)} on the machine's clock, {summary.instructions:,} instructions, "
        f"{summary.wall_seconds:.1f} s here ({mips:.1f} MIPS)",
    )
    if summary.exits:
        table.add_row("VM exits", _counts(summary.exits))
    if summary.refaults is not None:
        table.add_row("refaults", f"{summary.refaults:,}")
    if summary.zaps:
        table.add_row("zaps by", _counts(summary.zaps))
    if any(summary.kvm.values()):
        table.add_row("KVM", _counts(summary.kvm))
    if any(summary.host.values()):
        table.add_row("host", _counts(summary.host))
    if summary.truths is not None:
        table.add_row("truths", _counts(summary.truths, order=False) or "checked")
    if summary.trace is not None:
        table.add_row("trace", f"{summary.trace} ({summary.trace_events:,} events)")
    return table


def print_summary(summary: RunSummary, file: IO[str] | None = None) -> None:
    """Print the table to stderr, or to `file`."""
    from rich.console import Console

    console = Console(
        file=file or sys.stderr,
        no_color=bool(os.environ.get("NO_COLOR")),
        highlight=False,
        soft_wrap=False,
    )
    console.print(render(summary))


def _machine(summary: RunSummary) -> str:
    swap = f"{_size(summary.swap)} swap" if summary.swap else "no swap"
    return f"{_size(summary.memory)} guest on {_size(summary.host_ram)} host, {swap}, seed {summary.seed}"


def _size(value: int) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def _counts(counts: dict[str, int], *, order: bool = True) -> str:
    shown = [(name, count) for name, count in counts.items() if count or not order]
    if order:
        shown.sort(key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{name} {count:,}" for name, count in shown[:TOP])
    return f"{text}, and {len(shown) - TOP} more" if len(shown) > TOP else text
