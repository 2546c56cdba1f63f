"""MMIO SPTEs: making them, faults on them, and the vCPU's one-entry cache of MMIO addresses.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): mark_mmio_spte, handle_mmio_page_fault, get_mmio_spte,
check_mmio_spte, mmio_info_in_cache; arch/x86/kvm/x86.h: vcpu_match_mmio_gpa, vcpu_match_mmio_gva,
vcpu_cache_mmio_info, vcpu_clear_mmio_info.

The cache is by gpa where the vCPU's MMU is direct, else by the guest's linear address, which then must be
forgotten when the guest flushes it.

Not modelled: fast MMIO buses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.guest_access import kvm_vcpu_memslots
from kvm_model.memslots import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
from kvm_model.mmu.mmu_internal import RET_PF_EMULATE, RET_PF_INVALID, RET_PF_RETRY
from kvm_model.mmu.shadow_spte import mmu_spte_set
from kvm_model.mmu.shadow_walk import get_walk
from kvm_model.mmu.spte import ACC_ALL, MMIO_SPTE_GEN_MASK, get_mmio_spte_generation
from kvm_model.mmu.tdp_iter import TdpIter
from kvm_model.mmu.tdp_pages import root_to_sp
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "MMIO_GVA_ANY", "TRACEPOINTS", "handle_mmio_page_fault", "kvm_tdp_mmu_get_walk", "mark_mmio_spte",
    "mmio_info_in_cache", "vcpu_cache_mmio_info", "vcpu_clear_mmio_info", "vcpu_match_mmio_gpa",
    "vcpu_match_mmio_gva",
]

MMIO_GVA_ANY = (1 << 64) - 1
_PAGE_MASK = ((1 << 64) - 1) & ~0xFFF

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


def vcpu_match_mmio_gva(vcpu: Vcpu, gva: int) -> bool:
    """Whether the vCPU's last MMIO access was by this page's linear address, under today's memslots."""
    return (
        vcpu.mmio_gva != 0 and vcpu.mmio_gva == gva & _PAGE_MASK
        and vcpu.mmio_gen == vcpu.kvm.slots().generation
    )


def mmio_info_in_cache(vcpu: Vcpu, addr: int, direct: bool) -> bool:
    """Whether a fault's address is the cached one."""
    return vcpu_match_mmio_gpa(vcpu, addr) if direct else vcpu_match_mmio_gva(vcpu, addr)


def vcpu_cache_mmio_info(vcpu: Vcpu, gva: int, gfn: int, access: int) -> None:
    """Remember an MMIO access; `gva` 0 where the MMU is direct. Not while memslots are being updated."""
    generation = vcpu.kvm.slots().generation
    if generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return
    vcpu.mmio_gva = gva & _PAGE_MASK
    vcpu.mmio_access = access
    vcpu.mmio_gfn = gfn
    vcpu.mmio_gen = generation


def vcpu_clear_mmio_info(vcpu: Vcpu, gva: int) -> None:
    """Forget the linear address, if it is this one or MMIO_GVA_ANY is asked for."""
    if gva in (MMIO_GVA_ANY, vcpu.mmio_gva) or vcpu.mmio_gva == gva & _PAGE_MASK:
        vcpu.mmio_gva = 0


def mark_mmio_spte(vcpu: Vcpu, sptep: int, gfn: int, access: int) -> None:
    """Make an SPTE that lets accesses to `gfn` exit as MMIO; what stood there maps nothing."""
    kvm = vcpu.kvm
    generation = kvm_vcpu_memslots(vcpu).generation
    spte = kvm.spte.make_mmio_spte(gfn, access, generation)
    if (t := kvm.trace.mark_mmio_spte) is not None:
        t(sptep << 3, gfn, spte & ACC_ALL, get_mmio_spte_generation(spte))
    mmu_spte_set(kvm, sptep, spte)


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
    generation = kvm_vcpu_memslots(vcpu).generation
    if generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return False
    kvm_gen = generation & MMIO_SPTE_GEN_MASK
    spte_gen = get_mmio_spte_generation(spte)
    if (t := vcpu.kvm.trace.check_mmio_spte) is not None:
        t(kvm_gen, spte_gen, spte)
    return kvm_gen == spte_gen


def handle_mmio_page_fault(vcpu: Vcpu, addr: int, direct: bool) -> int:
    """RET_PF_EMULATE, RET_PF_INVALID if the SPTE is of an old generation, RET_PF_RETRY if it is gone.

    `addr` is the gpa where the vCPU's MMU is `direct`, else the guest's linear address.
    """
    kvm = vcpu.kvm
    if mmio_info_in_cache(vcpu, addr, direct):
        return RET_PF_EMULATE
    walk = kvm_tdp_mmu_get_walk(vcpu, addr) if kvm.tdp_enabled else get_walk(vcpu, addr)
    spte = walk[-1][2] if walk else 0
    if not kvm.spte.is_mmio_spte(spte):
        return RET_PF_RETRY
    if not _check_mmio_spte(vcpu, spte):
        return RET_PF_INVALID
    gfn = kvm.spte.get_mmio_spte_gfn(spte)
    access = spte & kvm.spte.mmio_access
    addr = 0 if direct else addr
    if (t := kvm.trace.handle_mmio_page_fault) is not None:
        t(addr, gfn, access)
    vcpu_cache_mmio_info(vcpu, addr, gfn, access)
    return RET_PF_EMULATE
