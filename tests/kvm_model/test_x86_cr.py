"""kvm_model/x86_cr.py: what a guest without EPT may load into its control registers, what KVM then drops."""

from __future__ import annotations

import pytest

from kvm_model import x86_cr
from kvm_model.mmu.mmu_internal import INVALID_PAGE
from kvm_model.requests import (
    KVM_REQ_MMU_SYNC,
    KVM_REQ_TLB_FLUSH_CURRENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    KVM_REQ_TRIPLE_FAULT,
    kvm_test_request,
)
from kvm_model.vcpu import Vcpu
from tests.kvm_model.shadow_machine import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_SMEP,
    DATA_GPA,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    PML4_GPA,
    P,
    ShadowMachine,
)

CR0 = CR0_PG | CR0_WP | CR0_PE
CR4_PSE = 1 << 4
PDPT_AT = DATA_GPA + 0x1020
_ALL_FEATURES = (1 << 32) - 1


@pytest.fixture
def m() -> ShadowMachine:
    """In long mode, with a root, nothing asked for."""
    machine = ShadowMachine()
    machine.cpu.cpuid = lambda vcpu, leaf, subleaf: (0, _ALL_FEATURES, 1 << 16, 0)  # type: ignore[method-assign]
    machine.run(("r", DATA_GPA))
    machine.vcpus[0].requests = 0
    return machine


def call(m: ShadowMachine, setter: object, *args: int) -> object:
    """Its answer, as from an exit handler."""
    out: list[object] = []
    m.run(("call", lambda: out.append(setter(m.vcpus[0], *args))))  # type: ignore[operator]
    return out[0]


def asked(vcpu: Vcpu, *requests: int) -> bool:
    return all(kvm_test_request(request, vcpu) for request in requests)


@pytest.mark.parametrize("value", [
    CR0 | 1 << 32, CR0 | 1 << 29, CR0_PG | CR0_WP,
])
def test_an_impossible_cr0_changes_nothing(m: ShadowMachine, value: int) -> None:
    root = m.vcpus[0].root_hpa
    assert call(m, x86_cr.kvm_set_cr0, value) is False
    assert m.cpu.reg(m.vcpus[0], "cr0") == CR0
    assert m.vcpus[0].root_hpa == root


def test_64_bit_code_cannot_leave_paging_and_32_bit_code_can(m: ShadowMachine) -> None:
    m.cpu.regs[0]["cs_flags"] = 1 << 21
    assert call(m, x86_cr.kvm_set_cr0, CR0_PE) is False
    m.cpu.regs[0]["cs_flags"] = 0
    assert call(m, x86_cr.kvm_set_cr0, CR0_PE) is True
    assert asked(m.vcpus[0], KVM_REQ_TLB_FLUSH_GUEST)
    assert m.vcpus[0].root_hpa == INVALID_PAGE


def test_switching_paging_forgets_asynchronous_page_faults(m: ShadowMachine) -> None:
    m.vcpus[0].apf.gfns.append(5)
    assert call(m, x86_cr.kvm_set_cr0, CR0 & ~CR0_WP) is True
    assert m.vcpus[0].apf.gfns == [5]
    assert call(m, x86_cr.kvm_set_cr0, CR0_PE) is True
    assert m.vcpus[0].apf.gfns == []


def test_write_protection_is_part_of_the_role(m: ShadowMachine) -> None:
    vcpu = m.vcpus[0]
    role = vcpu.mmu.root_role
    assert call(m, x86_cr.kvm_set_cr0, CR0 & ~CR0_WP) is True
    assert vcpu.root_hpa == INVALID_PAGE
    assert vcpu.mmu.root_role != role


def test_the_fpu_bit_leaves_the_root(m: ShadowMachine) -> None:
    vcpu = m.vcpus[0]
    root = vcpu.root_hpa
    assert call(m, x86_cr.kvm_set_cr0, CR0 | 1 << 3) is True
    assert vcpu.root_hpa == root
    assert m.cpu.reg(vcpu, "cr0") == CR0 | 1 << 3 | 1 << 4


def test_lmsw_sets_protection_and_never_clears_it(m: ShadowMachine) -> None:
    call(m, x86_cr.kvm_lmsw, 0xE)
    assert m.cpu.reg(m.vcpus[0], "cr0") & 0xF == 0xF


def test_a_new_address_space_keeps_the_root_of_the_old_one(m: ShadowMachine) -> None:
    vcpu = m.vcpus[0]
    root = vcpu.root_hpa
    assert call(m, x86_cr.kvm_set_cr3, DATA_GPA) is True
    assert vcpu.root_hpa == INVALID_PAGE
    assert vcpu.mmu.prev_roots[0] == (PML4_GPA, root)
    assert asked(vcpu, KVM_REQ_MMU_SYNC, KVM_REQ_TLB_FLUSH_CURRENT)
    assert call(m, x86_cr.kvm_set_cr3, PML4_GPA) is True
    assert vcpu.root_hpa == root


def test_the_same_cr3_again_only_flushes(m: ShadowMachine) -> None:
    vcpu = m.vcpus[0]
    root = vcpu.root_hpa
    assert call(m, x86_cr.kvm_set_cr3, PML4_GPA) is True
    assert vcpu.root_hpa == root
    assert asked(vcpu, KVM_REQ_MMU_SYNC, KVM_REQ_TLB_FLUSH_CURRENT)


def test_a_cr3_beyond_the_cpus_addresses_is_refused(m: ShadowMachine) -> None:
    assert call(m, x86_cr.kvm_set_cr3, 1 << 46) is False
    assert m.cpu.reg(m.vcpus[0], "cr3") == PML4_GPA


@pytest.mark.parametrize("value", [CR4_PAE | 1 << 13, CR4_PAE | 1 << 17, 0, CR4_PAE | 1 << 12])
def test_an_impossible_cr4_changes_nothing(m: ShadowMachine, value: int) -> None:
    assert call(m, x86_cr.kvm_set_cr4, value) is False
    assert m.cpu.reg(m.vcpus[0], "cr4") == CR4_PAE


def test_what_the_guests_cpuid_lacks_cannot_be_set_in_cr4(m: ShadowMachine) -> None:
    assert call(m, x86_cr.kvm_set_cr4, CR4_PAE | CR4_SMEP) is True
    m.cpu.cpuid = lambda vcpu, leaf, subleaf: (0, 0, 0, 0)  # type: ignore[method-assign]
    assert call(m, x86_cr.kvm_set_cr4, CR4_PAE | CR4_SMEP) is False


def test_global_pages_flush_all_and_smep_begins_anew(m: ShadowMachine) -> None:
    vcpu = m.vcpus[0]
    root = vcpu.root_hpa
    assert call(m, x86_cr.kvm_set_cr4, CR4_PAE | CR4_PGE) is True
    assert asked(vcpu, KVM_REQ_TLB_FLUSH_GUEST)
    assert vcpu.root_hpa == root
    vcpu.requests = 0
    assert call(m, x86_cr.kvm_set_cr4, CR4_PAE | CR4_PGE | CR4_SMEP) is True
    assert asked(vcpu, KVM_REQ_TLB_FLUSH_CURRENT)
    assert vcpu.root_hpa == INVALID_PAGE


def test_no_execute_is_part_of_the_role(m: ShadowMachine) -> None:
    efer = EFER_LME | EFER_LMA
    m.cpu.set_msr = lambda vcpu, index, value: (  # type: ignore[method-assign]
        m.cpu.set_reg(vcpu, "efer", value) is None
    )
    root = m.vcpus[0].root_hpa
    assert call(m, x86_cr.set_efer, efer | 1) is True
    assert m.vcpus[0].root_hpa == root
    assert call(m, x86_cr.set_efer, efer | EFER_NX) is True
    assert m.vcpus[0].root_hpa == INVALID_PAGE


def into_pae(m: ShadowMachine) -> None:
    """32-bit code with PAE paging, its PDPTEs at PDPT_AT."""
    for n in range(4):
        m.host_write(PDPT_AT + 8 * n, DATA_GPA + (2 + n << 12) | P)
    m.cpu.regs[0].update({"efer": 0, "cs_flags": 0, "cr3": PDPT_AT})
    call(m, x86_cr.kvm_set_sregs)


def test_pdptes_are_registers_loaded_with_cr3(m: ShadowMachine) -> None:
    vcpu = m.vcpus[0]

    def set_sregs(vcpu: Vcpu) -> None:
        x86_cr.kvm_set_sregs(vcpu)

    for n in range(4):
        m.host_write(PDPT_AT + 8 * n, DATA_GPA + (2 + n << 12) | P)
    m.cpu.regs[0].update({"efer": 0, "cs_flags": 0, "cr3": PDPT_AT})
    call(m, set_sregs)
    assert vcpu.mmu.pae_pdptrs == [DATA_GPA + (2 + n << 12) | P for n in range(4)]
    m.host_write(PDPT_AT, DATA_GPA + 0x9000 | P)
    assert vcpu.mmu.pae_pdptrs[0] == DATA_GPA + 0x2000 | P
    assert call(m, x86_cr.kvm_set_cr3, PDPT_AT) is True
    assert vcpu.mmu.pae_pdptrs[0] == DATA_GPA + 0x9000 | P
    m.host_write(PDPT_AT + 8, DATA_GPA + 0x3000 | P | 2)
    assert call(m, x86_cr.kvm_set_cr3, PDPT_AT) is False
    assert vcpu.mmu.pae_pdptrs[1] == DATA_GPA + 0x3000 | P


def test_other_pdptes_end_the_root_that_stood_for_them(m: ShadowMachine) -> None:
    into_pae(m)
    vcpu = m.vcpus[0]
    m.run(("r", 0x1000))
    assert vcpu.root_hpa == vcpu.mmu.pae_root << 12
    m.host_write(PDPT_AT + 24, 0)
    assert call(m, x86_cr.load_pdptrs, PDPT_AT) is True
    assert vcpu.root_hpa == INVALID_PAGE


def test_pdptes_without_memory_are_refused(m: ShadowMachine) -> None:
    assert call(m, x86_cr.load_pdptrs, 0x7000_0000) is False


# -- what two exceptions make ---------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second", "queued"), [
    (14, 14, (8, 0)), (14, 13, (8, 0)), (13, 11, (8, 0)), (13, 14, (14, 2)), (6, 14, (14, 2)),
    (14, 6, (6, 2)),
])
def test_an_exception_upon_another(
    m: ShadowMachine, first: int, second: int, queued: tuple[int, int]
) -> None:
    vcpu = m.vcpus[0]
    vcpu.exception.injected = True
    vcpu.exception.vector = first
    vcpu.queue_exception(second, 2)
    assert (vcpu.exception.vector, vcpu.exception.error_code) == queued
    assert vcpu.exception.pending
    assert not vcpu.exception.injected


def test_an_exception_upon_a_double_fault_is_the_end(m: ShadowMachine) -> None:
    vcpu = m.vcpus[0]
    vcpu.exception.injected = True
    vcpu.exception.vector = 8
    vcpu.queue_exception(14, 2)
    assert asked(vcpu, KVM_REQ_TRIPLE_FAULT)
    assert not vcpu.exception.pending
