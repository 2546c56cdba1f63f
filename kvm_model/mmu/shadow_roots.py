"""Roots outside the TDP MMU: made, freed, kept for when the guest's CR3 comes back, and synced.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): mmu_alloc_root, mmu_alloc_direct_roots,
mmu_alloc_shadow_roots, mmu_free_root_page, kvm_mmu_free_roots, is_root_usable, cached_root_find_*,
fast_pgd_switch, kvm_mmu_new_pgd, is_unsync_root, kvm_mmu_sync_roots, kvm_mmu_sync_prev_roots,
kvm_mmu_free_obsolete_roots; 5.10: __kvm_mmu_new_pgd.

A root shadows the guest's top table; in 64-bit paging it is a shadow page like others. Outside it the CPU
gets a page of four entries, each for a quarter of 4 GiB: the guest's PAE page directories, four views of one
32-bit page directory, or direct pages while paging is off. Where CR3 points to no memory the root is a page
of zeros.

A vCPU keeps the last three 64-bit roots, with a reference each. A CR3 write that finds its root among them
need not build anything; that it flushes is asked for separately. What is in a root that a vCPU does not run
on may be stale, so it is synced, or dropped, when the guest flushes.

Not modelled: nested guests' roots; force_flush_and_sync_on_reuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.guest_access import kvm_is_visible_memslot, kvm_vcpu_gfn_to_memslot
from kvm_model.mmu.kvm_mmu import (
    KVM_MMU_NUM_PREV_ROOTS,
    PT32_ROOT_LEVEL,
    PT32E_ROOT_LEVEL,
    PT64_ROOT_4LEVEL,
)
from kvm_model.mmu.mmio import MMIO_GVA_ANY, vcpu_clear_mmio_info
from kvm_model.mmu.mmu_internal import (
    INVALID_PAGE,
    KvmMmuPage,
    is_obsolete_sp,
    role_direct,
    role_with_level,
    role_with_quadrant,
)
from kvm_model.mmu.paging_tmpl import kvm_pdptr_read
from kvm_model.mmu.shadow_page import kvm_mmu_get_shadow_page
from kvm_model.mmu.shadow_sync import mmu_sync_children
from kvm_model.mmu.shadow_walk import kvm_mmu_get_dummy_root, kvm_mmu_is_dummy_root, shadow_root_to_sp
from kvm_model.mmu.shadow_zap import (
    kvm_mmu_commit_zap_page,
    kvm_mmu_prepare_zap_page,
    make_mmu_pages_available,
)
from kvm_model.mmu.spte import spte_to_pfn
from kvm_model.requests import KVM_REQ_LOAD_MMU_PGD, kvm_make_request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "PREV_ROOTS_ALL", "kvm_mmu_free_shadow_roots", "kvm_mmu_new_pgd", "kvm_mmu_sync_prev_roots",
    "kvm_mmu_sync_roots", "mmu_alloc_direct_roots", "mmu_alloc_shadow_roots", "obsolete_shadow_roots",
]

PREV_ROOTS_ALL = tuple(range(KVM_MMU_NUM_PREV_ROOTS))
_PT_PRESENT_MASK = 1
_CR3_ADDR_MASK = 0x000F_FFFF_FFFF_F000
_NO_ROOT = (-1, INVALID_PAGE)


# -- making -------------------------------------------------------------------------------------


def _mmu_alloc_root(vcpu: Vcpu, gfn: int, quadrant: int, level: int) -> int:
    """The address of a root page, with a reference; mmu_lock held for write."""
    role = role_with_quadrant(role_with_level(vcpu.mmu.root_role, level), quadrant)
    sp = kvm_mmu_get_shadow_page(vcpu, gfn, role)
    sp.root_count += 1
    return sp.spt << 12


def _set_pae_root(vcpu: Vcpu, index: int, root: int) -> None:
    vcpu.kvm.ram.u64[vcpu.mmu.pae_root << 9 | index] = root | _PT_PRESENT_MASK if root else 0


def mmu_alloc_direct_roots(vcpu: Vcpu) -> int:
    """Give the vCPU a root of direct pages, which vCPUs share. 0 or a negative errno."""
    kvm, mmu = vcpu.kvm, vcpu.mmu
    with kvm.mmu_lock:
        r = make_mmu_pages_available(kvm)
        if r < 0:
            return r
        if mmu.root_level >= PT64_ROOT_4LEVEL:
            vcpu.root_hpa = _mmu_alloc_root(vcpu, 0, 0, mmu.root_level)
        else:
            for index in range(4):
                _set_pae_root(vcpu, index, _mmu_alloc_root(vcpu, index << 18, 0, PT32_ROOT_LEVEL))
            vcpu.root_hpa = mmu.pae_root << 12
        mmu.root_pgd = 0
    return 0


def _is_visible(vcpu: Vcpu, gfn: int) -> bool:
    slot = kvm_vcpu_gfn_to_memslot(vcpu, gfn)
    return slot is not None and kvm_is_visible_memslot(slot)


def _guest_pdptrs(vcpu: Vcpu) -> list[int]:
    """The guest's PDPTEs, 0 for those that lead nowhere."""
    pdptrs = [kvm_pdptr_read(vcpu, index) for index in range(4)]
    return [pdpte if pdpte & _PT_PRESENT_MASK and _is_visible(vcpu, pdpte >> 12) else 0 for pdpte in pdptrs]


def _alloc_pae_roots(vcpu: Vcpu, root_gfn: int, pdptrs: list[int]) -> None:
    is_pae = vcpu.mmu.guest_level == PT32E_ROOT_LEVEL
    for index in range(4):
        gfn, quadrant = root_gfn, index
        if is_pae:
            if not pdptrs[index]:
                _set_pae_root(vcpu, index, 0)
                continue
            gfn, quadrant = pdptrs[index] >> 12, 0
        _set_pae_root(vcpu, index, _mmu_alloc_root(vcpu, gfn, quadrant, PT32_ROOT_LEVEL))


def mmu_alloc_shadow_roots(vcpu: Vcpu) -> int:
    """Give the vCPU a root that shadows what its CR3 points to. 0 or a negative errno."""
    kvm, mmu = vcpu.kvm, vcpu.mmu
    root_pgd = kvm.cpu.get_reg(vcpu, "cr3")
    root_gfn = (root_pgd & _CR3_ADDR_MASK) >> 12
    if not _is_visible(vcpu, root_gfn):
        vcpu.root_hpa = kvm_mmu_get_dummy_root(kvm)
        return 0
    pdptrs = _guest_pdptrs(vcpu) if mmu.guest_level == PT32E_ROOT_LEVEL else []
    if not kvm.shadow_root_allocated:
        with kvm.slots_arch_lock:
            kvm.shadow_root_allocated = True
    with kvm.mmu_lock:
        r = make_mmu_pages_available(kvm)
        if r < 0:
            return r
        if mmu.guest_level >= PT64_ROOT_4LEVEL:
            vcpu.root_hpa = _mmu_alloc_root(vcpu, root_gfn, 0, mmu.root_level)
        else:
            _alloc_pae_roots(vcpu, root_gfn, pdptrs)
            vcpu.root_hpa = mmu.pae_root << 12
        mmu.root_pgd = root_pgd
    return 0


# -- freeing ------------------------------------------------------------------------------------


def _mmu_free_root_page(kvm: Kvm, root_hpa: int, invalid_list: list[KvmMmuPage]) -> None:
    """Drop a reference; a valid root stays for whoever loads it next."""
    sp = kvm.sps[root_hpa >> 12]
    sp.root_count -= 1
    if not sp.root_count and sp.invalid:
        kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "zap-root")


def _free_current_root(vcpu: Vcpu, invalid_list: list[KvmMmuPage]) -> None:
    kvm, mmu = vcpu.kvm, vcpu.mmu
    root = vcpu.root_hpa
    if not kvm_mmu_is_dummy_root(kvm, root):
        if shadow_root_to_sp(kvm, root) is not None:
            _mmu_free_root_page(kvm, root, invalid_list)
        else:
            for index in range(4):
                entry = kvm.ram.u64[mmu.pae_root << 9 | index]
                if entry:
                    _mmu_free_root_page(kvm, spte_to_pfn(entry) << 12, invalid_list)
                    _set_pae_root(vcpu, index, 0)
    vcpu.root_hpa = INVALID_PAGE
    mmu.root_pgd = -1


def kvm_mmu_free_shadow_roots(vcpu: Vcpu, *, current: bool = False, prev: Iterable[int] = ()) -> None:
    """kvm_mmu_free_roots without TDP MMU: the present root, and those of these indices kept for later."""
    kvm, prev_roots = vcpu.kvm, vcpu.mmu.prev_roots
    todo = [index for index in prev if prev_roots[index][1] != INVALID_PAGE]
    current = current and vcpu.root_hpa != INVALID_PAGE
    if not current and not todo:
        return
    invalid_list: list[KvmMmuPage] = []
    with kvm.mmu_lock:
        for index in todo:
            _mmu_free_root_page(kvm, prev_roots[index][1], invalid_list)
            prev_roots[index] = _NO_ROOT
        if current:
            _free_current_root(vcpu, invalid_list)
        kvm_mmu_commit_zap_page(kvm, invalid_list)


def _is_obsolete_root(kvm: Kvm, root_hpa: int) -> bool:
    """Special roots count as obsolete: whether they are cannot be seen."""
    if root_hpa == INVALID_PAGE:
        return False
    sp = shadow_root_to_sp(kvm, root_hpa)
    return sp is None or is_obsolete_sp(kvm, sp)


def obsolete_shadow_roots(vcpu: Vcpu) -> tuple[bool, list[int]]:
    """Which of the vCPU's roots it must drop: whether the present one, and the indices of others."""
    kvm = vcpu.kvm
    prev = [index for index, (_, hpa) in enumerate(vcpu.mmu.prev_roots) if _is_obsolete_root(kvm, hpa)]
    return _is_obsolete_root(kvm, vcpu.root_hpa), prev


# -- a new CR3 ----------------------------------------------------------------------------------


def _is_root_usable(kvm: Kvm, root: tuple[int, int], pgd: int, role: int) -> bool:
    if root[1] == INVALID_PAGE or (not role_direct(role) and pgd != root[0]):
        return False
    sp = shadow_root_to_sp(kvm, root[1])
    assert sp is not None, "a special root is not kept"
    return sp.role == role


def _swap_root(vcpu: Vcpu, index: int) -> None:
    mmu = vcpu.mmu
    current = mmu.root_pgd, vcpu.root_hpa
    mmu.root_pgd, vcpu.root_hpa = mmu.prev_roots[index]
    mmu.prev_roots[index] = current


def _find_and_keep_current(vcpu: Vcpu, pgd: int, role: int) -> bool:
    """cached_root_find_and_keep_current: the present root becomes the latest of those kept."""
    kvm, mmu = vcpu.kvm, vcpu.mmu
    if _is_root_usable(kvm, (mmu.root_pgd, vcpu.root_hpa), pgd, role):
        return True
    for index in PREV_ROOTS_ALL:
        # One by one the kept roots pass through the present one's place, and so move down by one.
        _swap_root(vcpu, index)
        if _is_root_usable(kvm, (mmu.root_pgd, vcpu.root_hpa), pgd, role):
            return True
    kvm_mmu_free_shadow_roots(vcpu, current=True)
    return False


def _find_without_current(vcpu: Vcpu, pgd: int, role: int) -> bool:
    mmu = vcpu.mmu
    for index in PREV_ROOTS_ALL:
        if _is_root_usable(vcpu.kvm, mmu.prev_roots[index], pgd, role):
            mmu.root_pgd, vcpu.root_hpa = mmu.prev_roots.pop(index)
            mmu.prev_roots.append(_NO_ROOT)
            return True
    return False


def _fast_pgd_switch(vcpu: Vcpu, pgd: int, role: int) -> bool:
    if vcpu.root_hpa != INVALID_PAGE and shadow_root_to_sp(vcpu.kvm, vcpu.root_hpa) is None:
        kvm_mmu_free_shadow_roots(vcpu, current=True)
    if vcpu.root_hpa != INVALID_PAGE:
        return _find_and_keep_current(vcpu, pgd, role)
    return _find_without_current(vcpu, pgd, role)


def kvm_mmu_new_pgd(vcpu: Vcpu, new_pgd: int) -> None:
    """The guest's CR3 is about to be `new_pgd`: go on with the root for it, if one was kept.

    Otherwise the vCPU is without root until it loads one for the next entry. Syncing and flushing are the
    caller's to ask for.
    """
    role = vcpu.mmu.root_role
    if not _fast_pgd_switch(vcpu, new_pgd, role):
        return
    kvm_make_request(KVM_REQ_LOAD_MMU_PGD, vcpu)
    vcpu_clear_mmio_info(vcpu, MMIO_GVA_ANY)
    if not role_direct(role):
        sp = shadow_root_to_sp(vcpu.kvm, vcpu.root_hpa)
        assert sp is not None
        sp.write_flooding_count = 0


# -- syncing ------------------------------------------------------------------------------------


def _is_unsync_root(kvm: Kvm, root_hpa: int) -> bool:
    """Whether something below the root is unsync. Asked without mmu_lock."""
    if root_hpa == INVALID_PAGE or kvm_mmu_is_dummy_root(kvm, root_hpa):
        return False
    sp = shadow_root_to_sp(kvm, root_hpa)
    return sp is not None and (sp.unsync or bool(sp.unsync_child_bitmap))


def kvm_mmu_sync_roots(vcpu: Vcpu) -> None:
    """The guest flushes: bring everything below the vCPU's root up to date."""
    kvm, mmu = vcpu.kvm, vcpu.mmu
    if role_direct(mmu.root_role) or vcpu.root_hpa == INVALID_PAGE or "no-root-sync" in kvm.breaks:
        return
    vcpu_clear_mmio_info(vcpu, MMIO_GVA_ANY)
    if mmu.guest_level >= PT64_ROOT_4LEVEL:
        if _is_unsync_root(kvm, vcpu.root_hpa):
            with kvm.mmu_lock:
                mmu_sync_children(vcpu, kvm.sps[vcpu.root_hpa >> 12], True)
        return
    if kvm_mmu_is_dummy_root(kvm, vcpu.root_hpa):
        return
    with kvm.mmu_lock:
        for index in range(4):
            entry = kvm.ram.u64[mmu.pae_root << 9 | index]
            if entry:
                mmu_sync_children(vcpu, kvm.sps[spte_to_pfn(entry)], True)


def kvm_mmu_sync_prev_roots(vcpu: Vcpu) -> None:
    """The guest flushes all its address spaces: drop the kept roots that are not up to date."""
    prev = [i for i, (_, hpa) in enumerate(vcpu.mmu.prev_roots) if _is_unsync_root(vcpu.kvm, hpa)]
    kvm_mmu_free_shadow_roots(vcpu, prev=prev)
