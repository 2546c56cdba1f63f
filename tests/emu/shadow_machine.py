"""A bare machine without EPT under a KVM of a few lines: it copies what the guest's tables say, page by page.

Guest-physical is host-physical. The shadow root lies at ROOT; a guest in IA-32e mode has a root of 4 levels,
any other a PAE one. Nothing is kept in step with the guest's tables except by `zap`.
"""

from __future__ import annotations

from emu.cpu.registers import GENERAL_REGISTERS
from emu.cpu.walk import OK, PAGE_FAULT, RIGHT_W, RIGHT_X, walk
from kvm_model.kvm_x86_ops import PT32E_ROOT_LEVEL
from kvm_model.vmx import exits
from tests.emu.bare_machine import NX, FakeVcpu, Machine, P, U, W

ROOT = 0xC00000
_PF = 0x80000B0E
_NAMES = {index: name for name, index in GENERAL_REGISTERS.items()}
_LMA = 1 << 10


class ShadowMachine(Machine):
    """`faults` are the (CR2, error code) of the exits, `injected` those that were the guest's own."""

    def __init__(self, *, interpreted: bool = False) -> None:
        self.faults: list[tuple[int, int]] = []
        self.injected: list[tuple[int, int]] = []
        self.invalidated: list[int] = []
        super().__init__(interpreted=interpreted, shadow=True)

    def _start(self, vcpu: FakeVcpu) -> None:
        super()._start(vcpu)
        self.new_root()

    def new_root(self) -> None:
        """An empty root for the mode that the vCPU is in now."""
        self._next = ROOT + 0x1000
        self.ram.write(ROOT, bytes(0x1000))
        self.long = bool(self.reg("efer") & _LMA)
        for vcpu in self.vcpus:
            self.cpu.load_mmu_pgd(vcpu, ROOT, 4 if self.long else PT32E_ROOT_LEVEL)
            self.cpu.flush_tlb(vcpu)

    def _table(self) -> int:
        at, self._next = self._next, self._next + 0x1000
        self.ram.write(at, bytes(0x1000))
        return at

    def entry(self, gva: int) -> int:
        """Where the shadow PTE of `gva` lies, its tables made."""
        table, level = ROOT, 4
        if not self.long:
            slot = ROOT + 8 * (gva >> 30 & 3)
            if not self.q(slot):
                self.q(slot, self._table() | P)
            table, level = self.q(slot) & ~0xFFF, 2
        while level > 1:
            slot = table + 8 * (gva >> (12 + 9 * (level - 1)) & 511)
            if not self.q(slot):
                self.q(slot, self._table() | P | W | U)
            table, level = self.q(slot) & 0xFFFFFFFFFF000, level - 1
        return table + 8 * (gva >> 12 & 511)

    def zap(self, gva: int) -> None:
        """Drop the shadow PTE and what the CPU has of it."""
        self.q(self.entry(gva), 0)
        self.cpu.flush_tlb(self.vcpus[0])

    def page_fault(self, e: exits.VmExit) -> None:
        """Copy the guest's translation, or give the guest its own fault."""
        gva, code = e.qualification, e.error_code
        self.faults.append((gva, code))
        regs = [self.reg(name) for name in ("cr0", "cr3", "cr4", "efer")]
        if regs[0] >> 31 & 1 and not self.long:
            raise AssertionError("this KVM reads the tables of 4-level paging only")
        access = code & 0x16
        signed = gva - (1 << 64) if gva >> 63 else gva
        frames = self.ram.nr_frames
        status, hpa, rights, a, _, _ = walk(self.ram.i64, frames, *regs, 0, 0, 0, signed, access)
        vcpu = self.vcpus[0]
        if status == PAGE_FAULT:
            self.injected.append((gva, a))
            self.set(cr2=gva)
            vcpu.entry_intr_info, vcpu.entry_error_code = _PF, a
            return
        assert status == OK
        spte = hpa & ~0xFFF | P | (W if rights & RIGHT_W else 0) | (U if code & 4 else 0)
        if not rights & RIGHT_X:
            spte |= NX
        self.q(self.entry(gva), spte)

    def step(self, vcpu: int = 0) -> exits.VmExit:
        kvm = self.vcpus[vcpu]
        while True:
            e = super().step(vcpu)
            if e.reason != exits.REASON_EXCEPTION_NMI:
                return e
            self.exits.pop()
            self.page_fault(e)
            if e.idt_vectoring_info and not kvm.entry_intr_info:
                kvm.entry_intr_info, kvm.entry_error_code = e.idt_vectoring_info, e.idt_vectoring_error
                kvm.entry_insn_len = e.insn_len

    def run(self, vcpu: int = 0, limit: int = 1000) -> exits.VmExit:
        while True:
            e = super().run(vcpu, limit)
            if e.reason == exits.REASON_INVLPG:
                self.invalidated.append(e.qualification)
                self.zap(e.qualification)
            elif e.reason == exits.REASON_CR_ACCESS:
                self._control_register(e)
            else:
                return e
            self.cpu.skip_emulated_instruction(self.vcpus[vcpu], e.insn_len)

    def _control_register(self, e: exits.VmExit) -> None:
        number, kind, name = e.qualification & 15, e.qualification >> 4 & 3, _NAMES[e.qualification >> 8 & 15]
        if kind == 1:
            self.set(**{name: self.reg(f"cr{number}")})
            return
        value = self.reg(name)
        if kind == 3:
            value = self.reg("cr0") & ~0xE | e.qualification >> 16 & 0xF
        self.set(**{f"cr{number}": value})
        self.new_root()
