"""RDMSR and WRMSR that exit: KVM's own registers, and the CPU's.

Source of truth: arch/x86/kvm/x86.c (Linux 6.18): kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_get_msr_common,
kvm_set_msr_common, set_efer.

`KVM_MSRS` is for the paravirtual ones and others that KVM keeps itself; what is not there is the CPU's
(kvm_x86_ops.py: get_msr, set_msr).

Not modelled: MSR filters, user-space MSRs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvm_model.lapic import MSR_IA32_APICBASE
from kvm_model.pv_async_pf import (
    MSR_KVM_ASYNC_PF_ACK,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
    get_async_pf_ack,
    get_async_pf_en,
    get_async_pf_int,
    set_async_pf_ack,
    set_async_pf_en,
    set_async_pf_int,
)
from kvm_model.pvclock import MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW, kvm_write_system_time
from kvm_model.x86_cr import MSR_EFER, set_efer
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu
    from kvm_model.vmx.exits import VmExit

__all__ = ["KVM_MSRS", "TRACEPOINTS", "handle_rdmsr", "handle_wrmsr"]

_MASK64 = (1 << 64) - 1
_GP = 13

KVM_MSR = Tracepoint(
    "kvm", "kvm_msr", ("write", "ecx", "data", "exception"),
    lambda write, ecx, data, exception:
        f"msr_{'write' if write else 'read'} {ecx:x} = 0x{data:x}{' (#GP)' if exception else ''}",
)
TRACEPOINTS = (KVM_MSR,)

Get = Callable[["Vcpu"], int | None]
Set = Callable[["Vcpu", int], bool]


def _get_system_time(vcpu: Vcpu) -> int:
    return vcpu.pv_time.msr


def _set_system_time(vcpu: Vcpu, value: int) -> bool:
    kvm_write_system_time(vcpu, value)
    return True


def _get_apic_base(vcpu: Vcpu) -> int | None:
    return vcpu.kvm.cpu.get_msr(vcpu, MSR_IA32_APICBASE) if vcpu.apic is None else vcpu.apic.base_msr


def _set_apic_base(vcpu: Vcpu, value: int) -> bool:
    if vcpu.apic is None:
        return vcpu.kvm.cpu.set_msr(vcpu, MSR_IA32_APICBASE, value)
    return value == vcpu.apic.base_msr


def _get_efer(vcpu: Vcpu) -> int:
    return vcpu.kvm.cpu.get_reg(vcpu, "efer")


KVM_MSRS: dict[int, tuple[Get, Set]] = {
    MSR_EFER: (_get_efer, set_efer),
    MSR_IA32_APICBASE: (_get_apic_base, _set_apic_base),
    MSR_KVM_ASYNC_PF_EN: (get_async_pf_en, set_async_pf_en),
    MSR_KVM_ASYNC_PF_INT: (get_async_pf_int, set_async_pf_int),
    MSR_KVM_ASYNC_PF_ACK: (get_async_pf_ack, set_async_pf_ack),
    MSR_KVM_SYSTEM_TIME: (_get_system_time, _set_system_time),
    MSR_KVM_SYSTEM_TIME_NEW: (_get_system_time, _set_system_time),
}
"""Index -> (the value or None, whether the write is allowed); the other answer is #GP."""


def handle_rdmsr(vcpu: Vcpu, exit_: VmExit) -> int:
    """kvm_emulate_rdmsr."""
    cpu = vcpu.kvm.cpu
    index = cpu.get_reg(vcpu, "rcx") & 0xFFFF_FFFF
    own = KVM_MSRS.get(index)
    value = cpu.get_msr(vcpu, index) if own is None else own[0](vcpu)
    if (t := vcpu.kvm.trace.kvm_msr) is not None:
        t(0, index, value or 0, value is None)
    if value is None:
        vcpu.queue_exception(_GP, 0)
        return 1
    cpu.set_reg(vcpu, "rax", value & 0xFFFF_FFFF)
    cpu.set_reg(vcpu, "rdx", value >> 32)
    cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    return 1


def handle_wrmsr(vcpu: Vcpu, exit_: VmExit) -> int:
    """kvm_emulate_wrmsr."""
    cpu = vcpu.kvm.cpu
    index = cpu.get_reg(vcpu, "rcx") & 0xFFFF_FFFF
    value = cpu.get_reg(vcpu, "rdx") << 32 & _MASK64 | cpu.get_reg(vcpu, "rax") & 0xFFFF_FFFF
    own = KVM_MSRS.get(index)
    ok = cpu.set_msr(vcpu, index, value) if own is None else own[1](vcpu, value)
    if (t := vcpu.kvm.trace.kvm_msr) is not None:
        t(1, index, value, not ok)
    if ok:
        cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    else:
        vcpu.queue_exception(_GP, 0)
    return 1
