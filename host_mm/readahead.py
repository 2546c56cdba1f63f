"""Reading a file into the page cache before it is asked for.

Source of truth: mm/readahead.c (page_cache_ra_unbounded, do_page_cache_ra), mm/filemap.c:
do_sync_mmap_readahead; Linux 6.18.

A fault on a page that is not cached reads what lies around it, too; with MADV_SEQUENTIAL what follows it,
with MADV_RANDOM nothing else. Each page is added to the cache locked and not up to date, and unlocked when
its bytes are there.

    --param mm.read_ahead_kb=128    the window; 0: only the page itself

Not modelled: windows that grow and asynchronous readahead (each miss starts anew), large folios, the count
of misses that ends read-around for files used at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.filemap_cache import filemap_add_folio
from host_mm.mm_types import VM_RAND_READ, VM_SEQ_READ
from host_mm.page import put_page
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_NORETRY, GFP_NOWARN, alloc_pages

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["mmap_readahead_window", "page_cache_ra", "ra_pages"]

READ_AHEAD_KB = 128
_GFP = GFP_HIGHUSER_MOVABLE | GFP_COMP | GFP_NORETRY | GFP_NOWARN


def ra_pages(host: HostMm) -> int:
    """How many pages the window has."""
    return int(host.params.get("mm.read_ahead_kb", READ_AHEAD_KB)) >> 2


def mmap_readahead_window(host: HostMm, vma: VmArea, index: int) -> tuple[int, int]:
    """(first page, number of pages) that a fault on `index` should read."""
    pages = ra_pages(host)
    if vma.flags & VM_RAND_READ or not pages:
        return index, 0
    if vma.flags & VM_SEQ_READ:
        return index, pages
    return max(0, index - pages // 2), pages


def page_cache_ra(mapping: AddressSpace, index: int, nr: int, mm: MmStruct | None) -> None:
    """Start reading those of pages [index, index+nr) of the file that are not cached; waits for no I/O."""
    host = mapping.host
    end = min(index + nr, mapping.file_end)
    if index >= end:
        return
    mapping.invalidate_lock.read_lock()
    for at in range(index, end):
        if at in mapping.i_pages:
            continue
        head = alloc_pages(host, _GFP, 0, mapping.nid)
        if head < 0:
            break
        if filemap_add_folio(mapping, head, at, mm):
            put_page(host, head)
            continue
        mapping.a_ops.read_folio(mapping, head)
        put_page(host, head)
    mapping.invalidate_lock.read_unlock()
