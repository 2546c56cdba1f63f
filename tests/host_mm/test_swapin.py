"""Faults that meet swap I/O half way, and what a swapped-in page may do (host_mm/swapin.py, page_io.py)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn, pte_write
from host_mm.arch.x86.swapops import _PAGE_SWP_EXCLUSIVE
from host_mm.fork import fork_process
from host_mm.gup import FOLL_NOWAIT, FOLL_WRITE, get_user_page_fast_only, get_user_pages_unlocked
from host_mm.host import HostMm
from host_mm.kernel.costs import COST_SWAP_READ
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.page import (
    PG_anon_exclusive,
    PG_dirty,
    PG_locked,
    PG_swapcache,
    PG_writeback,
    put_page,
    set_page_dirty,
)
from host_mm.process import Process
from host_mm.profile import LINUX_5_10
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import run
from trace_events.stream import TraceStream

PAGE = 4096
BASE = 0x10000000
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


def make(pages: int = 8, **kw: Any) -> tuple[HostMm, Process]:
    stream = TraceStream()
    kw.setdefault("checks", True)
    host = HostMm(Scheduler(stream), stream, ram_bytes=512 * PAGE, swap_bytes=512 * PAGE, **kw)
    process = host.create_process("p")
    do_mmap(process.mm, BASE, pages * PAGE, RW, ANON)
    return host, process


def drain(host: HostMm) -> None:
    host.sched.run_task("drain", host.swap_device.drain)


def pageout(process: Process, pages: int = 1) -> None:
    process.host.lru.lru_add_drain_all()
    do_madvise(process.mm, BASE, pages * PAGE, MADV_PAGEOUT)


def reclaim_clean(process: Process) -> None:
    """The second round: what was written out is freed."""
    from host_mm.vmscan import try_to_free_pages

    drain(process.host)
    process.host.lru.lru_add_drain_all()
    process.host.sched.run_task("r", lambda: try_to_free_pages(process.host, 0, 0))


def entry(process: Process, address: int = BASE) -> int:
    return lookup_address_in_mm(process.mm, address)[0]


def swapped_out(data: bytes = b"hello", **kw: Any) -> tuple[HostMm, Process]:
    host, process = make(**kw)
    run(host, lambda: (copy_to_user(process, BASE, data), pageout(process)))
    reclaim_clean(process)
    assert host.swap is not None
    assert not any(host.swap.cache[slot] for slot in range(host.swap.max)), "the frame is gone"
    return host, process


def test_an_exclusive_page_keeps_its_marker_in_the_swap_entry() -> None:
    _, process = swapped_out()
    assert entry(process) & _PAGE_SWP_EXCLUSIVE


def test_a_read_of_an_exclusive_page_maps_it_writable_but_clean() -> None:
    host, process = swapped_out()
    run(host, lambda: copy_from_user(process, BASE, 5))
    assert pte_write(entry(process))
    assert not host.pages.flags[pte_pfn(entry(process))] & PG_dirty
    assert host.pages.flags[pte_pfn(entry(process))] & PG_anon_exclusive
    faults = host.vmstat["pgfault"]
    run(host, lambda: copy_to_user(process, BASE, b"again"))
    assert host.vmstat["pgfault"] == faults, "the write needs no fault of its own"


def test_5_10_maps_a_page_that_was_read_in_read_only() -> None:
    host, process = swapped_out(profile=LINUX_5_10)
    run(host, lambda: copy_from_user(process, BASE, 5))
    assert not pte_write(entry(process))
    run(host, lambda: copy_to_user(process, BASE, b"again"))
    assert copy_from_user(process, BASE, 5) == b"again"
    audit(host)


def test_a_swap_in_takes_the_time_of_the_device_and_counts_as_major() -> None:
    host, process = swapped_out()
    begin = host.sched.now
    run(host, lambda: copy_from_user(process, BASE, 5))
    assert host.sched.now - begin >= COST_SWAP_READ
    assert host.vmstat["pgmajfault"] == 1


def test_two_readers_share_one_read() -> None:
    host, process = swapped_out()
    got: list[bytes] = []
    run(host, *[lambda: got.append(copy_from_user(process, BASE, 5)) for _ in range(3)])
    assert got == [b"hello"] * 3
    assert host.vmstat["pswpin"] == 1
    audit(host)


def test_nowait_gup_starts_the_read_and_answers_at_once() -> None:
    host, process = swapped_out()
    answers: list[int] = []

    def body() -> None:
        begin = host.sched.now
        answers.append(get_user_pages_unlocked(process.mm, BASE, FOLL_NOWAIT))
        assert host.sched.now - begin < COST_SWAP_READ
        answers.append(get_user_pages_unlocked(process.mm, BASE, FOLL_WRITE))

    run(host, body)
    assert answers[0] < 0 <= answers[1]
    assert host.vmstat["pswpin"] == 1
    put_page(host, answers[1])
    audit(host)


def test_a_fault_during_writeback_gets_the_folio_back_and_its_write_survives() -> None:
    host, process = make()

    def body() -> None:
        copy_to_user(process, BASE, b"old")
        pageout(process)
        assert host.swap_device.inflight
        copy_to_user(process, BASE, b"new")
        pfn = pte_pfn(entry(process))
        assert host.pages.flags[pfn] & PG_writeback
        assert host.vmstat["pswpin"] == 0

    run(host, body)
    drain(host)
    for _ in range(3):
        run(host, lambda: pageout(process))
        reclaim_clean(process)
    assert copy_from_user(process, BASE, 3) == b"new"
    audit(host)


def test_a_write_during_writeback_makes_the_slot_unfit_and_the_folio_dirty() -> None:
    host, process = make()
    run(host, lambda: (copy_to_user(process, BASE, b"a" * PAGE), pageout(process),
                       copy_to_user(process, BASE, b"b" * PAGE)))
    drain(host)
    assert host.swap is not None
    torn = host.swap.pread(1)
    assert torn == b"a" * 2048 + b"b" * 2048, "the device took the halves at different times"
    run(host, lambda: pageout(process))
    assert host.vmstat["pswpout"] == 2


def test_a_fork_shares_the_swap_entry_and_each_side_gets_its_bytes() -> None:
    host, process = swapped_out(b"both")
    child: list[Process] = []
    run(host, lambda: child.append(fork_process(process)))
    assert host.swap is not None
    assert host.swap.swap_count(1) == 2
    assert not entry(process) & _PAGE_SWP_EXCLUSIVE
    run(host, lambda: copy_to_user(child[0], BASE, b"mine"), lambda: copy_from_user(process, BASE, 4))
    assert copy_from_user(process, BASE, 4) == b"both"
    assert copy_from_user(child[0], BASE, 4) == b"mine"
    drain(host)
    audit(host)


def test_munmap_during_a_read_leaves_nothing_but_the_cached_folio() -> None:
    from host_mm.mmap import do_munmap

    host, process = swapped_out()
    run(
        host, lambda: copy_from_user(process, BASE, 5),
        lambda: do_madvise(process.mm, BASE, PAGE, 4),
    )
    run(host, lambda: do_munmap(process.mm, BASE, PAGE))
    drain(host)
    host.lru.lru_add_drain_all()
    audit(host)


def test_the_folio_is_locked_while_it_is_read() -> None:
    host, process = swapped_out()
    host.sched.spawn("reader", lambda: copy_from_user(process, BASE, 5))
    host.sched.run_until(lambda: bool(host.swap_device.inflight))
    (pfn,) = host.swap_device.inflight
    assert host.pages.flags[pfn] & (PG_locked | PG_swapcache) == PG_locked | PG_swapcache
    drain(host)
    assert not host.pages.flags[pfn] & PG_locked


@pytest.mark.parametrize("seed", range(12))
def test_pageout_reads_and_writes_in_any_order_keep_every_byte(seed: int) -> None:
    host, process = make(16)
    host.sched.set_strategy(RandomStrategy(seed, period=2))

    def user(number: int) -> None:
        rng = random.Random(seed * 31 + number)
        mine: dict[int, bytes] = {}
        for step in range(400):
            host.sched.advance(1000)
            host.sched.point("user")
            page = rng.randrange(16)
            at = BASE + page * PAGE + number * 64
            if rng.random() < 0.5:
                mine[at] = f"{number}:{step}".encode().ljust(16)
                copy_to_user(process, at, mine[at])
            else:
                assert copy_from_user(process, at, 16) == mine.get(at, bytes(16))

    def pager() -> None:
        rng = random.Random(seed)
        for _ in range(100):
            first = rng.randrange(16)
            host.lru.lru_add_drain()
            do_madvise(process.mm, BASE + first * PAGE, rng.randrange(1, 17 - first) * PAGE, MADV_PAGEOUT)
            host.sched.sleep(rng.randrange(20_000))

    run(host, lambda: user(0), lambda: user(1), pager, pager)
    host.sched.set_strategy(None)
    assert host.vmstat["pswpout"] > 20
    drain(host)
    host.lru.lru_add_drain_all()
    audit(host)


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("skip-batched-flush", "freed-frame-translated|io-while-writable"),
        ("no-flush-before-io", "io-while-writable"),
        ("free-before-batched-flush", "freed-frame-translated"),
        ("no-primary-flush", "freed-frame-translated|io-while-writable"),
    ],
)
def test_a_missing_flush_in_reclaim_breaks_a_truth(name: str, truth: str) -> None:
    host, process = make(8, breaks=frozenset({name}))

    def body() -> None:
        for page in range(8):
            copy_to_user(process, BASE + page * PAGE, b"x")
        pageout(process, 8)
        host.swap_device.drain()
        # Clean pages of the swap cache, mapped again for reading: reclaim frees them without I/O.
        host.lru.lru_add_drain_all()
        for page in range(8):
            copy_from_user(process, BASE + page * PAGE, 1)
        pfns = [pte_pfn(entry(process, BASE + page * PAGE)) for page in range(8)]
        host.reclaim_pages([pfn for pfn in pfns if host.lru.folio_isolate_lru(pfn)])

    with pytest.raises(BrokenTruth, match=truth):
        run(host, body)


def test_a_folio_made_dirty_by_a_reference_between_unmap_and_drop_is_kept() -> None:
    host, process = make(1)

    def prepare() -> None:
        copy_to_user(process, BASE, b"a" * PAGE)
        pageout(process)
        host.swap_device.drain()
        copy_from_user(process, BASE, 1)

    run(host, prepare)
    host.lru.lru_add_drain_all()
    # The entry is writable but clean: fast GUP for writing takes it and leaves no mark.
    pfn = get_user_page_fast_only(process.mm, BASE, FOLL_WRITE)
    assert not host.pages.flags[pfn] & PG_dirty

    def another_cpu(kind: str) -> None:
        if kind == "ref-freeze" and host.pages.refcount[pfn] == 3:
            host.ram.write(pfn << 12, b"b" * PAGE)
            set_page_dirty(host, pfn)
            put_page(host, pfn)

    host.sched.set_on_point(another_cpu)
    run(host, lambda: pageout(process))
    host.sched.set_on_point(None)
    assert copy_from_user(process, BASE, PAGE) == b"b" * PAGE


def test_a_fault_that_must_wait_counts_as_major_at_its_read_and_as_a_fault_when_it_ends() -> None:
    host, process = swapped_out()
    before = host.vmstat["pgfault"]
    run(host, lambda: get_user_pages_unlocked(process.mm, BASE, FOLL_NOWAIT))
    assert host.vmstat["pgfault"] == before
    assert host.vmstat["pgmajfault"] == 1
    run(host, lambda: copy_from_user(process, BASE, 5))
    assert host.vmstat["pgfault"] == before + 1
    assert host.vmstat["pgmajfault"] == 1
