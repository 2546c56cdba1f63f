"""Requests to vCPUs, kicks, and the remote TLB flush.

Source of truth: include/linux/kvm_host.h (KVM_REQUEST_*), arch/x86/include/asm/kvm_host.h
(KVM_REQ_*), virt/kvm/kvm_main.c: kvm_make_vcpu_request, kvm_make_all_cpus_request,
kvm_flush_remote_tlbs, kvm_vcpu_kick, kvm_vcpu_wake_up; Linux 6.18.

A kick is an IPI. The CPU that runs a vCPU leaves guest mode before its next guest instruction, so
an IPI that is waited for is complete as soon as it is sent: the vCPU's mode becomes
EXITING_GUEST_MODE and its CPU model may not run another instruction.

Not modelled: READING_SHADOW_PAGE_TABLES (walkers without mmu_lock use RCU), Hyper-V's and range flushes,
preemption-aware wake-ups, halt polling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "EXITING_GUEST_MODE",
    "IN_GUEST_MODE",
    "KVM_REQUEST_NO_WAKEUP",
    "KVM_REQUEST_WAIT",
    "KVM_REQ_APF_HALT",
    "KVM_REQ_APF_READY",
    "KVM_REQ_APIC_PAGE_RELOAD",
    "KVM_REQ_CLOCK_UPDATE",
    "KVM_REQ_DIRTY_RING_SOFT_FULL",
    "KVM_REQ_EVENT",
    "KVM_REQ_GLOBAL_CLOCK_UPDATE",
    "KVM_REQ_LOAD_MMU_PGD",
    "KVM_REQ_MMU_FREE_OBSOLETE_ROOTS",
    "KVM_REQ_MMU_SYNC",
    "KVM_REQ_NMI",
    "KVM_REQ_SMI",
    "KVM_REQ_TLB_FLUSH",
    "KVM_REQ_TLB_FLUSH_CURRENT",
    "KVM_REQ_TLB_FLUSH_GUEST",
    "KVM_REQ_TRIPLE_FAULT",
    "KVM_REQ_UNBLOCK",
    "KVM_REQ_UPDATE_CPU_DIRTY_LOGGING",
    "KVM_REQ_VM_DEAD",
    "OUTSIDE_GUEST_MODE",
    "TRACEPOINTS",
    "kvm_check_request",
    "kvm_clear_request",
    "kvm_flush_remote_tlbs",
    "kvm_flush_remote_tlbs_gfn",
    "kvm_make_all_cpus_request",
    "kvm_make_request",
    "kvm_test_request",
    "kvm_vcpu_kick",
    "kvm_vcpu_wake_up",
]

OUTSIDE_GUEST_MODE = 0
IN_GUEST_MODE = 1
EXITING_GUEST_MODE = 2

_MASK = 0xFF
KVM_REQUEST_NO_WAKEUP = 1 << 8
KVM_REQUEST_WAIT = 1 << 9
_QUIET = KVM_REQUEST_WAIT | KVM_REQUEST_NO_WAKEUP

KVM_REQ_TLB_FLUSH = 0 | _QUIET
KVM_REQ_VM_DEAD = 1 | _QUIET
KVM_REQ_UNBLOCK = 2
KVM_REQ_DIRTY_RING_SOFT_FULL = 3
KVM_REQ_TRIPLE_FAULT = 8 + 2
KVM_REQ_MMU_SYNC = 8 + 3
KVM_REQ_CLOCK_UPDATE = 8 + 4
KVM_REQ_LOAD_MMU_PGD = 8 + 5
KVM_REQ_EVENT = 8 + 6
KVM_REQ_APF_HALT = 8 + 7
KVM_REQ_NMI = 8 + 9
KVM_REQ_SMI = 8 + 12
KVM_REQ_GLOBAL_CLOCK_UPDATE = 8 + 16
KVM_REQ_APIC_PAGE_RELOAD = 8 + 17 | _QUIET
KVM_REQ_TLB_FLUSH_CURRENT = 8 + 26
KVM_REQ_APF_READY = 8 + 28
KVM_REQ_UPDATE_CPU_DIRTY_LOGGING = 8 + 30 | _QUIET
KVM_REQ_TLB_FLUSH_GUEST = 8 + 27 | _QUIET
KVM_REQ_MMU_FREE_OBSOLETE_ROOTS = 8 + 31 | _QUIET


REMOTE_TLB_FLUSH = Tracepoint(
    "refault", "kvm_flush_remote_tlbs", ("vcpus", "kicked"),
    lambda vcpus, kicked: f"{vcpus} vCPUs must flush{', some in guest mode' if kicked else ''}",
    doc="Every vCPU of the VM empties its TLB before it executes another guest instruction.",
)
TRACEPOINTS = (REMOTE_TLB_FLUSH,)


def kvm_make_request(req: int, vcpu: Vcpu) -> None:
    """Leave a request for the vCPU's next entry. No kick."""
    vcpu.requests |= 1 << (req & _MASK)


def kvm_test_request(req: int, vcpu: Vcpu) -> bool:
    """Whether the request is pending."""
    return vcpu.requests >> (req & _MASK) & 1 != 0


def kvm_clear_request(req: int, vcpu: Vcpu) -> None:
    """Drop the request."""
    vcpu.requests &= ~(1 << (req & _MASK))


def kvm_check_request(req: int, vcpu: Vcpu) -> bool:
    """Take the request if it is pending."""
    bit = 1 << (req & _MASK)
    if vcpu.requests & bit:
        vcpu.requests &= ~bit
        return True
    return False


def kvm_vcpu_wake_up(vcpu: Vcpu) -> bool:
    """Wake a vCPU that blocks in the kernel; whether it did."""
    if vcpu.wait.waiters:
        vcpu.stat["halt_wakeup"] += 1
        vcpu.wait.wake_all()
        return True
    return False


def _kick(vcpu: Vcpu) -> bool:
    # kvm_vcpu_exiting_guest_mode: only the first of several kicks finds IN_GUEST_MODE.
    if vcpu.mode == OUTSIDE_GUEST_MODE:
        return False
    vcpu.mode = EXITING_GUEST_MODE
    vcpu.kicked = True
    return True


def kvm_vcpu_kick(vcpu: Vcpu) -> None:
    """Wake the vCPU, or get it out of guest mode."""
    if not kvm_vcpu_wake_up(vcpu):
        _kick(vcpu)


def kvm_make_all_cpus_request(kvm: Kvm, req: int) -> bool:
    """Leave a request with every vCPU and get those in guest mode out; whether there was one."""
    called = False
    for vcpu in kvm.vcpus:
        kvm_make_request(req, vcpu)
        if not req & KVM_REQUEST_NO_WAKEUP and kvm_vcpu_wake_up(vcpu):
            continue
        if (req & KVM_REQUEST_WAIT or vcpu.mode == IN_GUEST_MODE) and _kick(vcpu):
            called = True
    return called


def kvm_flush_remote_tlbs(kvm: Kvm) -> None:
    """Every vCPU flushes before it executes another guest instruction."""
    kvm.stat["remote_tlb_flush_requests"] += 1
    if kvm.sched.preempt:
        kvm.sched.race("remote-flush")
    if kvm.truths is not None:
        kvm.truths.note_flush()
    kicked = kvm_make_all_cpus_request(kvm, KVM_REQ_TLB_FLUSH)
    if kicked:
        kvm.stat["remote_tlb_flush"] += 1
    if (t := kvm.trace.kvm_flush_remote_tlbs) is not None:
        t(len(kvm.vcpus), kicked)


def kvm_flush_remote_tlbs_gfn(kvm: Kvm, gfn: int, level: int) -> None:
    """Flush one entry's translations; VMX has no ranged flush, so everything goes."""
    kvm_flush_remote_tlbs(kvm)
