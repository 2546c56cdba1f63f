"""More instructions that KVM's emulator knows: those that may meet a shadowed page table, but no device.

A guest may have its stack on a page that it also uses as a table, or write entries with whatever stores.
Most of that KVM leaves to the CPU, after it has given the table up; but where the very table translates the
access it must emulate. Only linear addresses are told here (mmio.py). PUSH, CALL and POP to memory, PUSHF;
BTS, BTR, BTC; shifts and rotates; SETcc; CMPXCHG8B and CMPXCHG16B; stores of SSE registers, MOVNTI.

Source: arch/x86/kvm/emulate.c (em_push, em_call, em_bts, em_cmpxchg8b, opcode tables); Intel SDM vol. 2.

Not modelled: SHLD, SHRD, RCL, RCR, ENTER, partial SSE stores, the #GP of unaligned MOVAPS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from capstone import x86_const as cx
from unicorn import x86_const as x86

from emu.cpu.alu import CONDITIONS, shift
from emu.cpu.insn import REGISTERS, effective_address
from kvm_model.kvm_x86_ops import MmioAccess

if TYPE_CHECKING:
    from emu.cpu.vcpu import UnicornVcpu

__all__ = ["emulate_more"]

_RAX, _RCX, _RDX, _RBX, _RSP = range(5)
_CF, _ZF = 1 << 0, 1 << 6
_RF_VM = 1 << 16 | 1 << 17
_M64 = (1 << 64) - 1
_LOCK = 0xF0
_OPERAND_SIZE = 0x66

_PUSHF = (cx.X86_INS_PUSHF, cx.X86_INS_PUSHFD, cx.X86_INS_PUSHFQ)
_BITS: dict[int, Callable[[int, int], int]] = {
    cx.X86_INS_BTS: lambda value, bit: value | bit,
    cx.X86_INS_BTR: lambda value, bit: value & ~bit,
    cx.X86_INS_BTC: lambda value, bit: value ^ bit,
}
_SHIFTS = (
    cx.X86_INS_SHL, cx.X86_INS_SAL, cx.X86_INS_SHR, cx.X86_INS_SAR, cx.X86_INS_ROL, cx.X86_INS_ROR,
)
_WHOLE_XMM = (
    cx.X86_INS_MOVUPS, cx.X86_INS_MOVAPS, cx.X86_INS_MOVUPD, cx.X86_INS_MOVAPD, cx.X86_INS_MOVDQA,
    cx.X86_INS_MOVDQU, cx.X86_INS_MOVNTDQ, cx.X86_INS_MOVNTPS, cx.X86_INS_MOVNTPD,
)
_LOW_XMM = (cx.X86_INS_MOVQ, cx.X86_INS_MOVD)


def emulate_more(vcpu: UnicornVcpu, insn: Any) -> MmioAccess | None:
    """The first access of the instruction at RIP, or None if it is none of these."""
    if insn.id in (cx.X86_INS_PUSH, cx.X86_INS_CALL) or insn.id in _PUSHF:
        return _onto_stack(vcpu, insn)
    if not insn.operands or insn.operands[0].type != cx.X86_OP_MEM:
        return None
    linear = effective_address(vcpu.env, insn, insn.operands[0], vcpu.long_code)
    if insn.id == cx.X86_INS_POP:
        return _pop(vcpu, insn)
    if insn.id in _BITS:
        return _bits(vcpu, insn, linear)
    if insn.id in _SHIFTS:
        return _shift(vcpu, insn, linear)
    if insn.id in (cx.X86_INS_CMPXCHG8B, cx.X86_INS_CMPXCHG16B):
        return _exchange_pair(vcpu, insn, linear)
    data = _stored(vcpu, insn)
    return None if data is None else _store(vcpu, insn, linear, insn.operands[0].size, data)


def _value(vcpu: UnicornVcpu, operand: Any, size: int) -> int:
    mask = (1 << 8 * size) - 1
    if operand.type == cx.X86_OP_IMM:
        return int(operand.imm) & mask
    index, _, shift_by = REGISTERS[operand.reg]
    return int(vcpu.env.reg(index) >> shift_by) & mask


def _store(
    vcpu: UnicornVcpu, insn: Any, linear: int, size: int, data: int, then: Callable[[], None] = lambda: None,
    old: int | None = None,
) -> MmioAccess:
    """The last access of an instruction. `old`: what its load found."""

    def finish(_: int) -> None:
        then()
        vcpu.skip(insn.size)

    locked = old is not None and insn.prefix[0] == _LOCK
    page_table = insn.id in (cx.X86_INS_BTS, cx.X86_INS_BTC, cx.X86_INS_CMPXCHG8B, cx.X86_INS_CMPXCHG16B)
    return MmioAccess(
        True, size, data, lock=locked, old=old or 0, gva=linear, page_table=page_table, priv=finish
    )


def _modify(
    vcpu: UnicornVcpu, insn: Any, linear: int, size: int, change: Callable[[int], tuple[int, int]]
) -> MmioAccess:
    """Load, `change` to (result, RFLAGS), store."""

    def finish(old: int) -> MmioAccess:
        result, rflags = change(old)

        def then() -> None:
            vcpu.env.eflags = rflags

        return _store(vcpu, insn, linear, size, result, then, old)

    page_table = insn.id in (cx.X86_INS_BTS, cx.X86_INS_BTC)
    return MmioAccess(False, size, 0, gva=linear, page_table=page_table, priv=finish)


# -- the stack ----------------------------------------------------------------------------------


def _stack_size(vcpu: UnicornVcpu, insn: Any) -> int:
    if insn.id != cx.X86_INS_CALL and insn.prefix[2] == _OPERAND_SIZE:
        return 2
    return 8 if vcpu.long_code else 4


def _stack_linear(vcpu: UnicornVcpu, rsp: int) -> int:
    from emu.cpu.env import R_SS

    if vcpu.long_code:
        return rsp & _M64
    return (rsp + vcpu.env.seg(R_SS)[1]) & 0xFFFFFFFF


def _push(vcpu: UnicornVcpu, insn: Any, data: int, target: int | None) -> MmioAccess:
    """Store below RSP; then RSP, and RIP of a call to `target`."""
    size = _stack_size(vcpu, insn)
    rsp = (vcpu.env.reg(_RSP) - size) & (_M64 if vcpu.long_code else 0xFFFFFFFF)

    def finish(_: int) -> None:
        vcpu.env.set_reg(_RSP, rsp)
        vcpu.skip(insn.size)
        if target is not None:
            vcpu.env.eip = target

    data &= (1 << 8 * size) - 1
    return MmioAccess(True, size, data, gva=_stack_linear(vcpu, rsp), priv=finish)


def _onto_stack(vcpu: UnicornVcpu, insn: Any) -> MmioAccess:
    """PUSH, PUSHF and CALL. Of an operand in memory the load comes first."""
    env = vcpu.env
    mask = _M64 if vcpu.long_code else 0xFFFFFFFF
    after = (env.eip + insn.size) & mask
    if insn.id in _PUSHF:
        return _push(vcpu, insn, env.eflags & ~_RF_VM, None)
    call = insn.id == cx.X86_INS_CALL
    operand = insn.operands[0]
    if operand.type == cx.X86_OP_MEM:
        size = operand.size

        def loaded(data: int) -> MmioAccess:
            return _push(vcpu, insn, after if call else data, data if call else None)

        linear = effective_address(env, insn, operand, vcpu.long_code)
        return MmioAccess(False, size, 0, gva=linear, priv=loaded)
    value = _value(vcpu, operand, 8)
    if not call:
        return _push(vcpu, insn, value, None)
    # Decoded as at address 0, a relative target is relative to RIP.
    target = env.eip + value if operand.type == cx.X86_OP_IMM else value
    return _push(vcpu, insn, after, target & mask)


def _pop(vcpu: UnicornVcpu, insn: Any) -> MmioAccess:
    """POP to memory, whose address counts RSP as it is afterwards."""
    env = vcpu.env
    size = _stack_size(vcpu, insn)
    rsp = env.reg(_RSP)
    new = (rsp + size) & (_M64 if vcpu.long_code else 0xFFFFFFFF)

    def loaded(data: int) -> MmioAccess:
        env.set_reg(_RSP, new)
        linear = effective_address(env, insn, insn.operands[0], vcpu.long_code)
        # Until the store is done nothing has happened.
        env.set_reg(_RSP, rsp)
        return _store(vcpu, insn, linear, size, data, lambda: env.set_reg(_RSP, new))

    return MmioAccess(False, size, 0, gva=_stack_linear(vcpu, rsp), priv=loaded)


# -- the rest -----------------------------------------------------------------------------------


def _bits(vcpu: UnicornVcpu, insn: Any, linear: int) -> MmioAccess:
    size = insn.operands[0].size
    other = insn.operands[1]
    offset = _value(vcpu, other, size)
    if other.type != cx.X86_OP_IMM:
        # A register's bit may lie anywhere around the operand.
        signed = offset - (1 << 8 * size) if offset >> 8 * size - 1 else offset
        linear = (linear + (signed >> 3 & ~(size - 1))) & (_M64 if vcpu.long_code else 0xFFFFFFFF)
    bit = 1 << (offset & 8 * size - 1)

    def change(old: int) -> tuple[int, int]:
        carry = _CF if old & bit else 0
        return _BITS[insn.id](old, bit), vcpu.env.eflags & ~_CF | carry

    return _modify(vcpu, insn, linear, size, change)


def _shift(vcpu: UnicornVcpu, insn: Any, linear: int) -> MmioAccess:
    size = insn.operands[0].size
    count = _value(vcpu, insn.operands[1], 1) if len(insn.operands) > 1 else 1
    return _modify(
        vcpu, insn, linear, size, lambda old: shift(insn.id, size, old, count, vcpu.env.eflags)
    )


def _exchange_pair(vcpu: UnicornVcpu, insn: Any, linear: int) -> MmioAccess:
    env = vcpu.env
    half = 4 if insn.id == cx.X86_INS_CMPXCHG8B else 8
    mask = (1 << 8 * half) - 1

    def pair(high: int, low: int) -> int:
        return int((env.reg(high) & mask) << 8 * half | env.reg(low) & mask)

    def loaded(old: int) -> MmioAccess:
        equal = old == pair(_RDX, _RAX)

        def then() -> None:
            if equal:
                env.eflags |= _ZF
                return
            env.eflags &= ~_ZF
            env.set_reg(_RAX, old & mask)
            env.set_reg(_RDX, old >> 8 * half)

        return _store(vcpu, insn, linear, 2 * half, pair(_RCX, _RBX) if equal else old, then, old)

    return MmioAccess(False, 2 * half, 0, gva=linear, page_table=True, priv=loaded)


def _stored(vcpu: UnicornVcpu, insn: Any) -> int | None:
    """What a plain store stores; None for another instruction."""
    if insn.mnemonic.startswith("set"):
        return int(CONDITIONS[insn.opcode[1] & 15](vcpu.env.eflags))
    if insn.id == cx.X86_INS_MOVNTI:
        return _value(vcpu, insn.operands[1], insn.operands[0].size)
    if insn.id not in _WHOLE_XMM and insn.id not in _LOW_XMM:
        return None
    reg = insn.operands[1].reg
    if not cx.X86_REG_XMM0 <= reg <= cx.X86_REG_XMM15:
        return _value(vcpu, insn.operands[1], insn.operands[0].size) if reg in REGISTERS else None
    value = int(vcpu.uc.reg_read(x86.UC_X86_REG_XMM0 + reg - cx.X86_REG_XMM0))
    return value & (1 << 8 * insn.operands[0].size) - 1
