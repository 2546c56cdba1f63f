"""zswap: swapped-out pages are kept compressed in RAM first; the coldest go on to the swap file.

Source of truth: mm/zswap.c (zswap_store, zswap_compress, zswap_load, zswap_invalidate,
zswap_writeback_entry, shrink_memcg_cb, shrink_worker, zswap_shrinker_count, zswap_shrinker_scan);
Linux 6.18.

A page that is stored is clean as far as reclaim is concerned, and its frame is freed at once. A page
that is loaded into the swap cache leaves zswap and is dirty, for its slot of the file has other bytes.
When the pool holds max_pool_percent of RAM, stores are refused, which then go to the file, and a worker
writes the pool back, oldest entry first, until it is down to accept_threshold_percent. An entry that was
not there at the last look has a second chance.

    --param zswap.enabled=Y                        off by default; `enabled` may change later
    --param zswap.max_pool_percent=20              of RAM
    --param zswap.accept_threshold_percent=90      of that
    --param zswap.shrinker_enabled=Y               reclaim writes the pool back, too; off by default

zlib stands for lzo. Pages of zeros never come here: the swap file's zero map has them.

Not modelled: large folios, several pools, per-cgroup lists, limits and writeback switches.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from errno import EAGAIN, EEXIST, ENOENT, ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.swapops import swp_entry, swp_offset
from host_mm.filemap import folio_unlock
from host_mm.kernel.costs import COST_COMPRESS_PAGE, COST_DECOMPRESS_PAGE
from host_mm.page import (
    PG_locked,
    PG_reclaim,
    PG_swapbacked,
    PG_swapcache,
    PG_uptodate,
    put_page,
    set_page_dirty,
)
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_NORETRY, GFP_NOWAIT, MAX_RECLAIM_RETRIES
from host_mm.page_io import swap_writepage
from host_mm.ram import PAGE_SIZE
from host_mm.swap_state import swap_cache_add_folio, swap_cache_del_folio
from host_mm.zsmalloc import ZsPool
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.swapfile import SwapInfo

__all__ = ["TRACEPOINTS", "Zswap", "ZswapEntry"]

_LEVEL = 1
_SHRINK_BATCH = 128

ZSWAP_STORE = Tracepoint(
    "refault", "zswap_store", ("pfn", "slot", "length"),
    lambda pfn, slot, length: f"pfn={pfn:#x} slot={slot:#x} length={length}",
    doc="A folio's bytes are in the compressed pool; nothing is written.",
)
ZSWAP_LOAD = Tracepoint(
    "refault", "zswap_load", ("pfn", "slot"), lambda pfn, slot: f"pfn={pfn:#x} slot={slot:#x}",
    doc="A folio gets its bytes from the compressed pool.",
)
ZSWAP_WRITEBACK = Tracepoint(
    "refault", "zswap_writeback", ("pfn", "slot"), lambda pfn, slot: f"pfn={pfn:#x} slot={slot:#x}",
    doc="An entry leaves the compressed pool for the swap file.", scope=True,
)
TRACEPOINTS = (ZSWAP_STORE, ZSWAP_LOAD, ZSWAP_WRITEBACK)


class ZswapEntry:
    """struct zswap_entry. `referenced`: it gets a second chance."""

    __slots__ = ("handle", "referenced")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.referenced = True


class Zswap:
    """The pool in front of one host's swap file. `lru` has the entries by slot, oldest first."""

    __slots__ = (
        "accept_threshold_percent", "deferred", "enabled", "host", "lru", "max_pool_percent",
        "nr_disk_swapins", "pool", "pool_reached_full", "shrinker_enabled", "working",
    )

    def __init__(self, host: HostMm, swap: SwapInfo | None) -> None:
        params = host.params
        self.host = host
        self.enabled = swap is not None and _on(params.get("zswap.enabled", "N"))
        self.max_pool_percent = int(params.get("zswap.max_pool_percent", "20"))
        self.accept_threshold_percent = int(params.get("zswap.accept_threshold_percent", "90"))
        self.shrinker_enabled = _on(params.get("zswap.shrinker_enabled", "N"))
        self.pool = ZsPool(host, "zswap")
        self.lru: OrderedDict[int, ZswapEntry] = OrderedDict()
        self.pool_reached_full = False
        self.working = False
        self.nr_disk_swapins = 0
        self.deferred = 0
        if swap is not None:
            swap.free_notify.append(self.invalidate)

    # -- limits -------------------------------------------------------------------------------

    def max_pages(self) -> int:
        """zswap_max_pages."""
        return sum(zone.managed for zone in self.host.zones) * self.max_pool_percent // 100

    def accept_thr_pages(self) -> int:
        """zswap_accept_thr_pages."""
        return self.max_pages() * self.accept_threshold_percent // 100

    def _check_limits(self) -> bool:
        pages = self.pool.frames
        if pages >= self.max_pages():
            self.pool_reached_full = True
        elif self.pool_reached_full and pages <= self.accept_thr_pages():
            self.pool_reached_full = False
        return self.pool_reached_full

    # -- store, load, invalidate --------------------------------------------------------------

    def store(self, pfn: int) -> bool:
        """Keep a locked swap cache folio's bytes; false: they have to be written to the file."""
        slot = swp_offset(self.host.pages.private[pfn])
        if self.enabled and self._store(pfn, slot):
            return True
        # What an earlier store left must not overwrite the file's newer bytes later.
        self.invalidate(slot)
        return False

    def _store(self, pfn: int, slot: int) -> bool:
        host = self.host
        if self._check_limits():
            self._queue_shrink_work()
            return False
        if host.checks is not None:
            host.checks.writeback_starts(pfn)
        host.sched.advance(COST_COMPRESS_PAGE)
        data = host.ram.read(pfn << 12, PAGE_SIZE)
        packed = zlib.compress(data, _LEVEL)
        if len(packed) >= PAGE_SIZE:
            packed = data
        handle = self.pool.malloc(packed, GFP_NOWAIT | GFP_NORETRY, host.allocator.nid_of(pfn))
        if not handle:
            host.vmstat["zswap_reject_alloc_fail"] += 1
            return False
        self.invalidate(slot)
        self.lru[slot] = ZswapEntry(handle)
        host.vmstat["zswpout"] += 1
        if (t := host.trace.zswap_store) is not None:
            t(pfn, slot, len(packed))
        return True

    def data(self, slot: int) -> bytes | None:
        """The page that zswap has for a slot, or None."""
        entry = self.lru.get(slot)
        if entry is None:
            return None
        packed = self.pool.read(entry.handle)
        return packed if len(packed) == PAGE_SIZE else zlib.decompress(packed)

    def load(self, pfn: int) -> bool:
        """Fill a locked folio and unlock it; false: zswap has not got it."""
        host, pages = self.host, self.host.pages
        slot = swp_offset(pages.private[pfn])
        data = self.data(slot)
        if data is None:
            self.nr_disk_swapins += 1
            return False
        host.sched.advance(COST_DECOMPRESS_PAGE)
        host.ram.write(pfn << 12, data)
        pages.flags[pfn] |= PG_uptodate
        host.vmstat["zswpin"] += 1
        if (t := host.trace.zswap_load) is not None:
            t(pfn, slot)
        if pages.flags[pfn] & PG_swapcache:
            set_page_dirty(host, pfn)
            self.invalidate(slot)
        folio_unlock(host, pfn)
        return True

    def invalidate(self, slot: int) -> None:
        """The slot is free, or has newer bytes elsewhere."""
        entry = self.lru.pop(slot, None)
        if entry is not None:
            self.pool.free(entry.handle)

    # -- writeback ----------------------------------------------------------------------------

    def writeback_entry(self, slot: int, entry: ZswapEntry) -> int:
        """Send an entry on to the file through the swap cache: 0, -EEXIST (it is there), -ENOMEM."""
        host = self.host
        swap = host.swap
        assert swap is not None
        swp = swp_entry(swap.type, slot)
        if swap.cache[slot]:
            return -EEXIST
        pfn = host.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_COMP, 0, 0)
        if pfn < 0:
            return -ENOMEM
        if swap.swapcache_prepare(swp):
            put_page(host, pfn)
            return -EEXIST
        if host.memcg.groups and host.memcg.swapin_charge(pfn, slot, None):
            swap.put_cache(slot)
            put_page(host, pfn)
            return -ENOMEM
        host.pages.flags[pfn] |= PG_locked | PG_swapbacked
        swap_cache_add_folio(host, pfn, swp)
        host.lru.folio_add_lru(pfn)
        if host.sched.preempt:
            host.sched.point("zswap-writeback")
        if self.lru.get(slot) is not entry:
            # Invalidated, and perhaps stored anew, before the slot was ours.
            swap_cache_del_folio(host, pfn)
            folio_unlock(host, pfn)
            put_page(host, pfn)
            return -ENOMEM
        data = self.data(slot)
        assert data is not None
        host.ram.write(pfn << 12, data)
        self.invalidate(slot)
        host.vmstat["zswpwb"] += 1
        host.pages.flags[pfn] |= PG_uptodate | PG_reclaim
        ctx, saved = host.stream.ctx, host.stream.ctx.cause
        if (t := host.trace.zswap_writeback) is not None:
            ctx.cause = t(pfn, slot)
        swap_writepage(host, pfn, slot)
        ctx.cause = saved
        put_page(host, pfn)
        return 0

    def shrink_one(self) -> int:
        """shrink_memcg_cb of the oldest entry: 0 written, -EAGAIN not this time, -EEXIST, -ENOENT empty."""
        if not self.lru:
            return -ENOENT
        slot, entry = next(iter(self.lru.items()))
        self.lru.move_to_end(slot)
        if entry.referenced:
            entry.referenced = False
            return -EAGAIN
        err = self.writeback_entry(slot, entry)
        if err:
            self.host.vmstat["zswap_reject_reclaim_fail"] += 1
        return err

    def _queue_shrink_work(self) -> None:
        if not self.working:
            self.working = True
            self.host.sched.spawn("kworker/zswap-shrink", self._shrink_worker)

    def _shrink_worker(self) -> None:
        sched = self.host.sched
        failures = 0
        while self.pool.frames > self.accept_thr_pages() and failures < MAX_RECLAIM_RETRIES:
            # An entry that gets its second chance counts as a failure, too.
            failures += self.shrink_one() != 0
            if sched.preempt:
                sched.point("cond_resched")
        self.working = False

    def writeback(self, nr: int) -> int:
        """Write up to `nr` entries back, oldest first, whatever the limits say; how many were written."""
        written = 0
        for _ in range(2 * len(self.lru)):
            if written >= nr or not self.lru:
                break
            written += self.shrink_one() == 0
        return written

    # -- the shrinker -------------------------------------------------------------------------

    def shrinker_count(self) -> int:
        """How many entries reclaim may write back: fewer, the better they compress and the more come back."""
        stored = len(self.lru)
        if not self.shrinker_enabled or not stored:
            return 0
        freeable = max(stored - self.nr_disk_swapins, 0)
        self.nr_disk_swapins = max(self.nr_disk_swapins - stored, 0)
        return freeable * self.pool.frames // stored

    def shrink_slab(self, priority: int) -> None:
        """do_shrink_slab: a pass of reclaim with this priority; small shares add up to a batch."""
        freeable = self.shrinker_count()
        if not freeable:
            return
        total = self.deferred + 2 * (freeable >> priority)
        batch = min(_SHRINK_BATCH, freeable)
        while total >= batch:
            total -= batch
            for _ in range(batch):
                if self.shrink_one() in (-EEXIST, -ENOENT):
                    break
        self.deferred = total


def _on(value: str) -> bool:
    return value.lower() in ("y", "1", "on", "yes", "true")
