"""Splitting a large folio of the page cache around a page.

Source of truth: mm/huge_memory.c (try_folio_split, folio_split, __folio_split, __split_unmapped_folio with
uniform_split false, __split_folio_to_order), mm/truncate.c: try_folio_split_or_unmap; Linux 6.18.

The half that has the page is halved again, until the page is a folio of its own: a hole in a large folio
leaves pieces that are as large as they can be. Every mapping of the folio goes first, in a bracket per VMA
over the whole folio; faults bring the pieces back. Splits into single pages are in huge_memory_split.py.

Not modelled: hardware-poisoned folios, the place of the pieces on the LRU list (they come at its head).
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY
from typing import TYPE_CHECKING

from host_mm.filemap import folio_unlock
from host_mm.filemap_cache import page_cache_delete
from host_mm.huge_memory_split import SPLIT_COPIED, can_split_folio, unmap_folio
from host_mm.page import (
    PG_dirty,
    PG_head,
    PG_lru,
    PG_writeback,
    folio_nr_pages,
    folio_ref_freeze,
    folio_ref_unfreeze,
    put_page,
)
from host_mm.rmap_unmap import TTU_IGNORE_MLOCK, TTU_SPLIT_HUGE_PMD, TTU_SYNC, try_to_unmap

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm

__all__ = ["folio_split", "try_folio_split_or_unmap"]


def folio_split(mapping: AddressSpace, folio: int, split_at: int) -> int:
    """Split a locked folio until page `split_at` is one of its own; 0, -EBUSY, or -EAGAIN: somebody holds it.

    The caller has one reference. The piece with the folio's first page stays locked and the caller's; what
    lies beyond the end of the file leaves the cache.
    """
    host = mapping.host
    pages = host.pages
    nr = folio_nr_pages(pages, folio)
    if pages.mapping.get(folio) is not mapping or pages.flags[folio] & PG_writeback:
        return -EBUSY
    if not mapping.a_ops.release_folio(mapping, folio):
        return -EBUSY
    mapping.i_mmap_rwsem.read_lock()
    ret = -EAGAIN
    pieces = [folio]
    if can_split_folio(host, folio, 1):
        unmap_folio(host, folio)
        if host.sched.preempt:
            host.sched.point("ref-freeze")
        if folio_ref_freeze(pages, folio, 1 + nr):
            host.thp.unqueue_deferred_split(folio)
            pieces = _split_unmapped(mapping, folio, split_at)
            ret = 0
    mapping.i_mmap_rwsem.read_unlock()
    host.vmstat["thp_split_page_failed" if ret else "thp_split_page"] += 1
    for piece in pieces[1:]:
        if pages.index[piece] >= mapping.file_end:
            mapping.a_ops.cancel_dirty(mapping, piece)
            put_page(host, piece, page_cache_delete(mapping, piece))
        folio_unlock(host, piece)
        put_page(host, piece)
    return ret


def _pieces(folio: int, order: int, split_at: int) -> list[tuple[int, int]]:
    """(first frame, order) of what the folio falls into, by frame."""
    found: list[tuple[int, int]] = []
    while order:
        order -= 1
        half = folio + (1 << order)
        if split_at >= half:
            found.append((folio, order))
            folio = half
        else:
            found.append((half, order))
    return sorted([*found, (folio, 0)])


def _split_unmapped(mapping: AddressSpace, folio: int, split_at: int) -> list[int]:
    """__split_unmapped_folio: the frozen folio becomes folios, each locked and with a reference."""
    host = mapping.host
    pages = host.pages
    flags = pages.flags
    vec = host.lru.lruvec(folio)
    vec.lock.lock()
    listed = flags[folio] & PG_lru
    if listed:
        vec.remove(folio, flags[folio])
    copied, index, memcg = flags[folio] & SPLIT_COPIED, pages.index[folio], host.memcg.folios.get(folio)
    pieces = _pieces(folio, pages.order[folio], split_at)
    for head, order in reversed(pieces):
        _make_folio(host, head, order, copied)
        if memcg is not None:
            host.memcg.folios[head] = memcg
        at = index + head - folio
        pages.index[head] = at
        pages.mapping[head] = mapping
        for offset in range(1 << order):
            mapping.i_pages[at + offset] = head
        if copied & PG_dirty and mapping.a_ops.can_writeback:
            mapping.dirty[at] = None
        if listed:
            vec.add(head, flags[head])
            flags[head] |= PG_lru
        folio_ref_unfreeze(pages, head, 1 + (1 << order))
    vec.lock.unlock()
    return [head for head, _ in pieces]


def _make_folio(host: HostMm, head: int, order: int, flags: int) -> None:
    pages = host.pages
    pages.flags[head] = flags | (PG_head if order else 0)
    pages.order[head] = order
    for offset in range(1 << order):
        pages.tail[head + offset] = offset
        if offset:
            pages.flags[head + offset] = 0
            pages.refcount[head + offset] = 0


def try_folio_split_or_unmap(mapping: AddressSpace, folio: int, split_at: int) -> bool:
    """Split the folio, or at least unmap it, so that faults on what is beyond the end now are refused."""
    if not folio_split(mapping, folio, split_at):
        return True
    if not mapping.a_ops.is_shmem:
        try_to_unmap(mapping.host, folio, TTU_SYNC | TTU_SPLIT_HUGE_PMD | TTU_IGNORE_MLOCK)
    return False
