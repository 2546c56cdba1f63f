"""KVM_SET_USER_MEMORY_REGION: creating, deleting, moving memslots and changing their flags.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18): kvm_set_memory_region, check_memory_region_flags,
kvm_set_memslot, kvm_swap_active_memslots, kvm_invalidate_memslot, kvm_commit_memory_region;
arch/x86/kvm/x86.c: kvm_arch_prepare_memory_region, kvm_mmu_slot_apply_flags.

A delete or move first publishes an INVALID copy of the slot, so that faults retry, then zaps, then
publishes the final state. Each publication waits for open notifier brackets (so that range_start and
range_end see the same slots) and then for SRCU readers of the old set.

Not modelled: KVM's own slots for real mode without unrestricted guest (the TSS, the identity map).
"""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOTTY
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import TASK_SIZE
from host_mm.kernel.errors import KernelError
from kvm_model.dirty_log import dirty_log_init_set, kvm_mmu_slot_apply_flags, kvm_use_dirty_bitmap
from kvm_model.guest_memfd import kvm_gmem_bind, kvm_gmem_unbind
from kvm_model.memslots import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
    KVM_MEMSLOT_INVALID,
    KvmMemorySlot,
    KvmMemslots,
    alloc_lpage_info,
)
from kvm_model.mmu.mmu_roots import kvm_arch_flush_shadow_memslot, kvm_mmu_invalidate_mmio_sptes
from kvm_model.mmu.page_track import kvm_page_track_delete_slot, kvm_page_track_has_external_user
from kvm_model.mmu.set_mem_attributes import kvm_mmu_init_memslot_memory_attributes
from kvm_model.mmu.shadow_zap import kvm_mmu_change_mmu_pages
from kvm_model.mmu.tdp_iter import TDP_MMU_MAX_GFN_EXCLUSIVE
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from kvm_model.kvm_main import Kvm

__all__ = ["TRACEPOINTS", "kvm_set_internal_memslot", "kvm_set_user_memory_region"]

_U64 = 1 << 64
KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO = 50
KVM_MIN_ALLOC_MMU_PAGES = 64

MEMSLOT_UPDATE = Tracepoint(
    "refault", "memslot_update", ("change", "slot", "base_gfn", "npages", "hva", "flags"),
    lambda change, slot, base_gfn, npages, hva, flags:
        f"{change} slot {slot} gfn {base_gfn:x} npages {npages:x} hva {hva:#x} flags {flags:x}",
    scope=True, doc="KVM_SET_USER_MEMORY_REGION passed its checks; what follows is its doing.",
)
TRACEPOINTS = (MEMSLOT_UPDATE,)


def kvm_set_user_memory_region(
    kvm: Kvm, slot: int, gpa: int, size: int, hva: int, flags: int, *,
    guest_memfd: AddressSpace | None = None, offset: int = 0,
) -> None:
    """Create, delete (size 0), move or re-flag a slot; KernelError as the ioctl refuses.

    `guest_memfd` and `offset` count with KVM_MEM_GUEST_MEMFD: KVM_SET_USER_MEMORY_REGION2.
    """
    if flags & KVM_MEM_GUEST_MEMFD and not kvm.profile.guest_memfd:
        raise KernelError(ENOTTY, "this kernel has no KVM_SET_USER_MEMORY_REGION2")
    if slot & 0xFFFF >= kvm.profile.user_mem_slots:
        raise KernelError(EINVAL, f"slot {slot & 0xFFFF} is out of range")
    with kvm.slots_lock:
        _kvm_set_memory_region(kvm, slot, gpa, size, hva, flags, guest_memfd, offset)


def kvm_set_internal_memslot(kvm: Kvm, slot: int, gpa: int, size: int, hva: int) -> None:
    """A slot of KVM's own, whose number user space cannot name; slots_lock is held. KernelError."""
    _kvm_set_memory_region(kvm, slot, gpa, size, hva, 0, None, 0)


def _check(kvm: Kvm, as_id: int, id_: int, gpa: int, size: int, hva: int, flags: int) -> None:
    # Private memory can neither be logged nor emulated.
    valid = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
    if flags & KVM_MEM_GUEST_MEMFD:
        valid = KVM_MEM_GUEST_MEMFD
    checks = (
        (flags & ~valid, f"unknown flags {flags:#x}"),
        (size & 0xFFF or not 0 <= size < _U64, f"size {size:#x} is not whole pages"),
        (gpa & 0xFFF or not 0 <= gpa < _U64, f"guest address {gpa:#x} is not page aligned"),
        (hva & 0xFFF or not hva >= 0, f"host address {hva:#x} is not page aligned"),
        (hva + size > TASK_SIZE, f"host range {hva:#x}+{size:#x} is not user memory"),
        (as_id >= kvm.profile.nr_memslot_as_ids, f"no address space {as_id}"),
        (gpa + size >= _U64, "the guest range wraps around"),
        (size >> 12 > KVM_MEM_MAX_NR_PAGES, f"size {size:#x} is too large for a dirty bitmap"),
    )
    for bad, why in checks:
        if bad:
            raise KernelError(EINVAL, why)


def _kvm_set_memory_region(
    kvm: Kvm, slot: int, gpa: int, size: int, hva: int, flags: int, guest_memfd: AddressSpace | None,
    offset: int,
) -> None:
    as_id, id_ = slot >> 16, slot & 0xFFFF
    _check(kvm, as_id, id_, gpa, size, hva, flags)
    slots = kvm.memslots[as_id]
    old = slots.id_hash.get(id_)
    if not size:
        if old is None:
            raise KernelError(EINVAL, f"slot {id_} does not exist")
        _kvm_set_memslot(kvm, old, None, "delete")
        return
    base_gfn, npages = gpa >> 12, size >> 12
    if old is None:
        change = "create"
    else:
        if flags & KVM_MEM_GUEST_MEMFD:
            raise KernelError(EINVAL, f"slot {id_} exists; one of guest_memfd can only be deleted")
        if (hva, npages) != (old.userspace_addr, old.npages) or (flags ^ old.flags) & KVM_MEM_READONLY:
            raise KernelError(EINVAL, f"slot {id_} exists; only its guest address and logging can change")
        if base_gfn != old.base_gfn:
            change = "move"
        elif flags != old.flags:
            change = "flags-only"
        else:
            return
    if change in ("create", "move"):
        for other in slots.in_gfn_range(base_gfn, base_gfn + npages):
            if other.id != id_:
                raise KernelError(EEXIST, f"gfns overlap slot {other.id}")
    new = KvmMemorySlot(as_id, id_, base_gfn, npages, flags, hva)
    if flags & KVM_MEM_GUEST_MEMFD:
        kvm_gmem_bind(kvm, new, guest_memfd, offset)
    try:
        _kvm_set_memslot(kvm, old, new, change)
    except KernelError:
        kvm_gmem_unbind(new)
        raise


def _inactive(kvm: Kvm, as_id: int) -> KvmMemslots:
    pair = kvm.memslot_sets[as_id]
    return pair[1] if kvm.memslots[as_id] is pair[0] else pair[0]


def _kvm_set_memslot(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None, change: str) -> None:
    ctx = kvm.stream.ctx
    saved = ctx.cause
    shown = new or old
    assert shown is not None
    if (t := kvm.trace.memslot_update) is not None:
        ctx.cause = t(
            change, shown.as_id << 16 | shown.id, shown.base_gfn, shown.npages, shown.userspace_addr,
            shown.flags,
        )
    try:
        kvm.slots_arch_lock.lock()
        _change_memslot(kvm, old, new, change)
    finally:
        ctx.cause = saved


def _change_memslot(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None, change: str) -> None:
    if change == "create":
        assert new is not None
        _prepare_or_raise(kvm, None, new, change)
        _inactive(kvm, new.as_id).replace(None, new)
        _kvm_activate_memslot(kvm, None, new)
    elif change == "flags-only":
        assert old is not None
        assert new is not None
        _prepare_or_raise(kvm, old, new, change)
        _inactive(kvm, new.as_id).replace(old, new)
        _kvm_activate_memslot(kvm, old, new)
    else:
        assert old is not None
        invalid = _kvm_invalidate_memslot(kvm, old)
        try:
            _prepare(kvm, old, new, change)
        except KernelError:
            _kvm_activate_memslot(kvm, invalid, old)
            raise
        _inactive(kvm, old.as_id).replace(old, new)
        _kvm_activate_memslot(kvm, invalid, new)
    _kvm_commit_memory_region(kvm, old, new, change)


def _prepare_or_raise(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot, change: str) -> None:
    try:
        _prepare(kvm, old, new, change)
    except KernelError:
        kvm.slots_arch_lock.unlock()
        raise


def _prepare(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None, change: str) -> None:
    """kvm_prepare_memory_region with its arch part."""
    if new is None:
        return
    if not new.flags & KVM_MEM_LOG_DIRTY_PAGES:
        new.dirty_bitmap = None
    elif old is not None and old.dirty_bitmap is not None:
        new.dirty_bitmap = old.dirty_bitmap
    elif kvm_use_dirty_bitmap(kvm):
        new.dirty_bitmap = bytearray(new.dirty_bitmap_bytes())
        if dirty_log_init_set(kvm):
            ones = (1 << new.npages) - 1
            new.dirty_bitmap[:] = ones.to_bytes(new.dirty_bitmap_bytes(), "little")
    if change == "flags-only":
        assert old is not None
        new.take_arch(old)
        return
    if change == "move" and kvm_page_track_has_external_user(kvm):
        raise KernelError(EINVAL, "a slot does not move under who tracks its pages")
    if new.end_gfn > TDP_MMU_MAX_GFN_EXCLUSIVE:
        raise KernelError(EINVAL, f"gfn {new.end_gfn - 1:#x} is beyond the physical address width")
    alloc_lpage_info(new)
    kvm_mmu_init_memslot_memory_attributes(kvm, new)


def _kvm_invalidate_memslot(kvm: Kvm, old: KvmMemorySlot) -> KvmMemorySlot:
    """Publish an INVALID copy of `old` and drop everything mapped from it."""
    invalid = old.copy()
    invalid.flags |= KVM_MEMSLOT_INVALID
    _inactive(kvm, old.as_id).replace(old, invalid)
    _kvm_swap_active_memslots(kvm, old.as_id)
    kvm_arch_flush_shadow_memslot(kvm, old)
    kvm.slots_arch_lock.lock()
    return invalid


def _kvm_activate_memslot(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None) -> None:
    some = old or new
    assert some is not None
    _kvm_swap_active_memslots(kvm, some.as_id)
    _inactive(kvm, some.as_id).replace(old, new)


def _kvm_swap_active_memslots(kvm: Kvm, as_id: int) -> None:
    """Publish the inactive set: slots_arch_lock is dropped on the way."""
    slots = _inactive(kvm, as_id)
    gen = kvm.memslots[as_id].generation
    slots.generation = gen | KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
    lock = kvm.mn_invalidate_lock
    lock.lock()
    waits = kvm.profile.memslot_update_waits and "no-memslot-wait" not in kvm.breaks
    while kvm.mn_active_invalidate_count and waits:
        lock.unlock()
        # Nothing can run between the test and going to sleep but at unlock's scheduling point.
        if kvm.mn_active_invalidate_count:
            kvm.mn_memslots_update_wait.wait()
        lock.lock()
    kvm.memslots[as_id] = slots
    lock.unlock()
    kvm.slots_arch_lock.unlock()
    kvm.srcu.synchronize()
    gen += kvm.profile.nr_memslot_as_ids
    kvm_mmu_invalidate_mmio_sptes(kvm, gen)
    slots.generation = gen


def _kvm_commit_memory_region(
    kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None, change: str
) -> None:
    old_flags, new_flags = (slot.flags if slot is not None else 0 for slot in (old, new))
    if change == "delete":
        assert old is not None
        kvm.nr_memslot_pages -= old.npages
        if not kvm.profile.mmu_is_page_track_node:
            kvm_page_track_delete_slot(kvm, old)
        kvm_gmem_unbind(old)
    elif change == "create":
        assert new is not None
        kvm.nr_memslot_pages += new.npages
    if change in ("create", "delete"):
        _calculate_mmu_pages(kvm)
    if (old_flags ^ new_flags) & KVM_MEM_LOG_DIRTY_PAGES:
        kvm.nr_memslots_dirty_logging += 1 if new_flags & KVM_MEM_LOG_DIRTY_PAGES else -1
    kvm_mmu_slot_apply_flags(kvm, old, new, change)


def _calculate_mmu_pages(kvm: Kvm) -> None:
    # No page of the TDP MMU counts against the limit.
    if not kvm.tdp_mmu_enabled:
        pages = kvm.nr_memslot_pages // KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO
        kvm_mmu_change_mmu_pages(kvm, max(pages, KVM_MIN_ALLOC_MMU_PAGES))
