"""System-management mode: a second address space, entered by SMI and left by RSM.

Source of truth: arch/x86/kvm/smm.c (Linux 6.18): kvm_smm_changed, process_smi, enter_smm, emulator_leave_smm;
smm.h: kvm_inject_smi; x86.c: handle_ud, kvm_vcpu_ioctl_smi; vmx.c: vmx_smi_allowed. In 5.10 all of it is in
x86.c and emulate.c.

In SMM a vCPU uses the memslots of address space 1 and roots of its own (role.smm), so that SMRAM is memory
that nobody else sees. KVM writes the interrupted state to SMRAM and puts the vCPU into 16-bit code at
smbase + 0x8000; RSM is an invalid opcode to the CPU, intercepted, and emulated.

Not modelled: SMM while NMIs are blocked, I/O restart, an SMI in a nested guest, the 32-bit save area.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.guest_access import kvm_vcpu_read_guest, kvm_vcpu_write_guest
from kvm_model.mmu.mmu_roots import kvm_mmu_reset_context
from kvm_model.requests import (
    KVM_REQ_EVENT,
    KVM_REQ_SMI,
    KVM_REQ_TRIPLE_FAULT,
    KVM_REQ_VM_DEAD,
    kvm_make_all_cpus_request,
    kvm_make_request,
    kvm_vcpu_kick,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "SMRAM_SIZE", "TRACEPOINTS", "emulator_leave_smm", "enter_smm", "kvm_inject_smi", "process_smi",
]

SMRAM_SIZE = 512
_STATE_AT = 0xFE00

KVM_SMM_TRANSITION = Tracepoint(
    "kvm", "kvm_smm_transition", ("vcpu_id", "smbase", "entering"),
    lambda vcpu_id, smbase, entering:
        f"vcpu {vcpu_id}: {'entering' if entering else 'leaving'} SMM, smbase 0x{smbase:x}",
)
TRACEPOINTS = (KVM_SMM_TRANSITION,)


def kvm_inject_smi(vcpu: Vcpu) -> None:
    """KVM_SMI, or the SMI of a chipset: the vCPU takes it before its next instruction outside SMM."""
    kvm_make_request(KVM_REQ_SMI, vcpu)
    kvm_vcpu_kick(vcpu)


def process_smi(vcpu: Vcpu) -> None:
    """KVM_REQ_SMI."""
    vcpu.smi_pending = True
    kvm_make_request(KVM_REQ_EVENT, vcpu)


def _kvm_smm_changed(vcpu: Vcpu, entering: bool) -> None:
    if (t := vcpu.kvm.trace.kvm_smm_transition) is not None:
        t(vcpu.vcpu_id, vcpu.smbase, entering)
    vcpu.smm = entering
    if not entering:
        # An SMI that came meanwhile.
        kvm_make_request(KVM_REQ_EVENT, vcpu)
    kvm_mmu_reset_context(vcpu)


def enter_smm(vcpu: Vcpu) -> None:
    """Save the state to SMRAM and begin at smbase + 0x8000; without SMRAM the VM is dead."""
    cpu = vcpu.kvm.cpu
    image = cpu.smm_save_state(vcpu, vcpu.smbase)
    _kvm_smm_changed(vcpu, True)
    try:
        kvm_vcpu_write_guest(vcpu, vcpu.smbase + _STATE_AT, image)
    except KernelError:
        kvm_make_all_cpus_request(vcpu.kvm, KVM_REQ_VM_DEAD)
        return
    cpu.smm_enter(vcpu, vcpu.smbase)
    kvm_mmu_reset_context(vcpu)


def emulator_leave_smm(vcpu: Vcpu) -> bool:
    """RSM in SMM. False: SMRAM cannot be read, the instruction cannot be emulated."""
    try:
        image = kvm_vcpu_read_guest(vcpu, vcpu.smbase + _STATE_AT, SMRAM_SIZE)
    except KernelError:
        return False
    _kvm_smm_changed(vcpu, False)
    smbase = vcpu.kvm.cpu.rsm_load_state(vcpu, image)
    if smbase < 0:
        kvm_make_request(KVM_REQ_TRIPLE_FAULT, vcpu)
        return True
    vcpu.smbase = smbase
    kvm_mmu_reset_context(vcpu)
    return True
