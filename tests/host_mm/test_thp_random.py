"""Huge pages under random operations and random preemption keep the bytes that an oracle expects."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE, get_user_page_fast_only
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.huge_memory_split import deferred_split_scan, split_huge_pages
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_COLD, MADV_DONTNEED, MADV_HUGEPAGE, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mlock import do_mlock, do_munlock
from host_mm.mmap import PROT_READ, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_MAYMOVE, do_mremap
from host_mm.page import put_page, set_page_dirty
from host_mm.process import Process
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, Recorder, make_host

BASE = 0x7F0000000000
PAGES = 1536
WHOLE = 512 * PAGE


class Oracle:
    """Processes with three huge pages each, and what the first word of each page of theirs is."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.host = make_host(
            ram=48 << 20, swap=16 << 20, nodes=2, params={"khugepaged.max_ptes_none": "100"},
        )
        self.models: list[tuple[Process, dict[int, int]]] = [(self.host.create_process("first"), {})]
        self.notifier = Recorder()
        mm = self.models[0][0].mm
        mmu_notifier_register(self.notifier, mm)
        do_mmap(mm, BASE, PAGES * PAGE, RW, ANON)
        do_madvise(mm, BASE, PAGES * PAGE, MADV_HUGEPAGE)
        self.stamp = 0

    def span(self) -> tuple[int, int]:
        """Whole huge pages as often as parts."""
        if self.rng.random() < 0.5:
            return self.rng.randrange(3) * 512, 512
        first = self.rng.randrange(PAGES)
        return first, min(self.rng.choice((1, 3, 100)), PAGES - first)

    def write(self, process: Process, data: dict[int, int]) -> None:
        first, nr = self.span()
        for page in range(first, first + nr, self.rng.choice((1, 7, 64))):
            self.stamp += 1
            data[page] = self.stamp
            copy_to_user(process, BASE + page * PAGE, self.stamp.to_bytes(8, "little"))

    def dontneed(self, process: Process, data: dict[int, int]) -> None:
        first, nr = self.span()
        do_madvise(process.mm, BASE + first * PAGE, nr * PAGE, MADV_DONTNEED)
        for page in range(first, first + nr):
            data.pop(page, None)

    def remap(self, process: Process, data: dict[int, int]) -> None:
        first, nr = self.span()
        try:
            at = do_mremap(process.mm, BASE + first * PAGE, nr * PAGE, 2 * nr * PAGE, MREMAP_MAYMOVE)
        except KernelError:
            # The range is of more than one VMA.
            return
        for page in range(nr):
            word = copy_from_user(process, at + page * PAGE, 8)
            assert int.from_bytes(word, "little") == data.pop(first + page, 0)
        do_munmap(process.mm, at, 2 * nr * PAGE)
        do_mmap(process.mm, BASE + first * PAGE, nr * PAGE, RW, ANON)
        do_madvise(process.mm, BASE, PAGES * PAGE, MADV_HUGEPAGE)

    def protect(self, process: Process, data: dict[int, int]) -> None:
        first, nr = self.span()
        do_mprotect(process.mm, BASE + first * PAGE, nr * PAGE, PROT_READ)
        with pytest.raises(KernelError, match="EFAULT"):
            copy_to_user(process, BASE + first * PAGE, b"x")
        do_mprotect(process.mm, BASE, PAGES * PAGE, RW)

    def advise(self, process: Process, data: dict[int, int]) -> None:
        first, nr = self.span()
        do_madvise(process.mm, BASE + first * PAGE, nr * PAGE, self.rng.choice((MADV_COLD, MADV_PAGEOUT)))

    def split(self, process: Process, data: dict[int, int]) -> None:
        first, nr = self.span()
        split_huge_pages(process.mm, BASE + first * PAGE, BASE + (first + nr) * PAGE)

    def migrate(self, process: Process, data: dict[int, int]) -> None:
        pages = self.rng.sample(range(PAGES), 3)
        move_pages(process, [BASE + page * PAGE for page in pages], [self.rng.randrange(2)] * 3)

    def lock(self, process: Process, data: dict[int, int]) -> None:
        first, nr = self.span()
        do_mlock(process.mm, BASE + first * PAGE, nr * PAGE)
        do_munlock(process.mm, BASE, PAGES * PAGE)

    def fork(self, process: Process, data: dict[int, int]) -> None:
        if len(self.models) < 3:
            self.models.append((fork_process(process), dict(data)))

    def exit(self, process: Process, data: dict[int, int]) -> None:
        if len(self.models) > 1 and process is not self.models[0][0]:
            self.models.remove((process, data))
            exit_process(process)

    def pressure(self, process: Process, data: dict[int, int]) -> None:
        for nid in range(2):
            deferred_split_scan(self.host, nid, 8)
        clear_refs_write(process.mm, self.rng.choice((1, 4)))

    def step(self) -> None:
        """One operation, and a look at a few pages."""
        actions = (
            self.write, self.write, self.write, self.dontneed, self.remap, self.protect, self.advise,
            self.split, self.migrate, self.lock, self.fork, self.exit, self.pressure,
        )
        action = self.rng.choice(actions)
        action(*self.rng.choice(self.models))
        for process, data in self.models:
            for page in self.rng.sample(range(PAGES), 5):
                self.compare(process, data, page)

    def compare(self, process: Process, data: dict[int, int], page: int) -> None:
        assert int.from_bytes(copy_from_user(process, BASE + page * PAGE, 8), "little") == data.get(page, 0)

    def finish(self) -> None:
        """Compare everything, then let everybody go."""
        for process, data in self.models:
            for page in range(PAGES):
                self.compare(process, data, page)
        for process, _ in self.models:
            exit_process(process)


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_keep_every_byte(seed: int) -> None:
    oracle = Oracle(seed)
    host = oracle.host
    for _ in range(40):
        host.sched.run_task("step", oracle.step)
        host.sched.run_task("drain", host.lru.lru_add_drain_all)
        host.sched.run_task("io", host.swap_device.drain)
        assert oracle.notifier.depth == 0
        audit(host)
    host.sched.run_task("finish", oracle.finish)
    host.sched.run_task("io", host.swap_device.drain)
    audit(host)


class Race:
    """Writers that each own a word of every fourth page, beside those who split, move and swap out."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.host = make_host(ram=24 << 20, swap=8 << 20, nodes=2)
        self.host.sched.lockdep = {}
        self.process = self.host.create_process("racer")
        mm = self.process.mm
        mmu_notifier_register(Recorder(), mm)
        self.host.sched.run_task("map", lambda: do_mmap(mm, BASE, WHOLE, RW, ANON))
        self.host.sched.run_task("advise", lambda: do_madvise(mm, BASE, WHOLE, MADV_HUGEPAGE))
        self.left = 0

    def spawn(self, name: str, body: Callable[[random.Random], None]) -> None:
        rng = random.Random(f"{self.seed} {name}")

        def run() -> None:
            body(rng)
            self.left -= 1

        self.left += 1
        self.host.sched.spawn(name, run)

    def writer(self, word: int, rng: random.Random) -> None:
        mm, expected = self.process.mm, dict.fromkeys(range(0, 512, 4), 0)
        for _ in range(60):
            page = rng.choice(list(expected))
            address = BASE + page * PAGE + word * 8
            expected[page] = rng.getrandbits(60)
            kind = rng.randrange(3)
            if kind == 0:
                self._dma(address, expected[page])
            elif kind == 1 and (pfn := get_user_page_fast_only(mm, address, FOLL_WRITE)) >= 0:
                self.host.ram.u64[((pfn << 12) + address % PAGE) >> 3] = expected[page]
                set_page_dirty(self.host, pfn)
                put_page(self.host, pfn)
            else:
                copy_to_user(self.process, address, expected[page].to_bytes(8, "little"))
            self._compare(address, expected[page])
        for page, value in expected.items():
            self._compare(BASE + page * PAGE + word * 8, value)

    def _dma(self, address: int, value: int) -> None:
        pfn = pin_user_page(self.process.mm, address, FOLL_WRITE)
        assert pfn >= 0
        self.host.sched.point("dma")
        self.host.ram.u64[((pfn << 12) + address % PAGE) >> 3] = value
        set_page_dirty(self.host, pfn)
        unpin_user_page(self.host, pfn)

    def _compare(self, address: int, value: int) -> None:
        assert int.from_bytes(copy_from_user(self.process, address, 8), "little") == value

    def disturber(self, rng: random.Random) -> None:
        mm = self.process.mm
        while self.left > 2:
            kind = rng.randrange(7)
            with suppress(KernelError):
                if kind == 0:
                    split_huge_pages(mm, BASE, BASE + PAGE)
                elif kind == 1:
                    move_pages(self.process, [BASE + rng.randrange(512) * PAGE], [rng.randrange(2)])
                elif kind == 2:
                    do_madvise(mm, BASE, WHOLE, MADV_PAGEOUT)
                elif kind == 3:
                    exit_process(fork_process(self.process))
                elif kind == 4:
                    do_madvise(mm, BASE + (rng.randrange(128) * 4 + 1) * PAGE, PAGE, MADV_DONTNEED)
                elif kind == 5:
                    deferred_split_scan(self.host, rng.randrange(2), 4)
                else:
                    clear_refs_write(mm, rng.choice((1, 4)))
            self.host.sched.point("disturber")


@pytest.mark.parametrize("seed", range(12))
def test_writers_keep_what_they_wrote_beside_splits_migration_swap_and_fork(seed: int) -> None:
    race = Race(seed)
    host = race.host
    host.sched.set_strategy(RandomStrategy(seed, period=2 + seed % 8))
    for word in range(3):
        race.spawn(f"writer {word}", lambda rng, word=word: race.writer(word, rng))
    for n in range(2):
        race.spawn(f"disturber {n}", race.disturber)
    host.sched.run_until(lambda: race.left == 0)
    host.sched.set_strategy(None)
    host.sched.run_task("exit", lambda: exit_process(race.process))
    host.sched.run_task("io", host.swap_device.drain)
    host.sched.run_task("drain", host.lru.lru_add_drain_all)
    audit(host)
