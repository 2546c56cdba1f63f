"""Injecting events: exceptions, NMIs and interrupts, new or cut off, in the kernel's order.

Source of truth: arch/x86/kvm/x86.c (Linux 6.18): kvm_check_and_inject_events, kvm_inject_exception;
vmx/vmx.c: vmx_inject_exception, vmx_inject_irq, vmx_inject_nmi, __vmx_complete_interrupts,
vmx_cancel_injection.

An event whose delivery a VM exit cut off comes back in the IDT-vectoring information and is injected
again before anything new.

Not modelled: #DB payloads, NMI blocking until IRET (virtual NMIs), nested events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.requests import KVM_REQ_EVENT, kvm_make_request
from kvm_model.smm import enter_smm
from kvm_model.vmx.exits import (
    INTR_INFO_DELIVER_CODE,
    INTR_INFO_VALID,
    INTR_TYPE_EXT_INTR,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_NMI,
    INTR_TYPE_SOFT_EXCEPTION,
    INTR_TYPE_SOFT_INTR,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "TRACEPOINTS", "kvm_check_and_inject_events", "vmx_cancel_injection", "vmx_complete_interrupts",
]

_TYPE_MASK = 7 << 8
_FAULTS_RF = frozenset((0, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 19, 20, 21))
_RFLAGS_RF = 1 << 16
_SOFT_VECTORS = (3, 4)
_NAMES = {
    0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE", 21: "#CP",
    28: "#HV", 29: "#VC", 30: "#SX",
}


def _fmt_exception(vector: int, has_error: bool, error_code: int, reinjected: bool) -> str:
    name = _NAMES.get(vector, f"{vector:#x}")
    error = f" ({error_code:#x})" if has_error else ""
    return f"{name}{error}{' [reinjected]' if reinjected else ''}"


KVM_INJ_EXCEPTION = Tracepoint(
    "kvm", "kvm_inj_exception", ("exception", "has_error", "error_code", "reinjected"), _fmt_exception
)
KVM_INJ_VIRQ = Tracepoint(
    "kvm", "kvm_inj_virq", ("vector", "soft", "reinjected"),
    lambda vector, soft, reinjected:
        f"{'Soft/INTn' if soft else 'IRQ'} {vector:#x}{' [reinjected]' if reinjected else ''}",
)
TRACEPOINTS = (KVM_INJ_EXCEPTION, KVM_INJ_VIRQ)


def _inject_exception(vcpu: Vcpu) -> None:
    ex = vcpu.exception
    if (t := vcpu.kvm.trace.kvm_inj_exception) is not None:
        t(ex.vector, ex.has_error_code, ex.error_code, ex.injected)
    info = ex.vector | INTR_INFO_VALID
    if ex.has_error_code:
        vcpu.entry_error_code = ex.error_code & 0xFFFF
        info |= INTR_INFO_DELIVER_CODE
    if ex.vector in _SOFT_VECTORS:
        vcpu.entry_insn_len = vcpu.event_exit_inst_len
        info |= INTR_TYPE_SOFT_EXCEPTION
    else:
        info |= INTR_TYPE_HARD_EXCEPTION
    vcpu.entry_intr_info = info


def _inject_irq(vcpu: Vcpu, reinjected: bool) -> None:
    if (t := vcpu.kvm.trace.kvm_inj_virq) is not None:
        t(vcpu.interrupt_nr, vcpu.interrupt_soft, reinjected)
    vcpu.stat["irq_injections"] += 1
    info = vcpu.interrupt_nr | INTR_INFO_VALID
    if vcpu.interrupt_soft:
        vcpu.entry_insn_len = vcpu.event_exit_inst_len
        info |= INTR_TYPE_SOFT_INTR
    else:
        info |= INTR_TYPE_EXT_INTR
    vcpu.entry_intr_info = info


def _inject_nmi(vcpu: Vcpu) -> None:
    vcpu.stat["nmi_injections"] += 1
    vcpu.entry_intr_info = 2 | INTR_INFO_VALID | INTR_TYPE_NMI


def kvm_check_and_inject_events(vcpu: Vcpu) -> bool:
    """Fill the VM-entry event fields; true if another event waits and the entry must exit at once."""
    ex = vcpu.exception
    if ex.injected:
        _inject_exception(vcpu)
    elif ex.pending:
        pass
    elif vcpu.nmi_injected:
        _inject_nmi(vcpu)
    elif vcpu.interrupt_injected:
        _inject_irq(vcpu, True)
    can_inject = not (ex.injected or vcpu.interrupt_injected or vcpu.nmi_injected)
    if ex.pending:
        if ex.vector in _FAULTS_RF:
            cpu = vcpu.kvm.cpu
            cpu.set_reg(vcpu, "rflags", cpu.get_reg(vcpu, "rflags") | _RFLAGS_RF)
        _inject_exception(vcpu)
        ex.pending = False
        ex.injected = True
        can_inject = False
    if vcpu.smi_pending:
        if not can_inject:
            return True
        if not vcpu.smm:
            vcpu.smi_pending = False
            enter_smm(vcpu)
            can_inject = False
    # NMIs are blocked in SMM.
    if vcpu.nmi_pending and not vcpu.smm:
        if not can_inject:
            return True
        vcpu.nmi_pending -= 1
        vcpu.nmi_injected = True
        _inject_nmi(vcpu)
        can_inject = False
    return _inject_new_irq(vcpu, can_inject)


def _inject_new_irq(vcpu: Vcpu, can_inject: bool) -> bool:
    if not vcpu.has_interrupt():
        return False
    if not can_inject:
        return True
    if vcpu.kvm.cpu.interrupt_allowed(vcpu):
        vcpu.interrupt_nr = vcpu.ack_interrupt()
        vcpu.interrupt_soft = False
        vcpu.interrupt_injected = True
        _inject_irq(vcpu, False)
    if vcpu.has_interrupt():
        vcpu.irq_window = True
    return False


def vmx_complete_interrupts(vcpu: Vcpu, info: int, insn_len: int, error_code: int) -> None:
    """After an exit: what was being delivered was delivered, unless `info` says it was cut off."""
    ex = vcpu.exception
    vcpu.nmi_injected = False
    ex.pending = False
    ex.injected = False
    vcpu.interrupt_injected = False
    if not info & INTR_INFO_VALID:
        return
    kvm_make_request(KVM_REQ_EVENT, vcpu)
    vector = info & 0xFF
    kind = info & _TYPE_MASK
    if kind in (INTR_TYPE_SOFT_EXCEPTION, INTR_TYPE_SOFT_INTR):
        vcpu.event_exit_inst_len = insn_len
    if kind == INTR_TYPE_NMI:
        vcpu.nmi_injected = True
    elif kind in (INTR_TYPE_HARD_EXCEPTION, INTR_TYPE_SOFT_EXCEPTION):
        ex.injected = True
        ex.vector = vector
        ex.has_error_code = info & INTR_INFO_DELIVER_CODE != 0
        ex.error_code = error_code if ex.has_error_code else 0
    elif kind in (INTR_TYPE_SOFT_INTR, INTR_TYPE_EXT_INTR):
        vcpu.interrupt_injected = True
        vcpu.interrupt_nr = vector
        vcpu.interrupt_soft = kind == INTR_TYPE_SOFT_INTR


def vmx_cancel_injection(vcpu: Vcpu) -> None:
    """The entry did not happen: put what it would have injected back into the queue."""
    vmx_complete_interrupts(vcpu, vcpu.entry_intr_info, vcpu.entry_insn_len, vcpu.entry_error_code)
    vcpu.entry_intr_info = 0
