"""Slots, their counts and the swap cache (host_mm/swapfile.py, swap_state.py)."""

from __future__ import annotations

import os
from errno import EEXIST, EINVAL, ENOENT, ENOMEM
from pathlib import Path

import pytest

from host_mm.arch.x86.swapops import swp_entry
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import Scheduler
from host_mm.page import PG_dirty, PG_swapcache, put_page
from host_mm.page_alloc import GFP_KERNEL
from host_mm.swap_state import (
    folio_alloc_swap,
    folio_free_swap,
    free_swap_and_cache,
    swap_cache_get_folio,
)
from host_mm.swapfile import COUNT_CONTINUED, SWAP_HAS_CACHE, SWAP_MAP_MAX, SwapInfo
from trace_events.stream import TraceStream

PAGE = 4096


def make(slots: int = 8) -> SwapInfo:
    return SwapInfo(Scheduler(TraceStream()), slots * PAGE)


def make_host(slots: int = 8) -> HostMm:
    stream = TraceStream()
    return HostMm(Scheduler(stream), stream, ram_bytes=256 * PAGE, swap_bytes=slots * PAGE)


def locked_page(host: HostMm) -> int:
    pfn = host.allocator.alloc_pages(GFP_KERNEL)
    folio_lock(host, pfn)
    return int(pfn)


def test_the_file_is_real_and_bears_the_header_of_mkswap(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    swap = SwapInfo(Scheduler(TraceStream()), 8 * PAGE, str(path))
    swap.pwrite_part(3, 0, b"x" * PAGE)
    data = path.read_bytes()
    assert len(data) == 8 * PAGE
    assert data[PAGE - 10 : PAGE] == b"SWAPSPACE2"
    assert data[3 * PAGE : 4 * PAGE] == b"x" * PAGE
    swap.close()
    swap.close()


def test_a_swap_file_without_a_path_has_no_name() -> None:
    swap = make()
    assert os.fstat(swap.fd).st_nlink == 0
    swap.close()


def test_a_file_of_one_page_is_refused() -> None:
    with pytest.raises(ValueError, match="8 KiB"):
        make(1)


def test_slots_are_handed_out_once_and_slot_0_never() -> None:
    swap = make(8)
    assert sorted(swap.alloc() for _ in range(7)) == [1, 2, 3, 4, 5, 6, 7]
    assert swap.alloc() == 0
    assert swap.nr_free == 0
    swap.put_cache(4)
    assert swap.alloc() == 4


def test_a_slot_is_free_when_neither_entries_nor_the_cache_hold_it() -> None:
    swap = make()
    offset = swap.alloc()
    entry = swp_entry(0, offset)
    assert swap.swap_duplicate(entry) == 0
    assert swap.swap_duplicate(entry) == 0
    swap.put_cache(offset)
    assert not swap.swap_free(entry)
    assert swap.inuse_pages == 1
    assert not swap.swap_free(entry)
    assert swap.inuse_pages == 0
    with pytest.raises(BrokenTruth, match="swap-map"):
        swap.swap_free(entry)


def test_swap_free_tells_when_only_the_cache_is_left() -> None:
    swap = make()
    entry = swp_entry(0, swap.alloc())
    swap.swap_duplicate(entry)
    assert swap.swap_free(entry)


def test_counts_beyond_the_byte_go_on() -> None:
    swap = make()
    offset = swap.alloc()
    entry = swp_entry(0, offset)
    many = SWAP_MAP_MAX + 100
    for _ in range(many):
        swap.swap_duplicate(entry)
    assert swap.swap_count(offset) == many
    assert swap.swap_map[offset] == SWAP_MAP_MAX | SWAP_HAS_CACHE | COUNT_CONTINUED
    for _ in range(many - 1):
        assert not swap.swap_free(entry)
    assert swap.swap_free(entry)
    assert swap.swap_map[offset] == SWAP_HAS_CACHE


def test_one_task_claims_a_slot_for_reading() -> None:
    swap = make()
    offset = swap.alloc()
    entry = swp_entry(0, offset)
    assert swap.swapcache_prepare(entry) == -EEXIST
    swap.swap_duplicate(entry)
    swap.put_cache(offset)
    assert swap.swapcache_prepare(entry) == 0
    assert swap.swapcache_prepare(entry) == -EEXIST
    swap.put_cache(offset)
    swap.swap_free(entry)
    assert swap.swapcache_prepare(entry) == -ENOENT
    assert swap.swapcache_prepare(swp_entry(0, 99)) == -EINVAL


def test_the_cache_holds_a_reference_and_gives_it_back_dirty() -> None:
    host = make_host()
    pfn = locked_page(host)
    assert folio_alloc_swap(host, pfn) == 0
    assert host.pages.refcount[pfn] == 2
    entry = host.pages.private[pfn]
    assert swap_cache_get_folio(host, entry) == pfn
    put_page(host, pfn)
    assert folio_free_swap(host, pfn)
    assert host.pages.refcount[pfn] == 1
    assert host.pages.flags[pfn] & (PG_dirty | PG_swapcache) == PG_dirty
    assert swap_cache_get_folio(host, entry) == -1


def test_a_slot_that_entries_hold_is_not_given_back() -> None:
    host = make_host()
    pfn = locked_page(host)
    folio_alloc_swap(host, pfn)
    assert host.swap is not None
    host.swap.swap_duplicate(host.pages.private[pfn])
    assert not folio_free_swap(host, pfn)


def test_the_last_entry_takes_the_unmapped_folio_out_of_the_cache() -> None:
    host = make_host()
    pfn = locked_page(host)
    folio_alloc_swap(host, pfn)
    entry = host.pages.private[pfn]
    assert host.swap is not None
    host.swap.swap_duplicate(entry)
    folio_unlock(host, pfn)
    free_swap_and_cache(host, entry)
    assert host.swap.inuse_pages == 0
    assert not host.pages.flags[pfn] & PG_swapcache


def test_a_locked_folio_keeps_its_slot_until_somebody_can_lock_it() -> None:
    host = make_host()
    pfn = locked_page(host)
    folio_alloc_swap(host, pfn)
    entry = host.pages.private[pfn]
    assert host.swap is not None
    host.swap.swap_duplicate(entry)
    free_swap_and_cache(host, entry)
    assert host.swap.inuse_pages == 1
    folio_unlock(host, pfn)


def test_a_full_file_takes_back_slots_that_only_the_cache_holds() -> None:
    host = make_host(slots=3)
    first, second, third = locked_page(host), locked_page(host), locked_page(host)
    assert folio_alloc_swap(host, first) == folio_alloc_swap(host, second) == 0
    assert folio_alloc_swap(host, third) == -ENOMEM, "both folios are locked"
    folio_unlock(host, first)
    assert folio_alloc_swap(host, third) == 0
    assert not host.pages.flags[first] & PG_swapcache
