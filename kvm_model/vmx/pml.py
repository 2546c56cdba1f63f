"""Page-modification logging, KVM's side: the CPU's log of each vCPU, turned on, drained, full.

Source of truth: arch/x86/kvm/vmx/vmx.c (Linux 6.18): vmx_vcpu_create, vmx_update_cpu_dirty_logging,
vmx_flush_pml_buffer, handle_pml_full; SDM vol. 3C 29.3.6. The CPU's side is emu/cpu/walk.py.

The log is one page of guest-physical addresses that the CPU fills from entry 511 down. It is drained on
every exit, so a running vCPU has only to be kicked to bring the dirty log up to date.

Not modelled: nested virtualisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.page import put_page
from kvm_model.guest_access import kvm_vcpu_mark_page_dirty
from kvm_model.requests import KVM_REQ_UPDATE_CPU_DIRTY_LOGGING, kvm_make_request
from kvm_model.vmx.ept import PML_ENTRIES, VMCS_PML_ADDRESS, VMCS_PML_INDEX
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.vcpu import Vcpu
    from kvm_model.vmx.exits import VmExit

__all__ = [
    "TRACEPOINTS", "handle_pml_full", "pml_entries", "vmx_destroy_pml_buffer", "vmx_flush_pml_buffer",
    "vmx_pml_create", "vmx_update_cpu_dirty_logging",
]

_PML_HEAD_INDEX = PML_ENTRIES - 1

KVM_PML_FULL = Tracepoint(
    "kvm", "kvm_pml_full", ("vcpu_id",), lambda vcpu_id: f"vcpu {vcpu_id}: PML full",
)
TRACEPOINTS = (KVM_PML_FULL,)


def vmx_pml_create(vcpu: Vcpu) -> None:
    """Give a new vCPU its log; KernelError(ENOMEM)."""
    kvm = vcpu.kvm
    vcpu.vmcs = kvm.alloc_zeroed_page()
    vcpu.pml_pg = kvm.alloc_zeroed_page()
    u64 = kvm.ram.u64
    u64[(vcpu.vmcs << 9) + VMCS_PML_ADDRESS] = vcpu.pml_pg << 12
    u64[(vcpu.vmcs << 9) + VMCS_PML_INDEX] = _PML_HEAD_INDEX
    kvm_make_request(KVM_REQ_UPDATE_CPU_DIRTY_LOGGING, vcpu)


def vmx_destroy_pml_buffer(vcpu: Vcpu) -> None:
    """Give the log back."""
    for pfn in (vcpu.vmcs, vcpu.pml_pg):
        if pfn >= 0:
            put_page(vcpu.kvm.host, pfn)
    vcpu.vmcs = vcpu.pml_pg = -1


def vmx_update_cpu_dirty_logging(vcpu: Vcpu) -> None:
    """Log while any memslot is logged."""
    kvm = vcpu.kvm
    kvm.cpu.enable_pml(vcpu, vcpu.vmcs << 12 if kvm.nr_memslots_dirty_logging else 0)


def pml_entries(vcpu: Vcpu) -> Iterator[int]:
    """The gfns in the vCPU's log, oldest first."""
    u64 = vcpu.kvm.ram.u64
    index = u64[(vcpu.vmcs << 9) + VMCS_PML_INDEX]
    # The index is that of the next entry, but of a full log, whose 16 bits went below 0.
    tail = 0 if index >= PML_ENTRIES else index + 1
    for at in range(_PML_HEAD_INDEX, tail - 1, -1):
        yield u64[(vcpu.pml_pg << 9) + at] >> 12


def vmx_flush_pml_buffer(vcpu: Vcpu) -> None:
    """Mark what the CPU logged, in the order of the writes, and empty the log."""
    kvm = vcpu.kvm
    word = (vcpu.vmcs << 9) + VMCS_PML_INDEX
    if kvm.ram.u64[word] == _PML_HEAD_INDEX:
        return
    for gfn in pml_entries(vcpu):
        kvm_vcpu_mark_page_dirty(vcpu, gfn)
    kvm.ram.u64[word] = _PML_HEAD_INDEX


def handle_pml_full(vcpu: Vcpu, exit_: VmExit) -> int:
    """The log was full before the access: it is drained by now, and the access is made again."""
    if (t := vcpu.kvm.trace.kvm_pml_full) is not None:
        t(vcpu.vcpu_id)
    return 1
