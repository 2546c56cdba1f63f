"""Instructions that leave a guest whose tables KVM shadows: control registers and INVLPG.

Under EPT the CPU carries them out by itself (control.py). Here each MOV to or from CR3 and each INVLPG
exits, and a write of CR0 or CR4 that would change a bit of KVM's; the rest stays private.

Source: Intel SDM vol. 3C 26.1.3 (instructions that cause VM exits conditionally), table 28-3 (exit
qualification for control-register accesses), 26.3 (changes to instruction behaviour: guest/host masks);
arch/x86/kvm/vmx/vmx.c: vmx_set_cr0 and set_cr4_guest_host_mask, without enable_ept.

Not modelled: CR8, CR3-target values.
"""

from __future__ import annotations

from typing import Any

from capstone import x86_const as cx

from emu.cpu.control import lmsw_operand
from emu.cpu.insn import REGISTERS, effective_address
from emu.cpu.mmio import read_register
from emu.cpu.vcpu import UnicornVcpu
from kvm_model.vmx.exits import REASON_CR_ACCESS, REASON_INVLPG, VmExit
from kvm_model.x86_cr import CR0_GUEST_OWNED, CR4_GUEST_OWNED

__all__ = ["cr3_exit", "cr_write_exit", "invlpg_exit"]

_TYPE_MOV_FROM = 1 << 4
_TYPE_LMSW = 3 << 4
_LMSW_MEMORY = 1 << 6


def _exit(vcpu: UnicornVcpu, insn: Any, qualification: int) -> VmExit:
    return VmExit(REASON_CR_ACCESS, vcpu.env.eip, qualification=qualification, insn_len=insn.size)


def cr3_exit(vcpu: UnicornVcpu, insn: Any, *, read: bool) -> VmExit:
    """The exit of MOV to or from CR3."""
    register = REGISTERS[insn.operands[0 if read else 1].reg][0]
    return _exit(vcpu, insn, 3 | (_TYPE_MOV_FROM if read else 0) | register << 8)


def cr_write_exit(vcpu: UnicornVcpu, insn: Any, number: int) -> VmExit | None:
    """The exit of a write of CR0 or CR4; None where it leaves KVM's bits alone."""
    old = vcpu.env.cr(number)
    if insn.id == cx.X86_INS_CLTS:
        return None
    if insn.id == cx.X86_INS_LMSW:
        value = lmsw_operand(vcpu, insn) & 0xF
        # PE is set and never cleared.
        changed = (value & ~old & 1) | ((value ^ old) & 0xE)
        if not changed & ~CR0_GUEST_OWNED:
            return None
        memory = insn.operands[0].type == cx.X86_OP_MEM
        return _exit(vcpu, insn, _TYPE_LMSW | (_LMSW_MEMORY if memory else 0) | value << 16)
    reg = insn.operands[1].reg
    if not (read_register(vcpu, reg) ^ old) & ~(CR4_GUEST_OWNED if number else CR0_GUEST_OWNED):
        return None
    return _exit(vcpu, insn, number | REGISTERS[reg][0] << 8)


def invlpg_exit(vcpu: UnicornVcpu, insn: Any) -> VmExit:
    """The exit of INVLPG: its qualification is the linear address."""
    address = effective_address(vcpu.env, insn, insn.operands[0], vcpu.long_code)
    return VmExit(REASON_INVLPG, vcpu.env.eip, qualification=address, insn_len=insn.size)
