"""INVLPG under shadow paging, and the guest's own page faults, which invalidate as well.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): kvm_mmu_invalidate_addr, __kvm_mmu_invalidate_addr,
kvm_mmu_invlpg; arch/x86/kvm/x86.c: kvm_inject_emulated_page_fault,
kvm_inject_page_fault; x86.h: is_noncanonical_invlpg_address, vcpu_clear_mmio_info.

Only the SPTE of the address is synced, in the present root and in those that are kept for later; one that no
root leads to is synced when a root does. The CPU's own translation goes first.

A guest's page fault drops the CPU's translation of its address, as a real one does: the guest may have given
itself the right since, and need not flush.

Not modelled: INVPCID, for which the guest's CPUID has no bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.kvm_mmu import PF_VECTOR, X86Exception, is_cr4_la57, is_efer_lma
from kvm_model.mmu.mmio import MMIO_GVA_ANY, vcpu_clear_mmio_info
from kvm_model.mmu.mmu_internal import INVALID_PAGE, PFERR_PRESENT_MASK, PFERR_RSVD_MASK, role_direct
from kvm_model.mmu.shadow_sync import kvm_sync_spte
from kvm_model.mmu.shadow_walk import for_each_shadow_entry, kvm_mmu_is_dummy_root
from kvm_model.mmu.shadow_zap import mmu_page_zap_pte
from kvm_model.requests import kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "MMIO_GVA_ANY", "kvm_inject_emulated_page_fault", "kvm_mmu_invalidate_addr", "kvm_mmu_invlpg",
]


def _invalidate_in_root(vcpu: Vcpu, root_hpa: int, addr: int) -> None:
    """__kvm_mmu_invalidate_addr."""
    kvm = vcpu.kvm
    vcpu_clear_mmio_info(vcpu, addr)
    if root_hpa == INVALID_PAGE or kvm_mmu_is_dummy_root(kvm, root_hpa):
        return
    with kvm.mmu_lock:
        for _, sptep in for_each_shadow_entry(vcpu, root_hpa, addr):
            sp = kvm.sps[sptep >> 9]
            if sp.unsync:
                flush = kvm_sync_spte(vcpu, sp, sptep & 511)
                if flush < 0:
                    mmu_page_zap_pte(kvm, sp, sptep, kvm.ram.u64[sptep], "invlpg")
                if flush:
                    kvm_flush_remote_tlbs_gfn(kvm, sp.gfn, sp.level)
            if not sp.unsync_child_bitmap:
                break


def _is_noncanonical(vcpu: Vcpu, addr: int) -> bool:
    if not is_efer_lma(vcpu.mmu):
        return False
    bits = 57 if is_cr4_la57(vcpu.mmu) else 48
    return addr >> bits - 1 not in (0, (1 << 65 - bits) - 1)


def kvm_mmu_invalidate_addr(
    vcpu: Vcpu, addr: int, *, current: bool = True, prev: tuple[int, ...] = ()
) -> None:
    """Drop the translations of `addr`: in the present root, in the kept roots of these indices."""
    if _is_noncanonical(vcpu, addr):
        return
    kvm, mmu = vcpu.kvm, vcpu.mmu
    truths = kvm.shadow_truths
    begun = truths.flush_begins() if truths is not None else 0
    kvm.cpu.flush_tlb_gva(vcpu, addr)
    if role_direct(mmu.root_role):
        return
    if "no-invlpg-sync" not in kvm.breaks:
        if current:
            _invalidate_in_root(vcpu, vcpu.root_hpa, addr)
        for index in prev:
            _invalidate_in_root(vcpu, mmu.prev_roots[index][1], addr)
    if truths is not None and current:
        truths.flush_ended(vcpu, begun, addr)


def kvm_mmu_invlpg(vcpu: Vcpu, addr: int) -> None:
    """The guest executes INVLPG. Global translations go, too, so all roots are looked at."""
    kvm_mmu_invalidate_addr(vcpu, addr, prev=tuple(range(len(vcpu.mmu.prev_roots))))
    vcpu.stat["invlpg"] += 1


def kvm_inject_emulated_page_fault(vcpu: Vcpu, fault: X86Exception) -> None:
    """Deliver a page fault that the guest's own tables ask for."""
    if fault.error_code & PFERR_PRESENT_MASK and not fault.error_code & PFERR_RSVD_MASK:
        kvm_mmu_invalidate_addr(vcpu, fault.address)
    vcpu.stat["pf_guest"] += 1
    vcpu.kvm.cpu.set_reg(vcpu, "cr2", fault.address)
    vcpu.queue_exception(PF_VECTOR, fault.error_code)
