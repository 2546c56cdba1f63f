"""Aging: has the guest touched these gfns? Without mmu_lock, in 5.10 with it.

Source of truth: arch/x86/kvm/mmu/tdp_mmu.c (Linux 6.18): kvm_tdp_mmu_age_spte,
__kvm_tdp_mmu_age_gfn_range; 5.10: age_gfn_range.

Linux flushes nothing here: a translation that a TLB keeps hides the next access. Real TLBs are small
and lose translations soon; ours is large and would hide it for ever, so it is told to evict.

Not modelled: mirror roots (TDX), which Linux leaves out of aging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.spte import PG_LEVEL_4K, is_last_spte, is_shadow_present_pte, spte_ad_enabled
from kvm_model.mmu.tdp_iter import TdpIter
from kvm_model.mmu.tdp_mmu import fetch_and64, spte_changed, try_cmpxchg64
from kvm_model.mmu.tdp_pages import for_each_tdp_mmu_root

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = ["kvm_tdp_mmu_age_gfn_range", "kvm_tdp_mmu_test_age_gfn"]


def _age_spte(kvm: Kvm, it: TdpIter) -> None:
    masks = kvm.spte
    old = it.old_spte
    if not kvm.profile.lockless_aging:
        new = masks.mark_spte_for_access_track(old)
        if kvm.profile.age_clears_dirty and spte_ad_enabled(old):
            new &= ~masks.dirty
        kvm.ram.u64[it.sptep] = new
    elif spte_ad_enabled(old):
        old = fetch_and64(kvm, it.sptep, old, masks.accessed)
        new = old & ~masks.accessed
    else:
        new = masks.mark_spte_for_access_track(old)
        # Somebody changed it just now: most likely it is young anyway.
        if not try_cmpxchg64(kvm, it.sptep, old, new):
            return
    spte_changed(kvm, it.sptep, it.gfn, it.level, old, new, aged=True)
    for vcpu in kvm.vcpus:
        kvm.cpu.evict_tlb(vcpu)


def _age_gfn_range(kvm: Kvm, as_id: int, start: int, end: int, test_only: bool) -> bool:
    young = False
    masks = kvm.spte
    kvm.rcu.read_lock()
    for root in for_each_tdp_mmu_root(kvm, as_id):
        it = TdpIter(kvm.ram, root, PG_LEVEL_4K, start, end, skip_nonpresent=True)
        while it.valid:
            spte = it.old_spte
            if is_shadow_present_pte(spte) and is_last_spte(spte, it.level) and masks.is_accessed_spte(spte):
                young = True
                if test_only:
                    break
                _age_spte(kvm, it)
            it.next()
        if young and test_only:
            break
    kvm.rcu.read_unlock()
    return young


def kvm_tdp_mmu_age_gfn_range(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int) -> bool:
    """Clear accessed in [start, end) of the valid roots; whether any was set."""
    return _age_gfn_range(kvm, slot.as_id, start, end, False)


def kvm_tdp_mmu_test_age_gfn(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int) -> bool:
    """Whether any SPTE of [start, end) is accessed."""
    return _age_gfn_range(kvm, slot.as_id, start, end, True)
