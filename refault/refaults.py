"""All that a trace says of one refault: who took the mapping, and how it came back.

    gfn 0x10003: unmap by vmm, madvise: bracket clear [0x7ffff7203000, 0x7ffff7204000), event 26
      0x38e67 -> 0x1825, gup slow pfn 0x1 read-only, after 1 retry (stale-after-gup), event 47

Not modelled: what a filter dropped; it is as if absent.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from refault.analysis import BRACKET, HOST_OP, Analysis, Refault
from trace_events.event import Event

__all__ = ["ToldRefault", "tell", "tell_all"]

_RETRY = "refault:fault_retry"
_GUP = "refault:gup_answer"


class ToldRefault(msgspec.Struct, frozen=True, kw_only=True):
    """One refault. Numbers of events are their `seq`; None or "" for what is not in the trace.

    `task`, `operation`, `bracket` with its range `start`, `end`: who took the mapping, and inside of what.
    `old_spte`, `new_spte`: the entry before the zap and after the fault. `gup`, `pfn`, `writable`: how the
    host answered. `retries`: why the fault had to begin again, each time.
    """

    gfn: int
    level: int
    zap: int
    why: str
    task: str
    operation: str
    bracket: str
    start: int | None
    end: int | None
    old_spte: int
    fault: int
    fault_task: str
    new_spte: int | None
    gup: str
    pfn: int | None
    writable: bool | None
    retries: list[str]

    def lines(self) -> list[str]:
        """For people."""
        inside = f", {self.operation}" if self.operation else ""
        if self.bracket:
            inside += f": bracket {self.bracket} [{self.start:#x}, {self.end:#x})"
        new = "not mapped again" if self.new_spte is None else f"{self.new_spte:#x}"
        answer = ""
        if self.gup:
            answer = f", gup {self.gup} pfn {self.pfn:#x} {'writable' if self.writable else 'read-only'}"
        again = ""
        if self.retries:
            times = "retry" if len(self.retries) == 1 else "retries"
            again = f", after {len(self.retries)} {times} ({', '.join(self.retries)})"
        return [
            f"gfn {self.gfn:#x}: {self.why} by {self.task}{inside}, event {self.zap}",
            f"  {self.old_spte:#x} -> {new}{answer}{again}, event {self.fault}",
        ]


def tell(analysis: Analysis, refault: Refault) -> ToldRefault:
    """Everything about one refault of that trace."""
    zap, install = refault.zap, refault.install
    bracket = next((event for event in analysis.chain(zap)[::-1] if event.event == BRACKET), None)
    answer = _answer(analysis, refault)
    return ToldRefault(
        gfn=refault.gfn, level=zap.args.get("level", 1), zap=zap.seq, why=str(zap.args.get("why", "")),
        task=zap.task,
        operation=": ".join(str(e.args.get("op")) for e in analysis.chain(zap) if e.event == HOST_OP),
        bracket=str(bracket.args.get("event")) if bracket is not None else "",
        start=bracket.args.get("start") if bracket is not None else None,
        end=bracket.args.get("end") if bracket is not None else None,
        old_spte=zap.args.get("old_spte", 0), fault=refault.fault.seq, fault_task=refault.fault.task,
        new_spte=install.args.get("spte") if install is not None else None,
        gup=str(answer.args.get("answer")) if answer is not None else "",
        pfn=answer.args.get("pfn") if answer is not None else None,
        writable=bool(answer.args.get("writable")) if answer is not None else None,
        retries=[str(event.args.get("reason")) for event in _retries(analysis, refault)],
    )


def tell_all(analysis: Analysis) -> Iterator[ToldRefault]:
    """Every refault of the trace, in the order of the faults."""
    return (tell(analysis, refault) for refault in analysis.refaults())


def _answer(analysis: Analysis, refault: Refault) -> Event | None:
    """What get_user_pages said in the fault that mapped the page, or in the first one if none did."""
    cause = refault.install.cause if refault.install is not None else refault.fault.seq
    found = [
        event for event in analysis.children(-1 if cause is None else cause)
        if event.event == _GUP and event.args.get("gfn") == refault.gfn
    ]
    return found[-1] if found else None


def _retries(analysis: Analysis, refault: Refault) -> list[Event]:
    mine = [event for event in analysis.retries_of(refault.gfn) if event.vcpu == refault.fault.vcpu]
    after = [event for event in mine if event.seq > refault.zap.seq]
    install = refault.install
    return after if install is None else [event for event in after if event.seq < install.seq]
