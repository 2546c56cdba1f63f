"""From a fault's gfn to a frame and a level: guest_memfd or the host's tables, now or later, or no memory.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): kvm_mmu_faultin_pfn, __kvm_mmu_faultin_pfn,
kvm_mmu_faultin_pfn_gmem, kvm_arch_setup_async_pf, kvm_handle_noslot_fault, kvm_handle_error_pfn,
kvm_mmu_hugepage_adjust, kvm_mmu_max_mapping_level, host_pfn_mapping_level.

No lock is held but SRCU. Whether the frame is still the right one is asked under mmu_lock, by mmu.py.

Not modelled: an APIC access page that may not be used now (nested guests, APICv inhibited).
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT, EINTR
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import _PAGE_PRESENT, _PAGE_PSE, lookup_address_in_mm
from host_mm.gup import FOLL_INTERRUPTIBLE, FOLL_NOWAIT, FOLL_WRITE
from host_mm.process import BUS_MCEERR_AR
from kvm_model.async_pf import KvmAsyncPf, kvm_setup_async_pf
from kvm_model.follow_pfn import kvm_faultin_pfn, kvm_release_faultin_page
from kvm_model.guest_memfd import kvm_gmem_get_pfn
from kvm_model.mem_attributes import gfn_is_in_guest_memfd, kvm_mem_is_private
from kvm_model.memslots import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMSLOT_INVALID,
    KvmMemorySlot,
    kvm_slot_dirty_track_enabled,
    lpage_disallowed,
)
from kvm_model.mmu.invalidate import mmu_invalidate_retry_gfn_unsafe
from kvm_model.mmu.mmio import vcpu_cache_mmio_info
from kvm_model.mmu.mmu_internal import (
    KVM_MAX_HUGEPAGE_LEVEL,
    KVM_PFN_ERR_HWPOISON,
    KVM_PFN_ERR_NEEDS_IO,
    KVM_PFN_ERR_RO_FAULT,
    KVM_PFN_ERR_SIGPENDING,
    KVM_PFN_NOSLOT,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_RETRY,
    KvmPageFault,
    is_error_noslot_pfn,
    is_error_pfn,
    role_direct,
)
from kvm_model.mmu.spte import ACC_ALL, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, kvm_pages_per_hpage
from kvm_model.mmu.tdp_iter import TDP_MMU_MAX_GFN_EXCLUSIVE
from kvm_model.requests import (
    KVM_REQ_APF_HALT,
    kvm_make_request,
)
from kvm_model.vcpu import UserExit
from kvm_model.x86_async_pf import alloc_apf_token, kvm_can_do_async_pf
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "TRACEPOINTS", "fault_retry", "host_pfn_mapping_level", "kvm_mmu_faultin_pfn", "kvm_mmu_hugepage_adjust",
    "kvm_mmu_max_mapping_level", "prepare_memory_fault_exit",
]

FAULT_RETRY = Tracepoint(
    "refault", "fault_retry", ("gfn", "reason", "mmu_seq", "seq", "in_progress"),
    lambda gfn, reason, mmu_seq, seq, in_progress:
        f"gfn {gfn:x} {reason} mmu_seq {mmu_seq} seq {seq} in_progress {in_progress}",
    doc="A fault gives up and the guest will fault again: RET_PF_RETRY, with its reason.",
)
_GET_PAGE_FIELDS = ("gva", "gfn")


def _fmt_get_page(gva: int, gfn: int) -> str:
    return f"gva = {gva:#x}, gfn = {gfn:#x}"


KVM_TRY_ASYNC_GET_PAGE = Tracepoint("kvm", "kvm_try_async_get_page", _GET_PAGE_FIELDS, _fmt_get_page)
KVM_ASYNC_PF_REPEATED_FAULT = Tracepoint(
    "kvm", "kvm_async_pf_repeated_fault", _GET_PAGE_FIELDS, _fmt_get_page
)
KVM_ASYNC_PF_DOUBLEFAULT = Tracepoint("kvm", "kvm_async_pf_doublefault", _GET_PAGE_FIELDS, _fmt_get_page)
TRACEPOINTS = (
    FAULT_RETRY, KVM_TRY_ASYNC_GET_PAGE, KVM_ASYNC_PF_REPEATED_FAULT, KVM_ASYNC_PF_DOUBLEFAULT,
)


def fault_retry(kvm: Kvm, fault: KvmPageFault, reason: str) -> int:
    if (t := kvm.trace.fault_retry) is not None:
        t(fault.gfn, reason, fault.mmu_seq, kvm.mmu_invalidate_seq, kvm.mmu_invalidate_in_progress)
    return RET_PF_RETRY


# -- levels -------------------------------------------------------------------------------------


def host_pfn_mapping_level(kvm: Kvm, gfn: int, slot: KvmMemorySlot) -> int:
    """The level at which the host maps `gfn`, read from its tables without locks; 4K if not at all."""
    entry, level = lookup_address_in_mm(kvm.mm, slot.gfn_to_hva(gfn))
    if entry & _PAGE_PRESENT and entry & _PAGE_PSE and level in (PG_LEVEL_2M, PG_LEVEL_1G):
        return level
    return PG_LEVEL_4K


def kvm_mmu_max_mapping_level(
    kvm: Kvm, slot: KvmMemorySlot, gfn: int, max_level: int = KVM_MAX_HUGEPAGE_LEVEL
) -> int:
    """The highest level that the slot's alignment and the host's mapping allow; mmu_lock held."""
    while max_level > PG_LEVEL_4K and lpage_disallowed(slot, gfn, max_level):
        max_level -= 1
    if max_level == PG_LEVEL_4K or gfn_is_in_guest_memfd(kvm, slot, gfn):
        return PG_LEVEL_4K
    return min(host_pfn_mapping_level(kvm, gfn, slot), max_level)


def kvm_mmu_hugepage_adjust(kvm: Kvm, fault: KvmPageFault) -> None:
    fault.huge_page_disallowed = fault.exec and fault.nx_huge_page_workaround_enabled
    slot = fault.slot
    if fault.max_level == PG_LEVEL_4K or slot is None or is_error_noslot_pfn(fault.pfn):
        return
    if kvm_slot_dirty_track_enabled(slot) and "huge-in-log" not in kvm.breaks:
        return
    fault.req_level = kvm_mmu_max_mapping_level(kvm, slot, fault.gfn, fault.max_level)
    if fault.req_level == PG_LEVEL_4K or fault.huge_page_disallowed:
        return
    # Not stale and mmu_lock held: the host's huge mapping cannot be split from under us.
    fault.goal_level = fault.req_level
    fault.pfn &= ~(kvm_pages_per_hpage(fault.goal_level) - 1)


# -- the frame ----------------------------------------------------------------------------------


def _kvm_handle_error_pfn(vcpu: Vcpu, fault: KvmPageFault) -> int:
    if fault.pfn == KVM_PFN_ERR_SIGPENDING:
        vcpu.stat["signal_exits"] += 1
        return -EINTR
    if fault.pfn == KVM_PFN_ERR_RO_FAULT:
        return RET_PF_EMULATE
    if fault.pfn == KVM_PFN_ERR_HWPOISON:
        assert fault.slot is not None
        # kvm_send_hwpoison_signal: it is pending when the vCPU wants to enter again.
        vcpu.kvm.process.send_sig_mceerr(BUS_MCEERR_AR, fault.slot.gfn_to_hva(fault.gfn))
        vcpu.kvm.request_exit(vcpu)
        return fault_retry(vcpu.kvm, fault, "hwpoison")
    vcpu.fault_gpa = fault.addr
    return -EFAULT


def prepare_memory_fault_exit(vcpu: Vcpu, fault: KvmPageFault) -> None:
    """kvm_mmu_prepare_memory_fault_exit: user space learns where, and of which kind, the access was."""
    gpa, kind = fault.gfn << 12, "private" if fault.is_private else "shared"
    vcpu.run = UserExit(
        "memory-fault-exit", gpa=gpa, size=4096, private=fault.is_private,
        why=f"no {kind} memory for gpa {gpa:#x}",
    )


def _kvm_handle_noslot_fault(vcpu: Vcpu, fault: KvmPageFault, access: int) -> int:
    kvm = vcpu.kvm
    if fault.is_private:
        prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    gva = 0 if kvm.tdp_enabled else fault.addr
    vcpu_cache_mmio_info(vcpu, gva, fault.gfn, access & kvm.spte.mmio_access)
    fault.slot = None
    fault.pfn = KVM_PFN_NOSLOT
    fault.map_writable = False
    if not kvm.spte.mmio_value or fault.gfn >= TDP_MMU_MAX_GFN_EXCLUSIVE:
        return RET_PF_EMULATE
    return RET_PF_CONTINUE


def _kvm_mmu_faultin_pfn_gmem(vcpu: Vcpu, fault: KvmPageFault, slot: KvmMemorySlot) -> int:
    if not slot.flags & KVM_MEM_GUEST_MEMFD:
        prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    pfn = kvm_gmem_get_pfn(vcpu.kvm, slot, fault.gfn)
    if pfn < 0:
        prepare_memory_fault_exit(vcpu, fault)
        return pfn
    fault.pfn = fault.refcounted_page = pfn
    fault.map_writable = True
    fault.max_level = PG_LEVEL_4K
    return RET_PF_CONTINUE


def _faultin_pfn(vcpu: Vcpu, fault: KvmPageFault, slot: KvmMemorySlot) -> int:
    """__kvm_mmu_faultin_pfn."""
    if fault.is_private or slot.gmem_only:
        return _kvm_mmu_faultin_pfn_gmem(vcpu, fault, slot)
    kvm = vcpu.kvm
    foll = (FOLL_WRITE if fault.write else 0) | FOLL_NOWAIT
    fault.pfn, fault.map_writable, fault.refcounted_page = kvm_faultin_pfn(kvm, slot, fault.gfn, foll)
    if fault.pfn != KVM_PFN_ERR_NEEDS_IO:
        return RET_PF_CONTINUE
    if not fault.prefetch and kvm_can_do_async_pf(vcpu) and _try_async_pf(vcpu, fault, slot):
        return fault_retry(kvm, fault, "async-pf")
    foll = foll & ~FOLL_NOWAIT | FOLL_INTERRUPTIBLE
    fault.pfn, fault.map_writable, fault.refcounted_page = kvm_faultin_pfn(kvm, slot, fault.gfn, foll)
    return RET_PF_CONTINUE


def _try_async_pf(vcpu: Vcpu, fault: KvmPageFault, slot: KvmMemorySlot) -> bool:
    """Let the page come in while the vCPU does something else; False: there is too much of that already."""
    trace = vcpu.kvm.trace
    if (t := trace.kvm_try_async_get_page) is not None:
        t(fault.addr, fault.gfn)
    if fault.gfn in vcpu.apf.gfns:
        for t in (trace.kvm_async_pf_repeated_fault, trace.kvm_async_pf_doublefault):
            if t is not None:
                t(fault.addr, fault.gfn)
        kvm_make_request(KVM_REQ_APF_HALT, vcpu)
        return True
    work = KvmAsyncPf(vcpu, fault.addr, slot.gfn_to_hva(fault.gfn))
    work.token = alloc_apf_token(vcpu)
    work.gfn = fault.gfn
    work.error_code = fault.error_code
    work.direct_map = role_direct(vcpu.mmu.root_role)
    work.cr3 = vcpu.kvm.cpu.get_reg(vcpu, "cr3")
    return kvm_setup_async_pf(vcpu, work)


def kvm_mmu_faultin_pfn(vcpu: Vcpu, fault: KvmPageFault, access: int = ACC_ALL) -> int:
    """Find the frame of the fault's gfn. `access`: the guest's rights to it."""
    kvm = vcpu.kvm
    slot = fault.slot
    breaks = kvm.breaks
    fault.mmu_seq = kvm.mmu_invalidate_seq
    if kvm.sched.preempt:
        kvm.sched.point("seq")
    # After the snapshot: whoever changes attributes moves the sequence.
    if fault.is_private != kvm_mem_is_private(kvm, fault.gfn):
        prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    if slot is None:
        return _kvm_handle_noslot_fault(vcpu, fault, access)
    if slot.flags & KVM_MEMSLOT_INVALID:
        if kvm.profile.invalid_slot_is_noslot or "ignore-invalid-slot" in breaks:
            return _kvm_handle_noslot_fault(vcpu, fault, access)
        if fault.prefetch:
            return -EAGAIN
        return fault_retry(kvm, fault, "invalid-slot")
    unlocked = kvm.profile.unlocked_retry_check and "no-retry" not in breaks
    if unlocked and mmu_invalidate_retry_gfn_unsafe(kvm, fault.mmu_seq, fault.gfn):
        return fault_retry(kvm, fault, "stale-before-gup")
    r = _faultin_pfn(vcpu, fault, slot)
    if r != RET_PF_CONTINUE:
        return r
    if is_error_pfn(fault.pfn):
        return _kvm_handle_error_pfn(vcpu, fault)
    if fault.pfn == KVM_PFN_NOSLOT:
        return _kvm_handle_noslot_fault(vcpu, fault, access)
    if (
        unlocked and "retry-before-gup-only" not in breaks
        and mmu_invalidate_retry_gfn_unsafe(kvm, fault.mmu_seq, fault.gfn)
    ):
        kvm_release_faultin_page(kvm, fault.refcounted_page, unused=True, dirty=False)
        return fault_retry(kvm, fault, "stale-after-gup")
    return RET_PF_CONTINUE
