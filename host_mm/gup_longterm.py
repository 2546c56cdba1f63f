"""Long-term pins: not where memory must stay movable.

Source of truth: mm/gup.c (__gup_longterm_locked, check_and_migrate_movable_pages,
collect_longterm_unpinnable_folios, migrate_longterm_unpinnable_folios), include/linux/mm.h:
folio_is_longterm_pinnable, include/linux/sched/mm.h: memalloc_pin_save; Linux 6.18.

A page in ZONE_MOVABLE or in an isolated block may not be pinned for long: nobody could clear the place then.
All pins of the call are given back (a pinned page cannot be migrated), what is in the way is migrated to
where it may be pinned, and everything is pinned anew. While the pages are faulted in, the task allocates
nothing movable, so that new pages need not move at once.

Not modelled: device-coherent memory, pins of file pages by folio.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN, ENOMEM
from typing import TYPE_CHECKING

from host_mm.hugetlb import folio_isolate_hugetlb
from host_mm.migrate import (
    MIGRATE_SYNC,
    MR_LONGTERM_PIN,
    MigrationTarget,
    migrate_pages,
    putback_movable_pages,
)
from host_mm.mmzone import MIGRATE_ISOLATE, ZONE_MOVABLE
from host_mm.page import PG_hugetlb, page_folio
from host_mm.page_alloc import GFP_NOWARN, GFP_USER

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["folio_is_longterm_pinnable", "gup_longterm_locked"]


def folio_is_longterm_pinnable(host: HostMm, pfn: int) -> bool:
    """Whether a page may be pinned for long where it is."""
    if pfn == host.zero_pfn:
        return True
    allocator = host.allocator
    return allocator.blocks.migratetype(pfn) != MIGRATE_ISOLATE and allocator.zone_of(pfn).idx != ZONE_MOVABLE


def gup_longterm_locked(
    host: HostMm, pin: Callable[[], tuple[list[int], int]], unpin: Callable[[int], None]
) -> tuple[list[int], int]:
    """`pin()` until all it pinned may stay pinned: its answer, or ([], -ENOMEM) with nothing pinned.

    `pin` gives the frames that it pinned, in order, one pin each, and what ended it early; `unpin` takes
    one pin back.
    """
    task = host.sched.current
    nested = task in host.allocator.memalloc_pin
    host.allocator.memalloc_pin.add(task)
    try:
        while True:
            pfns, ended = pin()
            err = _check_and_migrate_movable_pages(host, pfns, unpin)
            if err != -EAGAIN:
                return (pfns, ended) if not err else ([], err)
    finally:
        if not nested:
            host.allocator.memalloc_pin.discard(task)


def _collect(host: HostMm, pfns: list[int], movable: list[int]) -> int:
    """Isolate what may not stay; how many folios that are, isolated or not."""
    collected = 0
    for folio in dict.fromkeys(page_folio(host.pages, pfn) for pfn in pfns):
        if folio_is_longterm_pinnable(host, folio):
            continue
        if not collected:
            # Our own pin makes the count look as if a batch had the folio; Linux drains for it, too.
            host.lru.lru_add_drain_all()
        collected += 1
        huge = host.pages.flags[folio] & PG_hugetlb
        if folio_isolate_hugetlb(host, folio) if huge else host.lru.folio_isolate_lru(folio):
            movable.append(folio)
    return collected


def _check_and_migrate_movable_pages(
    host: HostMm, pfns: list[int], unpin: Callable[[int], None]
) -> int:
    """0: all are where they may be; -EAGAIN: nothing is pinned now, try again; -ENOMEM: nor can it be."""
    movable: list[int] = []
    if not _collect(host, pfns, movable):
        return 0
    for pfn in pfns:
        unpin(pfn)
    if not movable:
        return -EAGAIN
    target = MigrationTarget(-1, GFP_USER | GFP_NOWARN)
    failed = migrate_pages(host, movable, target, MR_LONGTERM_PIN, MIGRATE_SYNC)
    putback_movable_pages(host, movable)
    return -ENOMEM if failed else -EAGAIN
