"""The host's memory as it boots: which nodes and zones there are, and all of it free.

Source of truth: mm/mm_init.c (free_area_init, find_zone_movable_pfns_for_nodes), mm/memblock.c:
memblock_free_all; Linux 6.18.

A zone is cut into blocks of the highest order, so that nothing is paid per frame. With
`mm.movablecore=SIZE` the upper SIZE bytes of the host's memory, spread over its nodes, are ZONE_MOVABLE: only
what can be migrated is put there.

Not modelled: zones DMA and DMA32, kernelcore=, movable_node, holes, struct pages that are made late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.mmzone import (
    MAX_ORDER,
    MIGRATE_MOVABLE,
    PAGEBLOCK_NR_PAGES,
    ZONE_MOVABLE,
    ZONE_NORMAL,
    PageBlocks,
    PgData,
    Zone,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["free_area_init", "memblock_free_all", "memparse", "node_spanned_pages"]


def memparse(text: str) -> int:
    """lib/cmdline.c: digits, and K, M or G in either case."""
    unit = {"k": 10, "m": 20, "g": 30}.get(text[-1:].lower())
    return int(text[:-1]) << unit if unit else int(text)


def node_spanned_pages(nr_frames: int, nr_nodes: int) -> int:
    """How many frames each node but the last has: whole blocks of the highest order if it has one."""
    return (nr_frames // nr_nodes) >> MAX_ORDER << MAX_ORDER or nr_frames // nr_nodes


def free_area_init(host: HostMm, blocks: PageBlocks, nr_frames: int, nr_nodes: int) -> list[PgData]:
    """The nodes with their zones, nothing of them free yet."""
    nodes: list[PgData] = []
    per_node = node_spanned_pages(nr_frames, nr_nodes)
    movable = memparse(host.params.get("mm.movablecore", "0")) >> 12
    if movable >= nr_frames:
        # Nothing would be left for what cannot move: then the request counts for nothing.
        movable = 0
    for nid in range(nr_nodes):
        start = nid * per_node
        end = nr_frames if nid == nr_nodes - 1 else start + per_node
        # At least a page block stays for what cannot move.
        split = max(end - movable // nr_nodes, start + PAGEBLOCK_NR_PAGES) & -PAGEBLOCK_NR_PAGES
        bounds = [(ZONE_NORMAL, start, end)]
        if movable and split < end:
            bounds = [(ZONE_NORMAL, start, split), (ZONE_MOVABLE, split, end)]
        zones = [Zone(host.pages, blocks, nid, idx, first, last) for idx, first, last in bounds]
        nodes.append(PgData(nid, zones))
    return nodes


def memblock_free_all(zone: Zone, start: int) -> None:
    """The zone's frames from `start` on are free."""
    blocks: list[tuple[int, int]] = []
    pfn = start
    while pfn < zone.end:
        order = MAX_ORDER
        while pfn & ((1 << order) - 1) or pfn + (1 << order) > zone.end:
            order -= 1
        blocks.append((pfn, order))
        pfn += 1 << order
    # The lowest block last, so that it is taken first.
    for pfn, order in reversed(blocks):
        zone.add_to_free_list(pfn, order, MIGRATE_MOVABLE)
        zone.managed += 1 << order
