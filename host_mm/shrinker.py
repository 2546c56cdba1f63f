"""Shrinkers: caches that give back part of themselves as reclaim goes by.

Source of truth: mm/shrinker.c: do_shrink_slab, register_shrinker, mm/huge_memory.c (deferred_split_shrinker,
huge_zero_folio_shrinker); Linux 6.18.

Each is asked in proportion to how hard reclaim tries: a share 2**-priority of what it has, twice. What is
too little for a batch waits for the next time. What they free does not count as reclaimed.

Not modelled: caches of the kernel's own objects, shrinkers by memory cgroup. zswap's is in zswap.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.huge_memory_split import deferred_split_count, deferred_split_scan
from host_mm.huge_mm import huge_zero_freeable, shrink_huge_zero_folio

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["DEFAULT_SEEKS", "SHRINK_BATCH", "Shrinker", "shrink_slab"]

SHRINK_BATCH = 128
DEFAULT_SEEKS = 2


class Shrinker:
    """struct shrinker of a module, in `HostMm.shrinkers`: any node's reclaim asks it.

    `count()`: how many objects there are; `scan(nr)` looks at so many. `seeks`: how dear it is to make one
    anew, by which it is asked for less.
    """

    def __init__(
        self, name: str, count: Callable[[], int], scan: Callable[[int], int], seeks: int = DEFAULT_SEEKS
    ) -> None:
        self.name = name
        self.count = count
        self.scan = scan
        self.seeks = seeks


def shrink_slab(host: HostMm, nid: int, priority: int) -> None:
    """Ask every shrinker of the node."""
    _do_shrink_slab(
        host, f"deferred_split {nid}", priority, lambda: deferred_split_count(host, nid),
        lambda nr: deferred_split_scan(host, nid, nr),
    )
    _do_shrink_slab(
        host, "huge_zero", priority, lambda: huge_zero_freeable(host), lambda nr: shrink_huge_zero_folio(host)
    )
    for each in tuple(host.shrinkers):
        _do_shrink_slab(host, each.name, priority, each.count, each.scan, each.seeks)


def _do_shrink_slab(
    host: HostMm, name: str, priority: int, count: Callable[[], int], scan: Callable[[int], int],
    seeks: int = DEFAULT_SEEKS,
) -> None:
    freeable = count()
    if not freeable:
        return
    deferred = host.thp.nr_deferred.pop(name, 0)
    delta = (freeable >> priority) * 4 // seeks
    total = min((deferred >> priority) + delta, 2 * freeable)
    scanned = 0
    while count() and (total >= SHRINK_BATCH or total >= freeable):
        nr = min(SHRINK_BATCH, total)
        scan(nr)
        total -= nr
        scanned += nr
        if host.sched.preempt:
            host.sched.point("cond_resched")
    if left := min(max(deferred + delta - scanned, 0), 2 * freeable):
        host.thp.nr_deferred[name] = left
