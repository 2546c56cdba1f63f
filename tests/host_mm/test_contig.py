"""Exactly these frames: what is in them moves away, or the caller is told why not (host_mm/contig.py)."""

from __future__ import annotations

import random
from errno import EBUSY, EINVAL

import pytest

from host_mm.contig import alloc_contig_pages, alloc_contig_range, free_contig_range
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.host import HostMm
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.migrate import move_pages
from host_mm.page_alloc import GFP_KERNEL
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import run
from tests.host_mm.storm import user
from tests.host_mm.test_migrate import BASE, PAGE, make, pfn_of
from trace_events.stream import Listener


def on_node_1(pages: int = 64) -> tuple[HostMm, Process, int]:
    """A process whose pages lie one after the other in a page block that holds nothing else."""
    host, process = make(pages, ram=4096)

    def body() -> None:
        for page in range(pages):
            copy_to_user(process, BASE + page * PAGE, f"page {page}".encode())
        move_pages(process, [BASE + page * PAGE for page in range(pages)], [1] * pages)

    run(host, body)
    first = pfn_of(process, 0)
    assert [pfn_of(process, page) for page in range(pages)] == list(range(first, first + pages))
    return host, process, first


def refused(host: HostMm, start: int, end: int) -> int:
    with pytest.raises(KernelError) as caught:
        host.sched.run_task("contig", lambda: alloc_contig_range(host, start, end))
    assert caught.value.errno is not None
    return caught.value.errno


def test_the_range_is_cleared_of_its_pages_and_given_out_frame_by_frame() -> None:
    host, process, first = on_node_1()
    seen: list[str] = []
    host.stream.listen(Listener(
        ["migrate:mm_migrate_pages", "page_isolation:*"], lambda e: seen.append(e.name), ancestors=False
    ))
    host.sched.run_task("contig", lambda: alloc_contig_range(host, first + 3, first + 19))
    assert seen == ["mm_migrate_pages", "test_pages_isolated"]
    for page in range(64):
        assert (pfn_of(process, page) == first + page) == (not 3 <= page < 19)
        assert copy_from_user(process, BASE + page * PAGE, 8).rstrip(b"\0") == f"page {page}".encode()
    assert [host.pages.refcount[pfn] for pfn in range(first + 3, first + 19)] == [1] * 16
    assert not host.allocator.blocks.isolated
    audit(host)
    free = host.allocator.nr_free_pages()
    free_contig_range(host, first + 3, 16)
    assert host.allocator.nr_free_pages() == free + 16
    audit(host)


def test_free_frames_around_the_range_go_back() -> None:
    host, _, first = on_node_1()
    free = host.allocator.nr_free_pages()
    start = first + 200
    host.sched.run_task("contig", lambda: alloc_contig_range(host, start, start + 3))
    assert host.allocator.nr_free_pages() == free - 3
    audit(host)
    free_contig_range(host, start, 3)
    assert host.allocator.nr_free_pages() == free


def test_a_pinned_page_is_ebusy_though_all_others_leave_and_nothing_is_lost() -> None:
    host, process, first = on_node_1()
    held: list[int] = []
    run(host, lambda: held.append(pin_user_page(process.mm, BASE + 5 * PAGE, FOLL_WRITE)))
    assert refused(host, first, first + 16) == EBUSY
    assert [page for page in range(16) if pfn_of(process, page) == first + page] == [5]
    assert pfn_of(process, 5) == held[0]
    assert not host.allocator.blocks.isolated
    audit(host)
    unpin_user_page(host, held[0])
    host.sched.run_task("contig", lambda: alloc_contig_range(host, first, first + 16))
    audit(host)


def test_page_tables_in_the_block_and_bad_ranges_are_refused_at_once() -> None:
    host, process, first = on_node_1()
    assert refused(host, process.mm.pgd >> 12, (process.mm.pgd >> 12) + 1) == EBUSY
    assert refused(host, 5, 5) == EINVAL
    assert refused(host, -1, 5) == EINVAL
    assert refused(host, 2040, 2060) == EINVAL, "two zones"
    end = host.pages.nr_frames
    assert refused(host, end - 8, end + 8) == EINVAL
    with pytest.raises(KernelError, match="were not taken"):
        free_contig_range(host, first, 1)


def test_alloc_contig_pages_finds_a_range_by_itself() -> None:
    host, _, first = on_node_1()
    pfn: int = host.sched.run_task("contig", lambda: alloc_contig_pages(host, 64, GFP_KERNEL, 1))
    assert pfn == first, "the first aligned range of the node, which its pages had to leave"
    audit(host)
    free_contig_range(host, pfn, 64)


@pytest.mark.parametrize("seed", range(6))
def test_beside_stores_forks_and_unmapping_no_byte_is_lost_and_no_frame_shared(seed: int) -> None:
    host, process, first = on_node_1(64)
    host.start_daemons()
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    stop: list[int] = []
    answers: list[int] = []

    def worker() -> None:
        user(process, BASE, 32, seed)
        stop.append(1)

    def taker() -> None:
        rng = random.Random(seed + 1)
        while not stop:
            start = first + rng.randrange(48)
            length = rng.randrange(1, 16)
            try:
                alloc_contig_range(host, start, start + length)
            except KernelError as exc:
                answers.append(exc.errno or 0)
            else:
                answers.append(0)
                for pfn in range(start, start + length):
                    host.ram.write(pfn << 12, b"the device's")
                host.sched.sleep(rng.randrange(1, 5000))
                free_contig_range(host, start, length)
            host.sched.sleep(rng.randrange(1, 9000))

    def churner() -> None:
        while not stop:
            child = fork_process(process)
            do_madvise(process.mm, BASE + 40 * PAGE, 24 * PAGE, MADV_DONTNEED)
            for page in range(40, 64):
                copy_to_user(process, BASE + page * PAGE, b"again")
            host.sched.sleep(7000)
            exit_process(child)

    run(host, worker, taker, churner)
    host.sched.set_strategy(None)
    host.sched.run_task("rest", host.quiesce)
    assert 0 in answers
    assert set(answers) <= {0, EBUSY}
    audit(host)
