"""The local APIC's registers, as far as the pages are concerned that the CPU and KVM keep for them.

Source of truth: arch/x86/kvm/lapic.c (Linux 6.18): kvm_create_lapic, kvm_alloc_apic_access_page,
kvm_lapic_reg_read, kvm_lapic_reg_write, apic_mmio_read, apic_mmio_write, kvm_apic_write_nodecode; x86.c:
__x86_set_memory_region; 5.10: vmx.c: alloc_apic_access_page. Intel SDM vol. 3A 11.4 (registers).

Two pages: the registers lie in a frame of KVM's own, the virtual-APIC page, which the CPU reads and writes
where it can without an exit. The APIC-access page is memory of the VMM in a memslot of KVM's; nothing
is ever stored there: it only gives guest address APIC_DEFAULT_PHYS_BASE a frame that the CPU can tell from
others.

Not modelled: interrupts, IPIs and the timer (the registers keep what is written; vCPU 0 has the PIC), x2APIC,
an APIC at another address or disabled, inhibiting APICv.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.mmap import MAP_ANONYMOUS, MAP_SHARED, PROT_READ, PROT_WRITE, do_mmap
from host_mm.page import put_page
from kvm_model.memory_region import kvm_set_internal_memslot
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "APIC_DEFAULT_PHYS_BASE", "APIC_EOI", "MSR_IA32_APICBASE", "TRACEPOINTS", "Lapic",
    "apic_access_page_slot", "kvm_alloc_apic_access_page", "kvm_free_lapic",
]

APIC_DEFAULT_PHYS_BASE = 0xFEE0_0000
MSR_IA32_APICBASE = 0x1B
MSR_IA32_APICBASE_ENABLE = 1 << 11

APIC_ID, APIC_LVR, APIC_TASKPRI, APIC_PROCPRI, APIC_EOI = 0x20, 0x30, 0x80, 0xA0, 0xB0
APIC_LDR, APIC_DFR, APIC_SPIV, APIC_ICR, APIC_ICR2 = 0xD0, 0xE0, 0xF0, 0x300, 0x310
_VERSION = 0x14 | 5 << 16
_LVT_MASKED = 1 << 16
_WRITABLE = {
    APIC_TASKPRI: 0xFF, APIC_LDR: 0xFF << 24, APIC_DFR: 0xFFFF_FFFF, APIC_SPIV: 0x3FF, APIC_ICR: 0xC_DFFF,
    APIC_ICR2: 0xFF << 24, 0x320: 0x7_00FF, 0x330: 0x1_07FF, 0x340: 0x1_07FF, 0x350: 0x1_A7FF,
    0x360: 0x1_A7FF, 0x370: 0x1_00FF, 0x380: 0xFFFF_FFFF, 0x3E0: 0xB,
}
"""Registers that keep what is written, with the bits they have."""
_NAMES = {
    APIC_ID: "APIC_ID", APIC_LVR: "APIC_LVR", APIC_TASKPRI: "APIC_TASKPRI", APIC_PROCPRI: "APIC_PROCPRI",
    APIC_EOI: "APIC_EOI", APIC_LDR: "APIC_LDR", APIC_DFR: "APIC_DFR", APIC_SPIV: "APIC_SPIV",
    APIC_ICR: "APIC_ICR", APIC_ICR2: "APIC_ICR2",
}

KVM_APIC = Tracepoint(
    "kvm", "kvm_apic", ("rw", "reg", "val"),
    lambda rw, reg, val: f"apic_{'write' if rw else 'read'} {_NAMES.get(reg, hex(reg))} = {val:#x}",
)
TRACEPOINTS = (KVM_APIC,)


class Lapic:
    """struct kvm_lapic of one vCPU. `regs` is the pfn of the virtual-APIC page.

    `apic_access_addr` is the VMCS's APIC-access address, -1: none yet; `reloading`: it is about to change.
    """

    def __init__(self, kvm: Kvm, vcpu: Vcpu) -> None:
        """kvm_create_lapic, kvm_lapic_reset; KernelError(ENOMEM)."""
        self.kvm = kvm
        self.vcpu = vcpu
        self.regs = kvm.alloc_zeroed_page()
        self.apic_access_addr = -1
        self.reloading = False
        for reg, value in (
            (APIC_ID, vcpu.vcpu_id << 24), (APIC_LVR, _VERSION), (APIC_DFR, 0xFFFF_FFFF), (APIC_SPIV, 0xFF),
        ):
            self.set_reg(reg, value)
        for reg in range(0x320, 0x380, 0x10):
            self.set_reg(reg, _LVT_MASKED)

    def reg(self, offset: int) -> int:
        """kvm_lapic_get_reg."""
        return int.from_bytes(self.kvm.ram.read((self.regs << 12) + offset, 4), "little")

    def set_reg(self, offset: int, value: int) -> None:
        """kvm_lapic_set_reg."""
        self.kvm.ram.write((self.regs << 12) + offset, value.to_bytes(4, "little"))

    @property
    def base_msr(self) -> int:
        """IA32_APIC_BASE."""
        return APIC_DEFAULT_PHYS_BASE | MSR_IA32_APICBASE_ENABLE | (self.vcpu.vcpu_id == 0) << 8

    def write(self, offset: int, value: int) -> None:
        """kvm_lapic_reg_write."""
        if (t := self.kvm.trace.kvm_apic) is not None:
            t(1, offset, value)
        mask = _WRITABLE.get(offset)
        if mask is None:
            return
        self.set_reg(offset, value & mask)
        if offset == APIC_TASKPRI:
            # With nothing in service the priority is the task's.
            self.set_reg(APIC_PROCPRI, value & mask)

    def write_nodecode(self, offset: int) -> None:
        """kvm_apic_write_nodecode: the CPU has stored it in the virtual-APIC page already."""
        self.write(offset, self.reg(offset))

    def mmio_read(self, offset: int, length: int) -> int:
        """apic_mmio_read: a register's bytes, zeros beside one."""
        if offset & 15 or length > 4:
            return 0
        value = self.reg(offset)
        if (t := self.kvm.trace.kvm_apic) is not None:
            t(0, offset, value)
        return value & (1 << 8 * length) - 1

    def mmio_write(self, offset: int, length: int, data: int) -> None:
        """apic_mmio_write: only whole registers."""
        if length == 4 and not offset & 15:
            self.write(offset & 0xFF0, data)


def apic_access_page_slot(kvm: Kvm) -> int:
    """APIC_ACCESS_PAGE_PRIVATE_MEMSLOT: a number behind those of user space."""
    return kvm.profile.user_mem_slots + 1


def kvm_alloc_apic_access_page(kvm: Kvm) -> None:
    """The APIC-access page: memory of the VMM in a slot of KVM's, for all address spaces. KernelError."""
    with kvm.slots_lock:
        if kvm.apic_access_memslot_enabled:
            return
        # Shared, so that no fork of the VMM gives the guest another page at its next write.
        hva = do_mmap(kvm.mm, 0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS)
        for as_id in range(kvm.profile.nr_memslot_as_ids):
            slot = as_id << 16 | apic_access_page_slot(kvm)
            kvm_set_internal_memslot(kvm, slot, APIC_DEFAULT_PHYS_BASE, 4096, hva)
        kvm.apic_access_memslot_enabled = True


def kvm_free_lapic(vcpu: Vcpu) -> None:
    """kvm_free_lapic."""
    if vcpu.apic is not None:
        put_page(vcpu.kvm.host, vcpu.apic.regs)
        vcpu.apic = None
