"""Exits of instructions that change the guest's translations: control registers and INVLPG.

Source of truth: arch/x86/kvm/vmx/vmx.c (Linux 6.18): handle_cr, handle_set_cr0, handle_set_cr4,
handle_invlpg; x86.c: kvm_complete_insn_gp. They come without EPT only.

Not modelled: CR8, nested guests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.invalidate_addr import kvm_mmu_invlpg
from kvm_model.x86_cr import kvm_lmsw, kvm_set_cr0, kvm_set_cr3, kvm_set_cr4
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu
    from kvm_model.vmx.exits import VmExit

__all__ = ["TRACEPOINTS", "handle_cr", "handle_invlpg"]

_GP = 13
_GENERAL_REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))
)
_CS_L, _EFER_LMA = 1 << 21, 1 << 10
_SETTERS = {0: kvm_set_cr0, 3: kvm_set_cr3, 4: kvm_set_cr4}

KVM_CR = Tracepoint(
    "kvm", "kvm_cr", ("rw", "cr", "val"),
    lambda rw, cr, val: f"cr_{'write' if rw else 'read'} {cr:x} = 0x{val:x}",
)
TRACEPOINTS = (KVM_CR,)


def _trace(vcpu: Vcpu, write: int, cr: int, value: int) -> None:
    if (t := vcpu.kvm.trace.kvm_cr) is not None:
        t(write, cr, value)


def _mov_to_cr(vcpu: Vcpu, cr: int, reg: str, insn_len: int) -> int:
    cpu = vcpu.kvm.cpu
    value = cpu.get_reg(vcpu, reg)
    if not (cpu.get_reg(vcpu, "efer") & _EFER_LMA and cpu.get_reg(vcpu, "cs_flags") & _CS_L):
        value &= 0xFFFF_FFFF
    _trace(vcpu, 1, cr, value)
    if _SETTERS[cr](vcpu, value):
        cpu.skip_emulated_instruction(vcpu, insn_len)
    else:
        vcpu.queue_exception(_GP, 0)
    return 1


def handle_cr(vcpu: Vcpu, exit_: VmExit) -> int:
    """MOV to and from control registers, LMSW. CLTS never exits: the guest owns TS."""
    cpu = vcpu.kvm.cpu
    qualification = exit_.qualification
    cr, kind = qualification & 15, qualification >> 4 & 3
    reg = _GENERAL_REGISTERS[qualification >> 8 & 15]
    if kind == 0:
        return _mov_to_cr(vcpu, cr, reg, exit_.insn_len)
    if kind == 1:
        value = cpu.get_reg(vcpu, "cr3")
        cpu.set_reg(vcpu, reg, value)
        _trace(vcpu, 0, cr, value)
    else:
        msw = qualification >> 16 & 0xF
        _trace(vcpu, 1, 0, cpu.get_reg(vcpu, "cr0") & ~0xF | msw)
        kvm_lmsw(vcpu, msw)
    cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    return 1


def handle_invlpg(vcpu: Vcpu, exit_: VmExit) -> int:
    """INVLPG: the exit qualification is its address."""
    kvm_mmu_invlpg(vcpu, exit_.qualification)
    vcpu.kvm.cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    return 1
