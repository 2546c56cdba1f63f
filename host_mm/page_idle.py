"""Idle page tracking: a bit for each frame that says whether it was used since the bit was set.

Source of truth: mm/page_idle.c (page_idle_get_folio, page_idle_clear_pte_refs_one, the bitmap's read
and write), include/linux/page_idle.h; Linux 6.18.

Whoever clears an accessed bit on his own account leaves PG_young behind, so that reclaim does not take
the page for unused; whoever finds an access clears PG_idle.

Not modelled: the sysfs file's binary form (the bitmap is asked for by frame).
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL, ENXIO
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import pte_present
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.kernel.costs import COST_SCAN_PAGE
from host_mm.kernel.errors import KernelError
from host_mm.page import (
    PG_anon,
    PG_idle,
    PG_ksm,
    PG_lru,
    PG_young,
    folio_mapcount,
    page_folio,
    put_page,
    try_get_page,
)
from host_mm.page_vma_mapped import PageVmaMappedWalk
from host_mm.pgtable_generic import ptep_get, ptep_test_and_clear_young
from host_mm.pgtable_huge import pmdp_clear_young_notify
from host_mm.rmap import rmap_walk

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = [
    "BITMAP_CHUNK_BITS",
    "page_idle_bitmap_read",
    "page_idle_bitmap_write",
    "page_idle_clear_pte_refs",
    "page_idle_get_folio",
    "page_is_idle",
    "page_set_idle",
    "rmap_walk_trylock",
]

BITMAP_CHUNK_BITS = 64
"""The bitmap is read and written in words of so many frames."""


def page_idle_get_folio(host: HostMm, pfn: int) -> int:
    """The folio of a frame, with a reference, if it is on an LRU list; else -1."""
    pages = host.pages
    if not 0 <= pfn < pages.nr_frames:
        return -1
    head = page_folio(pages, pfn)
    if not pages.flags[head] & PG_lru or not try_get_page(host, head):
        return -1
    return head


def rmap_walk_trylock(host: HostMm, pfn: int, one: Callable[[VmArea, int], bool]) -> bool:
    """rmap_walk under the lock of a folio that needs it: all but plain anonymous. False: it was taken."""
    lock = host.pages.flags[pfn] & (PG_anon | PG_ksm) != PG_anon
    if lock and not folio_trylock(host, pfn):
        return False
    rmap_walk(host, pfn, one)
    if lock:
        folio_unlock(host, pfn)
    return True


def page_idle_clear_pte_refs(host: HostMm, pfn: int) -> None:
    """Clear the accessed bits of all entries and secondary MMUs; a folio that was used is not idle."""
    flags = host.pages.flags

    def one(vma: VmArea, address: int) -> bool:
        mm = vma.mm
        referenced = 0
        walk = PageVmaMappedWalk(host, pfn, vma, address)
        while walk.next():
            if not walk.pte:
                referenced |= pmdp_clear_young_notify(mm, walk.address, walk.pmd)
                continue
            if pte_present(ptep_get(mm, walk.pte)):
                referenced |= ptep_test_and_clear_young(mm, walk.address, walk.pte)
            referenced |= mmu_notifier.mmu_notifier_clear_young(mm, walk.address, walk.address + 4096)
        if referenced:
            flags[pfn] = (flags[pfn] & ~PG_idle) | PG_young
        return True

    if folio_mapcount(host.pages, pfn) and pfn in host.pages.mapping:
        rmap_walk_trylock(host, pfn, one)


def page_set_idle(host: HostMm, pfn: int) -> bool:
    """Make one frame idle, its accessed bits clear; false if it is on no list, or not its folio's first."""
    folio = page_idle_get_folio(host, pfn) if not host.pages.tail[pfn] else -1
    if folio < 0:
        return False
    page_idle_clear_pte_refs(host, folio)
    host.pages.flags[folio] |= PG_idle
    put_page(host, folio)
    return True


def page_is_idle(host: HostMm, pfn: int) -> bool:
    """Whether nobody used the frame since it was made idle: asking clears the accessed bits.

    A large folio is as idle as all of it, and its first frame says so.
    """
    folio = page_idle_get_folio(host, pfn) if not host.pages.tail[pfn] else -1
    if folio < 0:
        return False
    flags = host.pages.flags
    idle = False
    if flags[folio] & PG_idle:
        # It may have been used through an entry that nobody has looked at yet.
        page_idle_clear_pte_refs(host, folio)
        idle = bool(flags[folio] & PG_idle)
    put_page(host, folio)
    return idle


def _check_chunk(start: int, nr: int) -> None:
    if start % BITMAP_CHUNK_BITS or nr % BITMAP_CHUNK_BITS or nr < 0:
        raise KernelError(
            EINVAL, f"frames {start:#x} + {nr}: the bitmap goes by multiples of {BITMAP_CHUNK_BITS}"
        )


def page_idle_bitmap_read(host: HostMm, start: int, nr: int) -> bytes:
    """The bits of `nr` frames from `start`, lowest first, as far as memory goes. KernelError(EINVAL)."""
    _check_chunk(start, nr)
    end = min(start + nr, host.pages.nr_frames)
    out = bytearray(max(end - start, 0) + 7 >> 3)
    for pfn in range(start, end):
        if page_is_idle(host, pfn):
            out[pfn - start >> 3] |= 1 << (pfn - start & 7)
        _cond_resched(host)
    return bytes(out)


def page_idle_bitmap_write(host: HostMm, start: int, bits: bytes) -> int:
    """Make the frames idle whose bit is set; the bytes taken. KernelError(EINVAL, ENXIO)."""
    _check_chunk(start, len(bits) * 8)
    if start >= host.pages.nr_frames:
        raise KernelError(ENXIO, f"frame {start:#x} is beyond the end of memory")
    end = min(start + len(bits) * 8, host.pages.nr_frames)
    for pfn in range(start, end):
        if bits[pfn - start >> 3] >> (pfn - start & 7) & 1:
            page_set_idle(host, pfn)
        _cond_resched(host)
    return end - start + 7 >> 3


def _cond_resched(host: HostMm) -> None:
    host.sched.advance(COST_SCAN_PAGE)
    if host.sched.preempt:
        host.sched.point("cond_resched")
