"""The TDP MMU's zaps: ranges of gfns, whole roots, invalidated roots.

Source of truth: arch/x86/kvm/mmu/tdp_mmu.c (Linux 6.18): tdp_mmu_iter_cond_resched,
tdp_mmu_zap_leafs, tdp_mmu_zap_root, kvm_tdp_mmu_zap_leafs, kvm_tdp_mmu_unmap_gfn_range,
kvm_tdp_mmu_zap_all, kvm_tdp_mmu_invalidate_roots, kvm_tdp_mmu_zap_invalidated_roots.

Not modelled: zapping by NX huge-page recovery, mirror roots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.mmu_internal import KvmMmuPage
from kvm_model.mmu.spte import (
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    SHADOW_NONPRESENT_VALUE,
    is_last_spte,
    is_shadow_present_pte,
)
from kvm_model.mmu.tdp_iter import TDP_MMU_MAX_GFN_EXCLUSIVE, TdpIter
from kvm_model.mmu.tdp_mmu import tdp_mmu_iter_set_spte, tdp_mmu_set_spte_atomic
from kvm_model.mmu.tdp_pages import for_each_tdp_mmu_root_yield_safe, invalidate_root, kvm_tdp_mmu_put_root
from kvm_model.requests import kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = [
    "kvm_tdp_mmu_invalidate_roots", "kvm_tdp_mmu_unmap_gfn_range", "kvm_tdp_mmu_zap_all",
    "kvm_tdp_mmu_zap_invalidated_roots", "kvm_tdp_mmu_zap_leafs", "kvm_tdp_mmu_zap_valid_roots",
    "need_resched", "tdp_mmu_iter_cond_resched",
]


def need_resched(kvm: Kvm) -> bool:
    """Whether a walk that may drop mmu_lock should: somebody wants the lock, or the CPU."""
    if kvm.mmu_lock.wq.waiters:
        return True
    sched = kvm.sched
    strategy = sched.strategy
    return strategy is not None and bool(sched.runnable) and strategy.switch_here("need_resched")


def tdp_mmu_iter_cond_resched(kvm: Kvm, it: TdpIter, *, flush: bool, shared: bool) -> bool:
    """Let others have mmu_lock if they want it; true: the walk must go on with `it.next()`."""
    if it.next_last_level_gfn == it.yielded_gfn or not need_resched(kvm):
        return False
    if flush:
        kvm_flush_remote_tlbs(kvm)
    kvm.rcu.read_unlock()
    lock = kvm.mmu_lock
    if shared:
        lock.read_unlock()
        kvm.sched.yield_()
        lock.read_lock()
    else:
        lock.unlock()
        kvm.sched.yield_()
        lock.lock()
    kvm.rcu.read_lock()
    it.yielded = True
    return True


def _zap_leafs(
    kvm: Kvm, root: KvmMmuPage, start: int, end: int, *, can_yield: bool, flush: bool, why: str
) -> bool:
    kvm.rcu.read_lock()
    it = TdpIter(kvm.ram, root, PG_LEVEL_4K, start, end, skip_nonpresent=True)
    while it.valid:
        if can_yield and tdp_mmu_iter_cond_resched(kvm, it, flush=flush, shared=False):
            flush = False
        elif is_shadow_present_pte(it.old_spte) and is_last_spte(it.old_spte, it.level):
            tdp_mmu_iter_set_spte(kvm, it, SHADOW_NONPRESENT_VALUE, why)
            # vCPUs flush when they drop an invalid root, before it can be zapped.
            if not root.invalid:
                flush = True
                if kvm.truths is not None:
                    kvm.truths.note_flush_due()
        it.next()
    kvm.rcu.read_unlock()
    return flush


def kvm_tdp_mmu_zap_leafs(kvm: Kvm, start: int, end: int, flush: bool) -> bool:
    """Zap [start, end) in the valid roots, mmu_lock held for write; whether a flush is due."""
    for root in for_each_tdp_mmu_root_yield_safe(kvm):
        flush = _zap_leafs(kvm, root, start, end, can_yield=True, flush=flush, why="zap-range")
    return flush


def kvm_tdp_mmu_unmap_gfn_range(
    kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, *, may_block: bool, why: str
) -> bool:
    """Zap [start, end) in all roots of the slot's address space, invalid ones too: the notifier's unmap.

    Whether a flush is due.
    """
    flush = False
    invalid = "ignore-invalid-roots" not in kvm.breaks
    for root in for_each_tdp_mmu_root_yield_safe(kvm, slot.as_id, invalid=invalid):
        flush = _zap_leafs(kvm, root, start, end, can_yield=may_block, flush=flush, why=why)
    return flush


def _zap_root_level(kvm: Kvm, root: KvmMmuPage, shared: bool, zap_level: int, why: str) -> None:
    it = TdpIter(kvm.ram, root, zap_level, 0, TDP_MMU_MAX_GFN_EXCLUSIVE, skip_nonpresent=True)
    while it.valid:
        if not tdp_mmu_iter_cond_resched(kvm, it, flush=False, shared=shared):
            while is_shadow_present_pte(it.old_spte) and it.level <= zap_level:
                if not shared:
                    tdp_mmu_iter_set_spte(kvm, it, SHADOW_NONPRESENT_VALUE, why)
                elif tdp_mmu_set_spte_atomic(kvm, it, SHADOW_NONPRESENT_VALUE, why):
                    continue
                break
        it.next()


def _zap_root(kvm: Kvm, root: KvmMmuPage, shared: bool, why: str) -> None:
    # Fine grained first, so that the lock can be dropped between small steps.
    kvm.rcu.read_lock()
    for level in (PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, root.level):
        _zap_root_level(kvm, root, shared, level, why)
    kvm.rcu.read_unlock()


def kvm_tdp_mmu_zap_all(kvm: Kvm) -> None:
    """Zap every root, invalid ones too, mmu_lock held for write. No flush: no vCPU will run again."""
    for root in for_each_tdp_mmu_root_yield_safe(kvm, invalid=True):
        _zap_root(kvm, root, False, "zap-all")


def kvm_tdp_mmu_zap_valid_roots(kvm: Kvm) -> None:
    """kvm_tdp_mmu_zap_all of 5.10, mmu_lock held for write: roots stay valid and empty, all is flushed."""
    flush = False
    for root in for_each_tdp_mmu_root_yield_safe(kvm):
        kvm.rcu.read_lock()
        it = TdpIter(kvm.ram, root, root.level, 0, TDP_MMU_MAX_GFN_EXCLUSIVE, skip_nonpresent=True)
        while it.valid:
            if tdp_mmu_iter_cond_resched(kvm, it, flush=flush, shared=False):
                flush = False
            elif is_shadow_present_pte(it.old_spte):
                tdp_mmu_iter_set_spte(kvm, it, SHADOW_NONPRESENT_VALUE, "zap-root")
                flush = True
                if kvm.truths is not None:
                    kvm.truths.note_flush_due()
            it.next()
        kvm.rcu.read_unlock()
    if flush:
        kvm_flush_remote_tlbs(kvm)


def kvm_tdp_mmu_invalidate_roots(kvm: Kvm) -> None:
    """Mark every root invalid, so that no vCPU takes it again; the zap comes later."""
    for root in kvm.tdp_mmu_roots:
        invalidate_root(root)


def kvm_tdp_mmu_zap_invalidated_roots(kvm: Kvm, *, shared: bool) -> None:
    """Zap the roots that were invalidated and drop the MMU's own references to them."""
    lock = kvm.mmu_lock
    if shared:
        lock.read_lock()
    else:
        lock.lock()
    for root in for_each_tdp_mmu_root_yield_safe(kvm, invalid=True):
        if root.scheduled_to_zap:
            root.scheduled_to_zap = False
            _zap_root(kvm, root, shared, "zap-root")
            # After the zap: until then notifiers must find the root.
            kvm_tdp_mmu_put_root(kvm, root)
    if shared:
        lock.read_unlock()
    else:
        lock.unlock()
