"""The fast page fault: giving back rights that were taken for tracking, without mmu_lock.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): page_fault_can_be_fast, fast_page_fault,
fast_pf_fix_direct_spte; tdp_mmu.c: kvm_tdp_mmu_fast_pf_get_last_sptep.

Direct pages outside the TDP MMU are freed only after a flush that waits for walkers without mmu_lock; a read
section of RCU stands for that.

Not modelled: the walk's READING_SHADOW_PAGE_TABLES mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mem_attributes import kvm_mem_is_private
from kvm_model.memslots import kvm_slot_dirty_track_enabled, mark_page_dirty_in_slot
from kvm_model.mmu.mmu_internal import (
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_SPURIOUS,
    KvmPageFault,
    pferr_flags,
)
from kvm_model.mmu.shadow_walk import for_each_shadow_entry
from kvm_model.mmu.spte import (
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    is_last_spte,
    is_shadow_present_pte,
)
from kvm_model.mmu.tdp_iter import TdpIter
from kvm_model.mmu.tdp_mmu import is_access_allowed, try_cmpxchg64
from kvm_model.mmu.tdp_pages import root_to_sp
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["TRACEPOINTS", "fast_page_fault"]

_RETRIES = 4

FAST_PAGE_FAULT = Tracepoint(
    "kvmmmu", "fast_page_fault",
    ("vcpu_id", "cr2_or_gpa", "error_code", "sptep", "old_spte", "new_spte", "ret"),
    lambda vcpu_id, gpa, error_code, sptep, old, new, ret:
        f"vcpu {vcpu_id} gva {gpa:x} error_code {pferr_flags(error_code)} sptep {sptep:016x} "
        f"old {old:#x} new {new:x} spurious {int(ret == RET_PF_SPURIOUS)} fixed {int(ret == RET_PF_FIXED)}",
)
TRACEPOINTS = (FAST_PAGE_FAULT,)


def _can_be_fast(vcpu: Vcpu, fault: KvmPageFault) -> bool:
    if fault.rsvd:
        return False
    kvm = vcpu.kvm
    if fault.is_private != kvm_mem_is_private(kvm, fault.gfn):
        # It is not the SPTE's rights that the access met.
        return False
    if not fault.present:
        any_ = kvm.profile.fast_fault_of_any_nonpresent and kvm.spte.acc_track != 0
        return not kvm.spte.ad_enabled or any_
    if fault.exec and kvm.profile.fast_fault_of_any_nonpresent:
        return False
    return fault.write


def _last_sptep(vcpu: Vcpu, gfn: int) -> tuple[int, int, int]:
    kvm = vcpu.kvm
    if not kvm.tdp_mmu_enabled:
        level, sptep = list(for_each_shadow_entry(vcpu, vcpu.root_hpa, gfn << 12))[-1]
        return sptep, kvm.ram.u64[sptep], level
    it = TdpIter(kvm.ram, root_to_sp(kvm, vcpu.root_hpa), PG_LEVEL_4K, gfn, gfn + 1)
    sptep, spte, level = it.sptep, it.old_spte, it.level
    while it.valid:
        sptep, spte, level = it.sptep, it.old_spte, it.level
        it.next()
    return sptep, spte, level


def _fixed_spte(vcpu: Vcpu, fault: KvmPageFault, spte: int, level: int) -> int:
    """What the SPTE could become, or -1 if the slow path must decide."""
    masks = vcpu.kvm.spte
    new = spte
    huge_stays = fault.slot is not None and kvm_slot_dirty_track_enabled(fault.slot)
    if not masks.ad_enabled and masks.is_access_track_spte(spte):
        new = masks.restore_acc_track_spte(new) | masks.accessed
    if fault.write and masks.is_mmu_writable_spte(spte):
        new |= PT_WRITABLE_MASK
        # One fast fault logs one page; a huge SPTE of a logged slot must be split first.
        if level > PG_LEVEL_4K and (huge_stays or not vcpu.kvm.profile.fast_fault_fixes_huge):
            return -1
    if new == spte or not is_access_allowed(vcpu.kvm, fault, new):
        return -1
    return new


def fast_page_fault(vcpu: Vcpu, fault: KvmPageFault) -> int:
    """RET_PF_FIXED, RET_PF_SPURIOUS, or RET_PF_INVALID if the slow path must be taken."""
    if not _can_be_fast(vcpu, fault):
        return RET_PF_INVALID
    kvm = vcpu.kvm
    ret = RET_PF_INVALID
    kvm.rcu.read_lock()
    for _ in range(_RETRIES + 1):
        sptep, spte, level = _last_sptep(vcpu, fault.gfn)
        if not is_shadow_present_pte(spte) or not is_last_spte(spte, level):
            break
        if is_access_allowed(kvm, fault, spte):
            ret = RET_PF_SPURIOUS
            break
        new = _fixed_spte(vcpu, fault, spte, level)
        if new < 0:
            break
        if try_cmpxchg64(kvm, sptep, spte, new):
            if new & PT_WRITABLE_MASK and not spte & PT_WRITABLE_MASK:
                mark_page_dirty_in_slot(vcpu, fault.slot, fault.gfn)
            if kvm.truths is not None:
                kvm.truths.note_spte(sptep, fault.gfn >> 9 * (level - 1) << 9 * (level - 1), level, spte, new)
            ret = RET_PF_FIXED
            break
    if (t := kvm.trace.fast_page_fault) is not None:
        t(vcpu.vcpu_id, fault.addr, fault.error_code, sptep << 3, spte, kvm.ram.u64[sptep], ret)
    kvm.rcu.read_unlock()
    if ret != RET_PF_INVALID:
        vcpu.stat["pf_fast"] += 1
    return ret
