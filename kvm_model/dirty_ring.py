"""The dirty ring: each vCPU tells user space which gfns it dirtied, in memory that both see.

Source of truth: virt/kvm/dirty_ring.c (Linux 6.18); include/uapi/linux/kvm.h: kvm_dirty_gfn.

An entry is 16 bytes in frames of KVM's own, which the VMM maps from the vCPU's descriptor:

    0        4        8               16
    +--------+--------+----------------+
    | flags  |  slot  |     offset     |   slot: as_id << 16 | id; offset: gfn - base_gfn
    +--------+--------+----------------+

KVM fills one in and sets DIRTY; user space reads it and sets RESET; KVM_RESET_DIRTY_RINGS clears the
flags and protects the page again. From `soft_limit` entries on the vCPU does not run: what it may still
push while it leaves (one drained log of the CPU, and one entry a fault) has room behind that.

Not modelled: a signal during a reset, the bitmap beside the ring (no x86 kernel allows it).
"""

from __future__ import annotations

from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.page import put_page
from kvm_model.requests import KVM_REQ_DIRTY_RING_SOFT_FULL, kvm_check_request, kvm_make_request
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "KVM_DIRTY_GFN_F_DIRTY", "KVM_DIRTY_GFN_F_RESET", "KVM_DIRTY_GFN_SIZE", "TRACEPOINTS", "KvmDirtyRing",
    "kvm_dirty_ring_check_request", "kvm_dirty_ring_push", "kvm_dirty_ring_reset",
    "kvm_dirty_ring_size_error",
]

KVM_DIRTY_GFN_F_DIRTY = 1
KVM_DIRTY_GFN_F_RESET = 2
KVM_DIRTY_GFN_SIZE = 16
_RSVD_ENTRIES = 64
_MAX_ENTRIES = 65_536
_PAGE = 4096
_BITS_PER_LONG = 64

KVM_DIRTY_RING_PUSH = Tracepoint(
    "kvm", "kvm_dirty_ring_push", ("index", "dirty_index", "reset_index", "slot", "offset"),
    lambda index, dirty, reset, slot, offset:
        f"ring {index}: dirty {dirty:#x} reset {reset:#x} slot {slot} offset {offset:#x} "
        f"(used {dirty - reset})",
)
KVM_DIRTY_RING_RESET = Tracepoint(
    "kvm", "kvm_dirty_ring_reset", ("index", "dirty_index", "reset_index"),
    lambda index, dirty, reset: f"ring {index}: dirty {dirty:#x} reset {reset:#x} (used {dirty - reset})",
)
KVM_DIRTY_RING_EXIT = Tracepoint(
    "kvm", "kvm_dirty_ring_exit", ("vcpu_id",), lambda vcpu_id: f"vcpu {vcpu_id}",
)
TRACEPOINTS = (KVM_DIRTY_RING_PUSH, KVM_DIRTY_RING_RESET, KVM_DIRTY_RING_EXIT)


def _rsvd_entries(kvm: Kvm) -> int:
    return _RSVD_ENTRIES + kvm.cpu_dirty_log_size


def kvm_dirty_ring_size_error(kvm: Kvm, size: int) -> int:
    """What kvm_vm_ioctl_enable_dirty_log_ring answers to rings of `size` bytes: 0 or an errno."""
    if size <= 0 or size & (size - 1):
        return EINVAL
    if size < _rsvd_entries(kvm) * KVM_DIRTY_GFN_SIZE or size < _PAGE:
        return EINVAL
    if size > _MAX_ENTRIES * KVM_DIRTY_GFN_SIZE:
        return E2BIG
    return EINVAL if kvm.dirty_ring_size or kvm.vcpus else 0


class KvmDirtyRing:
    """struct kvm_dirty_ring of one vCPU. The indexes only grow; an entry is at its index modulo `size`.

    Raises KernelError(ENOMEM) where the host has no frames for it.
    """

    __slots__ = ("dirty_index", "index", "pfns", "ram", "reset_index", "size", "soft_limit")

    def __init__(self, kvm: Kvm, index: int, size: int) -> None:
        self.ram = kvm.ram
        self.index = index
        self.size = size // KVM_DIRTY_GFN_SIZE
        self.soft_limit = self.size - _rsvd_entries(kvm)
        self.dirty_index = 0
        self.reset_index = 0
        self.pfns = [kvm.alloc_zeroed_page() for _ in range(size // _PAGE)]

    def free(self, kvm: Kvm) -> None:
        """kvm_dirty_ring_free."""
        while self.pfns:
            put_page(kvm.host, self.pfns.pop())

    def _word(self, index: int) -> int:
        at = index & (self.size - 1)
        return self.pfns[at >> 8] << 9 | (at & 255) << 1

    def read(self, index: int) -> tuple[int, int, int]:
        """(flags, slot, offset) of an entry, as the VMM's mapping shows it."""
        word = self._word(index)
        head = self.ram.u64[word]
        return head & 0xFFFF_FFFF, head >> 32, self.ram.u64[word + 1]

    def set_flags(self, index: int, flags: int) -> None:
        """Store an entry's flags, as KVM or the VMM does."""
        word = self._word(index)
        self.ram.u64[word] = self.ram.u64[word] & ~0xFFFF_FFFF | flags

    def fill(self, index: int, slot: int, offset: int) -> None:
        """Store an entry, flags last."""
        word = self._word(index)
        self.ram.u64[word] = slot << 32
        self.ram.u64[word + 1] = offset
        self.set_flags(index, KVM_DIRTY_GFN_F_DIRTY)

    @property
    def used(self) -> int:
        """Entries pushed and not yet reset."""
        return self.dirty_index - self.reset_index

    @property
    def soft_full(self) -> bool:
        """Whether the vCPU must leave before it runs on."""
        return self.used >= self.soft_limit


def kvm_dirty_ring_push(vcpu: Vcpu, slot: int, offset: int) -> None:
    """The vCPU dirtied a page."""
    ring = vcpu.dirty_ring
    assert ring is not None
    kvm = vcpu.kvm
    if ring.used >= ring.size:
        raise BrokenTruth("dirty-ring", f"ring {ring.index} is full", kvm.stream.ctx.cause)
    ring.fill(ring.dirty_index, slot, offset)
    ring.dirty_index += 1
    if kvm.truths is not None:
        kvm.truths.log.note_ring(slot, offset, 1)
    if (t := kvm.trace.kvm_dirty_ring_push) is not None:
        t(ring.index, ring.dirty_index, ring.reset_index, slot, offset)
    if ring.soft_full:
        kvm_make_request(KVM_REQ_DIRTY_RING_SOFT_FULL, vcpu)


def kvm_dirty_ring_check_request(vcpu: Vcpu) -> bool:
    """Whether the vCPU may not enter the guest: its ring is soft-full. The request stays until it is not."""
    ring = vcpu.dirty_ring
    if ring is None or not kvm_check_request(KVM_REQ_DIRTY_RING_SOFT_FULL, vcpu) or not ring.soft_full:
        return False
    kvm_make_request(KVM_REQ_DIRTY_RING_SOFT_FULL, vcpu)
    if (t := vcpu.kvm.trace.kvm_dirty_ring_exit) is not None:
        t(vcpu.vcpu_id)
    return True


def kvm_dirty_ring_reset(kvm: Kvm, ring: KvmDirtyRing, reset_gfn: Callable[[int, int, int], None]) -> int:
    """Take back the harvested entries; how many. `reset_gfn(slot, offset, mask)` protects their pages.

    slots_lock held. Neighbours within 64 gfns of one slot are protected in one go, whichever way the
    guest went over them.
    """
    count = 0
    slot = offset = mask = 0
    while ring.read(ring.reset_index)[0] & KVM_DIRTY_GFN_F_RESET:
        _, next_slot, next_offset = ring.read(ring.reset_index)
        ring.set_flags(ring.reset_index, 0)
        ring.reset_index += 1
        count += 1
        if kvm.truths is not None:
            kvm.truths.log.note_ring(next_slot, next_offset, -1)
        if mask:
            if kvm.sched.preempt:
                kvm.sched.point("dirty-ring-reset")
            delta = next_offset - offset
            if next_slot == slot and 0 <= delta < _BITS_PER_LONG:
                mask |= 1 << delta
                continue
            if next_slot == slot and -_BITS_PER_LONG < delta < 0 and mask << -delta < 1 << _BITS_PER_LONG:
                offset = next_offset
                mask = mask << -delta | 1
                continue
            reset_gfn(slot, offset, mask)
        slot, offset, mask = next_slot, next_offset, 1
    if mask:
        reset_gfn(slot, offset, mask)
    if (t := kvm.trace.kvm_dirty_ring_reset) is not None:
        t(ring.index, ring.dirty_index, ring.reset_index)
    return count
