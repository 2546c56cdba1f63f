"""Random operations of several processes with ksmd, reclaim and migration beside them, against an oracle."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.host import HostMm
from host_mm.kernel.sched import RandomStrategy
from host_mm.ksm import run_store
from host_mm.ksm_types import KSM_RUN_MERGE, KSM_RUN_STOP, KSM_RUN_UNMERGE
from host_mm.madvise import MADV_DONTNEED, MADV_MERGEABLE, MADV_PAGEOUT, MADV_UNMERGEABLE, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, do_mmap
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, RW, make_host
from trace_events.event import Event
from trace_events.stream import Listener

BASE = 0x10000000
PAGES = 24
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
CONTENTS = [bytes([byte]) * PAGE for byte in (0, 0, 1, 2, 3)]


class Actor:
    """One process and what its pages must hold."""

    def __init__(self, host: HostMm, seed: int, process: Process, data: dict[int, bytes]) -> None:
        self.host = host
        self.rng = random.Random(seed)
        self.process = process
        self.data = data
        self.forks = 0

    def _span(self) -> tuple[int, int]:
        first = self.rng.randrange(PAGES)
        return first, min(PAGES, first + self.rng.choice((1, 2, 8, PAGES)))

    def _advise(self, advice: int) -> tuple[int, int]:
        first, last = self._span()
        do_madvise(self.process.mm, BASE + first * PAGE, (last - first) * PAGE, advice)
        return first, last

    def write_page(self) -> None:
        page = self.rng.randrange(PAGES)
        self.data[page] = self.rng.choice(CONTENTS)
        copy_to_user(self.process, BASE + page * PAGE, self.data[page])

    def write_word(self) -> None:
        page, at = self.rng.randrange(PAGES), self.rng.randrange(PAGE - 8)
        word = bytes([self.rng.randrange(3)]) * 8
        old = self.data.get(page, CONTENTS[0])
        self.data[page] = old[:at] + word + old[at + 8 :]
        copy_to_user(self.process, BASE + page * PAGE + at, word)

    def read(self) -> None:
        self.check(self.rng.randrange(PAGES))

    def check(self, page: int) -> None:
        found = copy_from_user(self.process, BASE + page * PAGE, PAGE)
        assert found == self.data.get(page, CONTENTS[0]), f"pid {self.process.pid} page {page}"

    def dontneed(self) -> None:
        first, last = self._advise(MADV_DONTNEED)
        for page in range(first, last):
            self.data.pop(page, None)

    def pageout(self) -> None:
        self._advise(MADV_PAGEOUT)

    def merge(self) -> None:
        self._advise(MADV_MERGEABLE)

    def unmerge(self) -> None:
        self._advise(MADV_UNMERGEABLE)

    def migrate(self) -> None:
        first, last = self._span()
        node = self.rng.randrange(2)
        hvas = [BASE + page * PAGE for page in range(first, last)]
        move_pages(self.process, hvas, [node] * len(hvas), move_all=True)

    def reclaim(self) -> None:
        self.host.lru.lru_add_drain_all()
        self.host.reclaim(0, self.rng.randrange(2))

    def fork(self) -> None:
        """A child that writes a little, is checked, and ends."""
        child = Actor(self.host, self.rng.randrange(1 << 30), fork_process(self.process), dict(self.data))
        for _ in range(12):
            child.rng.choice((child.write_page, child.read, child.migrate, child.reclaim, child.read))()
        for page in range(PAGES):
            child.check(page)
        exit_process(child.process)

    def sleep(self) -> None:
        self.host.sched.sleep(4_000_000)

    def run_knob(self) -> None:
        run_store(self.host, self.rng.choice((KSM_RUN_STOP, KSM_RUN_UNMERGE, KSM_RUN_MERGE)))
        run_store(self.host, KSM_RUN_MERGE)

    def step(self) -> None:
        plain: tuple[Callable[[], None], ...] = (self.write_page, self.write_word, self.read, self.sleep)
        rare = (
            self.dontneed, self.pageout, self.merge, self.merge, self.unmerge, self.migrate, self.reclaim,
            self.fork, self.run_knob, *[self.sleep] * 8,
        )
        self.rng.choice((*plain * 3, *rare))()


@pytest.mark.parametrize("zero_pages", [False, True], ids=["pages", "zero-pages"])
@pytest.mark.parametrize("seed", range(6))
def test_merging_never_shows_and_leaves_nothing(seed: int, zero_pages: bool) -> None:
    host = make_host(ram=4 << 20, swap=4 << 20)
    host.sched.lockdep = {}
    host.ksm.use_zero_pages = zero_pages
    host.ksm.sleep_millisecs = 1
    host.ksm.max_page_sharing = 6
    host.ksm.smart_scan = bool(seed % 2)
    host.sched.set_strategy(RandomStrategy(seed, period=4))
    actors: list[Actor] = []
    merges = left = 0

    def merged(event: Event) -> None:
        nonlocal merges
        merges += not event.args["err"]

    host.stream.listen(Listener(["ksm:ksm_merge_with_ksm_page", "ksm:ksm_merge_one_page"], merged))

    def begin() -> None:
        for number in range(3):
            process = host.create_process(f"p{number}")
            do_mmap(process.mm, BASE, PAGES * PAGE, RW, ANON)
            actors.append(Actor(host, seed * 10 + number, process, {}))
            for _ in range(PAGES):
                actors[-1].write_page()
            do_madvise(process.mm, BASE, PAGES * PAGE, MADV_MERGEABLE)
        run_store(host, KSM_RUN_MERGE)

    def body(actor: Actor) -> None:
        nonlocal left
        for _ in range(200):
            actor.step()
        left -= 1

    def finish() -> None:
        run_store(host, KSM_RUN_STOP)
        for actor in actors:
            for page in range(PAGES):
                actor.check(page)
        host.quiesce()
        audit(host)
        for actor in actors:
            exit_process(actor.process)
        run_store(host, KSM_RUN_MERGE)
        while host.ksm.mm_slots:
            host.sched.sleep(1_000_000)
        host.quiesce()
        audit(host)

    host.sched.run_task("begin", begin)
    left = len(actors)
    for actor in actors:
        host.sched.spawn(f"task{actor.process.pid}", lambda actor=actor: body(actor))
    host.sched.run_until(lambda: left == 0)
    host.sched.run_task("finish", finish)
    assert merges > 20
    assert not host.mms
    assert host.ksm.ksm_rmap_items == host.ksm.ksm_zero_pages == 0
