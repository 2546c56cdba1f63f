"""Scenarios of userfaultfd, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import PAGE, Scenario

__all__: list[str] = []


@scenario()
def uffd_missing(s: Scenario) -> None:
    """A missing page comes from a thread of the VMM, with no bracket; a zero page is copied in one."""
    s.uffd(1)
    s.uffd_answer("copy")
    s.ld(0x3000, "missing, read: COPY")
    s.st(0x3000, 1)
    s.st(0x4000, 2, "missing, write: COPY")
    s.uffd_answer("zero")
    s.ld(0x5000, "missing, read: ZEROPAGE")
    s.st(0x5000, 3, "COW of it")
    s.st(0x6000, 4, "missing, write: ZEROPAGE then COW")
    s.madv(0x3000, PAGE, "DONTNEED")
    s.uffd_answer("copy")
    s.ld(0x3000, "missing again")
    s.st(0x3000, 5)
    s.uffd_copy(0x7000, "UFFDIO_COPY ahead of the guest, 0x7000")
    s.ld(0x7000)
