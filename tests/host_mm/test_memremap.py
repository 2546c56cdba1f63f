"""A device's frames lie above RAM and go from hand to hand with their counts (host_mm/memremap.py)."""

from __future__ import annotations

import pytest

from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.memremap import (
    DEVICE_FRAMES,
    memremap_pages,
    memunmap_pages,
    page_pgmap,
    release_reserved,
    request_reserved,
    zone_device_page_init,
)
from host_mm.mm_types import VmFault
from host_mm.page import PG_locked, PG_reserved, PG_zone_device, put_page
from host_mm.truths import audit
from tests.host_mm.machine import make_host


def nothing(vmf: VmFault) -> int:
    return 0


def test_ranges_are_given_out_once_and_again_after_their_release() -> None:
    host = make_host()
    first = request_reserved(host, 10)
    second = request_reserved(host, 4)
    assert (first, second) == (host.device_frames.start, host.device_frames.start + 10)
    release_reserved(host, first, 10)
    assert request_reserved(host, 11) == second + 4
    assert request_reserved(host, 10) == first
    with pytest.raises(KernelError, match="ENOSPC"):
        request_reserved(host, DEVICE_FRAMES)


def test_reserved_frames_are_zeros_and_the_allocator_never_has_them() -> None:
    host = make_host()
    pfn = request_reserved(host, 1)
    assert host.pages.flags[pfn] & PG_reserved
    assert host.ram.page_is_zero(pfn)
    host.ram.write(pfn << 12, b"x")
    release_reserved(host, pfn, 1)
    assert host.ram.page_is_zero(request_reserved(host, 1))
    assert host.allocator.nodes[-1].zone.end == host.device_frames.start
    audit(host)


def test_a_device_page_goes_back_to_its_driver_with_its_last_reference() -> None:
    host = make_host()
    freed: list[int] = []
    pgmap = memremap_pages(host, 4, "me", nothing, freed.append)
    assert page_pgmap(host, pgmap.start + 3).owner == "me"
    zone_device_page_init(host, pgmap.start)
    assert host.pages.flags[pgmap.start] == PG_zone_device | PG_locked
    with pytest.raises(BrokenTruth, match="in use while its device goes"):
        memunmap_pages(host, pgmap)
    host.pages.flags[pgmap.start] &= ~PG_locked
    put_page(host, pgmap.start)
    assert freed == [pgmap.start]
    memunmap_pages(host, pgmap)
    with pytest.raises(BrokenTruth, match="no device's page"):
        page_pgmap(host, pgmap.start)


def test_a_page_that_is_taken_twice_is_noticed() -> None:
    host = make_host()
    pgmap = memremap_pages(host, 1, None, nothing, lambda pfn: None)
    zone_device_page_init(host, pgmap.start)
    with pytest.raises(BrokenTruth, match="taken but not free"):
        zone_device_page_init(host, pgmap.start)
