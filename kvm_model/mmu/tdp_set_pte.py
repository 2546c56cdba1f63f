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
from kvm_model.mmu.tdp_mmu import for_each_tdp_mmu_root, tdp_mmu_iter_set_spte
from kvm_model.requests import kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["kvm_tdp_mmu_set_spte_gfn"]


def kvm_tdp_mmu_set_spte_gfn(kvm: Kvm, gfn: int, pte: int) -> bool:
    """The host is about to set `pte` for `gfn`, mmu_lock held for write; whether an SPTE was there.

    It is zapped and flushed; if the host's entry is read-only one for the new frame takes its place.
    """
    found = False
    masks = kvm.spte
    kvm.rcu.read_lock()
    for root in for_each_tdp_mmu_root(kvm, invalid=True):
        it = TdpIter(kvm.ram, root, PG_LEVEL_4K, gfn, gfn + 1, skip_nonpresent=True)
        while it.valid:
            old = it.old_spte
            if it.level == PG_LEVEL_4K and is_shadow_present_pte(old):
                tdp_mmu_iter_set_spte(kvm, it, SHADOW_NONPRESENT_VALUE, "change-pte")
                kvm_flush_remote_tlbs_gfn(kvm, gfn, PG_LEVEL_4K)
                if not pte_write(pte):
                    new = old & ~(SPTE_BASE_ADDR_MASK | PT_WRITABLE_MASK | masks.host_writable)
                    new = masks.mark_spte_for_access_track(new | pte_pfn(pte) << 12)
                    it.old_spte = SHADOW_NONPRESENT_VALUE
                    tdp_mmu_iter_set_spte(kvm, it, new, "change-pte")
                found = True
            it.next()
    kvm.rcu.read_unlock()
    return found
