"""Scenarios of huge pages of hugetlbfs, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import PAGE, PROT_READ, PROT_RW, Scenario

__all__: list[str] = []

HUGE = 0x20_0000


@scenario(hugetlb="private", guest_pages="2M", params={"hugetlb.nr_hugepages": "10"})
def hugetlb_2m(s: Scenario) -> None:
    """fork brackets the whole mapping, a write copies 2 MiB, and what would cut a huge page is refused."""
    s.ld(0x3000, "first touch read")
    s.st(0x3000, 1)
    s.st(0x4000, 2, "same huge page")
    s.st(0x203000, 3, "first touch write")
    s.fork()
    s.ld(0x3000, "after fork")
    s.st(0x3000, 4, "COW")
    s.ld(0x203000)
    s.child_exit()
    s.st(0x203000, 5, "child gone")
    s.mprotect(0x203000, PAGE, PROT_READ)
    s.mprotect(HUGE, HUGE, PROT_READ)
    s.ld(0x203000)
    s.st(0x203000, 1)
    s.mprotect(HUGE, HUGE, PROT_RW)
    s.st(0x203000, 6)
    s.madv(HUGE, HUGE, "DONTNEED")
    s.ld(0x203000)
    s.madv(0x3000, PAGE, "DONTNEED")
    s.ld(0x3000)


@scenario(hugetlb="shared", guest_pages="2M", params={"hugetlb.nr_hugepages": "6"})
def hugetlb_shared(s: Scenario) -> None:
    """A hole of whole huge pages unmaps them, one of 4 KiB tells nobody; fork leaves shared pages alone."""
    s.ld(0x3000)
    s.st(0x3000, 1)
    s.st(0x203000, 2)
    s.punch_hole(HUGE, HUGE, "PUNCH_HOLE 2M at 0x200000")
    s.ld(0x203000)
    s.punch_hole(0x3000, PAGE, "PUNCH_HOLE 4K at 0x3000")
    s.ld(0x3000)
    s.fork()
    s.st(0x3000, 3)
    s.child_exit()
    s.mprotect(0, HUGE, PROT_READ)
    s.ld(0x3000)
    s.mprotect(0, HUGE, PROT_RW)
    s.st(0x3000, 4)
    s.ftruncate(HUGE, "ftruncate 2M")
    s.ld(0x203000, "beyond EOF")
