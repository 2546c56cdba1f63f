"""Taking pages out of a file: truncation, holes, and dropping what is clean.

Source of truth: mm/truncate.c (truncate_inode_pages_range, truncate_inode_partial_folio,
truncate_cleanup_folio, mapping_evict_folio, mapping_try_invalidate, truncate_pagecache,
truncate_pagecache_range), mm/filemap.c: find_lock_entries; Linux 6.18.

A folio that goes is first unmapped, with the folio locked, so that nobody maps it again: a fault that finds
it waits for the lock and sees then that it left the file. To save most of these walks the callers unmap the
whole range before. Shortening a file unmaps twice: a private copy that was made between the two would
survive otherwise. A hole leaves private copies alone.

Two passes over the pages: the first takes what it can lock at once, the second waits for locks and writeback.

Not modelled: invalidate_inode_pages2, what sets deactivate_file_folio apart from folio_deactivate, buffers
and other private data of file systems, shadow entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.filemap import folio_trylock, folio_unlock, folio_wait_writeback
from host_mm.filemap_cache import (
    END_OF_FILE,
    filemap_lock_folio,
    filemap_remove_folio,
    find_get_entries,
    page_cache_delete,
)
from host_mm.filemap_split import try_folio_split_or_unmap
from host_mm.memory_file import unmap_mapping_folio, unmap_mapping_range
from host_mm.page import (
    PG_dirty,
    PG_writeback,
    folio_mapcount,
    folio_nr_pages,
    folio_ref_freeze,
    folio_ref_unfreeze,
    folio_test_large,
    page_folio,
    put_page,
    try_get_page,
)

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm

__all__ = [
    "find_lock_entries", "folio_zero_range", "invalidate_mapping_pages", "remove_mapping",
    "truncate_inode_folio", "truncate_inode_pages_range", "truncate_inode_partial_folio",
    "truncate_pagecache", "truncate_pagecache_range", "truncate_partials",
]


# -- one folio ------------------------------------------------------------------------------------
def folio_zero_range(host: HostMm, head: int, offset: int, length: int) -> None:
    """Clear `length` bytes from byte `offset` of the folio."""
    pa = (head << 12) + offset
    host.ram.write(pa, bytes(length))


def truncate_inode_folio(mapping: AddressSpace, head: int) -> bool:
    """Unmap a locked folio and take it out of the file, dirty or not; false if it has left already."""
    host = mapping.host
    pages = host.pages
    if pages.mapping.get(head) is not mapping:
        return False
    if folio_mapcount(pages, head):
        unmap_mapping_folio(mapping, head, folio_nr_pages(pages, head))
    mapping.a_ops.cancel_dirty(mapping, head)
    filemap_remove_folio(mapping, head)
    return True


def truncate_inode_partial_folio(mapping: AddressSpace, head: int, start: int, end: int) -> bool:
    """A locked folio of which bytes [start, end] of the file go: zeros, or out if that is all of it.

    A large folio is split around them. False: it could not be, and has to stay.
    """
    host = mapping.host
    pos = host.pages.index[head] << 12
    size = folio_nr_pages(host.pages, head) << 12
    offset = max(start - pos, 0)
    length = min(size, end + 1 - pos) - offset
    folio_wait_writeback(host, head)
    if length == size:
        truncate_inode_folio(mapping, head)
        return True
    folio_zero_range(host, head, offset, length)
    mapping.a_ops.invalidate_folio(mapping, head, offset, length)
    if size == 4096:
        return True
    if try_folio_split_or_unmap(mapping, head, head + (offset >> 12)):
        if offset + length != size:
            _split_at_the_end(mapping, head + (offset + length >> 12))
        return True
    if host.pages.flags[head] & PG_dirty:
        return False
    truncate_inode_folio(mapping, head)
    return True


def _split_at_the_end(mapping: AddressSpace, split_at: int) -> None:
    """What lies behind the hole shall be a folio of its own, so that what lies in it can go."""
    host = mapping.host
    pages = host.pages
    head = page_folio(pages, split_at)
    if not try_get_page(host, head):
        return
    if folio_test_large(pages, head) and folio_trylock(host, head):
        if folio_test_large(pages, head) and pages.mapping.get(head) is mapping:
            try_folio_split_or_unmap(mapping, head, split_at)
        folio_unlock(host, head)
    put_page(host, head)


def remove_mapping(mapping: AddressSpace, head: int) -> bool:
    """__remove_mapping of the page cache: out if clean and only the cache and the caller hold it.

    The caller's reference stays.
    """
    host = mapping.host
    pages = host.pages
    expected = 1 + folio_nr_pages(pages, head)
    if host.sched.preempt:
        host.sched.point("ref-freeze")
    if not folio_ref_freeze(pages, head, expected):
        return False
    if pages.flags[head] & PG_dirty:
        folio_ref_unfreeze(pages, head, expected)
        return False
    if host.checks is not None:
        mapping.a_ops.dropped_clean(mapping, head)
    page_cache_delete(mapping, head)
    folio_ref_unfreeze(pages, head, 1)
    return True


# -- ranges ---------------------------------------------------------------------------------------
def find_lock_entries(mapping: AddressSpace, start: int, end: int) -> list[tuple[int, int]]:
    """(index, entry) of [start, end): folios wholly inside that could be locked at once and are not under
    writeback, locked and with a reference; and swap entries."""
    host = mapping.host
    pages = host.pages
    found: list[tuple[int, int]] = []
    for index, value in find_get_entries(mapping, start, end):
        if value < 0:
            found.append((index, value))
            continue
        if not try_get_page(host, value):
            continue
        base = pages.index[value]
        if base >= start and base + folio_nr_pages(pages, value) <= end and folio_trylock(host, value):
            if pages.mapping.get(value) is mapping and not pages.flags[value] & PG_writeback:
                found.append((index, value))
                continue
            folio_unlock(host, value)
        put_page(host, value)
    return found


def truncate_inode_pages_range(mapping: AddressSpace, lstart: int, lend: int) -> None:
    """Take the pages of bytes [lstart, lend] out of the file; lend -1: to the end. Zeros in partial ones."""
    host = mapping.host
    if not mapping.i_pages:
        return
    start = (lstart + 4095) >> 12
    end = END_OF_FILE if lend < 0 else (lend + 1) >> 12
    last = (END_OF_FILE << 12) - 1 if lend < 0 else lend
    for _, head in find_lock_entries(mapping, start, end):
        truncate_inode_folio(mapping, head)
        folio_unlock(host, head)
        put_page(host, head)
        if host.sched.preempt:
            host.sched.point("cond_resched")
    start, end = truncate_partials(mapping, lstart, last, start, end)
    while start < end:
        found = find_get_entries(mapping, start, end)
        if not found:
            break
        for index, _ in found:
            head = filemap_lock_folio(mapping, index)
            if head < 0:
                continue
            folio_wait_writeback(host, head)
            truncate_inode_folio(mapping, head)
            folio_unlock(host, head)
            put_page(host, head)


def truncate_partials(
    mapping: AddressSpace, lstart: int, lend: int, start: int, end: int
) -> tuple[int, int]:
    """The folios that the two ends of the range cut; the range of whole pages that is left to do."""
    host = mapping.host
    same = lstart >> 12 == lend >> 12
    head = filemap_lock_folio(mapping, lstart >> 12)
    if head >= 0:
        base, nr = host.pages.index[head], folio_nr_pages(host.pages, head)
        same = lend < base + nr << 12
        if not truncate_inode_partial_folio(mapping, head, lstart, lend):
            start = base + nr
            if same:
                end = base
        folio_unlock(host, head)
        put_page(host, head)
    head = -1 if same else filemap_lock_folio(mapping, lend >> 12)
    if head >= 0:
        if not truncate_inode_partial_folio(mapping, head, lstart, lend):
            end = host.pages.index[head]
        folio_unlock(host, head)
        put_page(host, head)
    return start, end


def truncate_pagecache(mapping: AddressSpace, newsize: int) -> None:
    """After i_size became `newsize`: what is mapped or cached beyond it goes, private copies too."""
    holebegin = (newsize + 4095) & ~4095
    unmap_mapping_range(mapping, holebegin, 0, even_cows=True)
    truncate_inode_pages_range(mapping, newsize, -1)
    unmap_mapping_range(mapping, holebegin, 0, even_cows=True)


def truncate_pagecache_range(mapping: AddressSpace, lstart: int, lend: int) -> None:
    """Punch a hole of bytes [lstart, lend] into the page cache; private copies stay."""
    unmap_start = (lstart + 4095) & ~4095
    unmap_end = ((lend + 1) & ~4095) - 1
    if unmap_end > unmap_start:
        unmap_mapping_range(mapping, unmap_start, 1 + unmap_end - unmap_start, even_cows=False)
    truncate_inode_pages_range(mapping, lstart, lend)


def invalidate_mapping_pages(mapping: AddressSpace, start: int, end: int) -> int:
    """Drop what is clean, unmapped and unused of pages [start, end); how many pages went."""
    host = mapping.host
    pages = host.pages
    count = 0
    for _, head in find_lock_entries(mapping, start, end):
        if head < 0:
            continue
        nr = folio_nr_pages(pages, head)
        if not pages.flags[head] & (PG_dirty | PG_writeback) and remove_mapping(mapping, head):
            count += nr
        else:
            host.lru.folio_deactivate(head)
        folio_unlock(host, head)
        put_page(host, head)
    return count
