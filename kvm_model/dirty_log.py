"""Dirty logging: enabling, reading and clearing the log.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18): kvm_get_dirty_log_protect,
kvm_clear_dirty_log_protect, kvm_vm_ioctl_enable_cap_generic, kvm_vm_ioctl_enable_dirty_log_ring,
kvm_vm_ioctl_reset_dirty_pages; arch/x86/kvm/mmu/mmu.c: kvm_arch_mmu_enable_log_dirty_pt_masked,
kvm_mmu_slot_remove_write_access, kvm_mmu_slot_leaf_clear_dirty, kvm_mmu_slot_try_split_huge_pages,
kvm_mmu_recover_huge_pages; x86.c: kvm_mmu_slot_apply_flags, kvm_mmu_update_cpu_dirty_logging,
kvm_arch_sync_dirty_log; dirty_ring.c: kvm_reset_dirty_gfn.

A write is noticed because its page is write-protected, or by the CPU's own log of the dirty flags that it
sets (vmx/pml.py), and is told by a bitmap of the slot or by the vCPU's ring (dirty_ring.py).

A log is read in four steps: take and clear the bits, protect those pages again, copy the bits
out, flush. A store between the second and the last is reported by the bits already taken.

Linux turns the CPU's log on where there is one; here kvm_intel.pml=Y does, as machines were recorded without.

Not modelled: capabilities that are about something else.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOENT, ENXIO
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.dirty_log_rmap import apply_log_flag_by_rmap, enable_log_by_rmap
from kvm_model.dirty_ring import kvm_dirty_ring_reset, kvm_dirty_ring_size_error
from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KvmMemorySlot
from kvm_model.mmu.faultin_pfn import kvm_mmu_max_mapping_level
from kvm_model.mmu.spte import PG_LEVEL_2M, PG_LEVEL_4K
from kvm_model.mmu.tdp_log import (
    kvm_tdp_mmu_clear_dirty_pt_masked,
    kvm_tdp_mmu_clear_dirty_slot,
    kvm_tdp_mmu_recover_huge_pages,
    kvm_tdp_mmu_try_split_huge_pages,
    kvm_tdp_mmu_write_protect_gfn,
    kvm_tdp_mmu_wrprot_slot,
)
from kvm_model.requests import (
    KVM_REQ_UPDATE_CPU_DIRTY_LOGGING,
    kvm_flush_remote_tlbs,
    kvm_make_all_cpus_request,
    kvm_vcpu_kick,
)

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = [
    "KVM_CAP_DIRTY_LOG_RING", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "KVM_DIRTY_LOG_INITIALLY_SET",
    "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", "dirty_log_init_set", "kvm_clear_dirty_log", "kvm_get_dirty_log",
    "kvm_mmu_slot_apply_flags", "kvm_use_dirty_bitmap", "kvm_vm_ioctl_enable_cap",
    "kvm_vm_ioctl_reset_dirty_pages",
]

KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_DIRTY_LOG_RING = 192
_KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1
KVM_DIRTY_LOG_INITIALLY_SET = 2


def kvm_vm_ioctl_enable_cap(kvm: Kvm, cap: int, value: int, flags: int) -> None:
    """KVM_ENABLE_CAP of what belongs to the log; KernelError(EINVAL, for a ring also E2BIG)."""
    if cap == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
        allowed = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        if value & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            allowed |= KVM_DIRTY_LOG_INITIALLY_SET
        if flags or value & ~allowed:
            raise KernelError(EINVAL, f"manual protection of the dirty log is not {value:#x}")
        kvm.manual_dirty_log_protect = value
    elif cap in (KVM_CAP_DIRTY_LOG_RING, _KVM_CAP_DIRTY_LOG_RING_ACQ_REL) and kvm.profile.dirty_ring:
        value &= 0xFFFFFFFF
        error = kvm_dirty_ring_size_error(kvm, value)
        if error:
            raise KernelError(error, f"dirty rings of {value:#x} bytes")
        kvm.dirty_ring_size = value
    else:
        raise KernelError(EINVAL, f"no capability {cap} to enable")


def dirty_log_init_set(kvm: Kvm) -> bool:
    """kvm_dirty_log_manual_protect_and_init_set."""
    return kvm.manual_dirty_log_protect & KVM_DIRTY_LOG_INITIALLY_SET != 0


def kvm_use_dirty_bitmap(kvm: Kvm) -> bool:
    """Whether slots have bitmaps: a VM with rings has no other log."""
    return not kvm.dirty_ring_size


def kvm_mmu_slot_apply_flags(
    kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None, change: str
) -> None:
    """Make the SPTEs of a slot, and what its vCPUs' CPUs log, fit its new logging flag."""
    old_flags, new_flags = (slot.flags if slot is not None else 0 for slot in (old, new))
    if (old_flags ^ new_flags) & KVM_MEM_LOG_DIRTY_PAGES:
        _update_cpu_dirty_logging(kvm, new_flags & KVM_MEM_LOG_DIRTY_PAGES != 0)
    if new is None or change != "flags-only" or new.flags & KVM_MEM_READONLY:
        return
    if not kvm.tdp_mmu_enabled:
        apply_log_flag_by_rmap(kvm, new, init_set=dirty_log_init_set(kvm))
        return
    if not new.flags & KVM_MEM_LOG_DIRTY_PAGES:
        kvm.mmu_lock.read_lock()
        kvm_tdp_mmu_recover_huge_pages(kvm, new, lambda gfn: kvm_mmu_max_mapping_level(kvm, new, gfn))
        kvm.mmu_lock.read_unlock()
        return
    if dirty_log_init_set(kvm):
        return
    kvm.mmu_lock.read_lock()
    if kvm.eager_page_split:
        kvm_tdp_mmu_try_split_huge_pages(kvm, new, new.base_gfn, new.end_gfn, PG_LEVEL_4K, shared=True)
    kvm.mmu_lock.read_unlock()
    if kvm.cpu_dirty_log_size:
        kvm.mmu_lock.read_lock()
        kvm_tdp_mmu_clear_dirty_slot(kvm, new)
        kvm.mmu_lock.read_unlock()
    kvm.mmu_lock.read_lock()
    # The CPU logs 4K pages only: a huge one is split at its first write.
    kvm_tdp_mmu_wrprot_slot(kvm, new, PG_LEVEL_2M if kvm.cpu_dirty_log_size else PG_LEVEL_4K)
    kvm.mmu_lock.read_unlock()
    # Whatever was protected: user space may look at the log once this returns.
    kvm_flush_remote_tlbs(kvm)


def _update_cpu_dirty_logging(kvm: Kvm, enable: bool) -> None:
    """The first logged slot turns the CPUs' logs on, the last one off."""
    slots = kvm.nr_memslots_dirty_logging
    if kvm.cpu_dirty_log_size and ((enable and slots == 1) or not slots):
        kvm_make_all_cpus_request(kvm, KVM_REQ_UPDATE_CPU_DIRTY_LOGGING)


def _arch_sync_dirty_log(kvm: Kvm) -> None:
    """Get running vCPUs to drain their CPUs' logs, as each exit does."""
    if kvm.cpu_dirty_log_size:
        for vcpu in kvm.vcpus:
            kvm_vcpu_kick(vcpu)


def _enable_log_dirty_pt_masked(kvm: Kvm, slot: KvmMemorySlot, offset: int, mask: int) -> None:
    """kvm_arch_mmu_enable_log_dirty_pt_masked."""
    if not kvm.tdp_mmu_enabled:
        enable_log_by_rmap(kvm, slot, slot.base_gfn + offset, mask, init_set=dirty_log_init_set(kvm))
        return
    if dirty_log_init_set(kvm):
        start = slot.base_gfn + offset + (mask & -mask).bit_length() - 1
        end = slot.base_gfn + offset + mask.bit_length() - 1
        if kvm.eager_page_split:
            kvm_tdp_mmu_try_split_huge_pages(kvm, slot, start, end + 1, PG_LEVEL_4K, shared=False)
        kvm_tdp_mmu_write_protect_gfn(kvm, slot, start, PG_LEVEL_2M)
        if (start + 511) >> 9 != (end + 511) >> 9:
            kvm_tdp_mmu_write_protect_gfn(kvm, slot, end, PG_LEVEL_2M)
    wrprot = not kvm.cpu_dirty_log_size
    kvm_tdp_mmu_clear_dirty_pt_masked(kvm, slot, slot.base_gfn + offset, mask, wrprot=wrprot)


def _logged_slot(kvm: Kvm, slot: int, first_page: int = 0) -> tuple[KvmMemorySlot, bytearray]:
    if not kvm_use_dirty_bitmap(kvm):
        raise KernelError(ENXIO, "the VM has dirty rings")
    as_id, id_ = slot >> 16, slot & 0xFFFF
    if as_id >= kvm.profile.nr_memslot_as_ids or id_ >= kvm.profile.user_mem_slots:
        raise KernelError(EINVAL, f"slot {slot:#x} is out of range")
    if first_page & 63:
        raise KernelError(EINVAL, f"first page {first_page} is not a multiple of 64")
    memslot = kvm.memslots[as_id].id_hash.get(id_)
    if memslot is None or memslot.dirty_bitmap is None:
        raise KernelError(ENOENT, f"slot {id_} keeps no dirty log")
    return memslot, memslot.dirty_bitmap


def _flush_and_return(kvm: Kvm, flush: bool) -> None:
    """What was protected becomes so for every vCPU: from here on a write is heard of."""
    if flush and "log-no-flush" not in kvm.breaks:
        kvm_flush_remote_tlbs(kvm)
    if kvm.truths is not None:
        kvm.truths.log.note_returned()


def kvm_get_dirty_log(kvm: Kvm, slot: int) -> bytearray:
    """KVM_GET_DIRTY_LOG: the bits since the last time, one a page; unless protection is manual, cleared."""
    with kvm.slots_lock:
        memslot, bitmap = _logged_slot(kvm, slot)
        _arch_sync_dirty_log(kvm)
        if kvm.manual_dirty_log_protect:
            return bytearray(bitmap)
        if kvm.truths is not None:
            kvm.truths.log.note_call()
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
        _flush_and_return(kvm, flush)
        return snapshot


def kvm_clear_dirty_log(
    kvm: Kvm, slot: int, first_page: int, num_pages: int, mask: bytes | bytearray
) -> None:
    """KVM_CLEAR_DIRTY_LOG: clear the bits of `mask` in [first_page, +num_pages) and protect those pages."""
    with kvm.slots_lock:
        memslot, bitmap = _logged_slot(kvm, slot, first_page)
        left = memslot.npages - first_page
        if left < 0 or num_pages > left or (num_pages < left and num_pages & 63):
            raise KernelError(EINVAL, f"{num_pages} pages from {first_page} do not fit the slot")
        _arch_sync_dirty_log(kvm)
        words = (num_pages + 63) // 64
        if len(mask) < words * 8:
            raise KernelError(EFAULT, "the bitmap is too short")
        flush = False
        if kvm.truths is not None:
            kvm.truths.log.note_call()
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
        _flush_and_return(kvm, flush)


def kvm_vm_ioctl_reset_dirty_pages(kvm: Kvm) -> int:
    """KVM_RESET_DIRTY_RINGS: how many entries were taken back; KernelError(EINVAL) without rings."""
    if not kvm.dirty_ring_size:
        raise KernelError(EINVAL, "the VM has no dirty rings")
    if kvm.truths is not None:
        kvm.truths.log.note_call()
    with kvm.slots_lock:
        cleared = 0
        for vcpu in kvm.vcpus:
            assert vcpu.dirty_ring is not None
            cleared += kvm_dirty_ring_reset(
                kvm, vcpu.dirty_ring, lambda slot, offset, mask: _reset_dirty_gfn(kvm, slot, offset, mask)
            )
    _flush_and_return(kvm, cleared != 0)
    return cleared


def _reset_dirty_gfn(kvm: Kvm, slot: int, offset: int, mask: int) -> None:
    """kvm_reset_dirty_gfn: what user space wrote into an entry is believed as far as it names pages."""
    as_id, id_ = slot >> 16, slot & 0xFFFF
    if as_id >= kvm.profile.nr_memslot_as_ids or id_ >= kvm.profile.user_mem_slots:
        return
    memslot = kvm.memslots[as_id].id_hash.get(id_)
    if memslot is None or offset + mask.bit_length() - 1 >= memslot.npages:
        return
    kvm.mmu_lock.lock()
    _enable_log_dirty_pt_masked(kvm, memslot, offset, mask)
    kvm.mmu_lock.unlock()
