"""Writes to guest tables that KVM emulated: what they change in the shadow pages.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): kvm_mmu_track_write, detect_write_flooding,
detect_write_misaligned, get_written_sptes, mmu_pte_write_fetch_gpte; 5.10: kvm_mmu_pte_write.

The SPTE that shadows the written entry goes; the guest's next access makes it anew. A page whose table is
written three times without being used, or not in whole entries, is taken for a table no more and zapped.

Not modelled: 5.10's new SPTE for the new entry at once; nested guests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.guest_access import kvm_vcpu_read_guest_atomic
from kvm_model.mmu.kvm_mmu import PT32_ROOT_LEVEL, is_cr4_pae
from kvm_model.mmu.mmu_internal import KvmMmuPage, role_has_4_byte_gpte, role_quadrant
from kvm_model.mmu.shadow_zap import (
    kvm_mmu_prepare_zap_page,
    kvm_mmu_remote_flush_or_zap,
    mmu_page_zap_pte,
)
from kvm_model.mmu.spte import PG_LEVEL_4K, is_shadow_present_pte
from kvm_model.mmu.unsync import for_each_gfn_valid_sp_with_gptes

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["kvm_mmu_track_write"]

_FLOODING = 3


# -- a write ------------------------------------------------------------------------------------


def _detect_write_flooding(sp: KvmMmuPage) -> bool:
    # The lowest level can become unsync instead.
    if sp.level == PG_LEVEL_4K:
        return False
    sp.write_flooding_count += 1
    return sp.write_flooding_count >= _FLOODING


def _detect_write_misaligned(sp: KvmMmuPage, gpa: int, length: int) -> bool:
    offset = gpa & 0xFFF
    pte_size = 4 if role_has_4_byte_gpte(sp.role) else 8
    # One byte at the start of an entry: the status bits, changed by a byte's instruction.
    if not offset & pte_size - 1 and length == 1:
        return False
    return length < 4 or (offset ^ offset + length - 1) & ~(pte_size - 1) != 0


def _written_sptes(sp: KvmMmuPage, gpa: int) -> range:
    """get_written_sptes: the entries of the page that shadow the guest entry at `gpa`."""
    offset = gpa & 0xFFF
    count = 1
    if role_has_4_byte_gpte(sp.role):
        offset <<= 1
        if sp.level == PT32_ROOT_LEVEL:
            # An entry of the guest's directory maps 4M, one of ours 2M.
            offset = (offset & ~7) << 1
            count = 2
        if offset >> 12 != role_quadrant(sp.role):
            return range(0)
        offset &= 0xFFF
    first = sp.spt << 9 | offset >> 3
    return range(first, first + count)


def _fetch_gpte(vcpu: Vcpu, gpa: int, length: int) -> tuple[int, int, int]:
    """(gpa, length, value) of the entry that was written; a half of an 8-byte entry counts as all of it."""
    if is_cr4_pae(vcpu.mmu) and length == 4:
        gpa &= ~7
        length = 8
    gentry = 0
    if length in (4, 8):
        data = kvm_vcpu_read_guest_atomic(vcpu, gpa, length)
        gentry = int.from_bytes(data, "little") if data is not None else 0
    return gpa, length, gentry


def kvm_mmu_track_write(vcpu: Vcpu, gpa: int, new: bytes) -> None:
    """The guest's write of `new` at `gpa` has been emulated: forget what it made stale."""
    kvm = vcpu.kvm
    if not kvm.indirect_shadow_pages:
        return
    invalid_list: list[KvmMmuPage] = []
    flush = False
    with kvm.mmu_lock:
        if kvm.shadow_truths is not None:
            kvm.shadow_truths.note_write(gpa, len(new))
        if "no-track-write" in kvm.breaks:
            return
        gpa, length, gentry = _fetch_gpte(vcpu, gpa, len(new))
        kvm.stat["mmu_pte_write"] += 1
        for sp in for_each_gfn_valid_sp_with_gptes(kvm, gpa >> 12):
            if _detect_write_misaligned(sp, gpa, length) or _detect_write_flooding(sp):
                kvm_mmu_prepare_zap_page(kvm, sp, invalid_list, "flooded")
                kvm.stat["mmu_flooded"] += 1
                continue
            for sptep in _written_sptes(sp, gpa):
                spte = kvm.ram.u64[sptep]
                mmu_page_zap_pte(kvm, sp, sptep, spte, "pte-write")
                if gentry and sp.level != PG_LEVEL_4K:
                    kvm.stat["mmu_pde_zapped"] += 1
                flush |= is_shadow_present_pte(spte)
        kvm_mmu_remote_flush_or_zap(kvm, invalid_list, flush)
