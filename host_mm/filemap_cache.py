"""The page cache: which folio holds which page of a file.

Source of truth: mm/filemap.c (__filemap_add_folio, filemap_add_folio, filemap_remove_folio,
page_cache_delete, filemap_get_entry, __filemap_get_folio, replace_page_cache_folio, find_get_entries),
Linux 6.18.

A folio enters and leaves the cache locked; the cache holds one reference for each of its pages. Whoever
finds a folio takes a reference without a lock and has to look again, once it is locked, whether it is
still the file's: `mapping` goes when the folio leaves the cache, `index` stays.

Not modelled: shadow entries (a refault is not told from a first read), RCU.
"""

from __future__ import annotations

from errno import EEXIST, ENOMEM
from typing import TYPE_CHECKING

from host_mm.filemap import folio_lock, folio_unlock
from host_mm.kernel.errors import BrokenTruth
from host_mm.page import (
    PG_hugetlb,
    PG_locked,
    PG_swapbacked,
    folio_nr_pages,
    folio_ref_freeze,
    folio_ref_unfreeze,
    get_page,
    put_page,
    try_get_page,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct

__all__ = [
    "END_OF_FILE", "NOT_CACHED", "TRACEPOINTS", "filemap_add_folio", "filemap_get_entry",
    "filemap_get_folio", "filemap_lock_folio", "filemap_page", "filemap_remove_folio", "find_get_entries",
    "page_cache_delete", "page_cache_replace", "page_cache_store",
]

NOT_CACHED = -1 << 63
"""What filemap_get_entry answers where nothing is; other negative answers are ~swap entry."""

END_OF_FILE = 1 << 51
"""An index beyond every page that a file can have."""

ADD_TO_PAGE_CACHE = Tracepoint(
    "filemap", "mm_filemap_add_to_page_cache", ("file", "pfn", "index", "order"),
    lambda file, pfn, index, order: f"{file} pfn=0x{pfn:x} ofs={index << 12} order={order}",
)
DELETE_FROM_PAGE_CACHE = Tracepoint(
    "filemap", "mm_filemap_delete_from_page_cache", ("file", "pfn", "index", "order"),
    lambda file, pfn, index, order: f"{file} pfn=0x{pfn:x} ofs={index << 12} order={order}",
)
TRACEPOINTS = (ADD_TO_PAGE_CACHE, DELETE_FROM_PAGE_CACHE)


def _account(host: HostMm, mapping: AddressSpace, head: int, nr: int) -> None:
    mapping.nrpages += nr
    if host.pages.flags[head] & PG_hugetlb:
        return
    host.vmstat["nr_file_pages"] += nr
    if host.pages.flags[head] & PG_swapbacked:
        host.vmstat["nr_shmem"] += nr


def page_cache_store(mapping: AddressSpace, head: int, index: int, *, expected: int = NOT_CACHED) -> int:
    """__filemap_add_folio: a locked folio takes the places from `index`; 0 or -EEXIST.

    Each place must hold `expected`: nothing, or for shmem the swap entry that the folio was read from.
    """
    host = mapping.host
    pages = host.pages
    nr = folio_nr_pages(pages, head)
    if not pages.flags[head] & PG_locked or index & (nr - 1):
        raise BrokenTruth(
            "page-cache", f"pfn {head:#x} enters {mapping!r} unlocked or unaligned", host.stream.here()
        )
    i_pages = mapping.i_pages
    if any(i_pages.get(at, NOT_CACHED) != expected for at in range(index, index + nr)):
        return -EEXIST
    get_page(host, head, nr)
    for at in range(index, index + nr):
        i_pages[at] = head
    mapping.top = max(mapping.top, index + nr)
    pages.mapping[head] = mapping
    pages.index[head] = index
    _account(host, mapping, head, nr)
    if (t := host.trace.mm_filemap_add_to_page_cache) is not None:
        t(mapping.name, head, index, pages.order[head])
    return 0


def filemap_add_folio(mapping: AddressSpace, head: int, index: int, mm: MmStruct | None = None) -> int:
    """Put a new folio into the cache and on the LRU; it is locked then. 0, -EEXIST or -ENOMEM.

    The memory cgroup of `mm`, for which the page is read, is charged.
    """
    host = mapping.host
    if mm is not None and mm.process.memcg is not None and host.memcg.charge(head, mm):
        return -ENOMEM
    host.pages.flags[head] |= PG_locked
    ret = page_cache_store(mapping, head, index)
    if ret:
        host.pages.flags[head] &= ~PG_locked
        return ret
    host.lru.folio_add_lru(head)
    return 0


def filemap_remove_folio(mapping: AddressSpace, head: int, *, value: int = NOT_CACHED) -> None:
    """Take a locked folio out of the cache, with the cache's references; `value` takes its places.

    The caller has a reference of its own, and nobody maps the folio.
    """
    host = mapping.host
    nr = page_cache_delete(mapping, head, value=value)
    put_page(host, head, nr)


def page_cache_delete(mapping: AddressSpace, head: int, *, value: int = NOT_CACHED) -> int:
    """The folio leaves its places; how many references of the cache are now the caller's."""
    host = mapping.host
    pages = host.pages
    nr, index = folio_nr_pages(pages, head), pages.index[head]
    if not pages.flags[head] & PG_locked or mapping.i_pages.get(index) != head:
        raise BrokenTruth(
            "page-cache", f"pfn {head:#x} leaves {mapping!r} unlocked or was not in it", host.stream.here()
        )
    for at in range(index, index + nr):
        if value == NOT_CACHED:
            del mapping.i_pages[at]
        else:
            mapping.i_pages[at] = value
    del pages.mapping[head]
    _account(host, mapping, head, -nr)
    if (t := host.trace.mm_filemap_delete_from_page_cache) is not None:
        t(mapping.name, head, index, pages.order[head])
    return nr


def page_cache_replace(mapping: AddressSpace, old: int, new: int, expected: int) -> bool:
    """__folio_migrate_mapping: `new` takes the place and the cache's references of `old`; both locked.

    False, and nothing changed: `old` has other than the `expected` references.
    """
    host = mapping.host
    pages = host.pages
    if not folio_ref_freeze(pages, old, expected):
        return False
    nr, index = folio_nr_pages(pages, old), pages.index[old]
    get_page(host, new, nr)
    pages.index[new] = index
    pages.mapping[new] = mapping
    del pages.mapping[old]
    for at in range(index, index + nr):
        mapping.i_pages[at] = new
    folio_ref_unfreeze(pages, old, expected - nr)
    return True


def filemap_get_entry(mapping: AddressSpace, index: int) -> int:
    """What is at `index`: a folio's head, with a reference; or ~swap entry; or NOT_CACHED."""
    host = mapping.host
    while True:
        head = mapping.i_pages.get(index, NOT_CACHED)
        if head < 0:
            return head
        if try_get_page(host, head):
            return head
        # Frozen by who takes it out or moves it.
        host.sched.sleep(1000)


def filemap_get_folio(mapping: AddressSpace, index: int) -> int:
    """The folio that has page `index`, with a reference, not locked; or -1."""
    head = filemap_get_entry(mapping, index)
    return head if head >= 0 else -1


def filemap_lock_folio(mapping: AddressSpace, index: int) -> int:
    """The folio that has page `index`, with a reference and locked, still in the cache; or -1."""
    host = mapping.host
    while True:
        head = filemap_get_folio(mapping, index)
        if head < 0:
            return -1
        folio_lock(host, head)
        if host.pages.mapping.get(head) is mapping:
            return head
        folio_unlock(host, head)
        put_page(host, head)


def filemap_page(mapping: AddressSpace, head: int, index: int) -> int:
    """folio_file_page: the frame of page `index` in its folio."""
    return head + index - mapping.host.pages.index[head]


def find_get_entries(mapping: AddressSpace, start: int, end: int) -> list[tuple[int, int]]:
    """(index, what is there) of pages [start, end) that are cached or in swap, by index, no references.

    A large folio comes once, with the first index in the range. Costs as the smaller of the range and what
    the file has.
    """
    i_pages = mapping.i_pages
    end = min(end, mapping.top)
    if end - start <= len(i_pages):
        found = [(at, i_pages[at]) for at in range(start, end) if at in i_pages]
    else:
        found = sorted((at, value) for at, value in i_pages.items() if start <= at < end)
    return [
        entry for n, entry in enumerate(found) if entry[1] < 0 or not n or found[n - 1][1] != entry[1]
    ]
