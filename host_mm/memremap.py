"""Frames that are a device's, not RAM: reserved ones for BARs, and device-private ones with a struct page.

Source of truth: mm/memremap.c (memremap_pages, memunmap_pages, zone_device_page_init,
free_zone_device_folio), include/linux/memremap.h: struct dev_pagemap, MEMORY_DEVICE_PRIVATE,
kernel/resource.c (request_free_mem_region); Linux 6.18.

Every host has DEVICE_FRAMES frame numbers above its RAM. No zone holds them, so that reclaim and the
allocator never see them. A device takes a range of them, either

    reserved    PG_reserved, one reference for ever: raw memory that remap_pfn_range maps
    private     ZONE_DEVICE pages: free at refcount 0, counted like anonymous pages while they are one;
                the CPU has a device-private swap entry for each and faults them back (migrate_to_ram)

Not modelled: coherent device memory, FS-DAX, peer-to-peer, altmaps, percpu references of a pagemap.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from errno import ENOSPC
from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.page import PG_locked, PG_reserved, PG_zone_device

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmFault

__all__ = [
    "DEVICE_FRAMES", "DevPagemap", "DeviceFrames", "free_zone_device_folio", "memremap_pages",
    "memunmap_pages", "page_pgmap", "release_reserved", "request_reserved", "zone_device_page_init",
]

DEVICE_FRAMES = 2048


class DeviceFrames:
    """The frame numbers above RAM: [start, end), and who has which part of them."""

    __slots__ = ("busy", "end", "pgmaps", "start")

    def __init__(self, start: int) -> None:
        self.start = start
        self.end = start + DEVICE_FRAMES
        self.busy: list[tuple[int, int]] = []
        self.pgmaps: list[DevPagemap] = []

    def request(self, nr: int) -> int:
        """The first frame of a free range of `nr`. KernelError(ENOSPC)."""
        at = self.start
        for first, last in self.busy:
            if first - at >= nr:
                break
            at = last
        if at + nr > self.end:
            raise KernelError(ENOSPC, f"no range of {nr} device frames is free")
        insort(self.busy, (at, at + nr))
        return at

    def release(self, start: int, nr: int) -> None:
        """Give a range back."""
        self.busy.remove((start, start + nr))


class DevPagemap:
    """struct dev_pagemap: `nr` device-private frames from `start`, and the driver's callbacks.

    `migrate_to_ram(vmf)` brings the page of a CPU fault back and answers VM_FAULT_* bits; `page_free(pfn)`
    takes a page whose last reference went. `owner` tells the driver's own migrations from others.
    """

    __slots__ = ("migrate_to_ram", "nr", "owner", "page_free", "start")

    def __init__(
        self, start: int, nr: int, owner: Any, migrate_to_ram: Callable[[VmFault], int],
        page_free: Callable[[int], None],
    ) -> None:
        self.start = start
        self.nr = nr
        self.owner = owner
        self.migrate_to_ram = migrate_to_ram
        self.page_free = page_free


def request_reserved(host: HostMm, nr: int) -> int:
    """`nr` zeroed frames of raw device memory; the first. KernelError(ENOSPC)."""
    start = host.device_frames.request(nr)
    for pfn in range(start, start + nr):
        host.pages.flags[pfn] = PG_reserved
        host.pages.refcount[pfn] = 1
        host.ram.clear_page(pfn)
    return start


def release_reserved(host: HostMm, start: int, nr: int) -> None:
    """Give raw device memory back: nothing may map it any more."""
    for pfn in range(start, start + nr):
        count = host.pages.refcount[pfn]
        if count != 1:
            why = f"reserved pfn {pfn:#x} has refcount {count}"
            raise BrokenTruth("device-frames", why, host.stream.here())
        host.pages.flags[pfn] = 0
        host.pages.refcount[pfn] = 0
        host.device_frame_gone(pfn)
    host.device_frames.release(start, nr)


def memremap_pages(
    host: HostMm, nr: int, owner: Any, migrate_to_ram: Callable[[VmFault], int],
    page_free: Callable[[int], None],
) -> DevPagemap:
    """Make struct pages for `nr` frames of a device's memory. KernelError(ENOSPC)."""
    pgmap = DevPagemap(host.device_frames.request(nr), nr, owner, migrate_to_ram, page_free)
    host.device_frames.pgmaps.append(pgmap)
    for pfn in range(pgmap.start, pgmap.start + nr):
        host.pages.flags[pfn] = PG_zone_device
    return pgmap


def memunmap_pages(host: HostMm, pgmap: DevPagemap) -> None:
    """The device goes: every page of it must have been freed."""
    for pfn in range(pgmap.start, pgmap.start + pgmap.nr):
        if host.pages.refcount[pfn]:
            raise BrokenTruth("device-frames", f"pfn {pfn:#x} is in use while its device goes")
        host.pages.flags[pfn] = 0
    host.device_frames.pgmaps.remove(pgmap)
    host.device_frames.release(pgmap.start, pgmap.nr)


def page_pgmap(host: HostMm, pfn: int) -> DevPagemap:
    """Whose device-private page this is."""
    for pgmap in host.device_frames.pgmaps:
        if pgmap.start <= pfn < pgmap.start + pgmap.nr:
            return pgmap
    raise BrokenTruth("device-frames", f"pfn {pfn:#x} is no device's page", host.stream.here())


def zone_device_page_init(host: HostMm, pfn: int) -> None:
    """Take a free device page: one reference, locked."""
    pages = host.pages
    if pages.refcount[pfn] or pages.mapcount[pfn]:
        raise BrokenTruth("device-frames", f"device pfn {pfn:#x} is taken but not free", host.stream.here())
    pages.refcount[pfn] = 1
    pages.flags[pfn] |= PG_locked


def free_zone_device_folio(host: HostMm, pfn: int) -> None:
    """The last reference of a device page is gone: the driver has it back."""
    pages = host.pages
    if pages.mapcount[pfn] or pages.flags[pfn] & PG_locked:
        raise BrokenTruth(
            "bad-page-state", f"device pfn {pfn:#x} is freed mapped or locked", host.stream.here()
        )
    if host.memcg.folios:
        host.memcg.uncharge(pfn)
    pages.flags[pfn] = PG_zone_device
    pages.index[pfn] = pages.private[pfn] = 0
    pages.mapping.pop(pfn, None)
    pages.generation[pfn] = (pages.generation[pfn] + 1) & 0xFFFFFFFF
    host.device_frame_gone(pfn)
    page_pgmap(host, pfn).page_free(pfn)
