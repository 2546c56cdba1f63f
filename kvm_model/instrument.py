"""What tools ask of KVM's tables: the SPTEs of an address, and how to get a page mapped or dropped.

Source of truth: none for `map_for_instrument` and `zap_for_instrument`, which nobody in Linux calls; they
do what KVM_PRE_FAULT_MEMORY and kvm_zap_gfn_range do (arch/x86/kvm/mmu/mmu.c; Linux 6.18). A walk is
get_mmio_spte's.

Not modelled: mmu_rmaps_stat, the file of debugfs that shows how long the rmaps are.
"""

from __future__ import annotations

from errno import EOPNOTSUPP
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.mmu import gfn_range, mmio, mmu, mmu_roots
from kvm_model.mmu.mmu_internal import INVALID_PAGE, PFERR_GUEST_FINAL_MASK, PFERR_WRITE_MASK
from kvm_model.mmu.rmap import gfn_to_rmap, rmap_sptes
from kvm_model.mmu.shadow_walk import get_walk
from kvm_model.mmu.spte import (
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    is_last_spte,
    is_shadow_present_pte,
)
from kvm_model.requests import kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = ["leaf_spte", "map_for_instrument", "mapping_level", "walk_sptes", "zap_for_instrument"]


def walk_sptes(kvm: Kvm, addr: int, vcpu: Vcpu | None = None) -> list[tuple[int, int, int]]:
    """(level, physical address of the entry, SPTE) from the root down; empty without a root.

    `addr` is a gpa under TDP, else the guest's linear address.
    """
    vcpu = vcpu or kvm.vcpus[0]
    if vcpu.root_hpa == INVALID_PAGE:
        return []
    steps = mmio.kvm_tdp_mmu_get_walk(vcpu, addr) if kvm.tdp_enabled else get_walk(vcpu, addr)
    return [(level, sptep << 3, spte) for level, sptep, spte in steps]


def leaf_spte(kvm: Kvm, gfn: int) -> tuple[int, int]:
    """(physical address, level) of the present leaf that maps `gfn` for vCPU 0, or (0, 0)."""
    steps = walk_sptes(kvm, gfn << 12)
    if steps:
        level, address, spte = steps[-1]
        if is_shadow_present_pte(spte) and is_last_spte(spte, level):
            return address, level
    return 0, 0


def mapping_level(kvm: Kvm, gfn: int) -> int:
    """The level of the leaf that maps `gfn`: for vCPU 0 under TDP, else the highest of all. 0: none."""
    if kvm.tdp_enabled:
        return leaf_spte(kvm, gfn)[1]
    slot = kvm.slots().gfn_to_memslot(gfn)
    mapped = [
        level for level in (PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K)
        if slot is not None and any(True for _ in rmap_sptes(gfn_to_rmap(gfn, level, slot)))
    ]
    return max(mapped, default=0)


def map_for_instrument(kvm: Kvm, gfn: int) -> None:
    """Map `gfn` writable with a 4K leaf, splitting what is larger; KernelError if it cannot be.

    The leaf counts as instrumented from now on. Not where KVM shadows the guest's tables (EOPNOTSUPP).
    """
    if not kvm.tdp_enabled:
        raise KernelError(EOPNOTSUPP, "shadow pages map linear addresses, not gfns")
    vcpu = kvm.vcpus[0]
    idx = kvm.srcu.read_lock()
    try:
        error_code = PFERR_WRITE_MASK | PFERR_GUEST_FINAL_MASK
        r = mmu_roots.kvm_mmu_reload(vcpu)
        if not r:
            r = mmu.kvm_tdp_map_page(vcpu, gfn << 12, error_code, PG_LEVEL_4K, prefetch=False)
        if r < 0:
            raise KernelError(-r, f"gfn {gfn:#x} cannot be mapped")
        kvm.instrumented.add(leaf_spte(kvm, gfn)[0] >> 3)
    finally:
        kvm.srcu.read_unlock(idx)


def zap_for_instrument(kvm: Kvm, gfn: int) -> None:
    """Drop the leaves of `gfn`, with a flush: the guest's next access faults it in anew."""
    with kvm.mmu_lock:
        if gfn_range.kvm_zap_gfn_range_locked(kvm, gfn, gfn + 1):
            kvm_flush_remote_tlbs(kvm)
