"""Threads of one process under random preemption, with reclaim, migration, fork and rights changes.

Each writer owns one word of every page and must always read back what it stored last, by its own
stores and by pinned DMA. Leaving out one step of the protocol is noticed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_COLD, MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import PROT_READ, do_mmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, Recorder, make_host

BASE = 0x7F0000000000
PAGES = 48


class Race:
    """One host, one process with three writers, two disturbers and a thread that changes rights."""

    def __init__(self, seed: int, profile: MmProfile, breaks: frozenset[str] = frozenset()) -> None:
        self.seed = seed
        self.host = make_host(ram=640 << 10, swap=4 << 20, profile=profile, breaks=breaks)
        self.host.sched.lockdep = {}
        self.host.start_daemons()
        self.process = self.host.create_process("racer")
        # The upper half is the disturbers' playground.
        do_mmap(self.process.mm, BASE, 2 * PAGES * PAGE, RW, ANON)
        mmu_notifier_register(Recorder(), self.process.mm)
        self.left = 0

    def spawn(self, name: str, body: Callable[[random.Random], None]) -> None:
        rng = random.Random(f"{self.seed} {name}")

        def run() -> None:
            body(rng)
            self.left -= 1

        self.left += 1
        self.host.sched.spawn(name, run)

    def writer(self, word: int, rng: random.Random) -> None:
        expected = [0] * PAGES
        for _ in range(50):
            page = rng.randrange(PAGES)
            address = BASE + page * PAGE + word * 8
            if rng.random() < 0.5:
                expected[page] = rng.getrandbits(60)
                if rng.random() < 0.5:
                    copy_to_user(self.process, address, expected[page].to_bytes(8, "little"))
                else:
                    self.dma(address, expected[page])
            self.compare(address, expected[page])
        for page in range(PAGES):
            self.compare(BASE + page * PAGE + word * 8, expected[page])

    def compare(self, address: int, expected: int) -> None:
        assert int.from_bytes(copy_from_user(self.process, address, 8), "little") == expected

    def dma(self, address: int, value: int) -> None:
        """A device writes into a pinned page, some time after it was pinned."""
        pfn = pin_user_page(self.process.mm, address, FOLL_WRITE)
        assert pfn >= 0
        self.host.sched.point("dma")
        self.host.ram.write(pfn << 12 | address & 4095, value.to_bytes(8, "little"))
        unpin_user_page(self.host, pfn, dirty=True)

    def disturber(self, rng: random.Random) -> None:
        mm = self.process.mm
        for _ in range(20):
            first = rng.randrange(PAGES)
            count = min(PAGES - first, rng.choice((1, 3, 20)))
            start, length = BASE + first * PAGE, count * PAGE
            match rng.randrange(6):
                case 0:
                    do_madvise(mm, start, length, MADV_PAGEOUT)
                case 1:
                    do_madvise(mm, start, length, MADV_COLD)
                case 2:
                    for nid in (0, 1):
                        move_pages(self.process, [start + i * PAGE for i in range(count)], [nid] * count)
                case 3:
                    clear_refs_write(mm, rng.choice((1, 4)))
                case 4:
                    self.child(fork_process(self.process), rng)
                case 5:
                    upper = start + PAGES * PAGE
                    do_madvise(mm, upper, length, MADV_DONTNEED)
                    # Refused while the rights thread has a page read-only.
                    with suppress(KernelError):
                        copy_to_user(self.process, upper, bytes(length))

    @staticmethod
    def child(child: Process, rng: random.Random) -> None:
        for _ in range(5):
            copy_to_user(child, BASE + rng.randrange(PAGES) * PAGE, b"of the child")
        exit_process(child)

    def rights(self, rng: random.Random) -> None:
        upper = BASE + PAGES * PAGE
        for _ in range(15):
            page = rng.randrange(PAGES - 8)
            do_mprotect(self.process.mm, upper + page * PAGE, rng.randrange(1, 8) * PAGE, PROT_READ)
            do_mprotect(self.process.mm, upper, PAGES * PAGE, RW)

    def run(self) -> None:
        """Run everybody to the end, then look for leaks."""
        host = self.host
        host.sched.set_strategy(RandomStrategy(self.seed, period=2 + self.seed % 8))
        for word in range(3):
            self.spawn(f"writer{word}", lambda rng, word=word: self.writer(word, rng))
        for name in ("disturber0", "disturber1"):
            self.spawn(name, self.disturber)
        self.spawn("rights", self.rights)
        host.sched.run_until(lambda: not self.left)
        host.sched.set_strategy(None)
        host.sched.run_task("exit", lambda: exit_process(self.process))
        self.process.mm.mmdrop()
        host.sched.run_until(lambda: not host.swap_device.inflight)
        host.lru.lru_add_drain_all()
        for nid in range(2):
            host.sched.run_task("reclaim", lambda nid=nid: host.reclaim(0, nid))
        audit(host)
        assert host.allocator.nr_free_pages() == sum(zone.managed for zone in host.zones)
        assert not any(host.pins.values())


@pytest.mark.parametrize("profile", [LINUX_6_18, LINUX_5_10], ids=lambda profile: profile.name)
@pytest.mark.parametrize("seed", range(8))
def test_no_interleaving_loses_a_store_a_pin_or_a_frame(seed: int, profile: MmProfile) -> None:
    Race(seed, profile).run()


@pytest.mark.parametrize(
    "switch", ["no-fault-recheck", "no-primary-flush", "free-before-flush", "cow-flush-after-unlock"]
)
def test_leaving_out_a_step_is_noticed(switch: str) -> None:
    def survives(seed: int) -> bool:
        try:
            Race(seed, LINUX_6_18, frozenset({switch})).run()
        except (AssertionError, BrokenTruth):
            return False
        return True

    assert not all(survives(seed) for seed in range(25))
