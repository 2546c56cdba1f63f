"""Integer results and RFLAGS of the instructions that are emulated on device memory.

Source: Intel SDM vol. 1 3.4.3.1 (status flags); vol. 2 per instruction.

Not modelled: shifts, rotates, bit tests, multiplication.
"""

from __future__ import annotations

from capstone import x86_const as cx

__all__ = ["STATUS_FLAGS", "alu"]

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
