"""Huge pages that are not executable, and the thread that gives split ones back.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): track_possible_nx_huge_page, kvm_recover_nx_huge_pages,
kvm_nx_huge_page_recovery_worker, calc_nx_huge_pages_recovery_period; tdp_mmu.c:
kvm_tdp_mmu_zap_possible_nx_huge_page, tdp_mmu_unlink_sp.

With kvm.nx_huge_pages a fetch from a huge page makes a table of 4K entries, of which each can be executable.
Those tables are listed, and every period the oldest 1/ratio of them is zapped: code that is no longer run
comes back as a huge page by its next read or write.

The kernel's thread sleeps period by period from the VM's first run on; here it runs at those times too, but
only while there is something in the list.

Not modelled: changing the parameters while a VM runs, recovery without the TDP MMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.memslots import kvm_slot_dirty_track_enabled
from kvm_model.mmu.mmu_internal import role_smm
from kvm_model.mmu.spte import SHADOW_NONPRESENT_VALUE, is_last_spte, is_shadow_present_pte, spte_to_pfn
from kvm_model.mmu.tdp_iter import TdpIter
from kvm_model.mmu.tdp_mmu import tdp_mmu_set_spte_atomic
from kvm_model.requests import kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.mmu.mmu_internal import KvmMmuPage

__all__ = ["NxRecovery"]

_MS = 1_000_000
_HOUR_MS = 3_600_000


class NxRecovery:
    """The list of one VM and its thread. `ratio` 0: none comes back; `period_ms` 0: an hour by the ratio."""

    def __init__(self, kvm: Kvm, ratio: int, period_ms: int) -> None:
        self.kvm = kvm
        self.ratio = ratio
        self.period_ns = (period_ms or _HOUR_MS // min(max(ratio, 1), 3600)) * _MS
        self.pages: dict[int, KvmMmuPage] = {}
        self._start = kvm.sched.now
        self._armed = False

    def track(self, sp: KvmMmuPage) -> None:
        """track_possible_nx_huge_page, tdp_mmu_pages_lock held: `sp` stands where a huge page could."""
        if sp.spt in self.pages:
            return
        self.kvm.stat["nx_lpage_splits"] += 1
        self.pages[sp.spt] = sp
        self._arm()

    def untrack(self, sp: KvmMmuPage) -> None:
        """unaccount_nx_huge_page, tdp_mmu_pages_lock held."""
        sp.nx_huge_page_disallowed = False
        if self.pages.pop(sp.spt, None) is not None:
            self.kvm.stat["nx_lpage_splits"] -= 1

    def _arm(self) -> None:
        if self._armed or not self.ratio or not self.pages:
            return
        self._armed = True
        sched = self.kvm.sched
        due = self.period_ns - (sched.now - self._start) % self.period_ns
        sched.after(due, self._wake)

    def _wake(self) -> None:
        self.kvm.sched.spawn("kvm-nx-lpage-recovery", self._worker)

    def _worker(self) -> None:
        self._armed = False
        if self.kvm.alive:
            self.recover()
            self._arm()

    def recover(self) -> None:
        """kvm_recover_nx_huge_pages: zap the oldest 1/ratio of the listed tables."""
        kvm = self.kvm
        to_zap = -(-len(self.pages) // self.ratio) if self.ratio else 0
        idx = kvm.srcu.read_lock()
        kvm.mmu_lock.read_lock()
        kvm.rcu.read_lock()
        flush = False
        for _ in range(to_zap):
            with kvm.tdp_mmu_pages_lock:
                sp = next(iter(self.pages.values()), None)
                if sp is not None:
                    self.untrack(sp)
            if sp is None:
                break
            # In a logged slot it would only come back as 4K pages.
            if not self._logged(sp):
                flush |= self._zap(sp)
            if kvm.sched.preempt:
                if flush:
                    kvm_flush_remote_tlbs(kvm)
                flush = False
                kvm.rcu.read_unlock()
                kvm.mmu_lock.read_unlock()
                kvm.sched.point("nx-recovery")
                kvm.mmu_lock.read_lock()
                kvm.rcu.read_lock()
        if flush:
            kvm_flush_remote_tlbs(kvm)
        kvm.rcu.read_unlock()
        kvm.mmu_lock.read_unlock()
        kvm.srcu.read_unlock(idx)

    def _logged(self, sp: KvmMmuPage) -> bool:
        """kvm_mmu_sp_dirty_logging_enabled."""
        if not self.kvm.nr_memslots_dirty_logging:
            return False
        slot = self.kvm.memslots[role_smm(sp.role)].gfn_to_memslot(sp.gfn)
        return slot is not None and kvm_slot_dirty_track_enabled(slot)

    def _zap(self, sp: KvmMmuPage) -> bool:
        """kvm_tdp_mmu_zap_possible_nx_huge_page: only if the entry above still points to this very table."""
        kvm = self.kvm
        parent = kvm.sps.get(sp.ptep >> 9)
        if parent is None:
            return False
        it = TdpIter(kvm.ram, parent, sp.level + 1, sp.gfn, sp.gfn + 1)
        old = it.old_spte
        if not is_shadow_present_pte(old) or is_last_spte(old, it.level) or spte_to_pfn(old) != sp.spt:
            return False
        return not tdp_mmu_set_spte_atomic(kvm, it, SHADOW_NONPRESENT_VALUE, "nx-recovery")
