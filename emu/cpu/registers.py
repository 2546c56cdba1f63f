"""Registers by name, as KVM, the debugger and the reports ask for them.

Names: rax..r15, rip, rflags, cr0, cr2, cr3, cr4, efer, cpl; pdptr0..pdptr3 (the PDPTE registers); es, cs,
ss, ds, fs, gs and gdtr, idtr, ldtr, tr for selectors, each also with _base, _limit and _flags (bits 32..63 of
the descriptor).

Not modelled: debug, FPU and SSE registers; writing of segments.
"""

from __future__ import annotations

from emu.cpu.env import CR, GDT, IDT, LDT, SEG_SIZE, SEGS, TR
from emu.cpu.msr import MSR_EFER, write_msr
from emu.cpu.vcpu import UnicornVcpu

__all__ = ["GENERAL_REGISTERS", "read_register", "write_register"]

_M64 = (1 << 64) - 1

GENERAL_REGISTERS = {
    name: index for index, name in enumerate(
        ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
    )
}
_CONTROL = {"cr0": 0, "cr2": 2, "cr3": 3, "cr4": 4}
_PDPTRS = ("pdptr0", "pdptr1", "pdptr2", "pdptr3")
_TABLES = {
    **{name: SEGS + SEG_SIZE * n for n, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs"))},
    "gdtr": GDT, "idtr": IDT, "ldtr": LDT, "tr": TR,
}
_PARTS = ("", "base", "limit", "flags")


def read_register(vcpu: UnicornVcpu, name: str) -> int:
    """The register's value. KeyError for a name that does not exist."""
    env = vcpu.env
    if name in GENERAL_REGISTERS:
        return env.reg(GENERAL_REGISTERS[name])
    if name in _CONTROL:
        return env.cr(_CONTROL[name])
    if name == "rip":
        return env.eip
    if name == "rflags":
        return env.eflags
    if name == "efer":
        return env.efer
    if name == "cpl":
        return env.cpl
    if name in _PDPTRS:
        return vcpu.fill.pdptes[_PDPTRS.index(name)] & _M64
    table, _, part = name.partition("_")
    if part not in _PARTS:
        raise KeyError(name)
    return env.table(_TABLES[table])[_PARTS.index(part)]


def write_register(vcpu: UnicornVcpu, name: str, value: int) -> None:
    """Write a general or control register, RIP, RFLAGS or EFER. KeyError for another name."""
    env = vcpu.env
    value &= _M64
    if name in GENERAL_REGISTERS:
        env.set_reg(GENERAL_REGISTERS[name], value)
    elif name == "rip":
        env.eip = value
    elif name == "rflags":
        env.eflags = value | 2
    elif name == "efer":
        write_msr(vcpu, MSR_EFER, value)
    elif name == "cr2":
        env.q[CR // 8 + 2] = value
    elif name == "cr3":
        vcpu.intercepts.load_cr3(value)
    elif name == "cr0":
        vcpu.intercepts.load_cr0(value)
    elif name == "cr4":
        vcpu.intercepts.load_cr4(value)
    else:
        raise KeyError(name)
