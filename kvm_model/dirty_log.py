"""Dirty logging by write protection: enabling, reading and clearing the log.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18): kvm_get_dirty_log_protect,
kvm_clear_dirty_log_protect; arch/x86/kvm/mmu/mmu.c: kvm_arch_mmu_enable_log_dirty_pt_masked,
kvm_mmu_slot_remove_write_access, kvm_mmu_slot_try_split_huge_pages, kvm_mmu_recover_huge_pages;
x86.c: kvm_mmu_slot_apply_flags.

A log is read in four steps: take and clear the bits, write-protect those pages again, copy the bits
out, flush. A store between the second and the last is reported by the bits already taken.

Not modelled: page-modification logging (kvm_intel.pml is as if 0), the dirty ring.
"""

from __future__ import annotations

from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_USER_MEM_SLOTS, KvmMemorySlot
from kvm_model.mmu.mmu import kvm_mmu_max_mapping_level
from kvm_model.mmu.rmap_log import (
    kvm_rmap_write_protect_gfn,
    kvm_rmap_write_protect_pt_masked,
    kvm_rmap_wrprot_slot,
    kvm_rmap_zap_collapsible_sptes,
)
from kvm_model.mmu.spte import PG_LEVEL_2M, PG_LEVEL_4K
from kvm_model.mmu.tdp_log import (
    kvm_tdp_mmu_clear_dirty_pt_masked,
    kvm_tdp_mmu_recover_huge_pages,
    kvm_tdp_mmu_try_split_huge_pages,
    kvm_tdp_mmu_write_protect_gfn,
    kvm_tdp_mmu_wrprot_slot,
)
from kvm_model.requests import kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["kvm_clear_dirty_log", "kvm_get_dirty_log", "kvm_mmu_slot_apply_flags"]


def kvm_mmu_slot_apply_flags(
    kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot, change: str
) -> None:
    """Make the SPTEs of a slot fit its new logging flag."""
    if change != "flags-only" or new.flags & KVM_MEM_READONLY:
        return
    if not kvm.tdp_mmu_enabled:
        _apply_flags_by_rmap(kvm, new)
        return
    if not new.flags & KVM_MEM_LOG_DIRTY_PAGES:
        kvm.mmu_lock.read_lock()
        kvm_tdp_mmu_recover_huge_pages(kvm, new, lambda gfn: kvm_mmu_max_mapping_level(kvm, new, gfn))
        kvm.mmu_lock.read_unlock()
        return
    if kvm.dirty_log_init_set:
        return
    kvm.mmu_lock.read_lock()
    if kvm.eager_page_split:
        kvm_tdp_mmu_try_split_huge_pages(kvm, new.base_gfn, new.end_gfn, PG_LEVEL_4K, shared=True)
    kvm.mmu_lock.read_unlock()
    kvm.mmu_lock.read_lock()
    kvm_tdp_mmu_wrprot_slot(kvm, new, PG_LEVEL_4K)
    kvm.mmu_lock.read_unlock()
    # Whatever was protected: user space may look at the log once this returns.
    kvm_flush_remote_tlbs(kvm)


def _apply_flags_by_rmap(kvm: Kvm, new: KvmMemorySlot) -> None:
    profile = kvm.profile
    log = new.flags & KVM_MEM_LOG_DIRTY_PAGES != 0
    if log and kvm.dirty_log_init_set and not profile.init_set_protects_huge:
        return
    with kvm.mmu_lock:
        if log:
            level = PG_LEVEL_2M if kvm.dirty_log_init_set else PG_LEVEL_4K
            flush = kvm_rmap_wrprot_slot(kvm, new, level) or not profile.log_flush_if_changed
        else:
            flush = kvm_rmap_zap_collapsible_sptes(
                kvm, new, lambda gfn: kvm_mmu_max_mapping_level(kvm, new, gfn)
            )
            if flush:
                kvm_flush_remote_tlbs(kvm)
    if log and flush:
        kvm_flush_remote_tlbs(kvm)


def _enable_log_dirty_by_rmap(kvm: Kvm, slot: KvmMemorySlot, offset: int, mask: int) -> None:
    if kvm.dirty_log_init_set and not kvm.profile.init_set_protects_huge:
        start = slot.base_gfn + offset + (mask & -mask).bit_length() - 1
        end = slot.base_gfn + offset + mask.bit_length() - 1
        kvm_rmap_write_protect_gfn(kvm, slot, start, PG_LEVEL_2M)
        if (start + 511) >> 9 != (end + 511) >> 9:
            kvm_rmap_write_protect_gfn(kvm, slot, end, PG_LEVEL_2M)
    kvm_rmap_write_protect_pt_masked(kvm, slot, slot.base_gfn + offset, mask)


def _enable_log_dirty_pt_masked(kvm: Kvm, slot: KvmMemorySlot, offset: int, mask: int) -> None:
    """kvm_arch_mmu_enable_log_dirty_pt_masked."""
    if not kvm.tdp_mmu_enabled:
        _enable_log_dirty_by_rmap(kvm, slot, offset, mask)
        return
    if kvm.dirty_log_init_set:
        start = slot.base_gfn + offset + (mask & -mask).bit_length() - 1
        end = slot.base_gfn + offset + mask.bit_length() - 1
        if kvm.eager_page_split:
            kvm_tdp_mmu_try_split_huge_pages(kvm, start, end + 1, PG_LEVEL_4K, shared=False)
        kvm_tdp_mmu_write_protect_gfn(kvm, start, PG_LEVEL_2M)
        if (start + 511) >> 9 != (end + 511) >> 9:
            kvm_tdp_mmu_write_protect_gfn(kvm, end, PG_LEVEL_2M)
    kvm_tdp_mmu_clear_dirty_pt_masked(kvm, slot.base_gfn + offset, mask)


def _logged_slot(kvm: Kvm, slot: int) -> tuple[KvmMemorySlot, bytearray]:
    as_id, id_ = slot >> 16, slot & 0xFFFF
    if as_id >= kvm.profile.nr_memslot_as_ids or id_ >= KVM_USER_MEM_SLOTS:
        raise KernelError(EINVAL, f"slot {slot:#x} is out of range")
    memslot = kvm.memslots[as_id].id_hash.get(id_)
    if memslot is None or memslot.dirty_bitmap is None:
        raise KernelError(ENOENT, f"slot {id_} keeps no dirty log")
    return memslot, memslot.dirty_bitmap


def kvm_get_dirty_log(kvm: Kvm, slot: int) -> bytearray:
    """KVM_GET_DIRTY_LOG: the bits since the last time, one a page; unless protection is manual, cleared."""
    with kvm.slots_lock:
        memslot, bitmap = _logged_slot(kvm, slot)
        if kvm.manual_dirty_log_protect:
            return bytearray(bitmap)
        snapshot = bytearray(len(bitmap))
        flush = False
        kvm.mmu_lock.lock()
        for at in range(0, len(bitmap), 8):
            mask = int.from_bytes(bitmap[at : at + 8], "little")
            if mask:
                flush = True
                snapshot[at : at + 8] = bitmap[at : at + 8]
                bitmap[at : at + 8] = bytes(8)
                _enable_log_dirty_pt_masked(kvm, memslot, at * 8, mask)
        kvm.mmu_lock.unlock()
        if flush:
            kvm_flush_remote_tlbs(kvm)
        return snapshot


def kvm_clear_dirty_log(
    kvm: Kvm, slot: int, first_page: int, num_pages: int, mask: bytes | bytearray
) -> None:
    """KVM_CLEAR_DIRTY_LOG: clear the bits of `mask` in [first_page, +num_pages) and protect those pages."""
    with kvm.slots_lock:
        if first_page & 63:
            raise KernelError(EINVAL, f"first page {first_page} is not a multiple of 64")
        memslot, bitmap = _logged_slot(kvm, slot)
        left = memslot.npages - first_page
        if left < 0 or num_pages > left or (num_pages < left and num_pages & 63):
            raise KernelError(EINVAL, f"{num_pages} pages from {first_page} do not fit the slot")
        words = (num_pages + 63) // 64
        if len(mask) < words * 8:
            raise KernelError(EINVAL, "the bitmap is too short")
        flush = False
        kvm.mmu_lock.lock()
        for word in range(words):
            want = int.from_bytes(mask[word * 8 : word * 8 + 8], "little")
            at = first_page // 8 + word * 8
            have = int.from_bytes(bitmap[at : at + 8], "little")
            cleared = want & have
            if cleared:
                bitmap[at : at + 8] = (have & ~cleared).to_bytes(8, "little")
                flush = True
                _enable_log_dirty_pt_masked(kvm, memslot, first_page + word * 64, cleared)
        kvm.mmu_lock.unlock()
        if flush:
            kvm_flush_remote_tlbs(kvm)
