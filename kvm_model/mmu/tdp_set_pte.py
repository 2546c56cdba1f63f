"""change_pte in the TDP MMU: the SPTE follows the host's entry in place.

Source of truth: arch/x86/kvm/mmu/tdp_mmu.c: set_tdp_spte; mmu/spte.c:
kvm_mmu_changed_pte_notifier_make_spte (Linux 5.10). It is in no newer kernel: whoever sets an entry with
set_pte_at_notify has opened a bracket, and then no SPTE is there.

The entry that comes out is in a state that make_spte never gives: MMU-writable, but not host-writable and
without W. Nobody gives it W back, since host-writable is wanted for that.

Not modelled: huge host entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pte_pfn, pte_write
from kvm_model.mmu.spte import (
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    SHADOW_NONPRESENT_VALUE,
    SPTE_BASE_ADDR_MASK,
    is_shadow_present_pte,
)
from kvm_model.mmu.tdp_iter import TdpIter
from kvm_model.mmu.tdp_mmu import tdp_mmu_iter_set_spte
from kvm_model.mmu.tdp_pages import for_each_tdp_mmu_root
from kvm_model.requests import kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = ["changed_pte_notifier_make_spte", "kvm_tdp_mmu_set_spte_gfn"]


def changed_pte_notifier_make_spte(kvm: Kvm, old: int, pfn: int) -> int:
    """kvm_mmu_changed_pte_notifier_make_spte: a leaf made read-only and not accessed, of another frame."""
    new = old & ~(SPTE_BASE_ADDR_MASK | PT_WRITABLE_MASK | kvm.spte.host_writable)
    return kvm.spte.mark_spte_for_access_track(new | pfn << 12)


def kvm_tdp_mmu_set_spte_gfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int, pte: int) -> bool:
    """The host is about to set `pte` for `gfn`, mmu_lock held for write; whether an SPTE was there.

    It is zapped and flushed; if the host's entry is read-only one for the new frame takes its place.
    """
    found = False
    kvm.rcu.read_lock()
    for root in for_each_tdp_mmu_root(kvm, slot.as_id, invalid=True):
        it = TdpIter(kvm.ram, root, PG_LEVEL_4K, gfn, gfn + 1, skip_nonpresent=True)
        while it.valid:
            old = it.old_spte
            if it.level == PG_LEVEL_4K and is_shadow_present_pte(old):
                tdp_mmu_iter_set_spte(kvm, it, SHADOW_NONPRESENT_VALUE, "change-pte")
                kvm_flush_remote_tlbs_gfn(kvm, gfn, PG_LEVEL_4K)
                if not pte_write(pte):
                    new = changed_pte_notifier_make_spte(kvm, old, pte_pfn(pte))
                    it.old_spte = SHADOW_NONPRESENT_VALUE
                    tdp_mmu_iter_set_spte(kvm, it, new, "change-pte")
                found = True
            it.next()
    kvm.rcu.read_unlock()
    return found
