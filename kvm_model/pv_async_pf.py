"""What a guest that takes asynchronous page faults needs of KVM: CPUID, MSRs; and the end of an item.

Source of truth: virt/kvm/async_pf.c: kvm_check_async_pf_completion; arch/x86/kvm/x86.c (Linux 6.18):
kvm_pv_enable_async_pf, kvm_pv_enable_async_pf_int, kvm_set_msr_common, kvm_get_msr_common; cpuid.c:
KVM_CPUID_FEATURES; asm/kvm_para.h.

KVM's leaves are where Linux looks for them behind another hypervisor's: at 4000_0100H, with the features that
there are. With `kvm.async_pf=N` there are none, and the MSRs are not there either.

Not modelled: the other features of KVM_CPUID_FEATURES, CR0.PG that is cleared under items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.async_pf import (
    flush_async_pf_work,
    kvm_async_pf_wakeup_all,
    kvm_clear_async_pf_completion_queue,
)
from kvm_model.mmu.mmu import kvm_arch_async_page_ready
from kvm_model.x86_async_pf import (
    kvm_arch_async_page_present,
    kvm_arch_can_dequeue_async_page_present,
    kvm_pv_async_pf_enabled,
)

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "KVM_CPUID_SIGNATURE_LEAF", "MSR_KVM_ASYNC_PF_ACK", "MSR_KVM_ASYNC_PF_EN", "MSR_KVM_ASYNC_PF_INT",
    "get_async_pf_ack", "get_async_pf_en", "get_async_pf_int", "kvm_check_async_pf_completion",
    "kvm_pv_cpuid", "set_async_pf_ack", "set_async_pf_en", "set_async_pf_int",
]

KVM_CPUID_SIGNATURE_LEAF = 0x4000_0100
MSR_KVM_ASYNC_PF_EN = 0x4B56_4D02
MSR_KVM_ASYNC_PF_INT = 0x4B56_4D06
MSR_KVM_ASYNC_PF_ACK = 0x4B56_4D07
_SIGNATURE = b"KVMKVMKVM\0\0\0"
_FEATURES = 1 << 4 | 1 << 14
"""KVM_FEATURE_ASYNC_PF, KVM_FEATURE_ASYNC_PF_INT."""
_RESERVED = 0x30
_DELIVERY_AS_PF_VMEXIT = 1 << 2


def kvm_check_async_pf_completion(vcpu: Vcpu) -> None:
    """Map the pages that came in and tell the guest, as far as it can be told."""
    queues = vcpu.async_pf
    while queues.done and kvm_arch_can_dequeue_async_page_present(vcpu):
        with queues.lock:
            work = queues.done.pop(0)
        kvm_arch_async_page_ready(vcpu, work)
        kvm_arch_async_page_present(vcpu, work)
        if work in queues.queue:
            queues.queue.remove(work)
        queues.queued -= 1
        flush_async_pf_work(work)


def kvm_pv_cpuid(kvm: Kvm, leaf: int) -> tuple[int, int, int, int] | None:
    """KVM's own leaves, or None: the leaf is the CPU's."""
    if not kvm.async_pf or leaf not in (KVM_CPUID_SIGNATURE_LEAF, KVM_CPUID_SIGNATURE_LEAF + 1):
        return None
    if leaf == KVM_CPUID_SIGNATURE_LEAF:
        ebx, ecx, edx = (int.from_bytes(_SIGNATURE[n : n + 4], "little") for n in (0, 4, 8))
        return KVM_CPUID_SIGNATURE_LEAF + 1, ebx, ecx, edx
    return _FEATURES, 0, 0, 0


def _enable(vcpu: Vcpu, value: int) -> bool:
    """kvm_pv_enable_async_pf; False: #GP."""
    if value & (_RESERVED | _DELIVERY_AS_PF_VMEXIT):
        return False
    apf = vcpu.apf
    apf.msr_en_val = value
    if not kvm_pv_async_pf_enabled(vcpu):
        kvm_clear_async_pf_completion_queue(vcpu)
        apf.gfns.clear()
        return True
    gpa = value & ~0x3F
    if vcpu.kvm.slots().gfn_to_memslot(gpa >> 12) is None:
        return False
    apf.data_gpa = gpa
    kvm_async_pf_wakeup_all(vcpu)
    return True


def set_async_pf_en(vcpu: Vcpu, value: int) -> bool:
    """WRMSR of MSR_KVM_ASYNC_PF_EN; False: #GP."""
    return vcpu.kvm.async_pf and _enable(vcpu, value)


def set_async_pf_int(vcpu: Vcpu, value: int) -> bool:
    """WRMSR of MSR_KVM_ASYNC_PF_INT: the vector; False: #GP."""
    if not vcpu.kvm.async_pf or value >> 8:
        return False
    vcpu.apf.msr_int_val = value
    return True


def set_async_pf_ack(vcpu: Vcpu, value: int) -> bool:
    """WRMSR of MSR_KVM_ASYNC_PF_ACK: the guest took its token; False: #GP."""
    if vcpu.kvm.async_pf and value & 1:
        vcpu.apf.pageready_pending = False
        kvm_check_async_pf_completion(vcpu)
    return vcpu.kvm.async_pf


def get_async_pf_en(vcpu: Vcpu) -> int | None:
    """RDMSR of MSR_KVM_ASYNC_PF_EN; None: #GP."""
    return vcpu.apf.msr_en_val if vcpu.kvm.async_pf else None


def get_async_pf_int(vcpu: Vcpu) -> int | None:
    """RDMSR of MSR_KVM_ASYNC_PF_INT; None: #GP."""
    return vcpu.apf.msr_int_val if vcpu.kvm.async_pf else None


def get_async_pf_ack(vcpu: Vcpu) -> int | None:
    """RDMSR of MSR_KVM_ASYNC_PF_ACK; None: #GP."""
    return 0 if vcpu.kvm.async_pf else None
