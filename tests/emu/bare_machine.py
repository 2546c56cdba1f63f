"""A bare CPU for tests: no KVM, hand-built tables, a scripted loop that answers exits.

Physical layout (16 MiB), with EPT off or on (identity, 4K leaves, at EPT_AT):

    0x001000 PML4, 0x2000 PDPT, 0x3000 PD (2M leaves from 2 MiB up), 0x4000 PT for the first 2 MiB
    0x005000 GDT  0x006000 IDT  0x007000 TSS
    0x010000 kernel code   0x011000+ handlers   0x020000 user code (U/S set for 0x20000..0x3ffff)
    0x080000 kernel stack top   0x090000 TSS.RSP0   0x0a0000 IST1   0x038000 user stack top
"""

from __future__ import annotations

import struct
from types import SimpleNamespace

from keystone import KS_ARCH_X86, KS_MODE_32, KS_MODE_64, Ks

from emu.cpu.cpu import UnicornCpu
from emu.cpu.env import IDT as ENV_IDT
from emu.cpu.env import TR as ENV_TR
from host_mm.kernel.sched import Scheduler
from host_mm.ram import Ram
from kvm_model.profile import LINUX_6_18
from kvm_model.vmx import exits
from trace_events.stream import TraceStream

PML4, PDPT, PD, PT, GDT, IDT, TSS = (n * 0x1000 for n in range(1, 8))
CODE, USER = 0x10000, 0x20000
STACK, RSP0, IST1, USER_STACK = 0x80000, 0x90000, 0xA0000, 0x38000
EPT_AT = 0xC00000
P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
KCODE, KDATA, UDATA, UCODE, TSS_SEL = 0x08, 0x10, 0x23, 0x2B, 0x30
M64 = (1 << 64) - 1

_KS = {64: Ks(KS_ARCH_X86, KS_MODE_64), 32: Ks(KS_ARCH_X86, KS_MODE_32)}


def asm(source: str, at: int = 0, bits: int = 64) -> bytes:
    return bytes(_KS[bits].asm(source, at)[0])


class FakeVcpu(SimpleNamespace):
    """As much of kvm_model's Vcpu as the CPU looks at."""

    def __init__(self, vcpu_id: int) -> None:
        super().__init__(
            vcpu_id=vcpu_id, kicked=False, irq_window=False, entry_intr_info=0, entry_error_code=0,
            entry_insn_len=0, kvm=SimpleNamespace(profile=LINUX_6_18),
        )


class Machine:
    """`ept=True` puts an identity EPT under everything; `gpa_map` of it can be changed with `ept_set`."""

    def __init__(
        self, *, ept: bool = False, interpreted: bool = False, vcpus: int = 1, mib: int = 16,
        shadow: bool = False,
    ) -> None:
        self.ram = Ram(mib << 8)
        self.sched = Scheduler(TraceStream())
        host = SimpleNamespace(ram=self.ram)
        self.cpu = UnicornCpu(host, self.sched, interpreted=interpreted, ept=not shadow)
        self.vcpus = [FakeVcpu(n) for n in range(vcpus)]
        self.out: list[tuple[int, int, int]] = []
        self.inputs: list[int] = []
        self.exits: list[exits.VmExit] = []
        self._tables()
        if ept:
            self._ept(mib)
        for vcpu in self.vcpus:
            self._start(vcpu)

    # -- memory -------------------------------------------------------------------------------

    def q(self, address: int, value: int | None = None) -> int:
        if value is not None:
            self.ram.u64[address >> 3] = value & M64
        return self.ram.u64[address >> 3]

    def _tables(self) -> None:
        self.q(PML4, PDPT | P | W | U)
        self.q(PDPT, PD | P | W | U)
        self.q(PD, PT | P | W | U)
        for n in range(1, 8):
            self.q(PD + 8 * n, n << 21 | P | W | PS)
        for n in range(512):
            self.q(PT + 8 * n, n << 12 | P | W | (U if 0x20 <= n < 0x40 else 0))
        for n, value in enumerate((0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF,
                                   0x00AFFB000000FFFF, 0x67 | (TSS & 0xFFFFFF) << 16 | 0x89 << 40, 0)):
            self.q(GDT + 8 * n, value)
        self.ram.write(TSS + 4, struct.pack("<Q", RSP0))
        self.ram.write(TSS + 0x24, struct.pack("<Q", IST1))
        self.ram.write(TSS + 0x66, struct.pack("<H", 0x68))

    def pte(self, gva: int, flags: int | None = None, frame: int | None = None) -> int:
        """Set (and flush nothing) or read the PTE of a page below 2 MiB."""
        slot = PT + 8 * (gva >> 12)
        if flags is not None:
            self.q(slot, (gva & ~0xFFF if frame is None else frame) | flags)
        return self.q(slot)

    def _ept(self, mib: int) -> None:
        nxt = EPT_AT + 0x1000

        def table() -> int:
            nonlocal nxt
            nxt += 0x1000
            return nxt - 0x1000

        pdpt, pd = table(), table()
        self.q(EPT_AT, pdpt | 7)
        self.q(pdpt, pd | 7)
        self.ept_pts = []
        for n in range(mib // 2):
            pt = table()
            self.ept_pts.append(pt)
            self.q(pd + 8 * n, pt | 7)
            for i in range(512):
                self.q(pt + 8 * i, (n << 21 | i << 12) | 6 << 3 | 7)
        for vcpu in self.vcpus:
            self.cpu.load_mmu_pgd(vcpu, EPT_AT, 4)

    def ept_set(
        self, gpa: int, entry: int | None = None, *, rwx: int | None = None, hpa: int | None = None
    ) -> int:
        slot = self.ept_pts[gpa >> 21] + 8 * (gpa >> 12 & 511)
        if entry is None:
            entry = self.q(slot)
            if rwx is not None:
                entry = entry & ~7 | rwx
            if hpa is not None:
                entry = entry & 0xFFF | hpa
        return self.q(slot, entry)

    def put(self, at: int, source: str, bits: int = 64) -> int:
        code = asm(source, at, bits)
        for n in range(0, len(code), 1):
            self.ram.write(at + n, code[n : n + 1])
        return at + len(code)

    def gate(self, vector: int, offset: int, *, ist: int = 0, dpl: int = 0, kind: int = 14, sel: int = KCODE,
             present: int = 1) -> None:
        low = offset & 0xFFFF | sel << 16 | ist << 32 | (present << 7 | dpl << 5 | kind) << 40
        self.q(IDT + 16 * vector, low | (offset >> 16 & 0xFFFF) << 48)
        self.q(IDT + 16 * vector + 8, offset >> 32)

    # -- CPU ----------------------------------------------------------------------------------

    def _start(self, vcpu: FakeVcpu) -> None:
        v = self.cpu.vcpu(vcpu)
        v.start_long(CODE, PML4, GDT, 0x3F, KCODE, KDATA)
        v.env.set_table(ENV_IDT, 0, IDT, 0xFFF, 0)
        v.env.set_table(ENV_TR, TSS_SEL, TSS, 0x67, 0x8B00)
        v.intercepts.load_cr0(0x80010031)
        v.intercepts.load_cr4(0x620 | 1 << 20)
        self.cpu.set_msr(vcpu, 0xC0000080, 0x901)
        v.env.set_reg(4, STACK - vcpu.vcpu_id * 0x1000)
        self.cpu.flush_tlb(vcpu)

    def reg(self, name: str, vcpu: int = 0) -> int:
        return self.cpu.get_reg(self.vcpus[vcpu], name)

    def set(self, vcpu: int = 0, **regs: int) -> None:
        for name, value in regs.items():
            self.cpu.set_reg(self.vcpus[vcpu], name, value)

    def enter_user(self, rip: int = USER, rflags: int = 2, vcpu: int = 0) -> None:
        """Continue at CPL 3."""
        from emu.cpu.segments import load_seg_cache

        env = self.cpu.vcpu(self.vcpus[vcpu]).env
        for index in (0, 3, 2):
            load_seg_cache(env, index, UDATA, 0, 0xFFFFFFFF, 0x00CFF300)
        load_seg_cache(env, 1, UCODE, 0, 0xFFFFFFFF, 0x00AFFB00)
        self.set(vcpu, rip=rip, rsp=USER_STACK, rflags=rflags)

    def step(self, vcpu: int = 0) -> exits.VmExit:
        vmexit = self.cpu.vcpu_run(self.vcpus[vcpu])
        self.exits.append(vmexit)
        return vmexit

    def run(self, vcpu: int = 0, limit: int = 1000) -> exits.VmExit:
        """Answer CPUID, MSR and port exits as KVM would until another exit comes."""
        kvm, cpu = self.vcpus[vcpu], self.cpu
        for _ in range(limit):
            e = self.step(vcpu)
            if e.reason == exits.REASON_CPUID:
                regs = cpu.cpuid(kvm, self.reg("rax", vcpu) & 0xFFFFFFFF, self.reg("rcx", vcpu) & 0xFFFFFFFF)
                self.set(vcpu, **dict(zip(("rax", "rbx", "rcx", "rdx"), regs, strict=True)))
                cpu.skip_emulated_instruction(kvm, e.insn_len)
            elif e.reason in (exits.REASON_MSR_READ, exits.REASON_MSR_WRITE):
                self._msr(e, vcpu)
            elif e.reason == exits.REASON_IO_INSTRUCTION:
                self._io(e, vcpu)
            else:
                return e
        raise AssertionError("the guest does not stop")

    def _msr(self, e: exits.VmExit, vcpu: int) -> None:
        kvm, cpu = self.vcpus[vcpu], self.cpu
        index = self.reg("rcx", vcpu) & 0xFFFFFFFF
        if e.reason == exits.REASON_MSR_READ:
            value = cpu.get_msr(kvm, index)
            ok = value is not None
            if ok:
                self.set(vcpu, rax=value & 0xFFFFFFFF, rdx=value >> 32)
        else:
            ok = cpu.set_msr(kvm, index, self.reg("rax", vcpu) & 0xFFFFFFFF | self.reg("rdx", vcpu) << 32)
        if ok:
            cpu.skip_emulated_instruction(kvm, e.insn_len)
        else:
            kvm.entry_intr_info, kvm.entry_error_code = 0x80000B0D, 0

    def _io(self, e: exits.VmExit, vcpu: int) -> None:
        size, port = (e.qualification & 7) + 1, e.qualification >> 16
        mask = (1 << 8 * size) - 1
        if e.qualification & 8:
            value = self.inputs.pop(0) if self.inputs else mask
            rax = self.reg("rax", vcpu)
            self.set(vcpu, rax=value & mask if size == 4 else rax & ~mask | value & mask)
        else:
            self.out.append((port, size, self.reg("rax", vcpu) & mask))
        self.cpu.skip_emulated_instruction(self.vcpus[vcpu], e.insn_len)

    def hlt(self, vcpu: int = 0) -> None:
        """Run to a HLT and stand behind it."""
        e = self.run(vcpu)
        assert e.reason == exits.REASON_HLT, e
        self.cpu.skip_emulated_instruction(self.vcpus[vcpu], 1)
