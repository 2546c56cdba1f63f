"""Dirty logging through rmaps: write protection, dirty bits, and the end of logging.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): rmap_write_protect, __rmap_clear_dirty,
kvm_mmu_write_protect_pt_masked, kvm_mmu_clear_dirty_pt_masked, kvm_mmu_slot_gfn_write_protect,
kvm_mmu_slot_remove_write_access, kvm_mmu_zap_collapsible_spte; 5.10: slot_handle_level,
kvm_mmu_zap_collapsible_spte.

Nothing splits a huge leaf here: it loses W, and the next write maps 4K in its place. When logging ends the
small leaves are zapped that could be huge, and faults map huge again.

Not modelled: splitting the huge leaves of nested guests when logging begins, the only ones that Linux splits
through rmaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.page import folio_test_large, page_folio
from kvm_model.mmu.mmu_internal import KVM_MAX_HUGEPAGE_LEVEL, role_direct
from kvm_model.mmu.rmap import (
    RmapHead,
    gfn_to_rmap,
    kvm_zap_one_rmap_spte,
    rmap_sptes,
    walk_slot_rmaps,
)
from kvm_model.mmu.shadow_spte import spte_clear_dirty, spte_write_protect, test_and_clear_writable
from kvm_model.mmu.spte import PG_LEVEL_4K, spte_ad_enabled, spte_to_pfn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = [
    "kvm_rmap_clear_dirty_pt_masked", "kvm_rmap_clear_dirty_slot", "kvm_rmap_write_protect_gfn",
    "kvm_rmap_write_protect_pt_masked", "kvm_rmap_wrprot_slot", "kvm_rmap_zap_collapsible_sptes",
]


def _write_protect(kvm: Kvm, head: RmapHead | None, pt_protect: bool) -> bool:
    flush = False
    for sptep in rmap_sptes(head):
        flush |= spte_write_protect(kvm, sptep, pt_protect)
    return flush


def _clear_dirty(kvm: Kvm, head: RmapHead | None) -> bool:
    changed = False
    for sptep in rmap_sptes(head):
        if spte_ad_enabled(kvm.ram.u64[sptep]):
            changed |= spte_clear_dirty(kvm, sptep)
        else:
            changed |= test_and_clear_writable(kvm, sptep)
    return changed


def kvm_rmap_wrprot_slot(kvm: Kvm, slot: KvmMemorySlot, min_level: int) -> bool:
    """Take W from the slot's leaves at `min_level` and above, mmu_lock held for write; whether to flush."""
    return walk_slot_rmaps(
        kvm, slot, lambda kvm, head, slot: _write_protect(kvm, head, False),
        range(min_level, KVM_MAX_HUGEPAGE_LEVEL + 1), slot.base_gfn, slot.end_gfn, can_yield=True,
    )


def kvm_rmap_clear_dirty_slot(kvm: Kvm, slot: KvmMemorySlot) -> bool:
    """Take D (without A/D bits W) from the slot's 4K leaves, mmu_lock held for write; whether to flush."""
    return walk_slot_rmaps(
        kvm, slot, lambda kvm, head, slot: _clear_dirty(kvm, head), range(PG_LEVEL_4K, PG_LEVEL_4K + 1),
        slot.base_gfn, slot.end_gfn, can_yield=True,
    )


def _masked(slot: KvmMemorySlot, gfn: int, mask: int) -> Iterator[RmapHead | None]:
    while mask:
        yield gfn_to_rmap(gfn + (mask & -mask).bit_length() - 1, PG_LEVEL_4K, slot)
        mask &= mask - 1


def kvm_rmap_write_protect_pt_masked(kvm: Kvm, slot: KvmMemorySlot, gfn: int, mask: int) -> None:
    """Take W from the 4K leaves of `gfn + bit` for each bit of `mask`, mmu_lock held for write."""
    for head in _masked(slot, gfn, mask):
        _write_protect(kvm, head, False)


def kvm_rmap_clear_dirty_pt_masked(kvm: Kvm, slot: KvmMemorySlot, gfn: int, mask: int) -> None:
    """Take D (without A/D bits W) from the 4K leaves of `gfn + bit` for each bit of `mask`."""
    for head in _masked(slot, gfn, mask):
        _clear_dirty(kvm, head)


def kvm_rmap_write_protect_gfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int, min_level: int) -> bool:
    """Take W and the right to get it back without mmu_lock from the leaves of `gfn`; whether to flush."""
    flush = False
    for level in range(min_level, KVM_MAX_HUGEPAGE_LEVEL + 1):
        flush |= _write_protect(kvm, gfn_to_rmap(gfn, level, slot), True)
    return flush


def kvm_rmap_zap_collapsible_sptes(
    kvm: Kvm, slot: KvmMemorySlot, max_mapping_level: Callable[[int], int]
) -> bool:
    """Zap the leaves that could be larger now, mmu_lock held for write; whether a flush is due.

    `max_mapping_level(gfn)` is the level that a fault would map with.
    """
    pages = kvm.host.pages

    def collapsible(sptep: int) -> bool:
        sp = kvm.sps[sptep >> 9]
        if not role_direct(sp.role):
            # The guest's own table is what keeps this leaf small.
            return False
        if kvm.profile.collapses_any_compound_page:
            pfn = spte_to_pfn(kvm.ram.u64[sptep])
            return folio_test_large(pages, page_folio(pages, pfn))
        return sp.level < max_mapping_level(sp.gfn)

    def zap(kvm: Kvm, head: RmapHead, slot: KvmMemorySlot) -> bool:
        due = [sptep for sptep in rmap_sptes(head) if collapsible(sptep)]
        for sptep in due:
            kvm_zap_one_rmap_spte(kvm, head, sptep, "recover")
        return bool(due)

    top = PG_LEVEL_4K if kvm.profile.collapses_any_compound_page else KVM_MAX_HUGEPAGE_LEVEL - 1
    return walk_slot_rmaps(
        kvm, slot, zap, range(PG_LEVEL_4K, top + 1), slot.base_gfn, slot.end_gfn,
        can_yield=True, flush_on_yield=True,
    )
