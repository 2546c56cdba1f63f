"""A vCPU's root: loading, dropping, making it obsolete; and the page cache that feeds its faults.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): mmu_topup_memory_caches, kvm_mmu_load,
kvm_mmu_unload, kvm_mmu_reset_context, kvm_mmu_free_obsolete_roots, is_obsolete_sp, kvm_mmu_zap_all_fast,
kvm_arch_flush_shadow_memslot, kvm_mmu_zap_memslot, kvm_mmu_zap_memslot_pages_and_flush,
kvm_mmu_invalidate_mmio_sptes, kvm_mmu_zap_all; mmu.h: kvm_mmu_reload, kvm_mmu_load_pgd; 5.10:
kvm_mmu_init_vm.

Roots are the TDP MMU's or, without it, those of shadow_roots.py; one VM has one kind.

Not modelled: nested MMUs.
"""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING

from host_mm.page import put_page
from host_mm.page_alloc import GFP_KERNEL_ACCOUNT, alloc_pages
from kvm_model.mem_attributes import KVM_X86_DEFAULT_VM
from kvm_model.mmu.gfn_range import kvm_unmap_gfn_range
from kvm_model.mmu.kvm_mmu import kvm_init_mmu
from kvm_model.mmu.mmio import MMIO_GVA_ANY, vcpu_clear_mmio_info
from kvm_model.mmu.mmu_internal import INVALID_PAGE, KvmMmuPage, is_obsolete_sp, role_direct
from kvm_model.mmu.page_track import KvmPageTrackNotifierNode, kvm_page_track_flush_slot
from kvm_model.mmu.shadow_roots import (
    PREV_ROOTS_ALL,
    kvm_mmu_free_shadow_roots,
    kvm_mmu_sync_roots,
    mmu_alloc_direct_roots,
    mmu_alloc_shadow_roots,
    obsolete_shadow_roots,
)
from kvm_model.mmu.shadow_walk import shadow_root_to_sp
from kvm_model.mmu.shadow_zap import (
    kvm_mmu_prepare_zap_page,
    kvm_mmu_remote_flush_or_zap,
    kvm_mmu_zap_all_shadow_pages,
    kvm_zap_obsolete_pages,
)
from kvm_model.mmu.spte import MMIO_SPTE_GEN_MASK
from kvm_model.mmu.tdp_pages import init_spt, kvm_tdp_mmu_alloc_root, kvm_tdp_mmu_put_root, root_to_sp
from kvm_model.mmu.tdp_zap import (
    kvm_tdp_mmu_invalidate_roots,
    kvm_tdp_mmu_zap_all,
    kvm_tdp_mmu_zap_invalidated_roots,
    kvm_tdp_mmu_zap_valid_roots,
    need_resched,
)
from kvm_model.mmu.unsync import for_each_gfn_valid_sp_with_gptes
from kvm_model.requests import (
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    KVM_REQ_TLB_FLUSH,
    KVM_REQ_TLB_FLUSH_CURRENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    kvm_check_request,
    kvm_make_all_cpus_request,
    kvm_test_request,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot
    from kvm_model.vcpu import Vcpu

__all__ = [
    "KVM_X86_QUIRK_SLOT_ZAP_ALL", "TRACEPOINTS", "KvmMmuPageTrackNode", "kvm_arch_flush_shadow_memslot",
    "kvm_mmu_flush_ahead", "kvm_mmu_free_obsolete_roots", "kvm_mmu_invalidate_mmio_sptes", "kvm_mmu_load",
    "kvm_mmu_load_pgd", "kvm_mmu_reload", "kvm_mmu_reset_context", "kvm_mmu_unload", "kvm_mmu_zap_all",
    "kvm_mmu_zap_all_fast", "mmu_free_memory_caches", "mmu_topup_memory_caches",
]

KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7

KVM_MMU_ZAP_ALL_FAST = Tracepoint(
    "kvmmmu", "kvm_mmu_zap_all_fast", ("mmu_valid_gen", "mmu_used_pages"),
    lambda gen, used: f"kvm-mmu-valid-gen {gen} used_pages {used:x}",
)
TRACEPOINTS = (KVM_MMU_ZAP_ALL_FAST,)


def mmu_topup_memory_caches(vcpu: Vcpu) -> int:
    """Have enough table pages for one fault, since none can be allocated under mmu_lock. 0 or -ENOMEM."""
    kvm = vcpu.kvm
    cache = vcpu.mmu_shadow_page_cache
    if len(cache) >= kvm.profile.mmu_cache_min:
        return 0
    while len(cache) < kvm.profile.mmu_cache_objects:
        pfn = alloc_pages(kvm.host, GFP_KERNEL_ACCOUNT, 0, vcpu.kvm.process.home_node)
        if pfn < 0:
            return 0 if len(cache) >= kvm.profile.mmu_cache_min else -ENOMEM
        init_spt(kvm, pfn)
        cache.append(pfn)
    return 0


def mmu_free_memory_caches(vcpu: Vcpu) -> None:
    """Give the cached table pages back."""
    while vcpu.mmu_shadow_page_cache:
        put_page(vcpu.kvm.host, vcpu.mmu_shadow_page_cache.pop())


def kvm_mmu_load_pgd(vcpu: Vcpu) -> None:
    """Tell the CPU which root to use, if the vCPU has one."""
    if vcpu.root_hpa != INVALID_PAGE:
        vcpu.kvm.cpu.load_mmu_pgd(vcpu, vcpu.root_hpa, vcpu.mmu.root_level)


def _mmu_alloc_roots(vcpu: Vcpu) -> int:
    if vcpu.kvm.tdp_mmu_enabled:
        root = kvm_tdp_mmu_alloc_root(vcpu)
        if root < 0:
            return root
        vcpu.root_hpa = root
        return 0
    if role_direct(vcpu.mmu.root_role):
        return mmu_alloc_direct_roots(vcpu)
    return mmu_alloc_shadow_roots(vcpu)


def kvm_mmu_load(vcpu: Vcpu) -> int:
    """Give the vCPU a valid root and an empty TLB. 0 or a negative errno."""
    truths = vcpu.kvm.shadow_truths
    begun = truths.flush_begins() if truths is not None else 0
    r = mmu_topup_memory_caches(vcpu) or _mmu_alloc_roots(vcpu)
    if r:
        return r
    kvm_mmu_sync_roots(vcpu)
    if truths is not None:
        truths.flush_ended(vcpu, begun)
    kvm_mmu_load_pgd(vcpu)
    # Roots are not flushed when they are dropped, so a new one starts with a flush, which no statistic has.
    vcpu.kvm.cpu.flush_tlb(vcpu)
    return 0


def kvm_mmu_reload(vcpu: Vcpu) -> int:
    """Before an entry: drop an obsolete root, load one if there is none."""
    if kvm_check_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu):
        kvm_mmu_free_obsolete_roots(vcpu)
    if vcpu.root_hpa != INVALID_PAGE:
        return 0
    return kvm_mmu_load(vcpu)


def kvm_mmu_flush_ahead(vcpu: Vcpu) -> bool:
    """Whether a vCPU outside the guest flushes before it enters: it was asked to, or it must load a root.

    The request to drop an obsolete root is gone before the root is.
    """
    if vcpu.root_hpa == INVALID_PAGE:
        return True
    root = shadow_root_to_sp(vcpu.kvm, vcpu.root_hpa)
    if root is not None and is_obsolete_sp(vcpu.kvm, root):
        return True
    # A special root is dropped whenever that is asked for, and in 5.10 every root.
    special = root is None or not vcpu.kvm.profile.slot_zap_invalidates_roots
    if special and kvm_test_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu):
        return True
    return (
        kvm_test_request(KVM_REQ_TLB_FLUSH, vcpu)
        or kvm_test_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu)
        or kvm_test_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu)
    )


def kvm_mmu_unload(vcpu: Vcpu) -> None:
    """Drop the vCPU's root, and those that it keeps for later."""
    kvm = vcpu.kvm
    if not kvm.tdp_mmu_enabled:
        kvm_mmu_free_shadow_roots(vcpu, current=True, prev=PREV_ROOTS_ALL)
    elif vcpu.root_hpa != INVALID_PAGE:
        kvm.mmu_lock.read_lock()
        kvm_tdp_mmu_put_root(kvm, root_to_sp(kvm, vcpu.root_hpa))
        vcpu.root_hpa = INVALID_PAGE
        kvm.mmu_lock.read_unlock()
    vcpu_clear_mmio_info(vcpu, MMIO_GVA_ANY)


def kvm_mmu_reset_context(vcpu: Vcpu) -> None:
    """The guest's control registers changed in a way that its roles depend on: begin with new roots."""
    kvm_mmu_unload(vcpu)
    kvm_init_mmu(vcpu)


def kvm_mmu_free_obsolete_roots(vcpu: Vcpu) -> None:
    """Drop those of the vCPU's roots that were invalidated; kvm_mmu_unload of all in 5.10."""
    kvm = vcpu.kvm
    if not kvm.profile.slot_zap_invalidates_roots:
        kvm_mmu_unload(vcpu)
    elif not kvm.tdp_mmu_enabled:
        current, prev = obsolete_shadow_roots(vcpu)
        kvm_mmu_free_shadow_roots(vcpu, current=current, prev=prev)
    elif vcpu.root_hpa != INVALID_PAGE and is_obsolete_sp(kvm, root_to_sp(kvm, vcpu.root_hpa)):
        kvm_mmu_unload(vcpu)


def kvm_mmu_zap_all_fast(kvm: Kvm) -> None:
    """Invalidate all roots, make vCPUs drop them, zap them; slots_lock held. Complete on return."""
    kvm.mmu_lock.lock()
    if (t := kvm.trace.kvm_mmu_zap_all_fast) is not None:
        t(kvm.mmu_valid_gen, kvm.n_used_mmu_pages)
    kvm.mmu_valid_gen ^= 1
    later = kvm.tdp_mmu_enabled and kvm.profile.slot_zap_invalidates_roots
    if later:
        kvm_tdp_mmu_invalidate_roots(kvm)
    # In the same critical section: a vCPU must not see the roots valid after the request.
    kvm_make_all_cpus_request(kvm, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    kvm_zap_obsolete_pages(kvm)
    if kvm.tdp_mmu_enabled and not later:
        kvm_tdp_mmu_zap_valid_roots(kvm)
    kvm.mmu_lock.unlock()
    if not later:
        return
    # Before the caller goes on: notifiers could not find the SPTEs of a slot that is gone.
    kvm_tdp_mmu_zap_invalidated_roots(kvm, shared=True)


def kvm_arch_flush_shadow_memslot(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """Leave nothing mapped of a slot that is being deleted or moved."""
    if kvm.profile.mmu_is_page_track_node:
        kvm_page_track_flush_slot(kvm, slot)
    elif kvm.vm_type == KVM_X86_DEFAULT_VM and not kvm.disabled_quirks & KVM_X86_QUIRK_SLOT_ZAP_ALL:
        kvm_mmu_zap_all_fast(kvm)
    else:
        _kvm_mmu_zap_memslot(kvm, slot)


def _kvm_mmu_zap_memslot(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """Only the slot's own leaves go, and what shadows guest tables in it; roots stay as they are."""
    with kvm.mmu_lock:
        flush = kvm_unmap_gfn_range(kvm, slot, slot.base_gfn, slot.end_gfn, may_block=True)
        invalid_list: list[KvmMmuPage] = []
        # Their accounting is the slot's, and goes with it.
        for gfn in [gfn for gfn in kvm.mmu_page_hash if slot.base_gfn <= gfn < slot.end_gfn]:
            for sp in for_each_gfn_valid_sp_with_gptes(kvm, gfn):
                kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "zap-slot")
            if need_resched(kvm):
                kvm_mmu_remote_flush_or_zap(kvm, invalid_list, flush)
                flush = False
                kvm.mmu_lock.unlock()
                kvm.sched.yield_()
                kvm.mmu_lock.lock()
        kvm_mmu_remote_flush_or_zap(kvm, invalid_list, flush)


class KvmMmuPageTrackNode(KvmPageTrackNotifierNode):
    """The MMU's own node (5.10): kvm_mmu_pte_write and kvm_mmu_invalidate_zap_pages_in_memslot."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm

    def track_write(self, vcpu: Vcpu, gpa: int, new: bytes) -> None:
        """What is shadowed there follows."""
        self.kvm.mmu_track_write(vcpu, gpa, new)

    def track_flush_slot(self, kvm: Kvm, slot: KvmMemorySlot) -> None:
        """Not by slot: everything is made obsolete."""
        kvm_mmu_zap_all_fast(kvm)


def kvm_mmu_invalidate_mmio_sptes(kvm: Kvm, gen: int) -> None:
    """When the 19 bits of the generation that MMIO SPTEs keep wrap, zap all of them."""
    gen &= MMIO_SPTE_GEN_MASK & ~(kvm.profile.nr_memslot_as_ids - 1)
    if gen == 0:
        kvm_mmu_zap_all_fast(kvm)


def kvm_mmu_zap_all(kvm: Kvm) -> None:
    """Drop every SPTE; the VM is going away, so no flush is for its sake."""
    kvm.mmu_lock.lock()
    kvm_mmu_zap_all_shadow_pages(kvm)
    kvm_tdp_mmu_zap_all(kvm)
    kvm.mmu_lock.unlock()
