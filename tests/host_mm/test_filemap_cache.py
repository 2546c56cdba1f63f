"""Which folio has which page of a file (host_mm/filemap_cache.py)."""

from __future__ import annotations

from errno import EEXIST

import pytest

from host_mm.address_space import fput
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.filemap_cache import (
    NOT_CACHED,
    filemap_add_folio,
    filemap_get_entry,
    filemap_get_folio,
    filemap_lock_folio,
    filemap_remove_folio,
)
from host_mm.kernel.errors import BrokenTruth
from host_mm.memfd import memfd_create
from host_mm.page import PG_locked, PG_lru, PG_swapbacked, put_page
from host_mm.page_alloc import GFP_HIGHUSER_MOVABLE, alloc_pages
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, make_host, run


def cached(index: int = 3) -> tuple[Shared, int]:
    """A page that the cache has, locked, with the caller's reference."""
    s = Shared()
    pfn = alloc_pages(s.host, GFP_HIGHUSER_MOVABLE, 0, 0)
    s.host.pages.flags[pfn] |= PG_swapbacked
    assert filemap_add_folio(s.file, pfn, index) == 0
    return s, pfn


def test_a_folio_enters_locked_with_a_reference_and_goes_to_its_list() -> None:
    s, pfn = cached()
    s.host.lru.lru_add_drain_all()
    assert s.host.pages.flags[pfn] & (PG_locked | PG_lru) == PG_locked | PG_lru
    assert (s.host.pages.refcount[pfn], s.file.nrpages) == (2, 1)
    assert s.host.vmstat["nr_file_pages"] == s.host.vmstat["nr_shmem"] == 1
    assert filemap_get_folio(s.file, 3) == pfn
    put_page(s.host, pfn)
    assert filemap_get_entry(s.file, 2) == NOT_CACHED
    folio_unlock(s.host, pfn)
    put_page(s.host, pfn)
    s.end()


def test_a_place_is_taken_once() -> None:
    s, pfn = cached()
    other = alloc_pages(s.host, GFP_HIGHUSER_MOVABLE, 0, 0)
    assert filemap_add_folio(s.file, other, 3) == -EEXIST
    assert not s.host.pages.flags[other] & PG_locked
    put_page(s.host, other)
    folio_unlock(s.host, pfn)
    put_page(s.host, pfn)
    s.end()


def test_who_waited_for_a_folio_that_left_looks_again() -> None:
    s, pfn = cached()
    found: list[int] = []

    def finder() -> None:
        found.append(filemap_lock_folio(s.file, 3))

    def remover() -> None:
        s.host.sched.sleep(1000)
        filemap_remove_folio(s.file, pfn)
        folio_unlock(s.host, pfn)
        put_page(s.host, pfn)

    run(s.host, finder, remover)
    assert found == [-1]
    assert s.file.nrpages == s.host.vmstat["nr_file_pages"] == 0
    s.end()


def test_a_folio_neither_enters_twice_nor_leaves_unlocked() -> None:
    s, pfn = cached()
    folio_unlock(s.host, pfn)
    with pytest.raises(BrokenTruth, match="page-cache"):
        filemap_remove_folio(s.file, pfn)
    folio_lock(s.host, pfn)
    filemap_remove_folio(s.file, pfn)
    with pytest.raises(BrokenTruth, match="page-cache"):
        filemap_remove_folio(s.file, pfn)
    folio_unlock(s.host, pfn)
    put_page(s.host, pfn)
    s.end()


def test_an_evicted_file_gives_its_frames_back() -> None:
    host = make_host()
    free = sum(zone.nr_free for zone in host.zones)
    file = memfd_create(host, "x", 4 * PAGE)
    pfn = alloc_pages(host, GFP_HIGHUSER_MOVABLE, 0, 0)
    assert filemap_add_folio(file, pfn, 0) == 0
    folio_unlock(host, pfn)
    put_page(host, pfn)
    fput(file)
    host.lru.lru_add_drain_all()
    assert sum(zone.nr_free for zone in host.zones) == free
