"""Shadowing the guest's translation of one fault: its tables, one by one, then the leaf and its neighbours.

Source of truth: arch/x86/kvm/mmu/paging_tmpl.h (Linux 6.18): fetch, pte_prefetch, prefetch_gpte, and the part
of page_fault that treats CR0.WP; 5.10: fetch.

For each guest table on the way the vCPU's own walk gets a shadow page, and once that is write-protected or
known to be unsync the guest's entry above it is read again: if it is no longer what the walker saw, the fault
starts anew. Below a huge guest entry whose page the host has in small pieces, direct pages go on.

With CR0.WP clear the supervisor writes to pages that its tables make read-only. The CPU always runs with WP
set here, so such a page is mapped writable for the supervisor alone; the user's next access faults and maps
it for both, read-only, and so on. With SMEP the supervisor must not execute what now looks like its own page.

Not modelled: the EPT tables of a nested guest (paging_tmpl.h's third form).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvm_model.mmu.kvm_mmu import PT32_ROOT_LEVEL, PT32E_ROOT_LEVEL, is_cr0_wp, is_cr4_smep
from kvm_model.mmu.mmu_internal import (
    INVALID_PAGE,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    KvmMmuPage,
    KvmPageFault,
    role_access,
    role_direct,
)
from kvm_model.mmu.paging_tmpl import (
    GuestWalker,
    gpte_access,
    gpte_changed,
    gpte_to_gfn,
    prefetch_invalid_gpte,
    protect_clean_gpte,
)
from kvm_model.mmu.shadow_page import kvm_mmu_get_child_sp, link_shadow_page, validate_direct_spte
from kvm_model.mmu.shadow_set_spte import (
    PTE_PREFETCH_NUM,
    direct_pte_prefetch_group,
    kvm_mmu_prefetch_sptes,
    mmu_set_spte,
    prefetch_allowed,
)
from kvm_model.mmu.shadow_sync import mmu_sync_children
from kvm_model.mmu.shadow_walk import for_each_shadow_entry, kvm_mmu_is_dummy_root
from kvm_model.mmu.shadow_zap import drop_spte
from kvm_model.mmu.spte import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    is_shadow_present_pte,
    kvm_pages_per_hpage,
)
from kvm_model.mmu.tdp_mmu import disallowed_hugepage_adjust
from kvm_model.requests import KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, kvm_make_request

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = ["emulate_cr0_wp", "fetch"]

Entries = Iterator[tuple[int, int]]


def emulate_cr0_wp(vcpu: Vcpu, fault: KvmPageFault, walker: GuestWalker) -> None:
    """Give a supervisor's write to a read-only page what it needs, if CR0.WP does not forbid it.

    Not for MMIO: its SPTE would remember the changed rights.
    """
    mmu = vcpu.mmu
    if not fault.write or walker.pte_access & ACC_WRITE_MASK or is_cr0_wp(mmu) or fault.user:
        return
    if fault.slot is None:
        return
    walker.pte_access = (walker.pte_access | ACC_WRITE_MASK) & ~ACC_USER_MASK
    if is_cr4_smep(mmu):
        walker.pte_access &= ~ACC_EXEC_MASK


# -- neighbours ---------------------------------------------------------------------------------


def _prefetch_gpte(vcpu: Vcpu, sp: KvmMmuPage, walker: GuestWalker, sptep: int, gpte: int) -> bool:
    if prefetch_invalid_gpte(vcpu.mmu, gpte):
        drop_spte(vcpu.kvm, sptep, "prefetch")
        return False
    access = protect_clean_gpte(role_access(sp.role) & gpte_access(gpte), gpte)
    return kvm_mmu_prefetch_sptes(vcpu, gpte_to_gfn(walker.paging, gpte), sptep, 1, access)


def _pte_prefetch(vcpu: Vcpu, walker: GuestWalker, sptep: int) -> None:
    """Map the neighbours of a new leaf by the eight guest entries that gpte_changed has read."""
    kvm = vcpu.kvm
    sp = kvm.sps[sptep >> 9]
    if not prefetch_allowed(kvm, sp):
        return
    if role_direct(sp.role):
        direct_pte_prefetch_group(vcpu, sp, sptep)
        return
    first = sptep & ~(PTE_PREFETCH_NUM - 1)
    for at, gpte in enumerate(walker.prefetch_ptes, first):
        if at == sptep or is_shadow_present_pte(kvm.ram.u64[at]):
            continue
        if not _prefetch_gpte(vcpu, sp, walker, at, gpte):
            return


# -- tables -------------------------------------------------------------------------------------


def _shadow_guest_tables(
    vcpu: Vcpu, fault: KvmPageFault, walker: GuestWalker, entries: Entries
) -> tuple[int, int]:
    """Shadow the guest's tables down to its leaf: (level, sptep) of the entry for that; (0, 0): retry."""
    kvm = vcpu.kvm
    for level, sptep in entries:
        kvm.sps[sptep >> 9].write_flooding_count = 0
        if level == walker.level:
            return level, sptep
        table_gfn = walker.table_gfn[level - 2]
        sp = kvm_mmu_get_child_sp(vcpu, sptep, table_gfn, False, walker.pt_access[level - 2])
        synced = sp is None or not sp.unsync_child_bitmap or "link-unsynced" in kvm.breaks
        if not synced and sp is not None and mmu_sync_children(vcpu, sp, False):
            return 0, 0
        if "no-gpte-recheck" not in kvm.breaks and gpte_changed(vcpu, walker, level - 1):
            return 0, 0
        if sp is not None:
            link_shadow_page(kvm, sptep, sp)
        if fault.write and table_gfn == fault.gfn:
            fault.write_fault_to_shadow_pgtable = True
    return 0, 0


def _link_direct_tables(
    vcpu: Vcpu, fault: KvmPageFault, entries: Entries, level: int, sptep: int, direct_access: int
) -> int:
    """Go on in direct pages from the entry of the guest's leaf down to the level of the fault; its sptep."""
    kvm = vcpu.kvm
    while True:
        if fault.nx_huge_page_workaround_enabled:
            disallowed_hugepage_adjust(kvm, fault, kvm.ram.u64[sptep], level)
        if level == fault.goal_level:
            return sptep
        validate_direct_spte(kvm, sptep, direct_access)
        base_gfn = fault.gfn & ~(kvm_pages_per_hpage(level) - 1)
        sp = kvm_mmu_get_child_sp(vcpu, sptep, base_gfn, True, direct_access)
        if sp is not None:
            link_shadow_page(kvm, sptep, sp)
            sp.nx_huge_page_disallowed = fault.huge_page_disallowed
        level, sptep = next(entries)


def fetch(
    vcpu: Vcpu, fault: KvmPageFault, walker: GuestWalker,
    hugepage_adjust: Callable[[Kvm, KvmPageFault], None],
) -> int:
    """Map what `walker` found for the fault. RET_PF_*.

    The caller holds mmu_lock for write, has found the fault not stale and room for the pages.
    `hugepage_adjust` decides the fault's level, which shadowing the guest's tables may change.
    """
    kvm = vcpu.kvm
    direct_access = walker.pte_access
    top_level = vcpu.mmu.guest_level
    if top_level == PT32E_ROOT_LEVEL:
        top_level = PT32_ROOT_LEVEL
    # The root page is write-protected, or invalid; the entry there may have changed before it was.
    if gpte_changed(vcpu, walker, top_level) or vcpu.root_hpa == INVALID_PAGE:
        return RET_PF_RETRY
    if kvm_mmu_is_dummy_root(kvm, vcpu.root_hpa):
        # The root's gfn has got a memslot since.
        kvm_make_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu)
        return RET_PF_RETRY
    entries = for_each_shadow_entry(vcpu, vcpu.root_hpa, fault.addr)
    level, sptep = _shadow_guest_tables(vcpu, fault, walker, entries)
    if not level:
        return RET_PF_RETRY
    hugepage_adjust(kvm, fault)
    if (t := kvm.trace.kvm_mmu_spte_requested) is not None:
        t(fault.gfn, fault.pfn | fault.gfn & kvm_pages_per_hpage(fault.goal_level) - 1, fault.goal_level)
    sptep = _link_direct_tables(vcpu, fault, entries, level, sptep, direct_access)
    base_gfn = fault.gfn & ~(kvm_pages_per_hpage(fault.goal_level) - 1)
    ret = mmu_set_spte(vcpu, fault.slot, sptep, walker.pte_access, base_gfn, fault.pfn, fault)
    if ret != RET_PF_SPURIOUS:
        _pte_prefetch(vcpu, walker, sptep)
    return ret
