"""Reclaim under pressure: working sets larger than RAM keep their bytes (host_mm/vmscan.py)."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from host_mm import vmscan
from host_mm.host import HostMm
from host_mm.kernel.errors import KernelError, OutOfMemory
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.page_alloc import (
    GFP_HIGHUSER_MOVABLE,
    GFP_PGTABLE_USER,
    GFP_THISNODE,
    ZONE_MOVABLE,
    ZONE_NORMAL,
    gfp_zone,
)
from host_mm.process import Process
from host_mm.shrink_folio_list import ScanControl
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from host_mm.vmscan_trace import show_gfp_flags
from trace_events.stream import Listener, TraceStream

PAGE = 4096
BASE = 0x10000000
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


def make_host(ram: int = 512, swap: int | None = 2048, **kw: Any) -> HostMm:
    stream = TraceStream()
    kw.setdefault("checks", True)
    return HostMm(
        Scheduler(stream), stream, ram_bytes=ram * PAGE, swap_bytes=swap * PAGE if swap else None, **kw
    )


def make_process(host: HostMm, pages: int, name: str = "p") -> Process:
    process = host.create_process(name)
    assert do_mmap(process.mm, BASE, pages * PAGE, RW, ANON) == BASE
    return process


def stamp(page: int, version: int) -> bytes:
    return f"page {page} version {version} ".encode().ljust(64, b".")


def settle(host: HostMm) -> None:
    """Let the I/O in flight complete."""
    host.sched.run_task("settle", host.swap_device.drain)


def churn(host: HostMm, process: Process, pages: int, steps: int, seed: int) -> None:
    """Random reads and writes against a dict; every read must give what was written last."""
    rng = random.Random(seed)
    oracle: dict[int, int] = {}
    for step in range(steps):
        page = rng.randrange(pages)
        at = BASE + page * PAGE + 64 * (page % 60)
        if rng.random() < 0.5:
            copy_to_user(process, at, stamp(page, step))
            oracle[page] = step
        else:
            want = stamp(page, oracle[page]) if page in oracle else bytes(64)
            assert copy_from_user(process, at, 64) == want, f"page {page} at step {step}"
    for page, step in oracle.items():
        assert copy_from_user(process, BASE + page * PAGE + 64 * (page % 60), 64) == stamp(page, step)


def events(host: HostMm, *globs: str) -> list[Any]:
    seen: list[Any] = []
    host.stream.listen(Listener(globs, seen.append, ancestors=False))
    return seen


def test_a_working_set_larger_than_ram_keeps_every_byte() -> None:
    host = make_host()
    process = make_process(host, 900)
    host.sched.run_task("p", lambda: churn(host, process, 900, 4000, 1))
    assert host.vmstat["pswpout"] > 500
    assert host.vmstat["pswpin"] > 500
    settle(host)
    audit(host)


def test_direct_reclaim_does_without_kswapd_and_kswapd_spares_it() -> None:
    direct = make_host()
    p = make_process(direct, 900)
    direct.sched.run_task("p", lambda: churn(direct, p, 900, 2000, 2))
    assert direct.vmstat["pgsteal_direct"] > 0
    assert direct.vmstat["pgsteal_kswapd"] == 0

    daemons = make_host(ram=1024, swap=4096)
    p = make_process(daemons, 3000)
    daemons.start_daemons()
    daemons.sched.set_strategy(RandomStrategy(1, period=4))
    daemons.sched.run_task("p", lambda: churn(daemons, p, 3000, 6000, 2))
    assert daemons.vmstat["pgsteal_kswapd"] > 0
    assert daemons.vmstat["pageoutrun"] > 0
    settle(daemons)
    audit(daemons)


@pytest.mark.parametrize("seed", range(6))
def test_two_processes_and_kswapd_in_any_order_keep_every_byte(seed: int) -> None:
    host = make_host(ram=400)
    host.start_daemons()
    host.sched.set_strategy(RandomStrategy(seed, period=3))
    tasks = []
    for number in range(2):
        process = make_process(host, 450, f"p{number}")
        tasks.append(
            host.sched.spawn(
                f"p{number}", lambda p=process, n=number: churn(host, p, 450, 1500, seed * 2 + n)
            )
        )
    host.sched.run_until(lambda: all(task.done for task in tasks))
    assert [task.error for task in tasks] == [None, None]
    host.sched.set_strategy(None)
    assert host.vmstat["pswpin"] > 100
    assert host.vmstat["pgsteal_kswapd"] > 100
    settle(host)
    audit(host)


def test_pages_in_use_outlive_pages_that_are_not() -> None:
    host = make_host(ram=512)
    process = make_process(host, 700)

    def body() -> None:
        for page in range(700):
            copy_to_user(process, BASE + page * PAGE, stamp(page, 0))
            for hot in range(8):
                process.tlb.clear()
                copy_from_user(process, BASE + hot * PAGE, 64)

    host.sched.run_task("p", body)
    swapins = host.vmstat["pswpin"]
    for hot in range(8):
        assert copy_from_user(process, BASE + hot * PAGE, 64) == stamp(hot, 0)
    assert host.vmstat["pswpin"] - swapins <= 2, "the hot pages were never out for long"


def test_without_swap_the_end_is_one_clear_line() -> None:
    host = make_host(ram=256, swap=None)
    process = make_process(host, 600)

    def body() -> None:
        for page in range(600):
            copy_to_user(process, BASE + page * PAGE, b"x")

    with pytest.raises(OutOfMemory) as caught:
        host.sched.run_task("p", body)
    line = str(caught.value)
    assert line.startswith("Out of memory: Killed process 1 (p) total-vm:2400kB, anon-rss:")
    assert "\n" not in line
    assert host.vmstat["oom_kill"] == 1


def test_full_swap_ends_in_out_of_memory_too() -> None:
    host = make_host(ram=256, swap=65)
    process = make_process(host, 600)

    def body() -> None:
        for page in range(600):
            copy_to_user(process, BASE + page * PAGE, stamp(page, 1))

    with pytest.raises(OutOfMemory):
        host.sched.run_task("p", body)
    assert host.swap is not None
    assert host.swap.nr_free == 0


def test_a_forked_child_dies_before_the_machine_does() -> None:
    from host_mm.fork import fork_process

    host = make_host(ram=256, swap=None)
    process = make_process(host, 100)
    died: list[Process] = []

    def body() -> None:
        child = fork_process(process)
        child.oom_score_adj = 500
        do_mmap(child.mm, 0x40000000, 400 * PAGE, RW, ANON)
        try:
            for page in range(400):
                copy_to_user(child, 0x40000000 + page * PAGE, b"x")
        except KernelError:
            died.append(child)
        for page in range(100):
            copy_to_user(process, BASE + page * PAGE, b"y")

    host.sched.run_task("p", body)
    assert len(died) == host.vmstat["oom_kill"] == 1


def test_zero_pages_are_swapped_without_io() -> None:
    host = make_host()
    process = make_process(host, 20)

    def body() -> None:
        for page in range(20):
            copy_to_user(process, BASE + page * PAGE, bytes(8))
        do_madvise(process.mm, BASE, 20 * PAGE, MADV_PAGEOUT)

    host.sched.run_task("p", body)
    assert (host.vmstat["pswpout"], host.vmstat["swpout_zero"]) == (0, 20)
    host.sched.run_task("p", lambda: [copy_from_user(process, BASE + page * PAGE, 8) for page in range(20)])
    assert (host.vmstat["pswpin"], host.vmstat["swpin_zero"]) == (0, 20)
    audit(host)


def test_pageout_brackets_page_by_page_and_flushes_before_io() -> None:
    host = make_host()
    process = make_process(host, 4)

    def body() -> None:
        for page in range(4):
            copy_to_user(process, BASE + page * PAGE, stamp(page, 0))
        host.lru.lru_add_drain()
        do_madvise(process.mm, BASE, 4 * PAGE, MADV_PAGEOUT)

    seen = events(host, "refault:primary_flush", "refault:swap_write_start", "vmscan:*")
    host.sched.run_task("p", body)
    names = [e.name for e in seen]
    assert names == [
        *(["primary_flush", "swap_write_start", "mm_vmscan_write_folio"] * 4), "mm_vmscan_reclaim_pages",
    ]


def test_nothing_is_left_when_the_process_exits_whatever_was_in_flight() -> None:
    from host_mm.fork import exit_process

    host = make_host(ram=512)
    process = make_process(host, 900)
    used = host.pages.nr_frames - host.allocator.nr_free_pages()

    def body() -> None:
        churn(host, process, 900, 1500, 5)
        do_madvise(process.mm, BASE, 300 * PAGE, MADV_PAGEOUT)
        exit_process(process)

    host.sched.run_task("p", body)
    settle(host)
    host.lru.lru_add_drain_all()
    audit(host)
    assert host.swap is not None
    cached = sum(1 for slot in range(1, host.swap.max) if host.swap.cache[slot])
    assert host.swap.inuse_pages == cached, "only the swap cache may hold slots now"
    left = host.pages.nr_frames - host.allocator.nr_free_pages()
    assert left <= used + cached


def test_dontneed_gives_slots_back() -> None:
    host = make_host()
    process = make_process(host, 64)

    def body() -> None:
        for page in range(64):
            copy_to_user(process, BASE + page * PAGE, stamp(page, 3))
        host.lru.lru_add_drain()
        do_madvise(process.mm, BASE, 64 * PAGE, MADV_PAGEOUT)

    host.sched.run_task("p", body)
    settle(host)
    assert host.swap is not None
    assert host.swap.inuse_pages == 64
    host.sched.run_task("p", lambda: do_madvise(process.mm, BASE, 64 * PAGE, MADV_DONTNEED))
    host.lru.lru_add_drain_all()
    audit(host)
    assert host.swap.inuse_pages == 0


def test_the_same_seed_gives_the_same_trace() -> None:
    def run() -> list[tuple[Any, ...]]:
        host = make_host(ram=300)
        seen = events(host, "*")
        host.start_daemons()
        host.sched.set_strategy(RandomStrategy(9, period=5))
        process = make_process(host, 500)
        host.sched.run_task("p", lambda: churn(host, process, 500, 1500, 4))
        assert host.vmstat["pswpin"]
        return [(e.seq, e.ts, e.event, e.task, e.cause, tuple(e.args.items())) for e in seen]

    assert run() == run()


def test_lines_have_the_kernel_s_format() -> None:
    host = make_host(ram=300)
    process = make_process(host, 500)
    lines: dict[str, str] = {}
    points = {tp.full_name: tp for tp in host.stream.tracepoints()}
    host.stream.listen(Listener(
        ["vmscan:*"], lambda e: lines.setdefault(e.name, points[e.event].format(tuple(e.args.values()))),
        ancestors=False,
    ))
    host.sched.run_task("p", lambda: churn(host, process, 500, 1500, 4))
    assert lines["mm_vmscan_direct_reclaim_begin"] == (
        "order=0 gfp_flags=GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP"
    )
    assert lines["mm_vmscan_direct_reclaim_end"].startswith("nr_reclaimed=")
    assert lines["mm_vmscan_lru_isolate"].startswith("classzone=3 order=0 nr_requested=")
    assert lines["mm_vmscan_lru_isolate"].endswith(("lru=inactive_anon", "lru=active_anon"))
    assert lines["mm_vmscan_lru_shrink_inactive"].endswith("flags=RECLAIM_WB_ANON|RECLAIM_WB_ASYNC")
    assert lines["mm_vmscan_write_folio"].startswith("page=ffffea00")
    assert Counter(lines["mm_vmscan_lru_shrink_inactive"])["="] == 13


def test_reclaim_names_the_request_and_the_zone_it_may_go_up_to() -> None:
    host = make_host(ram=300)
    host.start_daemons()
    seen = events(host, "vmscan:*")
    process = make_process(host, 500)
    host.sched.run_task("p", lambda: churn(host, process, 500, 1500, 4))
    woken = [e.args for e in seen if e.name == "mm_vmscan_wakeup_kswapd"]
    assert {show_gfp_flags(a["gfp_flags"]) for a in woken} >= {"GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP"}
    assert {a["zid"] for a in woken if a["gfp_flags"] & 8} == {ZONE_MOVABLE}
    assert {e.args["zid"] for e in seen if e.name == "mm_vmscan_kswapd_wake"} <= {ZONE_MOVABLE, ZONE_NORMAL}
    assert show_gfp_flags(GFP_PGTABLE_USER) == "GFP_KERNEL_ACCOUNT|__GFP_ZERO"
    assert gfp_zone(GFP_PGTABLE_USER) == ZONE_NORMAL


def test_scans_and_steals_are_counted_by_reclaimer_and_by_kind() -> None:
    host = make_host(ram=300)
    process = make_process(host, 500)
    host.sched.run_task("p", lambda: churn(host, process, 500, 1500, 4))
    stat = host.vmstat
    assert stat["pgscan_anon"] + stat["pgscan_file"] == stat["pgscan_direct"] + stat["pgscan_kswapd"]
    assert stat["pgsteal_anon"] + stat["pgsteal_file"] == stat["pgsteal_direct"] + stat["pgsteal_kswapd"]
    assert stat["pgsteal_direct"] > 0
    assert stat["allocstall_movable"] > 0


def test_shrinking_a_list_reports_what_it_scanned_not_what_it_took() -> None:
    host = make_host()
    process = make_process(host, 64)
    for page in range(64):
        copy_to_user(process, BASE + page * PAGE, b"x")
    host.sched.run_task("drain", host.lru.lru_add_drain_all)
    vec = next(v for v in host.lru.vecs if v.lists[0])
    frozen = next(iter(vec.lists[0]))
    host.pages.refcount[frozen], count = 0, host.pages.refcount[frozen]
    seen = events(host, "vmscan:mm_vmscan_lru_*")
    sc = ScanControl(GFP_PGTABLE_USER)
    host.sched.run_task("r", lambda: vmscan._shrink_inactive_list(host, vec, 0, 8, sc))
    host.pages.refcount[frozen] = count
    isolate, shrink = seen
    assert (isolate.args["nr_scanned"], isolate.args["nr_taken"]) == (8, 7)
    assert shrink.args["nr_scanned"] == 8


def test_pageout_reclaims_each_run_of_pages_of_one_node_by_itself() -> None:
    host = make_host()
    process = make_process(host, 6)
    for page in range(6):
        copy_to_user(process, BASE + page * PAGE, b"x")

    def body() -> None:
        for page in (1, 4):
            move_pages(process, [BASE + page * PAGE], [1])
        do_madvise(process.mm, BASE, 6 * PAGE, MADV_PAGEOUT)

    seen = events(host, "vmscan:mm_vmscan_reclaim_pages")
    host.sched.run_task("p", body)
    assert [e.args["nid"] for e in seen] == [0, 1, 0, 1, 0]


def test_direct_reclaim_for_one_node_leaves_the_others_alone() -> None:
    host = make_host()
    process = make_process(host, 400)
    for page in range(400):
        copy_to_user(process, BASE + page * PAGE, b"x")
    seen = events(host, "vmscan:mm_vmscan_lru_shrink_inactive")
    host.sched.run_task("r", lambda: host.reclaim(0, 1, GFP_HIGHUSER_MOVABLE | GFP_THISNODE))
    assert {e.args["nid"] for e in seen} == {1}
