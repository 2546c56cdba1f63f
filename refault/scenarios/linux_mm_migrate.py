"""Scenarios of migration and compaction, as they were run on a real Linux 6.18.

What compaction moves, and in which order, follows from where pages lie: it goes from the zone's bottom up,
block by block, moves the highest frame of a batch first, and ends where it meets the scanner that comes from
the top. So a scenario first arranges the frames as they lay on the recording's machine.

The recordings got a page with a low frame by moving it into D from a large buffer (mremap), so that it has a
VMA of its own there; fork brackets that one alone, as nothing of the rest was ever written.
"""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import PAGE, Scenario

__all__: list[str] = []

SLOT0 = 0xA00000


@scenario()
def migrate(s: Scenario) -> None:
    """A page that is on the node already is not moved; mbind of part of a VMA splits it all the same."""
    s.st(0x3000, 1)
    s.st(0x4000, 1)
    s.move_pages(0x3000, 0, "move_pages(node0, MOVE_ALL)")
    s.ld(0x3000)
    s.mbind(0x3000, PAGE, 0, "mbind(BIND node0, MPOL_MF_MOVE)")
    s.ld(0x3000)


@scenario(repeats="but for slot 0")
def migrate_real(s: Scenario) -> None:
    """A page that compaction moves is unmapped once; the guest reads its bytes from the new frame."""
    s.bring_in(0x3000, 0x55)
    s.arrange([0x3000])
    s.begin()
    s.ld(0x3000)
    s.compact_memory(watch=0x3000)
    s.ld(0x3000, "after migration")
    s.st(0x3000, 2)


@scenario(repeats="but for slot 0")
def migrate_swapro(s: Scenario) -> None:
    """The same with a page that a child shares: KVM is told for the VMM's mapping alone."""
    s.bring_in(0x3000, 0x55)
    s.arrange([0x3000])
    s.begin()
    s.ld(0x3000)
    s.fork()
    s.ld(0x3000)
    s.compact_memory(watch=0x3000)
    s.ld(0x3000, "after migration")
    s.st(0x3000, 2)
    s.child_exit()


@scenario(repeats="but for frames")
def compact(s: Scenario) -> None:
    """Compaction unmaps what it moves page by page, the guest's tables too; what lies above stays."""
    for page in range(64):
        s.backend.store(page * PAGE, page)
    s.arrange(
        [*(SLOT0 + at for at in (0x3000, 0x10000, 0x11000, 0x12000, 0x13000, 0x4000)), 0x3000],
        [page * PAGE for page in (4, 0, 5, 6, 7, 1, 8, 9, 10, 2, 11)],
    )
    s.begin()
    moved = s.compact_memory_under(range(0, 64 * PAGE, PAGE))
    for page in moved[:3]:
        s.ld(page, "migrated")
    s.ld(63 * PAGE)
