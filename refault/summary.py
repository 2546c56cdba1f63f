"""The table that `refault run` ends with, on stderr, or the same as one JSON object."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from kvm_model.vmx.exits import EXIT_REASON_NAMES
from refault.output import print_json
from refault.story import duration

if TYPE_CHECKING:
    from emu.board import Stop
    from refault.vm import VM
    from trace_events.event import Event

__all__ = ["Observer", "RunSummary", "print_summary", "render", "summarise"]

TOP = 6
PROGRESS_SECONDS = 0.25
REMEMBERED = 4096
KVM_SHOWN = ("pf_taken", "pf_fixed", "pf_spurious", "pf_fast", "remote_tlb_flush", "exits")
HOST_SHOWN = ("pgfault", "pgmajfault", "pswpin", "pswpout", "cow_break", "pgmigrate_success", "oom_kill")


class Observer:
    """A sink that counts while a machine runs, and shows on a terminal that it does.

    `exits` counts VM exits by reason, `zaps` dropped leaf mappings by who wanted them gone,
    `refaults` page faults on a gfn whose mapping had been taken away.
    """

    globs = (
        "kvm:kvm_exit",
        "kvm:kvm_page_fault",
        "refault:spte_zap",
        "refault:host_op",
        "refault:mmu_notifier_start",
    )

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.exits: Counter[str] = Counter()
        self.zaps: Counter[str] = Counter()
        self.faults = 0
        self.refaults = 0
        self.started = time.monotonic()
        self.seconds = 0.0
        self._who: dict[int, str] = {}
        self._shown = self.started
        self._live = sys.stderr.isatty()
        self._count = {
            "kvm:kvm_exit": self._exit,
            "kvm:kvm_page_fault": self._fault,
            "refault:spte_zap": self._zap,
            "refault:host_op": self._scope,
            "refault:mmu_notifier_start": self._scope,
        }

    def __call__(self, event: Event) -> None:
        """Count one event."""
        self._count[event.event](event)

    def _exit(self, event: Event) -> None:
        reason = event.args["exit_reason"]
        self.exits[EXIT_REASON_NAMES.get(reason & 0xFFFF, str(reason))] += 1

    def _fault(self, event: Event) -> None:
        self.faults += 1
        if event.killed_by is not None:
            self.refaults += 1

    def _scope(self, event: Event) -> None:
        who = self._who
        if event.event == "refault:host_op":
            name = str(event.args["op"])
        else:
            # A bracket that a vCPU opens within its own fault is a copy-on-write or its own reclaim.
            mine = "a fault's own bracket" if event.vcpu >= 0 else event.task
            name = who.get(event.cause, mine) if event.cause is not None else mine
        who[event.seq] = name
        if len(who) > REMEMBERED:
            # Causes are open scopes: the oldest are closed long since.
            del who[next(iter(who))]

    def _zap(self, event: Event) -> None:
        who = None if event.cause is None else self._who.get(event.cause)
        self.zaps[who or str(event.args["why"])] += 1

    def tick(self) -> None:
        """Called between the tasks' turns: now and then, tell a terminal how far it is."""
        if not self._live:
            return
        now = time.monotonic()
        if now - self._shown < PROGRESS_SECONDS:
            return
        self._shown = now
        board = self.vm.board
        sys.stderr.write(
            f"\r{duration(board.host.sched.now)}, {board.cpu.instructions:,} instructions, "
            f"{self.refaults:,} refaults\x1b[K"
        )
        sys.stderr.flush()

    def done(self) -> None:
        """The run is over: stop the watch, clear the line."""
        self.seconds = time.monotonic() - self.started
        if self._live and self._shown != self.started:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class RunSummary(msgspec.Struct, kw_only=True):
    """What a run came to. Counters keep the names that KVM's statistics and vmstat give them.

    `truths` tells what was checked; None where nothing was.
    """

    payload: str
    outcome: str
    stop: str
    status: int
    seed: int
    instructions: int
    logical_ns: int
    wall_seconds: float
    memory: int
    host_ram: int
    swap: int | None
    faults: int
    refaults: int
    exits: dict[str, int]
    zaps: dict[str, int]
    kvm: dict[str, int]
    host: dict[str, int]
    truths: dict[str, int] | None = None
    trace: str | None = None


def summarise(vm: VM, observer: Observer, stop: Stop, outcome: str, trace: str | None = None) -> RunSummary:
    """The summary of a run of `vm` that ended with `stop`."""
    config, board = vm.config, vm.board
    checker = board.host.checker
    return RunSummary(
        payload=str(vm.payload.get("name", "")),
        outcome=outcome,
        stop=stop.kind,
        status=stop.status,
        seed=config.seed,
        instructions=board.cpu.instructions,
        logical_ns=board.host.sched.now,
        wall_seconds=observer.seconds,
        memory=config.memory,
        host_ram=config.host_ram,
        swap=config.swap,
        faults=observer.faults,
        refaults=observer.refaults,
        exits=dict(observer.exits.most_common()),
        zaps=dict(observer.zaps.most_common()),
        kvm={name: value for name, value in vm.stat.items() if value},
        host={name: value for name, value in vm.vmstat.items() if value},
        truths=None if checker is None else dict(getattr(checker, "counters", {})),
        trace=trace,
    )


def render(summary: RunSummary) -> Any:
    """The summary as a rich table of two columns."""
    from rich.table import Table

    good = summary.stop == "exit" and summary.status == 0
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
    table.add_row("VM exits", _counts(summary.exits))
    table.add_row("faults", f"{summary.faults:,}, of which {summary.refaults:,} refaults: the host had taken the page")
    table.add_row("mappings dropped", _counts(summary.zaps))
    table.add_row("KVM", _counts({name: summary.kvm[name] for name in KVM_SHOWN if name in summary.kvm}))
    table.add_row("host", _counts({name: summary.host[name] for name in HOST_SHOWN if name in summary.host}))
    if summary.truths is not None:
        counts = ", ".join(f"{name} {count:,}" for name, count in summary.truths.items())
        table.add_row("truths", f"all hold{f' ({counts})' if counts else ''}")
    if summary.trace is not None:
        table.add_row("trace", summary.trace)
    return table


def print_summary(
    vm: VM, observer: Observer, stop: Stop, sentence: str, *, as_json: bool = False, trace: str | None = None
) -> None:
    """The summary as a table on stderr, or as one JSON object on stdout."""
    summary = summarise(vm, observer, stop, sentence, trace)
    if as_json:
        print_json(summary)
        return
    from rich.console import Console

    sys.stdout.flush()
    Console(stderr=True, highlight=False).print(render(summary))


def _machine(summary: RunSummary) -> str:
    swap = f"{_size(summary.swap)} swap" if summary.swap else "no swap"
    return f"{_size(summary.memory)} guest on {_size(summary.host_ram)} host, {swap}, seed {summary.seed}"


def _size(value: int) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def _counts(counts: dict[str, int]) -> str:
    shown = [(name, count) for name, count in counts.items() if count]
    text = ", ".join(f"{name} {count:,}" for name, count in shown[:TOP])
    if len(shown) > TOP:
        text += f", and {len(shown) - TOP} more kinds"
    return text or "none"
