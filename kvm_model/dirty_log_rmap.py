"""Dirty logging without the TDP MMU: what a slot's flag and its log's readers ask of rmaps.

Source of truth: arch/x86/kvm/x86.c: kvm_mmu_slot_apply_flags; mmu/mmu.c: kvm_mmu_slot_remove_write_access,
kvm_mmu_slot_leaf_clear_dirty, kvm_arch_mmu_enable_log_dirty_pt_masked, kvm_mmu_recover_huge_pages (Linux
6.18); 5.10: kvm_mmu_slot_apply_flags, vmx_slot_enable_log_dirty, kvm_mmu_zap_collapsible_sptes.

Huge leaves are not split ahead: only the TDP MMU does that.

Not modelled: that 5.10 sets D in all leaves when a log of the CPU's ends (kvm_mmu_slot_set_dirty), which
saves entries of that log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES, KvmMemorySlot
from kvm_model.mmu.faultin_pfn import kvm_mmu_max_mapping_level
from kvm_model.mmu.rmap_log import (
    kvm_rmap_clear_dirty_pt_masked,
    kvm_rmap_clear_dirty_slot,
    kvm_rmap_write_protect_gfn,
    kvm_rmap_write_protect_pt_masked,
    kvm_rmap_wrprot_slot,
    kvm_rmap_zap_collapsible_sptes,
)
from kvm_model.mmu.spte import PG_LEVEL_2M, PG_LEVEL_4K
from kvm_model.requests import kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["apply_log_flag_by_rmap", "enable_log_by_rmap"]


def apply_log_flag_by_rmap(kvm: Kvm, new: KvmMemorySlot, *, init_set: bool) -> None:
    """Make the leaves of a slot fit its new logging flag. `init_set`: its log starts full."""
    if not new.flags & KVM_MEM_LOG_DIRTY_PAGES:
        _end_log(kvm, new)
        return
    if init_set and not kvm.profile.init_set_protects_huge:
        return
    with kvm.mmu_lock:
        flush = bool(kvm.cpu_dirty_log_size) and not init_set and kvm_rmap_clear_dirty_slot(kvm, new)
    with kvm.mmu_lock:
        # The CPU logs 4K pages only: a huge one is protected and mapped small at its first write.
        level = PG_LEVEL_2M if kvm.cpu_dirty_log_size or init_set else PG_LEVEL_4K
        flush |= kvm_rmap_wrprot_slot(kvm, new, level)
    if flush or not kvm.profile.log_flush_if_changed:
        kvm_flush_remote_tlbs(kvm)


def _end_log(kvm: Kvm, new: KvmMemorySlot) -> None:
    with kvm.mmu_lock:
        if kvm_rmap_zap_collapsible_sptes(kvm, new, lambda gfn: kvm_mmu_max_mapping_level(kvm, new, gfn)):
            kvm_flush_remote_tlbs(kvm)


def enable_log_by_rmap(kvm: Kvm, slot: KvmMemorySlot, gfn: int, mask: int, *, init_set: bool) -> None:
    """Notice the next write to each page `gfn + bit` of `mask`, mmu_lock held for write."""
    if init_set and not kvm.profile.init_set_protects_huge:
        start = gfn + (mask & -mask).bit_length() - 1
        end = gfn + mask.bit_length() - 1
        kvm_rmap_write_protect_gfn(kvm, slot, start, PG_LEVEL_2M)
        if (start + 511) >> 9 != (end + 511) >> 9:
            kvm_rmap_write_protect_gfn(kvm, slot, end, PG_LEVEL_2M)
    if kvm.cpu_dirty_log_size:
        kvm_rmap_clear_dirty_pt_masked(kvm, slot, gfn, mask)
    else:
        kvm_rmap_write_protect_pt_masked(kvm, slot, gfn, mask)
