"""Mapping a fault without the TDP MMU: direct pages under mmu_lock for write, and the neighbours' prefetch.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): direct_map, mmu_set_spte, mark_mmio_spte,
kvm_mmu_prefetch_sptes, __direct_pte_prefetch, mmu_alloc_direct_roots, mmu_free_root_page; 5.10: __direct_map,
set_spte.

A direct page maps gfns in order, so its entries need no translation of the guest's. Around a new 4K leaf, in
its aligned group of eight, what the host has mapped writable is mapped, too, but not accessed; without A bits
nobody could tell such an entry from one in use, so then nothing is.

Not modelled: NX huge-page accounting. Shadow paging adds: FNAME(fetch) in the place of direct_map, access
rights less than all, write protection of shadowed tables, prefetch by the guest's entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.gup import FOLL_WRITE, get_user_page_fast_only
from host_mm.page import put_page
from kvm_model.follow_pfn import kvm_release_page_dirty
from kvm_model.memslots import (
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
    KvmMemorySlot,
    kvm_gfn_is_write_tracked,
    kvm_slot_dirty_track_enabled,
    mark_page_dirty_in_slot,
)
from kvm_model.mmu.mmu_internal import (
    KVM_PFN_NOSLOT,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmMmuPage,
    KvmPageFault,
)
from kvm_model.mmu.rmap import rmap_add
from kvm_model.mmu.shadow_page import (
    drop_parent_pte,
    drop_spte,
    kvm_mmu_get_child_sp,
    kvm_mmu_get_shadow_page,
    kvm_mmu_prepare_zap_page,
    link_shadow_page,
    make_mmu_pages_available,
)
from kvm_model.mmu.shadow_spte import kvm_mmu_page_get_gfn, mmu_spte_set, mmu_spte_update
from kvm_model.mmu.spte import (
    ACC_ALL,
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    get_mmio_spte_generation,
    is_large_pte,
    is_last_spte,
    is_shadow_present_pte,
    kvm_pages_per_hpage,
    spte_to_pfn,
)
from kvm_model.mmu.tdp_mmu import (
    disallowed_hugepage_adjust,
    root_to_sp,
    trace_kvm_mmu_set_spte,
    trace_set_spte,
)
from kvm_model.requests import kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = ["direct_map", "mmu_alloc_direct_root", "mmu_free_root_page"]

_PTE_PREFETCH_NUM = 8


# -- roots --------------------------------------------------------------------------------------


def mmu_alloc_direct_root(vcpu: Vcpu) -> int:
    """The address of the root that all vCPUs share, with a reference, or a negative errno."""
    kvm = vcpu.kvm
    with kvm.mmu_lock:
        r = make_mmu_pages_available(kvm)
        if r < 0:
            return r
        root = kvm_mmu_get_shadow_page(vcpu, 0, kvm.root_role)
        root.root_count += 1
        return root.spt << 12


def mmu_free_root_page(kvm: Kvm, root: KvmMmuPage, invalid_list: list[KvmMmuPage]) -> None:
    """Drop a reference, mmu_lock held for write; a valid root stays for whoever loads it next."""
    root.root_count -= 1
    if not root.root_count and root.invalid:
        kvm_mmu_prepare_zap_page(kvm, root, invalid_list, "zap-root")


# -- one SPTE -----------------------------------------------------------------------------------


def _mark_mmio_spte(vcpu: Vcpu, sptep: int, gfn: int) -> None:
    kvm = vcpu.kvm
    generation = kvm.slots().generation
    spte = kvm.spte.make_mmio_spte(gfn, ACC_ALL, generation)
    vcpu.stat["pf_mmio_spte_created"] += 1
    if (t := kvm.trace.mark_mmio_spte) is not None:
        t(sptep << 3, gfn, spte & ACC_ALL, get_mmio_spte_generation(spte))
    mmu_spte_set(kvm, sptep, spte)


def _make_room(kvm: Kvm, sptep: int, level: int, pfn: int) -> tuple[bool, bool]:
    """Unlink what a new leaf cannot be an update of: (whether a flush is due, whether it is an update)."""
    old = kvm.ram.u64[sptep]
    if not is_shadow_present_pte(old):
        return False, False
    if level > PG_LEVEL_4K and not is_large_pte(old):
        drop_parent_pte(kvm, kvm.sps[spte_to_pfn(old)], sptep)
        return True, False
    if pfn != spte_to_pfn(old):
        drop_spte(kvm, sptep, "replace")
        return True, False
    return False, True


def _mmu_set_spte(
    vcpu: Vcpu, slot: KvmMemorySlot | None, sptep: int, gfn: int, pfn: int, *, fault: KvmPageFault | None
) -> int:
    """mmu_set_spte: without `fault` for a prefetch. RET_PF_*."""
    kvm = vcpu.kvm
    sp = kvm.sps[sptep >> 9]
    level = sp.level
    prefetch = fault is None or fault.prefetch
    noslot = pfn == KVM_PFN_NOSLOT
    if noslot and not kvm.profile.noslot_drops_leaf:
        _mark_mmio_spte(vcpu, sptep, gfn)
        return RET_PF_EMULATE
    old = kvm.ram.u64[sptep]
    if prefetch and kvm.profile.prefetch_leaves_same_pfn and (
        is_shadow_present_pte(old) and is_last_spte(old, level) and pfn == spte_to_pfn(old)
    ):
        return RET_PF_SPURIOUS
    flush, was_rmapped = _make_room(kvm, sptep, level, pfn)
    if noslot:
        _mark_mmio_spte(vcpu, sptep, gfn)
        if flush:
            kvm_flush_remote_tlbs_gfn(kvm, gfn, level)
        trace_kvm_mmu_set_spte(kvm, gfn, level, sptep)
        return RET_PF_EMULATE
    assert slot is not None
    wrprot = kvm_gfn_is_write_tracked(slot, gfn)
    spte = kvm.spte.make_spte(
        sp, ACC_ALL, pfn, prefetch=prefetch, synchronizing=False,
        host_writable=fault is None or fault.map_writable, wrprot=wrprot,
    )
    if spte & PT_WRITABLE_MASK and kvm_slot_dirty_track_enabled(slot):
        mark_page_dirty_in_slot(vcpu, slot, gfn)
    ret = RET_PF_FIXED
    if kvm.ram.u64[sptep] == spte:
        ret = RET_PF_SPURIOUS
    else:
        flush |= mmu_spte_update(kvm, sptep, spte)
        trace_set_spte(kvm, gfn if fault is None else fault.gfn, gfn, level, sptep, spte, prefetch)
    if flush:
        kvm_flush_remote_tlbs_gfn(kvm, gfn, level)
    if not was_rmapped:
        rmap_add(kvm, slot, sptep, gfn)
    if wrprot and fault is not None and fault.write:
        return RET_PF_WRITE_PROTECTED
    return ret


# -- prefetch -----------------------------------------------------------------------------------


def _kvm_prefetch_pages(kvm: Kvm, slot: KvmMemorySlot, gfn: int, nr_pages: int) -> list[int]:
    """The frames of the gfns up to the first that the host has not mapped writable, each with a reference."""
    if slot.flags & (KVM_MEMSLOT_INVALID | KVM_MEM_READONLY) or slot.end_gfn - gfn < nr_pages:
        return []
    pfns: list[int] = []
    for nr in range(nr_pages):
        pfn = get_user_page_fast_only(kvm.mm, slot.gfn_to_hva(gfn + nr), FOLL_WRITE)
        if pfn < 0:
            break
        pfns.append(pfn)
    return pfns


def _direct_pte_prefetch_many(vcpu: Vcpu, sp: KvmMmuPage, start: int, end: int) -> bool:
    kvm = vcpu.kvm
    gfn = kvm_mmu_page_get_gfn(sp, start & 511)
    slot = kvm.slots().gfn_to_memslot(gfn)
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID or kvm_slot_dirty_track_enabled(slot):
        return False
    pfns = _kvm_prefetch_pages(kvm, slot, gfn, end - start)
    for nr, pfn in enumerate(pfns):
        _mmu_set_spte(vcpu, slot, start + nr, gfn + nr, pfn, fault=None)
        if kvm.profile.marks_page_at_drop:
            put_page(kvm.host, pfn)
        else:
            # It may become writable without mmu_lock, and then nobody would tell the page.
            kvm_release_page_dirty(kvm, pfn)
    return bool(pfns)


def _direct_pte_prefetch(vcpu: Vcpu, sptep: int) -> None:
    kvm = vcpu.kvm
    sp = kvm.sps[sptep >> 9]
    if sp.ad_disabled or sp.level > PG_LEVEL_4K:
        return
    # A neighbour may be in the range of a bracket that the faulting gfn is not in.
    skip = kvm.profile.retry_scope != "any" and "prefetch-in-bracket" not in kvm.breaks
    if skip and kvm.mmu_invalidate_in_progress:
        return
    first = sptep & ~(_PTE_PREFETCH_NUM - 1)
    start = -1
    for at in range(first, first + _PTE_PREFETCH_NUM):
        if is_shadow_present_pte(kvm.ram.u64[at]) or at == sptep:
            if start >= 0 and not _direct_pte_prefetch_many(vcpu, sp, start, at):
                return
            start = -1
        elif start < 0:
            start = at
    if start >= 0 and kvm.profile.prefetches_last_run:
        _direct_pte_prefetch_many(vcpu, sp, start, first + _PTE_PREFETCH_NUM)


# -- the fault ----------------------------------------------------------------------------------


def direct_map(vcpu: Vcpu, fault: KvmPageFault) -> int:
    """Install the tables and the leaf for a fault whose level is decided. RET_PF_*.

    The caller holds mmu_lock for write, has found the fault not stale and room for the pages.
    """
    kvm = vcpu.kvm
    if (t := kvm.trace.kvm_mmu_spte_requested) is not None:
        t(fault.gfn, fault.pfn | fault.gfn & kvm_pages_per_hpage(fault.goal_level) - 1, fault.goal_level)
    root = root_to_sp(kvm, vcpu.root_hpa)
    table, level = root.spt << 9, root.level
    while True:
        shift = 9 * (level - 1)
        sptep = table + (fault.gfn >> shift & 511)
        if fault.nx_huge_page_workaround_enabled:
            disallowed_hugepage_adjust(kvm, fault, kvm.ram.u64[sptep], level)
        if level == fault.goal_level:
            break
        sp = kvm_mmu_get_child_sp(vcpu, sptep, fault.gfn >> shift << shift)
        if sp is not None:
            link_shadow_page(kvm, sptep, sp)
            sp.nx_huge_page_disallowed = fault.huge_page_disallowed
        table = spte_to_pfn(kvm.ram.u64[sptep]) << 9
        level -= 1
    base_gfn = fault.gfn >> shift << shift
    ret = _mmu_set_spte(vcpu, fault.slot, sptep, base_gfn, fault.pfn, fault=fault)
    if ret != RET_PF_SPURIOUS:
        _direct_pte_prefetch(vcpu, sptep)
    return ret
