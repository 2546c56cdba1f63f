"""What a stop of Unicorn means that is no refused fill: an exception, a private instruction, or an exit.

Exceptions are delivered to the guest without an exit. RDTSC, INVLPG, MOV to CR0 and CR4, SYSCALL and
the pass-through MSRs are the CPU's own under EPT, and carried out here.

Source: Intel SDM vol. 3C 26.1.2, 26.1.3 (instructions that exit); arch/x86/kvm/vmx/vmx.c:
vmx_exec_control, vmx_possible_passthrough_msrs.

Not modelled: debug exceptions of hardware breakpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emu.cpu import msr
from emu.cpu.control import syscall, sysenter, write_control_register
from emu.cpu.cr_exits import cr3_exit, cr_write_exit, invlpg_exit
from emu.cpu.events import ERROR_CODE_VECTORS, deliver, exception_info, software_info
from emu.cpu.intercept import (
    EXCEPTION_LIMIT,
    STOP_CPUID,
    STOP_HLT,
    STOP_IN,
    STOP_INTR,
    STOP_INVLPG,
    STOP_MSR,
    STOP_OUT,
    STOP_RDPMC,
    STOP_RDTSC,
    STOP_READ_CR3,
    STOP_SYSCALL,
    STOP_SYSENTER,
    STOP_WRITE_CR0,
    STOP_WRITE_CR3,
    STOP_WRITE_CR4,
)
from emu.cpu.memory import VECTOR_GP, GuestFault
from emu.cpu.portio import StringElement, io_exit
from kvm_model.vmx.exits import (
    REASON_CPUID,
    REASON_EXCEPTION_NMI,
    REASON_HLT,
    REASON_INTERRUPT_WINDOW,
    REASON_MSR_READ,
    REASON_MSR_WRITE,
    REASON_VMCALL,
    VmExit,
)

if TYPE_CHECKING:
    from emu.cpu.faults import FillFailures
    from emu.cpu.vcpu import UnicornVcpu
    from host_mm.kernel.sched import Scheduler

__all__ = ["COST_RDTSC", "Stops"]

COST_RDTSC = 400
"""ns: enough that a guest's delay loop does not take millions of turns."""

_RAX, _RCX, _RDX = 0, 1, 2
_VECTOR_UD = 6
_ONE_BYTE_INT = {3: b"\xcc", 4: b"\xce"}
_VMCALL = b"\x0f\x01\xc1"
_RSM = b"\x0f\xaa"
_M32, _M64 = (1 << 32) - 1, (1 << 64) - 1


class Stops:
    """Answers the stops of all vCPUs of one machine.

    `elements`: the outstanding element of a string port instruction, by vCPU. Without `ept` KVM must see
    what changes the guest's translations.
    """

    def __init__(self, sched: Scheduler, fills: FillFailures, *, ept: bool) -> None:
        self.sched = sched
        self.fills = fills
        self.ept = ept
        self.elements: dict[int, StringElement] = {}
        self.tsc_offset: dict[int, int] = {}
        self._private: dict[int, Callable[[UnicornVcpu], VmExit | None]] = {
            STOP_RDTSC: self._rdtsc,
            STOP_INVLPG: self._invlpg,
            STOP_RDPMC: self._rdpmc,
            STOP_MSR: self._msr,
            STOP_WRITE_CR0: lambda v: self._write_cr(v, 0),
            STOP_WRITE_CR4: lambda v: self._write_cr(v, 4),
            STOP_WRITE_CR3: self._write_cr3,
            STOP_READ_CR3: lambda v: cr3_exit(v, self._decode(v), read=True),
            STOP_SYSCALL: syscall,
            STOP_SYSENTER: sysenter,
            STOP_IN: lambda v: self._port(v, STOP_IN),
            STOP_OUT: lambda v: self._port(v, STOP_OUT),
            STOP_CPUID: lambda v: VmExit(REASON_CPUID, v.env.eip, insn_len=2),
            STOP_HLT: lambda v: VmExit(REASON_HLT, v.env.eip, insn_len=1),
            STOP_INTR: lambda v: VmExit(REASON_INTERRUPT_WINDOW, v.env.eip),
        }

    def handle(self, v: UnicornVcpu, reason: int) -> VmExit | None:
        """What `Intercepts.stop_reason` said: None if the guest can go on, else its exit. GuestFault."""
        if 0 <= reason < EXCEPTION_LIMIT:
            return self.exception(v, reason)
        private = self._private.get(reason)
        if private is None:
            raise RuntimeError(f"Unicorn stopped for an unknown reason {reason:#x} at rip {v.env.eip:#x}")
        return private(v)

    def exception(self, v: UnicornVcpu, vector: int) -> VmExit | None:
        """Deliver an exception or INT n."""
        env = v.env
        if env.exception_is_int:
            # Unicorn stands behind INT n; the architecture reports the instruction
            before = v.memory.fetch((env.eip - 1) & _M64, 1)
            one_byte = before == _ONE_BYTE_INT.get(vector)
            length = 1 if one_byte else 2
            env.eip = (env.eip - length) & _M64
            return deliver(v, software_info(vector, one_byte), 0, length)
        has_code = vector in ERROR_CODE_VECTORS
        return deliver(v, exception_info(vector, has_code), env.error_code if has_code else 0, 0)

    def undefined(self, v: UnicornVcpu) -> VmExit | None:
        """An instruction Unicorn does not know: VMCALL, or #UD."""
        code = v.memory.fetch(v.linear_rip, 3)
        if code == _VMCALL:
            return VmExit(REASON_VMCALL, v.env.eip, insn_len=3)
        if code.startswith(_RSM):
            # Invalid outside SMM, and in a guest always: KVM intercepts it.
            info = exception_info(_VECTOR_UD, False)
            return VmExit(REASON_EXCEPTION_NMI, v.env.eip, intr_info=info)
        raise GuestFault(_VECTOR_UD)

    def _decode(self, v: UnicornVcpu) -> Any:
        insn = self.fills.decode(v)
        if insn is None:
            # The guest's tables may have changed under a translation that its TLB still holds: a CPU
            # may evict that at any time, so the fetch is made again. What comes then is no instruction.
            v.memory.fetch(v.env.eip, 1)
            raise GuestFault(_VECTOR_UD)
        return insn

    def tsc(self, v: UnicornVcpu) -> int:
        """The time-stamp counter: one tick a nanosecond of logical time."""
        return (self.sched.now + self.tsc_offset.get(v.vcpu_id, 0)) & _M64

    def _rdtsc(self, v: UnicornVcpu) -> None:
        insn = self._decode(v)
        self.sched.advance(COST_RDTSC)
        tsc = self.tsc(v)
        v.env.set_reg(_RAX, tsc & _M32)
        v.env.set_reg(_RDX, tsc >> 32)
        if insn.mnemonic == "rdtscp":
            v.env.set_reg(_RCX, msr.read_msr(v, 0xC0000103, 0) or 0)
        v.skip(insn.size)

    def _invlpg(self, v: UnicornVcpu) -> VmExit | None:
        insn = self._decode(v)
        if not self.ept:
            return invlpg_exit(v, insn)
        # the page may have been a large one, of which Unicorn holds many pieces: everything goes
        v.intercepts.flush_tlb()
        v.skip(insn.size)
        return None

    def _rdpmc(self, v: UnicornVcpu) -> None:
        raise GuestFault(VECTOR_GP, 0)

    def _write_cr(self, v: UnicornVcpu, number: int) -> VmExit | None:
        insn = self._decode(v)
        vmexit = None if self.ept else cr_write_exit(v, insn, number)
        if vmexit is None:
            write_control_register(v, insn, number)
        return vmexit

    def _write_cr3(self, v: UnicornVcpu) -> VmExit | None:
        insn = self._decode(v)
        if not self.ept:
            return cr3_exit(v, insn, read=False)
        write_control_register(v, insn, 3)
        return None

    def _msr(self, v: UnicornVcpu) -> VmExit | None:
        index = v.env.reg(_RCX) & _M32
        write = v.env.error_code & 1
        if index not in msr.PASSTHROUGH or (write and index == msr.MSR_TSC):
            return VmExit(REASON_MSR_WRITE if write else REASON_MSR_READ, v.env.eip, insn_len=2)
        if write:
            value = v.env.reg(_RAX) & _M32 | (v.env.reg(_RDX) & _M32) << 32
            if not msr.write_msr(v, index, value):
                raise GuestFault(VECTOR_GP, 0)
        else:
            found = msr.read_msr(v, index, self.tsc(v)) or 0
            v.env.set_reg(_RAX, found & _M32)
            v.env.set_reg(_RDX, found >> 32)
        v.skip(2)
        return None

    def _port(self, v: UnicornVcpu, stop: int) -> VmExit:
        words = v.intercepts.io[stop]
        vmexit, element = io_exit(v, self._decode(v), stop == STOP_IN, words[4] & 0xFFFF, words[5])
        if element is not None:
            self.elements[v.vcpu_id] = element
        return vmexit
