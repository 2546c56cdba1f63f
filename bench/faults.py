"""What a VM exit, a refault, a COW, a swap-in and a zap cost."""

from __future__ import annotations

from collections.abc import Callable

from bench.lab import GPA, Lab
from bench.report import Group, Measure
from bench.timing import best

__all__ = ["FAULTS", "TRACING", "resident_refault"]

PAGES = 512


def _per_page(lab: Lab, run: Callable[[], None], before: Callable[[], None], rounds: int = 7) -> float:
    """Microseconds a page, of which the guest's own loop is not part."""
    before()
    run()
    warm = best(run, rounds=3)
    return (best(run, before, rounds) - warm) / PAGES * 1e6


def resident_refault(lab: Lab) -> float:
    """Microseconds from an access that finds no SPTE to the next instruction; the frame is there."""
    lab.write_pages(PAGES)
    return _per_page(lab, lambda: lab.read_pages(PAGES), lambda: lab.bracket(PAGES))


def _zero_page_cow(lab: Lab) -> float:
    def before() -> None:
        lab.vm.host.dontneed(gpa=GPA, pages=PAGES)
        lab.read_pages(PAGES)

    return _per_page(lab, lambda: lab.write_pages(PAGES), before)


def _swap_refault(lab: Lab) -> float:
    def before() -> None:
        lab.write_pages(PAGES)
        lab.vm.host.swap_out(gpa=GPA, pages=PAGES)

    return _per_page(lab, lambda: lab.read_pages(PAGES), before)


def _zap(lab: Lab) -> float:
    lab.write_pages(PAGES)
    full = best(lambda: lab.bracket(PAGES), lambda: lab.read_pages(PAGES), 7)
    return (full - best(lambda: lab.bracket(PAGES))) / PAGES * 1e6


def faults() -> dict[str, float]:
    """Microseconds of each kind, and of a refault with the truths on."""
    values = {}
    with Lab() as lab:
        values["resident_refault"] = resident_refault(lab)
        values["zero_page_cow"] = _zero_page_cow(lab)
        values["swap_refault"] = _swap_refault(lab)
        values["range_zap"] = _zap(lab)
    with Lab(check=True) as lab:
        values["resident_refault_checked"] = resident_refault(lab)
        values["swap_refault_checked"] = _swap_refault(lab)
    return values


def _guard_ns(lab: Lab) -> float:
    """Nanoseconds of `if (t := trace.NAME) is not None` while nobody listens."""
    kvm = lab.vm.board.kvm
    times = range(50_000)

    def guarded() -> None:
        for _ in times:
            if (t := kvm.trace.kvm_exit) is not None:
                t()

    def empty() -> None:
        for _ in times:
            pass

    return (best(guarded) - best(empty)) / len(times) * 1e9


def tracing() -> dict[str, float]:
    """What tracepoints cost a resident refault, with nobody and with somebody listening."""
    with Lab() as lab:
        off = resident_refault(lab)
        guard = _guard_ns(lab)
        with lab.vm.trace("*") as events:
            lab.bracket(PAGES)
            events.events.clear()
            lab.read_pages(PAGES)
            fired = len(events) / PAGES
            on = resident_refault(lab)
    return {
        "tracing_off": 1 + fired * guard / (off * 1000), "tracing_on": on / off,
        "events_a_refault": fired, "guard_ns": guard,
    }


FAULTS = Group(
    "faults",
    (
        Measure("resident_refault", "us", "EPT violation on a page whose frame is there, after a zap"),
        Measure("resident_refault_checked", "us", "the same with the truths checked"),
        Measure("zero_page_cow", "us", "write to a page that maps the zero page: fault, COW, bracket, SPTE"),
        Measure("swap_refault", "us", "read of a page that is in the swap file"),
        Measure("swap_refault_checked", "us", "the same with the truths checked"),
        Measure("range_zap", "us", "one SPTE of a notifier bracket over 512 pages"),
    ),
    faults,
)
TRACING = Group(
    "tracing",
    (
        Measure("tracing_off", "", "1 + events of a resident refault x idle guard / resident refault"),
        Measure("tracing_on", "", "resident refault with a listener to everything / without"),
        Measure("events_a_refault", "", "events that a resident refault fires"),
        Measure("guard_ns", "ns", "an idle tracepoint: an attribute test"),
    ),
    tracing,
)
