"""struct page as sparse columns, and the reference counts that keep a frame from being freed.

Source of truth: include/linux/page-flags.h (enum pageflags), include/linux/mm.h (get_page, put_page,
folio_maybe_dma_pinned), mm/swap.c: __folio_put, mm/page-writeback.c: folio_mark_dirty; Linux 6.18.

A frame's description is spread over columns indexed by pfn; a column costs memory only where it was
written. `mapcount` counts page-table entries (the kernel stores one less). A tail page of a compound
page holds its distance from the head in `tail`, and all reference counts live in the head.

    private:  swap_entry of a page in the swap cache, else the owner's word
    entire_mapcount, large_mapcount (of the head of a large folio): how often it is mapped as a whole, and
              how many entries map it or a part of it
    pincount: how many of the references to a large folio are pins
    nr_pages_mapped: how many pages of a large folio have entries of their own, plus ENTIRELY_MAPPED if
              it is mapped as a whole; mm_mapcount: how many of its entries each address space has
    index:    linear_page_index in its anon_vma or file
    mapping:  AnonVma or address space, absent for pages nobody maps

Not modelled: page_ref tracing, per-page LRU links (lru.py keeps the lists), that a large folio remembers
two address spaces only (more than two at a time are counted exactly here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth
from host_mm.mm_types import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES
from host_mm.ram import column

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = [
    "ENTIRELY_MAPPED", "FOLIO_BATCH_SIZE", "GUP_PIN_COUNTING_BIAS", "PAGE_FLAGS_CHECK_AT_FREE", "PG_active",
    "PG_anon", "PG_anon_exclusive", "PG_buddy", "PG_dirty", "PG_head", "PG_hugetlb", "PG_hwpoison", "PG_idle",
    "PG_ksm", "PG_locked", "PG_lru", "PG_mlocked", "PG_readahead", "PG_reclaim", "PG_referenced",
    "PG_reserved", "PG_swapbacked", "PG_swapcache", "PG_table", "PG_unevictable", "PG_uptodate",
    "PG_workingset", "PG_writeback", "PG_young", "PG_zone_device", "Pages", "decode_page_flags",
    "folio_mapcount", "folio_maybe_dma_pinned", "folio_maybe_mapped_shared", "folio_nr_pages",
    "folio_ref_freeze", "folio_ref_unfreeze", "folio_test_large", "get_page", "mm_counter", "page_folio",
    "put_page", "set_page_dirty", "try_get_page",
]

# Masks, at the kernel's bit numbers.
PG_locked = 1 << 0
PG_writeback = 1 << 1
PG_referenced = 1 << 2
PG_uptodate = 1 << 3
PG_dirty = 1 << 4
PG_lru = 1 << 5
PG_head = 1 << 6
PG_waiters = 1 << 7
PG_active = 1 << 8
PG_workingset = 1 << 9
PG_swapcache = 1 << 10
PG_anon_exclusive = 1 << 11
PG_reserved = 1 << 13
PG_private = 1 << 14
PG_reclaim = 1 << 16
PG_readahead = PG_reclaim
PG_swapbacked = 1 << 17
PG_unevictable = 1 << 18
PG_mlocked = 1 << 20
PG_hwpoison = 1 << 21
PG_young = 1 << 22
PG_idle = 1 << 23
# What the kernel keeps in page_type or in the low bits of page->mapping.
PG_buddy = 1 << 32
PG_table = 1 << 33
PG_anon = 1 << 34
PG_ksm = 1 << 35
PG_hugetlb = 1 << 36
# What the kernel keeps in the zone number: ZONE_DEVICE.
PG_zone_device = 1 << 40

PAGE_FLAGS_CHECK_AT_FREE = PG_locked | PG_writeback | PG_lru | PG_active | PG_swapcache | PG_unevictable
"""A page that still bears one of these when its last reference goes is a bug (mm/page_alloc.c)."""

ENTIRELY_MAPPED = 1 << 23
"""mm/internal.h: what one mapping of the whole adds to nr_pages_mapped."""

FOLIO_BATCH_SIZE = 31
"""include/linux/folio_batch.h: how many folios a batch holds."""

GUP_PIN_COUNTING_BIAS = 1024
"""include/linux/mm.h: what one pin_user_pages() adds to the reference count of a small folio; a large one
counts its pins in pincount, and one reference for each."""

_NAMES = {
    PG_locked: "locked", PG_writeback: "writeback", PG_referenced: "referenced", PG_uptodate: "uptodate",
    PG_dirty: "dirty", PG_lru: "lru", PG_head: "head", PG_waiters: "waiters", PG_active: "active",
    PG_workingset: "workingset", PG_swapcache: "swapcache", PG_anon_exclusive: "anon_exclusive",
    PG_reserved: "reserved", PG_private: "private", PG_reclaim: "reclaim", PG_swapbacked: "swapbacked",
    PG_unevictable: "unevictable", PG_mlocked: "mlocked", PG_hwpoison: "hwpoison", PG_young: "young",
    PG_idle: "idle", PG_buddy: "buddy", PG_table: "table", PG_anon: "anon", PG_ksm: "ksm",
    PG_hugetlb: "hugetlb", PG_zone_device: "zone_device",
}


class Pages:
    """The columns of struct page for `nr_frames` frames."""

    __slots__ = (
        "entire_mapcount", "flags", "generation", "index", "large_mapcount", "mapcount", "mapping",
        "mm_mapcount", "nr_frames", "nr_pages_mapped", "order", "pincount", "private", "refcount", "tail",
    )

    def __init__(self, nr_frames: int) -> None:
        self.nr_frames = nr_frames
        self.refcount = column("i", nr_frames)
        self.mapcount = column("i", nr_frames)
        self.entire_mapcount = column("i", nr_frames)
        self.large_mapcount = column("i", nr_frames)
        self.nr_pages_mapped = column("i", nr_frames)
        self.pincount = column("i", nr_frames)
        self.flags = column("Q", nr_frames)
        self.index = column("Q", nr_frames)
        self.private = column("Q", nr_frames)
        self.generation = column("I", nr_frames)
        self.order = column("B", nr_frames)
        self.tail = column("I", nr_frames)
        self.mapping: dict[int, Any] = {}
        self.mm_mapcount: dict[int, dict[Any, int]] = {}


def decode_page_flags(flags: int) -> str:
    """The names of the set bits, joined by |, in bit order."""
    return "|".join(name for bit, name in _NAMES.items() if flags & bit)


def page_folio(pages: Pages, pfn: int) -> int:
    """The pfn of the head of the folio that `pfn` belongs to."""
    return pfn - pages.tail[pfn]


def folio_test_large(pages: Pages, head: int) -> bool:
    """Whether the folio has more than one page."""
    return pages.flags[head] & PG_head != 0


def folio_nr_pages(pages: Pages, head: int) -> int:
    """How many 4 KiB pages the folio has."""
    return 1 << pages.order[head] if pages.flags[head] & PG_head else 1


def folio_mapcount(pages: Pages, head: int) -> int:
    """How many entries, of whatever level, map the folio or a part of it."""
    return pages.large_mapcount[head] if pages.flags[head] & PG_head else pages.mapcount[head]


def folio_maybe_mapped_shared(pages: Pages, head: int) -> bool:
    """Whether more than one address space maps the folio; small ones and hugetlb: more than one entry."""
    if pages.flags[head] & (PG_head | PG_hugetlb) != PG_head:
        return folio_mapcount(pages, head) > 1
    return pages.large_mapcount[head] > 1 and len(pages.mm_mapcount.get(head, ())) > 1


def mm_counter(pages: Pages, head: int) -> int:
    """Which of mm.rss counts a mapping of this folio."""
    flags = pages.flags[head]
    if flags & PG_anon:
        return MM_ANONPAGES
    return MM_SHMEMPAGES if flags & PG_swapbacked else MM_FILEPAGES


def get_page(host: HostMm, pfn: int, nr: int = 1) -> None:
    """Take `nr` references to a page that cannot be free now."""
    pages = host.pages
    head = pfn - pages.tail[pfn]
    count = pages.refcount[head]
    if count <= 0:
        raise BrokenTruth(
            "page-refcount", f"get_page of free pfn {pfn:#x} (refcount {count})", host.stream.here()
        )
    pages.refcount[head] = count + nr


def try_get_page(host: HostMm, pfn: int, nr: int = 1) -> bool:
    """Take `nr` references unless the page is free or frozen (folio_try_get)."""
    pages = host.pages
    head = pfn - pages.tail[pfn]
    count = pages.refcount[head]
    if count <= 0:
        return False
    pages.refcount[head] = count + nr
    return True


def put_page(host: HostMm, pfn: int, nr: int = 1) -> None:
    """Drop `nr` references; the last one frees the folio."""
    pages = host.pages
    head = pfn - pages.tail[pfn]
    count = pages.refcount[head] - nr
    if count < 0:
        raise BrokenTruth(
            "page-refcount", f"put_page of pfn {pfn:#x} takes its refcount to {count}", host.stream.here()
        )
    pages.refcount[head] = count
    if count == 0:
        __folio_put(host, head)


def __folio_put(host: HostMm, pfn: int) -> None:
    pages = host.pages
    if pages.flags[pfn] & PG_hugetlb:
        host.free_huge_folio(pfn)
        return
    if pages.flags[pfn] & PG_zone_device:
        host.free_zone_device_folio(pfn)
        return
    if pages.flags[pfn] & PG_lru:
        host.lru.lru_del(pfn)
    host.allocator.free_frozen_pages(pfn, pages.order[pfn])


def folio_ref_freeze(pages: Pages, pfn: int, expected: int) -> bool:
    """Take the count from exactly `expected` to 0, so that nobody can take a reference."""
    if pages.refcount[pfn] != expected:
        return False
    pages.refcount[pfn] = 0
    return True


def folio_ref_unfreeze(pages: Pages, pfn: int, count: int) -> None:
    """End a freeze with `count` references."""
    pages.refcount[pfn] = count


def folio_maybe_dma_pinned(pages: Pages, pfn: int) -> bool:
    """Whether somebody may hold a pin_user_pages() pin; exact for a large folio, else by its count."""
    head = pfn - pages.tail[pfn]
    if pages.flags[head] & PG_head:
        return pages.pincount[head] > 0
    return pages.refcount[head] >= GUP_PIN_COUNTING_BIAS


def set_page_dirty(host: HostMm, pfn: int) -> None:
    """folio_mark_dirty: the frame's bytes are newer than any backing store's; a file is told of its pages."""
    pages = host.pages
    head = pfn - pages.tail[pfn]
    flags = pages.flags[head]
    if flags & PG_reserved:
        return
    if flags & PG_reclaim:
        flags &= ~PG_reclaim
    pages.flags[head] = flags
    mapping = None if flags & PG_anon else pages.mapping.get(head)
    if mapping is None:
        pages.flags[head] = flags | PG_dirty
    else:
        mapping.a_ops.dirty_folio(mapping, head)
