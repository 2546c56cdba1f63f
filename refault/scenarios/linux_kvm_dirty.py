"""Scenarios of dirty tracking, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import Scenario

__all__: list[str] = []


@scenario()
def dirty_log(s: Scenario) -> None:
    """Each get answers the pages that the guest wrote since the last; what the VMM writes is not there."""
    s.st(0x3000, 1)
    s.ld(0x4000)
    s.hw(0x5000, 1)
    s.ld(0x5000)
    s.log_dirty(True)
    s.ld(0x3000)
    s.st(0x3000, 2)
    s.st(0x5000, 2)
    s.st(0x6000, 2)
    s.get_dirty_log()
    s.ld(0x3000)
    s.st(0x3000, 3, "rewrite after log clear")
    s.st(0x3000, 4)
    s.get_dirty_log()
    s.get_dirty_log()
    s.hw(0x7000, 1)
    s.get_dirty_log("GET_DIRTY_LOG (host write not logged)")
    s.log_dirty(False)
    s.st(0x3000, 5)


def _manual(s: Scenario, value: int) -> None:
    s.manual_protect(value)
    s.st(0x3000, 1)
    s.ld(0x4000)
    s.st(0x50000, 1)
    s.log_dirty(True)
    s.count_dirty_log("at start")
    s.st(0x3000, 2, "before any clear")
    s.st(0x5000, 2)
    s.count_dirty_log()
    s.st(0x3000, 3, "after GET only: still writable?")
    s.clear_dirty_log(0, 64, range(64))
    s.st(0x3000, 4, "after clear of its window")
    s.st(0x50000, 4, "other window")
    s.count_dirty_log()
    s.clear_dirty_log(64, 64, range(64, 128))
    s.count_dirty_log()
    s.ld(0x50000)
    s.st(0x50000, 5)
    s.clear_dirty_log(0, 64, [3])
    s.st(0x3000, 6)
    s.st(0x5000, 6, "not in mask")
    s.count_dirty_log()
    s.clear_dirty_log(3, 1, [3])
    s.clear_dirty_log(0, 2048, range(2048))
    s.count_dirty_log()
    s.st(0x3000, 7)
    s.count_dirty_log()
    s.log_dirty(False)
    s.st(0x3000, 8)
    s.st(0x5000, 8)


@scenario()
def manual_dirty(s: Scenario) -> None:
    """Getting a log by hand clears and protects nothing; a clear does, of just the pages of its mask."""
    _manual(s, 1)


@scenario()
def manual_dirty_initset(s: Scenario) -> None:
    """A log that starts full protects nothing until it is cleared."""
    _manual(s, 3)


@scenario(dirty_ring=1024)
def dirty_ring(s: Scenario) -> None:
    """The first write of a page is an entry of the vCPU's ring, and after a reset the next first one."""
    s.ld(0x3000)
    s.st(0x3000, 1)
    s.st(0x4000, 1)
    s.st(0x3000, 2)
    s.dirty_ring("ring (flags,slot,offset)")
    s.reset_dirty_rings()
    s.st(0x3000, 3)
    s.dirty_ring("ring")
