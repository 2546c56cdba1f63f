"""What the notifier asks of both MMUs for a range of gfns: unmap, age, test, follow an entry.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): kvm_unmap_gfn_range, kvm_age_gfn, kvm_test_age_gfn,
kvm_rmap_age_gfn_range, kvm_zap_gfn_range; 5.10: kvm_unmap_hva_range, kvm_age_hva, kvm_test_age_hva,
kvm_set_spte_hva with kvm_unmap_rmapp, kvm_age_rmapp, kvm_test_age_rmapp, kvm_set_pte_rmapp.

A VM with the TDP MMU has no rmaps, one without it has nothing else: a walk of a range visits the rmaps of all
levels, so that the unmap of one 4K page takes the huge leaf over it along.

Not modelled: huge entries in change_pte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pte_pfn, pte_write
from kvm_model.mmu.mmu_internal import KVM_MAX_HUGEPAGE_LEVEL
from kvm_model.mmu.rmap import (
    RmapHead,
    gfn_to_rmap,
    kvm_zap_all_rmap_sptes,
    rmap_sptes,
    walk_slot_rmaps,
)
from kvm_model.mmu.shadow_spte import mmu_spte_age, mmu_spte_clear_track_bits, mmu_spte_set
from kvm_model.mmu.spte import PG_LEVEL_4K, kvm_pages_per_hpage
from kvm_model.mmu.tdp_age import kvm_tdp_mmu_age_gfn_range, kvm_tdp_mmu_test_age_gfn
from kvm_model.mmu.tdp_set_pte import changed_pte_notifier_make_spte, kvm_tdp_mmu_set_spte_gfn
from kvm_model.mmu.tdp_zap import kvm_tdp_mmu_unmap_gfn_range, kvm_tdp_mmu_zap_leafs
from kvm_model.requests import KVM_REQ_APIC_PAGE_RELOAD, kvm_make_all_cpus_request
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = [
    "TRACEPOINTS", "kvm_age_gfn", "kvm_set_spte_gfn", "kvm_test_age_gfn", "kvm_unmap_gfn_range",
    "kvm_zap_gfn_range_locked",
]

KVM_AGE_PAGE = Tracepoint(
    "kvm", "kvm_age_page", ("hva", "gfn", "level", "referenced"),
    lambda hva, gfn, level, referenced:
        f"hva {hva:x} gfn {gfn:x} level {level} {'YOUNG' if referenced else 'OLD'}",
)
TRACEPOINTS = (KVM_AGE_PAGE,)

_LEVELS = range(PG_LEVEL_4K, KVM_MAX_HUGEPAGE_LEVEL + 1)


# -- unmap --------------------------------------------------------------------------------------


def _kvm_zap_rmap(kvm: Kvm, head: RmapHead, why: str) -> bool:
    zapped = kvm_zap_all_rmap_sptes(kvm, head, why)
    if zapped and kvm.truths is not None:
        kvm.truths.note_flush_due()
    return zapped


def kvm_unmap_gfn_range(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, *, may_block: bool) -> bool:
    """Zap [start, end) of the slot, mmu_lock held for write; whether a flush is due."""
    if slot.id == kvm.profile.user_mem_slots + 1 and kvm.profile.apic_reload_retries:
        # APIC_ACCESS_PAGE_PRIVATE_MEMSLOT: the VMCS has the frame's address.
        kvm_make_all_cpus_request(kvm, KVM_REQ_APIC_PAGE_RELOAD)
    if kvm.tdp_mmu_enabled:
        return kvm_tdp_mmu_unmap_gfn_range(kvm, slot, start, end, may_block=may_block, why="unmap")
    return walk_slot_rmaps(
        kvm, slot, lambda kvm, head, slot: _kvm_zap_rmap(kvm, head, "unmap"), _LEVELS, start, end,
        can_yield=may_block and kvm.profile.unmap_breaks_lock, flush_on_yield=True,
    )


def kvm_zap_gfn_range_locked(kvm: Kvm, start: int, end: int) -> bool:
    """Zap [start, end) of every slot, mmu_lock held for write; whether a flush is due."""
    if kvm.tdp_mmu_enabled:
        return kvm_tdp_mmu_zap_leafs(kvm, start, end, False)
    flush = False
    for slot in (slot for slots in kvm.memslots for slot in slots.in_gfn_range(start, end)):
        flush |= walk_slot_rmaps(
            kvm, slot, lambda kvm, head, slot: _kvm_zap_rmap(kvm, head, "zap-range"), _LEVELS,
            max(start, slot.base_gfn), min(end, slot.end_gfn), can_yield=True, flush_on_yield=True,
        )
    return flush


# -- age ----------------------------------------------------------------------------------------


def _age_head(kvm: Kvm, head: RmapHead | None, test_only: bool) -> bool:
    if head is None:
        return False
    lock = head.lock
    if lock is not None:
        lock.lock()
    young = False
    for sptep in rmap_sptes(head):
        young |= mmu_spte_age(kvm, sptep, test_only)
        if young and test_only:
            break
    if lock is not None:
        lock.unlock()
    return young


def _kvm_rmap_age_gfn_range(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, test_only: bool) -> bool:
    """6.18's: from `start` on by whole huge pages, however it is aligned."""
    young = False
    for level in _LEVELS:
        if not slot.rmap[level - 1]:
            continue
        for gfn in range(start, end, kvm_pages_per_hpage(level)):
            young |= _age_head(kvm, gfn_to_rmap(gfn, level, slot), test_only)
            if young and test_only:
                return True
    return young


def _kvm_age_rmapps(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int) -> bool:
    """kvm_age_rmapp of each rmap of the range, also of empty ones, level by level (5.10)."""
    young = False
    t = kvm.trace.kvm_age_page
    for level in _LEVELS:
        pages = kvm_pages_per_hpage(level)
        gfn = start
        for index in range(start // pages, (end - 1) // pages + 1):
            referenced = _age_head(kvm, gfn_to_rmap(index * pages, level, slot), False)
            young |= referenced
            if t is not None:
                t(slot.gfn_to_hva(gfn), gfn, level, referenced)
            gfn += pages
    return young


def kvm_age_gfn(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int) -> bool:
    """Clear accessed in [start, end) of the slot; whether any was set. 5.10 also traces each rmap."""
    young = False
    if kvm.trace.kvm_age_page is not None or not (kvm.tdp_mmu_enabled or kvm.profile.lockless_aging):
        young = _kvm_age_rmapps(kvm, slot, start, end)
    elif not kvm.tdp_mmu_enabled:
        young = _kvm_rmap_age_gfn_range(kvm, slot, start, end, False)
    if kvm.tdp_mmu_enabled:
        young |= kvm_tdp_mmu_age_gfn_range(kvm, slot, start, end)
    return young


def kvm_test_age_gfn(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int) -> bool:
    """Whether any SPTE of [start, end) is accessed."""
    if kvm.tdp_mmu_enabled:
        return kvm_tdp_mmu_test_age_gfn(kvm, slot, start, end)
    return _kvm_rmap_age_gfn_range(kvm, slot, start, end, True)


# -- follow -------------------------------------------------------------------------------------


def kvm_set_spte_gfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int, pte: int) -> bool:
    """The host is about to set `pte` for `gfn`, mmu_lock held for write; whether a flush is due (5.10)."""
    if kvm.tdp_mmu_enabled:
        return kvm_tdp_mmu_set_spte_gfn(kvm, slot, gfn, pte)
    head = gfn_to_rmap(gfn, PG_LEVEL_4K, slot)
    if head is None:
        return False
    if pte_write(pte):
        return kvm_zap_all_rmap_sptes(kvm, head, "change-pte")
    for sptep in rmap_sptes(head):
        new = changed_pte_notifier_make_spte(kvm, kvm.ram.u64[sptep], pte_pfn(pte))
        mmu_spte_clear_track_bits(kvm, sptep, "change-pte")
        mmu_spte_set(kvm, sptep, new)
        kvm.stat["pages_4k"] += 1
    return True
