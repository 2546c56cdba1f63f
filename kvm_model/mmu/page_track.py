"""Write tracking of guest pages: who wants to hear of the guest's writes to a page, and is told.

Source of truth: arch/x86/kvm/mmu/page_track.c (Linux 6.18): __kvm_write_track_add_gfn,
__kvm_write_track_remove_gfn, kvm_write_track_add_gfn, kvm_write_track_remove_gfn, kvm_gfn_is_write_tracked,
kvm_page_track_register_notifier, kvm_page_track_unregister_notifier, __kvm_page_track_write,
kvm_page_track_delete_slot; page_track.h: kvm_page_track_write; 5.10: kvm_slot_page_track_add_page,
kvm_slot_page_track_remove_page, kvm_page_track_is_active, kvm_page_track_flush_slot.

A gfn is tracked while anybody counts on it. Its SPTEs lose W and the right to get it back, no huge page may
map it, and a write to it is emulated: KVM writes the bytes and then tells every node of the head, each of
which looks for itself whether the page is its own. A zap by the mmu notifier forgets nothing: the count is
kept by the memslot, and the SPTE that the next fault makes is protected again.

In 5.10 the MMU itself is a node: it hears so of writes to tables that it shadows, and it is the one that zaps
a memslot's SPTEs when the slot is flushed. In 6.18 the MMU is called by its name, nodes are for others
(KVMGT) and hear of a slot after it is gone.

Not modelled: the arrays' allocation (a dict holds what is tracked), TDX's refusal.
"""

from __future__ import annotations

from errno import EINVAL, ESRCH
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from kvm_model.memslots import KvmMemorySlot, kvm_mmu_gfn_allow_lpage, kvm_mmu_gfn_disallow_lpage
from kvm_model.mmu.rmap_log import kvm_rmap_write_protect_gfn
from kvm_model.mmu.spte import PG_LEVEL_4K
from kvm_model.mmu.tdp_log import kvm_tdp_mmu_write_protect_gfn
from kvm_model.requests import kvm_flush_remote_tlbs
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "TRACEPOINTS", "KvmPageTrackNotifierNode", "kvm_mmu_slot_gfn_write_protect",
    "kvm_page_track_delete_slot", "kvm_page_track_flush_slot", "kvm_page_track_has_external_user",
    "kvm_page_track_register_notifier", "kvm_page_track_unregister_notifier", "kvm_page_track_write",
    "kvm_page_track_write_tracking_enabled", "kvm_write_track_add_gfn", "kvm_write_track_remove_gfn",
    "slot_write_track_add_gfn", "slot_write_track_remove_gfn",
]

_USHRT_MAX = 0xFFFF

PAGE_TRACK_WRITE = Tracepoint(
    "refault", "page_track_write", ("gpa", "bytes", "nodes"),
    lambda gpa, bytes, nodes: f"gpa {gpa:#x} bytes {bytes} nodes {nodes}",
    doc="An emulated guest write, of whatever page, is told to the nodes of the page-track head.",
)
WRITE_TRACK = Tracepoint(
    "refault", "write_track", ("gfn", "count"),
    lambda gfn, count: f"gfn {gfn:x} count {count}",
    doc="How many want to hear of the writes to a guest page has changed.",
)
TRACEPOINTS = (PAGE_TRACK_WRITE, WRITE_TRACK)


class KvmPageTrackNotifierNode:
    """struct kvm_page_track_notifier_node: override what is to be heard."""

    def track_write(self, vcpu: Vcpu, gpa: int, new: bytes) -> None:
        """The guest has written `new` at `gpa`, by emulation. Of any page, tracked or not."""

    def track_remove_region(self, gfn: int, npages: int) -> None:
        """These gfns have no memslot any more (6.18)."""

    def track_flush_slot(self, kvm: Kvm, slot: KvmMemorySlot) -> None:
        """The slot is being deleted or moved: protect nothing of it any more (5.10)."""


# -- counting -----------------------------------------------------------------------------------


def kvm_page_track_has_external_user(kvm: Kvm) -> bool:
    """Whether anybody but KVM itself is on the head, as 6.18 asks before a slot moves."""
    others = kvm.external_write_tracking_enabled and not kvm.profile.mmu_is_page_track_node
    return others and bool(kvm.track_notifier_list)


def kvm_page_track_write_tracking_enabled(kvm: Kvm) -> bool:
    """Whether slots count trackers: somebody registered, or guest tables are shadowed. In 5.10 always."""
    return (
        kvm.external_write_tracking_enabled or kvm.shadow_root_allocated or not kvm.tdp_enabled
        or kvm.profile.mmu_is_page_track_node
    )


def kvm_mmu_slot_gfn_write_protect(kvm: Kvm, slot: KvmMemorySlot, gfn: int, min_level: int) -> bool:
    """Take W, and the right to get it back, from every leaf of `gfn`, mmu_lock held for write.

    Whether a flush is due.
    """
    protected = kvm_rmap_write_protect_gfn(kvm, slot, gfn, min_level)
    if kvm.tdp_mmu_enabled:
        protected |= kvm_tdp_mmu_write_protect_gfn(kvm, slot, gfn, min_level)
    return protected


def _update_gfn_write_track(kvm: Kvm, slot: KvmMemorySlot, gfn: int, change: int) -> None:
    if not kvm_page_track_write_tracking_enabled(kvm):
        raise BrokenTruth("write-tracked", "nobody has registered for write tracking", kvm.stream.here())
    track = slot.gfn_write_track
    count = track.get(gfn - slot.base_gfn, 0) + change
    if not 0 <= count <= _USHRT_MAX:
        raise BrokenTruth("write-tracked", f"gfn {gfn:#x} has {count} trackers", kvm.stream.here())
    if count:
        track[gfn - slot.base_gfn] = count
    else:
        del track[gfn - slot.base_gfn]
    if (t := kvm.trace.write_track) is not None:
        t(gfn, count)


def slot_write_track_add_gfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> None:
    """__kvm_write_track_add_gfn: from here on every guest write to `gfn` exits. mmu_lock held for write."""
    _update_gfn_write_track(kvm, slot, gfn, 1)
    kvm_mmu_gfn_disallow_lpage(slot, gfn)
    truths = kvm.truths
    if kvm_mmu_slot_gfn_write_protect(kvm, slot, gfn, PG_LEVEL_4K):
        if truths is not None:
            truths.note_flush_due()
        if "no-track-flush" not in kvm.breaks:
            kvm_flush_remote_tlbs(kvm)
    if truths is not None:
        truths.note_tracked(gfn)


def slot_write_track_remove_gfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> None:
    """__kvm_write_track_remove_gfn: one tracker less. The SPTE gets W back at the next write fault."""
    _update_gfn_write_track(kvm, slot, gfn, -1)
    kvm_mmu_gfn_allow_lpage(slot, gfn)


def kvm_write_track_add_gfn(kvm: Kvm, gfn: int) -> int:
    """Track `gfn`. 0, or -EINVAL where it has no memslot."""
    with _SrcuRead(kvm):
        slot = kvm.slots().gfn_to_memslot(gfn)
        if slot is None:
            return -EINVAL
        with kvm.mmu_lock:
            slot_write_track_add_gfn(kvm, slot, gfn)
    return 0


def kvm_write_track_remove_gfn(kvm: Kvm, gfn: int) -> int:
    """Stop tracking `gfn`. 0, or -EINVAL where it has no memslot."""
    with _SrcuRead(kvm):
        slot = kvm.slots().gfn_to_memslot(gfn)
        if slot is None:
            return -EINVAL
        with kvm.mmu_lock:
            slot_write_track_remove_gfn(kvm, slot, gfn)
    return 0


class _SrcuRead:
    """A read section of kvm->srcu."""

    __slots__ = ("_idx", "_kvm")

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm

    def __enter__(self) -> None:
        self._idx = self._kvm.srcu.read_lock()

    def __exit__(self, *exc: object) -> None:
        self._kvm.srcu.read_unlock(self._idx)


# -- the head -----------------------------------------------------------------------------------


def kvm_page_track_register_notifier(kvm: Kvm, node: KvmPageTrackNotifierNode, mm: MmStruct) -> int:
    """Put `node` first on the head. `mm` is the caller's; 0, or -ESRCH if it is not the VM's (6.18)."""
    if not kvm.profile.mmu_is_page_track_node and mm is not kvm.mm:
        return -ESRCH
    if not kvm.external_write_tracking_enabled:
        with kvm.slots_arch_lock:
            kvm.external_write_tracking_enabled = True
    with kvm.mmu_lock:
        kvm.track_notifier_list.insert(0, node)
    return 0


def kvm_page_track_unregister_notifier(kvm: Kvm, node: KvmPageTrackNotifierNode) -> None:
    """Take `node` off the head; when this returns, nobody calls it any more."""
    with kvm.mmu_lock:
        kvm.track_notifier_list.remove(node)
    kvm.track_srcu.synchronize()


def kvm_page_track_write(vcpu: Vcpu, gpa: int, new: bytes) -> None:
    """An emulated write has been made: tell the nodes and, where it is none of them, the MMU."""
    kvm = vcpu.kvm
    if kvm.track_notifier_list:
        if (t := kvm.trace.page_track_write) is not None:
            t(gpa, len(new), len(kvm.track_notifier_list))
        idx = kvm.track_srcu.read_lock()
        for node in tuple(kvm.track_notifier_list):
            node.track_write(vcpu, gpa, new)
        kvm.track_srcu.read_unlock(idx)
    if not kvm.profile.mmu_is_page_track_node:
        kvm.mmu_track_write(vcpu, gpa, new)


def kvm_page_track_delete_slot(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """The slot is gone: tell who may keep something of it (6.18)."""
    if not kvm.track_notifier_list:
        return
    idx = kvm.track_srcu.read_lock()
    for node in tuple(kvm.track_notifier_list):
        node.track_remove_region(slot.base_gfn, slot.npages)
    kvm.track_srcu.read_unlock(idx)


def kvm_page_track_flush_slot(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """The slot is being deleted or moved; one of the nodes is the MMU, which zaps it (5.10)."""
    idx = kvm.track_srcu.read_lock()
    for node in tuple(kvm.track_notifier_list):
        node.track_flush_slot(kvm, slot)
    kvm.track_srcu.read_unlock(idx)
