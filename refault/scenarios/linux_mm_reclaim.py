"""Scenarios of reclaim and access tracking, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import PAGE, Scenario

__all__: list[str] = []

MS = 1_000_000


@scenario()
def damon(s: Scenario) -> None:
    """DAMON makes a page old through the notifier every 5 ms, and asks about its only page just once."""
    for i in range(256):
        s.backend.store(i * PAGE, i)
    s.begin()
    s.damon_on(0x3000)
    s.idle(6 * MS)
    s.ld(0x3000)
    s.idle(6 * MS)
    s.ld(0x3000)
    s.idle(7 * MS)
    # The recording's thread slept longer here, and the fifth sample fell into the step.
    s.ld(0x3000, takes=2 * MS)
    s.idle(6 * MS)
    s.ld(0x3000)
    s.idle(32 * MS, "idle (guest does not touch)")
    s.damon_off()
    s.ld(0x3000)


def _pageout(s: Scenario) -> None:
    s.st(0x3000, 0x11)
    s.st(0x4000, 0x22)
    s.st(0x5000, 0x33)
    s.ld(0x6000)
    s.madv(0x3000, PAGE, "PAGEOUT")
    s.ld(0x3000, "swap in by read")
    s.st(0x3000, 0x12)
    s.madv(0x4000, 3 * PAGE, "PAGEOUT")
    s.st(0x4000, 0x23, "swap in by write")
    s.hr(0x5000)
    s.ld(0x5000)


@scenario()
def pageout_swapfile(s: Scenario) -> None:
    """MADV_PAGEOUT fires one bracket a page and skips the zero page; a page comes back writable."""
    _pageout(s)


@scenario(params={"swap.device": "zram"})
def pageout_zram(s: Scenario) -> None:
    """The same through compressed RAM, whose requests are done at once and pass the swap cache by."""
    _pageout(s)


@scenario(params={"swap.device": "zram"})
def memcg_reclaim(s: Scenario) -> None:
    """A group that nobody is in any more is reclaimed without asking who used its pages.

    The recording's VMM had pages of its own in the group, which no slot shows. How many those were, and when
    they came, is not in the recording: here they are so that both limits take as many pages of D as there.
    """
    s.backend.memcg_enter()
    for i in range(0x400):
        if i == 0xE1:
            s.backend.own_pages(15)
        s.backend.host_write(i * PAGE, i + 1)
    s.backend.own_pages(7)
    s.backend.memcg_leave()
    s.begin()
    s.st(0x3000, 1)
    s.st(0x3000, 1)
    s.memcg_limit(256, "memory.limit_in_bytes = usage - 1M")
    s.st(0x80000, 1)
    s.st(0x8000, 1, "swapped out")
    s.memcg_limit(16, "limit -= 64K")
    s.pages_gone(0x400)
    s.ld(0x3000)


@scenario(params={"swap.device": "zram"}, repeats="by chance")
def memcg_age(s: Scenario) -> None:
    """Reclaim in the group of the process asks who used a page, page by page, before it takes one."""
    s.backend.memcg_enter()
    for i in range(0x400):
        s.backend.host_write(i * PAGE, i + 1)
    s.begin()
    s.st(0x3000, 1)
    s.st(0x8000, 1)
    s.memcg_squeeze(128, "limit = usage - 512K")
    s.ld(0x3000)
    s.st(0x3000, 2)
    s.memcg_squeeze(128, "limit = usage - 512K again")
    s.ld(0x3000)
