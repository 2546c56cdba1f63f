"""The VMCS's APIC-access address: kept the frame that EPT has for the page, however the host moves it.

Source of truth: arch/x86/kvm/vmx/vmx.c (Linux 6.18): vmx_set_apic_access_page_addr, handle_apic_access,
handle_apic_write; x86.c: kvm_vcpu_reload_apic_access_page; 5.10: the same without looking for an
invalidation. Intel SDM vol. 3C 30.4 (virtualizing memory-mapped APIC accesses).

The CPU takes an access that EPT translates to this very frame for one to the APIC. If the two disagree, the
guest reads and writes a page that means nothing, or somebody else's. So when EPT loses the page, every
vCPU is asked to reload the address (6.18: by the unmap of KVM's own slot; 5.10: by invalidate_range), and one
that finds an invalidation under way asks itself again.

Not modelled: the address while a nested guest runs, which Linux reloads when that exits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.gup import FOLL_WRITE
from kvm_model.follow_pfn import kvm_faultin_pfn, kvm_release_page_clean
from kvm_model.lapic import APIC_DEFAULT_PHYS_BASE, APIC_EOI, apic_access_page_slot
from kvm_model.memslots import KVM_MEMSLOT_INVALID
from kvm_model.mmu.invalidate import mmu_invalidate_retry_gfn
from kvm_model.mmu.mmu_internal import is_error_noslot_pfn
from kvm_model.requests import KVM_REQ_APIC_PAGE_RELOAD, kvm_make_request
from kvm_model.x86_emulate import x86_emulate_instruction
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu
    from kvm_model.vmx.exits import VmExit

__all__ = ["TRACEPOINTS", "handle_apic_access", "handle_apic_write", "kvm_vcpu_reload_apic_access_page"]

_GFN = APIC_DEFAULT_PHYS_BASE >> 12
_APIC_ACCESS_TYPE, _TYPE_LINEAR_APIC_INST_WRITE = 0xF << 12, 1 << 12

APIC_ACCESS_PAGE = Tracepoint(
    "refault", "apic_access_page", ("vcpu_id", "pfn", "stale"),
    lambda vcpu_id, pfn, stale: f"vcpu {vcpu_id} pfn {pfn:x}{' stale, once more' if stale else ''}",
    doc="A vCPU reloads the APIC-access address of its VMCS, or finds that it has to try again.",
)
TRACEPOINTS = (APIC_ACCESS_PAGE,)


def kvm_vcpu_reload_apic_access_page(vcpu: Vcpu) -> None:
    """KVM_REQ_APIC_PAGE_RELOAD."""
    if vcpu.apic is not None:
        vcpu.apic.reloading = True
        _vmx_set_apic_access_page_addr(vcpu)
        vcpu.apic.reloading = False


def _vmx_set_apic_access_page_addr(vcpu: Vcpu) -> None:
    kvm = vcpu.kvm
    slot = kvm.slots().id_hash.get(apic_access_page_slot(kvm))
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
        return
    mmu_seq = kvm.mmu_invalidate_seq
    if kvm.sched.preempt:
        kvm.sched.point("seq")
    pfn, _, page = kvm_faultin_pfn(kvm, slot, _GFN, FOLL_WRITE)
    if is_error_noslot_pfn(pfn):
        return
    asks = kvm.profile.apic_reload_retries and "apic-reload-early" not in kvm.breaks
    if asks:
        kvm.mmu_lock.read_lock()
    stale = asks and mmu_invalidate_retry_gfn(kvm, mmu_seq, _GFN)
    if stale:
        kvm_make_request(KVM_REQ_APIC_PAGE_RELOAD, vcpu)
        # Whoever invalidates is on another CPU; let it get on.
        vcpu.need_resched = True
    else:
        assert vcpu.apic is not None
        vcpu.apic.apic_access_addr = pfn << 12
        kvm.cpu.set_apic_pages(vcpu, pfn << 12, vcpu.apic.regs << 12)
    if (t := kvm.trace.apic_access_page) is not None:
        t(vcpu.vcpu_id, pfn, stale)
    if not kvm.profile.apic_reload_retries:
        kvm.cpu.flush_tlb(vcpu)
    # No reference stays: the page may move, and whoever moves it will ask again.
    kvm_release_page_clean(kvm, page)
    if asks:
        kvm.mmu_lock.read_unlock()


def handle_apic_access(vcpu: Vcpu, exit_: VmExit) -> int:
    """An access to the page that the CPU does not do in the virtual-APIC page."""
    offset = exit_.qualification & 0xFFF
    is_write = exit_.qualification & _APIC_ACCESS_TYPE == _TYPE_LINEAR_APIC_INST_WRITE
    if is_write and offset == APIC_EOI and exit_.insn_len:
        assert vcpu.apic is not None
        vcpu.apic.write(APIC_EOI, 0)
        vcpu.kvm.cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
        return 1
    return x86_emulate_instruction(vcpu, APIC_DEFAULT_PHYS_BASE | offset)


def handle_apic_write(vcpu: Vcpu, exit_: VmExit) -> int:
    """The CPU has stored to a register in the virtual-APIC page; the instruction is over."""
    assert vcpu.apic is not None
    vcpu.apic.write_nodecode(exit_.qualification & 0xFF0)
    return 1
