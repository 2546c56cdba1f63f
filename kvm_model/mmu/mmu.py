"""The fault path: from a fault to an SPTE, a retry, emulation, or the guest's own page fault.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): kvm_mmu_page_fault, kvm_mmu_do_page_fault,
kvm_tdp_mmu_page_fault, direct_page_fault, nonpaging_page_fault, is_page_fault_stale,
kvm_mmu_finish_page_fault, page_fault_handle_page_track, kvm_mmu_write_protect_fault; mmu/paging_tmpl.h:
page_fault. Frame and level come from faultin_pfn.py.

KVM holds its reference to the page only until the SPTE is in place. What keeps the frame from being
freed under the mapping is that every change of the host's translation is bracketed, that
range_start zaps, and that `is_page_fault_stale` is asked under mmu_lock.

Not modelled: faults of nested guests, private faults that the CPU tells apart (SEV-SNP, TDX).
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINTR, EIO, ENOENT, EOPNOTSUPP
from typing import TYPE_CHECKING

from kvm_model.async_pf import KvmAsyncPf
from kvm_model.follow_pfn import kvm_release_faultin_page
from kvm_model.guest_access import kvm_vcpu_gfn_to_memslot
from kvm_model.mem_attributes import kvm_mem_is_private
from kvm_model.memslots import kvm_gfn_is_write_tracked
from kvm_model.mmu.direct_map import direct_map
from kvm_model.mmu.fast_page_fault import fast_page_fault
from kvm_model.mmu.faultin_pfn import fault_retry, kvm_mmu_faultin_pfn, kvm_mmu_hugepage_adjust
from kvm_model.mmu.invalidate import mmu_invalidate_retry_gfn
from kvm_model.mmu.invalidate_addr import kvm_inject_emulated_page_fault
from kvm_model.mmu.kvm_mmu import is_cr0_pg
from kvm_model.mmu.mmio import handle_mmio_page_fault, mmio_info_in_cache
from kvm_model.mmu.mmu_internal import (
    INVALID_PAGE,
    KVM_MAX_HUGEPAGE_LEVEL,
    PFERR_GUEST_PAGE_MASK,
    PFERR_PRESENT_MASK,
    PFERR_PRIVATE_ACCESS,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmPageFault,
    is_obsolete_sp,
    role_direct,
)
from kvm_model.mmu.mmu_roots import kvm_mmu_reload, mmu_topup_memory_caches
from kvm_model.mmu.paging_tmpl import GuestWalker, gva_to_gpa, walk_addr
from kvm_model.mmu.shadow_fetch import emulate_cr0_wp, fetch
from kvm_model.mmu.shadow_walk import shadow_page_table_clear_flood, shadow_root_to_sp
from kvm_model.mmu.shadow_zap import make_mmu_pages_available
from kvm_model.mmu.spte import PG_LEVEL_2M
from kvm_model.mmu.tdp_mmu import kvm_tdp_mmu_map
from kvm_model.mmu.unprotect import kvm_mmu_unprotect_gfn_and_retry
from kvm_model.requests import (
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    KVM_REQ_VM_DEAD,
    kvm_check_request,
    kvm_test_request,
)

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "kvm_arch_async_page_ready", "kvm_mmu_do_page_fault", "kvm_mmu_gva_to_gpa_write", "kvm_mmu_page_fault",
    "kvm_tdp_map_page",
]

_CPL_USER = 3

_WRITE_TO_GUEST_PAGE_TABLE = PFERR_GUEST_PAGE_MASK | PFERR_WRITE_MASK | PFERR_PRESENT_MASK


def _stale_reason(vcpu: Vcpu, fault: KvmPageFault) -> str:
    """is_page_fault_stale, under mmu_lock: why the fault may not be mapped, or nothing."""
    kvm = vcpu.kvm
    root = shadow_root_to_sp(kvm, vcpu.root_hpa)
    if root is None:
        # Of four PAE entries it cannot be seen whether they are obsolete, only that they may be.
        obsolete = kvm_test_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu)
    else:
        obsolete = is_obsolete_sp(kvm, root)
    if obsolete and (kvm.profile.obsolete_root_check or (root is not None and root.tdp_mmu_page)):
        return "stale-root"
    exempt = fault.slot is None and kvm.profile.retry_scope != "any"
    if exempt or "no-retry" in kvm.breaks or "retry-before-gup-only" in kvm.breaks:
        return ""
    return "stale-under-lock" if mmu_invalidate_retry_gfn(kvm, fault.mmu_seq, fault.gfn) else ""


def _page_fault_handle_page_track(fault: KvmPageFault) -> bool:
    """Whether no right to write can be given: every write to the page is to be heard of."""
    if fault.rsvd or not fault.present or not fault.write:
        return False
    return kvm_gfn_is_write_tracked(fault.slot, fault.gfn)


def _before_mmu_lock(vcpu: Vcpu, fault: KvmPageFault, *, fast: bool) -> int:
    """What direct faults of either MMU do first; RET_PF_CONTINUE with the frame, or the fault's end."""
    if _page_fault_handle_page_track(fault):
        return RET_PF_WRITE_PROTECTED
    if fast:
        r = fast_page_fault(vcpu, fault)
        if r != RET_PF_INVALID:
            return r
    return mmu_topup_memory_caches(vcpu) or kvm_mmu_faultin_pfn(vcpu, fault)


def _kvm_tdp_mmu_page_fault(vcpu: Vcpu, fault: KvmPageFault) -> int:
    kvm = vcpu.kvm
    r = _before_mmu_lock(vcpu, fault, fast=kvm.profile.fast_page_fault)
    if r != RET_PF_CONTINUE:
        return r
    kvm.mmu_lock.read_lock()
    reason = _stale_reason(vcpu, fault)
    if reason:
        r = fault_retry(kvm, fault, reason)
    else:
        kvm_mmu_hugepage_adjust(kvm, fault)
        r = kvm_tdp_mmu_map(vcpu, fault)
        if r == RET_PF_RETRY:
            fault_retry(kvm, fault, "spte-changed")
    _kvm_mmu_finish_page_fault(kvm, fault, r, kvm.mmu_lock.read_unlock)
    return r


def _direct_page_fault(vcpu: Vcpu, fault: KvmPageFault) -> int:
    """Without the TDP MMU: one fault at a time."""
    kvm = vcpu.kvm
    r = _before_mmu_lock(vcpu, fault, fast=True)
    if r != RET_PF_CONTINUE:
        return r
    kvm.mmu_lock.lock()
    reason = _stale_reason(vcpu, fault)
    if reason:
        r = fault_retry(kvm, fault, reason)
    else:
        r = make_mmu_pages_available(kvm)
        if not r:
            kvm_mmu_hugepage_adjust(kvm, fault)
            r = direct_map(vcpu, fault)
    _kvm_mmu_finish_page_fault(kvm, fault, r, kvm.mmu_lock.unlock)
    return r


def _kvm_mmu_finish_page_fault(kvm: Kvm, fault: KvmPageFault, r: int, unlock: Callable[[], None]) -> None:
    """Mark and release the page under mmu_lock; in 5.10 only release it, after the lock."""
    if kvm.profile.marks_page_at_drop:
        unlock()
        kvm_release_faultin_page(kvm, fault.refcounted_page, unused=True, dirty=False)
        return
    unused = r == RET_PF_RETRY
    kvm_release_faultin_page(kvm, fault.refcounted_page, unused=unused, dirty=fault.map_writable)
    unlock()


def _paging_page_fault(vcpu: Vcpu, fault: KvmPageFault) -> int:
    """FNAME(page_fault): the guest's own tables say what is at the address, if they allow the access."""
    kvm = vcpu.kvm
    walker = GuestWalker()
    if not walk_addr(walker, vcpu, fault.addr, fault.error_code & ~PFERR_RSVD_MASK):
        if not fault.prefetch:
            kvm_inject_emulated_page_fault(vcpu, walker.fault)
        return RET_PF_RETRY
    fault.gfn = walker.gfn
    fault.max_level = walker.level
    fault.slot = kvm_vcpu_gfn_to_memslot(vcpu, fault.gfn)
    if _page_fault_handle_page_track(fault):
        shadow_page_table_clear_flood(vcpu, fault.addr)
        return RET_PF_WRITE_PROTECTED
    r = mmu_topup_memory_caches(vcpu)
    if r:
        return r
    r = kvm_mmu_faultin_pfn(vcpu, fault, walker.pte_access)
    if r != RET_PF_CONTINUE:
        return r
    emulate_cr0_wp(vcpu, fault, walker)
    kvm.mmu_lock.lock()
    reason = _stale_reason(vcpu, fault)
    if reason:
        r = fault_retry(kvm, fault, reason)
    else:
        r = make_mmu_pages_available(kvm)
        if not r:
            r = fetch(vcpu, fault, walker, kvm_mmu_hugepage_adjust)
            if r == RET_PF_RETRY:
                fault_retry(kvm, fault, "guest-table-changed")
    _kvm_mmu_finish_page_fault(kvm, fault, r, kvm.mmu_lock.unlock)
    return r


def _kvm_tdp_page_fault(vcpu: Vcpu, fault: KvmPageFault) -> int:
    if vcpu.kvm.tdp_mmu_enabled:
        return _kvm_tdp_mmu_page_fault(vcpu, fault)
    return _direct_page_fault(vcpu, fault)


def _do_page_fault(vcpu: Vcpu, fault: KvmPageFault) -> int:
    kvm, mmu = vcpu.kvm, vcpu.mmu
    if role_direct(mmu.root_role):
        fault.slot = kvm_vcpu_gfn_to_memslot(vcpu, fault.gfn)
    if kvm.tdp_enabled:
        r = _kvm_tdp_page_fault(vcpu, fault)
    elif is_cr0_pg(mmu):
        r = _paging_page_fault(vcpu, fault)
    else:
        # Tables of PAE's kind: 2M pages at most.
        fault.max_level = PG_LEVEL_2M
        r = _direct_page_fault(vcpu, fault)
    vcpu.write_fault_to_shadow_pgtable = fault.write_fault_to_shadow_pgtable
    return r


def kvm_mmu_do_page_fault(vcpu: Vcpu, addr: int, error_code: int, *, prefetch: bool = False) -> int:
    """One try at a fault, by the vCPU's kind of MMU. RET_PF_* or a negative errno."""
    nx = vcpu.kvm.spte.nx_huge_pages
    return _do_page_fault(vcpu, KvmPageFault(addr, error_code, prefetch=prefetch, nx_workaround=nx))


def kvm_tdp_map_page(
    vcpu: Vcpu, gpa: int, error_code: int, max_level: int = KVM_MAX_HUGEPAGE_LEVEL, *, prefetch: bool = True
) -> int:
    """Map `gpa` as a fault with that PFERR word would, retrying until it is there: its level, or -errno.

    -EOPNOTSUPP with shadow paging, whose faults have guest addresses; -ENOENT where there is no memory.
    """
    kvm = vcpu.kvm
    if not kvm.tdp_enabled:
        return -EOPNOTSUPP
    while True:
        if vcpu.immediate_exit and kvm.sched.current.ctx.vcpu == vcpu.vcpu_id:
            return -EINTR
        if kvm_check_request(KVM_REQ_VM_DEAD, vcpu):
            return -EIO
        fault = KvmPageFault(
            gpa, error_code, prefetch=prefetch, nx_workaround=kvm.spte.nx_huge_pages, max_level=max_level
        )
        r = _do_page_fault(vcpu, fault)
        if r != RET_PF_RETRY:
            break
        kvm.sched.yield_()
    if r == RET_PF_EMULATE:
        return -ENOENT
    return r if r < 0 else fault.goal_level


def kvm_arch_async_page_ready(vcpu: Vcpu, work: KvmAsyncPf) -> None:
    """A page came in: map it, unless the vCPU is elsewhere by now. The guest has not accessed it yet."""
    if work.wakeup_all or work.direct_map != role_direct(vcpu.mmu.root_role) or kvm_mmu_reload(vcpu):
        return
    if not work.direct_map and work.cr3 != vcpu.kvm.cpu.get_reg(vcpu, "cr3"):
        return
    error_code = work.error_code if vcpu.kvm.profile.apf_ready_keeps_error_code else 0
    r = kvm_mmu_do_page_fault(vcpu, work.cr2_or_gpa, error_code, prefetch=True)
    if r == RET_PF_FIXED:
        vcpu.stat["pf_fixed"] += 1


def kvm_mmu_gva_to_gpa_write(vcpu: Vcpu, gva: int) -> int:
    """Where the guest's tables let it write at its present privilege; INVALID_GPA if nowhere."""
    user = PFERR_USER_MASK if vcpu.kvm.cpu.get_reg(vcpu, "cs") & 3 == _CPL_USER else 0
    return gva_to_gpa(vcpu, gva, user | PFERR_WRITE_MASK)


def _kvm_mmu_write_protect_fault(vcpu: Vcpu, addr: int, error_code: int) -> int:
    """RET_PF_RETRY, RET_PF_EMULATE, or RET_PF_WRITE_PROTECTED: the CPU may try what cannot be emulated."""
    if vcpu.last_retry_eip == vcpu.kvm.cpu.get_reg(vcpu, "rip") and vcpu.last_retry_addr == addr:
        return RET_PF_EMULATE
    vcpu.last_retry_eip = 0
    vcpu.last_retry_addr = 0
    direct = role_direct(vcpu.mmu.root_role)
    if mmio_info_in_cache(vcpu, addr, direct):
        return RET_PF_EMULATE
    if direct:
        unprotect = error_code & _WRITE_TO_GUEST_PAGE_TABLE == _WRITE_TO_GUEST_PAGE_TABLE
    else:
        # Emulating would hold up the event that is to be injected again.
        unprotect = vcpu.event_needs_reinjection
    if unprotect:
        gpa = addr if direct else kvm_mmu_gva_to_gpa_write(vcpu, addr)
        if kvm_mmu_unprotect_gfn_and_retry(vcpu, addr, gpa):
            return RET_PF_RETRY
    return RET_PF_WRITE_PROTECTED


def kvm_mmu_page_fault(vcpu: Vcpu, addr: int, error_code: int) -> int:
    """Handle a fault at `addr` (a gpa under TDP, else linear) with PFERR word `error_code`.

    A negative errno, RET_PF_EMULATE or RET_PF_WRITE_PROTECTED if the caller must emulate the instruction (and
    with the latter may leave to the CPU what it cannot), or another RET_PF_* if the guest can go on.
    """
    kvm = vcpu.kvm
    if vcpu.root_hpa == INVALID_PAGE:
        return RET_PF_RETRY
    if kvm.has_private_mem and not error_code & PFERR_RSVD_MASK and kvm_mem_is_private(kvm, addr >> 12):
        # Nothing but the attribute says what a software-protected VM's access is.
        error_code |= PFERR_PRIVATE_ACCESS
    stat = vcpu.stat
    r = RET_PF_INVALID
    if error_code & PFERR_RSVD_MASK:
        r = handle_mmio_page_fault(vcpu, addr, role_direct(vcpu.mmu.root_role))
        if r == RET_PF_EMULATE:
            return r
    if r == RET_PF_INVALID:
        stat["pf_taken"] += 1
        r = kvm_mmu_do_page_fault(vcpu, addr, error_code)
    if r == RET_PF_WRITE_PROTECTED:
        r = _kvm_mmu_write_protect_fault(vcpu, addr, error_code)
    if r == RET_PF_FIXED:
        stat["pf_fixed"] += 1
    elif r in (RET_PF_EMULATE, RET_PF_WRITE_PROTECTED):
        stat["pf_emulate"] += 1
    elif r == RET_PF_SPURIOUS:
        stat["pf_spurious"] += 1
    return r
