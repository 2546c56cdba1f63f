"""The MMU's shrinker: when the host is short of memory, VMs give table pages back, one VM at a time.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 5.10): mmu_shrink_scan, mmu_shrink_count, kvm_mmu_module_init.
Linux 6.18 has none.

Only pages outside the TDP MMU count. Who was asked goes to the end of the list.

Not modelled: obsolete pages that another zap has not committed yet (none are left behind here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.locks import Mutex
from host_mm.shrinker import DEFAULT_SEEKS, Shrinker
from kvm_model.mmu.shadow_zap import kvm_mmu_zap_oldest_mmu_pages

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from kvm_model.kvm_main import Kvm

__all__ = ["MmuShrinker", "register", "unregister"]


class MmuShrinker(Shrinker):
    """The module's one shrinker, with its list of VMs."""

    def __init__(self, host: HostMm) -> None:
        super().__init__("mmu_shrinker", self.mmu_shrink_count, self.mmu_shrink_scan, DEFAULT_SEEKS * 10)
        self.kvm_lock = Mutex(host.sched, "kvm_lock")
        self.vm_list: list[Kvm] = []

    def mmu_shrink_count(self) -> int:
        """Pages of all VMs, roots and all."""
        return sum(kvm.n_used_mmu_pages for kvm in self.vm_list)

    def mmu_shrink_scan(self, nr_to_scan: int) -> int:
        """Zap so many pages of the first VM that has any; how many went."""
        freed = 0
        with self.kvm_lock:
            for kvm in self.vm_list[:nr_to_scan]:
                if not kvm.n_used_mmu_pages:
                    continue
                idx = kvm.srcu.read_lock()
                with kvm.mmu_lock:
                    freed = kvm_mmu_zap_oldest_mmu_pages(kvm, nr_to_scan)
                kvm.srcu.read_unlock(idx)
                self.vm_list.remove(kvm)
                self.vm_list.append(kvm)
                break
        return freed


def _of(host: HostMm) -> MmuShrinker:
    for each in host.shrinkers:
        if isinstance(each, MmuShrinker):
            return each
    made = MmuShrinker(host)
    host.shrinkers.append(made)
    return made


def register(kvm: Kvm) -> None:
    """A VM is made: it joins the list."""
    _of(kvm.host).vm_list.insert(0, kvm)


def unregister(kvm: Kvm) -> None:
    """It is gone."""
    _of(kvm.host).vm_list.remove(kvm)
