"""Faults on MMIO SPTEs, and the vCPU's one-entry cache of MMIO addresses.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): handle_mmio_page_fault, get_mmio_spte,
check_mmio_spte; arch/x86/kvm/x86.h: vcpu_match_mmio_gpa, vcpu_cache_mmio_info.

Not modelled: the cache by guest linear address (shadow paging), fast MMIO buses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.memslots import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
from kvm_model.mmu.mmu_internal import RET_PF_EMULATE, RET_PF_INVALID, RET_PF_RETRY
from kvm_model.mmu.spte import MMIO_SPTE_GEN_MASK, get_mmio_spte_generation
from kvm_model.mmu.tdp_iter import TdpIter
from kvm_model.mmu.tdp_mmu import root_to_sp
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["TRACEPOINTS", "handle_mmio_page_fault", "kvm_tdp_mmu_get_walk", "vcpu_match_mmio_gpa"]

HANDLE_MMIO_PAGE_FAULT = Tracepoint(
    "kvmmmu", "handle_mmio_page_fault", ("addr", "gfn", "access"),
    lambda addr, gfn, access: f"addr:{addr:x} gfn {gfn:x} access {access:x}",
)
CHECK_MMIO_SPTE = Tracepoint(
    "kvmmmu", "check_mmio_spte", ("kvm_gen", "spte_gen", "spte"),
    lambda kvm_gen, spte_gen, spte:
        f"spte {spte:x} kvm_gen {kvm_gen:x} spte-gen {spte_gen:x} valid {int(kvm_gen == spte_gen)}",
)
TRACEPOINTS = (HANDLE_MMIO_PAGE_FAULT, CHECK_MMIO_SPTE)


def vcpu_match_mmio_gpa(vcpu: Vcpu, gpa: int) -> bool:
    """Whether the vCPU's last MMIO access was to this page, under today's memslots."""
    return (
        vcpu.mmio_gfn != 0 and vcpu.mmio_gfn == gpa >> 12
        and vcpu.mmio_gen == vcpu.kvm.slots().generation
    )


def kvm_tdp_mmu_get_walk(vcpu: Vcpu, gpa: int) -> list[tuple[int, int, int]]:
    """(level, index in Ram.u64, SPTE) of each step of the walk of `gpa`, from the root down."""
    kvm = vcpu.kvm
    kvm.rcu.read_lock()
    it = TdpIter(kvm.ram, root_to_sp(kvm, vcpu.root_hpa), 1, gpa >> 12, (gpa >> 12) + 1)
    steps = []
    while it.valid:
        steps.append((it.level, it.sptep, it.old_spte))
        it.next()
    kvm.rcu.read_unlock()
    return steps


def _check_mmio_spte(vcpu: Vcpu, spte: int) -> bool:
    generation = vcpu.kvm.slots().generation
    if generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return False
    kvm_gen = generation & MMIO_SPTE_GEN_MASK
    spte_gen = get_mmio_spte_generation(spte)
    if (t := vcpu.kvm.trace.check_mmio_spte) is not None:
        t(kvm_gen, spte_gen, spte)
    return kvm_gen == spte_gen


def handle_mmio_page_fault(vcpu: Vcpu, gpa: int) -> int:
    """RET_PF_EMULATE, RET_PF_INVALID if the SPTE is of an old generation, RET_PF_RETRY if it is gone."""
    kvm = vcpu.kvm
    if vcpu_match_mmio_gpa(vcpu, gpa):
        return RET_PF_EMULATE
    spte = kvm_tdp_mmu_get_walk(vcpu, gpa)[-1][2]
    if not kvm.spte.is_mmio_spte(spte):
        return RET_PF_RETRY
    if not _check_mmio_spte(vcpu, spte):
        return RET_PF_INVALID
    gfn = kvm.spte.get_mmio_spte_gfn(spte)
    if (t := kvm.trace.handle_mmio_page_fault) is not None:
        t(0, gfn, spte & kvm.spte.mmio_access)
    vcpu.mmio_gva = 0
    vcpu.mmio_gfn = gfn
    vcpu.mmio_gen = kvm.slots().generation
    return RET_PF_EMULATE
