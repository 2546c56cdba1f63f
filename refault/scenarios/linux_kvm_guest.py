"""Scenarios of guest instructions and guest tables, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import PAGE, Scenario, pte
from refault.scenarios.guest import OUT

__all__: list[str] = []


@scenario()
def fetch_exec(s: Scenario) -> None:
    """A fetch maps the page writable, where the host has it so; a store to it then is no fault."""
    s.poke(0x3000, OUT)
    s.fetch(0x3000)
    s.st(0x3010, 0, "write same page")
    s.fetch(0x3000, "guest fetch again")


@scenario()
def guest_pt_write(s: Scenario) -> None:
    """A page table of the guest's becomes unsync when the guest writes it, until the guest flushes."""
    s.st(0x3000, 1)
    s.ld(0x4000)
    s.st_pte(0x3000, 0, "guest st PTE of D+0x3000 := not present")
    s.st_pte(0x4000, pte(0x5000, 0x67), "guest st PTE of D+0x4000 := gfn of D+0x5000")
    s.load_cr3()
    s.st(0x4000, 2)
    s.hr(0x5000, "host sees D+0x5000")
    s.ld(0x3000, "not-present gpte -> guest #PF")


@scenario()
def guest_nodirty_pte(s: Scenario) -> None:
    """The walk sets the guest's accessed bit, and for a write its dirty bit."""
    for i in (3, 4):
        s.gpte(i * PAGE, 7)
    s.ld(0x3000)
    s.st(0x3000, 1, "sets gpte D")
    s.st(0x4000, 1)


_READ_MODIFY_WRITE = (
    "lock_inc", "inc", "xchg", "cmpxchg_hit", "cmpxchg_miss", "xadd", "bts", "movsb", "stosq", "cmp",
    "prefetchw", "clflush",
)


def _rax(name: str) -> int:
    return 0x77 if name == "cmpxchg_miss" else 0


@scenario()
def guest_rmw_faults(s: Scenario) -> None:
    """What reads and writes walks as a write from the start, also a cmpxchg that fails."""
    for j, name in enumerate(_READ_MODIFY_WRITE):
        at = 0x20000 + j * 0x10000
        s.insn(name, at, "unpopulated", rax=_rax(name), rcx=5)
        s.ld(at + PAGE, "zero page")
        s.insn(name, at + PAGE, "over zero page", rax=_rax(name), rcx=5)
        s.st(at + 2 * PAGE, 0)
    s.fork()
    for j, name in enumerate(("lock_inc", "xchg", "cmpxchg_hit", "cmpxchg_miss", "cmp")):
        at = 0x20000 + j * 0x10000 + 2 * PAGE
        s.insn(name, at, "fork-shared, not mapped in the shadow", rax=_rax(name), rcx=5)
    s.child_exit()


@scenario(repeats="by chance")
def race(s: Scenario) -> None:
    """A guest that stores in a loop faults again each time another thread takes one of its pages away."""
    takes_away = (200_000, "madvise", (0x3000, PAGE, "DONTNEED"))
    s.loop(0x3000, 20_000_000, "guest loop + concurrent DONTNEED", [takes_away] * 40)
