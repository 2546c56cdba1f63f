"""A block device that keeps its pages compressed in RAM, as a swap device.

Source of truth: drivers/block/zram/zram_drv.c (zram_write_page, zram_read_page, page_same_filled,
zram_slot_free_notify); Linux 6.18.

It is synchronous: a request is done when it was made. A page of one repeated word takes no memory, one
that does not shrink below HUGE_SIZE is kept as it is. A slot's memory comes back as soon as swap frees
the slot.

Not modelled: a backing device, recompression, memory limits, the comp algorithms' own memory; zlib
stands for lzo-rle.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from host_mm.kernel.costs import COST_COMPRESS_PAGE
from host_mm.page_alloc import GFP_NOWAIT
from host_mm.ram import PAGE_SIZE
from host_mm.zsmalloc import ZsPool

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["HUGE_SIZE", "Zram"]

HUGE_SIZE = 3264
"""huge_class_size: what a page must shrink below for compressing to be worth it."""
_LEVEL = 1


class Zram:
    """One device. `slots[n]` is the handle of page n; `same[n]` its repeated word instead."""

    __slots__ = ("host", "pool", "same", "slots")

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.pool = ZsPool(host, "zram0")
        self.slots: dict[int, int] = {}
        self.same: dict[int, bytes] = {}

    def write_page(self, slot: int, data: bytes) -> bool:
        """Store a page; false: no memory, and what the slot held is gone."""
        self.slot_free_notify(slot)
        word = data[:8]
        if data == word * (PAGE_SIZE // 8):
            self.same[slot] = word
            return True
        self.host.sched.advance(COST_COMPRESS_PAGE)
        packed = zlib.compress(data, _LEVEL)
        handle = self.pool.malloc(packed if len(packed) < HUGE_SIZE else data, GFP_NOWAIT)
        if not handle:
            return False
        self.slots[slot] = handle
        return True

    def read_page(self, slot: int) -> bytes:
        """The page in a slot; zeros if nothing was written there."""
        if slot in self.same:
            return self.same[slot] * (PAGE_SIZE // 8)
        handle = self.slots.get(slot)
        if handle is None:
            return bytes(PAGE_SIZE)
        data = self.pool.read(handle)
        return data if len(data) == PAGE_SIZE else zlib.decompress(data)

    def slot_free_notify(self, slot: int) -> None:
        """Swap has freed the slot: so does the device."""
        self.same.pop(slot, None)
        handle = self.slots.pop(slot, None)
        if handle is not None:
            self.pool.free(handle)
