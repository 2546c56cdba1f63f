"""The TDP iterator: a pre-order walk over one root's SPTEs that survives changes and lost locks.

Source of truth: arch/x86/kvm/mmu/tdp_iter.c and tdp_iter.h (Linux 6.18).

An SPTE is named by its index in Ram.u64 (physical address / 8), so its table is frame `sptep >> 9`.

    it = TdpIter(kvm.ram, root, min_level, start, end)
    while it.valid:
        ... it.old_spte, it.level, it.gfn, it.sptep ...
        it.next()

With `skip_nonpresent` runs of empty entries are stepped over inside, which only saves time.

Not modelled: gfn bits of mirror roots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.mmu_internal import role_smm
from kvm_model.mmu.spte import (
    PT_PAGE_SIZE_MASK,
    SHADOW_NONPRESENT_VALUE,
    SPTE_BASE_ADDR_MASK,
    SPTE_MMU_PRESENT_MASK,
)

if TYPE_CHECKING:
    from host_mm.ram import Ram
    from kvm_model.mmu.mmu_internal import KvmMmuPage

__all__ = ["TDP_MMU_MAX_GFN_EXCLUSIVE", "TdpIter", "spte_to_child_pt"]

TDP_MMU_MAX_GFN_EXCLUSIVE = 1 << (46 - 12)


def spte_to_child_pt(spte: int, level: int) -> int:
    """Index of the first entry of the table this SPTE points to, or -1 if it points to none."""
    if not spte & SPTE_MMU_PRESENT_MASK or level == 1 or spte & PT_PAGE_SIZE_MASK:
        return -1
    return (spte & SPTE_BASE_ADDR_MASK) >> 3


class TdpIter:
    """struct tdp_iter, and the loop's end condition. `pt_path[level]` is the table at that level."""

    __slots__ = (
        "_skip", "as_id", "end", "gfn", "level", "min_level", "next_last_level_gfn", "old_spte",
        "pt_path", "root_level", "sptep", "u64", "valid", "yielded", "yielded_gfn",
    )

    def __init__(
        self, ram: Ram, root: KvmMmuPage, min_level: int, start: int, end: int,
        *, skip_nonpresent: bool = False,
    ) -> None:
        self.u64 = ram.u64
        self.next_last_level_gfn = start
        self.end = min(end, TDP_MMU_MAX_GFN_EXCLUSIVE)
        self.root_level = root.level
        self.min_level = min_level
        self.pt_path = [0] * (root.level + 1)
        self.pt_path[root.level] = root.spt << 9
        self.as_id = role_smm(root.role)
        self.yielded = False
        self.yielded_gfn = -1
        self.level = root.level
        self.gfn = 0
        self.sptep = 0
        self.old_spte = 0
        self.valid = True
        self._skip = skip_nonpresent
        self._restart()
        if skip_nonpresent and self.valid and self.old_spte == SHADOW_NONPRESENT_VALUE:
            self.next()

    def _restart(self) -> None:
        self.yielded = False
        self.yielded_gfn = self.next_last_level_gfn
        self.level = self.root_level
        shift = 9 * (self.level - 1)
        self.gfn = self.next_last_level_gfn >> shift << shift
        self._refresh_sptep()
        self.valid = self.gfn < self.end

    def _refresh_sptep(self) -> None:
        self.sptep = self.pt_path[self.level] + (self.gfn >> (9 * (self.level - 1)) & 511)
        self.old_spte = self.u64[self.sptep]

    def next(self) -> None:
        """tdp_iter_next: the next SPTE in pre-order, or `valid` false after the last."""
        while True:
            self._step()
            if not self._skip or not self.valid or self.old_spte != SHADOW_NONPRESENT_VALUE:
                return

    def _step(self) -> None:
        if self.yielded:
            self._restart()
            return
        if self._try_step_down():
            return
        while not self._try_step_side():
            if self.level == self.root_level:
                self.valid = False
                return
            self.level += 1
            shift = 9 * (self.level - 1)
            self.gfn = self.gfn >> shift << shift
            self._refresh_sptep()
        self.valid = self.gfn < self.end

    def _try_step_down(self) -> bool:
        level = self.level
        if level == self.min_level:
            return False
        # Read again: the table may have been unlinked since.
        u64 = self.u64
        self.old_spte = spte = u64[self.sptep]
        # spte_to_child_pt and _refresh_sptep, written out: every fault takes three of these steps.
        if not spte & SPTE_MMU_PRESENT_MASK or spte & PT_PAGE_SIZE_MASK:
            return False
        self.level = level = level - 1
        self.pt_path[level] = child = (spte & SPTE_BASE_ADDR_MASK) >> 3
        shift = 9 * (level - 1)
        index = self.next_last_level_gfn >> shift
        self.gfn = index << shift
        self.sptep = sptep = child + (index & 511)
        self.old_spte = u64[sptep]
        return True

    def _try_step_side(self) -> bool:
        shift = 9 * (self.level - 1)
        sptep = self.sptep
        if sptep & 511 == 511:
            return False
        u64 = self.u64
        step = 1 << shift
        gfn = self.gfn + step
        sptep += 1
        spte = u64[sptep]
        if self._skip:
            end = self.end
            while spte == SHADOW_NONPRESENT_VALUE and sptep & 511 != 511 and gfn < end:
                sptep += 1
                gfn += step
                spte = u64[sptep]
        self.sptep = sptep
        self.gfn = gfn
        self.next_last_level_gfn = gfn
        self.old_spte = spte
        return True
