"""Stores to the SPTEs of shadow pages: direct pages without the TDP MMU, and shadow paging's.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): mmu_spte_set, mmu_spte_update,
mmu_spte_clear_track_bits, mmu_spte_clear_no_track, spte_write_protect, spte_clear_dirty,
kvm_mmu_page_get_gfn, kvm_mmu_page_get_access, kvm_mmu_page_set_translation; 5.10: mmu_spte_update,
mmu_spte_clear_track_bits, mmu_spte_age.

mmu_lock is held for write, so these stores race only with fast page faults, aging and the CPU's A and D bits:
what those may change is exchanged atomically. Linux 5.10 takes A and D to struct page when they go, and asks
for a flush when W, A or D goes; 6.18 does neither, it asks when the right to get W back goes.

Linux traces no zap here (only the TDP MMU has an event); `refault:spte_zap` does.

Not modelled: 32-bit hosts, SPTE bits at 5.10's places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from kvm_model.mmu.marks import is_dirty_spte, transfer_marks
from kvm_model.mmu.mmu_internal import role_access
from kvm_model.mmu.spte import (
    ACC_ALL,
    PT_WRITABLE_MASK,
    SHADOW_NONPRESENT_VALUE,
    is_last_spte,
    is_shadow_present_pte,
    spte_ad_enabled,
    spte_to_pfn,
)
from kvm_model.mmu.tdp_mmu import fetch_and64, try_cmpxchg64, xchg64

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.mmu.mmu_internal import KvmMmuPage

__all__ = [
    "kvm_mmu_page_get_access", "kvm_mmu_page_get_gfn", "kvm_mmu_page_set_access",
    "kvm_mmu_page_set_translation", "mmu_spte_age", "mmu_spte_clear_no_track", "mmu_spte_clear_track_bits",
    "mmu_spte_set", "mmu_spte_update", "spte_clear_dirty", "spte_write_protect", "test_and_clear_writable",
]


def kvm_mmu_page_get_gfn(sp: KvmMmuPage, index: int) -> int:
    """The first gfn that the leaf at entry `index` maps."""
    if sp.shadowed_translation is not None:
        return sp.shadowed_translation[index] >> 12
    return sp.gfn + (index << 9 * (sp.level - 1))


def kvm_mmu_page_get_access(sp: KvmMmuPage, index: int) -> int:
    """ACC_* of the guest's that the leaf at entry `index` shadows; the SPTE may grant less."""
    if sp.shadowed_translation is not None:
        return sp.shadowed_translation[index] & ACC_ALL
    return role_access(sp.role)


def kvm_mmu_page_set_translation(kvm: Kvm, sp: KvmMmuPage, index: int, gfn: int, access: int) -> None:
    """The leaf at entry `index` shadows a guest entry for `gfn` with these rights."""
    if sp.shadowed_translation is not None:
        sp.shadowed_translation[index] = gfn << 12 | access
    elif gfn != kvm_mmu_page_get_gfn(sp, index) or access != role_access(sp.role):
        why = f"entry {index} of direct page {sp!r} is to map gfn {gfn:#x} with access {access}"
        raise BrokenTruth("shadowed-translation", why, kvm.stream.here())


def kvm_mmu_page_set_access(kvm: Kvm, sp: KvmMmuPage, index: int, access: int) -> None:
    """The guest's entry grants other rights than before."""
    kvm_mmu_page_set_translation(kvm, sp, index, kvm_mmu_page_get_gfn(sp, index), access)


def _note(kvm: Kvm, sptep: int, old: int, new: int, gfn: int) -> None:
    if kvm.truths is not None:
        sp = kvm.sps[sptep >> 9]
        if gfn < 0:
            gfn = kvm_mmu_page_get_gfn(sp, sptep & 511)
        kvm.truths.note_spte(sptep, gfn, sp.level, old, new)


def _changed(kvm: Kvm, sptep: int, old: int, new: int, gfn: int = -1, *, aged: bool = False) -> None:
    if kvm.profile.marks_page_at_drop:
        transfer_marks(kvm, kvm.sps[sptep >> 9].level, old, new, accessed=not aged)
    _note(kvm, sptep, old, new, gfn)


def _update_clear_spte(kvm: Kvm, sptep: int, old: int, new: int) -> int:
    """Store over a present SPTE; what stood there, which may have more bits than `old`."""
    if kvm.spte.spte_needs_atomic_update(old):
        if "plain-store" not in kvm.breaks:
            return xchg64(kvm, sptep, new)
        if kvm.sched.preempt:
            kvm.sched.race("xchg")
    kvm.ram.u64[sptep] = new
    return old


def mmu_spte_set(kvm: Kvm, sptep: int, new: int, gfn: int = -1) -> None:
    """Store over an SPTE that is not present. `gfn`: what it maps, if its page does not know yet."""
    old = kvm.ram.u64[sptep]
    kvm.ram.u64[sptep] = new
    _note(kvm, sptep, old, new, gfn)


def mmu_spte_update(kvm: Kvm, sptep: int, new: int, gfn: int = -1) -> bool:
    """Change the bits of a leaf, or store a first one; its frame stays. Whether a flush is due.

    `gfn`: what it maps, if its page does not know yet.
    """
    masks = kvm.spte
    old = kvm.ram.u64[sptep]
    if not is_shadow_present_pte(old):
        mmu_spte_set(kvm, sptep, new, gfn)
        return False
    old = _update_clear_spte(kvm, sptep, old, new)
    if spte_to_pfn(old) != spte_to_pfn(new):
        raise BrokenTruth("spte-pfn-in-place", f"present leaf {old:#x} replaced by {new:#x} of another frame")
    _changed(kvm, sptep, old, new, gfn)
    if not kvm.profile.flush_on_lost_bits:
        return masks.leaf_spte_change_needs_tlb_flush(old, new)
    fixable = old & masks.host_writable and old & masks.mmu_writable
    lost_a = masks.is_accessed_spte(old) and not masks.is_accessed_spte(new)
    lost_d = is_dirty_spte(kvm, old) and not is_dirty_spte(kvm, new)
    return bool(fixable and not new & PT_WRITABLE_MASK) or lost_a or lost_d


def mmu_spte_clear_track_bits(kvm: Kvm, sptep: int, why: str) -> int:
    """Make a leaf not present; what it was. `why` is for the trace. The rmap is the caller's."""
    u64 = kvm.ram.u64
    old = u64[sptep]
    if not is_shadow_present_pte(old):
        u64[sptep] = SHADOW_NONPRESENT_VALUE
        return old
    old = _update_clear_spte(kvm, sptep, old, SHADOW_NONPRESENT_VALUE)
    sp = kvm.sps[sptep >> 9]
    level = sp.level
    gfn = kvm_mmu_page_get_gfn(sp, sptep & 511)
    kvm.stat[("pages_4k", "pages_2m", "pages_1g")[level - 1]] -= 1
    kvm.instrumented.discard(sptep)
    _changed(kvm, sptep, old, SHADOW_NONPRESENT_VALUE)
    if (t := kvm.trace.spte_zap) is not None:
        kvm.killed_by.zapped(gfn, level, t(gfn, level, old, why))
    return old


def mmu_spte_clear_no_track(kvm: Kvm, sptep: int) -> None:
    """Clear an entry that is no leaf: a pointer to a table, or MMIO."""
    kvm.ram.u64[sptep] = SHADOW_NONPRESENT_VALUE


def spte_write_protect(kvm: Kvm, sptep: int, pt_protect: bool) -> bool:
    """Take W, with `pt_protect` the right to get it back without mmu_lock, too. Whether a flush is due."""
    spte = kvm.ram.u64[sptep]
    if not spte & PT_WRITABLE_MASK and not (pt_protect and spte & kvm.spte.mmu_writable):
        return False
    if pt_protect:
        spte &= ~kvm.spte.mmu_writable
    return mmu_spte_update(kvm, sptep, spte & ~PT_WRITABLE_MASK)


def spte_clear_dirty(kvm: Kvm, sptep: int) -> bool:
    """Take D, so that the next write is logged again. Whether a flush is due."""
    return mmu_spte_update(kvm, sptep, kvm.ram.u64[sptep] & ~kvm.spte.dirty)


def test_and_clear_writable(kvm: Kvm, sptep: int) -> bool:
    """Take W atomically; whether it was there, and the page then is dirty."""
    old = fetch_and64(kvm, sptep, kvm.ram.u64[sptep], PT_WRITABLE_MASK)
    if not old & PT_WRITABLE_MASK:
        return False
    _changed(kvm, sptep, old, old & ~PT_WRITABLE_MASK)
    return True


def mmu_spte_age(kvm: Kvm, sptep: int, test_only: bool) -> bool:
    """Whether the leaf was accessed; it is not any more unless `test_only`.

    Called without mmu_lock, in 5.10 with it. The leaf is in an rmap that is kept as it is meanwhile.
    """
    masks = kvm.spte
    old = kvm.ram.u64[sptep]
    if not is_shadow_present_pte(old) or not masks.is_accessed_spte(old):
        return False
    if test_only:
        return True
    if spte_ad_enabled(old):
        old = fetch_and64(kvm, sptep, old, masks.accessed)
        new = old & ~masks.accessed
    else:
        new = masks.mark_spte_for_access_track(old)
        if not try_cmpxchg64(kvm, sptep, old, new):
            return True
    if is_shadow_present_pte(old) and is_last_spte(old, kvm.sps[sptep >> 9].level):
        _changed(kvm, sptep, old, new, aged=True)
    for vcpu in kvm.vcpus:
        kvm.cpu.evict_tlb(vcpu)
    return True
