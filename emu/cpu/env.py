"""Unicorn's CPU state (CPUX86State), read and written in place.

Unicorn's register calls cost microseconds, set only selectors of segment registers in 64-bit mode
and cannot reach the CPL, hidden segment state or the exception fields at all; so the emulator
pokes the structure itself. Offsets are those of Unicorn 2.1.4 (target/i386/cpu.h: CPUX86State);
the structure is found by magic register values and every offset that has a register call is
compared with it, so that another build of Unicorn fails at once instead of corrupting guests.

    0    regs[16] RAX RCX RDX RBX RSP RBP RSI RDI R8..R15     0x1a8 cr[5]
    128  eip   136 eflags (system bits; condition codes lazy)  0x250 efer
    168  cc_op 172 df   176 hflags   180 hflags2               0x12c0 sysenter_cs, esp, eip
    184  segs[6] ES CS SS DS FS GS, 24 bytes each              0x12d8 star, lstar 0x12e8, ...
    328  ldt   352 tr   376 gdt   400 idt                      0x1508 error_code ... exceptions

A segment is selector (u32) +0, base (u64) +8, limit (u32) +16, flags (u32) +20; flags are bits
32..63 of the descriptor (type, S, DPL, P at 8..15; AVL, L, D/B, G at 20..23).

Not modelled: FPU, SSE and debug-register state (the register calls reach those).
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

from unicorn import x86_const as x86

__all__ = [
    "CC_OP", "CR", "CSTAR", "DF", "EFER", "EFLAGS", "EIP", "ENV_SIZE", "ERROR_CODE",
    "EXCEPTION_INDEX_IS_INT", "EXCEPTION_NEXT_EIP", "FMASK", "GDT", "HFLAGS", "HF_ADDSEG", "HF_CPL",
    "HF_CS32", "HF_CS64", "HF_INHIBIT_IRQ", "HF_LMA", "HF_PE", "HF_SS32", "IDT", "KERNEL_GS_BASE",
    "LDT", "LSTAR", "OLD_EXCEPTION", "REGS", "R_CS", "R_DS", "R_ES", "R_FS", "R_GS", "R_SS", "SEGS",
    "SEG_SIZE", "STAR", "SYSENTER_CS", "SYSENTER_EIP", "SYSENTER_ESP", "TR", "TSC_AUX", "UC_INVALID_ADDR",
    "Env",
]

REGS = 0
EIP = 128
EFLAGS = 136
CC_OP = 168
DF = 172
HFLAGS = 176
SEGS = 184
SEG_SIZE = 24
LDT = 328
TR = 352
GDT = 376
IDT = 400
CR = 0x1A8
EFER = 0x250
SYSENTER_CS = 0x12C0
SYSENTER_ESP = 0x12C8
SYSENTER_EIP = 0x12D0
STAR = 0x12D8
LSTAR = 0x12E8
CSTAR = 0x12F0
FMASK = 0x12F8
KERNEL_GS_BASE = 0x1300
TSC_AUX = 0x1320
ERROR_CODE = 0x1508
EXCEPTION_INDEX_IS_INT = 0x150C
EXCEPTION_NEXT_EIP = 0x1510
OLD_EXCEPTION = 0x1578
ENV_SIZE = 0x1580

UC_INVALID_ADDR = 1416
"""struct uc_struct: invalid_addr, the full address of the access that a fill refused."""

R_ES, R_CS, R_SS, R_DS, R_FS, R_GS = range(6)

HF_CPL = 3
HF_INHIBIT_IRQ = 1 << 3
HF_CS32 = 1 << 4
HF_SS32 = 1 << 5
HF_ADDSEG = 1 << 6
HF_PE = 1 << 7
HF_LMA = 1 << 14
HF_CS64 = 1 << 15

_UC_CPU_SEARCH = 1400
_CPU_ENV_SEARCH = 0x20000


def _find_env(uc: Any, uc_struct: int) -> int:
    """Address of CPUX86State: magic values in RAX..RBX, searched behind every pointer in uc_struct.

    Only what follows the registers when they change counts: freed memory and our own copies of the
    magic values look the same once.
    """
    ids = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RBX)
    saved = [uc.reg_read(i) for i in ids]
    # /proc/self/mem answers EIO for an unmapped pointer, where a plain load would kill the process
    mem = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        pattern = _write_magic(uc, ids, 0x1122334455667788)
        found = set()
        for (pointer,) in struct.iter_unpack("<Q", ctypes.string_at(uc_struct, _UC_CPU_SEARCH)):
            if not 0x10000 <= pointer < 1 << 47:
                continue
            try:
                data = os.pread(mem, _CPU_ENV_SEARCH, pointer)
            except OSError:
                continue
            at = data.find(pattern)
            while at >= 0:
                found.add(pointer + at)
                at = data.find(pattern, at + 1)
        pattern = _write_magic(uc, ids, 0x8877665544332211)
        live = [address for address in sorted(found) if os.pread(mem, len(pattern), address) == pattern]
    finally:
        os.close(mem)
        for i, value in zip(ids, saved, strict=True):
            uc.reg_write(i, value)
    if len(live) != 1:
        raise RuntimeError("CPUX86State not found: this build of Unicorn is not the one known (2.1.4)")
    return int(live[0])


def _write_magic(uc: Any, ids: tuple[int, ...], seed: int) -> bytes:
    values = [seed ^ (n * 0x0101010101010101) for n in range(len(ids))]
    for i, value in zip(ids, values, strict=True):
        uc.reg_write(i, value)
    return struct.pack(f"<{len(values)}Q", *values)


class Env:
    """The CPU state of one `Uc`. Index `q` (u64), `d` (u32) and `i` (i32) by byte offset // size.

    Valid as long as `uc` lives; keeps a reference to it.
    """

    __slots__ = ("_bytes", "_invalid", "addr", "d", "i", "q", "uc", "uc_struct")

    def __init__(self, uc: Any) -> None:
        self.uc = uc
        uc.reg_read(x86.UC_X86_REG_RAX)  # a Uc is built on its first call; before it the pointers are null
        self.uc_struct = int(ctypes.cast(uc._uch, ctypes.c_void_p).value or 0)
        self.addr = _find_env(uc, self.uc_struct)
        self._bytes = (ctypes.c_uint8 * ENV_SIZE).from_address(self.addr)
        raw = memoryview(self._bytes).cast("B")
        self.q = raw.cast("Q")
        self.d = raw.cast("I")
        self.i = raw.cast("i")
        self._invalid = ctypes.c_uint64.from_address(self.uc_struct + UC_INVALID_ADDR)
        self._verify()

    def _verify(self) -> None:
        """Compare every offset that a register call can read with that call."""
        uc, q = self.uc, self.q
        for offset, reg in (
            (REGS + 8 * 4, x86.UC_X86_REG_RSP), (REGS + 8 * 15, x86.UC_X86_REG_R15),
            (EIP, x86.UC_X86_REG_RIP), (CR, x86.UC_X86_REG_CR0), (CR + 24, x86.UC_X86_REG_CR3),
            (CR + 32, x86.UC_X86_REG_CR4),
        ):
            if q[offset // 8] != uc.reg_read(reg):
                raise RuntimeError(f"CPUX86State offset {offset:#x} is wrong for this build of Unicorn")
        for offset, msr in ((EFER, 0xC0000080), (STAR, 0xC0000081), (LSTAR, 0xC0000082),
                            (KERNEL_GS_BASE, 0xC0000102), (SYSENTER_EIP, 0x176)):
            if q[offset // 8] != uc.msr_read(msr):
                raise RuntimeError(f"CPUX86State offset {offset:#x} is wrong for this build of Unicorn")

    @property
    def invalid_addr(self) -> int:
        """Full virtual address of the access that ended the last emu_start by a refused fill."""
        return self._invalid.value

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return self.d[HFLAGS // 4] & HF_CPL

    @property
    def hflags(self) -> int:
        """QEMU's hidden flags: CPL, code and stack size, interrupt shadow, long mode."""
        return self.d[HFLAGS // 4]

    @hflags.setter
    def hflags(self, value: int) -> None:
        self.d[HFLAGS // 4] = value

    @property
    def eip(self) -> int:
        """RIP."""
        return self.q[EIP // 8]

    @eip.setter
    def eip(self, value: int) -> None:
        self.q[EIP // 8] = value

    @property
    def eflags(self) -> int:
        """The system bits of RFLAGS; condition codes and DF live in cc_op and df while code ran lazily."""
        return self.q[EFLAGS // 8]

    @eflags.setter
    def eflags(self, value: int) -> None:
        self.q[EFLAGS // 8] = value

    @property
    def efer(self) -> int:
        """IA32_EFER."""
        return self.q[EFER // 8]

    @efer.setter
    def efer(self, value: int) -> None:
        self.q[EFER // 8] = value

    @property
    def error_code(self) -> int:
        """Error code of the exception an interrupt hook was called for."""
        return self.d[ERROR_CODE // 4]

    @property
    def exception_is_int(self) -> bool:
        """Whether that exception is a software interrupt (INT n)."""
        return self.i[EXCEPTION_INDEX_IS_INT // 4] != 0

    def clear_old_exception(self) -> None:
        """Forget the exception under delivery: Unicorn never does, and makes the next one a double fault."""
        self.i[OLD_EXCEPTION // 4] = -1

    def reg(self, index: int) -> int:
        """General register by its encoding: 0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP, 5 RBP, 6 RSI, 7 RDI, 8..15."""
        return self.q[index]

    def set_reg(self, index: int, value: int) -> None:
        """Write a general register."""
        self.q[index] = value & 0xFFFFFFFFFFFFFFFF

    def cr(self, index: int) -> int:
        """CR0, CR2, CR3 or CR4."""
        return self.q[CR // 8 + index]

    def set_cr(self, index: int, value: int) -> None:
        """Poke a control register without Unicorn's consequences: no flush, no change of mode."""
        self.q[CR // 8 + index] = value

    def seg(self, index: int) -> tuple[int, int, int, int]:
        """(selector, base, limit, flags) of R_ES..R_GS."""
        return self.table(SEGS + SEG_SIZE * index)

    def set_seg(self, index: int, selector: int, base: int, limit: int, flags: int) -> None:
        """Load the hidden parts of R_ES..R_GS as given; hflags are the caller's."""
        self.set_table(SEGS + SEG_SIZE * index, selector, base, limit, flags)

    def table(self, offset: int) -> tuple[int, int, int, int]:
        """(selector, base, limit, flags) of LDT, TR, GDT or IDT by offset."""
        d = self.d
        return d[offset // 4], self.q[(offset + 8) // 8], d[(offset + 16) // 4], d[(offset + 20) // 4]

    def set_table(self, offset: int, selector: int, base: int, limit: int, flags: int) -> None:
        """Write LDT, TR, GDT or IDT by offset."""
        d = self.d
        d[offset // 4] = selector
        self.q[(offset + 8) // 8] = base
        d[(offset + 16) // 4] = limit
        d[(offset + 20) // 4] = flags
