"""Swap slots: one swap file, its map of reference counts and its clusters.

Source of truth: mm/swapfile.c: swap_map, cluster_alloc_swap_entry, __swap_duplicate,
swap_entry_put_locked, swap_entries_free; include/linux/swap.h (Linux 6.18).

The file is real. Slot n is its page n; slot 0 holds the header that mkswap writes and is never
allocated, so that no swap entry is 0.

    swap_map[offset]    7          6          5 ... 0
                        CONTINUED  HAS_CACHE  count of page-table entries, 0x3f: bad slot

Counts above SWAP_MAP_MAX go on in `continued`. A slot with a shmem page (SWAP_MAP_SHMEM) counts as one.

Not modelled: several swap devices and priorities, discard, clusters per order and per CPU (there
is one current cluster), rotation of clusters between lists, continuation pages, swapoff.
"""

from __future__ import annotations

import os
import struct
import tempfile
from errno import EEXIST, EINVAL, ENOENT
from typing import TYPE_CHECKING

from host_mm.arch.x86.swapops import swp_offset
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Spinlock
from host_mm.ram import PAGE_SHIFT, PAGE_SIZE, column

if TYPE_CHECKING:
    from collections.abc import Callable

    from host_mm.kernel.sched import Scheduler
    from host_mm.zram import Zram

__all__ = [
    "COUNT_CONTINUED",
    "SWAPFILE_CLUSTER",
    "SWAP_HAS_CACHE",
    "SWAP_MAP_BAD",
    "SWAP_MAP_MAX",
    "SWAP_MAP_SHMEM",
    "SwapInfo",
]

SWAP_MAP_MAX = 0x3E
SWAP_MAP_BAD = 0x3F
SWAP_HAS_CACHE = 0x40
COUNT_CONTINUED = 0x80
_COUNT = 0x3F
SWAP_MAP_SHMEM = 0xBF
"""COUNT_CONTINUED with the count of a bad slot: a shmem page's. Its one holder is the file."""

SWAPFILE_CLUSTER = 512
"""Slots in a cluster; each cluster has its lock."""

def _open_swap(path: str | None, size: int) -> int:
    if path is None:
        fd, name = tempfile.mkstemp(prefix="refault-swap-")
        os.unlink(name)
    else:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    return fd


class SwapInfo:
    """struct swap_info_struct of the one swap file.

    `cache[offset]` is the swap cache's table: pfn + 1 of the folio that holds the slot's page, or
    0 (mm/swap_table.h). `zeromap[offset]` says that the page is all zeros and was not written.
    `zram` is the device if it is not the file: requests to it are synchronous (SWP_SYNCHRONOUS_IO).
    `free_notify` are called with each slot that becomes free.
    """

    def __init__(
        self, sched: Scheduler, size: int, path: str | None = None, zram: Zram | None = None
    ) -> None:
        self.max = size >> PAGE_SHIFT
        if self.max < 2:
            raise ValueError("a swap file needs room for its header and one page: 8 KiB at least")
        self.fd = _open_swap(path, self.max << PAGE_SHIFT)
        self.zram = zram
        self.free_notify: list[Callable[[int], None]] = [] if zram is None else [zram.slot_free_notify]
        self.type = 0
        self.pages = self.max - 1
        self.inuse_pages = 0
        self.swap_map = bytearray(self.max)
        self.swap_map[0] = SWAP_MAP_BAD
        self.zeromap = bytearray(self.max)
        self.continued: dict[int, int] = {}
        self.cache = column("Q", self.max)
        self.nr_clusters = (self.max + SWAPFILE_CLUSTER - 1) // SWAPFILE_CLUSTER
        self.locks = [Spinlock(sched, "swap_cluster_lock") for _ in range(self.nr_clusters)]
        self._next = 1
        self._write_header()

    def _write_header(self) -> None:
        header = bytearray(PAGE_SIZE)
        struct.pack_into("<II", header, 1024, 1, self.max - 1)
        header[PAGE_SIZE - 10 :] = b"SWAPSPACE2"
        os.pwrite(self.fd, header, 0)

    def close(self) -> None:
        """Give the file back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- the file -----------------------------------------------------------------------------

    def pread(self, offset: int) -> bytes:
        """The page in this slot of the device."""
        if self.zram is not None:
            return self.zram.read_page(offset)
        data = os.pread(self.fd, PAGE_SIZE, offset << PAGE_SHIFT)
        if len(data) != PAGE_SIZE:
            raise BrokenTruth("swap-file", f"slot {offset}: {len(data)} bytes came back")
        return data

    def pwrite_part(self, offset: int, start: int, data: bytes | memoryview) -> None:
        """Write bytes from `start` of the page in this slot."""
        if os.pwrite(self.fd, data, (offset << PAGE_SHIFT) + start) != len(data):
            raise BrokenTruth("swap-file", f"slot {offset}: a write came back short")

    # -- slots --------------------------------------------------------------------------------

    @property
    def nr_free(self) -> int:
        """get_nr_swap_pages."""
        return self.pages - self.inuse_pages

    def vm_swap_full(self) -> bool:
        """More than half in use: swap cache pages give their slots back where they can."""
        return self.nr_free * 2 < self.pages

    def _lock(self, offset: int) -> Spinlock:
        return self.locks[offset // SWAPFILE_CLUSTER]

    def alloc(self) -> int:
        """A free slot, now held by the swap cache (SWAP_HAS_CACHE); 0 when there is none."""
        start = self._next
        found = self.swap_map.find(0, start)
        if found < 0:
            found = self.swap_map.find(0, 1, start)
        while found > 0:
            with self._lock(found):
                if not self.swap_map[found]:
                    self.swap_map[found] = SWAP_HAS_CACHE
                    self.inuse_pages += 1
                    self._next = found + 1 if found + 1 < self.max else 1
                    return found
            found = self.swap_map.find(0, 1)
        return 0

    def swap_count(self, offset: int) -> int:
        """How many page-table entries hold this slot; a shmem file is one holder."""
        if self.swap_map[offset] & SWAP_MAP_SHMEM == SWAP_MAP_SHMEM:
            return 1
        return (self.swap_map[offset] & _COUNT) + self.continued.get(offset, 0)

    def has_cache(self, offset: int) -> bool:
        """Whether the swap cache holds this slot."""
        return bool(self.swap_map[offset] & SWAP_HAS_CACHE)

    def find_only_cached(self, start: int) -> int:
        """The first slot from `start` that only the swap cache holds, or 0."""
        return max(self.swap_map.find(SWAP_HAS_CACHE, start), 0)

    def _check(self, offset: int, what: str) -> None:
        if not 0 < offset < self.max:
            raise BrokenTruth("swap-map", f"{what} of slot {offset}, which the file has not")
        if not self.swap_map[offset]:
            raise BrokenTruth("swap-map", f"{what} of slot {offset}, which is free")

    def swap_duplicate(self, entry: int) -> int:
        """One more page-table entry holds the slot. 0, or -EINVAL for a bad entry."""
        offset = swp_offset(entry)
        if not 0 < offset < self.max:
            return -EINVAL
        with self._lock(offset):
            value = self.swap_map[offset]
            if not value:
                raise BrokenTruth("swap-map", f"swap_duplicate of slot {offset}, which is free")
            if value & _COUNT < SWAP_MAP_MAX:
                self.swap_map[offset] = value + 1
            else:
                self.swap_map[offset] = value | COUNT_CONTINUED
                self.continued[offset] = self.continued.get(offset, 0) + 1
        return 0

    def swap_shmem_alloc(self, entry: int) -> None:
        """The slot, so far the swap cache's alone, holds a page of a shmem file."""
        offset = swp_offset(entry)
        with self._lock(offset):
            if self.swap_map[offset] != SWAP_HAS_CACHE:
                raise BrokenTruth("swap-map", f"swap_shmem_alloc of slot {offset}, which is not fresh")
            self.swap_map[offset] = SWAP_MAP_SHMEM | SWAP_HAS_CACHE

    def swapcache_prepare(self, entry: int) -> int:
        """Claim the slot for a swap-in: 0; -ENOENT: no longer in use; -EEXIST: claimed already."""
        offset = swp_offset(entry)
        if not 0 < offset < self.max:
            return -EINVAL
        with self._lock(offset):
            value = self.swap_map[offset]
            if not value & _COUNT:
                return -EEXIST if value else -ENOENT
            if value & SWAP_HAS_CACHE:
                return -EEXIST
            self.swap_map[offset] = value | SWAP_HAS_CACHE
        return 0

    def swap_free(self, entry: int) -> bool:
        """One page-table entry less. True: only the swap cache holds the slot now."""
        offset = swp_offset(entry)
        with self._lock(offset):
            self._check(offset, "swap_free")
            value = self.swap_map[offset]
            if not value & _COUNT:
                raise BrokenTruth("swap-map", f"swap_free of slot {offset}, which no entry holds")
            if value & SWAP_MAP_SHMEM == SWAP_MAP_SHMEM:
                value = (value & SWAP_HAS_CACHE) + 1
            if value & COUNT_CONTINUED:
                left = self.continued[offset] - 1
                if left:
                    self.continued[offset] = left
                else:
                    del self.continued[offset]
                    self.swap_map[offset] = value & ~COUNT_CONTINUED
                return False
            value -= 1
            self.swap_map[offset] = value
            if not value:
                self._free(offset)
            return value == SWAP_HAS_CACHE

    def put_cache(self, offset: int) -> None:
        """put_swap_folio: the swap cache lets go of the slot."""
        with self._lock(offset):
            self._check(offset, "put_swap_folio")
            value = self.swap_map[offset]
            if not value & SWAP_HAS_CACHE:
                raise BrokenTruth("swap-map", f"slot {offset} is not in the swap cache")
            value &= ~SWAP_HAS_CACHE
            self.swap_map[offset] = value
            if not value:
                self._free(offset)

    def _free(self, offset: int) -> None:
        if self.cache[offset]:
            raise BrokenTruth("swap-map", f"slot {offset} is freed while the swap cache has its page")
        self.inuse_pages -= 1
        for notify in self.free_notify:
            notify(offset)
