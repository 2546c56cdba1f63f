"""Delivery of interrupts and exceptions through the guest's IDT.

Every read of the IDT, GDT, LDT and TSS and every push goes through the hardware walk: it may fault,
which is judged by the double-fault rules, or leave the guest for KVM with IDT-vectoring
information, after which KVM injects the same event again; a #PF that KVM intercepts leaves before it could
make a double fault. Nothing of the guest changes before all of the frame's addresses were translated.

Source: Intel SDM vol. 3A 6.12 to 6.15 (handling in protected and 64-bit mode, IST, error codes),
table 6-5 (double-fault conditions), vol. 2A INT n (operation), vol. 3C 26.8.3 (event injection),
28.2.4 (IDT-vectoring information).

    64-bit gate   offset 15:0 | selector | IST 2:0 | P DPL 0 type | offset 31:16 | offset 63:32
    frame         SS RSP RFLAGS CS RIP [error code], RSP aligned down to 16

Not modelled: task gates, real-mode and virtual-8086 delivery (they end as a triple fault), shadow
stacks, FRED.
"""

from __future__ import annotations

from emu.cpu.env import CR, GDT, HF_LMA, IDT, LDT, R_CS, R_SS, TR
from emu.cpu.memory import VECTOR_GP, VECTOR_PF, VECTOR_SS, GuestFault, MemoryExit
from emu.cpu.paging import CR0_PE, is_canonical
from emu.cpu.segments import (
    DESC_CODE,
    DESC_CONFORMING,
    DESC_DB,
    DESC_L,
    DESC_P,
    DESC_S,
    descriptor_base,
    descriptor_dpl,
    descriptor_limit,
    load_seg_cache,
)
from emu.cpu.vcpu import UnicornVcpu
from kvm_model.vmx.exits import (
    INTR_INFO_DELIVER_CODE,
    INTR_INFO_VALID,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_SOFT_EXCEPTION,
    INTR_TYPE_SOFT_INTR,
    REASON_EXCEPTION_NMI,
    REASON_TRIPLE_FAULT,
    VmExit,
)

__all__ = [
    "ERROR_CODE_VECTORS", "deliver", "exception_info", "is_hardware_exception", "memory_vmexit",
    "software_info",
]

VECTOR_DB, VECTOR_BP, VECTOR_OF, VECTOR_DF, VECTOR_TS, VECTOR_NP = 1, 3, 4, 8, 10, 11
ERROR_CODE_VECTORS = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))

_TYPE_MASK = 7 << 8
_SOFT = (INTR_TYPE_SOFT_INTR, INTR_TYPE_SOFT_EXCEPTION)
_TF, _IF, _NT, _RF, _VM = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17
_EXT, _IN_IDT = 1, 2
_M64 = (1 << 64) - 1


def exception_info(vector: int, has_error_code: bool) -> int:
    """VM-entry interruption information of a hardware exception."""
    code = INTR_INFO_DELIVER_CODE if has_error_code else 0
    return vector | INTR_TYPE_HARD_EXCEPTION | code | INTR_INFO_VALID


def is_hardware_exception(info: int) -> bool:
    """Whether VM-entry interruption information is valid and that of a hardware exception."""
    return info & (INTR_INFO_VALID | _TYPE_MASK) == INTR_INFO_VALID | INTR_TYPE_HARD_EXCEPTION


def software_info(vector: int, one_byte: bool) -> int:
    """The same of INT n, or of INT3 and INTO in their one-byte forms."""
    return vector | (INTR_TYPE_SOFT_EXCEPTION if one_byte else INTR_TYPE_SOFT_INTR) | INTR_INFO_VALID


def memory_vmexit(vcpu: UnicornVcpu, exit_: MemoryExit) -> VmExit:
    """The VM exit of an access that a table of KVM's refused or that the full log held up."""
    if exit_.reason == REASON_EXCEPTION_NMI:
        return VmExit(
            reason=exit_.reason,
            rip=vcpu.env.eip,
            qualification=exit_.gva,
            intr_info=exception_info(VECTOR_PF, True),
            error_code=exit_.error_code,
        )
    return VmExit(
        reason=exit_.reason,
        rip=vcpu.env.eip,
        qualification=exit_.qualification,
        guest_linear=exit_.gva,
        guest_physical=exit_.gpa,
    )


def deliver(
    vcpu: UnicornVcpu, info: int, error_code: int, insn_len: int, cr2: int | None = None
) -> VmExit | None:
    """Deliver an event in VM-entry format; a VmExit if that leaves the guest. RIP stands at the
    instruction, also for INT n, whose `insn_len` is added to what is pushed."""
    while True:
        try:
            if cr2 is not None:
                vcpu.env.q[CR // 8 + 2] = cr2
            _deliver_one(vcpu, info, error_code, insn_len)
            return None
        except MemoryExit as exit_:
            vmexit = memory_vmexit(vcpu, exit_)
            vmexit.idt_vectoring_info = info
            vmexit.idt_vectoring_error = error_code if info & INTR_INFO_DELIVER_CODE else 0
            vmexit.insn_len = insn_len
            return vmexit
        except GuestFault as fault:
            second = _escalate(info, fault)
            if second is None:
                return VmExit(reason=REASON_TRIPLE_FAULT, rip=vcpu.env.eip)
            info = exception_info(second.vector, second.error_code is not None)
            error_code, insn_len, cr2 = second.error_code or 0, 0, second.cr2


def _escalate(info: int, fault: GuestFault) -> GuestFault | None:
    """What a fault during delivery of `info` becomes: itself, a double fault, or None: shutdown."""
    first = info & 0xFF
    if info & _TYPE_MASK != INTR_TYPE_HARD_EXCEPTION:
        return fault
    contributory = fault.vector in _CONTRIBUTORY
    if first == VECTOR_DF:
        return None if contributory or fault.vector == VECTOR_PF else fault
    if (first in _CONTRIBUTORY and contributory) or (
        first == VECTOR_PF and (contributory or fault.vector == VECTOR_PF)
    ):
        # CR2 keeps the second page fault's address: the CPU wrote it before it looked
        return GuestFault(VECTOR_DF, 0, fault.cr2)
    return fault


def _deliver_one(vcpu: UnicornVcpu, info: int, error_code: int, insn_len: int) -> None:
    vector = info & 0xFF
    kind = info & _TYPE_MASK
    soft = kind in _SOFT
    ext = 0 if soft else _EXT
    saved_flags = vcpu.env.eflags
    if kind == INTR_TYPE_HARD_EXCEPTION and vector != VECTOR_DB:
        saved_flags |= _RF
    saved_rip = vcpu.env.eip + insn_len if soft else vcpu.env.eip
    code = error_code if info & INTR_INFO_DELIVER_CODE else None
    if vcpu.env.hflags & HF_LMA:
        _long_mode(vcpu, vector, soft, ext, saved_rip & _M64, saved_flags, code)
    elif vcpu.env.cr(0) & CR0_PE and not vcpu.env.eflags & _VM:
        _protected_mode(vcpu, vector, soft, ext, saved_rip & 0xFFFFFFFF, saved_flags, code)
    else:
        raise GuestFault(VECTOR_DF, 0)


def _word(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _gate(vcpu: UnicornVcpu, vector: int, size: int, soft: bool, ext: int, types: tuple[int, ...]) -> int:
    """The IDT entry, checked: limit, type, DPL for software interrupts, present."""
    _, base, limit, _ = vcpu.env.table(IDT)
    error = vector * 8 | _IN_IDT | ext
    if vector * size + size - 1 > limit:
        raise GuestFault(VECTOR_GP, error)
    gate = _word(vcpu.memory.read_system((base + vector * size) & _M64, size))
    if gate >> 40 & 0x1F not in types:
        raise GuestFault(VECTOR_GP, error)
    if soft and gate >> 45 & 3 < vcpu.env.cpl:
        raise GuestFault(VECTOR_GP, error)
    if not gate >> 47 & 1:
        raise GuestFault(VECTOR_NP, error)
    return gate


def _descriptor(vcpu: UnicornVcpu, selector: int, fault: int, ext: int) -> int:
    """A segment descriptor from the GDT or LDT."""
    _, base, limit, _ = vcpu.env.table(LDT if selector & 4 else GDT)
    if (selector | 7) > limit:
        raise GuestFault(fault, selector & ~3 | ext)
    return _word(vcpu.memory.read_system((base + (selector & ~7)) & _M64, 8))


def _code_segment(vcpu: UnicornVcpu, selector: int, ext: int) -> tuple[int, int]:
    """(descriptor, new CPL) of a gate's target."""
    if not selector & ~3:
        raise GuestFault(VECTOR_GP, ext)
    error = selector & ~3 | ext
    descriptor = _descriptor(vcpu, selector, VECTOR_GP, ext)
    flags = descriptor >> 32
    cpl = vcpu.env.cpl
    dpl = descriptor_dpl(flags)
    if flags & (DESC_S | DESC_CODE) != DESC_S | DESC_CODE or dpl > cpl:
        raise GuestFault(VECTOR_GP, error)
    if not flags & DESC_P:
        raise GuestFault(VECTOR_NP, error)
    return descriptor, cpl if flags & DESC_CONFORMING else dpl


def _enter(vcpu: UnicornVcpu, selector: int, descriptor: int, cpl: int, entry: int, trap_gate: bool) -> None:
    """Load CS, RIP and the flags of the handler."""
    env = vcpu.env
    # the accessed bit of the descriptor: hidden state only, the table's own bit is left as it is
    flags = descriptor >> 32 & 0xFFFFFFFF | 0x100
    load_seg_cache(
        env, R_CS, selector & ~3 | cpl, descriptor_base(descriptor), descriptor_limit(descriptor), flags
    )
    env.eip = entry
    env.eflags &= ~(_TF | _NT | _RF | _VM) if trap_gate else ~(_TF | _NT | _RF | _VM | _IF)
    vcpu.end_shadow()


def _long_mode(
    vcpu: UnicornVcpu, vector: int, soft: bool, ext: int, rip: int, rflags: int, error_code: int | None
) -> None:
    env = vcpu.env
    gate = _gate(vcpu, vector, 16, soft, ext, (0x0E, 0x0F))
    selector = gate >> 16 & 0xFFFF
    entry = gate & 0xFFFF | gate >> 32 & 0xFFFF0000 | gate >> 32 & 0xFFFFFFFF_00000000
    ist = gate >> 32 & 7
    descriptor, new_cpl = _code_segment(vcpu, selector, ext)
    if descriptor >> 32 & (DESC_L | DESC_DB) != DESC_L:
        raise GuestFault(VECTOR_GP, selector & ~3 | ext)
    inner = new_cpl < env.cpl
    rsp = env.reg(4)
    stack = rsp
    if ist or inner:
        stack = _tss_stack64(vcpu, 0x24 + 8 * (ist - 1) if ist else 4 + 8 * new_cpl, ext)
    if not is_canonical(entry, vcpu.env.cr(4)):
        raise GuestFault(VECTOR_GP, ext)
    frame = [env.seg(R_SS)[0], rsp, rflags, env.seg(R_CS)[0], rip]
    if error_code is not None:
        frame.append(error_code)
    stack = ((stack & ~15) - 8 * len(frame)) & _M64
    data = b"".join(value.to_bytes(8, "little") for value in reversed(frame))
    _push(vcpu, stack, data, ext if inner or ist else 0)
    if inner:
        load_seg_cache(env, R_SS, new_cpl, 0, 0, new_cpl << 13)
    env.set_reg(4, stack)
    _enter(vcpu, selector, descriptor, new_cpl, entry, bool(gate >> 40 & 1))


def _push(vcpu: UnicornVcpu, stack: int, data: bytes, ext: int) -> None:
    try:
        vcpu.memory.write_system(stack, data, stack=True)
    except GuestFault as fault:
        if fault.vector == VECTOR_SS:
            raise GuestFault(VECTOR_SS, ext) from None
        raise


def _tss_stack64(vcpu: UnicornVcpu, offset: int, ext: int) -> int:
    selector, base, limit, _ = vcpu.env.table(TR)
    if offset + 7 > limit:
        raise GuestFault(VECTOR_TS, selector & ~3 | ext)
    return _word(vcpu.memory.read_system((base + offset) & _M64, 8))


def _protected_mode(
    vcpu: UnicornVcpu, vector: int, soft: bool, ext: int, eip: int, eflags: int, error_code: int | None
) -> None:
    """32-bit interrupt and trap gates."""
    env = vcpu.env
    gate = _gate(vcpu, vector, 8, soft, ext, (0x0E, 0x0F))
    selector = gate >> 16 & 0xFFFF
    entry = gate & 0xFFFF | gate >> 32 & 0xFFFF0000
    descriptor, new_cpl = _code_segment(vcpu, selector, ext)
    esp, ss = env.reg(4) & 0xFFFFFFFF, env.seg(R_SS)
    frame = [eflags & 0xFFFFFFFF, env.seg(R_CS)[0], eip]
    new_ss = None
    stack, stack_base = esp, ss[1]
    if new_cpl < env.cpl:
        stack, new_ss_selector, new_ss = _tss_stack32(vcpu, new_cpl, ext)
        stack_base = descriptor_base(new_ss)
        frame = [ss[0], esp, *frame]
    if error_code is not None:
        frame.append(error_code)
    stack = (stack - 4 * len(frame)) & 0xFFFFFFFF
    data = b"".join(value.to_bytes(4, "little") for value in reversed(frame))
    _push(vcpu, (stack_base + stack) & 0xFFFFFFFF, data, ext)
    if new_ss is not None:
        load_seg_cache(
            env, R_SS, new_ss_selector, descriptor_base(new_ss), descriptor_limit(new_ss),
            new_ss >> 32 & 0xFFFFFFFF | 0x100,
        )
    env.set_reg(4, stack)
    _enter(vcpu, selector, descriptor, new_cpl, entry, bool(gate >> 40 & 1))


def _tss_stack32(vcpu: UnicornVcpu, cpl: int, ext: int) -> tuple[int, int, int]:
    """(ESP, SS, SS's descriptor) of an inner privilege level from a 32-bit TSS."""
    selector, base, limit, _ = vcpu.env.table(TR)
    if 4 + 8 * cpl + 5 > limit:
        raise GuestFault(VECTOR_TS, selector & ~3 | ext)
    data = vcpu.memory.read_system((base + 4 + 8 * cpl) & 0xFFFFFFFF, 6)
    esp, ss = _word(data[:4]), _word(data[4:])
    if not ss & ~3 or ss & 3 != cpl:
        raise GuestFault(VECTOR_TS, ss & ~3 | ext)
    descriptor = _descriptor(vcpu, ss, VECTOR_TS, ext)
    flags = descriptor >> 32
    if descriptor_dpl(flags) != cpl or flags & (DESC_S | DESC_CODE) != DESC_S or not flags & 0x200:
        raise GuestFault(VECTOR_TS, ss & ~3 | ext)
    if not flags & DESC_P:
        raise GuestFault(VECTOR_SS, ss & ~3 | ext)
    return esp, ss, descriptor
