"""Compaction makes large free blocks out of scattered free frames (host_mm/compaction.py, kcompactd.py)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn, pte_present
from host_mm.compaction import compact_nodes
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.host import HostMm
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.madvise import MADV_DONTNEED, MADV_MERGEABLE, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import put_page
from host_mm.page_alloc import GFP_COMP, GFP_DIRECT_RECLAIM, GFP_HIGHUSER_MOVABLE, GFP_KSWAPD_RECLAIM
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
FRAMES = 4096


def make(ram: int = FRAMES, **params: str) -> HostMm:
    stream = TraceStream()
    return HostMm(
        Scheduler(stream), stream, ram_bytes=ram * PAGE, swap_bytes=512 * PAGE, nodes=1, checks=True,
        params={name.replace("__", "."): value for name, value in params.items()},
    )


def scattered(host: HostMm, pages: int = 3600, keep: int = 2, **kw: Any) -> tuple[Process, list[int]]:
    """A process that has filled most of memory and then kept every `keep`-th page."""
    process = host.create_process("p")
    do_mmap(process.mm, BASE, pages * PAGE, RW, ANON)
    kept = list(range(0, pages, keep))

    def body() -> None:
        for page in range(pages):
            copy_to_user(process, BASE + page * PAGE, f"page {page}".encode())
        for page in range(pages):
            if page % keep:
                do_madvise(process.mm, BASE + page * PAGE, PAGE, MADV_DONTNEED)
        host.lru.lru_add_drain_all()

    host.sched.run_task("fill", body)
    return process, kept


def intact(process: Process, kept: list[int]) -> bool:
    return all(
        copy_from_user(process, BASE + page * PAGE, 12).rstrip(b"\0") == f"page {page}".encode()
        for page in kept
    )


def large_blocks(host: HostMm) -> int:
    return sum(len(blocks) for zone in host.zones for types in zone.free_list[9:] for blocks in types)


def pfns(process: Process, kept: list[int]) -> list[int]:
    return [pte_pfn(lookup_address_in_mm(process.mm, BASE + page * PAGE)[0]) for page in kept]


def test_compact_memory_moves_pages_up_and_leaves_large_blocks_below() -> None:
    host = make(mm__page_group_by_mobility="Y")
    process, kept = scattered(host)
    before, blocks = pfns(process, kept), large_blocks(host)
    host.sched.run_task("compact", lambda: compact_nodes(host))
    after = pfns(process, kept)
    assert large_blocks(host) > blocks
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(moved) > 300
    assert all(new > old for old, new in moved)
    assert intact(process, kept)
    assert host.vmstat["pgmigrate_success"] == len(moved)
    audit(host)


def test_a_second_run_finds_nothing_to_move() -> None:
    host = make()
    scattered(host)
    host.sched.run_task("compact", lambda: compact_nodes(host))
    moved = host.vmstat["pgmigrate_success"]
    host.sched.run_task("compact", lambda: compact_nodes(host))
    assert host.vmstat["pgmigrate_success"] - moved <= 32


def test_within_a_batch_the_highest_frame_moves_first_and_batches_go_up() -> None:
    host = make()
    process, kept = scattered(host, keep=4)
    before = dict(zip((BASE + page * PAGE for page in kept), pfns(process, kept), strict=True))
    batches: list[list[int]] = []

    def note(event: Any) -> None:
        if event.name == "mm_migrate_pages_start":
            batches.append([])
        else:
            batches[-1].append(before[event.args["addr"]])

    host.stream.listen(Listener(
        ["migrate:mm_migrate_pages_start", "migrate:set_migration_pte"], note, ancestors=False
    ))
    host.sched.run_task("compact", lambda: compact_nodes(host))
    assert len(batches) > 3
    assert all(batch == sorted(batch, reverse=True) for batch in batches)
    tops = [batch[0] for batch in batches if batch]
    assert tops == sorted(tops)


def test_the_order_is_bracket_entry_flush_copy_set_free_for_each_page() -> None:
    host = make()
    process, _ = scattered(host)
    seen: list[str] = []

    class Recorder(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            seen.append("start")
            assert (range_.event, range_.order) == (mn.MMU_NOTIFY_CLEAR, mn.ORDER_BATCHED)
            return 0

        def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
            seen.append("end")

    mmu_notifier_register(Recorder(), process.mm)
    names = {
        "set_migration_pte": "entry", "primary_flush": "flush", "migrate_folio": "copy",
        "remove_migration_pte": "set", "frame_free": "free", "mm_migrate_pages_start": "begin",
        "mm_migrate_pages": "done",
    }
    host.stream.listen(Listener(
        ["migrate:*", "refault:primary_flush", "refault:migrate_folio", "refault:frame_free"],
        lambda e: seen.append(names[e.name]), ancestors=False,
    ))
    host.sched.run_task("compact", lambda: compact_nodes(host))
    batch = seen[seen.index("begin") + 1 : seen.index("done")]
    count = batch.count("start")
    assert count > 8
    assert batch == [*(["start", "entry", "end"] * count), "flush", *(["copy", "set", "free"] * count)]


def test_the_lines_have_the_kernel_s_format() -> None:
    host = make()
    scattered(host)
    points = {tp.full_name: tp for tp in host.stream.tracepoints()}
    lines: list[str] = []
    host.stream.listen(Listener(
        ["compaction:*"], lambda e: lines.append(points[e.event].format(tuple(e.args.values()))),
        ancestors=False,
    ))
    host.sched.run_task("compact", lambda: compact_nodes(host))
    assert lines[0] == "zone_start=0x0 migrate_pfn=0x0 free_pfn=0xe00 zone_end=0x1000, mode=sync"
    assert lines[1].startswith("range=(0x0 ~ 0x200) nr_scanned=512 nr_taken=")
    assert lines[-1].endswith(", mode=sync status=complete")


def test_pinned_pages_stay_and_everybody_else_leaves_the_block() -> None:
    host = make()
    process, kept = scattered(host)
    pinned = kept[40]
    got: list[int] = []

    def pin() -> None:
        got.append(pin_user_page(process.mm, BASE + pinned * PAGE, FOLL_WRITE | FOLL_LONGTERM))

    run(host, pin)
    before = pfns(process, kept)
    host.sched.run_task("compact", lambda: compact_nodes(host))
    after = pfns(process, kept)
    assert after[40] == before[40] == got[0]
    assert after[39] != before[39]
    assert after[41] != before[41]
    unpin_user_page(host, got[0])
    audit(host)


def allocate(host: HostMm, gfp: int, order: int = 9) -> int:
    pfn: int = host.sched.run_task("allocate", lambda: host.allocator.alloc_pages(gfp, order, 0))
    return pfn


def test_an_allocation_of_order_9_compacts_and_gets_its_block() -> None:
    host = make(mm__page_group_by_mobility="Y")
    process, kept = scattered(host)
    while large_blocks(host):
        allocate(host, GFP_HIGHUSER_MOVABLE | GFP_COMP)
    pfn = allocate(host, GFP_HIGHUSER_MOVABLE | GFP_COMP)
    assert pfn >= 0
    assert pfn % 512 == 0
    assert host.vmstat["compact_stall"] >= 1
    assert host.vmstat["compact_success"] == 1
    assert host.vmstat["allocstall_movable"] == 0, "nothing had to be reclaimed for it"
    assert intact(process, kept)
    put_page(host, pfn)


def test_where_nothing_can_move_a_costly_request_fails_and_compaction_is_deferred() -> None:
    host = make()
    process, kept = scattered(host)
    held: list[int] = []

    def pin_all() -> None:
        held.extend(pin_user_page(process.mm, BASE + page * PAGE, FOLL_WRITE) for page in kept)

    run(host, pin_all)
    while (pfn := allocate(host, GFP_KSWAPD_RECLAIM | GFP_COMP)) >= 0:
        held.append(pfn)
    assert allocate(host, GFP_HIGHUSER_MOVABLE | GFP_COMP) == -1
    zone = host.zones[0]
    assert zone.compact_defer_shift >= 1
    stalls = host.vmstat["compact_migrate_scanned"]
    assert allocate(host, GFP_HIGHUSER_MOVABLE | GFP_COMP) == -1
    assert host.vmstat["compact_migrate_scanned"] == stalls, "deferred: not even tried"
    assert host.vmstat["oom_kill"] == 0


def test_kcompactd_works_for_a_request_that_must_not_wait() -> None:
    host = make(mm__page_group_by_mobility="Y")
    host.start_daemons()
    process, kept = scattered(host)
    while large_blocks(host):
        allocate(host, GFP_HIGHUSER_MOVABLE & ~GFP_DIRECT_RECLAIM | GFP_COMP)
    assert allocate(host, GFP_HIGHUSER_MOVABLE & ~GFP_DIRECT_RECLAIM | GFP_COMP) == -1
    host.sched.run_task("rest", host.quiesce)
    assert host.vmstat["compact_daemon_wake"] == 1
    assert large_blocks(host) >= 1
    assert allocate(host, GFP_HIGHUSER_MOVABLE & ~GFP_DIRECT_RECLAIM | GFP_COMP) >= 0
    assert intact(process, kept)


@pytest.mark.parametrize("seed", range(8))
def test_compaction_beside_stores_pins_forks_merging_and_munmap_keeps_every_byte(seed: int) -> None:
    host = make(ram=2048)
    host.start_daemons()
    other, _ = scattered(host, pages=1400)
    process = host.create_process("p")
    do_mmap(process.mm, BASE, 256 * PAGE, RW, ANON)
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    stop: list[int] = []

    def worker(number: int) -> None:
        user(process, BASE, 64, seed, number, steps=250)
        stop.append(number)

    def compactor() -> None:
        while len(stop) < 2:
            compact_nodes(host)
            host.sched.sleep(20_000)

    def pinner() -> None:
        rng = random.Random(seed + 7)
        while len(stop) < 2:
            address = BASE + rng.randrange(64) * PAGE
            pfn = pin_user_page(process.mm, address, FOLL_WRITE)
            host.sched.sleep(rng.randrange(1, 9000))
            if pfn >= 0:
                host.ram.write((pfn << 12) + 4000, b"dma")
                unpin_user_page(host, pfn, dirty=True)
                where = lookup_address_in_mm(process.mm, address)[0]
                assert not pte_present(where) or copy_from_user(process, address + 4000, 3) == b"dma"

    def churner() -> None:
        rng = random.Random(seed + 3)
        while len(stop) < 2:
            where = do_mmap(process.mm, BASE + (64 << 20), 64 * PAGE, RW, ANON)
            for page in range(64):
                copy_to_user(process, where + page * PAGE, b"same" if page & 1 else bytes([page]))
            do_madvise(process.mm, where, 64 * PAGE, MADV_MERGEABLE)
            for page in range(0, 64, rng.randrange(2, 5)):
                do_madvise(process.mm, where + page * PAGE, PAGE, MADV_DONTNEED)
            child = fork_process(process)
            host.sched.sleep(rng.randrange(1, 20_000))
            do_munmap(process.mm, where, 64 * PAGE)
            exit_process(child)

    run(host, lambda: worker(0), lambda: worker(1), compactor, pinner, churner)
    host.sched.set_strategy(None)
    host.sched.run_task("rest", host.quiesce)
    assert host.vmstat["pgmigrate_success"] > 50
    host.sched.run_task("exit", lambda: exit_process(other))
    audit(host)
