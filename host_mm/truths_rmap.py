"""What must hold of the way back from a page to its entries, and of mlocked pages, at rest.

Source of truth: mm/rmap.c (the comment on vma->anon_vma and anon_vma->root, __anon_vma_prepare,
unlink_anon_vmas, __page_check_anon_rmap), include/linux/rmap.h: struct anon_vma, mm/mlock.c:
__munlock_folio; Linux 6.18.

    anon-vma       a VMA's chain and those of its anon_vmas say the same, within one root; the anon_vmas count
                   the VMAs and anon_vmas that are theirs
    anon-rmap      every anonymous page is in an anon_vma whose chain has the VMA that maps it, at the index
                   that the VMA has there, so that a walk finds the entry
    mlock          a folio marked mlocked is mapped by a locked VMA, and is on the unevictable list if it is
                   on any; it counts no more mappings by locked VMAs than there are

A page that a locked VMA maps need not be marked: the count is lost while the folio is off its list, and then
the first munlock takes the mark. Reclaim, when it meets the page, marks it again.

Not modelled: KSM pages, which are found by their stable node (ksm_types.py).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.mlock_folio import vma_locks
from host_mm.page import PG_anon, PG_ksm, PG_lru, PG_mlocked, PG_unevictable, page_folio

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import AnonVma, VmArea

__all__ = ["RmapAudit"]


class RmapAudit:
    """The VMAs seen, and by folio how many entries of locked VMAs map it."""

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.vmas: set[VmArea] = set()
        self.anon_vmas: set[AnonVma] = set()
        self.active: Counter[AnonVma] = Counter()
        self.locked: Counter[int] = Counter()
        self._chained: frozenset[AnonVma] = frozenset()
        self._locks = False
        # What is to be locked or unlocked is not so yet.
        self._batched = frozenset(host.lru.batched())

    def vma(self, vma: VmArea) -> None:
        """The next entries are this VMA's."""
        self.vmas.add(vma)
        self._locks = vma_locks(vma)
        for avc in vma.anon_vma_chain:
            if avc.vma is not vma or avc.anon_vma.chains.get(id(avc)) is not avc:
                raise BrokenTruth("anon-vma", f"{vma!r} is not in the chain of an anon_vma of its own")
        self._chained = frozenset(avc.anon_vma for avc in vma.anon_vma_chain)
        self.anon_vmas |= self._chained
        if len({anon_vma.root for anon_vma in self._chained}) > 1:
            raise BrokenTruth("anon-vma", f"{vma!r} is in the anon_vmas of two roots")
        if vma.anon_vma is not None:
            self.active[vma.anon_vma] += 1
            if vma.anon_vma not in self._chained:
                raise BrokenTruth("anon-vma", f"{vma!r} is not in its anon_vma's chain")

    def entry(self, vma: VmArea, address: int, pfn: int) -> None:
        """An entry, of whatever level, maps a page that counts its mappings, the first at `address`."""
        pages = self.host.pages
        folio = page_folio(pages, pfn)
        if self._locks:
            self.locked[folio] += 1
        if pages.flags[folio] & (PG_anon | PG_ksm) != PG_anon:
            return
        index = pages.index[folio] + pfn - folio
        if pages.mapping.get(folio) not in self._chained or index != vma.page_index(address):
            raise BrokenTruth(
                "anon-rmap", f"{vma!r} maps pfn {pfn:#x} at {address:#x}, and a walk of its anon_vma, "
                f"index {index:#x}, does not find that",
            )

    def folio(self, folio: int, flags: int) -> None:
        """A folio that is in use."""
        if folio in self._batched:
            return
        found = self.locked[folio]
        if flags & PG_mlocked:
            listed_wrong = flags & (PG_lru | PG_unevictable) == PG_lru
            if listed_wrong or not found:
                what = "on an evictable list" if listed_wrong else "mapped by no locked VMA"
                raise BrokenTruth("mlock", f"pfn {folio:#x} is mlocked and {what}")
        elif not flags & PG_unevictable:
            return
        if flags & PG_lru and (count := self.host.lru.mlock.count.get(folio, 0)) > found:
            raise BrokenTruth("mlock", f"pfn {folio:#x} counts {count} mappings by locked VMAs, has {found}")

    def finish(self) -> None:
        """The anon_vmas, once all VMAs were seen."""
        children = Counter(anon_vma.parent for anon_vma in self.anon_vmas)
        for anon_vma in self.anon_vmas:
            for avc in anon_vma.chains.values():
                if avc.vma not in self.vmas or avc not in avc.vma.anon_vma_chain:
                    raise BrokenTruth("anon-vma", f"{avc.vma!r} is gone and still in an anon_vma's chain")
            counted = anon_vma.num_active_vmas, anon_vma.num_children
            found = self.active[anon_vma], children[anon_vma]
            if counted != found:
                raise BrokenTruth("anon-vma", f"an anon_vma counts {counted} VMAs and children, has {found}")
