"""Pages move between nodes and nobody loses a byte (host_mm/migrate.py)."""

from __future__ import annotations

import random
from errno import EACCES, EBUSY, EFAULT, ENOENT, ENOMEM
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn, pte_present, pte_write
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import MIGRATE_ASYNC, MR_COMPACTION, migrate_pages, move_pages, putback_movable_pages
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.page import PG_anon_exclusive, PG_swapcache, put_page
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import run
from tests.host_mm.storm import user
from trace_events.stream import Listener, TraceStream

PAGE = 4096
BASE = 0x10000000
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


def make(pages: int = 8, ram: int = 512, **kw: Any) -> tuple[HostMm, Process]:
    stream = TraceStream()
    kw.setdefault("checks", True)
    host = HostMm(Scheduler(stream), stream, ram_bytes=ram * PAGE, swap_bytes=512 * PAGE, **kw)
    process = host.create_process("p")
    do_mmap(process.mm, BASE, pages * PAGE, RW, ANON)
    return host, process


def pfn_of(process: Process, page: int = 0) -> int:
    entry = lookup_address_in_mm(process.mm, BASE + page * PAGE)[0]
    return pte_pfn(entry) if pte_present(entry) else -1


def move(process: Process, pages: int, nid: int, **kw: bool) -> list[int]:
    host = process.host
    result: list[int] = host.sched.run_task(
        "move", lambda: move_pages(process, [BASE + n * PAGE for n in range(pages)], [nid] * pages, **kw)
    )
    return result


def fill(process: Process, pages: int) -> None:
    for page in range(pages):
        copy_to_user(process, BASE + page * PAGE, f"page {page}".encode())


def test_pages_arrive_on_the_node_with_bytes_rights_and_exclusivity() -> None:
    host, process = make()
    run(host, lambda: fill(process, 8))
    old = [pfn_of(process, page) for page in range(8)]
    assert move(process, 8, 1) == [1] * 8
    for page in range(8):
        pfn = pfn_of(process, page)
        assert pfn != old[page]
        assert host.allocator.nid_of(pfn) == 1
        assert host.pages.flags[pfn] & PG_anon_exclusive
        assert pte_write(lookup_address_in_mm(process.mm, BASE + page * PAGE)[0])
        assert copy_from_user(process, BASE + page * PAGE, 6) == f"page {page}".encode()
    assert host.vmstat["pgmigrate_success"] == 8
    audit(host)


def test_what_cannot_move_says_why() -> None:
    host, process = make(8)

    def body() -> None:
        copy_to_user(process, BASE, b"x")
        copy_from_user(process, BASE + PAGE, 1)

    run(host, body)
    addresses = [BASE, BASE + PAGE, BASE + 2 * PAGE, 0x7000]
    got: list[int] = []
    run(host, lambda: got.extend(move_pages(process, addresses, [0, 1, 1, 1])))
    assert got == [0, -EFAULT, -ENOENT, -EFAULT]
    with pytest.raises(KernelError, match="no node 7"):
        move_pages(process, [BASE], [7])


def test_a_referenced_or_pinned_page_stays_and_can_move_when_let_go() -> None:
    host, process = make(2)
    run(host, lambda: fill(process, 2))
    got: list[int] = []
    run(host, lambda: got.append(get_user_pages_unlocked(process.mm, BASE, FOLL_WRITE)))
    run(host, lambda: got.append(pin_user_page(process.mm, BASE + PAGE, FOLL_WRITE)))
    assert move(process, 2, 1) == [-EBUSY, -EBUSY]
    assert [pfn_of(process, 0), pfn_of(process, 1)] == got
    assert copy_from_user(process, BASE, 6) == b"page 0"
    assert host.vmstat["pgmigrate_fail"] == 2
    put_page(host, got[0])
    unpin_user_page(host, got[1])
    assert move(process, 2, 1) == [1, 1]
    audit(host)


def test_moving_a_page_in_use_loses_what_its_user_writes() -> None:
    host, process = make(1, breaks=frozenset({"migrate-ignore-refs"}))
    run(host, lambda: fill(process, 1))
    pfns: list[int] = []
    run(host, lambda: pfns.append(get_user_pages_unlocked(process.mm, BASE, FOLL_WRITE)))
    assert move(process, 1, 1) == [1]
    host.ram.write(pfns[0] << 12, b"lost!!")
    assert copy_from_user(process, BASE, 6) == b"page 0"


def test_shared_pages_move_only_when_asked_for_and_stay_shared() -> None:
    host, process = make(1)
    children: list[Process] = []
    run(host, lambda: (fill(process, 1), children.append(fork_process(process))))
    assert move(process, 1, 1) == [-EACCES]
    assert move(process, 1, 1, move_all=True) == [1]
    assert pfn_of(process) == pfn_of(children[0])
    assert not host.pages.flags[pfn_of(process)] & PG_anon_exclusive
    run(host, lambda: copy_to_user(process, BASE, b"mine"))
    assert copy_from_user(children[0], BASE, 6) == b"page 0"
    audit(host)
    run(host, lambda: exit_process(children[0]))
    audit(host)


def test_a_page_of_the_swap_cache_takes_its_slot_along() -> None:
    host, process = make(1)

    def body() -> None:
        fill(process, 1)
        host.lru.lru_add_drain()
        do_madvise(process.mm, BASE, PAGE, MADV_PAGEOUT)
        copy_from_user(process, BASE, 1)

    run(host, body)
    assert host.pages.flags[pfn_of(process)] & PG_swapcache
    assert move(process, 1, 1) == [1], "it waits for the writeback"
    pfn = pfn_of(process)
    assert host.pages.flags[pfn] & PG_swapcache
    assert host.swap is not None
    assert host.swap.cache[1] == pfn + 1
    audit(host)


def test_an_async_batch_flushes_once_for_all_and_each_page_has_its_bracket() -> None:
    host, process = make(4)
    run(host, lambda: fill(process, 4))
    host.lru.lru_add_drain_all()
    seen: list[str] = []
    host.stream.listen(Listener(
        ["refault:primary_flush", "migrate:*"], lambda e: seen.append(e.name), ancestors=False,
    ))

    def body() -> None:
        pfns = [pfn for page in range(4) if host.lru.folio_isolate_lru(pfn := pfn_of(process, page))]
        assert migrate_pages(host, pfns, 1, MR_COMPACTION, MIGRATE_ASYNC) == 0
        assert pfns == []

    run(host, body)
    assert seen == [
        "mm_migrate_pages_start", *(["set_migration_pte"] * 4), "primary_flush",
        *(["remove_migration_pte"] * 4), "mm_migrate_pages",
    ]


def test_the_lines_have_the_kernel_s_format() -> None:
    host, process = make(1)
    run(host, lambda: fill(process, 1))
    points = {tp.full_name: tp for tp in host.stream.tracepoints()}
    lines: list[str] = []
    host.stream.listen(Listener(
        ["migrate:mm_*"], lambda e: lines.append(points[e.event].format(tuple(e.args.values()))),
        ancestors=False,
    ))
    move(process, 1, 1)
    assert lines == [
        "mode=MIGRATE_SYNC reason=syscall_or_cpuset",
        "nr_succeeded=1 nr_failed=0 nr_thp_succeeded=0 nr_thp_failed=0 nr_thp_split=0 nr_split=0 "
        "mode=MIGRATE_SYNC reason=syscall_or_cpuset",
    ]


def test_a_full_target_node_fails_without_killing_anybody() -> None:
    host, process = make(100, ram=256)

    def body() -> None:
        fill(process, 60)
        host.lru.lru_add_drain()
        pfns = [pfn for page in range(60) if host.lru.folio_isolate_lru(pfn := pfn_of(process, page))]
        held = []
        while (pfn := host.allocator.alloc_pages(1 << 16 | 1 << 21, 0, 1)) >= 0:
            held.append(pfn)
        assert migrate_pages(host, pfns, 1, MR_COMPACTION, MIGRATE_ASYNC) < 0
        putback_movable_pages(host, pfns)
        for pfn in held:
            put_page(host, pfn)

    run(host, body)
    assert host.vmstat["oom_kill"] == 0
    for page in range(60):
        assert copy_from_user(process, BASE + page * PAGE, 6)[:5] == b"page "
    host.sched.run_task("drain", host.swap_device.drain)
    audit(host)


@pytest.mark.parametrize("seed", range(16))
def test_users_movers_pagers_and_forks_in_any_order_keep_every_byte(seed: int) -> None:
    host, process = make(24, ram=400)
    host.start_daemons()
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    stop: list[int] = []

    def worker(number: int) -> None:
        user(process, BASE, 24, seed, number, steps=300)
        stop.append(number)

    def mover() -> None:
        rng = random.Random(seed)
        while len(stop) < 2:
            pages = [BASE + rng.randrange(24) * PAGE for _ in range(rng.randrange(1, 12))]
            move_pages(process, pages, [rng.randrange(2)] * len(pages), move_all=True)
            host.sched.sleep(rng.randrange(1, 9000))

    def pager() -> None:
        rng = random.Random(seed + 1)
        while len(stop) < 2:
            first = rng.randrange(24)
            do_madvise(process.mm, BASE + first * PAGE, rng.randrange(1, 25 - first) * PAGE, MADV_PAGEOUT)
            host.sched.sleep(rng.randrange(1, 30000))

    def forker() -> None:
        while len(stop) < 2:
            child = fork_process(process)
            host.sched.sleep(5000)
            copy_from_user(child, BASE, 8)
            do_madvise(child.mm, BASE, 4 * PAGE, MADV_DONTNEED)
            exit_process(child)
            host.sched.sleep(20000)

    run(host, lambda: worker(0), lambda: worker(1), mover, pager, forker)
    host.sched.set_strategy(None)
    assert host.vmstat["pgmigrate_success"] > 4
    host.sched.run_task("drain", host.swap_device.drain)
    host.lru.lru_add_drain_all()
    audit(host)


def test_skipping_the_batched_flush_in_migration_breaks_a_truth() -> None:
    host, process = make(2, breaks=frozenset({"skip-batched-flush"}))

    def body() -> None:
        fill(process, 2)
        host.lru.lru_add_drain()
        pfns = [pfn for page in range(2) if host.lru.folio_isolate_lru(pfn := pfn_of(process, page))]
        migrate_pages(host, pfns, 1, MR_COMPACTION, MIGRATE_ASYNC)

    with pytest.raises(BrokenTruth, match="freed-frame-translated"):
        run(host, body)


def test_a_page_that_is_not_queued_ends_the_call_to_migrate_pages() -> None:
    host, process = make(5)
    run(host, lambda: [copy_to_user(process, BASE + n * PAGE, b"x") for n in (0, 1, 3, 4)])
    seen: list[Any] = []
    host.stream.listen(Listener(["migrate:mm_migrate_pages"], seen.append, ancestors=False))
    assert move(process, 5, 1) == [1, 1, -ENOENT, 1, 1]
    assert [e.args["succeeded"] for e in seen] == [2, 2]


def test_without_memory_only_pages_that_were_tried_count_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    host, process = make(8)
    run(host, lambda: fill(process, 8))
    pfns = [pfn_of(process, page) for page in range(8)]
    monkeypatch.setattr("host_mm.migrate.alloc_migration_target", lambda host, src, target: -1)

    def body() -> None:
        host.lru.lru_add_drain_all()
        assert all(host.lru.folio_isolate_lru(pfn) for pfn in pfns)
        assert migrate_pages(host, pfns, 1, MR_COMPACTION, MIGRATE_ASYNC) == -ENOMEM
        assert len(pfns) == 8
        putback_movable_pages(host, pfns)

    run(host, body)
    assert host.vmstat["pgmigrate_fail"] == 1
    audit(host)
