"""VM-exit handlers: what each exit reason makes KVM do.

Source of truth: arch/x86/kvm/vmx/vmx.c (Linux 6.18): kvm_vmx_exit_handlers, handle_ept_violation,
handle_ept_misconfig, handle_exception_nmi, handle_io, handle_interrupt_window; vmx/common.h:
__vmx_handle_ept_violation; mmu/mmu.c: kvm_handle_page_fault; x86.c: kvm_emulate_halt, kvm_emulate_cpuid,
kvm_fast_pio.

A handler returns above 0 to enter the guest again, 0 for user space, or a negative errno.

Without EPT the guest's page faults exit, and so do its changes of control registers and INVLPG.

Not modelled: string port I/O, KVM's own hypercalls (every VMCALL goes to user space), CR intercepts under
EPT, intercepts of exceptions other than #PF, of NMIs, and of CR8; handle_ept_misconfig's endless re-entry
when an event is delivered through a known MMIO page (it stops, as through any other).
"""

from __future__ import annotations

from host_mm.kernel.costs import COST_FAULT
from kvm_model.mmu.mmu import kvm_mmu_page_fault
from kvm_model.mmu.mmu_internal import (
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
    RET_PF_RETRY,
    RET_PF_WRITE_PROTECTED,
)
from kvm_model.pv_async_pf import kvm_pv_cpuid
from kvm_model.requests import KVM_REQ_EVENT, kvm_make_request
from kvm_model.smm import emulator_leave_smm
from kvm_model.vcpu import KVM_MP_STATE_HALTED, UserExit, Vcpu
from kvm_model.vmx import cr, pml
from kvm_model.vmx.apic_access import handle_apic_access, handle_apic_write
from kvm_model.vmx.exits import (
    EPT_ACC_EXEC,
    EPT_ACC_READ,
    EPT_ACC_WRITE,
    EPT_ENTRY_EXEC,
    EPT_ENTRY_READ,
    EPT_ENTRY_WRITE,
    EPT_GVA_TRANSLATED,
    EPT_GVA_VALID,
    INTR_INFO_VALID,
    REASON_APIC_ACCESS,
    REASON_APIC_WRITE,
    REASON_CPUID,
    REASON_CR_ACCESS,
    REASON_EPT_MISCONFIG,
    REASON_EPT_VIOLATION,
    REASON_EXCEPTION_NMI,
    REASON_EXTERNAL_INTERRUPT,
    REASON_HLT,
    REASON_INTERRUPT_WINDOW,
    REASON_INVLPG,
    REASON_IO_INSTRUCTION,
    REASON_MSR_READ,
    REASON_MSR_WRITE,
    REASON_PML_FULL,
    REASON_TRIPLE_FAULT,
    REASON_VMCALL,
    VmExit,
)
from kvm_model.x86_emulate import internal_error, x86_emulate_instruction
from kvm_model.x86_msr import handle_rdmsr, handle_wrmsr
from trace_events.tracepoint import Tracepoint

__all__ = ["TRACEPOINTS", "vmx_handle_exit"]

_EPT_PROT_MASK = EPT_ENTRY_READ | EPT_ENTRY_WRITE | EPT_ENTRY_EXEC
_VECTORING_OK = frozenset((REASON_EXCEPTION_NMI, REASON_EPT_VIOLATION, REASON_EPT_MISCONFIG, REASON_PML_FULL))
_CPUID_1_EDX_APIC = 1 << 9
_UD = 6
_MASK64 = (1 << 64) - 1
_PF = 14

KVM_PAGE_FAULT = Tracepoint(
    "kvm", "kvm_page_fault", ("vcpu_id", "guest_rip", "fault_address", "error_code"),
    lambda vcpu_id, rip, address, error_code:
        f"vcpu {vcpu_id} rip 0x{rip:x} address 0x{address:016x} error_code 0x{error_code:x}",
    scope=True,
    doc="An EPT violation, error_code the exit qualification; without EPT a #PF at a linear address.",
)
KVM_PIO = Tracepoint(
    "kvm", "kvm_pio", ("rw", "port", "size", "count", "val"),
    lambda rw, port, size, count, val:
        f"pio_{'write' if rw else 'read'} at {port:#x} size {size} count {count} val {val:#x} "
        f"{'(...)' if count > 1 else ''}",
)
KVM_HYPERCALL = Tracepoint(
    "kvm", "kvm_hypercall", ("nr", "a0", "a1", "a2", "a3"),
    lambda nr, a0, a1, a2, a3: f"nr 0x{nr:x} a0 0x{a0:x} a1 0x{a1:x} a2 0x{a2:x} a3 0x{a3:x}",
)
KVM_CPUID = Tracepoint(
    "kvm", "kvm_cpuid", ("function", "index", "rax", "rbx", "rcx", "rdx", "found", "used_max_basic"),
    lambda function, index, rax, rbx, rcx, rdx, found, used:
        f"func {function:x} idx {index:x} rax {rax:x} rbx {rbx:x} rcx {rcx:x} rdx {rdx:x}, "
        f"cpuid entry {'found' if found else 'not found'}{', used max basic' if used else ''}",
)
TRACEPOINTS = (
    *cr.TRACEPOINTS, KVM_PAGE_FAULT, *pml.TRACEPOINTS, KVM_PIO, KVM_HYPERCALL, KVM_CPUID,
)


def vmx_handle_exit(vcpu: Vcpu, exit_: VmExit) -> int:
    """Dispatch on the exit reason."""
    if vcpu.kvm.cpu_dirty_log_size:
        # On every exit: whoever wants an up-to-date log only has to kick the vCPU.
        pml.vmx_flush_pml_buffer(vcpu)
    if exit_.idt_vectoring_info & INTR_INFO_VALID and exit_.reason not in _VECTORING_OK:
        return internal_error(vcpu, "an event was being delivered")
    handler = _HANDLERS.get(exit_.reason)
    if handler is None:
        return internal_error(vcpu, "no handler")
    return handler(vcpu, exit_)


# -- memory -------------------------------------------------------------------------------------


def _handle_ept_violation(vcpu: Vcpu, exit_: VmExit) -> int:
    kvm = vcpu.kvm
    qualification = exit_.qualification
    gpa = exit_.guest_physical
    ctx = kvm.stream.ctx
    saved = ctx.cause
    if (t := kvm.trace.kvm_page_fault) is not None:
        killer = None if qualification & _EPT_PROT_MASK else kvm.killed_by.of(gpa >> 12)
        ctx.cause = t(vcpu.vcpu_id, exit_.rip, gpa, qualification, killed_by=killer)
    error_code = PFERR_USER_MASK if qualification & EPT_ACC_READ else 0
    error_code |= PFERR_WRITE_MASK if qualification & EPT_ACC_WRITE else 0
    error_code |= PFERR_FETCH_MASK if qualification & EPT_ACC_EXEC else 0
    error_code |= PFERR_PRESENT_MASK if qualification & _EPT_PROT_MASK else 0
    if qualification & EPT_GVA_VALID:
        error_code |= PFERR_GUEST_FINAL_MASK if qualification & EPT_GVA_TRANSLATED else PFERR_GUEST_PAGE_MASK
    try:
        return _page_fault(vcpu, gpa, error_code)
    finally:
        ctx.cause = saved


def _handle_ept_misconfig(vcpu: Vcpu, exit_: VmExit) -> int:
    return _page_fault(vcpu, exit_.guest_physical, PFERR_RSVD_MASK)


def _handle_exception_nmi(vcpu: Vcpu, exit_: VmExit) -> int:
    kvm = vcpu.kvm
    cr2, error_code = exit_.qualification, exit_.error_code
    vectoring = exit_.idt_vectoring_info & INTR_INFO_VALID
    if exit_.intr_info & 0xFF == _UD and not vectoring:
        return _handle_ud(vcpu)
    if exit_.intr_info & 0xFF != _PF or (vectoring and error_code & PFERR_RSVD_MASK):
        return internal_error(vcpu, "an exception while an event was being delivered")
    ctx = kvm.stream.ctx
    saved = ctx.cause
    if (t := kvm.trace.kvm_page_fault) is not None:
        ctx.cause = t(vcpu.vcpu_id, exit_.rip, cr2, error_code)
    try:
        return _page_fault(vcpu, cr2, error_code)
    finally:
        ctx.cause = saved


def _page_fault(vcpu: Vcpu, gpa: int, error_code: int) -> int:
    vcpu.kvm.sched.advance(COST_FAULT)
    r = kvm_mmu_page_fault(vcpu, gpa, error_code)
    if r in (RET_PF_EMULATE, RET_PF_WRITE_PROTECTED):
        return x86_emulate_instruction(vcpu, gpa, allow_retry=r == RET_PF_WRITE_PROTECTED)
    # Whoever makes this fault retry is on another CPU; let it get on.
    vcpu.need_resched |= r == RET_PF_RETRY
    return r


# -- instructions -------------------------------------------------------------------------------


def _handle_io(vcpu: Vcpu, exit_: VmExit) -> int:
    kvm = vcpu.kvm
    cpu = kvm.cpu
    qualification = exit_.qualification
    vcpu.stat["io_exits"] += 1
    if qualification & 16:
        return internal_error(vcpu, "string port I/O is not modelled")
    port = qualification >> 16 & 0xFFFF
    size = (qualification & 7) + 1
    mask = (1 << 8 * size) - 1
    if qualification & 8:
        vcpu.run = UserExit("io", port=port, size=size)

        def complete_in() -> int:
            if cpu.get_reg(vcpu, "rip") != exit_.rip:
                return 1
            data = (vcpu.user_data or 0) & mask
            if (t := kvm.trace.kvm_pio) is not None:
                t(0, port, size, 1, data)
            rax = cpu.get_reg(vcpu, "rax") if size < 4 else 0
            cpu.set_reg(vcpu, "rax", rax & ~mask & _MASK64 | data)
            cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
            return 1

        vcpu.complete_userspace_io = complete_in
        return 0
    data = cpu.get_reg(vcpu, "rax") & mask
    if (t := kvm.trace.kvm_pio) is not None:
        t(1, port, size, 1, data)
    vcpu.run = UserExit("io", port=port, size=size, write=True, data=data)

    def complete_out() -> int:
        # complete_fast_pio_out: user space that moved RIP has decided where the guest goes on.
        if cpu.get_reg(vcpu, "rip") == exit_.rip:
            cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
        return 1

    vcpu.complete_userspace_io = complete_out
    return 0


def _handle_vmcall(vcpu: Vcpu, exit_: VmExit) -> int:
    kvm = vcpu.kvm
    cpu = kvm.cpu
    nr, a0, a1, a2, a3 = (cpu.get_reg(vcpu, name) for name in ("rax", "rbx", "rcx", "rdx", "rsi"))
    if (t := kvm.trace.kvm_hypercall) is not None:
        t(nr, a0, a1, a2, a3)
    vcpu.stat["hypercalls"] += 1
    cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    vcpu.run = UserExit("hypercall", nr=nr, args=(a0, a1, a2, a3))

    def complete() -> int:
        cpu.set_reg(vcpu, "rax", (vcpu.user_data or 0) & _MASK64)
        return 1

    vcpu.complete_userspace_io = complete
    return 0


def _handle_cpuid(vcpu: Vcpu, exit_: VmExit) -> int:
    cpu = vcpu.kvm.cpu
    leaf = cpu.get_reg(vcpu, "rax") & 0xFFFF_FFFF
    subleaf = cpu.get_reg(vcpu, "rcx") & 0xFFFF_FFFF
    out = kvm_pv_cpuid(vcpu.kvm, leaf) or cpu.cpuid(vcpu, leaf, subleaf)
    if leaf == 1 and vcpu.apic is not None:
        out = (*out[:3], out[3] | _CPUID_1_EDX_APIC)
    if (t := vcpu.kvm.trace.kvm_cpuid) is not None:
        t(leaf, subleaf, *out, True, False)
    for name, value in zip(("rax", "rbx", "rcx", "rdx"), out, strict=True):
        cpu.set_reg(vcpu, name, value)
    cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    return 1


def _handle_ud(vcpu: Vcpu) -> int:
    """handle_ud: the one invalid opcode that the CPU reports is RSM."""
    if not vcpu.smm:
        vcpu.queue_exception(_UD)
        return 1
    return 1 if emulator_leave_smm(vcpu) else internal_error(vcpu, "RSM cannot be emulated")


def _handle_hlt(vcpu: Vcpu, exit_: VmExit) -> int:
    vcpu.stat["halt_exits"] += 1
    vcpu.kvm.cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    vcpu.mp_state = KVM_MP_STATE_HALTED
    return 1


def _handle_triple_fault(vcpu: Vcpu, exit_: VmExit) -> int:
    vcpu.run = UserExit("shutdown")
    return 0


def _handle_interrupt_window(vcpu: Vcpu, exit_: VmExit) -> int:
    vcpu.irq_window = False
    kvm_make_request(KVM_REQ_EVENT, vcpu)
    vcpu.stat["irq_window_exits"] += 1
    return 1


def _handle_external_interrupt(vcpu: Vcpu, exit_: VmExit) -> int:
    vcpu.stat["irq_exits"] += 1
    vcpu.need_resched = True
    return 1


_HANDLERS = {
    REASON_EXCEPTION_NMI: _handle_exception_nmi,
    REASON_CR_ACCESS: cr.handle_cr,
    REASON_INVLPG: cr.handle_invlpg,
    REASON_EXTERNAL_INTERRUPT: _handle_external_interrupt,
    REASON_TRIPLE_FAULT: _handle_triple_fault,
    REASON_INTERRUPT_WINDOW: _handle_interrupt_window,
    REASON_CPUID: _handle_cpuid,
    REASON_HLT: _handle_hlt,
    REASON_VMCALL: _handle_vmcall,
    REASON_IO_INSTRUCTION: _handle_io,
    REASON_APIC_ACCESS: handle_apic_access,
    REASON_APIC_WRITE: handle_apic_write,
    REASON_MSR_READ: handle_rdmsr,
    REASON_MSR_WRITE: handle_wrmsr,
    REASON_EPT_VIOLATION: _handle_ept_violation,
    REASON_EPT_MISCONFIG: _handle_ept_misconfig,
    REASON_PML_FULL: pml.handle_pml_full,
}
"""kvm_vmx_exit_handlers, the reasons this CPU produces."""
