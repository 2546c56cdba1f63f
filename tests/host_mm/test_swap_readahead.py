"""Swap readahead: which slots come along with a fault, and how hits widen the window."""

from __future__ import annotations

import random

import pytest

from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.page import PG_readahead
from host_mm.swap_readahead import swapin_nr_pages
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm, run


def swapped(pages: int = 64, **params: str) -> Vmm:
    """Pages in the swap file and in no frame."""
    vmm = Vmm(params=params)
    host = vmm.host

    def body() -> None:
        for page in range(pages):
            vmm.host_write(page * PAGE, page + 1)
        host.lru.lru_add_drain_all()
        for _ in range(2):
            do_madvise(vmm.mm, vmm.base, pages * PAGE, MADV_PAGEOUT)
            host.swap_device.drain()
            host.lru.lru_add_drain_all()
        while host.reclaim(0, 0):
            host.swap_device.drain()

    run(host, body)
    assert not any(host.swap.cache)
    return vmm


def cached(vmm: Vmm) -> set[int]:
    """The slots that are in the swap cache."""
    return {slot for slot, pfn in enumerate(vmm.host.swap.cache) if pfn}


def read(vmm: Vmm, *pages: int) -> None:
    def body() -> None:
        for page in pages:
            assert vmm.host_read(page * PAGE) == page + 1
            vmm.host.swap_device.drain()

    run(vmm.host, body)


@pytest.mark.parametrize(("prev", "now", "hits", "most", "last", "window"), [
    (10, 50, 0, 8, 0, 1),  # nothing to judge by
    (10, 11, 0, 8, 0, 2),  # beside the last
    (10, 9, 0, 8, 0, 2),
    (10, 50, 4, 32, 0, 8),  # 4 + 2, rounded up
    (10, 50, 3, 32, 0, 8),
    (10, 50, 1, 32, 0, 4),
    (10, 50, 60, 8, 0, 8),  # no more than the most
    (10, 50, 0, 32, 16, 8),  # does not shrink by more than half
])
def test_the_window(prev: int, now: int, hits: int, most: int, last: int, window: int) -> None:
    assert swapin_nr_pages(prev, now, hits, most, last) == window


def test_by_default_nothing_is_read_ahead() -> None:
    vmm = swapped()
    read(vmm, 5, 6, 7, 8)
    assert vmm.host.vmstat["swap_ra"] == 0


def test_a_first_fault_reads_a_window_around_its_address_and_marks_the_others() -> None:
    vmm = swapped(**{"vm.page_cluster": "3"})
    host = vmm.host
    read(vmm, 20)
    assert host.vmstat["swap_ra"] == 7
    marked = [pfn - 1 for pfn in host.swap.cache if pfn and host.pages.flags[pfn - 1] & PG_readahead]
    assert len(marked) == 7
    assert vmm.mm.vma_lookup(vmm.base).swap_readahead_info == (vmm.base + 20 * PAGE, 8, 0)
    # left = address - (8 - 1) // 2 pages
    assert [page for page in range(64) if vmm.in_swap_cache(page * PAGE)] == list(range(17, 25))


def test_hits_are_counted_where_the_window_is_and_clear_the_mark() -> None:
    vmm = swapped(**{"vm.page_cluster": "3"})
    host = vmm.host
    read(vmm, 20, 21, 22)
    assert host.vmstat["swap_ra_hit"] == 2
    assert host.vmstat["pgmajfault"] == 1
    assert vmm.mm.vma_lookup(vmm.base).swap_readahead_info[1:] == (8, 2)


def test_a_sequence_reads_forward_from_the_address() -> None:
    vmm = swapped(**{"vm.page_cluster": "2"})
    vma = vmm.mm.vma_lookup(vmm.base)
    vma.swap_readahead_info = vmm.base + 29 * PAGE, 4, 2
    read(vmm, 30)
    assert [page for page in range(64) if vmm.in_swap_cache(page * PAGE)] == [30, 31, 32, 33]


def test_a_window_stays_in_its_vma() -> None:
    vmm = swapped(**{"vm.page_cluster": "5"})
    read(vmm, 0)
    assert [page for page in range(64) if vmm.in_swap_cache(page * PAGE)] == [0, 1, 2, 3, 4]


def test_by_slot_the_window_is_the_aligned_cluster() -> None:
    vmm = swapped(**{"vm.page_cluster": "3", "swap.vma_ra_enabled": "N"})
    host = vmm.host
    first = vmm.slot(8 * PAGE)
    read(vmm, 8)
    assert host.vmstat["swap_ra"] == 0, "no hits, and nothing beside it"
    following = next(page for page in range(64) if vmm.slot(page * PAGE) == first + 1)
    read(vmm, following)
    assert host.swap_readahead.last_pages == 2
    host.swap_readahead.hits = 6
    far = next(page for page in range(64) if vmm.slot(page * PAGE) > first + 20)
    slot = vmm.slot(far * PAGE)
    before = cached(vmm)
    read(vmm, far)
    assert cached(vmm) - before <= set(range(slot & ~7, (slot | 7) + 1))
    assert len(cached(vmm) - before) == 8


@pytest.mark.parametrize("by_vma", ["Y", "N"])
@pytest.mark.parametrize("seed", range(4))
def test_readahead_beside_writes_and_reclaim_loses_no_byte_and_no_frame(seed: int, by_vma: str) -> None:
    vmm = swapped(**{"vm.page_cluster": "4", "swap.vma_ra_enabled": by_vma})
    host = vmm.host
    host.sched.set_strategy(RandomStrategy(seed, 4))
    truth = {page: page + 1 for page in range(64)}

    def user(parity: int) -> None:
        rng = random.Random(seed * 2 + parity)
        for n in range(150):
            page = rng.randrange(32) * 2 + parity
            assert vmm.host_read(page * PAGE) == truth[page]
            if rng.random() < 0.3:
                vmm.host_write(page * PAGE, n + 1000)
                truth[page] = n + 1000

    def pager() -> None:
        for _ in range(40):
            host.sched.sleep(90_000)
            host.lru.lru_add_drain_all()
            do_madvise(vmm.mm, vmm.base, 64 * PAGE, MADV_PAGEOUT)

    run(host, lambda: user(0), lambda: user(1), pager)
    host.sched.set_strategy(None)
    run(host, host.quiesce)
    audit(host)
    assert host.vmstat["swap_ra"] > 0
