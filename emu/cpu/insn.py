"""Decoding of the one instruction at RIP: what it does to its memory operand.

Capstone decodes; results are kept by bytes, since the same few instructions fault again and again.

Source: Intel SDM vol. 2; the read-modify-write list is those forms whose memory destination is also
read (unlocked or locked alike).

Not modelled: VEX and EVEX encodings as read-modify-write (none exist), far pointers.
"""

from __future__ import annotations

from typing import Any

import capstone
from capstone import x86_const as cx

from emu.cpu.env import R_CS, R_DS, R_ES, R_FS, R_GS, R_SS, Env

__all__ = ["REGISTERS", "Decoder", "effective_address", "is_read_modify_write", "uses_stack_segment"]

_M64 = (1 << 64) - 1
_CACHE_LIMIT = 4096

_RMW = frozenset((
    cx.X86_INS_ADC, cx.X86_INS_ADD, cx.X86_INS_AND, cx.X86_INS_BTC, cx.X86_INS_BTR, cx.X86_INS_BTS,
    cx.X86_INS_CMPXCHG, cx.X86_INS_CMPXCHG16B, cx.X86_INS_CMPXCHG8B, cx.X86_INS_DEC, cx.X86_INS_INC,
    cx.X86_INS_NEG, cx.X86_INS_NOT, cx.X86_INS_OR, cx.X86_INS_RCL, cx.X86_INS_RCR, cx.X86_INS_ROL,
    cx.X86_INS_ROR, cx.X86_INS_SAL, cx.X86_INS_SAR, cx.X86_INS_SBB, cx.X86_INS_SHL, cx.X86_INS_SHLD,
    cx.X86_INS_SHR, cx.X86_INS_SHRD, cx.X86_INS_SUB, cx.X86_INS_XADD, cx.X86_INS_XCHG, cx.X86_INS_XOR,
))

_STACK = frozenset((
    cx.X86_INS_PUSH, cx.X86_INS_POP, cx.X86_INS_CALL, cx.X86_INS_RET, cx.X86_INS_LEAVE, cx.X86_INS_ENTER,
    cx.X86_INS_PUSHFQ, cx.X86_INS_POPFQ, cx.X86_INS_PUSHF, cx.X86_INS_POPF, cx.X86_INS_PUSHFD,
    cx.X86_INS_POPFD, cx.X86_INS_IRET, cx.X86_INS_IRETD, cx.X86_INS_IRETQ, cx.X86_INS_RETF, cx.X86_INS_RETFQ,
    cx.X86_INS_LCALL, cx.X86_INS_PUSHAL, cx.X86_INS_POPAL, cx.X86_INS_PUSHAW, cx.X86_INS_POPAW,
))

_DESCRIPTOR = frozenset((
    cx.X86_INS_LCALL, cx.X86_INS_LJMP, cx.X86_INS_RETF, cx.X86_INS_RETFQ, cx.X86_INS_IRET, cx.X86_INS_IRETD,
    cx.X86_INS_IRETQ, cx.X86_INS_LAR, cx.X86_INS_LSL, cx.X86_INS_VERR, cx.X86_INS_VERW, cx.X86_INS_LFS,
    cx.X86_INS_LGS, cx.X86_INS_LSS, cx.X86_INS_LDS, cx.X86_INS_LES,
))

_SEGMENTS = {
    cx.X86_REG_ES: R_ES, cx.X86_REG_CS: R_CS, cx.X86_REG_SS: R_SS, cx.X86_REG_DS: R_DS,
    cx.X86_REG_FS: R_FS, cx.X86_REG_GS: R_GS,
}


def _register_table() -> dict[int, tuple[int, int, int]]:
    table: dict[int, tuple[int, int, int]] = {}
    names = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
    for index, name in enumerate(names):
        upper = name.upper()
        table[getattr(cx, f"X86_REG_R{upper}")] = (index, 8, 0)
        table[getattr(cx, f"X86_REG_E{upper}")] = (index, 4, 0)
        table[getattr(cx, f"X86_REG_{upper}")] = (index, 2, 0)
        low = upper[0] + "L" if index < 4 else upper + "L"
        table[getattr(cx, f"X86_REG_{low}")] = (index, 1, 0)
        if index < 4:
            table[getattr(cx, f"X86_REG_{upper[0]}H")] = (index, 1, 8)
    for index in range(8, 16):
        for suffix, size in (("", 8), ("D", 4), ("W", 2), ("B", 1)):
            table[getattr(cx, f"X86_REG_R{index}{suffix}")] = (index, size, 0)
    return table


REGISTERS = _register_table()
"""Capstone register -> (index of the 64-bit register, size in bytes, bit shift: 8 for AH..BH)."""


class Decoder:
    """Capstone for 64-, 32- and 16-bit code, with a memory."""

    def __init__(self) -> None:
        self._engines = {
            bits: capstone.Cs(capstone.CS_ARCH_X86, mode)
            for bits, mode in (
                (64, capstone.CS_MODE_64), (32, capstone.CS_MODE_32), (16, capstone.CS_MODE_16),
            )
        }
        for engine in self._engines.values():
            engine.detail = True
        self._known: dict[tuple[int, bytes], Any] = {}

    def decode(self, code: bytes, bits: int) -> Any:
        """The CsInsn at the start of `code` of so many bits, decoded as at address 0, or None."""
        key = (bits, code)
        try:
            return self._known[key]
        except KeyError:
            pass
        if len(self._known) >= _CACHE_LIMIT:
            self._known.clear()
        found = next(self._engines[bits].disasm(code, 0, 1), None)
        self._known[key] = found
        return found

    def reads_descriptor(self, insn: Any) -> bool:
        """Whether the instruction makes the CPU read a descriptor table: it loads or probes a selector."""
        if insn.id in _DESCRIPTOR:
            return True
        if insn.id not in (cx.X86_INS_MOV, cx.X86_INS_POP):
            return False
        target = insn.operands[0]
        return bool(target.type == cx.X86_OP_REG and target.reg in _SEGMENTS)


def is_read_modify_write(insn: Any) -> bool:
    """Whether the instruction writes the memory operand that it reads."""
    if insn is None or insn.id not in _RMW:
        return False
    operands = insn.operands
    if operands[0].type == cx.X86_OP_MEM:
        return True
    # XCHG r, m is encoded with the register first or second
    return bool(insn.id == cx.X86_INS_XCHG and operands[1].type == cx.X86_OP_MEM)


def effective_address(env: Env, insn: Any, operand: Any, long_code: bool) -> int:
    """The linear address of a memory operand, registers as they stand."""
    mem = operand.mem
    address: int = mem.disp
    for reg, scale in ((mem.base, 1), (mem.index, mem.scale)):
        if reg == cx.X86_REG_INVALID or reg in (cx.X86_REG_RIZ, cx.X86_REG_EIZ):
            continue
        if reg in (cx.X86_REG_RIP, cx.X86_REG_EIP):
            address += env.eip + insn.size
            continue
        index, size, _ = REGISTERS[reg]
        address += (env.reg(index) & ((1 << (8 * size)) - 1)) * scale
    address &= (1 << (8 * insn.addr_size)) - 1
    segment = _segment(operand)
    if not long_code or segment in (R_FS, R_GS):
        address += env.seg(segment)[1]
    return int(address & (_M64 if long_code else 0xFFFFFFFF))


def _segment(operand: Any) -> int:
    segment = operand.mem.segment
    if segment in _SEGMENTS:
        return _SEGMENTS[segment]
    stack = (cx.X86_REG_RSP, cx.X86_REG_RBP, cx.X86_REG_ESP, cx.X86_REG_EBP)
    return R_SS if operand.mem.base in stack else R_DS


def uses_stack_segment(env: Env, insn: Any, gva: int, long_code: bool) -> bool:
    """Whether the access at `gva` was made through SS: #SS instead of #GP for a bad address."""
    if insn is None:
        return False
    for operand in insn.operands:
        if operand.type != cx.X86_OP_MEM:
            continue
        if effective_address(env, insn, operand, long_code) >> 12 == gva >> 12:
            return bool(_segment(operand) == R_SS)
    return bool(insn.id in _STACK)
