"""Which leaves there are: by the gfn that they map, by frame, and by what the tables themselves hold.

    spte-of-freed-frame   no leaf of any root, invalid ones included, maps a frame that is freed

A leaf outside the TDP MMU is found by the index that is kept here with every store, for its tables do not
show which gfn it maps. That index is no rmap: it must not believe what rmap-matches-sptes is to check.

Source of truth: the rules themselves; Linux 6.18.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from kvm_model.mmu.mmu_internal import role_smm
from kvm_model.mmu.spte import (
    PG_LEVEL_1G,
    PT_PAGE_SIZE_MASK,
    SPTE_BASE_ADDR_MASK,
    SPTE_MMU_PRESENT_MASK,
    is_last_spte,
    is_shadow_present_pte,
    kvm_pages_per_hpage,
    spte_to_pfn,
)
from kvm_model.mmu.tdp_iter import TDP_MMU_MAX_GFN_EXCLUSIVE
from kvm_model.truths_rmap import shadow_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.kvm_main import Kvm
    from kvm_model.mmu.mmu_internal import KvmMmuPage

__all__ = ["SPACE_SHIFT", "LeafIndex"]

SPACE_SHIFT = 40
"""Above this bit a key has the address space of the gfn that is below it."""


class LeafIndex:
    """The leaves of one VM."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self._by_gfn: tuple[dict[int, set[int]], ...] = ({}, {}, {})
        self._mapped: Counter[int] = Counter()

    def note_spte(self, sptep: int, key: int, level: int, old: int, new: int) -> None:
        """An SPTE changed; `key` is its gfn with its address space."""
        was_leaf = is_shadow_present_pte(old) and is_last_spte(old, level)
        self._count_leaf(old, new, level, was_leaf)
        if not self.kvm.tdp_mmu_enabled:
            self._index_leaf(sptep, key, level, was_leaf, new)

    def _index_leaf(self, sptep: int, key: int, level: int, was_leaf: bool, new: int) -> None:
        heads = self._by_gfn[level - 1] if level <= PG_LEVEL_1G else {}
        if is_shadow_present_pte(new) and is_last_spte(new, level):
            heads.setdefault(key, set()).add(sptep)
        elif was_leaf:
            heads[key].discard(sptep)
            if not heads[key]:
                del heads[key]

    def _count_leaf(self, old: int, new: int, level: int, was_leaf: bool) -> None:
        # A frame is counted once for each leaf, of whatever root, that maps it.
        if was_leaf:
            self._mapped.subtract(self._frames(old, level))
        if is_shadow_present_pte(new) and is_last_spte(new, level):
            self._mapped.update(self._frames(new, level))

    @staticmethod
    def _frames(spte: int, level: int) -> range:
        first = spte_to_pfn(spte)
        return range(first, first + kvm_pages_per_hpage(level))

    def frame_freed(self, pfn: int, order: int) -> None:
        """A free hook."""
        for frame in range(pfn, pfn + (1 << order)):
            if self._mapped[frame] > 0:
                why = f"pfn {frame:#x} is freed while an SPTE maps it"
                raise BrokenTruth("spte-of-freed-frame", why, self.kvm.stream.here())
            del self._mapped[frame]

    def is_reachable(self, sp: KvmMmuPage) -> bool:
        """Whether the table is reachable; a detached one is nobody's truth."""
        kvm = self.kvm
        # A page outside the TDP MMU may be linked again any time.
        while sp.tdp_mmu_page and sp.ptep >= 0:
            spte = kvm.ram.u64[sp.ptep]
            parent = kvm.sps.get(sp.ptep >> 9)
            if parent is None or not is_shadow_present_pte(spte) or spte_to_pfn(spte) != sp.spt:
                return False
            sp = parent
        return True

    def of_gfn(self, gfn: int, as_id: int) -> Iterator[int]:
        """The SPTEs of the present leaves that map `gfn` of an address space."""
        key = gfn | as_id << SPACE_SHIFT
        return (spte for _, _, _, spte in self.all_leaves(key, key + 1))

    def all_leaves(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(sptep, gfn, level, SPTE) of every present leaf that maps anything in [start, end) of one space."""
        kvm = self.kvm
        for root in kvm.tdp_mmu_roots:
            if role_smm(root.role) == start >> SPACE_SHIFT:
                yield from self._leaves(root, start, end)
        if kvm.tdp_mmu_enabled:
            return
        u64 = kvm.ram.u64
        for level, heads in enumerate(self._by_gfn, 1):
            pages = kvm_pages_per_hpage(level)
            first = start & ~(pages - 1)
            few = (end - first) // pages <= len(heads)
            gfns = range(first, end, pages) if few else [gfn for gfn in heads if first <= gfn < end]
            for gfn in gfns:
                for sptep in tuple(heads.get(gfn, ())):
                    yield sptep, gfn, level, u64[sptep]

    def scan(self) -> Iterator[tuple[int, int, int, int]]:
        """The same of all that exist, by what the tables themselves hold."""
        kvm = self.kvm
        if kvm.tdp_mmu_enabled:
            for as_id in range(len(kvm.memslots)):
                space = as_id << SPACE_SHIFT
                yield from self.all_leaves(space, space | TDP_MMU_MAX_GFN_EXCLUSIVE)
            return
        for sp in tuple(kvm.sps.values()):
            for sptep, gfn, spte in shadow_entries(kvm, sp):
                if is_last_spte(spte, sp.level):
                    yield sptep, gfn | role_smm(sp.role) << SPACE_SHIFT, sp.level, spte

    def _leaves(self, root: KvmMmuPage, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(sptep, gfn, level, SPTE) of the present leaves that map anything in [start, end)."""
        u64 = self.kvm.ram.u64
        todo = [(root.spt << 9, root.level, role_smm(root.role) << SPACE_SHIFT)]
        while todo:
            table, level, first = todo.pop()
            shift = 9 * (level - 1)
            index = max(start - first, 0) >> shift
            last = min((end - 1 - first) >> shift, 511)
            for sptep, spte in enumerate(u64[table + index : table + last + 1].tolist(), table + index):
                if not spte & SPTE_MMU_PRESENT_MASK:
                    continue
                gfn = first + ((sptep & 511) << shift)
                if level == 1 or spte & PT_PAGE_SIZE_MASK:
                    yield sptep, gfn, level, spte
                else:
                    todo.append(((spte & SPTE_BASE_ADDR_MASK) >> 3, level - 1, gfn))
