"""Isolated page blocks give nothing out and take everything back (host_mm/page_isolation.py)."""

from __future__ import annotations

from errno import EBUSY

from host_mm.host import HostMm
from host_mm.mmzone import PAGEBLOCK_NR_PAGES
from host_mm.page import PG_lru, put_page
from host_mm.page_alloc import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, alloc_pages
from host_mm.page_isolation import (
    PB_ISOLATE_MODE_MEM_OFFLINE,
    PB_ISOLATE_MODE_OTHER,
    has_unmovable_pages,
    start_isolate_page_range,
    test_pages_isolated,
    undo_isolate_page_range,
)
from host_mm.truths import audit
from tests.host_mm.machine import Vmm, make_host
from trace_events.stream import Listener

test_pages_isolated.__test__ = False  # type: ignore[attr-defined]
BLOCK = PAGEBLOCK_NR_PAGES


def make() -> HostMm:
    return make_host(ram=16 << 20, nodes=1)


def test_a_free_range_is_isolated_and_comes_back_as_it_was() -> None:
    host = make()
    zone = host.zones[0]
    before = [[len(blocks) for blocks in types] for types in zone.free_list]
    free = zone.nr_free
    assert start_isolate_page_range(host, 3 * BLOCK, 6 * BLOCK, PB_ISOLATE_MODE_OTHER) == 0
    assert host.allocator.blocks.isolated == {3, 4, 5}
    assert (zone.nr_free, zone.nr_isolated) == (free - 3 * BLOCK, 3 * BLOCK)
    assert test_pages_isolated(host, 3 * BLOCK, 6 * BLOCK, PB_ISOLATE_MODE_OTHER) == 0
    assert test_pages_isolated(host, 2 * BLOCK, 6 * BLOCK, PB_ISOLATE_MODE_OTHER) == -EBUSY
    audit(host)
    undo_isolate_page_range(host, 3 * BLOCK, 6 * BLOCK)
    assert [[len(blocks) for blocks in types] for types in zone.free_list] == before
    assert (zone.nr_free, zone.nr_isolated) == (free, 0)


def test_the_blocks_at_the_edges_are_isolated_as_a_whole() -> None:
    host = make()
    assert start_isolate_page_range(host, 3 * BLOCK + 7, 4 * BLOCK + 1, PB_ISOLATE_MODE_OTHER) == 0
    assert host.allocator.blocks.isolated == {3, 4}
    undo_isolate_page_range(host, 3 * BLOCK + 7, 4 * BLOCK + 1)
    assert not host.allocator.blocks.isolated


def test_an_unmovable_page_anywhere_in_an_edge_block_refuses_and_isolates_nothing() -> None:
    host = make()
    pfn = alloc_pages(host, GFP_KERNEL)
    assert has_unmovable_pages(host, 0, BLOCK, PB_ISOLATE_MODE_OTHER) == 0, "frame 0 is reserved"
    assert has_unmovable_pages(host, 2, BLOCK, PB_ISOLATE_MODE_OTHER) == pfn
    while pfn < BLOCK + 5:
        pfn = alloc_pages(host, GFP_KERNEL)
    for mode in (PB_ISOLATE_MODE_OTHER, PB_ISOLATE_MODE_MEM_OFFLINE):
        assert start_isolate_page_range(host, BLOCK + 100, 3 * BLOCK, mode) == -EBUSY
        assert start_isolate_page_range(host, 2 * BLOCK, 2 * BLOCK + 1, mode) == 0
        undo_isolate_page_range(host, 2 * BLOCK, 2 * BLOCK + 1)
    assert not host.allocator.blocks.isolated
    assert host.zones[0].nr_isolated == 0


def test_two_who_want_overlapping_ranges_cannot_both_have_them() -> None:
    host = make()
    assert start_isolate_page_range(host, 2 * BLOCK, 4 * BLOCK, PB_ISOLATE_MODE_OTHER) == 0
    assert start_isolate_page_range(host, 3 * BLOCK, 5 * BLOCK, PB_ISOLATE_MODE_OTHER) == -EBUSY
    assert host.allocator.blocks.isolated == {2, 3}, "the first one's blocks stay his"


def test_in_zone_movable_only_reserved_frames_are_unmovable() -> None:
    host = make_host(ram=16 << 20, nodes=1, params={"mm.movablecore": "8M"})
    start = host.zones[1].start
    pfn = alloc_pages(host, GFP_HIGHUSER_MOVABLE)
    assert pfn == start
    assert not host.pages.flags[pfn] & PG_lru
    assert has_unmovable_pages(host, start, start + BLOCK, PB_ISOLATE_MODE_OTHER) == -1
    assert start_isolate_page_range(host, start, start + BLOCK, PB_ISOLATE_MODE_OTHER) == 0
    assert test_pages_isolated(host, start, start + BLOCK, PB_ISOLATE_MODE_OTHER) == -EBUSY
    put_page(host, pfn)
    assert test_pages_isolated(host, start, start + BLOCK, PB_ISOLATE_MODE_OTHER) == 0


def test_what_is_freed_in_an_isolated_block_stays_there_and_the_line_is_the_kernel_s() -> None:
    vmm = Vmm()
    host = vmm.host
    vmm.host_write(0, 1)
    host.lru.lru_add_drain_all()
    points = {tp.full_name: tp for tp in host.stream.tracepoints()}
    lines: list[str] = []
    host.stream.listen(Listener(
        ["page_isolation:*"], lambda e: lines.append(points[e.event].format(tuple(e.args.values()))),
        ancestors=False,
    ))
    start = host.zones[0].end - BLOCK
    assert test_pages_isolated(host, start, start + BLOCK, PB_ISOLATE_MODE_OTHER) == -EBUSY
    assert lines == [f"start_pfn={start:#x} end_pfn={start + BLOCK:#x} fin_pfn={start:#x} ret=fail"]
