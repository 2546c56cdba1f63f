"""KVM_PRE_FAULT_MEMORY: mapping guest memory before the guest asks for it.

Source of truth: virt/kvm/kvm_main.c: kvm_vcpu_pre_fault_memory; arch/x86/kvm/mmu/mmu.c (Linux 6.18):
kvm_arch_vcpu_pre_fault_memory, kvm_tdp_map_page.

Each step is a fault for a read, marked as a prefetch: what it maps is not accessed yet, and a fault that
would have to wait for a slot to go, or for a page that only another fault could bring, ends it. It maps
whole huge pages where it can and goes on behind them. A page that the host has not yet is made, or read in,
here and now.

Not modelled: VM types whose vendor forbids it.
"""

from __future__ import annotations

from errno import EINTR, EINVAL
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.mem_attributes import kvm_mem_is_private
from kvm_model.mmu.mmu import kvm_tdp_map_page
from kvm_model.mmu.mmu_internal import PFERR_GUEST_FINAL_MASK, PFERR_PRIVATE_ACCESS
from kvm_model.mmu.mmu_roots import kvm_mmu_reload
from kvm_model.mmu.spte import kvm_pages_per_hpage

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["kvm_vcpu_pre_fault_memory"]

_U64 = 1 << 64


def _arch_pre_fault(vcpu: Vcpu, gpa: int, size: int) -> int:
    """kvm_arch_vcpu_pre_fault_memory: how many bytes from `gpa` on are mapped now, or -errno."""
    r = kvm_mmu_reload(vcpu)
    if r:
        return r
    error_code = PFERR_GUEST_FINAL_MASK
    if kvm_mem_is_private(vcpu.kvm, gpa >> 12):
        error_code |= PFERR_PRIVATE_ACCESS
    level = kvm_tdp_map_page(vcpu, gpa, error_code)
    if level < 0:
        return level
    huge = kvm_pages_per_hpage(level) << 12
    return min(size, (gpa & -huge) + huge - gpa)


def kvm_vcpu_pre_fault_memory(vcpu: Vcpu, gpa: int, size: int, flags: int = 0) -> int:
    """Map [gpa, gpa + size) as far as it goes: how many bytes. Waits until the vCPU is out of KVM_RUN.

    KernelError if not one page could be mapped: EINVAL, ENOENT (no memory there), EFAULT, EAGAIN (the slot
    is on its way out), EINTR, EOPNOTSUPP (shadow paging). Before Linux 6.11 EINVAL: a vCPU's ioctl that does
    not exist.
    """
    kvm = vcpu.kvm
    if not kvm.profile.pre_fault_memory:
        raise KernelError(EINVAL, "this kernel has no KVM_PRE_FAULT_MEMORY")
    if flags or (gpa | size) & 0xFFF or size <= 0 or gpa < 0 or gpa + size >= _U64:
        raise KernelError(EINVAL, f"{size:#x} bytes at {gpa:#x}, flags {flags:#x}")
    sched = kvm.sched
    left, r = size, 0
    with vcpu.mutex:
        idx = kvm.srcu.read_lock()
        while left:
            if vcpu.immediate_exit and sched.current.ctx.vcpu == vcpu.vcpu_id:
                r = -EINTR
                break
            r = _arch_pre_fault(vcpu, gpa, left)
            if r < 0:
                break
            gpa += r
            left -= r
            if sched.preempt:
                sched.point("cond_resched")
        kvm.srcu.read_unlock(idx)
    if left == size:
        raise KernelError(-r, f"gpa {gpa:#x} cannot be mapped")
    return size - left
