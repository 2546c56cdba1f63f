"""What host operations cost a page they touch, and that it does not depend on how many pages are mapped.

Two machines alike but for the memory of the VMM that is populated beside the pages that the operation
touches: 16 MiB and 1 GiB. Each ratio is taken in turns within one run. fork copies every entry, so its
page is a page that is mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.lab import GPA, Lab
from bench.report import Group, Measure
from bench.timing import in_turns
from host_mm.gup_populate import mm_populate

__all__ = ["GROUP", "PAGES", "measure", "populated"]

PAGES = 512
FEW, MANY = 16 << 20, 1 << 30
BALLAST = 64 << 20
"""Where the populated memory begins, beyond the pages that are touched."""
ROUNDS = 5


def populated(size: int) -> Lab:
    """A machine whose VMM has `size` bytes mapped that nothing here touches."""
    lab = Lab(memory="1280M", host_ram="4G", swap="64M")
    board = lab.vm.board
    hva = board.memory.hva(BALLAST)
    board.host.sched.run_task("populate", lambda: mm_populate(board.process.mm, hva, size))
    return lab


def _touched(lab: Lab, name: str) -> Callable[[], object]:
    operation = getattr(lab.vm.host, name)
    return lambda: operation(gpa=GPA, pages=PAGES)


def _per_page(labs: dict[str, Lab], name: str) -> dict[str, float]:
    """Microseconds a touched page, on each machine."""
    runs: dict[str, Callable[[], object]] = {}
    for key, lab in labs.items():
        # The guest uses the pages first, so that they are there and KVM maps them.
        runs[f"{key} before"] = partial(lab.write_pages, PAGES)
        runs[key] = _touched(lab, name)
    times = in_turns(runs, ROUNDS)
    return {key: min(times[key]) / PAGES * 1e6 for key in labs}


def _fork(labs: dict[str, Lab]) -> dict[str, float]:
    """Microseconds a mapped page, on each machine."""
    mapped = {key: sum(lab.vm.board.process.mm.rss) for key, lab in labs.items()}
    runs: dict[str, Callable[[], object]] = {}
    for key, lab in labs.items():
        runs[key] = lab.vm.host.fork
        runs[f"{key} after"] = lab.vm.host.child_exit
    times = in_turns(runs, 2)
    return {key: min(times[key]) / mapped[key] * 1e6 for key in labs}


def measure() -> dict[str, float]:
    """All of the group's numbers."""
    values: dict[str, float] = {}
    with populated(FEW) as few, populated(MANY) as many:
        labs = {"few": few, "many": many}
        for name in ("swap_out", "migrate", "dontneed", "age"):
            cost = _per_page(labs, name)
            values[f"{name}_page"] = cost["few"]
            values[f"{name}_mapped"] = cost["many"] / cost["few"]
        cost = _fork(labs)
        values["fork_page"] = cost["few"]
        values["fork_mapped"] = cost["many"] / cost["few"]
    return values


def _measures(name: str, page: str) -> tuple[Measure, Measure]:
    return (
        Measure(f"{name}_page", "us", f"{name}: {page}"),
        Measure(f"{name}_mapped", "", "the same with 1 GiB mapped / with 16 MiB mapped"),
    )


GROUP = Group(
    "hostops",
    (
        *_measures("swap_out", "a page that the guest uses goes to the swap file"),
        *_measures("migrate", "a page that the guest uses moves to another node"),
        *_measures("dontneed", "a page that the guest uses is dropped"),
        *_measures("age", "a page is found young, in the host's tables and in KVM's"),
        *_measures("fork", "a mapped page is shared with the child"),
    ),
    measure,
)
