"""KVM_SET_MEMORY_ATTRIBUTES: frames become private or shared, and what may be huge beside them.

Source of truth: virt/kvm/kvm_main.c (kvm_vm_ioctl_set_mem_attributes, kvm_vm_set_mem_attributes,
kvm_pre_set_memory_attributes, kvm_handle_gfn_range); arch/x86/kvm/mmu/mmu.c
(kvm_arch_pre_set_memory_attributes, kvm_arch_post_set_memory_attributes, hugepage_has_attrs,
kvm_mmu_init_memslot_memory_attributes); Linux 6.18.

It is a bracket as the notifier's, but over guest frames: begin, unmap and flush under mmu_lock, then the
attributes change without it, then end. A fault that saw the old attribute finds the sequence moved. A huge
page that the range cuts joins the bracket with all of itself, though what lies beside the range stays mapped:
it may not be mapped huge meanwhile. `disallow_lpage` keeps "mixed" in its highest bit for who comes later.

Not modelled: KVM_FILTER_SHARED and KVM_FILTER_PRIVATE, which choose between direct and mirrored roots: only
TDX has the latter, every other VM maps both kinds of memory in the same roots.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL, ENOTTY
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.mem_attributes import (
    kvm_get_memory_attributes,
    kvm_range_has_memory_attributes,
    kvm_supported_mem_attributes,
)
from kvm_model.memslots import KVM_LPAGE_MIXED_FLAG, KvmMemorySlot
from kvm_model.mmu.gfn_range import kvm_unmap_gfn_range
from kvm_model.mmu.invalidate import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from kvm_model.mmu.spte import PG_LEVEL_1G, PG_LEVEL_2M, kvm_pages_per_hpage
from kvm_model.requests import kvm_flush_remote_tlbs
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["TRACEPOINTS", "kvm_mmu_init_memslot_memory_attributes", "kvm_vm_ioctl_set_mem_attributes"]

_U64 = 1 << 64
_HUGE_LEVELS = (PG_LEVEL_2M, PG_LEVEL_1G)

KVM_VM_SET_MEM_ATTRIBUTES = Tracepoint(
    "kvm", "kvm_vm_set_mem_attributes", ("start", "end", "attr"),
    lambda start, end, attr: f"{start:#016x} -- {end:#016x} [0x{attr:x}]",
    scope=True,
)
TRACEPOINTS = (KVM_VM_SET_MEM_ATTRIBUTES,)

Handler = Callable[["Kvm", KvmMemorySlot, int, int, int], bool]


# -- mixed attributes -----------------------------------------------------------------------------


def _lpage(slot: KvmMemorySlot, gfn: int, level: int) -> tuple[int, int]:
    """Where the huge page's disallow_lpage is: which array, which index."""
    shift = 9 * (level - 1)
    return level - 2, (gfn >> shift) - (slot.base_gfn >> shift)


def _test_mixed(slot: KvmMemorySlot, gfn: int, level: int) -> bool:
    which, index = _lpage(slot, gfn, level)
    return slot.lpage_info[which][index] & KVM_LPAGE_MIXED_FLAG != 0


def _set_mixed(slot: KvmMemorySlot, gfn: int, level: int, mixed: bool) -> None:
    which, index = _lpage(slot, gfn, level)
    old = slot.lpage_info[which][index]
    slot.lpage_info[which][index] = old | KVM_LPAGE_MIXED_FLAG if mixed else old & ~KVM_LPAGE_MIXED_FLAG


def _has_attrs(kvm: Kvm, slot: KvmMemorySlot, gfn: int, level: int, attrs: int) -> bool:
    """hugepage_has_attrs: whether the whole huge page has these attributes; level by level from below."""
    if level == PG_LEVEL_2M:
        return kvm_range_has_memory_attributes(kvm, gfn, gfn + kvm_pages_per_hpage(level), attrs)
    step = kvm_pages_per_hpage(level - 1)
    return all(
        not _test_mixed(slot, at, level - 1) and kvm_get_memory_attributes(kvm, at) == attrs
        for at in range(gfn, gfn + kvm_pages_per_hpage(level), step)
    )


def _inside(slot: KvmMemorySlot, gfn: int, level: int) -> bool:
    return gfn >= slot.base_gfn and gfn + kvm_pages_per_hpage(level) <= slot.end_gfn


def kvm_mmu_init_memslot_memory_attributes(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """A slot comes where attributes may be set already: find its mixed huge pages."""
    if not kvm.has_private_mem:
        return
    for level in _HUGE_LEVELS:
        pages = kvm_pages_per_hpage(level)
        first = -(-slot.base_gfn // pages) * pages
        for gfn in range(first, slot.end_gfn & -pages, pages):
            attrs = kvm_get_memory_attributes(kvm, gfn)
            _set_mixed(slot, gfn, level, not _has_attrs(kvm, slot, gfn, level, attrs))


# -- the bracket ----------------------------------------------------------------------------------


def _pre_set(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, attrs: int) -> bool:
    """kvm_pre_set_memory_attributes with its arch part: unmap the frames, whatever they were."""
    kvm_mmu_invalidate_range_add(kvm, start, end)
    for level in _HUGE_LEVELS:
        pages = kvm_pages_per_hpage(level)
        head, tail = start & -pages, (end - 1) & -pages
        cut = head != start or head + pages > end
        if cut and _inside(slot, head, level) and not _test_mixed(slot, head, level):
            kvm_mmu_invalidate_range_add(kvm, head, head + pages, unmapped=False)
        cut = head != tail and tail + pages > end
        if cut and tail + pages <= slot.end_gfn and not _test_mixed(slot, tail, level):
            kvm_mmu_invalidate_range_add(kvm, tail, tail + pages, unmapped=False)
    return kvm_unmap_gfn_range(kvm, slot, start, end, may_block=True)


def _post_set(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, attrs: int) -> bool:
    """kvm_arch_post_set_memory_attributes: note which huge pages are mixed now, small ones first."""
    for level in _HUGE_LEVELS:
        pages = kvm_pages_per_hpage(level)
        gfn = start & -pages
        if gfn != start or gfn + pages > end:
            if _inside(slot, gfn, level):
                _set_mixed(slot, gfn, level, not _has_attrs(kvm, slot, gfn, level, attrs))
            gfn += pages
        while gfn + pages <= end:
            _set_mixed(slot, gfn, level, False)
            gfn += pages
        if gfn < end and gfn + pages <= slot.end_gfn:
            _set_mixed(slot, gfn, level, not _has_attrs(kvm, slot, gfn, level, attrs))
    return False


def _kvm_handle_gfn_range(
    kvm: Kvm, start: int, end: int, attrs: int, handler: Handler, on_lock: Callable[[Kvm], None], *,
    flush_on_ret: bool,
) -> bool:
    """Run `handler` on [start, end) of each memslot under mmu_lock; whether there was one."""
    found = flush = False
    for slots in kvm.memslots:
        for slot in slots.in_gfn_range(start, end):
            if not found:
                found = True
                kvm.mmu_lock.lock()
                on_lock(kvm)
            flush |= handler(kvm, slot, max(start, slot.base_gfn), min(end, slot.end_gfn), attrs)
    if flush_on_ret and flush:
        kvm_flush_remote_tlbs(kvm)
    if found:
        if flush_on_ret and kvm.truths is not None:
            kvm.truths.note_start_unlock()
        kvm.mmu_lock.unlock()
    return found


def _nothing(kvm: Kvm) -> None:
    pass


def _kvm_vm_set_mem_attributes(kvm: Kvm, start: int, end: int, attrs: int) -> None:
    truths = kvm.truths
    sched = kvm.sched
    array = kvm.mem_attr_array
    bracket = object()
    with kvm.slots_lock:
        if kvm_range_has_memory_attributes(kvm, start, end, attrs):
            return
        bracketed = "attributes-no-bracket" not in kvm.breaks
        found = _kvm_handle_gfn_range(
            kvm, start, end, attrs, _pre_set, kvm_mmu_invalidate_begin if bracketed else _nothing,
            flush_on_ret=True,
        )
        if truths is not None:
            truths.note_start_returned(bracket, found and bracketed)
        for gfn in range(start, end):
            if attrs:
                array[gfn] = attrs
            else:
                array.pop(gfn, None)
            if sched.preempt:
                sched.point("cond_resched")
        if truths is not None:
            truths.note_gfns(start, end - start)
            truths.note_end_called(bracket)
        found = _kvm_handle_gfn_range(
            kvm, start, end, attrs, _post_set, kvm_mmu_invalidate_end if bracketed else _nothing,
            flush_on_ret=False,
        )
        if truths is not None:
            truths.note_end_returned(bracket, found and bracketed)


def kvm_vm_ioctl_set_mem_attributes(kvm: Kvm, address: int, size: int, attributes: int, flags: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES of [address, address + size). KernelError(EINVAL), ENOTTY before 6.8."""
    if not kvm.profile.guest_memfd:
        raise KernelError(ENOTTY, "this kernel has no memory attributes")
    checks = (
        (flags != 0, f"unknown flags {flags:#x}"),
        (attributes & ~kvm_supported_mem_attributes(kvm), f"this VM has no attributes {attributes:#x}"),
        (size <= 0 or address < 0 or address + size >= _U64, f"{size:#x} bytes at {address:#x}"),
        ((address | size) & 0xFFF, f"{size:#x} bytes at {address:#x} are not whole pages"),
    )
    for bad, why in checks:
        if bad:
            raise KernelError(EINVAL, why)
    start, end = address >> 12, (address + size) >> 12
    ctx = kvm.stream.ctx
    saved = ctx.cause
    if (t := kvm.trace.kvm_vm_set_mem_attributes) is not None:
        ctx.cause = t(start, end, attributes)
    try:
        _kvm_vm_set_mem_attributes(kvm, start, end, attributes)
    finally:
        ctx.cause = saved
