"""What a trace says: which zap each refault answers, what caused what, and how often.

A cause is the `seq` of the enclosing scope; `killed_by` on a fault names the zap that removed the
gfn's last mapping. Everything here follows from these two links and from field names; nothing
is guessed from times.

Not modelled: links to events that a filter dropped; they are as if absent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

import msgspec

from host_mm.ram import PAGE_SHIFT
from kvm_model.vmx.exits import EPT_GVA_VALID
from trace_events.event import Event
from trace_events.filters import compile_globs

__all__ = ["PAGE_FAULT", "SPTE_INSTALL", "SPTE_ZAP", "Analysis", "Refault", "gfn_of", "is_ept_violation"]

PAGE_FAULT = "kvm:kvm_page_fault"
SPTE_ZAP = "refault:spte_zap"
SPTE_INSTALL = "refault:spte_install"
FAULT_RETRY = "refault:fault_retry"
HOST_OP = "refault:host_op"
HOST_FAULT = "refault:host_fault"
BRACKET = "refault:mmu_notifier_start"
DIRECT_RECLAIM = "vmscan:mm_vmscan_direct_reclaim_begin"

LEVEL_BITS = 9


class Refault(msgspec.Struct, frozen=True):
    """A zap, the fault that answered it, and the install that repaired it (None: not in the trace).

    Where a filter dropped the faults, `fault` is the install itself.
    """

    gfn: int
    zap: Event
    fault: Event
    install: Event | None = None

    @property
    def gap(self) -> int:
        """Nanoseconds from the zap to the fault: how long the page was left alone."""
        return self.fault.ts - self.zap.ts

    @property
    def cost(self) -> int | None:
        """Nanoseconds from the fault to the new mapping, or None where that is not in the trace."""
        return None if self.install is None else self.install.ts - self.fault.ts


def is_ept_violation(fault: Event) -> bool:
    """Whether a kvm_page_fault is one: its error_code is then an exit qualification, which says that there is
    a linear address. Without EPT it is that of a #PF, which never has that bit, at a linear address."""
    code = fault.args.get("error_code")
    return isinstance(code, int) and code & EPT_GVA_VALID != 0


def gfn_of(event: Event) -> int | None:
    """The guest frame an event is about, or None."""
    args = event.args
    if event.event == PAGE_FAULT and not is_ept_violation(event):
        return None
    for name in ("gfn", "gpa", "fault_address"):
        value = args.get(name)
        if isinstance(value, int):
            return value if name == "gfn" else value >> PAGE_SHIFT
    return None


class Analysis:
    """Questions to the events of one trace. Answers are computed once, on demand."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = sorted(events, key=lambda event: event.seq)
        self.by_seq = {event.seq: event for event in self.events}

    # -- links --------------------------------------------------------------------------------

    @cached_property
    def _children(self) -> dict[int, list[Event]]:
        children: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            if event.cause is not None:
                children[event.cause].append(event)
        return children

    @cached_property
    def _answers(self) -> dict[int, list[Event]]:
        answers: dict[int, list[Event]] = defaultdict(list)
        for refault in self._refaults:
            answers[refault.zap.seq].append(refault.fault)
        return answers

    def children(self, seq: int) -> list[Event]:
        """The events whose direct cause is `seq`."""
        return self._children.get(seq, [])

    def descendants(self, seq: int) -> Iterator[Event]:
        """All events below `seq`, parents before children."""
        todo = [seq]
        while todo:
            children = self.children(todo.pop())
            yield from children
            todo += [child.seq for child in reversed(children)]

    def chain(self, event: Event) -> list[Event]:
        """The causes of `event` from the root down to `event` itself."""
        chain = [event]
        seen = {event.seq}
        while event.cause is not None and event.cause not in seen:
            parent = self.by_seq.get(event.cause)
            if parent is None:
                break
            seen.add(parent.seq)
            chain.append(parent)
            event = parent
        return chain[::-1]

    def root(self, event: Event) -> Event:
        """What everything began with: a host operation, a daemon's bracket, a fault."""
        return self.chain(event)[0]

    def killer(self, event: Event) -> Event | None:
        """The zap that a fault answers."""
        return None if event.killed_by is None else self.by_seq.get(event.killed_by)

    def answers(self, seq: int) -> list[Event]:
        """The faults that a zap led to: none, or one for each gfn it had mapped."""
        return self._answers.get(seq, [])

    # -- refaults -----------------------------------------------------------------------------

    @cached_property
    def _refaults(self) -> list[Refault]:
        faults: dict[tuple[int, int], Event] = {}
        installs: dict[tuple[int, int], Event] = {}
        for event in self.events:
            gfn = gfn_of(event)
            if event.killed_by is None or event.killed_by not in self.by_seq or gfn is None:
                continue
            # A fault may come again before its mapping does; the first one is the refault. A
            # neighbour that was mapped along answers nothing.
            if event.event == PAGE_FAULT:
                faults.setdefault((event.killed_by, gfn), event)
            elif event.event == SPTE_INSTALL and not event.args.get("prefetch"):
                installs.setdefault((event.killed_by, gfn), event)
        # Shadow paging knows the gfn only when the guest's tables were walked: there the install tells.
        for key, install in installs.items():
            fault = self.by_seq.get(install.cause) if install.cause is not None else None
            if key not in faults and fault is not None and fault.event == PAGE_FAULT:
                faults[key] = fault
        found = [
            Refault(key[1], self.by_seq[key[0]], event, installs.get(key))
            for key, event in {**installs, **faults}.items()
        ]
        return sorted(found, key=lambda refault: refault.fault.seq)

    @cached_property
    def _retries(self) -> dict[int, list[Event]]:
        retries: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            if event.event == FAULT_RETRY:
                retries[event.args.get("gfn", -1)].append(event)
        return retries

    def retries_of(self, gfn: int) -> list[Event]:
        """The times that a fault on this guest frame had to begin again."""
        return self._retries.get(gfn, [])

    def refaults(self) -> list[Refault]:
        """Every zap that was answered, in the order of the answers."""
        return self._refaults

    def most_refaulted(self, limit: int = 10) -> list[tuple[int, int]]:
        """(gfn, refaults) of the guest frames that lost their mapping most often."""
        counts = Counter(refault.gfn for refault in self._refaults)
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]

    def reason(self, zap: Event) -> str:
        """Who is to blame for a zap, in a few words: the operation, the daemon, or what a vCPU's own
        fault had to do."""
        chain = self.chain(zap)
        operations = [str(event.args.get("op")) for event in chain if event.event == HOST_OP]
        if operations:
            return ": ".join(operations)
        if zap.vcpu < 0:
            return zap.task
        names = [event.event for event in chain]
        if DIRECT_RECLAIM in names:
            return f"direct reclaim in {zap.task}"
        if HOST_FAULT in names and BRACKET in names:
            return f"copy-on-write in {zap.task}"
        return f"{zap.args.get('why', zap.name)} in {zap.task}"

    # -- counting -----------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Events by full name, most frequent first, then by name."""
        counts = Counter(event.event for event in self.events)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def reasons(self) -> dict[str, int]:
        """Refaults by who caused the zap, most frequent first."""
        counts = Counter(self.reason(refault.zap) for refault in self._refaults)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def unanswered(self) -> list[Event]:
        """The zaps that nobody has faulted on since."""
        return [event for event in self.events if event.event == SPTE_ZAP and event.seq not in self._answers]

    # -- selection ----------------------------------------------------------------------------

    def about(self, gfn: int) -> list[Event]:
        """The events about one guest frame; a large leaf is about every frame it covers."""
        return [event for event in self.events if self._covers(event, gfn)]

    def _covers(self, event: Event, gfn: int) -> bool:
        found = gfn_of(event)
        if found is None:
            return False
        level = event.args.get("level")
        pages = 1 << (LEVEL_BITS * (level - 1)) if isinstance(level, int) and 1 <= level <= 3 else 1
        return found <= gfn < found + pages

    def select(self, *globs: str) -> list[Event]:
        """The events whose full names match."""
        match = compile_globs(globs)
        return [event for event in self.events if match(event.event)]
