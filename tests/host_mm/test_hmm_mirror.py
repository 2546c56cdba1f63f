"""A mirroring device never keeps a translation that the tables lost (host_mm/hmm_mirror.py, truth 7)."""

from __future__ import annotations

import random
from errno import EFAULT
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import pte_pfn, pte_present, pte_write, walk_lockless
from host_mm.hmm_mirror import HmmMirror
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from trace_events.stream import TraceStream

PAGE = 4096
BASE = 0x10000000
PAGES = 16


def make(**kw: Any) -> tuple[HostMm, Process, HmmMirror]:
    stream = TraceStream()
    host = HostMm(
        Scheduler(stream), stream, ram_bytes=512 * PAGE, swap_bytes=256 * PAGE, checks=True, **kw
    )
    process = host.create_process("p")
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    do_mmap(process.mm, BASE, PAGES * PAGE, PROT_READ | PROT_WRITE, flags)
    mirror = HmmMirror(process)
    mirror.open(BASE, PAGES * PAGE)
    return host, process, mirror


def check(host: HostMm, process: Process, mirror: HmmMirror) -> None:
    """With no bracket open, every translation of the device is one of the tables."""
    if process.mm.notifier_subscriptions.active_invalidate_ranges:
        return
    for vpn, spte in mirror.table.entries.items():
        entry, level = walk_lockless(host.ram, process.mm.pgd, vpn << 12)
        assert level == 1
        assert pte_present(entry)
        assert pte_pfn(entry) == spte >> 1
        assert pte_write(entry) or not spte & 1


def test_the_device_sees_what_the_process_wrote_and_the_other_way_round() -> None:
    host, process, mirror = make()
    copy_to_user(process, BASE, b"cpu")
    assert host.ram.read(mirror.access(BASE, write=False) << 12, 3) == b"cpu"
    host.ram.write(mirror.access(BASE + PAGE, write=True) << 12, b"dev")
    assert copy_from_user(process, BASE + PAGE, 3) == b"dev"
    check(host, process, mirror)


def test_a_bracket_drops_only_what_it_covers() -> None:
    _, process, mirror = make()
    for page in range(4):
        mirror.access(BASE + page * PAGE, write=True)
    do_madvise(process.mm, BASE + PAGE, 2 * PAGE, MADV_DONTNEED)
    assert sorted(mirror.table.entries) == [(BASE >> 12) + page for page in (0, 3)]


def test_the_device_cannot_reach_what_is_not_mapped() -> None:
    _, _, mirror = make()
    with pytest.raises(KernelError) as caught:
        mirror.access(BASE + PAGES * PAGE, write=False)
    assert caught.value.errno == EFAULT


def storm(host: HostMm, process: Process, mirror: HmmMirror, seed: int) -> None:
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    host.sched.set_on_point(lambda kind: check(host, process, mirror))
    left = [2]

    def device(number: int) -> None:
        rng = random.Random(seed * 7 + number)
        for _ in range(150):
            mirror.access(BASE + rng.randrange(PAGES) * PAGE, write=rng.random() < 0.5)
            host.sched.advance(500)
            host.sched.point("device")
        left[0] -= 1

    def kernel() -> None:
        rng = random.Random(seed)
        while left[0]:
            first = rng.randrange(PAGES)
            count = rng.randrange(1, PAGES + 1 - first)
            what = rng.randrange(3)
            if what == 0:
                do_madvise(process.mm, BASE + first * PAGE, count * PAGE, MADV_PAGEOUT)
            elif what == 1:
                do_madvise(process.mm, BASE + first * PAGE, count * PAGE, MADV_DONTNEED)
            else:
                pages = [BASE + (first + n) * PAGE for n in range(count)]
                move_pages(process, pages, [rng.randrange(2)] * count)
            host.sched.sleep(rng.randrange(1, 4000))

    tasks = [host.sched.spawn(f"d{n}", lambda n=n: device(n)) for n in range(2)]
    tasks.append(host.sched.spawn("kernel", kernel))
    host.sched.run_until(lambda: all(task.done for task in tasks))
    host.sched.set_on_point(None)
    host.sched.set_strategy(None)
    for task in tasks:
        if task.error is not None:
            raise task.error


@pytest.mark.parametrize("seed", range(10))
def test_no_translation_outlives_its_entry_in_any_order(seed: int) -> None:
    host, process, mirror = make()
    storm(host, process, mirror, seed)
    host.sched.run_task("drain", host.swap_device.drain)
    mirror.close()
    host.lru.lru_add_drain_all()
    audit(host)
    assert process.mm.mm_count == 1


def test_publishing_without_asking_breaks_a_truth() -> None:
    def until_broken() -> None:
        for seed in range(20):
            storm(*make(breaks=frozenset({"no-interval-retry"})), seed)

    with pytest.raises(BrokenTruth, match="interval-publish"):
        until_broken()
