"""KVM's own statistics after a run, under the kernel's names: what KVM_GET_STATS_FD would give.

    remote_tlb_flush_requests        12     of the VM, in the order of kvm_vm_stats_desc
    pf_taken                         65     of a vCPU, in the order of kvm_vcpu_stats_desc

A name counts where the kernel counts it: pf_taken on entry of kvm_mmu_do_page_fault, pages_4k as the leaf
SPTEs of that size that exist, remote_tlb_flush_requests also where no vCPU had to be told.

Source of truth: arch/x86/kvm/x86.c: kvm_vm_stats_desc, kvm_vcpu_stats_desc; include/linux/kvm_host.h:
KVM_GENERIC_VM_STATS, KVM_GENERIC_VCPU_STATS; Linux 6.18.

Not modelled: the statistics that no path of the model moves (halt polling, l1d_flush, request_irq_exits,
fpu_reload, host_state_reload, nested_run, directed yields, preemption, notify windows, page-hash
collisions); they are left out, not shown as 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["VCPU_STATS", "VM_STATS", "KvmStat", "collect_kvm", "format_kvm"]

VM_STATS = (
    "remote_tlb_flush", "remote_tlb_flush_requests", "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped",
    "mmu_flooded", "mmu_recycled", "mmu_cache_miss", "mmu_unsync", "pages_4k", "pages_2m", "pages_1g",
    "nx_lpage_splits", "max_mmu_rmap_size", "max_mmu_page_hash_collisions",
)
VCPU_STATS = (
    "halt_successful_poll", "halt_attempted_poll", "halt_poll_invalid", "halt_wakeup", "halt_poll_success_ns",
    "halt_poll_fail_ns", "halt_wait_ns", "blocking", "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious",
    "pf_fast", "pf_mmio_spte_created", "pf_guest", "tlb_flush", "invlpg", "exits", "io_exits", "mmio_exits",
    "signal_exits", "irq_window_exits", "nmi_window_exits", "l1d_flush", "halt_exits", "request_irq_exits",
    "irq_exits", "host_state_reload", "fpu_reload", "insn_emulation", "insn_emulation_fail", "hypercalls",
    "irq_injections", "nmi_injections", "req_event", "nested_run", "directed_yield_attempted",
    "directed_yield_successful", "preemption_reported", "preemption_other", "guest_mode",
    "notify_window_exits",
)
_WIDTH = 32


class KvmStat(msgspec.Struct, frozen=True):
    """The VM's statistics and each vCPU's, by name, in the kernel's order."""

    vm: dict[str, int]
    vcpus: list[dict[str, int]]


def _ordered(stat: dict[str, int], names: tuple[str, ...]) -> dict[str, int]:
    return {name: stat[name] for name in names if name in stat}


def collect_kvm(kvm: Kvm) -> KvmStat:
    """What has been counted so far."""
    return KvmStat(_ordered(kvm.stat, VM_STATS), [_ordered(vcpu.stat, VCPU_STATS) for vcpu in kvm.vcpus])


def format_kvm(stat: KvmStat) -> str:
    """A table: the VM, then a column for each vCPU."""
    lines = ["VM", *(f"  {name:<{_WIDTH}} {value:>12,}" for name, value in stat.vm.items()), ""]
    heads = "".join(f" {f'vCPU {n}':>12}" for n in range(len(stat.vcpus)))
    lines.append(f"{'':<{_WIDTH + 2}}{heads}")
    for name in stat.vcpus[0] if stat.vcpus else ():
        values = "".join(f" {vcpu[name]:>12,}" for vcpu in stat.vcpus)
        lines.append(f"  {name:<{_WIDTH}}{values}")
    return "\n".join(lines)
