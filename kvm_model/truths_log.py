"""The truths about the dirty log: write-logged, log-flushed (truths.py).

Source of truth: the rules themselves (virt/kvm/kvm_main.c: kvm_get_dirty_log_protect; virt/kvm/dirty_ring.c;
Documentation/virt/kvm/api.rst, 4.8); Linux 6.18.

Not modelled: looking at a slot while slots_lock is held: its protection and its bits are then on their way.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from kvm_model.memslots import kvm_slot_dirty_track_enabled
from kvm_model.mmu.spte import kvm_pages_per_hpage
from kvm_model.vmx.pml import pml_entries

if TYPE_CHECKING:
    from host_mm.kernel.sched import Task
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = ["LogTruths"]


class LogTruths:
    """Watches the logs of one VM: the bitmaps of its slots, its rings, its CPUs' own logs."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        # Tasks that protect pages for the log; whether each took away rights and asked for no flush yet.
        self._calls: dict[Task, bool] = {}
        self._ring: Counter[tuple[int, int]] = Counter()

    def note_call(self) -> None:
        """This task protects pages for the dirty log from now on, until `note_returned`."""
        self._calls[self.kvm.sched.current] = False

    def note_returned(self) -> None:
        """User space may look at the log now, and counts on hearing of every later write."""
        if self._calls.pop(self.kvm.sched.current, False):
            why = "SPTEs were protected for the log and no vCPU was asked to flush"
            raise BrokenTruth("log-flushed", why, self.kvm.stream.here())

    def write_protected(self) -> None:
        """A leaf lost W."""
        if self.kvm.sched.current in self._calls:
            self._calls[self.kvm.sched.current] = True

    def flushed(self) -> None:
        """Every vCPU has, or is about to get, a flush request."""
        self._calls.update(dict.fromkeys(self._calls, False))

    def note_ring(self, slot: int, offset: int, change: int) -> None:
        """An entry was pushed to a dirty ring (1) or is about to be reset (-1)."""
        self._ring[slot, offset] += change

    def check_leaf(self, slot: KvmMemorySlot, gfn: int, level: int, spte: int, seq: int | None) -> None:
        """A leaf that lets `gfn` be written; `seq` is the event to name if that is not logged."""
        kvm = self.kvm
        if not kvm_slot_dirty_track_enabled(slot) or kvm.slots_lock.owner is not None:
            # Under slots_lock the log is turned on, read or cleared: protection and bits are on their way.
            return
        if kvm.cpu_dirty_log_size and not spte & kvm.spte.dirty:
            return
        for page in range(gfn, gfn + kvm_pages_per_hpage(level)):
            if not self._is_logged(slot, page):
                why = f"gfn {page:#x} is writable by {spte:#x}, its dirty bit is clear"
                raise BrokenTruth("write-logged", why, kvm.stream.here() if seq is None else seq)

    def _is_logged(self, slot: KvmMemorySlot, gfn: int) -> bool:
        kvm = self.kvm
        page = gfn - slot.base_gfn
        bitmap = slot.dirty_bitmap
        if bitmap is not None:
            logged = bitmap[page >> 3] >> (page & 7) & 1 != 0
        else:
            logged = self._ring[slot.as_id << 16 | slot.id, page] > 0
        return logged or (kvm.cpu_dirty_log_size != 0 and any(gfn in pml_entries(vcpu) for vcpu in kvm.vcpus))
