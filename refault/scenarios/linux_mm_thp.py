"""Scenarios of transparent huge pages, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import DATA_SIZE, PAGE, PROT_READ, Scenario

__all__: list[str] = []

HUGE = 0x20_0000


@scenario(thp=True, guest_pages="2M")
def thp(s: Scenario) -> None:
    """A huge page is made by a fault, parted by DONTNEED and mprotect of 4 KiB, and collapsed again."""
    s.madv(0, DATA_SIZE, "HUGEPAGE")
    s.st(0x3000, 1, "first touch THP")
    s.st(0x100000, 1, "same 2M")
    s.ld(0x200000, "read: huge zero page")
    s.st(0x200000, 1)
    s.madv(0x3000, PAGE, "DONTNEED")
    s.ld(0x4000, "after split")
    s.ld(0x3000)
    s.st(0x3000, 1)
    s.st(0x5000, 5)
    s.madv(0, HUGE, "COLLAPSE")
    s.ld(0x4000, "after collapse")
    s.ld(0x3000)
    s.mprotect(0x203000, PAGE, PROT_READ, "mprotect 4K in THP")
    s.ld(0x200000)
    s.st(0x203000, 1)


@scenario(guest_pages="2M")
def collapse(s: Scenario) -> None:
    """MADV_COLLAPSE of small pages: one bracket of 2 MiB, over before anything is copied."""
    for page in range(512):
        s.backend.host_write(page * PAGE, page + 1)
    # The recording's process was on khugepaged's round long since, so that its advice woke nobody.
    s.backend.madvise(3 * HUGE, HUGE, "HUGEPAGE")
    s.idle(1_000_000)
    s.begin()
    s.ld(0x3000)
    s.st(0x4000, 5)
    s.backend.madvise(0, DATA_SIZE, "HUGEPAGE")
    s.madv(0, HUGE, "COLLAPSE")
    s.ld(0x3000)
    s.st(0x5000, 6)


@scenario(file="memfd", thp=True, guest_pages="2M", params={"thp.shmem_enabled": "always"})
def shmem_thp(s: Scenario) -> None:
    """A hole of 4 KiB splits a huge page of a file into pieces as large as can be; COLLAPSE joins them."""
    s.ld(0x3000, "first touch read")
    s.st(0x3000, 1)
    s.st(0x5000, 2, "same 2M")
    s.st(0x203000, 3, "first touch write")
    s.punch_hole(0x3000, PAGE, "PUNCH_HOLE 4K at 0x3000")
    s.ld(0x4000, "neighbour")
    s.ld(0x3000, "hole")
    s.st(0x3000, 4)
    s.madv(0, HUGE, "COLLAPSE")
    s.ld(0x4000)
    s.st(0x3000, 5)
    s.mprotect(0x203000, PAGE, PROT_READ)
    s.ld(0x204000)
    s.ld(0x203000)
    s.madv(HUGE, HUGE, "DONTNEED")
    s.ld(0x204000, "still in page cache")
