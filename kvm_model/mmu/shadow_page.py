"""Shadow pages: struct kvm_mmu_page outside the TDP MMU. Finding, making and linking them.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): kvm_mmu_find_shadow_page, kvm_mmu_alloc_shadow_page,
kvm_mmu_get_shadow_page, kvm_mmu_child_role, kvm_mmu_get_child_sp, link_shadow_page, validate_direct_spte;
5.10: kvm_mmu_get_page.

A page is found by its gfn and role word: pages that shadow the same guest table with other rights on the way
to it, or in another mode of the CPU, are other pages. It outlives its parent: one that a huge SPTE replaced
stays in the hash with its SPTEs, which their rmaps keep right, and is linked again when the huge SPTE goes.

A page may have become stale while no vCPU could reach it: before it is linked it is synced, for the CPU is
not told when the guest's entry above it becomes present.

All under mmu_lock for write. `kvm.active_mmu_pages` holds the newest last.

Not modelled: collisions of the hash, nested roles; 5.10's link of tables whose children are not synced yet
(it has them synced before the next entry, which comes after others could have used them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.mmu_internal import (
    ROLE_CR0_WP,
    ROLE_DIRECT,
    ROLE_INVALID,
    ROLE_PASSTHROUGH,
    KvmMmuPage,
    is_obsolete_sp,
    page_args,
    role_access,
    role_direct,
    role_has_4_byte_gpte,
    role_with_access,
    role_with_quadrant,
)
from kvm_model.mmu.rmap import RmapHead, pte_list_add
from kvm_model.mmu.shadow_account import account_shadowed
from kvm_model.mmu.shadow_spte import mmu_spte_set
from kvm_model.mmu.shadow_sync import kvm_sync_page
from kvm_model.mmu.shadow_zap import (
    drop_large_spte,
    drop_parent_pte,
    kvm_mmu_commit_zap_page,
    kvm_mmu_prepare_zap_page,
)
from kvm_model.mmu.spte import (
    PG_LEVEL_1G,
    PG_LEVEL_4K,
    is_large_pte,
    is_shadow_present_pte,
    spte_to_pfn,
)
from kvm_model.mmu.unsync import mark_unsync
from kvm_model.requests import kvm_flush_remote_tlbs, kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "kvm_mmu_child_role", "kvm_mmu_get_child_sp", "kvm_mmu_get_shadow_page", "link_shadow_page",
    "validate_direct_spte",
]


# -- finding and making -------------------------------------------------------------------------


def _is_same_role(kvm: Kvm, sp: KvmMmuPage, role: int) -> bool:
    if sp.role == role:
        return True
    if not kvm.breaks or role_direct(role):
        return False
    if "ignore-role-access" in kvm.breaks:
        return role_with_access(sp.role, role_access(role)) == role
    return "ignore-role-wp" in kvm.breaks and not (sp.role ^ role) & ~ROLE_CR0_WP


def _find(vcpu: Vcpu, gfn: int, role: int, invalid_list: list[KvmMmuPage]) -> KvmMmuPage | None:
    kvm = vcpu.kvm
    for sp in tuple(kvm.mmu_page_hash.get(gfn, ())):
        if is_obsolete_sp(kvm, sp):
            continue
        if not _is_same_role(kvm, sp, role):
            # The upper table will be write-protected, which an unsync page contradicts; it is an old one.
            if role & 15 > PG_LEVEL_4K and sp.unsync:
                kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "other-level")
            continue
        if role_direct(sp.role):
            return sp
        if sp.unsync and "link-unsynced" not in kvm.breaks:
            flush = kvm_sync_page(vcpu, sp, invalid_list)
            if flush < 0:
                break
            if flush:
                kvm_flush_remote_tlbs(kvm)
        sp.write_flooding_count = 0
        return sp
    kvm.stat["mmu_cache_miss"] += 1
    return None


def _kvm_mmu_alloc_shadow_page(vcpu: Vcpu, gfn: int, role: int) -> KvmMmuPage:
    kvm = vcpu.kvm
    sp = KvmMmuPage(vcpu.mmu_shadow_page_cache.pop(), -1, gfn, role)
    sp.tdp_mmu_page = False
    sp.parent_ptes = RmapHead()
    sp.mmu_valid_gen = kvm.mmu_valid_gen
    if not role_direct(role) and sp.level <= PG_LEVEL_1G:
        sp.shadowed_translation = [0] * 512
    kvm.sps[sp.spt] = sp
    kvm.active_mmu_pages[sp.spt] = sp
    kvm.n_used_mmu_pages += 1
    kvm.mmu_page_hash.setdefault(gfn, []).insert(0, sp)
    if not role_direct(role):
        account_shadowed(kvm, sp)
    return sp


def kvm_mmu_get_shadow_page(vcpu: Vcpu, gfn: int, role: int) -> KvmMmuPage:
    """The page of that gfn and role, made if there is none; make_mmu_pages_available was asked before."""
    kvm = vcpu.kvm
    if kvm.shadow_truths is not None:
        kvm.shadow_truths.note_get()
    invalid_list: list[KvmMmuPage] = []
    sp = _find(vcpu, gfn, role, invalid_list)
    kvm_mmu_commit_zap_page(kvm, invalid_list)
    created = sp is None
    if sp is None:
        sp = _kvm_mmu_alloc_shadow_page(vcpu, gfn, role)
    if (t := kvm.trace.kvm_mmu_get_page) is not None:
        t(*page_args(sp), created)
    return sp


def kvm_mmu_child_role(kvm: Kvm, sptep: int, direct: bool, access: int) -> int:
    """The role of a table to hang below the SPTE; below an invalidated root it is no more invalid for it."""
    # The level is the role's lowest bits.
    role = (kvm.sps[sptep >> 9].role - 1) & ~(ROLE_INVALID | ROLE_PASSTHROUGH | ROLE_DIRECT)
    role = role_with_access(role, access)
    if direct:
        role |= ROLE_DIRECT
    if role_has_4_byte_gpte(role):
        # A guest table of 4-byte entries needs two shadow tables: the entry above them says which half.
        role = role_with_quadrant(role, sptep & 1)
    return role


def kvm_mmu_get_child_sp(vcpu: Vcpu, sptep: int, gfn: int, direct: bool, access: int) -> KvmMmuPage | None:
    """A page to hang below the SPTE: direct, or for the guest's table at `gfn`; None if one is there."""
    kvm = vcpu.kvm
    spte = kvm.ram.u64[sptep]
    if is_shadow_present_pte(spte) and not is_large_pte(spte):
        return None
    if kvm.profile.large_spte_dropped_first:
        drop_large_spte(kvm, sptep, True)
    return kvm_mmu_get_shadow_page(vcpu, gfn, kvm_mmu_child_role(kvm, sptep, direct, access))


# -- links --------------------------------------------------------------------------------------


def link_shadow_page(kvm: Kvm, sptep: int, sp: KvmMmuPage) -> None:
    """Let the SPTE point to the table, in place of the huge leaf that may be there."""
    if kvm.shadow_truths is not None:
        kvm.shadow_truths.note_link(sp)
    drop_large_spte(kvm, sptep, True)
    mmu_spte_set(kvm, sptep, kvm.spte.make_nonleaf_spte(sp.spt))
    pte_list_add(sp.parent_ptes, sptep)
    if sp.unsync or sp.unsync_child_bitmap:
        mark_unsync(kvm, sptep)


def validate_direct_spte(kvm: Kvm, sptep: int, direct_access: int) -> None:
    """Unlink a direct table that was made when the guest's huge entry gave other rights."""
    spte = kvm.ram.u64[sptep]
    if not is_shadow_present_pte(spte) or is_large_pte(spte):
        return
    child = kvm.sps[spte_to_pfn(spte)]
    if role_access(child.role) != direct_access:
        drop_parent_pte(kvm, child, sptep)
        kvm_flush_remote_tlbs_gfn(kvm, child.gfn, child.level + 1)
