"""Synchronising shadow pages with the guest's tables: what a guest flush is for.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): kvm_sync_page_check, kvm_sync_spte, __kvm_sync_page,
kvm_sync_page, mmu_sync_children, sync_mmio_spte; mmu/paging_tmpl.h: prefetch_invalid_gpte, get_level1_sp_gpa,
sync_spte; 5.10: __kvm_sync_page, sync_page.

Each SPTE of an unsync page is compared with the guest's entry as it is now: it goes if that is gone, not
accessed or for another gfn, and takes the entry's rights otherwise. Its frame is not looked up again: the
notifier would have zapped it. Nothing new is mapped.

All under mmu_lock for write, so the guest's entries are read without faulting; a page whose table the host
has taken away is zapped instead.

Not modelled: the EPT tables of a nested guest (paging_tmpl.h's third form).
"""

from __future__ import annotations

from errno import EINTR
from typing import TYPE_CHECKING

from kvm_model.guest_access import kvm_vcpu_gfn_to_memslot, kvm_vcpu_read_guest_atomic
from kvm_model.memslots import kvm_slot_dirty_track_enabled, mark_page_dirty_in_slot
from kvm_model.mmu.mmio import mark_mmio_spte
from kvm_model.mmu.mmu_internal import (
    ROLE_ACCESS_MASK,
    ROLE_DIRECT,
    ROLE_LEVEL_MASK,
    ROLE_PASSTHROUGH,
    ROLE_QUADRANT_MASK,
    KvmMmuPage,
    role_access,
    role_has_4_byte_gpte,
    role_quadrant,
)
from kvm_model.mmu.paging_tmpl import (
    gpte_access,
    gpte_to_gfn,
    guest_paging,
    prefetch_invalid_gpte,
    protect_clean_gpte,
)
from kvm_model.mmu.shadow_account import kvm_sp_write_protect_gfn
from kvm_model.mmu.shadow_spte import (
    kvm_mmu_page_get_access,
    kvm_mmu_page_get_gfn,
    kvm_mmu_page_set_access,
    mmu_spte_clear_no_track,
    mmu_spte_update,
)
from kvm_model.mmu.shadow_zap import drop_spte, kvm_mmu_prepare_zap_page, kvm_mmu_remote_flush_or_zap
from kvm_model.mmu.spte import PT_WRITABLE_MASK, SHADOW_NONPRESENT_VALUE, spte_to_pfn
from kvm_model.mmu.tdp_zap import need_resched
from kvm_model.mmu.unsync import (
    MmuPagePath,
    for_each_sp,
    kvm_unlink_unsync_page,
    mmu_pages_clear_parents,
    mmu_unsync_walk,
    must_protect,
)
from kvm_model.requests import KVM_REQ_MMU_SYNC, kvm_make_request

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["kvm_sync_page", "kvm_sync_spte", "mmu_sync_children"]

_SYNC_ROLE_IGN = ROLE_LEVEL_MASK | ROLE_ACCESS_MASK | ROLE_QUADRANT_MASK | ROLE_PASSTHROUGH


# -- entries ------------------------------------------------------------------------------------


def _sync_mmio_spte(vcpu: Vcpu, sptep: int, spte: int, gfn: int, access: int) -> bool:
    masks = vcpu.kvm.spte
    if not masks.is_mmio_spte(spte):
        return False
    if gfn != masks.get_mmio_spte_gfn(spte):
        mmu_spte_clear_no_track(vcpu.kvm, sptep)
    else:
        mark_mmio_spte(vcpu, sptep, gfn, access)
    return True


def _sync_spte(vcpu: Vcpu, sp: KvmMmuPage, index: int) -> int:
    """FNAME(sync_spte): -1 if the guest's entry cannot be read, else whether a flush is due."""
    kvm = vcpu.kvm
    paging = guest_paging(vcpu.mmu)
    offset = role_quadrant(sp.role) << 9 if role_has_4_byte_gpte(sp.role) else 0
    pte_gpa = (sp.gfn << 12) + (offset + index) * paging.gpte_size
    data = kvm_vcpu_read_guest_atomic(vcpu, pte_gpa, paging.gpte_size)
    if data is None:
        return -1
    gpte = int.from_bytes(data, "little")
    sptep = sp.spt << 9 | index
    if kvm.shadow_truths is not None:
        kvm.shadow_truths.note_compared(sptep)
    if prefetch_invalid_gpte(vcpu.mmu, gpte):
        drop_spte(kvm, sptep, "sync")
        return 1
    gfn = gpte_to_gfn(paging, gpte)
    access = protect_clean_gpte(role_access(sp.role) & gpte_access(gpte), gpte)
    spte = kvm.ram.u64[sptep]
    if _sync_mmio_spte(vcpu, sptep, spte, gfn, access):
        return 0
    if gfn != kvm_mmu_page_get_gfn(sp, index):
        drop_spte(kvm, sptep, "sync")
        return 1
    if kvm_mmu_page_get_access(sp, index) == access:
        return 0
    kvm_mmu_page_set_access(kvm, sp, index, access)
    return _rewrite_spte(vcpu, sp, sptep, gfn, access)


def _rewrite_spte(vcpu: Vcpu, sp: KvmMmuPage, sptep: int, gfn: int, access: int) -> int:
    """The same frame with the rights that the guest's entry gives now."""
    kvm = vcpu.kvm
    spte = kvm.ram.u64[sptep]
    host_writable = spte & kvm.spte.host_writable != 0
    slot = kvm_vcpu_gfn_to_memslot(vcpu, gfn)
    assert slot is not None
    wrprot = must_protect(
        kvm, sp, slot, access, gfn, spte, host_writable=host_writable, prefetch=True, synchronizing=True
    )
    new = kvm.spte.make_spte(
        sp, access, spte_to_pfn(spte), prefetch=True, synchronizing=True, host_writable=host_writable,
        wrprot=wrprot,
    )
    if new & PT_WRITABLE_MASK and kvm_slot_dirty_track_enabled(slot):
        mark_page_dirty_in_slot(vcpu, slot, gfn)
    if "no-dirty-on-sync" in kvm.breaks:
        kvm.ram.u64[sptep] = new
        if kvm.truths is not None:
            kvm.truths.note_spte(sptep, gfn, sp.level, spte, new)
        return 1
    return int(mmu_spte_update(kvm, sptep, new))


def kvm_sync_spte(vcpu: Vcpu, sp: KvmMmuPage, index: int) -> int:
    """Compare one SPTE with the guest's entry: -1 if that cannot be read, else whether a flush is due."""
    # Only what has never been used, or was cleared, has this value.
    if vcpu.kvm.ram.u64[sp.spt << 9 | index] == SHADOW_NONPRESENT_VALUE:
        return 0
    return _sync_spte(vcpu, sp, index)


# -- pages --------------------------------------------------------------------------------------


def _kvm_sync_page_check(vcpu: Vcpu, sp: KvmMmuPage) -> bool:
    """Whether this vCPU reads the guest's table as the page's role does."""
    root_role = vcpu.mmu.root_role
    if sp.role & ROLE_DIRECT or root_role & ROLE_DIRECT:
        return False
    return not (sp.role ^ root_role) & ~_SYNC_ROLE_IGN


def kvm_sync_page(vcpu: Vcpu, sp: KvmMmuPage, invalid_list: list[KvmMmuPage]) -> int:
    """Compare all SPTEs with the guest's entries: whether a flush is due, or -1 and the page is zapped."""
    kvm = vcpu.kvm
    flush = 0
    if _kvm_sync_page_check(vcpu, sp):
        for index in range(512):
            flush |= kvm_sync_spte(vcpu, sp, index)
    else:
        flush = -1
    if flush < 0:
        kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "sync")
        return -1
    if kvm.shadow_truths is not None and not sp.unsync:
        kvm.shadow_truths.note_table(sp)
    return flush


def mmu_sync_children(vcpu: Vcpu, parent: KvmMmuPage, can_yield: bool) -> int:
    """Sync and write-protect every unsync page below `parent`. 0, or -EINTR if mmu_lock is wanted."""
    kvm = vcpu.kvm
    path = MmuPagePath()
    invalid_list: list[KvmMmuPage] = []
    flush = False
    while pages := mmu_unsync_walk(kvm, parent):
        protected = False
        for sp in for_each_sp(pages, path):
            protected |= kvm_sp_write_protect_gfn(kvm, sp)
        if protected:
            kvm_mmu_remote_flush_or_zap(kvm, invalid_list, True)
            flush = False
        for sp in for_each_sp(pages, path):
            kvm_unlink_unsync_page(kvm, sp)
            flush |= kvm_sync_page(vcpu, sp, invalid_list) > 0
            mmu_pages_clear_parents(path)
        if need_resched(kvm):
            kvm_mmu_remote_flush_or_zap(kvm, invalid_list, flush)
            flush = False
            if not can_yield:
                kvm_make_request(KVM_REQ_MMU_SYNC, vcpu)
                return -EINTR
            kvm.mmu_lock.unlock()
            kvm.sched.yield_()
            kvm.mmu_lock.lock()
    kvm_mmu_remote_flush_or_zap(kvm, invalid_list, flush)
    return 0
