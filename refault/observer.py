"""What `refault run` notes while the guest runs: counts, the progress line, one page's story.

It listens to a handful of events and keeps counts, not events; of each guest page only the first
and the last refaults are kept, with what led to them.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from kvm_model.mmu.mmu_internal import PFERR_FETCH_MASK, PFERR_WRITE_MASK
from kvm_model.vmx.exits import (
    EPT_ACC_EXEC,
    EPT_ACC_WRITE,
    EPT_GVA_TRANSLATED,
    EPT_GVA_VALID,
    EXIT_REASON_NAMES,
    REASON_EPT_VIOLATION,
    REASON_EXCEPTION_NMI,
)
from refault.analysis import BRACKET, HOST_OP, PAGE_FAULT, SPTE_INSTALL, SPTE_ZAP, Analysis, gfn_of
from refault.story import story
from refault.summary import RunSummary

if TYPE_CHECKING:
    from refault.vm import VM
    from trace_events.event import Event

__all__ = ["Observer"]

KEPT_FIRST = 2
KEPT_LAST = 2
PROGRESS_SECONDS = 0.2
TOP_GFNS = 5

EXIT = "kvm:kvm_exit"


class _Page:
    """One guest page: how often it refaulted, and the refaults that are kept."""

    __slots__ = ("count", "first", "killer", "last")

    def __init__(self) -> None:
        self.count = 0
        self.killer: int | None = None
        self.first: list[Event] = []
        self.last: list[Event] = []

    def add(self, fault: Event) -> bool:
        """Count a refault; False for the second try of one whose work was overtaken."""
        if fault.killed_by == self.killer:
            return False
        self.killer = fault.killed_by
        self.count += 1
        if len(self.first) < KEPT_FIRST:
            self.first.append(fault)
        else:
            self.last.append(fault)
            if len(self.last) > KEPT_LAST:
                del self.last[0]
        return True


class Observer:
    """A sink for one run's events; `summary` at the end."""

    globs = (EXIT, PAGE_FAULT, SPTE_INSTALL, SPTE_ZAP, BRACKET, HOST_OP)

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.exits: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.brackets: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.sptes = {"installed": 0, "zapped": 0}
        self.refaults = 0
        self.pages: dict[int, _Page] = {}
        self._zaps: dict[int, Event] = {}
        self._began = time.monotonic()
        self._next_line = 0.0
        self._tty = sys.stderr.isatty()
        self._shadow = vm.config.mmu != "ept"

    def __call__(self, event: Event) -> None:
        name = event.event
        args = event.args
        if name == EXIT:
            reason = args["exit_reason"] & 0xFFFF
            self.exits[EXIT_REASON_NAMES.get(reason, str(reason))] += 1
            if reason == REASON_EPT_VIOLATION:
                self.violations[_violation_kind(args["info1"])] += 1
            elif reason == REASON_EXCEPTION_NMI:
                self.violations[_page_fault_kind(args["error_code"])] += 1
        elif name == SPTE_INSTALL:
            self.sptes["installed"] += 1
            if self._shadow and event.killed_by is not None and not args["prefetch"]:
                self._refault(event)
        elif name == SPTE_ZAP:
            self.sptes["zapped"] += 1
        elif name == BRACKET:
            self.brackets[args["event"]] += 1
        elif name == HOST_OP:
            self.operations[args["op"]] += 1
        elif name == PAGE_FAULT and event.killed_by is not None:
            # Of a fault on a linear address nobody knows the page: what it maps is the refault.
            self._refault(event)

    def _refault(self, event: Event) -> None:
        gfn = gfn_of(event)
        if gfn is None:
            return
        page = self.pages.get(gfn)
        if page is None:
            page = self.pages[gfn] = _Page()
        if not page.add(event):
            return
        self.refaults += 1
        zap = self.vm.board.host.stream.ancestor(event.killed_by)
        if zap is not None and event.killed_by is not None:
            self._remember(zap)

    def _remember(self, event: Event) -> None:
        # The chain is looked up now: the stream forgets old scopes.
        ancestor = self.vm.board.host.stream.ancestor
        todo: Event | None = event
        while todo is not None and todo.seq not in self._zaps:
            self._zaps[todo.seq] = todo
            todo = ancestor(todo.cause)
        if len(self._zaps) > 400_000:
            self._prune()

    def _prune(self) -> None:
        keep: dict[int, Event] = {}
        for page in self.pages.values():
            for fault in (*page.first, *page.last):
                todo = self._zaps.get(fault.killed_by) if fault.killed_by is not None else None
                while todo is not None and todo.seq not in keep:
                    keep[todo.seq] = todo
                    todo = self._zaps.get(todo.cause) if todo.cause is not None else None
        self._zaps = keep

    # -- while it runs ------------------------------------------------------------------------

    def tick(self) -> None:
        """Now and then, a progress line on a terminal."""
        if not self._tty:
            return
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + PROGRESS_SECONDS
        vm = self.vm
        stat = vm.stat
        print(
            f"\r{vm.board.cpu.instructions / 1e6:8.1f} M instructions  {stat.get('pf_taken', 0):,} faults  "
            f"{self.refaults:,} refaults  {vm.vmstat.get('pswpout', 0):,} swapped out",
            end="\x1b[K", file=sys.stderr, flush=True,
        )

    def done(self) -> None:
        """Wipe the progress line."""
        if self._tty and self._next_line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    # -- at the end ---------------------------------------------------------------------------

    def most_refaulted(self) -> list[tuple[int, int]]:
        """(gfn, refaults), most first."""
        ranked = sorted(self.pages.items(), key=lambda item: (-item[1].count, item[0]))
        return [(gfn, page.count) for gfn, page in ranked[:TOP_GFNS]]

    def story(self) -> list[str]:
        """The most refaulted page's story, at most ten lines; empty if nothing refaulted."""
        top = self.most_refaulted()
        if not top:
            return []
        gfn, count = top[0]
        page = self.pages[gfn]
        events: dict[int, Event] = {}
        for fault in (*page.first, *page.last):
            events[fault.seq] = fault
            todo = self._zaps.get(fault.killed_by) if fault.killed_by is not None else None
            while todo is not None:
                events[todo.seq] = todo
                todo = self._zaps.get(todo.cause) if todo.cause is not None else None
        return story(Analysis(events.values()), gfn, refaults=count)

    def summary(self, outcome: str, code: int, *, trace: str | None, trace_events: int) -> RunSummary:
        """Everything in one record."""
        vm = self.vm
        config = vm.config
        checker = vm.board.host.checker
        return RunSummary(
            payload=str(vm.payload.get("name", "")), outcome=outcome, exit_code=code, seed=config.seed,
            instructions=vm.board.cpu.instructions, logical_ns=vm.board.host.sched.now,
            wall_seconds=time.monotonic() - self._began, memory=config.memory, host_ram=config.host_ram,
            swap=config.swap, mmu=config.mmu, exits=dict(self.exits), violations=dict(self.violations),
            brackets=dict(self.brackets), operations=dict(self.operations), sptes=dict(self.sptes),
            kvm=vm.stat, host=vm.vmstat,
            refaults=self.refaults, top=self.most_refaulted(), story=self.story(),
            truths=checker.counts() if checker is not None else None, trace=trace, trace_events=trace_events,
        )


def _page_fault_kind(error_code: int) -> str:
    if error_code & PFERR_WRITE_MASK:
        return "write"
    return "fetch" if error_code & PFERR_FETCH_MASK else "read"


def _violation_kind(qualification: int) -> str:
    kind = "write" if qualification & EPT_ACC_WRITE else "fetch" if qualification & EPT_ACC_EXEC else "read"
    if qualification & EPT_GVA_VALID and not qualification & EPT_GVA_TRANSLATED:
        return f"{kind} of a guest table"
    return kind
