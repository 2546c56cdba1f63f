"""The table that `refault run` ends with, on stderr, or the same as one JSON object."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from refault.story import duration

__all__ = ["RunSummary", "print_summary", "render"]

TOP = 6
KVM_SHOWN = (
    "pf_taken", "pf_fixed", "pf_guest", "pf_spurious", "pf_fast", "remote_tlb_flush_requests",
    "tlb_flush",
)
HOST_SHOWN = ("pgfault", "pgmajfault", "pswpin", "pswpout", "cow_break", "pgmigrate_success", "oom_kill")


class RunSummary(msgspec.Struct, kw_only=True):
    """What a run came to. Counters keep the names that KVM's statistics and vmstat give them.

    `exits` counts VM exits by reason, `violations` EPT violations by access, or with `mmu` "shadow" the page
    faults that exited, `brackets` notifier brackets by event, `operations` host operations, `sptes` leaf
    SPTEs; `top` are the (gfn, refaults) that refaulted most, `story` the life of the first of them. `truths`
    tells what was checked, None if nothing.
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
    swap: int | None
    mmu: str = "ept"
    exits: dict[str, int] = {}
    violations: dict[str, int] = {}
    brackets: dict[str, int] = {}
    operations: dict[str, int] = {}
    sptes: dict[str, int] = {}
    kvm: dict[str, int] = {}
    host: dict[str, int] = {}
    refaults: int = 0
    top: list[tuple[int, int]] = []
    story: list[str] = []
    truths: dict[str, int] | None = None
    trace: str | None = None
    trace_events: int = 0


def render(summary: RunSummary) -> Any:
    """The summary as a rich table of two columns."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    colour = "green" if summary.exit_code == 0 else "red"
    table.add_row("guest", f"{escape(summary.payload)}: [{colour}]{escape(summary.outcome)}[/]")
    table.add_row("machine", _machine(summary))
    mips = summary.instructions / summary.wall_seconds / 1e6 if summary.wall_seconds > 0 else 0.0
    table.add_row(
        "time",
        f"{duration(summary.logical_ns)} on the machine's clock, {summary.instructions:,} instructions, "
        f"{summary.wall_seconds:.1f} s here ({mips:.1f} MIPS)",
    )
    table.add_row("VM exits", _counts(summary.exits))
    if summary.violations:
        what = "EPT violations" if summary.mmu == "ept" else "page faults"
        table.add_row(what, _counts(summary.violations))
    if summary.operations:
        table.add_row("host operations", _counts(summary.operations))
    table.add_row("notifier brackets", _counts(summary.brackets))
    what = "faults on a page whose mapping had been taken away"
    table.add_row("refaults", f"[bold]{summary.refaults:,}[/] {what}")
    if summary.top:
        most = (f"gfn {gfn:#x} {count:,} times" for gfn, count in summary.top)
        table.add_row("refaulted most", ", ".join(most))
    table.add_row("leaf SPTEs", _counts(summary.sptes, order=False))
    table.add_row("KVM", _counts(_chosen(summary.kvm, KVM_SHOWN), order=False))
    table.add_row("host", _counts(_chosen(summary.host, HOST_SHOWN), order=False))
    if summary.truths is not None:
        table.add_row("truths", f"all hold: {_counts(summary.truths, order=False)}")
    if summary.trace is not None:
        table.add_row("trace", f"{escape(summary.trace)}, {summary.trace_events:,} events")
    return table


def print_summary(summary: RunSummary) -> None:
    """The table on stderr, and the story of the page that refaulted most."""
    from rich.console import Console

    sys.stdout.flush()
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    console.print()
    with console.capture() as capture:
        console.print(render(summary))
    for line in capture.get().splitlines():
        # The table pads its cells, which would show in a file.
        console.out(line.rstrip(), highlight=False)
    if summary.story:
        console.print(f"\n[bold]the story of guest page {summary.top[0][0]:#x}[/]")
        for line in summary.story:
            console.print(line, markup=False, soft_wrap=True)


def _chosen(counts: dict[str, int], names: tuple[str, ...]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts.get(name)}


def _machine(summary: RunSummary) -> str:
    swap = f"{_size(summary.swap)} swap" if summary.swap else "no swap"
    ept = "" if summary.mmu == "ept" else "no EPT, "
    host = f"{_size(summary.host_ram)} host, {swap}, {ept}seed {summary.seed}"
    return f"{_size(summary.memory)} guest on {host}"


def _size(value: int) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def _counts(counts: dict[str, int], *, order: bool = True) -> str:
    shown = [(name, count) for name, count in counts.items() if count]
    if order:
        shown.sort(key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{name} {count:,}" for name, count in shown[:TOP])
    if len(shown) > TOP:
        text += f", and {len(shown) - TOP} more"
    return text or "none"
