"""Folios that locked VMAs map: PG_mlocked, how many such VMAs there are, and the batches on the way there.

Source of truth: mm/mlock.c (mlock_folio, mlock_new_folio, munlock_folio, mlock_folio_batch),
mm/internal.h: mlock_vma_folio, folio_evictable; Linux 6.18. The system calls are in mlock.py.

The count is kept where the kernel has it, in place of the list head that a folio on the unevictable list
does not need: it is forgotten when the folio leaves that list, and may be too low, never too high.

Not modelled: NR_MLOCK by zone (the host has one count).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.mm_types import VM_LOCKED, VM_SPECIAL
from host_mm.page import (
    FOLIO_BATCH_SIZE,
    PG_active,
    PG_anon,
    PG_head,
    PG_ksm,
    PG_lru,
    PG_mlocked,
    PG_swapcache,
    PG_unevictable,
    folio_nr_pages,
    get_page,
    put_page,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.lru import Lru, Lruvec
    from host_mm.mm_types import VmArea

__all__ = ["Mlock", "folio_evictable", "vma_locks"]

# What an entry of the batch asks for; in Linux the low bits of the folio pointer.
_MUNLOCK = 0
_LRU_FOLIO = 1
_NEW_FOLIO = 2


def vma_locks(vma: VmArea) -> bool:
    """Whether what the VMA maps is to be mlocked: not while it is being locked (VM_LOCKED and VM_IO)."""
    return vma.flags & (VM_LOCKED | VM_SPECIAL) == VM_LOCKED


def folio_evictable(host: HostMm, pfn: int) -> bool:
    """Whether reclaim may have the folio: no locked VMA maps it, and its file lets pages go."""
    value = host.pages.flags[pfn]
    if value & PG_mlocked:
        return False
    mapping = None if value & (PG_anon | PG_ksm | PG_swapcache) else host.pages.mapping.get(pfn)
    return mapping is None or not mapping.a_ops.unevictable


class Mlock:
    """mm/mlock.c for one host, as far as it is about folios. `count` is by folio on the unevictable list."""

    def __init__(self, lru: Lru) -> None:
        self.lru = lru
        self.host = lru.host
        self.count: dict[int, int] = {}

    def mlock_folio(self, pfn: int) -> None:
        """A locked VMA maps the folio: queue its move to the unevictable list, or one more count there."""
        self._set_mlocked(pfn)
        self._queue_mlock(pfn, _LRU_FOLIO)

    def mlock_vma_folio(self, pfn: int, vma: VmArea) -> None:
        """mlock_folio if this VMA is locked, and not in the middle of being locked."""
        if vma_locks(vma):
            self.mlock_folio(pfn)

    def mlock_new_folio(self, pfn: int) -> None:
        """mlock_folio for one that is on no list yet, instead of adding it to its list."""
        self._set_mlocked(pfn)
        self._queue_mlock(pfn, _NEW_FOLIO)

    def munlock_folio(self, pfn: int) -> None:
        """A locked VMA lets go of the folio: queue one count less, with the last one its move back."""
        self._queue_mlock(pfn, _MUNLOCK)

    def mlock_drain_local(self) -> None:
        """Empty this CPU's mlock batch."""
        self.mlock_folio_batch(self.lru.batches().mlock)

    def _set_mlocked(self, pfn: int) -> None:
        host = self.host
        if not host.pages.flags[pfn] & PG_mlocked:
            host.pages.flags[pfn] |= PG_mlocked
            host.vmstat["nr_mlock"] += folio_nr_pages(self.host.pages, pfn)
            host.vmstat["unevictable_pgs_mlocked"] += folio_nr_pages(self.host.pages, pfn)

    def _queue_mlock(self, pfn: int, what: int) -> None:
        get_page(self.host, pfn)
        batch = self.lru.batches().mlock
        batch.append((pfn, what))
        if len(batch) >= FOLIO_BATCH_SIZE or self.lru.disabled or self.host.pages.flags[pfn] & PG_head:
            self.mlock_folio_batch(batch)

    def mlock_folio_batch(self, batch: list[tuple[int, int]]) -> None:
        """Do what is queued."""
        folios, batch[:] = list(batch), []
        for pfn, what in folios:
            vec = self.lru.lruvec(pfn)
            with vec.lock:
                if what == _LRU_FOLIO:
                    self._mlock_one(vec, pfn)
                elif what == _NEW_FOLIO:
                    self._mlock_new(vec, pfn)
                else:
                    self._munlock_one(vec, pfn)
        for pfn, _ in folios:
            put_page(self.host, pfn)

    def _mlock_one(self, vec: Lruvec, pfn: int) -> None:
        """__mlock_folio. Off the lists nothing can be done: whoever puts it back sees PG_mlocked."""
        flags = self.host.pages.flags
        value = flags[pfn]
        if not value & PG_lru:
            return
        if value & PG_unevictable:
            if value & PG_mlocked:
                self.count[pfn] = self.count.get(pfn, 0) + 1
            elif folio_evictable(self.host, pfn):
                self._rescue(vec, pfn)
        elif value & PG_mlocked:
            vec.remove(pfn, value)
            flags[pfn] = value = (value & ~PG_active) | PG_unevictable
            self.count[pfn] = 1
            vec.add(pfn, value)
            self.host.vmstat["unevictable_pgs_culled"] += folio_nr_pages(self.host.pages, pfn)

    def _mlock_new(self, vec: Lruvec, pfn: int) -> None:
        """__mlock_new_folio: the folio's first list is the unevictable one, if it is still locked."""
        flags = self.host.pages.flags
        if flags[pfn] & PG_lru:
            raise BrokenTruth("lru", f"pfn {pfn:#x} is added to the lists twice")
        if flags[pfn] & PG_mlocked:
            flags[pfn] |= PG_unevictable
            self.count[pfn] = 1
            self.host.vmstat["unevictable_pgs_culled"] += folio_nr_pages(self.host.pages, pfn)
        vec.add(pfn, flags[pfn])
        flags[pfn] |= PG_lru

    def _munlock_one(self, vec: Lruvec, pfn: int) -> None:
        """__munlock_folio. The count may be too low, never too high: reclaim locks again what it finds."""
        flags = self.host.pages.flags
        vmstat = self.host.vmstat
        listed = flags[pfn] & PG_lru
        if listed and flags[pfn] & PG_unevictable:
            count = self.count.get(pfn, 0)
            if count:
                self.count[pfn] = count = count - 1
            if count:
                return
        if flags[pfn] & PG_mlocked:
            flags[pfn] &= ~PG_mlocked
            vmstat["nr_mlock"] -= folio_nr_pages(self.host.pages, pfn)
            kept = not listed and flags[pfn] & PG_unevictable
            which = "unevictable_pgs_stranded" if kept else "unevictable_pgs_munlocked"
            vmstat[which] += folio_nr_pages(self.host.pages, pfn)
        if listed and flags[pfn] & PG_unevictable and folio_evictable(self.host, pfn):
            self._rescue(vec, pfn)

    def _rescue(self, vec: Lruvec, pfn: int) -> None:
        flags = self.host.pages.flags
        vec.remove(pfn, flags[pfn])
        flags[pfn] &= ~PG_unevictable
        vec.add(pfn, flags[pfn])
        self.host.vmstat["unevictable_pgs_rescued"] += folio_nr_pages(self.host.pages, pfn)
