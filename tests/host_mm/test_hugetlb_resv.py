"""Region maps, promised pages, and the accounts of both."""

from __future__ import annotations

import random
from errno import ENOSPC

import pytest

from host_mm.host import HostMm
from host_mm.hugetlb import HPG_restore_reserve
from host_mm.hugetlb_pool import hugetlb_acct_memory, set_max_huge_pages
from host_mm.hugetlb_resv import (
    HPAGE_RESV_OWNER,
    HugetlbInode,
    ResvMap,
    alloc_hugetlb_folio,
    hugetlb_reserve_pages,
    hugetlb_unreserve_pages,
    restore_reserve_on_error,
    vma_end_reservation,
    vma_needs_reservation,
)
from host_mm.mm_types import VM_HUGETLB, VM_MAYSHARE, VM_NORESERVE, VM_SHARED, VmArea
from host_mm.page import put_page
from tests.host_mm.machine import make_host

BASE = 0x40000000
HUGE = 2 << 20


class File:
    """Of a file the reservations need its host and its map only."""

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.private_data = HugetlbInode(1, ResvMap(host))


def machine(pages: int, vma_pages: int, flags: int = 0) -> tuple[HostMm, File, VmArea]:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, pages)
    file = File(host)
    process = host.create_process("p")
    vma = VmArea(process.mm, BASE, BASE + vma_pages * HUGE, VM_HUGETLB | flags, 0)
    vma.file = file
    return host, file, vma


def pool(host: HostMm) -> tuple[int, int]:
    return host.hstate.free, host.hstate.resv


@pytest.mark.parametrize("seed", range(5))
def test_a_region_map_is_a_set_of_indices(seed: int) -> None:
    rng = random.Random(seed)
    host = make_host()
    resv, model = ResvMap(host), set[int]()
    for _ in range(200):
        start = rng.randrange(40)
        end = start + rng.randrange(1, 8)
        span = set(range(start, end))
        kind = rng.randrange(4)
        if kind == 0:
            assert resv.chg(start, end) == len(span - model)
            assert resv.add(start, end) == len(span - model)
            model |= span
        elif kind == 1:
            assert resv.delete(start, end) == len(span & model)
            model -= span
        elif kind == 2:
            assert resv.chg(start, end) == len(span - model)
            resv.abort()
        else:
            assert resv.count(start, end) == len(span & model)
        assert resv.adds_in_progress == 0
        assert all(at < to for at, to in resv.regions)
        assert all(a[1] < b[0] for a, b in zip(resv.regions, resv.regions[1:], strict=False))


def test_a_private_mapping_is_promised_all_of_it_and_each_page_uses_one_promise() -> None:
    host, file, vma = machine(3, 2)
    assert hugetlb_reserve_pages(file, 0, 2, vma, vma.flags) == 0
    assert vma.private_data[1] == HPAGE_RESV_OWNER
    assert pool(host) == (3, 2)
    pfn = alloc_hugetlb_folio(vma, BASE)
    assert host.pages.private[pfn] & HPG_restore_reserve
    assert pool(host) == (2, 1)
    assert vma_needs_reservation(vma, BASE) == 1
    vma_end_reservation(vma, BASE)
    assert vma_needs_reservation(vma, BASE + HUGE) == 0
    vma_end_reservation(vma, BASE + HUGE)
    assert vma.private_data[0].adds_in_progress == 0


def test_an_unused_page_gives_its_promise_back() -> None:
    host, file, vma = machine(2, 2)
    hugetlb_reserve_pages(file, 0, 2, vma, vma.flags)
    pfn = alloc_hugetlb_folio(vma, BASE)
    restore_reserve_on_error(vma, BASE, pfn)
    put_page(host, pfn)
    assert pool(host) == (2, 2)
    assert vma_needs_reservation(vma, BASE) == 0
    vma_end_reservation(vma, BASE)


def test_without_a_promise_only_pages_that_nobody_was_promised_can_be_had() -> None:
    host, _, vma = machine(2, 2)
    hugetlb_acct_memory(host, 1)
    pfn = alloc_hugetlb_folio(vma, BASE)
    assert pfn >= 0
    assert not host.pages.private[pfn] & HPG_restore_reserve
    assert alloc_hugetlb_folio(vma, BASE + HUGE) == -ENOSPC
    assert pool(host) == (1, 1)


def test_an_owner_who_copies_may_not_use_the_promise_of_the_page_a_second_time() -> None:
    host, file, vma = machine(2, 2)
    hugetlb_reserve_pages(file, 0, 2, vma, vma.flags)
    alloc_hugetlb_folio(vma, BASE)
    assert alloc_hugetlb_folio(vma, BASE, cow_from_owner=True) == -ENOSPC
    assert pool(host) == (1, 1)
    assert vma.private_data[0].adds_in_progress == 0


def test_a_shared_mapping_reserves_what_the_file_lacks() -> None:
    host, file, vma = machine(4, 3, VM_MAYSHARE | VM_SHARED)
    assert hugetlb_reserve_pages(file, 0, 2, vma, vma.flags) == 0
    assert hugetlb_reserve_pages(file, 0, 3, vma, vma.flags) == 0
    assert pool(host) == (4, 3)
    assert hugetlb_reserve_pages(file, 0, 6, vma, vma.flags) < 0
    assert pool(host) == (4, 3)
    assert file.private_data.resv_map.adds_in_progress == 0
    hugetlb_unreserve_pages(file, 0, 3, 0)
    assert pool(host) == (4, 0)


def test_a_page_of_a_shared_file_keeps_its_place_in_the_map_until_it_goes() -> None:
    host, file, vma = machine(2, 1, VM_MAYSHARE | VM_SHARED)
    hugetlb_reserve_pages(file, 0, 1, vma, vma.flags)
    pfn = alloc_hugetlb_folio(vma, BASE)
    assert pool(host) == (1, 0)
    assert file.private_data.resv_map.count(0, 1) == 1
    host.pages.private[pfn] = 0
    put_page(host, pfn)
    hugetlb_unreserve_pages(file, 0, 1, 1)
    assert pool(host) == (2, 0)


def test_a_page_that_was_not_reserved_enters_the_map_and_leaves_it_if_it_is_not_used() -> None:
    host, file, vma = machine(2, 1, VM_MAYSHARE | VM_SHARED)
    assert hugetlb_reserve_pages(file, 0, 1, vma, vma.flags | VM_NORESERVE) == 0
    assert pool(host) == (2, 0)
    pfn = alloc_hugetlb_folio(vma, BASE)
    assert file.private_data.resv_map.count(0, 1) == 1
    restore_reserve_on_error(vma, BASE, pfn)
    put_page(host, pfn)
    assert file.private_data.resv_map.count(0, 1) == 0
    assert pool(host) == (2, 0)


def test_a_private_mapping_that_cannot_be_promised_all_is_promised_nothing() -> None:
    host, file, vma = machine(2, 3)
    assert hugetlb_reserve_pages(file, 0, 3, vma, vma.flags) < 0
    assert vma.private_data is None
    assert pool(host) == (2, 0)
