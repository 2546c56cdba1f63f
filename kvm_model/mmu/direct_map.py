"""Mapping a fault in direct pages: under EPT without the TDP MMU, or while a guest without EPT does not page.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): direct_map; 5.10: __direct_map.

Not modelled: NX huge-page accounting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.mmu_internal import RET_PF_SPURIOUS, KvmPageFault
from kvm_model.mmu.shadow_page import kvm_mmu_get_child_sp, link_shadow_page
from kvm_model.mmu.shadow_set_spte import direct_pte_prefetch, mmu_set_spte
from kvm_model.mmu.shadow_walk import for_each_shadow_entry
from kvm_model.mmu.spte import ACC_ALL, kvm_pages_per_hpage
from kvm_model.mmu.tdp_mmu import disallowed_hugepage_adjust

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["direct_map"]


def direct_map(vcpu: Vcpu, fault: KvmPageFault) -> int:
    """Install the tables and the leaf for a fault whose level is decided. RET_PF_*.

    The caller holds mmu_lock for write, has found the fault not stale and room for the pages.
    """
    kvm = vcpu.kvm
    if (t := kvm.trace.kvm_mmu_spte_requested) is not None:
        t(fault.gfn, fault.pfn | fault.gfn & kvm_pages_per_hpage(fault.goal_level) - 1, fault.goal_level)
    for level, sptep in for_each_shadow_entry(vcpu, vcpu.root_hpa, fault.gfn << 12):
        shift = 9 * (level - 1)
        if fault.nx_huge_page_workaround_enabled:
            disallowed_hugepage_adjust(kvm, fault, kvm.ram.u64[sptep], level)
        if level == fault.goal_level:
            break
        sp = kvm_mmu_get_child_sp(vcpu, sptep, fault.gfn >> shift << shift, True, ACC_ALL)
        if sp is not None:
            link_shadow_page(kvm, sptep, sp)
            sp.nx_huge_page_disallowed = fault.huge_page_disallowed
    base_gfn = fault.gfn >> shift << shift
    ret = mmu_set_spte(vcpu, fault.slot, sptep, ACC_ALL, base_gfn, fault.pfn, fault)
    if ret != RET_PF_SPURIOUS:
        direct_pte_prefetch(vcpu, sptep)
    return ret
