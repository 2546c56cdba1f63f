"""Instructions that change the CPU's mode or privilege and that Unicorn leaves wholly or partly undone.

MOV to CR0, CR4 and (in PAE paging) CR3, LMSW and CLTS with the #GP conditions that QEMU lacks; SYSCALL and
SYSENTER, for which Unicorn has no code.

Source: Intel SDM vol. 2: MOV to/from control registers, LMSW, CLTS, SYSCALL, SYSENTER; vol. 3A 2.5.

Not modelled: SYSRET's #GP on a non-canonical RCX (the fetch faults instead), CR8, PCIDE, CET;
under EPT, the #GP of reserved bits of CR3 in IA-32e mode, where MOV to CR3 is left to Unicorn.
"""

from __future__ import annotations

from typing import Any

from capstone import x86_const as cx

from emu.cpu.env import (
    FMASK,
    HF_CS64,
    HF_LMA,
    LSTAR,
    R_CS,
    R_SS,
    STAR,
    SYSENTER_CS,
    SYSENTER_EIP,
    SYSENTER_ESP,
)
from emu.cpu.insn import effective_address
from emu.cpu.memory import VECTOR_GP, GuestFault
from emu.cpu.mmio import read_register
from emu.cpu.paging import CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA, EFER_LME, EFER_SCE
from emu.cpu.pdpte import load_pdptes, load_pdptes_for_cr0, load_pdptes_for_cr4
from emu.cpu.segments import DESC_CODE, DESC_DB, DESC_G, DESC_L, DESC_P, DESC_S, load_seg_cache
from emu.cpu.vcpu import UnicornVcpu

__all__ = ["CR4_GUEST_BITS", "lmsw_operand", "syscall", "sysenter", "write_control_register"]

_CR0_TS, _CR0_NW, _CR0_CD = 1 << 3, 1 << 29, 1 << 30
_CR0_FIXED = 1 << 4 | 1 << 5
_VECTOR_UD = 6

# VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT LA57 FSGSBASE SMEP SMAP
CR4_GUEST_BITS = sum(1 << b for b in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 21))

_SEG_ACCESSED_RW = 3 << 8
_RF, _IF, _VM = 1 << 16, 1 << 9, 1 << 17
_M64 = (1 << 64) - 1


def _gp() -> GuestFault:
    return GuestFault(VECTOR_GP, 0)


def write_control_register(vcpu: UnicornVcpu, insn: Any, number: int) -> None:
    """Carry out the instruction at RIP that writes CR0, CR3 or CR4, or raise the #GP it deserves."""
    env = vcpu.env
    if insn.id == cx.X86_INS_CLTS:
        value = env.cr(0) & ~_CR0_TS
    elif insn.id == cx.X86_INS_LMSW:
        value = env.cr(0) & ~0xE | lmsw_operand(vcpu, insn) & 0xF
    else:
        value = read_register(vcpu, insn.operands[1].reg)
    if number == 0:
        _check_cr0(vcpu, value)
        load_pdptes_for_cr0(vcpu, value)
        vcpu.intercepts.load_cr0(value | _CR0_FIXED)
    elif number == 3:
        load_pdptes(vcpu, value)
        vcpu.intercepts.load_cr3(value)
    else:
        _check_cr4(vcpu, value)
        load_pdptes_for_cr4(vcpu, value)
        vcpu.intercepts.load_cr4(value)
    vcpu.watch_cr3()
    vcpu.skip(insn.size)


def _check_cr4(vcpu: UnicornVcpu, value: int) -> None:
    long_mode = vcpu.env.hflags & HF_LMA
    if value & ~CR4_GUEST_BITS or (long_mode and not value & CR4_PAE):
        raise _gp()
    if long_mode and (value ^ vcpu.env.cr(4)) & CR4_LA57:
        raise _gp()


def lmsw_operand(vcpu: UnicornVcpu, insn: Any) -> int:
    """The machine status word that LMSW loads."""
    operand = insn.operands[0]
    if operand.type == cx.X86_OP_MEM:
        address = effective_address(vcpu.env, insn, operand, vcpu.long_code)
        return int.from_bytes(vcpu.memory.read(address, 2), "little")
    return read_register(vcpu, operand.reg)


def _check_cr0(vcpu: UnicornVcpu, value: int) -> None:
    env = vcpu.env
    if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & _CR0_NW and not value & _CR0_CD):
        raise _gp()
    turning_on = value & CR0_PG and not env.cr(0) & CR0_PG
    if turning_on and env.efer & EFER_LME and (not env.cr(4) & CR4_PAE or env.seg(R_CS)[3] & DESC_L):
        raise _gp()
    if not value & CR0_PG and env.hflags & HF_CS64:
        raise _gp()


def syscall(vcpu: UnicornVcpu) -> None:
    """SYSCALL at RIP; #UD outside 64-bit mode or with EFER.SCE clear."""
    env = vcpu.env
    if not env.hflags & HF_CS64 or not env.efer & EFER_SCE:
        raise GuestFault(_VECTOR_UD)
    q = env.q
    env.set_reg(1, env.eip + 2)
    env.set_reg(11, env.eflags & ~_RF)
    env.eflags = env.eflags & ~(q[FMASK // 8] | _RF) | 2
    selector = q[STAR // 8] >> 32 & 0xFFFC
    _flat_kernel_segments(vcpu, selector, 64)
    env.eip = q[LSTAR // 8]
    vcpu.end_shadow()


def sysenter(vcpu: UnicornVcpu) -> None:
    """SYSENTER at RIP; #GP(0) with a null IA32_SYSENTER_CS."""
    env = vcpu.env
    selector = env.d[SYSENTER_CS // 4] & 0xFFFC
    if not selector or not env.cr(0) & CR0_PE:
        raise _gp()
    long_mode = bool(env.efer & EFER_LMA)
    env.eflags &= ~(_IF | _RF | _VM)
    _flat_kernel_segments(vcpu, selector, 64 if long_mode else 32)
    mask = _M64 if long_mode else 0xFFFFFFFF
    env.set_reg(4, env.q[SYSENTER_ESP // 8] & mask)
    env.eip = env.q[SYSENTER_EIP // 8] & mask
    vcpu.end_shadow()


def _flat_kernel_segments(vcpu: UnicornVcpu, selector: int, bits: int) -> None:
    common = DESC_G | DESC_P | DESC_S | _SEG_ACCESSED_RW
    mode = DESC_L if bits == 64 else DESC_DB
    load_seg_cache(vcpu.env, R_SS, selector + 8, 0, 0xFFFFFFFF, common | DESC_DB)
    load_seg_cache(vcpu.env, R_CS, selector, 0, 0xFFFFFFFF, common | DESC_CODE | mode)
