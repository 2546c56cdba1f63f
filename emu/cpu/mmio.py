"""Emulating the instruction that touched a device or a write-protected page, as KVM's emulator does.

The instruction at RIP is decoded; what it loads or stores is an MmioAccess, which KVM
does in guest memory or takes to user space; `complete` puts the answer where the instruction wants it, sets
the flags and steps RIP. A read-modify-write is two accesses: completing its load gives the store, which if it
is locked says what the load found. Strings are done one element at a time: while the count lasts RIP stays,
and the next element exits by itself. An operand that crosses a page is told in two parts. Where KVM shadows
the guest's tables it translates and splits by itself, so that only the linear address is told.

Source: arch/x86/kvm/emulate.c (x86_emulate_insn, writeback), x86.c: emulator_read_write,
complete_emulated_mmio; Intel SDM vol. 2.

Not modelled: AVX moves, CMPS and SCAS; SSE moves, shifts and bit tests, PUSH, POP and CALL on devices
(mmio_shadow.py has them where KVM shadows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from capstone import x86_const as cx

from emu.cpu.alu import alu
from emu.cpu.env import R_DS, R_ES, R_FS, R_GS
from emu.cpu.insn import REGISTERS, effective_address
from emu.cpu.mmio_shadow import emulate_more
from emu.cpu.vcpu import UnicornVcpu
from kvm_model.kvm_x86_ops import MmioAccess

__all__ = [
    "Finish", "advance_string", "emulate", "is_page_table_writing", "read_register", "source_segment",
    "string_address", "write_register",
]

RAX, RCX, RSI, RDI = 0, 1, 6, 7
_DF = 1 << 10
_M64 = (1 << 64) - 1

_TWO_OPERAND = (
    cx.X86_INS_ADD, cx.X86_INS_ADC, cx.X86_INS_SUB, cx.X86_INS_SBB, cx.X86_INS_AND, cx.X86_INS_OR,
    cx.X86_INS_XOR, cx.X86_INS_CMP, cx.X86_INS_TEST,
)
_ONE_OPERAND = (cx.X86_INS_INC, cx.X86_INS_DEC, cx.X86_INS_NEG, cx.X86_INS_NOT)
_LOADS = (cx.X86_INS_MOV, cx.X86_INS_MOVABS, cx.X86_INS_MOVZX, cx.X86_INS_MOVSX, cx.X86_INS_MOVSXD)
_STOS = (cx.X86_INS_STOSB, cx.X86_INS_STOSW, cx.X86_INS_STOSD, cx.X86_INS_STOSQ)
_LODS = (cx.X86_INS_LODSB, cx.X86_INS_LODSW, cx.X86_INS_LODSD, cx.X86_INS_LODSQ)
_MOVS = (cx.X86_INS_MOVSB, cx.X86_INS_MOVSW, cx.X86_INS_MOVSD, cx.X86_INS_MOVSQ)
_PAGE_TABLE = (
    cx.X86_INS_OR, cx.X86_INS_AND, cx.X86_INS_XCHG, cx.X86_INS_CMPXCHG, cx.X86_INS_CMPXCHG8B,
    cx.X86_INS_CMPXCHG16B, cx.X86_INS_BTS, cx.X86_INS_BTC,
)
_REP = (0xF2, 0xF3)
_LOCK = 0xF0


Finish = Callable[[int], MmioAccess | None]
"""What `priv` of an MmioAccess holds: takes the data, ends the access and may give another."""


def read_register(vcpu: UnicornVcpu, reg: int) -> int:
    """A general register or part of one, by Capstone's number."""
    index, size, shift = REGISTERS[reg]
    return vcpu.env.reg(index) >> shift & ((1 << (8 * size)) - 1)


def write_register(vcpu: UnicornVcpu, reg: int, value: int) -> None:
    """Write it; a 32-bit register clears the upper half."""
    index, size, shift = REGISTERS[reg]
    mask = (1 << (8 * size)) - 1
    value &= mask
    if size < 4:
        value = vcpu.env.reg(index) & ~(mask << shift) | value << shift
    vcpu.env.set_reg(index, value)


def string_address(vcpu: UnicornVcpu, insn: Any, index: int, segment: int) -> int:
    """Where a string instruction's RSI or RDI points, segment base included."""
    address: int = vcpu.env.reg(index) & ((1 << (8 * insn.addr_size)) - 1)
    if not vcpu.long_code or segment in (R_FS, R_GS):
        address += vcpu.env.seg(segment)[1]
    return address & (_M64 if vcpu.long_code else 0xFFFFFFFF)


def source_segment(insn: Any) -> int:
    """The segment of a string instruction's source: DS or its override."""
    return {0x26: R_ES, 0x2E: 1, 0x36: 2, 0x64: R_FS, 0x65: R_GS}.get(insn.prefix[1], R_DS)


def advance_string(vcpu: UnicornVcpu, insn: Any, size: int, *indexes: int) -> None:
    """After one element: move the index registers, count RCX down, step RIP when it is done."""
    env = vcpu.env
    step = -size if env.eflags & _DF else size
    mask = (1 << (8 * insn.addr_size)) - 1

    def bump(index: int, by: int) -> int:
        value: int = (env.reg(index) + by) & mask
        env.set_reg(index, value if insn.addr_size >= 4 else env.reg(index) & ~mask | value)
        return value

    for index in indexes:
        bump(index, step)
    if insn.prefix[0] in _REP and bump(RCX, -1):
        return
    vcpu.skip(insn.size)


def _crossing(vcpu: UnicornVcpu, linear: int, size: int) -> tuple[tuple[int, int], ...] | None:
    """(gpa, length) of the two parts of an operand that crosses a page, () of another; None: unmapped."""
    first = 4096 - (linear & 0xFFF)
    if first >= size or vcpu.shadow:
        return ()
    low = vcpu.guest_physical(linear)
    high = vcpu.guest_physical((linear + first) & _M64)
    return None if low is None or high is None else ((low, first), (high, size - first))


def emulate(vcpu: UnicornVcpu, insn: Any, gpa: int) -> MmioAccess | None:
    """The first access of the instruction at RIP, whose memory operand is at `gpa`; None if it is unknown."""
    if insn is None:
        return None
    more = emulate_more(vcpu, insn) if vcpu.shadow else None
    if more is not None:
        return more
    if insn.id in _STOS or insn.id in _LODS or insn.id in _MOVS:
        return _string(vcpu, insn, gpa)
    memory = next((n for n, o in enumerate(insn.operands) if o.type == cx.X86_OP_MEM), None)
    if memory is None:
        return None
    size = insn.operands[memory].size
    if size not in (1, 2, 4, 8):
        return None
    linear = effective_address(vcpu.env, insn, insn.operands[memory], vcpu.long_code)
    parts = _crossing(vcpu, linear, size)
    access = None if parts is None else _plain(vcpu, insn, size, memory)
    if access is not None:
        access.parts = parts or ()
        if vcpu.shadow:
            access.gva = linear
            access.page_table = is_page_table_writing(insn)
    return access


def is_page_table_writing(insn: Any) -> bool:
    """x86_page_table_writing_insn: what KVM emulates at once where it meets a page table."""
    if insn.id in (cx.X86_INS_MOV, cx.X86_INS_MOVABS):
        return bool(insn.operands[0].type == cx.X86_OP_MEM)
    return insn.id in _PAGE_TABLE


def _plain(vcpu: UnicornVcpu, insn: Any, size: int, memory: int) -> MmioAccess | None:
    """Of an instruction that is not a string's, whose operand number `memory` has `size` bytes."""
    if insn.id in _LOADS:
        return _move(vcpu, insn, size, memory)
    if insn.id in _ONE_OPERAND:
        return _modify(vcpu, insn, size, 1)
    if insn.id in _TWO_OPERAND:
        other = insn.operands[1 - memory]
        immediate = other.type == cx.X86_OP_IMM
        b = other.imm & ((1 << (8 * size)) - 1) if immediate else read_register(vcpu, other.reg)
        if memory == 1 and insn.id not in (cx.X86_INS_CMP, cx.X86_INS_TEST):
            return _into_register(vcpu, insn, size, other.reg)
        return _modify(vcpu, insn, size, b, reverse=memory == 1)
    if insn.id in (cx.X86_INS_XCHG, cx.X86_INS_XADD, cx.X86_INS_CMPXCHG):
        return _exchange(vcpu, insn, size, insn.operands[1 - memory].reg)
    return None


def _store(
    vcpu: UnicornVcpu, insn: Any, size: int, data: int, then: Callable[[], None], old: int | None = None
) -> MmioAccess:
    """The last access of an instruction: a store, then registers and RIP. `old`: what its load found."""

    def finish(_: int) -> None:
        then()
        vcpu.skip(insn.size)

    locked = old is not None and (insn.prefix[0] == _LOCK or insn.id == cx.X86_INS_XCHG)
    return MmioAccess(True, size, data, lock=locked, old=old or 0, priv=finish)


def _move(vcpu: UnicornVcpu, insn: Any, size: int, memory: int) -> MmioAccess | None:
    other = insn.operands[1 - memory]
    if memory == 0:
        if other.type == cx.X86_OP_IMM:
            value = other.imm
        elif other.reg in REGISTERS:
            value = read_register(vcpu, other.reg)
        else:
            return None
        return _store(vcpu, insn, size, value & ((1 << (8 * size)) - 1), lambda: None)
    if other.reg not in REGISTERS:
        return None

    def finish(data: int) -> None:
        if insn.id in (cx.X86_INS_MOVSX, cx.X86_INS_MOVSXD) and data >> (8 * size - 1):
            data -= 1 << (8 * size)
        write_register(vcpu, other.reg, data)
        vcpu.skip(insn.size)

    return MmioAccess(False, size, 0, priv=finish)


def _modify(vcpu: UnicornVcpu, insn: Any, size: int, b: int, *, reverse: bool = False) -> MmioAccess:
    def finish(a: int) -> MmioAccess | None:
        x, y = (b, a) if reverse else (a, b)
        if insn.id == cx.X86_INS_NEG:
            x, y = 0, a
        result, rflags = alu(insn.id, size, x, y, vcpu.env.eflags)

        def then() -> None:
            vcpu.env.eflags = rflags

        if insn.id in (cx.X86_INS_CMP, cx.X86_INS_TEST):
            then()
            vcpu.skip(insn.size)
            return None
        return _store(vcpu, insn, size, result, then, a)

    return MmioAccess(False, size, 0, priv=finish)


def _into_register(vcpu: UnicornVcpu, insn: Any, size: int, reg: int) -> MmioAccess:
    def finish(data: int) -> None:
        result, vcpu.env.eflags = alu(insn.id, size, read_register(vcpu, reg), data, vcpu.env.eflags)
        write_register(vcpu, reg, result)
        vcpu.skip(insn.size)

    return MmioAccess(False, size, 0, priv=finish)


def _exchange(vcpu: UnicornVcpu, insn: Any, size: int, reg: int) -> MmioAccess:
    accumulator = {1: cx.X86_REG_AL, 2: cx.X86_REG_AX, 4: cx.X86_REG_EAX, 8: cx.X86_REG_RAX}[size]

    def finish(old: int) -> MmioAccess:
        value = read_register(vcpu, reg)
        if insn.id == cx.X86_INS_XCHG:
            return _store(vcpu, insn, size, value, lambda: write_register(vcpu, reg, old), old)
        if insn.id == cx.X86_INS_XADD:
            total, rflags = alu(insn.id, size, old, value, vcpu.env.eflags)

            def then() -> None:
                vcpu.env.eflags = rflags
                write_register(vcpu, reg, old)

            return _store(vcpu, insn, size, total, then, old)
        expected = read_register(vcpu, accumulator)
        _, rflags = alu(insn.id, size, expected, old, vcpu.env.eflags)

        def compared() -> None:
            vcpu.env.eflags = rflags
            if expected != old:
                write_register(vcpu, accumulator, old)

        return _store(vcpu, insn, size, value if expected == old else old, compared, old)

    return MmioAccess(False, size, 0, priv=finish)


def _at(vcpu: UnicornVcpu, linear: int) -> int:
    """The linear address of an access, where it must be told."""
    return linear if vcpu.shadow else -1


def _string(vcpu: UnicornVcpu, insn: Any, gpa: int) -> MmioAccess | None:
    size = insn.operands[0].size
    mask = (1 << (8 * size)) - 1
    if insn.id in _STOS:
        target = string_address(vcpu, insn, RDI, R_ES)
        parts = _crossing(vcpu, target, size)
        if parts is None:
            return None

        def stored(_: int) -> None:
            advance_string(vcpu, insn, size, RDI)

        data = vcpu.env.reg(RAX) & mask
        return MmioAccess(True, size, data, parts=parts, gva=_at(vcpu, target), priv=stored)
    if insn.id in _LODS:
        source = string_address(vcpu, insn, RSI, source_segment(insn))
        parts = _crossing(vcpu, source, size)
        if parts is None:
            return None

        def loaded(data: int) -> None:
            write_register(vcpu, insn.operands[0].reg, data)
            advance_string(vcpu, insn, size, RSI)

        return MmioAccess(False, size, 0, parts=parts, gva=_at(vcpu, source), priv=loaded)
    return _move_linear(vcpu, insn, size) if vcpu.shadow else _movs(vcpu, insn, gpa, size)


def _move_linear(vcpu: UnicornVcpu, insn: Any, size: int) -> MmioAccess:
    """MOVS where KVM makes both accesses."""
    source = string_address(vcpu, insn, RSI, source_segment(insn))
    target = string_address(vcpu, insn, RDI, R_ES)

    def moved(_: int) -> None:
        advance_string(vcpu, insn, size, RSI, RDI)

    def loaded(data: int) -> MmioAccess:
        return MmioAccess(True, size, data, gva=target, priv=moved)

    return MmioAccess(False, size, 0, gva=source, priv=loaded)


def _movs(vcpu: UnicornVcpu, insn: Any, gpa: int, size: int) -> MmioAccess | None:
    """One side is emulated, the other RAM, or both are: the source's page tells."""
    source = string_address(vcpu, insn, RSI, source_segment(insn))
    target = string_address(vcpu, insn, RDI, R_ES)
    from_parts, to_parts = (_crossing(vcpu, linear, size) for linear in (source, target))
    if from_parts is None or to_parts is None:
        return None

    def moved(_: int) -> None:
        advance_string(vcpu, insn, size, RSI, RDI)

    source_gpa = vcpu.guest_physical(source)
    if source_gpa is None or gpa not in (source_gpa, *(at for at, _ in from_parts)):
        data = int.from_bytes(vcpu.memory.read(source, size), "little")
        return MmioAccess(True, size, data, parts=to_parts, priv=moved)

    def loaded(data: int) -> None:
        def store() -> None:
            vcpu.memory.write(target, data.to_bytes(size, "little"))
            moved(0)

        vcpu.run_or_defer(store)

    return MmioAccess(False, size, 0, parts=from_parts, priv=loaded)
