"""What a vCPU's control registers make of its roles, and which rights its entries then give."""

from __future__ import annotations

from itertools import product

import pytest

from kvm_model.mmu import kvm_mmu as K
from kvm_model.mmu import mmu_internal as I
from tests.kvm_model.machine import Machine

PG, WP, PE = 1 << 31, 1 << 16, 1
PSE, PAE, LA57, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21
LMA, NX = 1 << 10, 1 << 11
AC = 1 << 18


def vcpu_with(cr0: int, cr4: int, efer: int, *, tdp: bool = True, profile: str = "linux-6.18") -> K.KvmMmu:
    m = Machine(profile=profile, slot=False)
    m.kvm.tdp_enabled = tdp
    m.cpu.regs[0] = {"cr0": cr0, "cr4": cr4, "efer": efer}
    K.kvm_init_mmu(m.vcpus[0])
    return m.vcpus[0].mmu


@pytest.mark.parametrize(("cr0", "cr4", "efer", "guest", "shadow"), [
    (PE, 0, 0, 0, 3), (PE | PG, 0, 0, 2, 3), (PE | PG, PSE, 0, 2, 3), (PE | PG, PAE, 0, 3, 3),
    (PE | PG, PAE, LMA, 4, 4), (PE | PG, PAE | LA57, LMA, 5, 5), (PE | PG, PAE | LA57, 0, 3, 3),
])
def test_levels_of_the_guest_and_of_the_shadow_tables(
    cr0: int, cr4: int, efer: int, guest: int, shadow: int
) -> None:
    mmu = vcpu_with(cr0, cr4, efer, tdp=False)
    assert (mmu.guest_level, mmu.root_level) == (guest, shadow)
    assert K.is_cr0_pg(mmu) == (guest > 0)
    assert I.role_direct(mmu.root_role) == (guest == 0)
    assert vcpu_with(cr0, cr4, efer).root_level == 4, "EPT has four levels whatever the guest has"


def test_the_role_under_ept_is_the_vms_own() -> None:
    m = Machine(slot=False)
    K.kvm_init_mmu(m.vcpus[0])
    assert m.vcpus[0].mmu.root_role == m.kvm.root_role


def test_a_shadow_role_prints_as_the_kernels_traces_have_it() -> None:
    role = vcpu_with(PG | WP | PE, PAE, LMA | NX, tdp=False).root_role
    assert I.fmt_mmu_page(0, 1, role, 1, False) == "sp gen 0 gfn 1 l4 8-byte q0 wux nxe ad root 1 sync\0"
    role = vcpu_with(PG | PE, SMEP | SMAP, 0, tdp=False).root_role
    assert role & I.ROLE_4_BYTE_GPTE
    assert role & I.ROLE_EFER_NX, "KVM's own tables have NX"
    assert role & I.ROLE_SMEP_ANDNOT_WP
    assert role & I.ROLE_SMAP_ANDNOT_WP
    role = vcpu_with(PG | WP | PE, SMEP | SMAP, 0, tdp=False).root_role
    assert not role & (I.ROLE_SMEP_ANDNOT_WP | I.ROLE_SMAP_ANDNOT_WP)


def test_5_10_takes_nx_from_the_guest_and_other_bits_with_paging_off() -> None:
    role = vcpu_with(PG | PE, PAE, LMA, tdp=False, profile="linux-5.10").root_role
    assert not role & I.ROLE_EFER_NX
    role = vcpu_with(PE | WP, 0, NX, tdp=False, profile="linux-5.10").root_role
    assert role & I.ROLE_EFER_NX
    assert role & I.ROLE_CR0_WP
    assert role & I.ROLE_DIRECT
    assert I.role_level(role) == 3
    assert vcpu_with(PE | WP, 0, NX, tdp=False).root_role == (
        I.ROLE_DIRECT | I.ROLE_EFER_NX | 7 << I.ROLE_ACCESS_SHIFT | 3
    )


def rights_by_the_manual(cr0: int, cr4: int, efer: int, rflags: int, access: int, pte_access: int) -> bool:
    """SDM 4.6: whether the access is allowed."""
    user, write, fetch = (access & bit for bit in (4, 2, 16))
    user_page, writable, executable = (pte_access & bit for bit in (4, 2, 1))
    if user and not user_page:
        return False
    if fetch:
        return not (efer & NX and not executable) and not (cr4 & SMEP and user_page and not user)
    if not user and user_page and cr4 & SMAP:
        if access & K.PFERR_IMPLICIT_ACCESS or not rflags & AC:
            return False
    return not write or bool(writable) or (not user and not cr0 & WP)


def test_permissions_are_the_manuals_for_every_mode_access_and_page() -> None:
    m = Machine(slot=False)
    m.kvm.tdp_enabled = False
    vcpu = m.vcpus[0]
    count = 0
    for wp, smep, smap, nx in product((0, WP), (0, SMEP), (0, SMAP), (0, NX)):
        for rflags, access, implicit, pte in product(
            (2, 2 | AC), (0, 2, 4, 6, 16, 20), (0, K.PFERR_IMPLICIT_ACCESS), range(8)
        ):
            if implicit and access & 20:
                continue  # the CPU's own accesses are neither fetches nor the user's
            cr0, cr4, efer = PG | PE | wp, PAE | smep | smap, LMA | nx
            m.cpu.regs[0] = {"cr0": cr0, "cr4": cr4, "efer": efer, "rflags": rflags}
            K.kvm_init_mmu(vcpu)
            code = K.permission_fault(vcpu, vcpu.mmu, pte, access | implicit)
            allowed = rights_by_the_manual(cr0, cr4, efer, rflags, access | implicit, pte)
            assert code == (0 if allowed else 1), (hex(cr0), hex(cr4), efer, rflags, access, implicit, pte)
            count += 1
    assert count == 16 * 2 * 8 * (6 + 2)


def test_a_guest_under_ept_may_change_wp_unseen() -> None:
    m = Machine(slot=False)
    vcpu = m.vcpus[0]
    m.cpu.regs[0] = {"cr0": PG | PE | WP, "cr4": PAE, "efer": LMA}
    K.kvm_init_mmu(vcpu)
    assert K.permission_fault(vcpu, vcpu.mmu, 5, 2)
    m.cpu.regs[0]["cr0"] = PG | PE
    assert not K.permission_fault(vcpu, vcpu.mmu, 5, 2)
    assert not K.is_cr0_wp(vcpu.mmu)


def test_5_10_takes_every_supervisor_access_at_cpl_3_for_implicit() -> None:
    for profile, fault in (("linux-6.18", 0), ("linux-5.10", 1)):
        m = Machine(slot=False, profile=profile)
        vcpu = m.vcpus[0]
        m.cpu.regs[0] = {"cr0": PG | PE, "cr4": PAE | SMAP, "efer": LMA, "cs": 0x33, "rflags": 2 | AC}
        K.kvm_init_mmu(vcpu)
        assert K.permission_fault(vcpu, vcpu.mmu, 7, 0) == fault
