"""A trace in words: one sentence an event, the story of one guest page, the answer to "why".

Sentences are written for somebody who knows what a page table is and has never read KVM. An event
without a sentence of its own is told by its print format.

Not modelled: any language but English.
"""

from __future__ import annotations

from collections.abc import Callable

from kvm_model.mmu.mmu_internal import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_WRITE_MASK,
)
from kvm_model.vmx.exits import (
    EPT_ACC_EXEC,
    EPT_ACC_WRITE,
    EPT_ENTRY_EXEC,
    EPT_ENTRY_READ,
    EPT_ENTRY_WRITE,
    EPT_GVA_TRANSLATED,
    EPT_GVA_VALID,
    EXIT_REASON_NAMES,
)
from refault.analysis import (
    BRACKET,
    DIRECT_RECLAIM,
    HOST_FAULT,
    HOST_OP,
    PAGE_FAULT,
    SPTE_INSTALL,
    SPTE_ZAP,
    Analysis,
    gfn_of,
    is_ept_violation,
)
from trace_events.event import Event
from trace_events.text import format_args
from trace_events.tracepoint import Tracepoint

__all__ = ["STORY_LINES", "duration", "explain", "moment", "sentence", "story"]

STORY_LINES = 10
_EPT_ONLY = 1 << 4 | 1 << 8

_BRACKETS = {
    "unmap": "took a range out of the address space",
    "clear": "was about to take pages away or replace them",
    "protection-vma": "changed the protection of a range",
    "protection-page": "write-protected pages",
    "soft-dirty": "write-protected everything to see what gets written",
    "release": "tore the address space down",
    "migrate": "moved pages to a device",
    "exclusive": "gave a page to a device alone",
}


def duration(ns: int) -> str:
    """Logical time for people: three figures and a unit."""
    for unit, size in (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1000)):
        if abs(ns) >= size:
            return f"{ns / size:.3g} {unit}" if ns < 999.5 * size else f"{ns / size:.0f} {unit}"
    return f"{ns} ns"


def moment(event: Event) -> str:
    """When an event happened, as report lines give it."""
    us = (event.ts + 500) // 1000
    return f"{us // 1_000_000}.{us % 1_000_000:06d}"


def _page_fault(event: Event) -> str:
    code = int(event.args["error_code"])
    if not is_ept_violation(event):
        return _shadow_page_fault(event, code)
    # With EPT the event's error_code is the exit qualification: vmx.c, handle_ept_violation.
    page = f"guest page {int(event.args['fault_address']) >> 12:#x}"
    verb = "wrote to" if code & EPT_ACC_WRITE else "fetched from" if code & EPT_ACC_EXEC else "read"
    if code & EPT_GVA_VALID and not code & EPT_GVA_TRANSLATED:
        page = f"a page table in {page}"
    had = code & (EPT_ENTRY_READ | EPT_ENTRY_WRITE | EPT_ENTRY_EXEC)
    what = "which KVM had mapped without that right" if had else "which KVM had not mapped"
    return f"vCPU {event.args.get('vcpu_id', event.vcpu)} {verb} {page}, {what}"


def _shadow_page_fault(event: Event, code: int) -> str:
    verb = "wrote to" if code & PFERR_WRITE_MASK else "fetched from" if code & PFERR_FETCH_MASK else "read"
    page = f"linear page {int(event.args['fault_address']) >> 12:#x}"
    if code & PFERR_RSVD_MASK:
        what = "which KVM knew as a device's"
    elif code & PFERR_PRESENT_MASK:
        what = "which KVM had mapped without that right"
    else:
        what = "which KVM had not mapped"
    return f"vCPU {event.args.get('vcpu_id', event.vcpu)} {verb} {page}, {what}"


def _zap(event: Event) -> str:
    args = event.args
    size = {1: "4K", 2: "2M", 3: "1G"}.get(args.get("level", 1), "")
    return f"KVM dropped its {size} mapping of guest page {args.get('gfn', 0):#x}"


def _bracket(event: Event) -> str:
    args = event.args
    name = str(args.get("event", ""))
    pages = max(1, (int(args.get("end", 0)) - int(args.get("start", 0))) >> 12)
    what = _BRACKETS.get(name, "was about to change mappings")
    return f"{event.task} {what} ({name} bracket, {pages} page{'s' * (pages != 1)})"


def _spte_changed(event: Event) -> str:
    args = event.args
    old, new = (int(args.get(name, 0)) for name in ("old_spte", "new_spte"))
    gfn = f"guest page {args.get('gfn', 0):#x}"
    if not new & 7:
        return f"the EPT entry of {gfn} was cleared"
    return f"KVM {'changed' if old & 7 else 'installed'} the EPT entry of {gfn}, rights {_rights(new)}"


def _host_fault(event: Event) -> str:
    return f"{event.task} faulted in the host's own tables ({event.args.get('access')})"


def _install(event: Event) -> str:
    args = event.args
    gfn = f"guest page {args.get('gfn', 0):#x}"
    along = " along with its neighbour" if args.get("prefetch") else ""
    rights = _rights(args.get("spte", 0))
    return f"KVM mapped {gfn} to host frame {args.get('pfn', 0):#x}{along}, rights {rights}"


def _rights(spte: int) -> str:
    # EPT entries have R, W, X in bits 0 to 2, and a memory type or the accessed bit in 4 or 8, where KVM's
    # entries for CR3 have nothing; those have P, W, U and, at the top, NX.
    execute = spte & 4 if spte & _EPT_ONLY else not spte >> 63
    return f"{'r' if spte & 1 else '-'}{'w' if spte & 2 else '-'}{'x' if execute else '-'}"


def _exit(event: Event) -> str:
    reason = event.args.get("exit_reason")
    name = EXIT_REASON_NAMES.get(reason & 0xFFFF, reason) if isinstance(reason, int) else reason
    return f"vCPU {event.args.get('vcpu_id', event.vcpu)} left the guest ({name})"


SENTENCES: dict[str, Callable[[Event], str]] = {
    PAGE_FAULT: _page_fault,
    SPTE_ZAP: _zap,
    SPTE_INSTALL: _install,
    BRACKET: _bracket,
    HOST_FAULT: _host_fault,
    DIRECT_RECLAIM: lambda event: f"{event.task} found no free memory and had to reclaim some itself",
    "vmscan:mm_vmscan_kswapd_wake": lambda event: f"{event.task} woke to reclaim memory",
    HOST_OP: lambda event: f"the host was asked to {event.args.get('op')}({event.args.get('args')})",
    "kvm:kvm_exit": _exit,
    "kvm:kvm_entry": lambda event: f"vCPU {event.args.get('vcpu_id', event.vcpu)} entered the guest",
    "kvmmmu:kvm_tdp_mmu_spte_changed": _spte_changed,
    "refault:mmu_notifier_end": lambda event: f"{event.task} closed its {event.args.get('event')} bracket",
}


def sentence(event: Event, find: Callable[[str], Tracepoint | None] = lambda name: None) -> str:
    """What happened, as a clause without a full stop."""
    tell = SENTENCES.get(event.event)
    if tell is None:
        return f"{event.task}: {event.name} {format_args(event, find(event.event))}".rstrip()
    try:
        return tell(event)
    except (KeyError, TypeError, ValueError):
        # A trace from elsewhere may hold other types under the same names.
        return f"{event.task}: {event.name} {format_args(event, None)}".rstrip()


_IN_A_STORY = (PAGE_FAULT, SPTE_ZAP, SPTE_INSTALL)


def story(analysis: Analysis, gfn: int, *, refaults: int | None = None) -> list[str]:
    """The life of one guest page in at most ten lines: first and last things, zaps with their reasons.

    `refaults` is how many there were in all, where `analysis` holds only some of them.
    """
    told = [event for event in analysis.about(gfn) if event.event in _IN_A_STORY]
    if not told:
        return [f"Nothing in this trace is about guest page {gfn:#x}."]
    lines = [_story_line(analysis, event) for event in told]
    known = [refault for refault in analysis.refaults() if refault.gfn == gfn]
    count = len(known) if refaults is None else refaults
    closing = f"In all: {count} refault{'s' * (count != 1)} of guest page {gfn:#x}"
    if known and count == len(known):
        closing += f", {duration(sum(r.gap for r in known) // len(known))} after the zap on average"
    room = STORY_LINES - 1
    if len(lines) > room:
        left_out = len(lines) - (room - 1)
        lines = [*lines[: room - 3], f"   ... {left_out} more like these ...", *lines[-2:]]
    return [*lines, closing + "."]


def _story_line(analysis: Analysis, event: Event) -> str:
    line = f"{moment(event)}  #{event.seq}  {sentence(event)}"
    if event.event == SPTE_ZAP:
        return f"{line}, because of {analysis.reason(event)}."
    zap = analysis.killer(event)
    if zap is None:
        return f"{line}."
    if event.event == SPTE_INSTALL:
        # Of a fault on a linear address nobody knows the page: its mapping stands for it.
        linear = [fault.seq for fault in analysis.answers(zap.seq) if gfn_of(fault) is None]
        lost = event in analysis.answers(zap.seq) or event.cause in linear
        return f"{line}: lost {duration(event.ts - zap.ts)} before, at #{zap.seq}." if lost else f"{line}."
    if event not in analysis.answers(zap.seq):
        return f"{line} yet: the first try was overtaken and comes again."
    return f"{line}: lost {duration(event.ts - zap.ts)} before, at #{zap.seq}."


def explain(
    analysis: Analysis, event: Event, find: Callable[[str], Tracepoint | None] = lambda name: None
) -> list[str]:
    """Why an event happened and what came of it: a paragraph, the chain back, the chain forward."""
    lines = [f"#{event.seq} {event.event} at {moment(event)} in {event.task}", f"  {_text(event, find)}", ""]
    lines += [_prose(analysis, event, find), ""]
    back = _back(analysis, event, find, indent=2)
    if len(back) > 1:
        lines += ["Back to where it began:", *back]
    forward = _forward(analysis, event, find)
    if forward:
        lines += ["", "What came of it:", *forward]
    return lines


def _text(event: Event, find: Callable[[str], Tracepoint | None]) -> str:
    return format_args(event, find(event.event))


# Where a chain of causes takes another turn than the reader expects.
_TURNS = (HOST_OP, DIRECT_RECLAIM, "vmscan:mm_vmscan_kswapd_wake", BRACKET)


def _prose(analysis: Analysis, event: Event, find: Callable[[str], Tracepoint | None]) -> str:
    said = [sentence(event, find)]
    zap = analysis.killer(event) or (event if event.event == SPTE_ZAP else None)
    if zap is not None and zap is not event:
        earlier = duration(event.ts - zap.ts)
        said.append(f"the mapping had been there until {earlier} earlier, when {sentence(zap, find)}")
    chain = analysis.chain(zap or event)[:-1]
    told = [chain[0], *(link for link in chain[1:] if link.event in _TURNS)] if chain else []
    for count, link in enumerate(told):
        said.append(f"{'then' if count else 'it began with'} #{link.seq}: {sentence(link, find)}")
    if not chain and zap is None and event.event == PAGE_FAULT:
        said.append("nothing in this trace had taken a mapping away: a first touch, or a missing right")
    answers = analysis.answers(event.seq)
    if event.event == SPTE_ZAP:
        said.append(
            f"the page was wanted again {duration(answers[0].ts - event.ts)} later (#{answers[0].seq})"
            if answers
            else "nobody has touched the page since"
        )
    names = {"vCPU", *(link.task for link in (event, *chain))}
    return " ".join(f"{_capital(clause, names)}." for clause in said)


def _capital(clause: str, names: set[str]) -> str:
    # A task bears its own name, also where a sentence begins.
    own = any(clause.startswith((f"{name} ", f"{name}:")) for name in names)
    return clause if own else clause[0].upper() + clause[1:]


def _back(
    analysis: Analysis, event: Event, find: Callable[[str], Tracepoint | None], indent: int
) -> list[str]:
    lines: list[str] = []
    zap = analysis.killer(event)
    if zap is not None:
        lines += _back(analysis, zap, find, indent)
        lines.append(" " * indent + f"... {duration(event.ts - zap.ts)} later, its mapping gone:")
    for depth, link in enumerate(analysis.chain(event)):
        lead = " " * indent + ("   " * depth) + ("" if depth == 0 else "-> ")
        lines.append(f"{lead}#{link.seq} {link.event}  {_text(link, find)}  [{link.task}]")
    return lines


def _forward(analysis: Analysis, event: Event, find: Callable[[str], Tracepoint | None]) -> list[str]:
    below = sorted(analysis.descendants(event.seq), key=lambda below: below.seq)
    zaps = [e for e in (event, *below) if e.event == SPTE_ZAP]
    lines = [f"  #{e.seq} {e.event}  {_text(e, find)}" for e in below[:STORY_LINES]]
    if len(below) > STORY_LINES:
        lines.append(f"  ... and {len(below) - STORY_LINES} more events below it")
    answers = [(zap, fault) for zap in zaps for fault in analysis.answers(zap.seq)]
    for zap, fault in answers[:STORY_LINES]:
        later = duration(fault.ts - zap.ts)
        lines.append(f"  refault of zap #{zap.seq} {later} later: #{fault.seq} {sentence(fault, find)}")
    if len(answers) > STORY_LINES:
        lines.append(f"  ... and {len(answers) - STORY_LINES} more refaults")
    if zaps:
        lines.append(f"  {len(zaps)} zap{'s' * (len(zaps) != 1)}, {len(answers)} answered by a refault")
    return lines
