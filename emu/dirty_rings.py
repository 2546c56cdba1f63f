"""What the VMM does with KVM's dirty rings: it harvests them and keeps the pages it found, by slot.

Source: tools/testing/selftests/kvm/dirty_log_test.c: dirty_ring_collect_one; QEMU accel/kvm/kvm-all.c:
kvm_dirty_ring_reap (its bitmaps).

An entry that was harvested stays in the ring until the reset, and the page stays writable: whoever copies
pages resets first. What a running CPU's own log still holds (PML) comes with a later harvest.

Not modelled: a reaper thread; the rings are harvested when somebody asks or when one is full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.dirty_log import KVM_CAP_DIRTY_LOG_RING
from kvm_model.dirty_ring import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_GFN_SIZE

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["DirtyRings"]


class DirtyRings:
    """The rings of one VM's vCPUs, `entries` each (0: none). To be made before the first vCPU.

    Raises what KVM_ENABLE_CAP raises.
    """

    def __init__(self, kvm: Kvm, entries: int) -> None:
        self.kvm = kvm
        self.entries = entries
        self._fetch_index: dict[int, int] = {}
        self._pages: dict[int, set[int]] = {}
        if entries:
            kvm.enable_cap(KVM_CAP_DIRTY_LOG_RING, entries * KVM_DIRTY_GFN_SIZE)

    def collect(self) -> int:
        """Harvest every ring; how many entries there were."""
        count = 0
        for vcpu in self.kvm.vcpus:
            ring = vcpu.dirty_ring
            if ring is None:
                continue
            at = self._fetch_index.get(vcpu.vcpu_id, 0)
            while True:
                flags, slot, offset = ring.read(at)
                if flags != KVM_DIRTY_GFN_F_DIRTY:
                    break
                self._pages.setdefault(slot, set()).add(offset)
                ring.set_flags(at, KVM_DIRTY_GFN_F_RESET)
                at += 1
                count += 1
            self._fetch_index[vcpu.vcpu_id] = at
        return count

    def collect_and_reset(self) -> int:
        """Harvest and give the entries back to KVM; how many were harvested."""
        count = self.collect()
        if self.entries:
            self.kvm.reset_dirty_rings()
        return count

    def take(self, slot: int) -> int:
        """The pages of a slot that were written since the last time, page 0 in bit 0."""
        self.collect_and_reset()
        return sum(1 << page for page in self._pages.pop(slot, ()))
