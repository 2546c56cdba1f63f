"""zswap: stores that cost no I/O, loads that dirty, writeback of the oldest, and no byte lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.page import PG_dirty, PG_swapcache
from host_mm.page_alloc import MIGRATE_MOVABLE
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, Vmm, run


def text(page: int, salt: int = 0) -> bytes:
    """A page that compresses to about a third."""
    rng = random.Random(page * 1000 + salt)
    return (rng.randbytes(1200) + b"%d " % page * 2000)[:PAGE]


def machine(pages: int = 0, **kw: Any) -> Vmm:
    params = {"zswap.enabled": "Y", **kw.pop("params", {})}
    vmm = Vmm(params=params, **kw)
    run(vmm.host, lambda: [write(vmm, page) for page in range(pages)])
    vmm.host.lru.lru_add_drain_all()
    return vmm


def write(vmm: Vmm, page: int, salt: int = 0) -> None:
    copy_to_user(vmm.process, vmm.base + page * PAGE, text(page, salt))


def read(vmm: Vmm, page: int) -> bytes:
    return copy_from_user(vmm.process, vmm.base + page * PAGE, PAGE)


def pageout(vmm: Vmm, pages: int, first: int = 0) -> None:
    run(vmm.host, lambda: do_madvise(vmm.mm, vmm.base + first * PAGE, pages * PAGE, MADV_PAGEOUT))


def test_a_store_writes_nothing_frees_the_frame_and_packs_pages_into_frames() -> None:
    vmm = machine(30)
    host = vmm.host
    free = host.allocator.nr_free_pages()
    pageout(vmm, 30)
    assert host.vmstat["zswpout"] == 30
    assert host.vmstat["pswpout"] == 0
    assert 0 < host.zswap.pool.frames <= 15
    assert host.allocator.nr_free_pages() == free + 30 - host.zswap.pool.frames
    audit(host)


def test_a_load_reads_nothing_and_leaves_the_page_dirty_in_the_swap_cache_only() -> None:
    vmm = machine(2)
    host = vmm.host
    pageout(vmm, 2)
    got: list[bytes] = []
    run(host, lambda: got.append(read(vmm, 0)))
    assert got == [text(0)]
    assert host.vmstat["pswpin"] == 0
    assert host.vmstat["zswpin"] == 1
    pfn = vmm.pfn(0)
    if host.pages.flags[pfn] & PG_swapcache:
        assert host.pages.flags[pfn] & PG_dirty
    assert len(host.zswap.lru) == 1
    audit(host)


def test_two_round_trips_keep_the_newest_bytes() -> None:
    vmm = machine(1)
    host = vmm.host
    for salt in range(1, 4):
        pageout(vmm, 1)
        run(host, lambda salt=salt: write(vmm, 0, salt))
        pageout(vmm, 1)
        got: list[bytes] = []
        run(host, lambda got=got: got.append(read(vmm, 0)))
        assert got == [text(0, salt)]
    audit(host)


def test_freeing_the_slot_frees_the_entry() -> None:
    vmm = machine(8)
    host = vmm.host
    pageout(vmm, 8)
    run(host, lambda: do_madvise(vmm.mm, vmm.base, 8 * PAGE, MADV_DONTNEED))
    assert (len(host.zswap.lru), host.zswap.pool.frames, host.swap.inuse_pages) == (0, 0, 0)
    audit(host)


def test_pages_of_zeros_are_the_zero_maps() -> None:
    vmm = machine()
    run(vmm.host, lambda: copy_to_user(vmm.process, vmm.base, bytes(PAGE)))
    vmm.host.lru.lru_add_drain_all()
    pageout(vmm, 1)
    assert len(vmm.host.zswap.lru) == 0
    assert vmm.host.vmstat["swpout_zero"] == 1


def test_a_page_that_does_not_compress_is_kept_as_it_is() -> None:
    vmm = machine()
    noise = random.Random(9).randbytes(PAGE)
    run(vmm.host, lambda: copy_to_user(vmm.process, vmm.base, noise))
    vmm.host.lru.lru_add_drain_all()
    pageout(vmm, 1)
    (entry,) = vmm.host.zswap.lru.values()
    assert vmm.host.zswap.pool.size(entry.handle) == PAGE
    got: list[bytes] = []
    run(vmm.host, lambda: got.append(read(vmm, 0)))
    assert got == [noise]


def test_writeback_sends_the_oldest_on_after_a_second_chance() -> None:
    vmm = machine(6)
    host = vmm.host
    pageout(vmm, 6)
    slots = [vmm.slot(page * PAGE) for page in range(6)]
    assert host.zswap.shrink_one() == -11, "referenced: not this time"
    assert list(host.zswap.lru) == [*slots[1:], slots[0]]
    written: list[int] = []
    run(host, lambda: written.append(host.zswap.writeback(3)))
    run(host, host.quiesce)
    assert written == [3]
    assert host.vmstat["zswpwb"] == host.vmstat["pswpout"] == 3
    assert len(host.zswap.lru) == 3
    assert [slot for slot in slots if slot not in host.zswap.lru] == [slots[0], slots[1], slots[2]]
    got: list[bytes] = []
    run(host, lambda: got.extend(read(vmm, page) for page in range(6)))
    assert got == [text(page) for page in range(6)]
    audit(host)


def test_a_full_pool_refuses_and_a_worker_writes_it_back_below_the_threshold() -> None:
    vmm = machine(200, params={"zswap.max_pool_percent": "1"})
    host = vmm.host
    assert host.zswap.max_pages() == 40
    pageout(vmm, 200)
    run(host, host.quiesce)
    assert host.vmstat["pswpout"] > 0, "what was refused went to the file"
    assert not host.zswap.working
    for _ in range(30):
        swapped = [p for p in range(200) if vmm.pfn(p * PAGE) < 0]
        in_file = [p for p in swapped if vmm.slot(p * PAGE) not in host.zswap.lru]
        page = in_file[0]
        run(host, lambda page=page: write(vmm, page))
        pageout(vmm, 200)
        run(host, host.quiesce)
    assert host.vmstat["zswpwb"] > 0
    assert host.zswap.pool.frames <= host.zswap.max_pages() + 8
    got: list[bytes] = []
    run(host, lambda: got.extend(read(vmm, page) for page in range(200)))
    assert got == [text(page) for page in range(200)]
    audit(host)


def test_a_refused_store_forgets_what_an_earlier_one_left() -> None:
    vmm = machine(1)
    host = vmm.host
    pageout(vmm, 1)
    slot = vmm.slot(0)
    assert slot in host.zswap.lru
    host.zswap.enabled = False
    host.pages.private[5] = slot
    host.zswap.store(5)
    host.pages.private[5] = 0
    assert slot not in host.zswap.lru


def test_an_entry_that_is_in_the_swap_cache_is_not_written_back() -> None:
    vmm = machine(1)
    host = vmm.host

    def body() -> None:
        child = fork_process(vmm.process)
        do_madvise(vmm.mm, vmm.base, PAGE, MADV_PAGEOUT)
        while vmm.pfn(0) >= 0:
            host.reclaim(0, 0)
        slot = vmm.slot(0)
        entry = host.zswap.lru[slot]
        read(vmm, 0)
        assert host.zswap.writeback_entry(slot, entry) == -17
        exit_process(child)

    run(host, body)
    run(host, host.quiesce)
    audit(host)


def test_the_shrinker_counts_fewer_the_better_pages_compress_and_reclaim_runs_it() -> None:
    vmm = machine(60, params={"zswap.shrinker_enabled": "Y"})
    host = vmm.host
    pageout(vmm, 60)
    zswap = host.zswap
    assert zswap.shrinker_count() == 60 * zswap.pool.frames // 60
    zswap.nr_disk_swapins = 20
    assert zswap.shrinker_count() == 40 * zswap.pool.frames // 60
    for entry in zswap.lru.values():
        entry.referenced = False
    run(host, lambda: [zswap.shrink_slab(2) for _ in range(8)])
    run(host, host.quiesce)
    assert host.vmstat["zswpwb"] > 0
    audit(host)


def test_a_pool_that_cannot_grow_lets_the_file_have_the_page() -> None:
    vmm = machine(4)
    host = vmm.host

    def body() -> None:
        taken = []
        for zone in host.zones:
            while (pfn := zone.rmqueue(0, MIGRATE_MOVABLE)) >= 0:
                taken.append(host.allocator.prep_new_page(pfn, 0, 0))
        do_madvise(vmm.mm, vmm.base, PAGE, MADV_PAGEOUT)
        for pfn in taken:
            host.pages.refcount[pfn] = 0
            host.allocator.free_frozen_pages(pfn, 0)

    run(host, body)
    run(host, host.quiesce)
    assert host.vmstat["zswap_reject_alloc_fail"] == 1
    assert host.vmstat["pswpout"] == 1
    audit(host)


def test_the_truth_about_dropped_folios_knows_zswap() -> None:
    vmm = machine(1)
    host = vmm.host
    pageout(vmm, 1)
    slot = vmm.slot(0)
    entry = host.zswap.lru[slot]
    host.zswap.pool.free(entry.handle)
    entry.handle = host.zswap.pool.malloc(b"other bytes" * 200, 0xCC0)
    pfn = host.allocator.alloc_pages(0xCC0, 0, 0)
    host.ram.write(pfn << 12, text(0))
    from host_mm.arch.x86.swapops import swp_entry

    host.pages.private[pfn] = swp_entry(host.swap.type, slot)
    with pytest.raises((BrokenTruth, Exception), match=r"dropped as clean|incorrect header"):
        host.checks.folio_dropped_clean(pfn)


def test_the_audit_finds_an_entry_of_a_free_slot() -> None:
    vmm = machine(2)
    host = vmm.host
    pageout(vmm, 2)
    host.swap.free_notify.remove(host.zswap.invalidate)
    run(host, lambda: do_madvise(vmm.mm, vmm.base, PAGE, MADV_DONTNEED))
    with pytest.raises(BrokenTruth, match="zswap keeps slot"):
        audit(host)


@pytest.mark.parametrize("gen", ["N", "Y"])
@pytest.mark.parametrize("seed", range(6))
def test_random_use_beside_reclaim_and_writeback_loses_no_byte(seed: int, gen: str) -> None:
    vmm = machine(params={"zswap.max_pool_percent": "1", "mm.lru_gen": gen, "zswap.shrinker_enabled": "Y"})
    host = vmm.host
    host.sched.set_strategy(RandomStrategy(seed, 4))
    left = 2

    def user(parity: int) -> None:
        nonlocal left
        rng = random.Random(seed * 2 + parity)
        truth: dict[int, int] = {}
        for n in range(150):
            page = rng.randrange(60) * 2 + parity
            if page in truth and rng.random() < 0.5:
                assert read(vmm, page) == text(page, truth[page])
            elif page in truth and rng.random() < 0.1:
                do_madvise(vmm.mm, vmm.base + page * PAGE, PAGE, MADV_DONTNEED)
                del truth[page]
            else:
                write(vmm, page, n)
                truth[page] = n
        left -= 1

    def pager() -> None:
        rng = random.Random(seed)
        while left:
            host.sched.sleep(10_000)
            host.lru.lru_add_drain_all()
            first = rng.randrange(100)
            do_madvise(vmm.mm, vmm.base + first * PAGE, 20 * PAGE, MADV_PAGEOUT)
            if rng.random() < 0.5:
                host.zswap.writeback(rng.randrange(1, 20))

    run(host, lambda: user(0), lambda: user(1), pager)
    host.sched.set_strategy(None)
    run(host, host.quiesce)
    audit(host)
    assert host.vmstat["zswpout"] > 0
    assert host.vmstat["zswpwb"] > 0
    run(host, lambda: exit_process(vmm.process))
    run(host, host.quiesce)
    audit(host)
    assert (host.zswap.pool.frames, host.swap.inuse_pages) == (0, 0)
