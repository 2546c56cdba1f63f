"""Giving up shadow pages, so that the guest may write to what they shadow.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): __kvm_mmu_unprotect_gfn_and_retry.

A write that exits because its page is shadowed, by an instruction that KVM cannot emulate or that hardly
writes page tables, is better done by the CPU: the shadow pages go, and the guest executes it again. The vCPU
remembers where it did so; a second time at the same place is emulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.mmu_internal import INVALID_PAGE, KvmMmuPage
from kvm_model.mmu.shadow_zap import kvm_mmu_commit_zap_page, kvm_mmu_prepare_zap_page
from kvm_model.mmu.unsync import for_each_gfn_valid_sp_with_gptes

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["kvm_mmu_unprotect_gfn_and_retry"]


def kvm_mmu_unprotect_gfn_and_retry(vcpu: Vcpu, addr: int, gpa: int, *, always_retry: bool = False) -> bool:
    """Zap what shadows the page of `gpa`, which the fault at `addr` met; whether there was anything.

    Then, or with `always_retry`, the next fault at the same RIP and address is not to be retried again.
    """
    kvm = vcpu.kvm
    zapped = False
    if kvm.indirect_shadow_pages and gpa != INVALID_PAGE:
        invalid_list: list[KvmMmuPage] = []
        with kvm.mmu_lock:
            for sp in for_each_gfn_valid_sp_with_gptes(kvm, gpa >> 12):
                kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "unprotect")
            zapped = bool(invalid_list)
            kvm_mmu_commit_zap_page(kvm, invalid_list)
    if zapped or always_retry:
        vcpu.last_retry_eip = kvm.cpu.get_reg(vcpu, "rip")
        vcpu.last_retry_addr = addr
    return zapped
