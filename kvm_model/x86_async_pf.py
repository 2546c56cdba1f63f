"""Asynchronous page faults as x86 tells them to the guest: halt, or a token now and an interrupt later.

Source of truth: arch/x86/kvm/x86.c (Linux 6.18): kvm_can_do_async_pf, kvm_can_deliver_async_pf,
kvm_arch_async_page_not_present, kvm_arch_async_page_present, kvm_arch_async_page_present_queued,
kvm_arch_can_dequeue_async_page_present, apf_put_user_*, apf_pageready_slot_free; mmu/mmu.c: alloc_apf_token;
asm/kvm_para.h: struct kvm_vcpu_pv_apf_data.

While the host reads a page in, the vCPU need not wait in the kernel. A guest that knows nothing of it is
put to sleep as by HLT, and an interrupt may wake it and be served. A guest that asked for it
(MSR_KVM_ASYNC_PF_EN) and that may be told (in ring 3, or with SEND_ALWAYS anywhere) gets a #PF that is
none: CR2 is a token, `flags` of its area is 1. It runs something else. When the page is there `token` of
the area is set and the vector of MSR_KVM_ASYNC_PF_INT comes; the guest clears the token and writes
MSR_KVM_ASYNC_PF_ACK before it gets the next.

    area:  u32 flags   1: the next #PF is a token     u32 token   of the page that is ready, -1: all; 0: free

Linux does this only with its own local APIC, of which this machine's has as much as it takes: vectors that
wait for the vCPU. `--param kvm.async_pf=Y` gives it one.

Not modelled: that APIC's registers, in-service state and priorities (a vector is over when it is delivered,
as with KVM_FEATURE_PV_EOI), delivery as a #PF VM exit to a nested hypervisor, the hash of gfns (a list is
one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.memslots import KVM_MEMSLOT_INVALID, mark_page_dirty_in_slot
from kvm_model.requests import KVM_REQ_APF_HALT, KVM_REQ_APF_READY, kvm_make_request, kvm_vcpu_kick
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.async_pf import KvmAsyncPf
    from kvm_model.vcpu import Vcpu

__all__ = [
    "KVM_ASYNC_PF_DELIVERY_AS_INT", "KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT", "KVM_ASYNC_PF_ENABLED",
    "KVM_ASYNC_PF_SEND_ALWAYS", "TRACEPOINTS", "alloc_apf_token", "kvm_arch_async_page_not_present",
    "kvm_arch_async_page_present", "kvm_arch_async_page_present_queued",
    "kvm_arch_can_dequeue_async_page_present", "kvm_can_do_async_pf", "kvm_pv_async_pf_enabled",
]

KVM_ASYNC_PF_ENABLED = 1 << 0
KVM_ASYNC_PF_SEND_ALWAYS = 1 << 1
KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT = 1 << 2
KVM_ASYNC_PF_DELIVERY_AS_INT = 1 << 3
_BOTH = KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_DELIVERY_AS_INT
_REASON_PAGE_NOT_PRESENT = 1
_TOKEN_OFFSET = 4
_PF_VECTOR = 14
_CR0_PG = 1 << 31
_U32 = (1 << 32) - 1

_TOKEN_FIELDS = ("token", "gva")


def _fmt_token(token: int, gva: int) -> str:
    return f"token {token:#x} gva {gva:#x}"


KVM_ASYNC_PF_NOT_PRESENT = Tracepoint("kvm", "kvm_async_pf_not_present", _TOKEN_FIELDS, _fmt_token)
KVM_ASYNC_PF_READY = Tracepoint("kvm", "kvm_async_pf_ready", _TOKEN_FIELDS, _fmt_token)
TRACEPOINTS = (KVM_ASYNC_PF_NOT_PRESENT, KVM_ASYNC_PF_READY)


def alloc_apf_token(vcpu: Vcpu) -> int:
    """A token that no other fault of the vCPU has: a count, and the vCPU's number in 12 bits; 32 bits."""
    apf = vcpu.apf
    if vcpu.kvm.profile.apf_token_never_zero and apf.id << 12 & _U32 == 0:
        apf.id = 1
    token = (apf.id << 12 | vcpu.vcpu_id) & _U32
    apf.id = apf.id + 1 & _U32
    return token


# -- the guest's area -----------------------------------------------------------------------------


def _put_user(vcpu: Vcpu, offset: int, value: int) -> bool:
    """kvm_write_guest_offset_cached into the guest's area; whether it is there."""
    kvm = vcpu.kvm
    gpa = vcpu.apf.data_gpa + offset
    slot = kvm.slots().gfn_to_memslot(gpa >> 12)
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
        return False
    try:
        copy_to_user(kvm.process, slot.gfn_to_hva(gpa >> 12) | gpa & 0xFFF, value.to_bytes(4, "little"))
    except KernelError:
        return False
    mark_page_dirty_in_slot(vcpu, slot, gpa >> 12)
    return True


def _slot_free(vcpu: Vcpu) -> bool:
    """apf_pageready_slot_free: the guest took the last token."""
    kvm = vcpu.kvm
    gpa = vcpu.apf.data_gpa + _TOKEN_OFFSET
    slot = kvm.slots().gfn_to_memslot(gpa >> 12)
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
        return False
    try:
        token = copy_from_user(kvm.process, slot.gfn_to_hva(gpa >> 12) | gpa & 0xFFF, 4)
    except KernelError:
        return False
    return not any(token)


# -- what may be done -----------------------------------------------------------------------------


def kvm_pv_async_pf_enabled(vcpu: Vcpu) -> bool:
    """Whether the guest wants tokens, and interrupts for the pages that are ready."""
    return vcpu.apf.msr_en_val & _BOTH == _BOTH


def _can_deliver(vcpu: Vcpu) -> bool:
    if not kvm_pv_async_pf_enabled(vcpu):
        return False
    cpu = vcpu.kvm.cpu
    if not vcpu.apf.msr_en_val & KVM_ASYNC_PF_SEND_ALWAYS and not cpu.get_reg(vcpu, "cpl"):
        return False
    # Without paging the guest can hardly have a handler of page faults.
    return not vcpu.kvm.profile.apf_needs_paging or cpu.get_reg(vcpu, "cr0") & _CR0_PG != 0


def kvm_can_do_async_pf(vcpu: Vcpu) -> bool:
    """Whether the vCPU can do something else than wait: it has an APIC, and may be interrupted."""
    ex = vcpu.exception
    if not vcpu.kvm.async_pf or ex.pending or ex.injected or vcpu.interrupt_injected or vcpu.nmi_injected:
        return False
    return vcpu.kvm.cpu.interrupt_allowed(vcpu)


# -- the two halves -------------------------------------------------------------------------------


def kvm_arch_async_page_not_present(vcpu: Vcpu, work: KvmAsyncPf) -> bool:
    """Tell the guest that its access must wait, or let the vCPU wait; whether the guest was told."""
    if (t := vcpu.kvm.trace.kvm_async_pf_not_present) is not None:
        t(work.token, work.cr2_or_gpa)
    vcpu.apf.gfns.append(work.gfn)
    if _can_deliver(vcpu) and _put_user(vcpu, 0, _REASON_PAGE_NOT_PRESENT):
        vcpu.kvm.cpu.set_reg(vcpu, "cr2", work.token)
        vcpu.queue_exception(_PF_VECTOR, 0)
        return True
    kvm_make_request(KVM_REQ_APF_HALT, vcpu)
    return False


def kvm_arch_async_page_present(vcpu: Vcpu, work: KvmAsyncPf) -> None:
    """The page is there and mapped: tell the guest if it was told of the fault, and run on."""
    apf = vcpu.apf
    if work.wakeup_all:
        work.token = _U32
    else:
        apf.gfns.remove(work.gfn)
    if (t := vcpu.kvm.trace.kvm_async_pf_ready) is not None:
        t(work.token, work.cr2_or_gpa)
    wanted = (work.wakeup_all or work.notpresent_injected) and kvm_pv_async_pf_enabled(vcpu)
    if wanted and _put_user(vcpu, _TOKEN_OFFSET, work.token):
        apf.pageready_pending = True
        vcpu.apic_set_irq(apf.msr_int_val & 0xFF)
    apf.halted = False
    vcpu.mp_state = 0


def kvm_arch_async_page_present_queued(vcpu: Vcpu) -> None:
    """The first page of a queue that was empty came in: the vCPU must look."""
    kvm_make_request(KVM_REQ_APF_READY, vcpu)
    if not vcpu.apf.pageready_pending:
        kvm_vcpu_kick(vcpu)


def kvm_arch_can_dequeue_async_page_present(vcpu: Vcpu) -> bool:
    """Whether one more page can be told of: the guest's area has one token at a time."""
    return not kvm_pv_async_pf_enabled(vcpu) or _slot_free(vcpu)
