"""struct kvm_mmu: how a vCPU's guest pages, which rights its entries give, the key of KVM's own tables.

Source of truth: arch/x86/include/asm/kvm_host.h (kvm_mmu, kvm_cpu_role, rsvd_bits_validate),
arch/x86/kvm/mmu.h (permission_fault), arch/x86/kvm/mmu/mmu.c: kvm_calc_cpu_role,
kvm_calc_tdp_mmu_root_page_role, kvm_init_shadow_mmu, update_permission_bitmask,
__reset_rsvds_bits_mask, kvm_init_mmu; Linux 6.18.

`cpu_role` says what the guest asked for, `root_role` what KVM builds. A cpu_role is the word of a
kvm_mmu_page_role in its low half and the extended bits in its high half:

    63    40 39   38   37   36   35  34  33       32    31                        0
    +-------+----+----+----+----+---+---+--------+-----+---------------------------+
    |       |lma |la57|smep|smap|pke|pse|execonly|valid| role of the root page     |
    +-------+----+----+----+----+---+---+--------+-----+---------------------------+

This CPU's guests have 1G pages, NX and PSE36 and as many address bits as the CPU: CPUID is not asked.

Not modelled: protection keys, nested MMUs, the check of KVM's own entries for reserved bits
(shadow_zero_check), CPUID that changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.mmu_internal import (
    INVALID_PAGE,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    ROLE_4_BYTE_GPTE,
    ROLE_ACCESS_SHIFT,
    ROLE_CR0_WP,
    ROLE_DIRECT,
    ROLE_EFER_NX,
    ROLE_LEVEL_MASK,
    ROLE_SMAP_ANDNOT_WP,
    ROLE_SMEP_ANDNOT_WP,
    ROLE_SMM_SHIFT,
)
from kvm_model.mmu.spte import ACC_ALL, ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK
from kvm_model.vmx.ept import EPT_MAXPHYADDR

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "KVM_MMU_NUM_PREV_ROOTS", "PFERR_IMPLICIT_ACCESS", "PF_VECTOR", "PT32E_ROOT_LEVEL", "PT32_ROOT_LEVEL",
    "PT64_ROOT_4LEVEL", "PT64_ROOT_5LEVEL", "KvmMmu", "X86Exception", "is_cr0_pg", "is_cr0_wp", "is_cr4_la57",
    "is_cr4_pae", "is_cr4_pse", "is_cr4_smap", "is_cr4_smep", "is_efer_lma", "is_efer_nx",
    "is_rsvd_bits_set", "kvm_init_mmu", "permission_fault",
]

PT32_ROOT_LEVEL = 2
PT32E_ROOT_LEVEL = 3
PT64_ROOT_4LEVEL = 4
PT64_ROOT_5LEVEL = 5
KVM_MMU_NUM_PREV_ROOTS = 3
PF_VECTOR = 14
PFERR_IMPLICIT_ACCESS = 1 << 48
"""The CPU itself made the access, to a descriptor table: EFLAGS.AC does not exempt it from SMAP."""

_X86_CR0_WP, _X86_CR0_PG = 1 << 16, 1 << 31
_X86_CR4_PSE, _X86_CR4_PAE, _X86_CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
_X86_CR4_SMEP, _X86_CR4_SMAP = 1 << 20, 1 << 21
_EFER_LMA, _EFER_NX = 1 << 10, 1 << 11
_X86_EFLAGS_AC = 1 << 18

_ROLE_WORD = (1 << 32) - 1
_EXT_VALID = 1 << 32
_EXT_CR4_PSE = 1 << 34
_EXT_CR4_SMAP = 1 << 36
_EXT_CR4_SMEP = 1 << 37
_EXT_CR4_LA57 = 1 << 38
_EXT_EFER_LMA = 1 << 39


class X86Exception:
    """struct x86_exception: what a guest access deserves. `address` is CR2's for a page fault."""

    __slots__ = ("address", "error_code", "error_code_valid", "vector")

    def __init__(self) -> None:
        self.vector = 0
        self.error_code_valid = False
        self.error_code = 0
        self.address = 0

    def assign(self, other: X86Exception) -> None:
        """Become a copy of `other`."""
        self.vector = other.vector
        self.error_code_valid = other.error_code_valid
        self.error_code = other.error_code
        self.address = other.address

    def __repr__(self) -> str:
        return f"<X86Exception {self.vector} error {self.error_code:#x} address {self.address:#x}>"


class KvmMmu:
    """struct kvm_mmu of one vCPU; its present root is `vcpu.root_hpa`.

    `permissions[pfec >> 1]` has bit `pte_access` set where that access to such a page faults.
    `guest_rsvd[bit 7][level - 1]` are the bits that a present entry must not have. `pae_pdptrs`: the guest's
    PDPTE registers, where KVM keeps them (not under EPT). `root_pgd`: the guest CR3 that the root stands for,
    -1: none. `prev_roots`: (pgd, hpa) of roots used before. `pae_root`: the frame of the four entries that
    are the root of a vCPU whose guest is not in 64-bit paging, -1: not allocated.
    """

    __slots__ = (
        "cpu_role", "guest_rsvd", "pae_pdptrs", "pae_root", "permissions", "prev_roots", "root_pgd",
        "root_role",
    )

    def __init__(self) -> None:
        self.cpu_role = 0
        self.root_role = 0
        self.permissions = [0] * 16
        self.guest_rsvd = [[0] * 5, [0] * 5]
        self.pae_pdptrs = [0] * 4
        self.root_pgd = -1
        self.prev_roots = [(-1, INVALID_PAGE)] * KVM_MMU_NUM_PREV_ROOTS
        self.pae_root = -1

    @property
    def guest_level(self) -> int:
        """Level of the guest's root table (2: 32-bit, 3: PAE, 4, 5), 0 with paging off."""
        return self.cpu_role & ROLE_LEVEL_MASK

    @property
    def root_level(self) -> int:
        """Level of KVM's root."""
        return self.root_role & ROLE_LEVEL_MASK


# -- what a role says of the guest; never the registers it was made of, for those have their dependencies --


def is_cr0_pg(mmu: KvmMmu) -> bool:
    """Whether the guest has paging on."""
    return mmu.cpu_role & ROLE_LEVEL_MASK != 0


def is_cr0_wp(mmu: KvmMmu) -> bool:
    """Whether read-only entries bind the supervisor, too."""
    return mmu.cpu_role & ROLE_CR0_WP != 0


def is_cr4_pae(mmu: KvmMmu) -> bool:
    """Whether the guest's entries have 8 bytes."""
    return not mmu.cpu_role & ROLE_4_BYTE_GPTE


def is_cr4_pse(mmu: KvmMmu) -> bool:
    """Whether 32-bit paging has 4M pages."""
    return mmu.cpu_role & _EXT_CR4_PSE != 0


def is_cr4_smep(mmu: KvmMmu) -> bool:
    """Whether the supervisor may not execute user pages."""
    return mmu.cpu_role & _EXT_CR4_SMEP != 0


def is_cr4_smap(mmu: KvmMmu) -> bool:
    """Whether the supervisor may not reach user pages' data."""
    return mmu.cpu_role & _EXT_CR4_SMAP != 0


def is_cr4_la57(mmu: KvmMmu) -> bool:
    """Whether the guest has 5-level paging."""
    return mmu.cpu_role & _EXT_CR4_LA57 != 0


def is_efer_lma(mmu: KvmMmu) -> bool:
    """Whether the guest is in long mode."""
    return mmu.cpu_role & _EXT_EFER_LMA != 0


def is_efer_nx(mmu: KvmMmu) -> bool:
    """Whether the guest's entries may forbid execution."""
    return mmu.cpu_role & ROLE_EFER_NX != 0


# -- rights -------------------------------------------------------------------------------------


def _byte_mask(access: int) -> int:
    """One bit for each set of rights that has one of `access`."""
    return sum(1 << rights for rights in range(8) if rights & access)


_X, _W, _U = _byte_mask(ACC_EXEC_MASK), _byte_mask(ACC_WRITE_MASK), _byte_mask(ACC_USER_MASK)


def _update_permission_bitmask(mmu: KvmMmu) -> None:
    """PFERR_RSVD_MASK in an index says that SMAP does not apply."""
    for byte in range(len(mmu.permissions)):
        pfec = byte << 1
        user = pfec & PFERR_USER_MASK
        fetch = pfec & PFERR_FETCH_MASK
        faults = 0
        if pfec & PFERR_WRITE_MASK and (user or is_cr0_wp(mmu)):
            faults |= ~_W
        if user:
            faults |= ~_U
        if fetch and is_efer_nx(mmu):
            faults |= ~_X
        if not user and fetch and is_cr4_smep(mmu):
            faults |= _U
        if not user and is_cr4_smap(mmu) and not pfec & (PFERR_RSVD_MASK | PFERR_FETCH_MASK):
            faults |= _U
        mmu.permissions[byte] = faults & 0xFF


def permission_fault(vcpu: Vcpu, mmu: KvmMmu, pte_access: int, access: int) -> int:
    """0 if the guest's rights `pte_access` (ACC_*) allow `access` (PFERR_*), else PFERR_PRESENT_MASK."""
    kvm = vcpu.kvm
    if kvm.profile.smap_implicit_by_cpl:
        implicit = kvm.cpu.get_reg(vcpu, "cs") & 3 == 3
    else:
        implicit = access & PFERR_IMPLICIT_ACCESS != 0
    index = (access & (PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK)) >> 1
    if not implicit and kvm.cpu.get_reg(vcpu, "rflags") & _X86_EFLAGS_AC:
        index |= PFERR_RSVD_MASK >> 1
    if kvm.tdp_enabled:
        _refresh_passthrough_bits(vcpu, mmu)
    return PFERR_PRESENT_MASK if mmu.permissions[index] >> pte_access & 1 else 0


def _refresh_passthrough_bits(vcpu: Vcpu, mmu: KvmMmu) -> None:
    # Under EPT the guest owns CR0.WP and changes it without an exit.
    cr0_wp = vcpu.kvm.cpu.get_reg(vcpu, "cr0") & _X86_CR0_WP != 0
    if is_cr0_wp(mmu) == cr0_wp:
        return
    mmu.cpu_role ^= ROLE_CR0_WP
    _reset_guest_paging_metadata(mmu)


# -- reserved bits ------------------------------------------------------------------------------


def _rsvd_bits(low: int, high: int) -> int:
    return (1 << high + 1) - (1 << low)


def is_rsvd_bits_set(mmu: KvmMmu, gpte: int, level: int) -> bool:
    """Whether a present guest entry of a table of `level` has a reserved bit set."""
    return gpte & mmu.guest_rsvd[gpte >> 7 & 1][level - 1] != 0


def _reset_guest_rsvds_bits_mask(mmu: KvmMmu) -> None:
    """Rows [0] for entries with bit 7 clear, [1] for set; columns from level 1 up."""
    level = mmu.guest_level
    if level == PT32_ROOT_LEVEL:
        large = _rsvd_bits(17, 21) if is_cr4_pse(mmu) else 0
        mmu.guest_rsvd = [[0] * 5, [0, large, 0, 0, 0]]
        return
    high = _rsvd_bits(EPT_MAXPHYADDR, 62 if level == PT32E_ROOT_LEVEL else 51)
    if not is_efer_nx(mmu):
        high |= 1 << 63
    large_2m = high | _rsvd_bits(13, 20)
    if level == PT32E_ROOT_LEVEL:
        pdpte = 1 << 63 | high | _rsvd_bits(5, 8) | _rsvd_bits(1, 2)
        mmu.guest_rsvd = [[high, high, pdpte, 0, 0], [high, large_2m, 0, 0, 0]]
        return
    never_large = high | 1 << 7
    top = never_large if level == PT64_ROOT_5LEVEL else 0
    mmu.guest_rsvd = [
        [high, high, high, never_large, top],
        [high, large_2m, high | _rsvd_bits(13, 29), never_large, top],
    ]


def _reset_guest_paging_metadata(mmu: KvmMmu) -> None:
    if is_cr0_pg(mmu):
        _reset_guest_rsvds_bits_mask(mmu)
        _update_permission_bitmask(mmu)


# -- roles --------------------------------------------------------------------------------------


def _kvm_calc_cpu_role(cr0: int, cr4: int, efer: int) -> int:
    role = ACC_ALL << ROLE_ACCESS_SHIFT | _EXT_VALID
    if not cr0 & _X86_CR0_PG:
        return role | ROLE_DIRECT
    wp = cr0 & _X86_CR0_WP
    for bit, is_set in (
        (ROLE_EFER_NX, efer & _EFER_NX), (ROLE_CR0_WP, wp),
        (ROLE_SMEP_ANDNOT_WP, cr4 & _X86_CR4_SMEP and not wp),
        (ROLE_SMAP_ANDNOT_WP, cr4 & _X86_CR4_SMAP and not wp),
        (ROLE_4_BYTE_GPTE, not cr4 & _X86_CR4_PAE),
        (_EXT_CR4_SMEP, cr4 & _X86_CR4_SMEP), (_EXT_CR4_SMAP, cr4 & _X86_CR4_SMAP),
        (_EXT_CR4_PSE, cr4 & _X86_CR4_PSE), (_EXT_EFER_LMA, efer & _EFER_LMA),
        (_EXT_CR4_LA57, efer & _EFER_LMA and cr4 & _X86_CR4_LA57),
    ):
        if is_set:
            role |= bit
    if efer & _EFER_LMA:
        return role | (PT64_ROOT_5LEVEL if cr4 & _X86_CR4_LA57 else PT64_ROOT_4LEVEL)
    return role | (PT32E_ROOT_LEVEL if cr4 & _X86_CR4_PAE else PT32_ROOT_LEVEL)


def _shadow_root_role(vcpu: Vcpu, cpu_role: int, cr0: int, cr4: int, efer: int) -> int:
    """The guest's role, at least of PAE's level, and with NX, which KVM uses for ends of its own."""
    role = cpu_role & _ROLE_WORD
    level = max(role & ROLE_LEVEL_MASK, PT32E_ROOT_LEVEL)
    role = role & ~ROLE_LEVEL_MASK | level
    if vcpu.kvm.profile.shadow_role_forces_nx:
        return role | ROLE_EFER_NX
    if not cr0 & _X86_CR0_PG:
        # The bits of a guest without paging are in its role, too.
        with_paging = _kvm_calc_cpu_role(cr0 | _X86_CR0_PG, cr4, efer & ~_EFER_LMA) & _ROLE_WORD
        role |= with_paging & ~ROLE_LEVEL_MASK
    return role


def kvm_init_mmu(vcpu: Vcpu) -> None:
    """Work out the roles from the vCPU's control registers, and what follows from them for its walks."""
    kvm, mmu = vcpu.kvm, vcpu.mmu
    cr0, cr4, efer = (kvm.cpu.get_reg(vcpu, name) for name in ("cr0", "cr4", "efer"))
    cpu_role = _kvm_calc_cpu_role(cr0, cr4, efer) | vcpu.smm << ROLE_SMM_SHIFT
    if kvm.tdp_enabled:
        root_role = kvm.root_role | vcpu.smm << ROLE_SMM_SHIFT
    else:
        root_role = _shadow_root_role(vcpu, cpu_role, cr0, cr4, efer)
    if cpu_role == mmu.cpu_role and root_role == mmu.root_role:
        return
    mmu.cpu_role = cpu_role
    mmu.root_role = root_role
    _reset_guest_paging_metadata(mmu)
