"""Integer results and RFLAGS of the instructions that are emulated; the conditions of SETcc.

Source: Intel SDM vol. 1 3.4.3.1 (status flags); vol. 2 per instruction.

Not modelled: RCL, RCR, double shifts, multiplication.
"""

from __future__ import annotations

from collections.abc import Callable

from capstone import x86_const as cx

__all__ = ["CONDITIONS", "STATUS_FLAGS", "alu", "shift"]

_CF, _PF, _AF, _ZF, _SF, _OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
STATUS_FLAGS = _CF | _PF | _AF | _ZF | _SF | _OF

_LOGIC = {cx.X86_INS_AND: "and", cx.X86_INS_TEST: "and", cx.X86_INS_OR: "or", cx.X86_INS_XOR: "xor"}
_ADD = (cx.X86_INS_ADD, cx.X86_INS_ADC, cx.X86_INS_XADD, cx.X86_INS_INC)
_SUB = (cx.X86_INS_SUB, cx.X86_INS_SBB, cx.X86_INS_CMP, cx.X86_INS_DEC, cx.X86_INS_NEG, cx.X86_INS_CMPXCHG)


def _zsp(value: int, size: int) -> int:
    flags = 0 if value else _ZF
    if value >> (8 * size - 1):
        flags |= _SF
    if not (value & 0xFF).bit_count() & 1:
        flags |= _PF
    return flags


def alu(insn_id: int, size: int, a: int, b: int, rflags: int) -> tuple[int, int]:
    """(result, new RFLAGS) of `a op b`, both `size` bytes. NOT leaves the flags alone.

    INC and DEC take b as 1; NEG takes a as 0 and b as the operand.
    """
    mask = (1 << (8 * size)) - 1
    if insn_id == cx.X86_INS_NOT:
        return ~a & mask, rflags
    if insn_id in _LOGIC:
        kind = _LOGIC[insn_id]
        result = a & b if kind == "and" else a | b if kind == "or" else a ^ b
        return result, rflags & ~STATUS_FLAGS | _zsp(result, size)
    carry = rflags & _CF if insn_id in (cx.X86_INS_ADC, cx.X86_INS_SBB) else 0
    if insn_id in _ADD:
        total = a + b + carry
        overflow = ~(a ^ b) & (a ^ total)
    elif insn_id in _SUB:
        total = a - b - carry
        overflow = (a ^ b) & (a ^ total)
    else:
        raise ValueError(f"no such ALU operation: {insn_id}")
    result = total & mask
    flags = _zsp(result, size)
    if total & ~mask:
        flags |= _CF
    if (a ^ b ^ result) & 0x10:
        flags |= _AF
    if overflow >> (8 * size - 1) & 1:
        flags |= _OF
    keep = ~STATUS_FLAGS
    if insn_id in (cx.X86_INS_INC, cx.X86_INS_DEC):
        keep |= _CF
        flags &= ~_CF
    return result, rflags & keep | flags


_ROTATES = (cx.X86_INS_ROL, cx.X86_INS_ROR)


def shift(insn_id: int, size: int, value: int, count: int, rflags: int) -> tuple[int, int]:
    """(result, new RFLAGS) of a shift or rotate of `size` bytes. OF is defined for a count of 1 only."""
    bits = 8 * size
    count &= 63 if size == 8 else 31
    if not count:
        return value, rflags
    mask = (1 << bits) - 1
    if insn_id in _ROTATES:
        by = count % bits if insn_id == cx.X86_INS_ROL else -count % bits
        result = (value << by | value >> bits - by) & mask
        carry = result & 1 if insn_id == cx.X86_INS_ROL else result >> bits - 1
        over = result >> bits - 1 ^ (carry if insn_id == cx.X86_INS_ROL else result >> bits - 2 & 1)
        return result, rflags & ~(_CF | _OF) | (_CF if carry else 0) | (_OF if over else 0)
    if insn_id in (cx.X86_INS_SHL, cx.X86_INS_SAL):
        wide = value << count
        result, carry = wide & mask, wide >> bits & 1
        over = result >> bits - 1 ^ carry
    else:
        signed = insn_id == cx.X86_INS_SAR
        wide = value - (1 << bits) if signed and value >> bits - 1 else value
        result, carry = wide >> count & mask, wide >> count - 1 & 1
        over = 0 if signed else value >> bits - 1
    flags = _zsp(result, size) | (_CF if carry else 0) | (_OF if over else 0)
    return result, rflags & ~STATUS_FLAGS | flags


def _less(rflags: int) -> bool:
    return (rflags & _SF != 0) != (rflags & _OF != 0)


CONDITIONS: tuple[Callable[[int], bool], ...] = (
    lambda f: f & _OF != 0, lambda f: f & _OF == 0, lambda f: f & _CF != 0, lambda f: f & _CF == 0,
    lambda f: f & _ZF != 0, lambda f: f & _ZF == 0, lambda f: f & (_CF | _ZF) != 0,
    lambda f: f & (_CF | _ZF) == 0, lambda f: f & _SF != 0, lambda f: f & _SF == 0,
    lambda f: f & _PF != 0, lambda f: f & _PF == 0, _less, lambda f: not _less(f),
    lambda f: _less(f) or f & _ZF != 0, lambda f: not _less(f) and f & _ZF == 0,
)
"""By the low four bits of the opcode: whether RFLAGS fulfil the condition."""
