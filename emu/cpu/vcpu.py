"""One virtual CPU: a Unicorn instance on the host's RAM, its fills, its counter, its intercepts.

Unicorn runs with a virtual TLB: it knows nothing of paging, every translation comes from fill.py.
Outside emu_start the whole RFLAGS is in Env.eflags (QEMU folds the lazy condition codes in when it
leaves), so registers are read and written in place.

Source: docs of Unicorn 2.1.4; qemu/target/i386/cpu.c: x86_cpu_exec_enter, x86_cpu_exec_exit;
Intel SDM vol. 3A 9.1 (state after reset), table 9-1.

Not modelled: real mode and virtual-8086 mode as a starting state, INIT and SIPI.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from emu.cpu.block import BlockCounter
from emu.cpu.env import (
    EXCEPTION_INDEX_IS_INT,
    GDT,
    HF_CS32,
    HF_CS64,
    HF_INHIBIT_IRQ,
    IDT,
    LDT,
    R_CS,
    R_DS,
    R_ES,
    R_FS,
    R_GS,
    R_SS,
    TR,
    Env,
)
from emu.cpu.fill import Fill
from emu.cpu.intercept import Intercepts
from emu.cpu.memory import GuestFault, GuestMemory, MemoryExit
from emu.cpu.paging import CR0_PE, CR0_PG, CR4_PAE, EFER_LME, pae_paging
from emu.cpu.segments import FLAT_CODE32, FLAT_CODE64, FLAT_DATA, load_seg_cache
from emu.cpu.walk import ACCESS_READ, EPT_MISCONFIG, EPT_VIOLATION, OK, PML_FULL
from host_mm.ram import Ram

__all__ = ["EMU_EXCEPTION", "EMU_INSN_INVALID", "EMU_OK", "UnicornVcpu"]

EMU_OK = uc_const.UC_ERR_OK
EMU_INSN_INVALID = uc_const.UC_ERR_INSN_INVALID
EMU_EXCEPTION = uc_const.UC_ERR_EXCEPTION

_CR0_ET_NE = 1 << 4 | 1 << 5
_RFLAGS_FIXED = 2
_TSS_BUSY, _LDT_FLAGS = 0x8B00, 0x8200
_FPU_RESET = ((x86.UC_X86_REG_FPCW, 0x37F), (x86.UC_X86_REG_MXCSR, 0x1F80), (x86.UC_X86_REG_FPTAG, 0xFFFF))


class UnicornVcpu:
    """The CPU proper. `stale` collects frames whose translated code must be dropped before the next run.

    `shadow`: it runs without EPT, on KVM's shadow tables.
    """

    def __init__(
        self, ram: Ram, vcpu_id: int, *, interpreted: bool = False, shadow: bool = False
    ) -> None:
        self.ram = ram
        self.vcpu_id = vcpu_id
        self.shadow = shadow
        self.uc = unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_64)
        self.uc.ctl_set_cpu_model(x86.UC_CPU_X86_BROADWELL)  # the oldest one with SMAP
        self.uc.mem_map_ptr(0, ram.size, uc_const.UC_PROT_ALL, ram.ptr)
        self.uc.ctl_set_tlb_mode(uc_const.UC_TLB_VIRTUAL)
        # without `until`: it costs a lookup per block and leaks
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self.env = Env(self.uc)
        self.fill = Fill(ram, self.env, interpreted=interpreted)
        self.fill.install()
        self.counter = BlockCounter(self.uc, interpreted=interpreted)
        self.intercepts = Intercepts(self.uc, self.env)
        self.memory = GuestMemory(self.fill)
        self.msrs: dict[int, int] = {}
        self.deferred: Callable[[], None] | None = None
        self.stepped_from: int | None = None
        self.opened: int | None = None
        self.stale: set[int] = ram.stale.subscribe()
        self.evict = False
        self.slice_left = 0
        self.virtual_apic = 0
        start = uclib.uc_emu_start
        self._start = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t
        )(ctypes.cast(start, ctypes.c_void_p).value or 0)
        self.reset()

    def close(self) -> None:
        """Give the Unicorn instance back."""
        self.ram.stale.unsubscribe(self.stale)
        uc: Any = self.uc
        self.uc = None
        del uc

    # -- running --------------------------------------------------------------------------------

    def emu_start(self) -> int:
        """Run from RIP until something stops it; Unicorn's error number."""
        env = self.env
        env.clear_old_exception()
        # else an intercept after an INT n would leave with that INT's next RIP
        env.i[EXCEPTION_INDEX_IS_INT // 4] = 0
        return int(self._start(env.uc_struct, env.eip, 0, 0, 0))

    @property
    def long_code(self) -> bool:
        """Whether CS is a 64-bit code segment."""
        return bool(self.env.hflags & HF_CS64)

    @property
    def linear_rip(self) -> int:
        """The linear address of RIP: outside 64-bit code CS has a base."""
        env = self.env
        if env.hflags & HF_CS64:
            return env.eip
        return int(env.eip + env.seg(R_CS)[1] & 0xFFFFFFFF)

    @property
    def code_bits(self) -> int:
        """How instructions are decoded: 64, 32 or 16."""
        hflags = self.env.hflags
        return 64 if hflags & HF_CS64 else 32 if hflags & HF_CS32 else 16

    def skip(self, length: int) -> None:
        """Step RIP over an instruction; whatever it was, it ends a STI or MOV SS shadow."""
        env = self.env
        rip = env.eip + length
        env.eip = rip & (0xFFFFFFFFFFFFFFFF if env.hflags & HF_CS64 else 0xFFFFFFFF)
        self.end_shadow()

    def end_shadow(self) -> None:
        """Events may be delivered again."""
        if self.env.hflags & HF_INHIBIT_IRQ:
            self.env.hflags &= ~HF_INHIBIT_IRQ

    def guest_physical(self, gva: int) -> int | None:
        """The gpa that a read of `gva` goes to, mapped by EPT or not; None if it faults."""
        status, _, _, a, gpa, level = self.fill.walk(gva, self.fill.access(ACCESS_READ))
        if status == OK:
            return a
        if status in (EPT_VIOLATION, EPT_MISCONFIG, PML_FULL) and not level:
            return gpa & ~0xFFF | gva & 0xFFF
        return None

    def run_or_defer(self, step: Callable[[], None]) -> None:
        """Do the rest of an emulated instruction; if its memory access faults, at the next entry again."""
        self.deferred = None
        try:
            step()
        except (GuestFault, MemoryExit):
            self.deferred = step

    def run_deferred(self) -> None:
        """Try the deferred rest again; it stays deferred if it leaves the guest once more."""
        step = self.deferred
        if step is not None:
            try:
                step()
            except MemoryExit:
                raise
            except GuestFault:
                self.deferred = None
                raise
            self.deferred = None

    def watch_cr3(self) -> None:
        """CR0 or CR4 changed: MOV to CR3 must be seen in PAE paging, where it loads PDPTEs.

        In other modes it is Unicorn's own; without EPT it exits in every mode.
        """
        if not self.shadow:
            env = self.env
            self.intercepts.intercept_cr3_writes(pae_paging(env.cr(0), env.cr(4), env.efer))

    # -- translated code ------------------------------------------------------------------------

    def drop_stale_code(self) -> None:
        """Forget what was translated from frames that others wrote to since the last run."""
        for pfn in self.stale:
            self.drop_code(pfn)
        self.stale.clear()

    def drop_code(self, pfn: int) -> None:
        """Forget translations of a frame and that it may be executed."""
        self.intercepts.drop_code(pfn)
        if self.fill.forget_code(pfn):
            # an act of the emulator, not of the guest or KVM: no new epoch, so that no truth rests on it
            self.intercepts.flush_tlb()

    # -- starting states ------------------------------------------------------------------------

    def reset(self) -> None:
        """Registers zero, paging off, flat 32-bit segments, no tables: `start_*` goes on from here."""
        env, intercepts = self.env, self.intercepts
        self._leave_long_mode()
        for index in range(16):
            env.set_reg(index, 0)
        env.eip = 0
        env.eflags = _RFLAGS_FIXED
        env.set_cr(2, 0)
        env.set_cr(3, 0)
        for index in (R_ES, R_SS, R_DS, R_FS, R_GS):
            load_seg_cache(env, index, 0, 0, 0xFFFFFFFF, FLAT_DATA)
        load_seg_cache(env, R_CS, 0, 0, 0xFFFFFFFF, FLAT_CODE32)
        env.set_table(LDT, 0, 0, 0, _LDT_FLAGS)
        env.set_table(TR, 0, 0, 0xFFFF, _TSS_BUSY)
        env.set_table(GDT, 0, 0, 0, 0)
        env.set_table(IDT, 0, 0, 0, 0)
        self.end_shadow()
        self.msrs.clear()
        self.deferred = None
        for reg, value in _FPU_RESET:
            self.uc.reg_write(reg, value)
        intercepts.request_interrupt_window(False)
        intercepts.intercept_cr3(self.shadow)
        self.fill.flush()

    def _leave_long_mode(self) -> None:
        """A Uc in 64-bit mode starts with CS.L; only turning paging off takes that back."""
        env, intercepts = self.env, self.intercepts
        intercepts.load_cr4(CR4_PAE)
        env.efer = EFER_LME | env.efer
        intercepts.load_cr0(CR0_PG | CR0_PE | _CR0_ET_NE)
        intercepts.load_cr0(CR0_PE | _CR0_ET_NE)
        intercepts.load_cr4(0)
        env.efer = 0

    def start_protected(self, entry: int, gdt: int, gdt_limit: int, code: int, data: int) -> None:
        """32-bit protected mode, paging off, flat segments, interrupts off (Multiboot 3.2)."""
        self.reset()
        env = self.env
        env.set_table(GDT, 0, gdt, gdt_limit, 0)
        for index in (R_ES, R_SS, R_DS, R_FS, R_GS):
            load_seg_cache(env, index, data, 0, 0xFFFFFFFF, FLAT_DATA)
        load_seg_cache(env, R_CS, code, 0, 0xFFFFFFFF, FLAT_CODE32)
        env.eip = entry

    def start_long(self, entry: int, cr3: int, gdt: int, gdt_limit: int, code: int, data: int) -> None:
        """64-bit mode with the page tables at `cr3`, flat segments, interrupts off."""
        self.reset()
        env = self.env
        env.set_table(GDT, 0, gdt, gdt_limit, 0)
        env.efer = EFER_LME
        self.intercepts.load_cr4(CR4_PAE)
        env.set_cr(3, cr3)
        self.intercepts.load_cr0(CR0_PG | CR0_PE | _CR0_ET_NE)
        for index in (R_ES, R_SS, R_DS, R_FS, R_GS):
            load_seg_cache(env, index, data, 0, 0xFFFFFFFF, FLAT_DATA)
        load_seg_cache(env, R_CS, code, 0, 0xFFFFFFFF, FLAT_CODE64)
        env.eip = entry
        self.fill.flush()

    def start_like(self, other: UnicornVcpu, entry: int) -> None:
        """The mode, the address space and the tables of `other`; LDTR and TR null."""
        self.reset()
        env, source = self.env, other.env
        env.efer = source.efer & EFER_LME
        self.intercepts.load_cr4(source.cr(4))
        env.set_cr(3, source.cr(3))
        self.intercepts.load_cr0(source.cr(0))
        env.efer = source.efer
        self.fill.pdptes = other.fill.pdptes
        self.watch_cr3()
        for table in (GDT, IDT):
            env.set_table(table, *source.table(table))
        for index in (R_ES, R_SS, R_DS, R_FS, R_GS, R_CS):
            load_seg_cache(env, index, *source.seg(index))
        self.msrs.update(other.msrs)
        env.eip = entry
        self.fill.flush()
