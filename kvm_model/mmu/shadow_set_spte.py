"""Making one leaf outside the TDP MMU, and its neighbours with it.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): mmu_set_spte, kvm_mmu_prefetch_sptes,
kvm_prefetch_pages, gfn_to_memslot_dirty_bitmap, direct_pte_prefetch, __direct_pte_prefetch; 5.10: set_spte,
direct_pte_prefetch_many.

Around a new 4K leaf, in its aligned group of eight, what the host has mapped writable is mapped, too, but not
accessed. A direct page maps gfns in order, so its entries need no translation of the guest's; elsewhere the
guest's entries say what they map (shadow_fetch.py).

6.18 puts an MMIO SPTE over a present leaf where the guest changed its entry from memory to none without a
flush, or where another vCPU mapped the gfn by a slot that was just made; it forgets the rmap. That was mended
later, and is here (it is the switch mmio-over-leaf).

Not modelled: flushes of a range, which a hypervisor below can offer; each is of everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.gup import FOLL_WRITE, get_user_page_fast_only
from host_mm.page import put_page
from kvm_model.follow_pfn import kvm_release_page_dirty
from kvm_model.guest_access import kvm_vcpu_gfn_to_memslot
from kvm_model.memslots import (
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
    KvmMemorySlot,
    kvm_gfn_is_write_tracked,
    kvm_slot_dirty_track_enabled,
    mark_page_dirty_in_slot,
)
from kvm_model.mmu.mmio import mark_mmio_spte
from kvm_model.mmu.mmu_internal import (
    KVM_PFN_NOSLOT,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmMmuPage,
    KvmPageFault,
    role_access,
)
from kvm_model.mmu.rmap import rmap_add
from kvm_model.mmu.shadow_spte import kvm_mmu_page_get_gfn, kvm_mmu_page_set_access, mmu_spte_update
from kvm_model.mmu.shadow_zap import drop_parent_pte, drop_spte
from kvm_model.mmu.spte import (
    ACC_WRITE_MASK,
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    is_large_pte,
    is_last_spte,
    is_shadow_present_pte,
    spte_to_pfn,
)
from kvm_model.mmu.tdp_mmu import trace_kvm_mmu_set_spte, trace_set_spte
from kvm_model.mmu.unsync import must_protect
from kvm_model.requests import kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "PTE_PREFETCH_NUM", "direct_pte_prefetch", "direct_pte_prefetch_group", "kvm_mmu_prefetch_sptes",
    "mmu_set_spte", "prefetch_allowed",
]

PTE_PREFETCH_NUM = 8


# -- one SPTE -----------------------------------------------------------------------------------


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


def _set_mmio_spte(vcpu: Vcpu, sp: KvmMmuPage, sptep: int, gfn: int, access: int) -> int:
    kvm = vcpu.kvm
    old_kernel = kvm.profile.noslot_drops_leaf
    flush = False
    if old_kernel or "mmio-over-leaf" not in kvm.breaks:
        flush, _ = _make_room(kvm, sptep, sp.level, KVM_PFN_NOSLOT)
    vcpu.stat["pf_mmio_spte_created"] += 1
    mark_mmio_spte(vcpu, sptep, gfn, access)
    if flush:
        kvm_flush_remote_tlbs_gfn(kvm, gfn, sp.level)
    if old_kernel:
        trace_kvm_mmu_set_spte(kvm, gfn, sp.level, sptep)
    return RET_PF_EMULATE


def mmu_set_spte(
    vcpu: Vcpu, slot: KvmMemorySlot | None, sptep: int, access: int, gfn: int, pfn: int,
    fault: KvmPageFault | None,
) -> int:
    """Map `gfn` by `pfn` with the guest's rights `access`; without `fault` for a prefetch. RET_PF_*."""
    kvm = vcpu.kvm
    sp = kvm.sps[sptep >> 9]
    level = sp.level
    prefetch = fault is None or fault.prefetch
    if pfn == KVM_PFN_NOSLOT:
        return _set_mmio_spte(vcpu, sp, sptep, gfn, access)
    old = kvm.ram.u64[sptep]
    if prefetch and kvm.profile.prefetch_leaves_same_pfn and (
        is_shadow_present_pte(old) and is_last_spte(old, level) and pfn == spte_to_pfn(old)
    ):
        return RET_PF_SPURIOUS
    assert slot is not None
    flush, was_rmapped = _make_room(kvm, sptep, level, pfn)
    host_writable = fault is None or fault.map_writable
    late = "unsync-after-store" in kvm.breaks
    wrprot = kvm_gfn_is_write_tracked(slot, gfn) if late else must_protect(
        kvm, sp, slot, access, gfn, kvm.ram.u64[sptep], host_writable=host_writable, prefetch=prefetch
    )
    spte = kvm.spte.make_spte(
        sp, access, pfn, prefetch=prefetch, synchronizing=False, host_writable=host_writable, wrprot=wrprot
    )
    if spte & PT_WRITABLE_MASK and kvm_slot_dirty_track_enabled(slot):
        mark_page_dirty_in_slot(vcpu, slot, gfn)
    ret = RET_PF_FIXED
    if kvm.ram.u64[sptep] == spte:
        ret = RET_PF_SPURIOUS
    else:
        flush |= mmu_spte_update(kvm, sptep, spte, gfn)
        trace_set_spte(kvm, gfn if fault is None else fault.gfn, gfn, level, sptep, spte, prefetch)
    if late:
        kvm.sched.point("unsync")
        must_protect(kvm, sp, slot, access, gfn, 0, host_writable=host_writable, prefetch=prefetch)
    if kvm.shadow_truths is not None:
        kvm.shadow_truths.note_compared(sptep)
    if wrprot and fault is not None and fault.write:
        ret = RET_PF_WRITE_PROTECTED
    if flush:
        kvm_flush_remote_tlbs_gfn(kvm, gfn, level)
    if was_rmapped:
        kvm_mmu_page_set_access(kvm, sp, sptep & 511, access)
    else:
        rmap_add(kvm, slot, sptep, gfn, access)
    return ret


# -- prefetch -----------------------------------------------------------------------------------


def prefetch_allowed(kvm: Kvm, sp: KvmMmuPage) -> bool:
    """Whether the neighbours of a new leaf of the page may be mapped now."""
    if sp.level > PG_LEVEL_4K:
        return False
    # A neighbour may be in the range of a bracket that the faulting gfn is not in.
    skip = kvm.profile.retry_scope != "any" and "prefetch-in-bracket" not in kvm.breaks
    return not (skip and kvm.mmu_invalidate_in_progress)


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


def kvm_mmu_prefetch_sptes(vcpu: Vcpu, gfn: int, sptep: int, nr_pages: int, access: int) -> bool:
    """Map up to `nr_pages` from `gfn` on at `sptep` on; whether there was one."""
    kvm = vcpu.kvm
    slot = kvm_vcpu_gfn_to_memslot(vcpu, gfn)
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
        return False
    if access & ACC_WRITE_MASK and kvm_slot_dirty_track_enabled(slot):
        return False
    pfns = _kvm_prefetch_pages(kvm, slot, gfn, nr_pages)
    for nr, pfn in enumerate(pfns):
        mmu_set_spte(vcpu, slot, sptep + nr, access, gfn + nr, pfn, None)
        if kvm.profile.marks_page_at_drop:
            put_page(kvm.host, pfn)
        else:
            # It may become writable without mmu_lock, and then nobody would tell the page.
            kvm_release_page_dirty(kvm, pfn)
    return bool(pfns)


def _direct_pte_prefetch_many(vcpu: Vcpu, sp: KvmMmuPage, start: int, end: int) -> bool:
    gfn = kvm_mmu_page_get_gfn(sp, start & 511)
    return kvm_mmu_prefetch_sptes(vcpu, gfn, start, end - start, role_access(sp.role))


def direct_pte_prefetch_group(vcpu: Vcpu, sp: KvmMmuPage, sptep: int) -> None:
    """__direct_pte_prefetch: the runs of absent entries around `sptep`, in a direct page."""
    kvm = vcpu.kvm
    first = sptep & ~(PTE_PREFETCH_NUM - 1)
    start = -1
    for at in range(first, first + PTE_PREFETCH_NUM):
        if is_shadow_present_pte(kvm.ram.u64[at]) or at == sptep:
            if start >= 0 and not _direct_pte_prefetch_many(vcpu, sp, start, at):
                return
            start = -1
        elif start < 0:
            start = at
    if start >= 0 and kvm.profile.prefetches_last_run:
        _direct_pte_prefetch_many(vcpu, sp, start, first + PTE_PREFETCH_NUM)


def direct_pte_prefetch(vcpu: Vcpu, sptep: int) -> None:
    """The neighbours of a leaf of a direct MMU.

    Without A bits nobody could tell such an entry from one in use, so then there are none.
    """
    sp = vcpu.kvm.sps[sptep >> 9]
    if not sp.ad_disabled and prefetch_allowed(vcpu.kvm, sp):
        direct_pte_prefetch_group(vcpu, sp, sptep)
