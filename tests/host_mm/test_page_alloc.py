"""The buddy allocator: alignment, merging, watermarks, poison (host_mm/page_alloc.py, page.py)."""

from __future__ import annotations

import random
import time

import pytest

from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth, OutOfMemory
from host_mm.page import PG_locked, get_page, page_folio, put_page, try_get_page
from host_mm.page_alloc import (
    GFP_ATOMIC,
    GFP_COMP,
    GFP_KERNEL,
    GFP_NORETRY,
    GFP_NOWAIT,
    GFP_THISNODE,
    GFP_ZERO,
    MAX_ORDER,
    alloc_pages,
)
from host_mm.ram import POISON
from tests.host_mm.machine import make_host


def free_lists(host: HostMm) -> list[list[int]]:
    return [[sum(map(len, types)) for types in zone.free_list] for zone in host.zones]


def test_64_gib_start_at_once() -> None:
    began = time.perf_counter()
    host = make_host(ram=64 << 30)
    assert time.perf_counter() - began < 1.0
    assert host.allocator.nr_free_pages() == (64 << 18) - 2


@pytest.mark.parametrize("ram", [3 << 20, 5 << 20, 24 << 20, (24 << 20) + 12 * 4096])
def test_every_size_of_ram_is_usable_to_the_last_frame(ram: int) -> None:
    host = make_host(ram=ram, nodes=1)
    assert host.allocator.nr_free_pages() == (ram >> 12) - 2


def test_blocks_are_aligned_disjoint_and_merge_back_to_the_start() -> None:
    host = make_host(ram=32 << 20)
    before = free_lists(host)
    rng = random.Random(1)
    held: list[tuple[int, int]] = []
    owned: set[int] = set()
    for _ in range(600):
        if held and rng.random() < 0.45:
            pfn, order = held.pop(rng.randrange(len(held)))
            owned -= set(range(pfn, pfn + (1 << order)))
            put_page(host, pfn)
        else:
            order = rng.choice((0, 0, 0, 1, 2, 4))
            pfn = alloc_pages(host, GFP_KERNEL | GFP_COMP, order, rng.randrange(2))
            block = set(range(pfn, pfn + (1 << order)))
            assert pfn % (1 << order) == 0
            assert not block & owned
            owned |= block
            held.append((pfn, order))
    for pfn, _ in held:
        put_page(host, pfn)
    assert free_lists(host) == before


def test_a_freed_frame_is_poisoned_and_of_a_new_generation() -> None:
    host = make_host()
    told: list[tuple[int, int]] = []
    host.free_hooks.append(lambda pfn, order: told.append((pfn, order)))
    pfn = alloc_pages(host, GFP_KERNEL | GFP_ZERO)
    generation = host.pages.generation[pfn]
    assert host.ram.page_is_zero(pfn)
    put_page(host, pfn)
    assert host.ram.read(pfn << 12, 4096) == bytes([POISON]) * 4096
    assert host.pages.generation[pfn] == generation + 1
    assert told == [(pfn, 0)]


def test_tail_pages_count_for_their_head() -> None:
    host = make_host()
    head = alloc_pages(host, GFP_KERNEL | GFP_COMP, 2)
    get_page(host, head + 3)
    assert host.pages.refcount[head] == 2
    assert page_folio(host.pages, head + 2) == head
    put_page(host, head + 1)
    put_page(host, head)
    assert not try_get_page(host, head + 3)


def test_wrong_counts_are_broken_truths() -> None:
    host = make_host()
    pfn = alloc_pages(host, GFP_KERNEL)
    with pytest.raises(BrokenTruth, match="page-refcount"):
        put_page(host, pfn, 2)
    host.pages.flags[pfn] |= PG_locked
    with pytest.raises(BrokenTruth, match="bad-page-state"):
        put_page(host, pfn)
    host.pages.flags[pfn] = 0
    host.pages.refcount[pfn] = 1
    put_page(host, pfn)
    with pytest.raises(BrokenTruth, match="page-refcount"):
        get_page(host, pfn)


def test_a_node_is_exhausted_before_the_other_is_asked() -> None:
    host = make_host(ram=16 << 20)
    near = [alloc_pages(host, GFP_KERNEL, 0, 1) for _ in range(100)]
    assert {host.allocator.nid_of(pfn) for pfn in near} == {1}
    zone = host.nodes[1].zone
    while zone.nr_free > zone.wmark_low:
        alloc_pages(host, GFP_KERNEL, 0, 1)
    assert host.allocator.nid_of(alloc_pages(host, GFP_KERNEL, 0, 1)) == 0


def test_who_may_dig_how_deep() -> None:
    host = make_host(ram=2 << 20, nodes=1, swap=None)
    zone = host.zones[0]
    assert 0 < zone.wmark_min < zone.wmark_low < zone.wmark_high
    while (pfn := alloc_pages(host, GFP_NOWAIT)) >= 0:
        assert host.pages.refcount[pfn] == 1
    assert zone.nr_free <= zone.wmark_min + 1
    left = zone.nr_free
    assert alloc_pages(host, GFP_KERNEL | GFP_NORETRY | GFP_THISNODE) < 0
    assert alloc_pages(host, GFP_ATOMIC) >= 0
    assert zone.nr_free == left - 1


def test_nothing_left_and_nobody_to_kill_is_out_of_memory() -> None:
    host = make_host(ram=1 << 20, nodes=1, swap=None)

    def take_all() -> None:
        for _ in range(1 << 10):
            alloc_pages(host, GFP_KERNEL)

    with pytest.raises(OutOfMemory):
        take_all()


def test_orders_beyond_the_last_cannot_be_had() -> None:
    host = make_host(ram=32 << 20)
    assert alloc_pages(host, GFP_KERNEL | GFP_COMP, MAX_ORDER) % (1 << MAX_ORDER) == 0
