"""What a gfn loses while a guest table there is shadowed: huge mappings, and writes that nobody sees.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): account_shadowed, unaccount_shadowed,
kvm_memslots_for_spte_role, kvm_vcpu_write_protect_gfn.

A table above the lowest level is write-tracked: each write to it exits and is emulated. One at the lowest
level is only write-protected; the first write to it may make its pages unsync (unsync.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.memslots import kvm_mmu_gfn_allow_lpage, kvm_mmu_gfn_disallow_lpage
from kvm_model.mmu.mmu_internal import role_smm
from kvm_model.mmu.page_track import (
    kvm_mmu_slot_gfn_write_protect,
    slot_write_track_add_gfn,
    slot_write_track_remove_gfn,
)
from kvm_model.mmu.spte import PG_LEVEL_4K
from kvm_model.requests import kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot
    from kvm_model.mmu.mmu_internal import KvmMmuPage

__all__ = ["account_shadowed", "kvm_sp_write_protect_gfn", "unaccount_shadowed"]


def _slot_of(kvm: Kvm, sp: KvmMmuPage) -> KvmMemorySlot:
    slot = kvm.memslots[role_smm(sp.role)].gfn_to_memslot(sp.gfn)
    assert slot is not None, f"the guest table of {sp!r} has no memslot"
    return slot


def account_shadowed(kvm: Kvm, sp: KvmMmuPage) -> None:
    """`sp` shadows the guest table at its gfn from now on; mmu_lock held for write."""
    # Before faults read the guest's entries again: an emulated write sees the count, or they see the write.
    kvm.indirect_shadow_pages += 1
    slot = _slot_of(kvm, sp)
    if sp.level > PG_LEVEL_4K:
        slot_write_track_add_gfn(kvm, slot, sp.gfn)
    else:
        kvm_mmu_gfn_disallow_lpage(slot, sp.gfn)
        protect = "no-table-protect" not in kvm.breaks
        if protect and kvm_mmu_slot_gfn_write_protect(kvm, slot, sp.gfn, PG_LEVEL_4K):
            kvm_flush_remote_tlbs_gfn(kvm, sp.gfn, PG_LEVEL_4K)
    if kvm.shadow_truths is not None:
        kvm.shadow_truths.note_table(sp)


def unaccount_shadowed(kvm: Kvm, sp: KvmMmuPage) -> None:
    """`sp` shadows it no more."""
    kvm.indirect_shadow_pages -= 1
    slot = _slot_of(kvm, sp)
    if sp.level > PG_LEVEL_4K:
        slot_write_track_remove_gfn(kvm, slot, sp.gfn)
    else:
        kvm_mmu_gfn_allow_lpage(slot, sp.gfn)


def kvm_sp_write_protect_gfn(kvm: Kvm, sp: KvmMmuPage) -> bool:
    """kvm_vcpu_write_protect_gfn of the table that `sp` shadows; whether a flush is due."""
    return kvm_mmu_slot_gfn_write_protect(kvm, _slot_of(kvm, sp), sp.gfn, PG_LEVEL_4K)
