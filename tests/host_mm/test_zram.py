"""Swap to compressed RAM: synchronous, past the swap cache, its frames accounted for."""

from __future__ import annotations

import random

import pytest

from host_mm.arch.x86.pgtable import pte_write
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmzone import MIGRATE_MOVABLE
from host_mm.page import PG_dirty, PG_swapcache
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, Vmm, run

PARAMS = {"swap.device": "zram"}


def swapped(pages: int = 4, data: bytes | None = None) -> Vmm:
    """Pages of text, paged out."""
    vmm = Vmm(params=PARAMS)

    def body() -> None:
        for page in range(pages):
            copy_to_user(vmm.process, vmm.base + page * PAGE, data or b"page %d " % page * 300)
        vmm.host.lru.lru_add_drain_all()
        do_madvise(vmm.mm, vmm.base, pages * PAGE, MADV_PAGEOUT)

    run(vmm.host, body)
    return vmm


def test_pageout_frees_the_frames_at_once_and_keeps_less_than_they_were() -> None:
    vmm = swapped(16)
    device = vmm.host.swap.zram
    assert all(vmm.pfn(page * PAGE) < 0 for page in range(16))
    assert vmm.host.swap_device.inflight == {}
    assert len(device.slots) == 16
    assert 0 < device.pool.frames < 8
    audit(vmm.host)


def test_a_fault_reads_past_the_swap_cache_and_frees_slot_and_memory() -> None:
    vmm = swapped(1)
    host = vmm.host
    got: list[bytes] = []
    run(host, lambda: got.append(copy_from_user(vmm.process, vmm.base, 14)))
    assert got == [b"page 0 page 0 "]
    pfn = vmm.pfn(0)
    assert not host.pages.flags[pfn] & PG_swapcache
    assert pte_write(host.ram.u64[vmm.pte(0) >> 3]), "a page nobody else can know is exclusive"
    assert host.swap.inuse_pages == 0
    assert host.swap.zram.pool.frames == 0
    run(host, host.quiesce)
    audit(host)


def test_a_slot_that_two_processes_hold_goes_through_the_swap_cache() -> None:
    vmm = Vmm(params=PARAMS)

    def body() -> None:
        copy_to_user(vmm.process, vmm.base, b"shared" * 100)
        vmm.host.lru.lru_add_drain_all()
        child = fork_process(vmm.process)
        do_madvise(vmm.mm, vmm.base, PAGE, MADV_PAGEOUT)
        vmm.host.reclaim(0, 0)
        while vmm.pfn(0) >= 0:
            vmm.host.reclaim(0, 0)
        assert copy_from_user(vmm.process, vmm.base, 6) == b"shared"
        assert vmm.host.pages.flags[vmm.pfn(0)] & PG_swapcache
        assert copy_from_user(child, vmm.base, 6) == b"shared"
        exit_process(child)

    run(vmm.host, body)
    run(vmm.host, vmm.host.quiesce)
    audit(vmm.host)


def test_a_page_of_one_word_takes_no_memory() -> None:
    vmm = swapped(3, data=b"\xa5" * PAGE)
    device = vmm.host.swap.zram
    assert (len(device.same), device.pool.frames) == (3, 0)
    got: list[bytes] = []
    run(vmm.host, lambda: got.append(copy_from_user(vmm.process, vmm.base + PAGE, PAGE)))
    assert got == [b"\xa5" * PAGE]


def test_bytes_that_do_not_compress_are_kept_as_they_are() -> None:
    noise = random.Random(3).randbytes(PAGE)
    vmm = swapped(1, data=noise)
    device = vmm.host.swap.zram
    (handle,) = device.slots.values()
    assert device.pool.size(handle) == PAGE
    got: list[bytes] = []
    run(vmm.host, lambda: got.append(copy_from_user(vmm.process, vmm.base, PAGE)))
    assert got == [noise]


def test_a_write_without_memory_leaves_the_page_dirty_and_loses_nothing() -> None:
    vmm = Vmm(params=PARAMS)
    host = vmm.host
    noise = random.Random(4).randbytes(PAGE)

    def body() -> None:
        copy_to_user(vmm.process, vmm.base, noise)
        host.lru.lru_add_drain_all()
        taken = []
        for zone in host.zones:
            while (pfn := zone.rmqueue(0, MIGRATE_MOVABLE)) >= 0:
                taken.append(host.allocator.prep_new_page(pfn, 0, 0))
        frame = vmm.pfn(0)
        do_madvise(vmm.mm, vmm.base, PAGE, MADV_PAGEOUT)
        assert host.pages.flags[frame] & PG_dirty
        for pfn in taken:
            host.pages.refcount[pfn] = 0
            host.allocator.free_frozen_pages(pfn, 0)
        assert copy_from_user(vmm.process, vmm.base, PAGE) == noise

    run(host, body)
    audit(host)


@pytest.mark.parametrize("seed", range(8))
def test_bytes_survive_two_tasks_that_write_and_one_that_pages_out(seed: int) -> None:
    vmm = Vmm(params=PARAMS)
    host = vmm.host
    host.sched.set_strategy(RandomStrategy(seed, 3))
    truth: dict[int, int] = {}

    def writer(parity: int) -> None:
        rng = random.Random(seed * 2 + parity)
        for n in range(120):
            page = rng.randrange(6) * 2 + parity
            if page in truth and rng.random() < 0.5:
                assert vmm.host_read(page * PAGE) == truth[page]
            else:
                vmm.host_write(page * PAGE, n + 1)
                truth[page] = n + 1

    def pager() -> None:
        for _ in range(60):
            host.lru.lru_add_drain_all()
            do_madvise(vmm.mm, vmm.base, 12 * PAGE, MADV_PAGEOUT)
            host.sched.sleep(700)

    run(host, lambda: writer(0), lambda: writer(1), pager)
    host.sched.set_strategy(None)
    run(host, host.quiesce)
    for page, value in truth.items():
        assert vmm.host_read(page * PAGE) == value
    audit(host)
    run(host, lambda: exit_process(vmm.process))
    run(host, host.quiesce)
    audit(host)
    assert host.swap.zram.pool.frames == 0
