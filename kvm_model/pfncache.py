"""gfn_to_pfn_cache: a guest page that KVM itself keeps mapped, valid until a notifier says otherwise.

Source of truth: virt/kvm/pfncache.c (Linux 6.18): kvm_gpc_init, kvm_gpc_activate, kvm_gpc_activate_hva,
kvm_gpc_check, kvm_gpc_refresh, __kvm_gpc_refresh, hva_to_pfn_retry, mmu_notifier_retry_cache,
kvm_gpc_deactivate, gfn_to_pfn_cache_invalidate_start; virt/kvm/kvm_main.c: kvm_gpc_mark_dirty_in_slot.

A user takes the cache's lock for read, checks it, uses the address, and unlocks; who finds it not valid
refreshes it without that lock and tries again. No page reference is kept: a bracket that opens over the host
address makes the cache invalid, and waits for who holds the lock. So a refresh may not end while any bracket
of the VM is open, wherever it is, or if one was opened meanwhile: it goes round, as long as brackets last.

What a cache writes marks no page dirty. Whoever makes the VMM's page clean behind a writable entry
(MADV_FREE) may so lose it, as in Linux.

Not modelled: kernel mappings (`khva` is the frame's address in RAM).
"""

from __future__ import annotations

from errno import EFAULT, EINVAL
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import TASK_SIZE
from host_mm.gup import FOLL_WRITE
from host_mm.kernel.locks import Mutex, RwLock
from host_mm.page import put_page
from kvm_model.follow_pfn import KvmFollowPfn, hva_to_pfn, kvm_release_page_clean
from kvm_model.memslots import (
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
    KvmMemorySlot,
    mark_page_dirty_in_slot,
)
from kvm_model.mmu.mmu_internal import KVM_PFN_ERR_FAULT, is_error_noslot_pfn
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = ["TRACEPOINTS", "GfnToPfnCache", "gfn_to_pfn_cache_invalidate_start"]

INVALID_GPA = -1
_ERR_HVA = -1

GPC_INVALIDATE = Tracepoint(
    "refault", "gpc_invalidate", ("gpa", "uhva", "pfn"),
    lambda gpa, uhva, pfn: f"gpa {gpa:#x} uhva {uhva:#x} pfn {pfn:x}",
    doc="A bracket makes a gfn_to_pfn_cache invalid.",
)
GPC_REFRESH = Tracepoint(
    "refault", "gpc_refresh", ("gpa", "uhva", "pfn", "rounds"),
    lambda gpa, uhva, pfn, rounds: f"gpa {gpa:#x} uhva {uhva:#x} pfn {pfn:x} rounds {rounds}",
    doc="A gfn_to_pfn_cache has its frame again, after so many rounds.",
)
TRACEPOINTS = (GPC_INVALIDATE, GPC_REFRESH)


class GfnToPfnCache:
    """struct gfn_to_pfn_cache. Hold `lock` for read from `check` to the last use of `khva`.

    `gpa` is INVALID_GPA in a cache by host address. `activate` and `refresh` want kvm->srcu held.
    """

    def __init__(self, kvm: Kvm) -> None:
        """kvm_gpc_init."""
        self.kvm = kvm
        self.lock = RwLock(kvm.sched, "gpc_lock")
        self.refresh_lock = Mutex(kvm.sched, "gpc_refresh_lock")
        self.gpa = INVALID_GPA
        self.uhva = _ERR_HVA
        self.memslot: KvmMemorySlot | None = None
        self.pfn = KVM_PFN_ERR_FAULT
        self.khva = -1
        self.generation = 0
        self.valid = False
        self.active = False

    # -- using it -------------------------------------------------------------------------------

    def check(self, length: int) -> bool:
        """Whether the cache may be used for `length` bytes; hold `lock`."""
        if not self.active or self.uhva < 0 or not _is_valid_len(self.gpa, self.uhva, length):
            return False
        if self.gpa != INVALID_GPA and self.generation != self.kvm.slots().generation:
            return False
        return self.valid

    def mark_dirty_in_slot(self, vcpu: Vcpu) -> None:
        """Log what was written through it; hold `lock`."""
        if self.gpa != INVALID_GPA:
            mark_page_dirty_in_slot(vcpu, self.memslot, self.gpa >> 12)

    # -- coming and going -----------------------------------------------------------------------

    def activate(self, gpa: int, length: int) -> int:
        """Join the VM's list and map `gpa`. 0 or a negative errno."""
        return self._activate(gpa, _ERR_HVA, length)

    def activate_hva(self, uhva: int, length: int) -> int:
        """The same by the VMM's address, whatever the memslots say of it."""
        if not 0 <= uhva < TASK_SIZE:
            return -EINVAL
        return self._activate(INVALID_GPA, uhva, length)

    def _activate(self, gpa: int, uhva: int, length: int) -> int:
        kvm = self.kvm
        if not _is_valid_len(gpa, uhva, length):
            return -EINVAL
        with self.refresh_lock:
            if not self.active:
                with kvm.gpc_lock:
                    kvm.gpc_list.insert(0, self)
                # Only now: a mapping that a bracket cannot reach must not be made.
                self.lock.lock()
                self.active = True
                self.lock.unlock()
            return self._refresh(gpa, uhva)

    def refresh(self, length: int) -> int:
        """Map the page again. 0 or a negative errno."""
        with self.refresh_lock:
            if not _is_valid_len(self.gpa, self.uhva, length):
                return -EINVAL
            return self._refresh(self.gpa, self.uhva if self.gpa == INVALID_GPA else _ERR_HVA)

    def deactivate(self) -> None:
        """Leave the VM's list."""
        with self.refresh_lock:
            if not self.active:
                return
            self.lock.lock()
            self.active = False
            self.valid = False
            self.khva = -1
            self.pfn = KVM_PFN_ERR_FAULT
            self.lock.unlock()
            with self.kvm.gpc_lock:
                self.kvm.gpc_list.remove(self)

    # -- refreshing -----------------------------------------------------------------------------

    def _refresh(self, gpa: int, uhva: int) -> int:
        """__kvm_gpc_refresh: one of the two addresses is given."""
        self.lock.lock()
        if not self.active:
            self.lock.unlock()
            return -EINVAL
        old_uhva = self.uhva & ~0xFFF if self.uhva >= 0 else _ERR_HVA
        if gpa == INVALID_GPA:
            offset = uhva & 0xFFF
            self.gpa = INVALID_GPA
            self.memslot = None
            self.uhva = uhva & ~0xFFF
        else:
            offset = gpa & 0xFFF
            self._look_up(gpa, old_uhva)
        if self.uhva < 0:
            ret = -EFAULT
        else:
            changed = self.uhva != old_uhva
            self.uhva += offset
            if self.valid and not changed:
                self.khva = self.pfn << 12 | offset
                self.lock.unlock()
                return 0
            ret = self._hva_to_pfn_retry()
        if ret:
            self.valid = False
            self.pfn = KVM_PFN_ERR_FAULT
            self.khva = -1
        self.lock.unlock()
        return ret

    def _look_up(self, gpa: int, old_uhva: int) -> None:
        slots = self.kvm.slots()
        if self.gpa == gpa and self.generation == slots.generation and self.uhva >= 0:
            self.uhva = old_uhva
            return
        self.gpa = gpa
        self.generation = slots.generation
        slot = self.memslot = slots.gfn_to_memslot(gpa >> 12)
        usable = slot is not None and not slot.flags & (KVM_MEMSLOT_INVALID | KVM_MEM_READONLY)
        self.uhva = slot.gfn_to_hva(gpa >> 12) if slot is not None and usable else _ERR_HVA

    def _hva_to_pfn_retry(self) -> int:
        """hva_to_pfn_retry: `lock` is held for write, and dropped on the way."""
        kvm = self.kvm
        if "gpc-map-before-invalidate" not in kvm.breaks:
            # The address is new already: whoever checks meanwhile must not take the old frame for it.
            self.valid = False
        pfn = KVM_PFN_ERR_FAULT
        rounds = 0
        while True:
            mmu_seq = kvm.mmu_invalidate_seq
            if kvm.sched.preempt:
                kvm.sched.point("seq")
            self.lock.unlock()
            if not is_error_noslot_pfn(pfn):
                put_page(kvm.host, pfn)
                kvm.sched.yield_()
            kfp = KvmFollowPfn(self.memslot, self.gpa >> 12, FOLL_WRITE, hva=self.uhva & ~0xFFF)
            kfp.try_writable = False
            pfn = hva_to_pfn(kvm, kfp)
            self.lock.lock()
            if is_error_noslot_pfn(pfn):
                return -EFAULT
            rounds += 1
            if not self._retry(mmu_seq):
                break
        self.valid = True
        self.pfn = pfn
        self.khva = pfn << 12 | self.uhva & 0xFFF
        kvm_release_page_clean(kvm, pfn)
        if (t := kvm.trace.gpc_refresh) is not None:
            t(self.gpa, self.uhva, pfn, rounds)
        return 0

    def _retry(self, mmu_seq: int) -> bool:
        """mmu_notifier_retry_cache."""
        kvm = self.kvm
        # The count of brackets, not of invalidations: the caches are told before the latter is raised.
        late = "gpc-late-count" in kvm.breaks
        if kvm.mmu_invalidate_in_progress if late else kvm.mn_active_invalidate_count:
            return True
        return kvm.mmu_invalidate_seq != mmu_seq


def _is_valid_len(gpa: int, uhva: int, length: int) -> bool:
    """kvm_gpc_is_valid_len: within a page."""
    return ((uhva if gpa == INVALID_GPA else gpa) & 0xFFF) + length <= 0x1000


def gfn_to_pfn_cache_invalidate_start(kvm: Kvm, start: int, end: int) -> None:
    """A bracket over [start, end) opens: caches in it may not be used any more."""
    if not kvm.gpc_list:
        return
    with kvm.gpc_lock:
        for gpc in tuple(kvm.gpc_list):
            gpc.lock.read_lock()
            inside = gpc.valid and start <= gpc.uhva < end
            gpc.lock.read_unlock()
            if not inside:
                continue
            # Waits for who uses it. It may have been refreshed since.
            gpc.lock.lock()
            if gpc.valid and start <= gpc.uhva < end:
                gpc.valid = False
                if (t := kvm.trace.gpc_invalidate) is not None:
                    t(gpc.gpa, gpc.uhva, gpc.pfn)
            gpc.lock.unlock()
