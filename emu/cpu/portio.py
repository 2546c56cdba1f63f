"""IN, OUT, INS and OUTS: the permission check, and strings one element at a time.

A string instruction leaves the guest once per element, and to KVM each element looks like a plain IN
or OUT: while one is outstanding, RAX as KVM reads and writes it is the element. So KVM needs no
emulator for them, and an interrupt may come between two elements, as on hardware.

Source: Intel SDM vol. 1 chapter 19 (I/O protection), vol. 2 IN, OUT, INS, OUTS; vol. 3C table 28-5
(exit qualification for I/O).

Not modelled: string and REP bits of the qualification (see above), ports beyond a TSS limit in
virtual-8086 mode.
"""

from __future__ import annotations

from typing import Any

import msgspec

from emu.cpu.env import R_ES, TR
from emu.cpu.memory import VECTOR_GP, GuestFault
from emu.cpu.mmio import advance_string, source_segment, string_address
from emu.cpu.paging import CR0_PE
from emu.cpu.vcpu import UnicornVcpu
from kvm_model.vmx.exits import REASON_IO_INSTRUCTION, VmExit

__all__ = ["StringElement", "finish_element", "io_exit"]

RSI, RDI = 6, 7
_STRING_OPCODES = (0x6C, 0x6D, 0x6E, 0x6F)
_IMMEDIATE_OPCODES = (0xE4, 0xE5, 0xE6, 0xE7)


class StringElement(msgspec.Struct):
    """The outstanding element of INS or OUTS; `data` stands for RAX."""

    insn: Any
    size: int
    is_in: bool
    data: int


def _check_permission(vcpu: UnicornVcpu, port: int, size: int) -> None:
    env = vcpu.env
    if not env.cr(0) & CR0_PE or env.cpl <= env.eflags >> 12 & 3:
        return
    _, base, limit, flags = env.table(TR)
    # a 32-bit or 64-bit TSS, available or busy, with an I/O map base
    if not flags >> 15 & 1 or flags >> 8 & 0xD != 9 or limit < 103:
        raise GuestFault(VECTOR_GP, 0)
    offset = int.from_bytes(vcpu.memory.read_system(base + 0x66, 2), "little") + port // 8
    if offset + 1 > limit:
        raise GuestFault(VECTOR_GP, 0)
    bits = int.from_bytes(vcpu.memory.read_system(base + offset, 2), "little") >> (port & 7)
    if bits & ((1 << size) - 1):
        raise GuestFault(VECTOR_GP, 0)


def io_exit(
    vcpu: UnicornVcpu, insn: Any, is_in: bool, port: int, size: int
) -> tuple[VmExit, StringElement | None]:
    """The VM exit of the port instruction at RIP. Raises GuestFault where it may not touch the port."""
    _check_permission(vcpu, port, size)
    opcode = insn.opcode[0]
    element = None
    if opcode in _STRING_OPCODES:
        data = 0
        if not is_in:
            address = string_address(vcpu, insn, RSI, source_segment(insn))
            data = int.from_bytes(vcpu.memory.read(address, size), "little")
        element = StringElement(insn, size, is_in, data)
    qualification = size - 1 | is_in << 3 | (opcode in _IMMEDIATE_OPCODES) << 6 | port << 16
    vmexit = VmExit(
        reason=REASON_IO_INSTRUCTION, rip=vcpu.env.eip, qualification=qualification, insn_len=insn.size
    )
    return vmexit, element


def finish_element(vcpu: UnicornVcpu, element: StringElement) -> None:
    """KVM served it: store what came in, move the index registers, step RIP after the last."""
    if not element.is_in:
        advance_string(vcpu, element.insn, element.size, RSI)
        return
    data = (element.data & ((1 << (8 * element.size)) - 1)).to_bytes(element.size, "little")

    def store() -> None:
        vcpu.memory.write(string_address(vcpu, element.insn, RDI, R_ES), data)
        advance_string(vcpu, element.insn, element.size, RDI)

    vcpu.run_or_defer(store)
