"""Page blocks keep kinds of pages apart, and zones kinds of requests (host_mm/mmzone.py)."""

from __future__ import annotations

import random

import pytest

from host_mm.host import HostMm
from host_mm.mmzone import (
    MIGRATE_ISOLATE,
    MIGRATE_MOVABLE,
    MIGRATE_UNMOVABLE,
    PAGEBLOCK_NR_PAGES,
    ZONE_MOVABLE,
    ZONE_NORMAL,
)
from host_mm.page import PG_buddy, put_page
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NORETRY, alloc_pages
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm, make_host
from trace_events.stream import Listener

MOVABLE = GFP_HIGHUSER_MOVABLE | GFP_NORETRY
GROUPED = {"mm.page_group_by_mobility": "Y"}


def blocks_of(pfns: list[int]) -> set[int]:
    return {pfn // PAGEBLOCK_NR_PAGES for pfn in pfns}


def test_grouping_keeps_movable_and_unmovable_pages_in_different_blocks() -> None:
    host = make_host(ram=32 << 20, nodes=1, params=GROUPED)
    movable: list[int] = []
    fixed: list[int] = []
    for _ in range(600):
        movable.append(alloc_pages(host, MOVABLE))
        fixed.append(alloc_pages(host, GFP_KERNEL))
    assert not blocks_of(movable) & blocks_of(fixed)
    types = host.allocator.blocks.type
    assert {types[block] for block in blocks_of(fixed)} == {MIGRATE_UNMOVABLE}
    assert {types[block] for block in blocks_of(movable)} == {MIGRATE_MOVABLE}


def test_without_grouping_frames_are_given_out_one_after_the_other() -> None:
    host = make_host(ram=32 << 20, nodes=1)
    pfns = [alloc_pages(host, MOVABLE if n & 1 else GFP_KERNEL) for n in range(200)]
    assert pfns == list(range(pfns[0], pfns[0] + 200))


def test_a_request_takes_from_another_type_rather_than_fail() -> None:
    host = make_host(ram=4 << 20, nodes=1, swap=None, params=GROUPED)
    pfns: list[int] = []
    while (pfn := alloc_pages(host, GFP_KERNEL | GFP_NORETRY if len(pfns) < 64 else MOVABLE)) >= 0:
        pfns.append(pfn)
    assert len(pfns) > 900
    assert len(set(pfns)) == len(pfns)
    for pfn in pfns:
        put_page(host, pfn)
    assert host.zones[0].nr_free == host.zones[0].managed
    audit(host)


def test_only_what_can_move_goes_to_zone_movable_and_it_goes_there_first() -> None:
    host = make_host(ram=32 << 20, nodes=2, params={"mm.movablecore": "16M"})
    assert [zone.idx for zone in host.zones] == [ZONE_NORMAL, ZONE_MOVABLE] * 2
    assert sum(zone.managed for zone in host.zones) == (32 << 8) - 2
    zone_of = host.allocator.zone_of
    assert zone_of(alloc_pages(host, GFP_HIGHUSER_MOVABLE)).idx == ZONE_MOVABLE
    assert zone_of(alloc_pages(host, GFP_KERNEL)).idx == ZONE_NORMAL
    while zone_of(alloc_pages(host, GFP_HIGHUSER_MOVABLE)).idx == ZONE_MOVABLE:
        pass
    assert host.zones[0].nr_free > host.zones[0].wmark_low, "its own node's other zone came next"
    assert host.zones[1].nr_free <= host.zones[1].wmark_low + 1


def test_more_movable_memory_than_there_is_means_none() -> None:
    host = make_host(ram=8 << 20, nodes=1, params={"mm.movablecore": "8M"})
    assert [zone.idx for zone in host.zones] == [ZONE_NORMAL]


def test_unmovable_requests_fail_when_only_zone_movable_has_memory() -> None:
    host = make_host(ram=8 << 20, nodes=1, swap=None, params={"mm.movablecore": "4M"})
    taken = 0
    while alloc_pages(host, GFP_KERNEL | GFP_NORETRY) >= 0:
        taken += 1
    assert taken <= host.zones[0].managed
    assert host.zones[1].nr_free == host.zones[1].managed


def test_isolated_blocks_are_neither_counted_nor_handed_out_nor_merged() -> None:
    host = make_host(ram=8 << 20, nodes=1)
    zone, blocks = host.zones[0], host.allocator.blocks
    pfn = alloc_pages(host, GFP_KERNEL)
    block = pfn // PAGEBLOCK_NR_PAGES
    free = zone.nr_free
    moved = zone.move_freepages_block(block * PAGEBLOCK_NR_PAGES, MIGRATE_MOVABLE, MIGRATE_ISOLATE)
    blocks.isolated.add(block)
    assert zone.nr_isolated == moved > 0
    assert zone.nr_free == free - moved
    put_page(host, pfn)
    assert zone.nr_isolated == moved + 1
    others = [alloc_pages(host, MOVABLE) for _ in range(600)]
    assert block not in blocks_of(others)
    for other in others:
        put_page(host, other)
    assert all(order < 10 for head, order in zone.free_blocks(0, 1024) if head // PAGEBLOCK_NR_PAGES == block)


def test_reclaim_for_an_unmovable_request_leaves_zone_movable_alone() -> None:
    vmm = Vmm(make_host(ram=8 << 20, nodes=1, params={"mm.movablecore": "4M"}))
    host = vmm.host
    for page in range(1200):
        vmm.host_write(page * PAGE, page)
    host.lru.lru_add_drain_all()
    movable, normal = host.zones[1].nr_free, host.zones[0].nr_free
    skipped: list[int] = []
    host.stream.listen(Listener(
        ["vmscan:mm_vmscan_lru_isolate"], lambda e: skipped.append(e.args["nr_skipped"]), ancestors=False
    ))
    for _ in range(4):
        host.sched.run_task("reclaim", lambda: host.reclaim(0, 0, GFP_KERNEL))
    assert host.zones[0].nr_free > normal
    assert host.zones[1].nr_free == movable
    assert sum(skipped) > 0
    host.sched.run_task("reclaim", lambda: host.reclaim(0, 0, GFP_HIGHUSER_MOVABLE))
    host.sched.run_task("reclaim", lambda: host.reclaim(0, 0, GFP_HIGHUSER_MOVABLE))
    assert host.zones[1].nr_free > movable
    host.sched.run_task("rest", host.quiesce)
    audit(host)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_requests_and_frees_keeps_lists_types_and_counts_together(seed: int) -> None:
    rng = random.Random(seed)
    host: HostMm = make_host(ram=16 << 20, nodes=2, swap=None, params=GROUPED | {"mm.movablecore": "4M"})
    held: list[int] = []
    for _ in range(2500):
        if held and rng.random() < 0.45:
            put_page(host, held.pop(rng.randrange(len(held))))
            continue
        gfp = rng.choice((MOVABLE, GFP_KERNEL | GFP_NORETRY)) | GFP_COMP
        pfn = alloc_pages(host, gfp, rng.choice((0, 0, 0, 1, 3, 9)), rng.randrange(2))
        if pfn >= 0:
            held.append(pfn)
    for zone in host.zones:
        for order, types in enumerate(zone.free_list):
            for migratetype, heads in enumerate(types):
                for head in heads:
                    assert host.pages.flags[head] & PG_buddy
                    assert host.pages.order[head] == order
                    assert host.allocator.blocks.migratetype(head) == migratetype
    for pfn in held:
        put_page(host, pfn)
    assert all(zone.nr_free == zone.managed for zone in host.zones)
    audit(host)
