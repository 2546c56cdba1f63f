"""Dirty logging in the TDP MMU: write protection, clearing dirty, splitting and recovering huge SPTEs.

Source of truth: arch/x86/kvm/mmu/tdp_mmu.c (Linux 6.18): wrprot_gfn_range, clear_dirty_gfn_range,
clear_dirty_pt_masked,
write_protect_gfn, tdp_mmu_split_huge_pages_root, recover_huge_pages_range, tdp_mmu_make_huge_spte.

Not modelled: allocation failure of a split's table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.page import put_page
from host_mm.page_alloc import GFP_KERNEL_ACCOUNT, alloc_pages
from kvm_model.mmu.mmu_internal import KVM_MAX_HUGEPAGE_LEVEL, KvmMmuPage
from kvm_model.mmu.spte import (
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    is_large_pte,
    is_last_spte,
    is_shadow_present_pte,
    kvm_pages_per_hpage,
    spte_to_pfn,
)
from kvm_model.mmu.tdp_iter import TdpIter
from kvm_model.mmu.tdp_mmu import (
    fetch_and64,
    spte_changed,
    tdp_mmu_iter_set_spte,
    tdp_mmu_set_spte_atomic,
    tdp_mmu_split_huge_page,
)
from kvm_model.mmu.tdp_pages import (
    for_each_tdp_mmu_root,
    for_each_tdp_mmu_root_yield_safe,
    init_spt,
    tdp_mmu_init_child_sp,
)
from kvm_model.mmu.tdp_zap import tdp_mmu_iter_cond_resched
from kvm_model.requests import kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = [
    "kvm_tdp_mmu_clear_dirty_pt_masked", "kvm_tdp_mmu_clear_dirty_slot", "kvm_tdp_mmu_recover_huge_pages",
    "kvm_tdp_mmu_try_split_huge_pages", "kvm_tdp_mmu_write_protect_gfn", "kvm_tdp_mmu_wrprot_slot",
]


def kvm_tdp_mmu_wrprot_slot(kvm: Kvm, slot: KvmMemorySlot, min_level: int) -> bool:
    """Take W from the slot's leaves at `min_level` and above, mmu_lock held for read; whether any had it."""
    return _clear_in_slot(kvm, slot, min_level, PT_WRITABLE_MASK)


def kvm_tdp_mmu_clear_dirty_slot(kvm: Kvm, slot: KvmMemorySlot) -> bool:
    """Take D (where there is none, W) from the slot's leaves, mmu_lock held for read; whether any had it."""
    return _clear_in_slot(kvm, slot, PG_LEVEL_4K, _dirty_bit(kvm))


def _dirty_bit(kvm: Kvm) -> int:
    return kvm.spte.dirty if kvm.spte.ad_enabled else PT_WRITABLE_MASK


def _clear_in_slot(kvm: Kvm, slot: KvmMemorySlot, min_level: int, bit: int) -> bool:
    changed = False
    for root in for_each_tdp_mmu_root_yield_safe(kvm, slot.as_id):
        kvm.rcu.read_lock()
        it = TdpIter(kvm.ram, root, min_level, slot.base_gfn, slot.end_gfn, skip_nonpresent=True)
        while it.valid:
            if not tdp_mmu_iter_cond_resched(kvm, it, flush=False, shared=True):
                while (
                    is_shadow_present_pte(it.old_spte) and is_last_spte(it.old_spte, it.level)
                    and it.old_spte & bit
                ):
                    if not tdp_mmu_set_spte_atomic(kvm, it, it.old_spte & ~bit):
                        changed = True
                        break
            it.next()
        kvm.rcu.read_unlock()
    return changed


def kvm_tdp_mmu_clear_dirty_pt_masked(
    kvm: Kvm, slot: KvmMemorySlot, gfn: int, mask: int, *, wrprot: bool
) -> None:
    """Take W, without `wrprot` D, from the 4K leaves of `gfn + bit` for each bit of `mask`.

    mmu_lock is held for write.
    """
    dbit = PT_WRITABLE_MASK if wrprot else _dirty_bit(kvm)
    first = gfn + ((mask & -mask).bit_length() - 1)
    for root in for_each_tdp_mmu_root(kvm, slot.as_id):
        left = mask
        kvm.rcu.read_lock()
        it = TdpIter(kvm.ram, root, PG_LEVEL_4K, first, gfn + 64, skip_nonpresent=True)
        while it.valid and left:
            spte = it.old_spte
            if is_shadow_present_pte(spte) and it.level == PG_LEVEL_4K and left >> (it.gfn - gfn) & 1:
                left &= ~(1 << (it.gfn - gfn))
                if spte & dbit:
                    old = _clear_bits(kvm, it, dbit)
                    spte_changed(kvm, it.sptep, it.gfn, 1, old, old & ~dbit)
            it.next()
        kvm.rcu.read_unlock()


def _clear_bits(kvm: Kvm, it: TdpIter, mask: int) -> int:
    if kvm.spte.spte_needs_atomic_update(it.old_spte):
        return fetch_and64(kvm, it.sptep, it.old_spte, mask)
    kvm.ram.u64[it.sptep] = it.old_spte & ~mask
    return it.old_spte


def kvm_tdp_mmu_write_protect_gfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int, min_level: int) -> bool:
    """Take W and the right to get it back without mmu_lock from the leaf of `gfn`; whether it had them."""
    changed = False
    clear = PT_WRITABLE_MASK | kvm.spte.mmu_writable
    for root in for_each_tdp_mmu_root(kvm, slot.as_id):
        kvm.rcu.read_lock()
        it = TdpIter(kvm.ram, root, min_level, gfn, gfn + 1)
        while it.valid:
            if is_shadow_present_pte(it.old_spte) and is_last_spte(it.old_spte, it.level):
                if not it.old_spte & clear:
                    break
                tdp_mmu_iter_set_spte(kvm, it, it.old_spte & ~clear)
                changed = True
            it.next()
        kvm.rcu.read_unlock()
    return changed


def kvm_tdp_mmu_try_split_huge_pages(
    kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, target_level: int, *, shared: bool
) -> None:
    """Split the huge leaves of [start, end) down to `target_level`; mmu_lock held as `shared` says."""
    for root in for_each_tdp_mmu_root_yield_safe(kvm, slot.as_id):
        _split_root(kvm, root, start, end, target_level, shared)


def _split_root(kvm: Kvm, root: KvmMmuPage, start: int, end: int, target_level: int, shared: bool) -> None:
    spare = -1
    kvm.rcu.read_lock()
    it = TdpIter(kvm.ram, root, target_level + 1, start, end, skip_nonpresent=True)
    while it.valid:
        if not tdp_mmu_iter_cond_resched(kvm, it, flush=False, shared=shared):
            while is_shadow_present_pte(it.old_spte) and is_large_pte(it.old_spte):
                if spare < 0:
                    spare = _alloc_split_spt(kvm, shared)
                    it.yielded = True
                    break
                sp = tdp_mmu_init_child_sp(kvm, spare, it)
                if tdp_mmu_split_huge_page(kvm, it, sp, shared):
                    kvm.sps.pop(spare, None)
                    continue
                spare = -1
                break
        it.next()
    kvm.rcu.read_unlock()
    if spare >= 0:
        put_page(kvm.host, spare)


def _alloc_split_spt(kvm: Kvm, shared: bool) -> int:
    # The allocation may sleep, so both locks are dropped and the walk starts again.
    kvm.rcu.read_unlock()
    lock = kvm.mmu_lock
    unlock, relock = (lock.read_unlock, lock.read_lock) if shared else (lock.unlock, lock.lock)
    unlock()
    pfn = alloc_pages(kvm.host, GFP_KERNEL_ACCOUNT)
    init_spt(kvm, pfn)
    relock()
    kvm.rcu.read_lock()
    return pfn


def kvm_tdp_mmu_recover_huge_pages(
    kvm: Kvm, slot: KvmMemorySlot, max_mapping_level: Callable[[int], int]
) -> None:
    """Replace tables of the slot by huge leaves where `max_mapping_level(gfn)` allows.

    The caller holds mmu_lock for read.
    """
    for root in for_each_tdp_mmu_root_yield_safe(kvm, slot.as_id):
        _recover_range(kvm, root, slot, max_mapping_level)


def _recover_range(
    kvm: Kvm, root: KvmMmuPage, slot: KvmMemorySlot, max_mapping_level: Callable[[int], int]
) -> None:
    start, end = slot.base_gfn, slot.end_gfn
    flush = False
    kvm.rcu.read_lock()
    it = TdpIter(kvm.ram, root, PG_LEVEL_2M, start, end, skip_nonpresent=True)
    while it.valid:
        if tdp_mmu_iter_cond_resched(kvm, it, flush=flush, shared=True):
            flush = False
        else:
            while (
                it.level <= KVM_MAX_HUGEPAGE_LEVEL and is_shadow_present_pte(it.old_spte)
                and not is_last_spte(it.old_spte, it.level) and start <= it.gfn < end
                and max_mapping_level(it.gfn) >= it.level
            ):
                huge = _make_huge_spte(kvm, it)
                if huge < 0:
                    break
                if tdp_mmu_set_spte_atomic(kvm, it, huge, "recover"):
                    continue
                flush = True
                kvm.killed_by.installed(it.gfn, it.level, kvm.stream.seq)
                break
        it.next()
    if flush:
        kvm_flush_remote_tlbs(kvm)
    kvm.rcu.read_unlock()


def _make_huge_spte(kvm: Kvm, parent: TdpIter) -> int:
    """The huge leaf that fits the first present leaf below, or -1 if the table is empty."""
    table = kvm.sps[spte_to_pfn(parent.old_spte)]
    end = parent.gfn + kvm_pages_per_hpage(parent.level)
    it = TdpIter(kvm.ram, table, PG_LEVEL_4K, parent.gfn, end, skip_nonpresent=True)
    while it.valid:
        if is_shadow_present_pte(it.old_spte) and is_last_spte(it.old_spte, it.level):
            return kvm.spte.make_huge_spte(it.old_spte, parent.level)
        it.next()
    return -1
