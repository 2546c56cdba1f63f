"""gfn_to_pfn_cache: a guest page that KVM itself keeps mapped, valid until a notifier says otherwise.

Source of truth: virt/kvm/pfncache.c (Linux 6.18): gfn_to_pfn_cache_invalidate_start, kvm_gpc_check,
__kvm_gpc_refresh, hva_to_pfn_retry, mmu_notifier_retry_cache.

Users check the cache under its lock before each use and refresh it outside.

Not modelled: caches by host address only, kernel mappings (a frame is its own mapping here).
"""

from __future__ import annotations

from errno import EFAULT, EINVAL
from typing import TYPE_CHECKING

from host_mm.gup import FOLL_WRITE
from host_mm.kernel.locks import Mutex, RwLock
from host_mm.page import put_page
from kvm_model.follow_pfn import KvmFollowPfn, hva_to_pfn, kvm_release_page_clean
from kvm_model.memslots import KVM_MEMSLOT_INVALID
from kvm_model.mmu.mmu_internal import KVM_PFN_ERR_FAULT, is_error_noslot_pfn

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["GfnToPfnCache", "gfn_to_pfn_cache_invalidate_start"]


class GfnToPfnCache:
    """struct gfn_to_pfn_cache. Hold `lock` for read from `check` to the last use of `pfn`."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.lock = RwLock(kvm.sched, "gpc_lock")
        self.refresh_lock = Mutex(kvm.sched, "gpc_refresh_lock")
        self.gpa = -1
        self.uhva = 0
        self.pfn = KVM_PFN_ERR_FAULT
        self.generation = 0
        self.valid = False
        self.active = False

    def activate(self, gpa: int) -> int:
        """Join the VM's list and map `gpa`. 0 or a negative errno."""
        kvm = self.kvm
        if not self.active:
            self.active = True
            with kvm.gpc_lock:
                kvm.gpc_list.append(self)
        self.gpa = gpa
        return self.refresh()

    def check(self, length: int) -> bool:
        """Whether the cache may be used for `length` bytes; hold `lock`."""
        return (
            self.active and self.valid and self.generation == self.kvm.slots().generation
            and (self.gpa & 0xFFF) + length <= 0x1000
        )

    def refresh(self) -> int:
        """Map the page again. 0 or a negative errno."""
        kvm = self.kvm
        with self.refresh_lock:
            if not self.active:
                return -EINVAL
            idx = kvm.srcu.read_lock()
            self.lock.lock()
            slots = kvm.slots()
            self.generation = slots.generation
            slot = slots.gfn_to_memslot(self.gpa >> 12)
            if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
                self.valid = False
                ret = -EFAULT
            else:
                self.uhva = slot.gfn_to_hva(self.gpa >> 12)
                kfp = KvmFollowPfn(slot, self.gpa >> 12, FOLL_WRITE, hva=self.uhva)
                kfp.try_writable = False
                ret = self._hva_to_pfn_retry(kfp)
            self.lock.unlock()
            kvm.srcu.read_unlock(idx)
        return ret

    def _hva_to_pfn_retry(self, kfp: KvmFollowPfn) -> int:
        kvm = self.kvm
        self.valid = False
        pfn = KVM_PFN_ERR_FAULT
        while True:
            mmu_seq = kvm.mmu_invalidate_seq
            self.lock.unlock()
            if not is_error_noslot_pfn(pfn):
                put_page(kvm.host, pfn)
                kvm.sched.yield_()
            pfn = hva_to_pfn(kvm, kfp)
            self.lock.lock()
            if is_error_noslot_pfn(pfn):
                self.pfn = KVM_PFN_ERR_FAULT
                return -EFAULT
            if not self._retry(mmu_seq):
                break
        self.valid = True
        self.pfn = pfn
        kvm_release_page_clean(kvm, pfn)
        return 0

    def _retry(self, mmu_seq: int) -> bool:
        # The count of brackets, not of invalidations: the caches are told before the latter is raised.
        kvm = self.kvm
        return kvm.mn_active_invalidate_count != 0 or kvm.mmu_invalidate_seq != mmu_seq

    def deactivate(self) -> None:
        """Leave the VM's list."""
        with self.refresh_lock:
            if self.active:
                self.active = False
                self.valid = False
                with self.kvm.gpc_lock:
                    self.kvm.gpc_list.remove(self)


def gfn_to_pfn_cache_invalidate_start(kvm: Kvm, start: int, end: int) -> None:
    """A bracket over [start, end) opens: caches in it may not be used any more."""
    if not kvm.gpc_list:
        return
    with kvm.gpc_lock:
        for gpc in kvm.gpc_list:
            with gpc.lock:
                if gpc.valid and start <= gpc.uhva < end:
                    gpc.valid = False
