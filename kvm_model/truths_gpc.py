"""The truths about gfn_to_pfn caches: gpc-in-bracket, gpc-matches-host, gpc-of-freed-frame (truths.py).

Source of truth: the rules themselves (virt/kvm/pfncache.c); Linux 6.18.

Not modelled: looking at a cache whose lock somebody has for write: it is on its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import _PAGE_PRESENT, _PAGE_RW, lookup_address_in_mm, pte_pfn
from host_mm.kernel.errors import BrokenTruth
from host_mm.mmu_notifier import MmuNotifierRange
from kvm_model.mmu.spte import kvm_pages_per_hpage

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.pfncache import GfnToPfnCache

__all__ = ["CacheTruths"]


class CacheTruths:
    """Watches the caches of one VM."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self._open: dict[int, MmuNotifierRange] = {}

    def _broken(self, truth: str, gpc: GfnToPfnCache, what: str) -> None:
        raise BrokenTruth(
            truth, f"the cache of gpa {gpc.gpa:#x} has pfn {gpc.pfn:#x} {what}", self.kvm.stream.here()
        )

    def note_start(self, range_: object) -> None:
        """range_start is done; a bracket over gfns alone is of no concern."""
        if isinstance(range_, MmuNotifierRange):
            self._open[id(range_)] = range_
        if self.kvm.gpc_list:
            self._check_brackets()

    def note_end(self, range_: object) -> None:
        """range_end begins."""
        self._open.pop(id(range_), None)

    def in_open_bracket(self, hva: int) -> bool:
        """Whether a bracket over that address is open."""
        return any(range_.start <= hva < range_.end for range_ in self._open.values())

    def frame_freed(self, pfn: int, order: int) -> None:
        """A free hook."""
        for gpc in self.kvm.gpc_list:
            if gpc.valid and pfn <= gpc.pfn < pfn + (1 << order):
                self._broken("gpc-of-freed-frame", gpc, "which is freed")

    def _check_brackets(self) -> None:
        for gpc in self.kvm.gpc_list:
            if not gpc.valid or gpc.lock.owner is not None:
                continue
            for range_ in self._open.values():
                if range_.start <= gpc.uhva < range_.end:
                    self._broken("gpc-in-bracket", gpc, f"in the bracket {range_.start:#x}-{range_.end:#x}")

    def check(self) -> None:
        """Look at every cache; no page-table lock is held."""
        self._check_brackets()
        for gpc in self.kvm.gpc_list:
            if not gpc.valid or gpc.lock.owner is not None:
                continue
            entry, level = lookup_address_in_mm(self.kvm.mm, gpc.uhva & ~0xFFF)
            pfn = pte_pfn(entry) + (gpc.uhva >> 12 & kvm_pages_per_hpage(level) - 1 if level > 1 else 0)
            if not entry & _PAGE_PRESENT or not entry & _PAGE_RW or pfn != gpc.pfn:
                self._broken("gpc-matches-host", gpc, f"for {gpc.uhva:#x}, the host has {entry:#x}")
