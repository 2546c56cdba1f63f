"""Zapping shadow pages and what is in them, and how many there may be.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): drop_spte, drop_large_spte, drop_parent_pte,
mmu_page_zap_pte, mmu_zap_unsync_children, kvm_mmu_prepare_zap_page, kvm_mmu_commit_zap_page,
kvm_mmu_remote_flush_or_zap, kvm_mmu_zap_oldest_mmu_pages, make_mmu_pages_available, kvm_mmu_change_mmu_pages,
kvm_zap_obsolete_pages, kvm_mmu_zap_all; 5.10: kvm_mmu_zap_oldest_mmu_pages.

Pages go when their generation is obsolete, when there are too many, when the guest uses a table as something
else, or with the VM: prepare empties and unlinks them under mmu_lock, commit asks for the flush and frees
them. A page takes the unsync ones below it along; what else hangs below stays in the hash, without a parent.
The kernel's flush waits in commit for walkers without mmu_lock; here the frame is freed when the last of them
is out (rcu.py).

All under mmu_lock for write. `kvm.active_mmu_pages` holds the newest last.

Not modelled: NX huge-page accounting, zap of children with nested roles.
"""

from __future__ import annotations

from errno import ENOSPC
from functools import partial
from typing import TYPE_CHECKING

from host_mm.page import put_page
from kvm_model.mmu.mmu_internal import ROLE_INVALID, KvmMmuPage, is_obsolete_sp, page_args
from kvm_model.mmu.rmap import pte_list_remove, rmap_remove, rmap_sptes
from kvm_model.mmu.shadow_account import unaccount_shadowed
from kvm_model.mmu.shadow_spte import mmu_spte_clear_no_track, mmu_spte_clear_track_bits
from kvm_model.mmu.spte import is_last_spte, is_shadow_present_pte, spte_to_pfn
from kvm_model.mmu.tdp_zap import need_resched
from kvm_model.mmu.unsync import (
    MmuPagePath,
    for_each_sp,
    kvm_unlink_unsync_page,
    mmu_pages_clear_parents,
    mmu_unsync_walk,
    sp_has_gptes,
)
from kvm_model.requests import (
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    kvm_flush_remote_tlbs,
    kvm_flush_remote_tlbs_gfn,
    kvm_make_all_cpus_request,
)

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = [
    "drop_large_spte", "drop_parent_pte", "drop_spte", "kvm_mmu_available_pages", "kvm_mmu_change_mmu_pages",
    "kvm_mmu_commit_zap_page", "kvm_mmu_prepare_zap_page", "kvm_mmu_remote_flush_or_zap",
    "kvm_mmu_zap_all_shadow_pages", "kvm_mmu_zap_oldest_mmu_pages", "kvm_zap_obsolete_pages",
    "make_mmu_pages_available", "mmu_page_zap_pte",
]

_BATCH_ZAP_PAGES = 10
_KVM_MIN_FREE_MMU_PAGES = 5
_KVM_REFILL_PAGES = 25


# -- entries ------------------------------------------------------------------------------------


def drop_spte(kvm: Kvm, sptep: int, why: str) -> None:
    """Zap a leaf and forget it in its rmap."""
    if is_shadow_present_pte(mmu_spte_clear_track_bits(kvm, sptep, why)):
        rmap_remove(kvm, sptep)


def drop_large_spte(kvm: Kvm, sptep: int, flush: bool) -> None:
    """Zap a huge leaf, if there is one, that a table is to replace."""
    if not is_shadow_present_pte(kvm.ram.u64[sptep]):
        return
    sp = kvm.sps[sptep >> 9]
    drop_spte(kvm, sptep, "split")
    if flush:
        kvm_flush_remote_tlbs_gfn(kvm, sp.gfn, sp.level)


def drop_parent_pte(kvm: Kvm, sp: KvmMmuPage, parent_pte: int) -> None:
    """Unlink a table from one of the SPTEs that point to it."""
    pte_list_remove(sp.parent_ptes, parent_pte)
    mmu_spte_clear_no_track(kvm, parent_pte)


def mmu_page_zap_pte(kvm: Kvm, sp: KvmMmuPage, sptep: int, spte: int, why: str) -> None:
    """Clear one entry, whatever it is; the flush is the caller's."""
    if is_shadow_present_pte(spte):
        if is_last_spte(spte, sp.level):
            drop_spte(kvm, sptep, why)
        else:
            drop_parent_pte(kvm, kvm.sps[spte_to_pfn(spte)], sptep)
    elif kvm.spte.is_mmio_spte(spte):
        mmu_spte_clear_no_track(kvm, sptep)


# -- pages --------------------------------------------------------------------------------------


def _mmu_zap_unsync_children(kvm: Kvm, parent: KvmMmuPage, invalid_list: list[KvmMmuPage], why: str) -> int:
    zapped = 0
    path = MmuPagePath()
    while pages := mmu_unsync_walk(kvm, parent):
        for sp in for_each_sp(pages, path):
            kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, why)
            mmu_pages_clear_parents(path)
            zapped += 1
    return zapped


def kvm_mmu_prepare_zap_page(kvm: Kvm, sp: KvmMmuPage, invalid_list: list[KvmMmuPage], why: str) -> int:
    """Empty and unlink a page; how many pages that put on `invalid_list`. A root in use is freed later."""
    if (t := kvm.trace.kvm_mmu_prepare_zap_page) is not None:
        t(*page_args(sp))
    kvm.stat["mmu_shadow_zapped"] += 1
    zapped = _mmu_zap_unsync_children(kvm, sp, invalid_list, why)
    table = sp.spt << 9
    for sptep, spte in enumerate(kvm.ram.u64[table : table + 512].tolist(), table):
        mmu_page_zap_pte(kvm, sp, sptep, spte, why)
    while (parent := next(rmap_sptes(sp.parent_ptes), None)) is not None:
        drop_parent_pte(kvm, sp, parent)
    if sp_has_gptes(sp) and not sp.invalid:
        unaccount_shadowed(kvm, sp)
    if sp.unsync:
        kvm_unlink_unsync_page(kvm, sp)
    kvm.active_mmu_pages.pop(sp.spt, None)
    zapped_root = False
    if sp.root_count:
        # An obsolete root has been asked for already.
        zapped_root = not is_obsolete_sp(kvm, sp)
    else:
        zapped += 1
        invalid_list.append(sp)
        kvm.n_used_mmu_pages -= 1
    sp.role |= ROLE_INVALID
    # After it was marked: a vCPU that is asked must see it.
    if zapped_root:
        kvm_make_all_cpus_request(kvm, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS)
    return zapped


def _kvm_mmu_free_shadow_page(kvm: Kvm, sp: KvmMmuPage) -> None:
    kvm.sps.pop(sp.spt, None)
    put_page(kvm.host, sp.spt)


def kvm_mmu_commit_zap_page(kvm: Kvm, invalid_list: list[KvmMmuPage]) -> None:
    """Flush all vCPUs, then free what prepare put on the list; nothing to do, nothing flushed."""
    if not invalid_list:
        return
    kvm_flush_remote_tlbs(kvm)
    for sp in invalid_list:
        pages = kvm.mmu_page_hash[sp.gfn]
        pages.remove(sp)
        if not pages:
            del kvm.mmu_page_hash[sp.gfn]
        kvm.rcu.call_rcu(partial(_kvm_mmu_free_shadow_page, kvm, sp))
    invalid_list.clear()


def kvm_mmu_remote_flush_or_zap(kvm: Kvm, invalid_list: list[KvmMmuPage], remote_flush: bool) -> None:
    """Free what is on the list, which flushes, or only flush if that is due."""
    if invalid_list:
        kvm_mmu_commit_zap_page(kvm, invalid_list)
    elif remote_flush:
        kvm_flush_remote_tlbs(kvm)


def _break_lock(kvm: Kvm) -> bool:
    if not need_resched(kvm):
        return False
    kvm.mmu_lock.unlock()
    kvm.sched.yield_()
    kvm.mmu_lock.lock()
    return True


def kvm_zap_obsolete_pages(kvm: Kvm) -> None:
    """Zap the pages of generations that are over, oldest first, with lock breaks. slots_lock is held."""
    invalid_list: list[KvmMmuPage] = []
    batch = 0
    while kvm.active_mmu_pages:
        sp = next(iter(kvm.active_mmu_pages.values()))
        if not is_obsolete_sp(kvm, sp):
            break
        if batch >= _BATCH_ZAP_PAGES and _break_lock(kvm):
            batch = 0
            continue
        zapped = kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "zap-root")
        if kvm.profile.obsolete_zap_breaks_lock:
            batch += zapped
    kvm_mmu_commit_zap_page(kvm, invalid_list)


def kvm_mmu_zap_all_shadow_pages(kvm: Kvm) -> None:
    """The part of kvm_mmu_zap_all that is not the TDP MMU's: every page goes."""
    invalid_list: list[KvmMmuPage] = []
    while kvm.active_mmu_pages:
        sp = next(reversed(kvm.active_mmu_pages.values()))
        kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "zap-all")
        _break_lock(kvm)
    kvm_mmu_commit_zap_page(kvm, invalid_list)


# -- how many -----------------------------------------------------------------------------------


def kvm_mmu_zap_oldest_mmu_pages(kvm: Kvm, nr_to_zap: int) -> int:
    """Zap at least so many pages if there are, no roots in use, mmu_lock held for write; how many."""
    invalid_list: list[KvmMmuPage] = []
    pages = list(kvm.active_mmu_pages.values())
    if kvm.profile.recycles_newest_pages:
        pages.reverse()
    zapped = 0
    for sp in pages:
        # A root in use would only be loaded again; one may be gone with its parent.
        if not sp.root_count and sp.spt in kvm.active_mmu_pages:
            zapped += kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "recycle")
            if zapped >= nr_to_zap:
                break
    kvm_mmu_commit_zap_page(kvm, invalid_list)
    kvm.stat["mmu_recycled"] += zapped
    return zapped


def kvm_mmu_available_pages(kvm: Kvm) -> int:
    """How many more table pages the VM may have."""
    return max(kvm.n_max_mmu_pages - kvm.n_used_mmu_pages, 0)


def make_mmu_pages_available(kvm: Kvm) -> int:
    """Have room for one fault's table pages, by zapping others. 0 or -ENOSPC."""
    available = kvm_mmu_available_pages(kvm)
    if available >= _KVM_MIN_FREE_MMU_PAGES:
        return 0
    kvm_mmu_zap_oldest_mmu_pages(kvm, _KVM_REFILL_PAGES - available)
    return 0 if kvm_mmu_available_pages(kvm) else -ENOSPC


def kvm_mmu_change_mmu_pages(kvm: Kvm, goal: int) -> None:
    """Set how many table pages the VM may have; what it has too many is zapped."""
    with kvm.mmu_lock:
        if kvm.n_used_mmu_pages > goal:
            kvm_mmu_zap_oldest_mmu_pages(kvm, kvm.n_used_mmu_pages - goal)
            goal = kvm.n_used_mmu_pages
        kvm.n_max_mmu_pages = goal
