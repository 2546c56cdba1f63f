"""The guest's control registers and EFER: what may be loaded, and what that does to KVM's tables.

Source of truth: arch/x86/kvm/x86.c (Linux 6.18): kvm_set_cr0, kvm_post_set_cr0, kvm_lmsw, kvm_set_cr3,
kvm_invalidate_pcid, kvm_set_cr4, kvm_post_set_cr4, __kvm_is_valid_cr4, set_efer, load_pdptrs,
__set_sregs; x86.h: __cr4_reserved_bits; kvm_cache_regs.h: KVM_POSSIBLE_*_GUEST_BITS; vmx/vmx.c:
set_cr4_guest_host_mask, vmx_l1_guest_owned_cr0_bits.

Under EPT the CPU loads these without an exit, so that only `kvm_set_sregs` and EFER come by here. The setters
return false for what deserves a #GP and then change nothing.

Not modelled: CR8; PCIDs and LAM, for which the guest's CPUID has no bits (setting them is #GP).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.async_pf import kvm_clear_async_pf_completion_queue
from kvm_model.guest_access import kvm_vcpu_read_guest
from kvm_model.mmu.kvm_mmu import kvm_init_mmu
from kvm_model.mmu.mmu_roots import kvm_mmu_reset_context
from kvm_model.mmu.shadow_roots import kvm_mmu_free_shadow_roots, kvm_mmu_new_pgd
from kvm_model.requests import (
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_TLB_FLUSH_CURRENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    kvm_make_request,
)
from kvm_model.vmx.ept import EPT_MAXPHYADDR

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "CR0_GUEST_OWNED", "CR4_GUEST_OWNED", "MSR_EFER", "kvm_lmsw", "kvm_set_cr0", "kvm_set_cr3", "kvm_set_cr4",
    "kvm_set_sregs", "load_pdptrs", "set_efer",
]

MSR_EFER = 0xC0000080


def _bits(*numbers: int) -> int:
    return sum(1 << n for n in numbers)


_CR0_PE, _CR0_ET, _CR0_WP, _CR0_NW, _CR0_CD, _CR0_PG = (1 << n for n in (0, 4, 16, 29, 30, 31))
_CR0_KNOWN = _bits(0, 1, 2, 3, 4, 5, 16, 18, 29, 30, 31)
_CR0_PDPTR_BITS = _CR0_CD | _CR0_NW | _CR0_PG
_CR0_ROLE_BITS = _CR0_PG | _CR0_WP
_CR4_PSE, _CR4_PAE, _CR4_PGE, _CR4_LA57, _CR4_SMEP, _CR4_SMAP = (1 << n for n in (4, 5, 7, 12, 20, 21))
_CR4_KNOWN = _bits(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
_CR4_BY_CPUID = (
    (1, 0, 2, 26, 18), (7, 0, 1, 0, 16), (7, 0, 1, 7, 20), (7, 0, 1, 20, 21), (7, 0, 2, 2, 11),
    (7, 0, 2, 16, 12),
)
"""(leaf, subleaf, index of EAX.., bit) that gives a guest (CR4 bit): OSXSAVE, FSGSBASE, SMEP, SMAP, UMIP,
LA57."""
_CR4_PDPTR_BITS = _CR4_PGE | _CR4_PSE | _CR4_PAE | _CR4_SMEP
_CR4_ROLE_BITS = _CR4_PSE | _CR4_PAE | _CR4_LA57 | _CR4_SMEP | _CR4_SMAP
_EFER_LME, _EFER_LMA, _EFER_NX = (1 << n for n in (8, 10, 11))
_EFER_ROLE_BITS = _EFER_LME | _EFER_NX
_CS_L = 1 << 21
_PDPTE_PRESENT = 1
_M64 = (1 << 64) - 1
_ABOVE_MAXPHYADDR = _M64 & ~((1 << EPT_MAXPHYADDR) - 1)
_PDPTE_RESERVED = _ABOVE_MAXPHYADDR | _bits(1, 2, 5, 6, 7, 8)

CR0_GUEST_OWNED = _bits(3)
"""TS: what a guest without EPT may write without an exit (vmx_l1_guest_owned_cr0_bits)."""
CR4_GUEST_OWNED = _bits(1, 2, 3, 8, 9, 10, 16)
"""PVI TSD DE PCE OSFXSR OSXMMEXCPT FSGSBASE (set_cr4_guest_host_mask, without enable_ept)."""


def _is_paging(vcpu: Vcpu) -> bool:
    return vcpu.kvm.cpu.get_reg(vcpu, "cr0") & _CR0_PG != 0


def _is_long_mode(vcpu: Vcpu) -> bool:
    return vcpu.kvm.cpu.get_reg(vcpu, "efer") & _EFER_LMA != 0


def _is_pae_paging(vcpu: Vcpu) -> bool:
    pae = vcpu.kvm.cpu.get_reg(vcpu, "cr4") & _CR4_PAE != 0
    return pae and not _is_long_mode(vcpu) and _is_paging(vcpu)


def load_pdptrs(vcpu: Vcpu, cr3: int) -> bool:
    """Load the PDPTE registers from where `cr3` says; false if they cannot be had or a present one is bad."""
    kvm, mmu = vcpu.kvm, vcpu.mmu
    try:
        data = kvm_vcpu_read_guest(vcpu, cr3 & 0xFFFF_FFE0, 32)
    except KernelError:
        return False
    pdptes = [int.from_bytes(data[n : n + 8], "little") for n in range(0, 32, 8)]
    if any(pdpte & _PDPTE_PRESENT and pdpte & _PDPTE_RESERVED for pdpte in pdptes):
        return False
    if not kvm.tdp_enabled and pdptes != mmu.pae_pdptrs:
        # The roots stand for what the registers held.
        kvm_mmu_free_shadow_roots(vcpu, current=True)
    mmu.pae_pdptrs = pdptes
    kvm_make_request(KVM_REQ_LOAD_MMU_PGD, vcpu)
    return True


# -- CR0 ----------------------------------------------------------------------------------------


def _post_set_cr0(vcpu: Vcpu, old: int, cr0: int) -> None:
    changed = cr0 ^ old
    if changed == _CR0_WP:
        if not cr0 & _CR0_PG:
            return
        if vcpu.kvm.tdp_enabled:
            kvm_init_mmu(vcpu)
            return
    if changed & _CR0_PG:
        kvm_clear_async_pf_completion_queue(vcpu)
        vcpu.apf.gfns.clear()
        if not cr0 & _CR0_PG:
            kvm_make_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu)
    if changed & _CR0_ROLE_BITS:
        kvm_mmu_reset_context(vcpu)


def _may_switch_paging(vcpu: Vcpu, old: int, cr0: int) -> bool:
    """What depends on other registers: long mode's rules, the PDPTEs."""
    cpu = vcpu.kvm.cpu
    efer, cr4 = cpu.get_reg(vcpu, "efer"), cpu.get_reg(vcpu, "cr4")
    code_is_long = cpu.get_reg(vcpu, "cs_flags") & _CS_L != 0
    if not cr0 & _CR0_PG:
        return not (efer & _EFER_LMA and code_is_long)
    if efer & _EFER_LME:
        return bool(old & _CR0_PG or (cr4 & _CR4_PAE and not code_is_long))
    if not cr4 & _CR4_PAE or not (cr0 ^ old) & _CR0_PDPTR_BITS:
        return True
    return load_pdptrs(vcpu, cpu.get_reg(vcpu, "cr3"))


def kvm_set_cr0(vcpu: Vcpu, cr0: int) -> bool:
    """MOV to CR0."""
    cpu = vcpu.kvm.cpu
    old = cpu.get_reg(vcpu, "cr0")
    if cr0 >> 32 or (cr0 & _CR0_NW and not cr0 & _CR0_CD) or (cr0 & _CR0_PG and not cr0 & _CR0_PE):
        return False
    cr0 = (cr0 | _CR0_ET) & _CR0_KNOWN
    if not _may_switch_paging(vcpu, old, cr0):
        return False
    cpu.set_reg(vcpu, "cr0", cr0)
    _post_set_cr0(vcpu, old, cr0)
    return True


def kvm_lmsw(vcpu: Vcpu, msw: int) -> None:
    """LMSW: sets PE and never clears it, whatever `msw` says."""
    kvm_set_cr0(vcpu, vcpu.kvm.cpu.get_reg(vcpu, "cr0") & ~0xE | msw & 0xF)


# -- CR3 ----------------------------------------------------------------------------------------


def kvm_set_cr3(vcpu: Vcpu, cr3: int) -> bool:
    """MOV to CR3: the root of another address space, and a flush of what is not global."""
    kvm, cpu = vcpu.kvm, vcpu.kvm.cpu
    old = cpu.get_reg(vcpu, "cr3")
    pae = _is_pae_paging(vcpu)
    if cr3 != old or pae:
        if cr3 & _ABOVE_MAXPHYADDR or (pae and not load_pdptrs(vcpu, cr3)):
            return False
        if cr3 != old:
            kvm_mmu_new_pgd(vcpu, cr3)
        cpu.set_reg(vcpu, "cr3", cr3)
    if kvm.tdp_enabled:
        kvm_make_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu)
    else:
        kvm_make_request(KVM_REQ_MMU_SYNC, vcpu)
        kvm_make_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu)
    return True


# -- CR4 and EFER -------------------------------------------------------------------------------


def _cr4_reserved_bits(vcpu: Vcpu) -> int:
    known = _CR4_KNOWN
    for leaf, subleaf, register, bit, cr4_bit in _CR4_BY_CPUID:
        if vcpu.kvm.cpu.cpuid(vcpu, leaf, subleaf)[register] >> bit & 1:
            known |= 1 << cr4_bit
    return ~known


def _post_set_cr4(vcpu: Vcpu, old: int, cr4: int) -> None:
    changed = cr4 ^ old
    if changed & _CR4_ROLE_BITS:
        kvm_mmu_reset_context(vcpu)
    if changed & _CR4_PGE:
        kvm_make_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu)
    elif changed & _CR4_PAE or (cr4 & _CR4_SMEP and not old & _CR4_SMEP):
        kvm_make_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu)


def kvm_set_cr4(vcpu: Vcpu, cr4: int) -> bool:
    """MOV to CR4."""
    cpu = vcpu.kvm.cpu
    old = cpu.get_reg(vcpu, "cr4")
    if cr4 & _cr4_reserved_bits(vcpu):
        return False
    if _is_long_mode(vcpu):
        if not cr4 & _CR4_PAE or (cr4 ^ old) & _CR4_LA57:
            return False
    elif _is_paging(vcpu) and cr4 & _CR4_PAE and (cr4 ^ old) & _CR4_PDPTR_BITS:
        if not load_pdptrs(vcpu, cpu.get_reg(vcpu, "cr3")):
            return False
    cpu.set_reg(vcpu, "cr4", cr4)
    _post_set_cr4(vcpu, old, cr4)
    return True


def set_efer(vcpu: Vcpu, efer: int) -> bool:
    """WRMSR of EFER."""
    cpu = vcpu.kvm.cpu
    old = cpu.get_reg(vcpu, "efer")
    if not cpu.set_msr(vcpu, MSR_EFER, efer):
        return False
    if (cpu.get_reg(vcpu, "efer") ^ old) & _EFER_ROLE_BITS:
        kvm_mmu_reset_context(vcpu)
    return True


def kvm_set_sregs(vcpu: Vcpu) -> None:
    """KVM_SET_SREGS: user space has given the vCPU other control registers."""
    if _is_pae_paging(vcpu):
        load_pdptrs(vcpu, vcpu.kvm.cpu.get_reg(vcpu, "cr3"))
    kvm_mmu_reset_context(vcpu)
    kvm_make_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu)
