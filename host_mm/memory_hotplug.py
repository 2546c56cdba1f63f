"""Taking a piece of memory out of use while the machine runs, and putting it back.

Source of truth: mm/memory_hotplug.c (offline_pages, scan_movable_pages, do_migrate_range, online_pages,
online_pages_range), mm/page_alloc.c: __offline_isolated_pages, drivers/base/memory.c; Linux 6.18.

Offlining isolates the page blocks, migrates whatever is in them away, to another node if there is one, again
and again, and when everything is free takes it off the free lists. Poisoned frames may stay in the range and
stay poisoned. An offline frame is reserved and nobody's.

A page that is pinned cannot go. Linux goes on trying until a signal comes; here whoever asked loses patience
after a number of rounds without any progress, and is told EBUSY.

Not modelled: memory blocks of 128 MiB (any whole page blocks will do), hot-adding
and removing, memory groups, memory notifiers, nodes without memory, the free list's tail as the place of what
was onlined.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL
from typing import TYPE_CHECKING

from host_mm.hugetlb import folio_isolate_hugetlb
from host_mm.hugetlb_pool import dissolve_free_hugetlb_folios
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.migrate import (
    MIGRATE_SYNC,
    MR_MEMORY_HOTPLUG,
    MigrationTarget,
    migrate_pages,
    putback_movable_pages,
)
from host_mm.mmzone import MIGRATE_ISOLATE, MIGRATE_MOVABLE, PAGEBLOCK_NR_PAGES, PAGEBLOCK_ORDER
from host_mm.page import PG_head, PG_hugetlb, PG_hwpoison, PG_lru, PG_reserved
from host_mm.page_alloc import GFP_KERNEL, GFP_MOVABLE, GFP_RETRY_MAYFAIL
from host_mm.page_isolation import (
    PB_ISOLATE_MODE_MEM_OFFLINE,
    start_isolate_page_range,
    test_pages_isolated,
    undo_isolate_page_range,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mmzone import Zone

__all__ = ["offline_pages", "online_pages"]

_PATIENCE = 8


def offline_pages(host: HostMm, start: int, nr_pages: int) -> None:
    """Take [start, start + nr_pages) out of use; what is there is moved away. May sleep.

    KernelError: EINVAL (not whole page blocks of one zone, or offline already), EBUSY (something in it
    cannot be moved).
    """
    end = start + nr_pages
    zone = _check(host, start, nr_pages)
    if start in host.allocator.offline:
        raise KernelError(EINVAL, f"frames {start:#x} to {end:#x} are offline")
    host.sched.advance(COST_SYSCALL)
    host.lru.lru_cache_disable()
    if start_isolate_page_range(host, start, end, PB_ISOLATE_MODE_MEM_OFFLINE):
        host.lru.lru_cache_enable()
        raise KernelError(EBUSY, f"frames {start:#x} to {end:#x} hold something that cannot be moved")
    if not _empty(host, start, end):
        undo_isolate_page_range(host, start, end)
        host.lru.lru_cache_enable()
        raise KernelError(EBUSY, f"frames {start:#x} to {end:#x} hold a page that is in use and stays")
    _offline_isolated_pages(host, zone, start, end)
    host.lru.lru_cache_enable()
    zone.managed -= nr_pages
    zone.present -= nr_pages
    host.allocator.setup_per_zone_wmarks()


def _check(host: HostMm, start: int, nr_pages: int) -> Zone:
    zone = host.allocator.zone_of(start) if 0 <= start < host.pages.nr_frames else None
    whole = nr_pages > 0 and not (start | nr_pages) % PAGEBLOCK_NR_PAGES
    if not whole or zone is None or start + nr_pages > zone.end:
        raise KernelError(EINVAL, f"{nr_pages} frames at {start:#x} are not whole page blocks of one zone")
    return zone


def _empty(host: HostMm, start: int, end: int) -> bool:
    """Migrate until everything is free; false when nothing moves any more."""
    sched = host.sched
    patience = _PATIENCE
    while test_pages_isolated(host, start, end, PB_ISOLATE_MODE_MEM_OFFLINE):
        if sched.preempt:
            sched.point("cond_resched")
        moved = host.vmstat["pgmigrate_success"]
        _migrate_range(host, start, end)
        if host.vmstat["pgmigrate_success"] == moved:
            patience -= 1
            if not patience:
                return False
            # Let whoever uses the page get on.
            sched.sleep(100_000)
        dissolve_free_hugetlb_folios(host, start, end)
    return True


def _migrate_range(host: HostMm, start: int, end: int) -> None:
    """do_migrate_range: isolate what is on a list in the range, and move it."""
    pages = host.pages
    source: list[int] = []
    pfn = start
    while pfn < end:
        flags = pages.flags[pfn]
        size = 1 << pages.order[pfn] if flags & PG_head else 1
        if flags & PG_hugetlb:
            isolated: int = folio_isolate_hugetlb(host, pfn)
        else:
            isolated = flags & PG_lru and not flags & PG_hwpoison and host.lru.folio_isolate_lru(pfn)
        if isolated:
            source.append(pfn)
        pfn += size
    if not source:
        return
    own = host.allocator.nid_of(source[0])
    others = [node.nid for node in host.allocator.nodes if node.nid != own] or [own]
    target = MigrationTarget(others[0], GFP_KERNEL | GFP_MOVABLE | GFP_RETRY_MAYFAIL, frozenset(others))
    migrate_pages(host, source, target, MR_MEMORY_HOTPLUG, MIGRATE_SYNC)
    putback_movable_pages(host, source)


def _offline_isolated_pages(host: HostMm, zone: Zone, start: int, end: int) -> None:
    pages = host.pages
    pfn = start
    while pfn < end:
        if pages.flags[pfn] & PG_hwpoison:
            pfn += 1
            continue
        order = zone.del_from_free_list(pfn, MIGRATE_ISOLATE)
        for frame in range(pfn, pfn + (1 << order)):
            pages.flags[frame] = PG_reserved
        pfn += 1 << order
    host.allocator.blocks.isolated.difference_update(range(start >> PAGEBLOCK_ORDER, end >> PAGEBLOCK_ORDER))
    host.allocator.offline[start] = end - start


def online_pages(host: HostMm, start: int, nr_pages: int) -> None:
    """Put what was taken offline back into use. KernelError(EINVAL): it is not offline."""
    zone = _check(host, start, nr_pages)
    if host.allocator.offline.get(start) != nr_pages:
        raise KernelError(EINVAL, f"frames {start:#x} to {start + nr_pages:#x} are not offline")
    del host.allocator.offline[start]
    pages = host.pages
    for block in range(start, start + nr_pages, PAGEBLOCK_NR_PAGES):
        zone.blocks.type[block >> PAGEBLOCK_ORDER] = MIGRATE_MOVABLE
    for pfn in range(start, start + nr_pages):
        if not pages.flags[pfn] & PG_hwpoison:
            pages.flags[pfn] = 0
            zone.free_one_page(pfn, 0, MIGRATE_MOVABLE)
    zone.managed += nr_pages
    zone.present += nr_pages
    host.allocator.setup_per_zone_wmarks()
