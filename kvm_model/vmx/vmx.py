"""VM-exit handlers: what each exit reason makes KVM do.

Source of truth: arch/x86/kvm/vmx/vmx.c (Linux 6.18): kvm_vmx_exit_handlers, handle_ept_violation,
handle_ept_misconfig, handle_io, handle_interrupt_window; vmx/common.h: __vmx_handle_ept_violation;
x86.c: kvm_emulate_halt, kvm_emulate_cpuid, kvm_emulate_rdmsr, kvm_fast_pio, x86_emulate_instruction,
emulator_read_write_onepage.

A handler returns above 0 to enter the guest again, 0 for user space, or a negative errno.

Not modelled: string port I/O, MMIO of more than 8 bytes or across pages, KVM's own hypercalls
(every VMCALL goes to user space), CR and INVLPG intercepts (EPT needs none), #PF and NMI intercepts,
the #UD that a guest in ring 3 gets for what cannot be emulated (here the VM stops as for ring 0), and
handle_ept_misconfig's endless re-entry when an event is delivered through a known MMIO page (it stops too),
the emulator's own reads of guest code: where EPT has lost the page, the guest fetches it anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.costs import COST_FAULT
from host_mm.kernel.errors import KernelError
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.kvm_x86_ops import EMULATE_RETRY
from kvm_model.memslots import KVM_MEM_READONLY, KVM_MEMSLOT_INVALID, mark_page_dirty_in_slot
from kvm_model.mmu.mmio import vcpu_match_mmio_gpa
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
)
from kvm_model.requests import KVM_REQ_EVENT, kvm_make_request
from kvm_model.vcpu import KVM_MP_STATE_HALTED, UserExit, Vcpu
from kvm_model.vmx import pml
from kvm_model.vmx.exits import (
    EPT_ACC_EXEC,
    EPT_ACC_READ,
    EPT_ACC_WRITE,
    EPT_ENTRY_EXEC,
    EPT_ENTRY_READ,
    EPT_ENTRY_WRITE,
    EPT_GVA_TRANSLATED,
    EPT_GVA_VALID,
    EXIT_REASON_NAMES,
    INTR_INFO_VALID,
    REASON_CPUID,
    REASON_EPT_MISCONFIG,
    REASON_EPT_VIOLATION,
    REASON_EXCEPTION_NMI,
    REASON_EXTERNAL_INTERRUPT,
    REASON_HLT,
    REASON_INTERRUPT_WINDOW,
    REASON_IO_INSTRUCTION,
    REASON_MSR_READ,
    REASON_MSR_WRITE,
    REASON_PML_FULL,
    REASON_TRIPLE_FAULT,
    REASON_VMCALL,
    VmExit,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_x86_ops import MmioAccess

__all__ = ["TRACEPOINTS", "vmx_handle_exit"]

_EPT_PROT_MASK = EPT_ENTRY_READ | EPT_ENTRY_WRITE | EPT_ENTRY_EXEC
_VECTORING_OK = frozenset((REASON_EXCEPTION_NMI, REASON_EPT_VIOLATION, REASON_EPT_MISCONFIG, REASON_PML_FULL))
_MASK64 = (1 << 64) - 1
_GP = 13
_MMIO_TYPES = ("unsatisfied-read", "read", "write")
_MODES = {0: "real", 3: "vm16", 1: "prot16", 5: "prot32", 9: "prot64"}

KVM_PAGE_FAULT = Tracepoint(
    "kvm", "kvm_page_fault", ("vcpu_id", "guest_rip", "fault_address", "error_code"),
    lambda vcpu_id, rip, address, error_code:
        f"vcpu {vcpu_id} rip 0x{rip:x} address 0x{address:016x} error_code 0x{error_code:x}",
    scope=True, doc="An EPT violation; error_code is the exit qualification.",
)
KVM_PIO = Tracepoint(
    "kvm", "kvm_pio", ("rw", "port", "size", "count", "val"),
    lambda rw, port, size, count, val:
        f"pio_{'write' if rw else 'read'} at {port:#x} size {size} count {count} val {val:#x} "
        f"{'(...)' if count > 1 else ''}",
)
KVM_MMIO = Tracepoint(
    "kvm", "kvm_mmio", ("type", "len", "gpa", "val"),
    lambda kind, length, gpa, val: f"mmio {_MMIO_TYPES[kind]} len {length} gpa 0x{gpa:x} val 0x{val:x}",
)
KVM_EMULATE_INSN = Tracepoint(
    "kvm", "kvm_emulate_insn", ("rip", "csbase", "len", "insn", "flags", "failed"),
    lambda rip, csbase, length, insn, flags, failed:
        f"{csbase:x}:{rip:x}:{insn} ({_MODES.get(flags, hex(flags))}){' failed' if failed else ''}",
)
VCPU_MATCH_MMIO = Tracepoint(
    "kvm", "vcpu_match_mmio", ("gva", "gpa", "write", "gpa_match"),
    lambda gva, gpa, write, gpa_match:
        f"gva {gva:#x} gpa {gpa:#x} {'Write' if write else 'Read'} {'GPA' if gpa_match else 'GVA'}",
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
KVM_MSR = Tracepoint(
    "kvm", "kvm_msr", ("write", "ecx", "data", "exception"),
    lambda write, ecx, data, exception:
        f"msr_{'write' if write else 'read'} {ecx:x} = 0x{data:x}{' (#GP)' if exception else ''}",
)
TRACEPOINTS = (
    KVM_PAGE_FAULT, *pml.TRACEPOINTS, KVM_PIO, KVM_MMIO, KVM_EMULATE_INSN, VCPU_MATCH_MMIO, KVM_HYPERCALL,
    KVM_CPUID, KVM_MSR,
)


def vmx_handle_exit(vcpu: Vcpu, exit_: VmExit) -> int:
    """Dispatch on the exit reason."""
    if vcpu.kvm.cpu_dirty_log_size:
        # On every exit: whoever wants an up-to-date log only has to kick the vCPU.
        pml.vmx_flush_pml_buffer(vcpu)
    if exit_.idt_vectoring_info & INTR_INFO_VALID and exit_.reason not in _VECTORING_OK:
        return _internal_error(vcpu, "an event was being delivered")
    handler = _HANDLERS.get(exit_.reason)
    if handler is None:
        return _internal_error(vcpu, "no handler")
    return handler(vcpu, exit_)


def _internal_error(vcpu: Vcpu, why: str) -> int:
    reason = EXIT_REASON_NAMES.get(vcpu.exit.reason, str(vcpu.exit.reason))
    vcpu.run = UserExit("internal-error", why=f"{reason} at rip {vcpu.exit.rip:#x}: {why}")
    return 0


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


def _page_fault(vcpu: Vcpu, gpa: int, error_code: int) -> int:
    vcpu.kvm.sched.advance(COST_FAULT)
    r = kvm_mmu_page_fault(vcpu, gpa, error_code)
    if r == RET_PF_EMULATE:
        if vcpu.exit.idt_vectoring_info & INTR_INFO_VALID:
            # The access was the CPU's own, to deliver an event; no instruction at RIP makes it.
            return _internal_error(vcpu, "an event was being delivered through MMIO")
        return _x86_emulate_instruction(vcpu, gpa)
    # Whoever makes this fault retry is on another CPU; let it get on.
    vcpu.need_resched |= r == RET_PF_RETRY
    return r


def _x86_emulate_instruction(vcpu: Vcpu, gpa: int) -> int:
    """Emulate the instruction at RIP, whose memory operand is at `gpa`."""
    kvm = vcpu.kvm
    rip = kvm.cpu.get_reg(vcpu, "rip")
    access = kvm.cpu.emulate(vcpu, gpa)
    if access is EMULATE_RETRY:
        return 1
    insn = access.insn if access is not None else b""
    mode = access.mode if access is not None else 9
    t = kvm.trace.kvm_emulate_insn
    if t is not None:
        t(rip, 0, len(insn), insn.hex(" "), mode, False)
    vcpu.stat["insn_emulation"] += 1
    if access is None:
        vcpu.stat["insn_emulation_fail"] += 1
        if t is not None:
            t(rip, 0, len(insn), insn.hex(" "), mode, True)
        return _internal_error(vcpu, "the instruction cannot be emulated")
    return _emulate_access(vcpu, gpa, access)


def _emulate_access(vcpu: Vcpu, gpa: int, access: MmioAccess) -> int:
    """emulator_read_write_onepage: through the memslot if there is one, else as MMIO."""
    if not _is_mmio_gpa(vcpu, gpa, access.write):
        r = _emulate_in_memory(vcpu, gpa, access)
        if r >= 0:
            return r
    return _emulate_mmio(vcpu, gpa, access)


def _finish_access(vcpu: Vcpu, gpa: int, access: MmioAccess, data: int) -> int:
    """The access is done; the load of a read-modify-write is followed by its store."""
    store = vcpu.kvm.cpu.complete_mmio(vcpu, access, data)
    return 1 if store is None else _emulate_access(vcpu, gpa, store)


def _is_mmio_gpa(vcpu: Vcpu, gpa: int, write: bool) -> bool:
    if not vcpu_match_mmio_gpa(vcpu, gpa):
        return False
    if (t := vcpu.kvm.trace.vcpu_match_mmio) is not None:
        t(vcpu.exit.guest_linear, gpa, write, True)
    return True


def _emulate_in_memory(vcpu: Vcpu, gpa: int, access: MmioAccess) -> int:
    """Do the access through the VMM's mapping, as with a read-only slot's loads; -1 if no slot takes it."""
    kvm = vcpu.kvm
    slot = kvm.slots().gfn_to_memslot(gpa >> 12)
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID or (access.write and slot.flags & KVM_MEM_READONLY):
        return -1
    hva = slot.gfn_to_hva(gpa >> 12) | gpa & 0xFFF
    value = 0
    try:
        if access.write:
            data = access.data & (1 << 8 * access.length) - 1
            copy_to_user(kvm.process, hva, data.to_bytes(access.length, "little"))
            mark_page_dirty_in_slot(vcpu, slot, gpa >> 12)
        else:
            value = int.from_bytes(copy_from_user(kvm.process, hva, access.length), "little")
    except KernelError:
        return -1
    return _finish_access(vcpu, gpa, access, value)


def _emulate_mmio(vcpu: Vcpu, gpa: int, access: MmioAccess) -> int:
    kvm = vcpu.kvm
    t = kvm.trace.kvm_mmio
    length = access.length
    vcpu.stat["mmio_exits"] += 1
    if access.write:
        data = access.data & (1 << 8 * length) - 1
        if t is not None:
            t(2, length, gpa, data)
        vcpu.run = UserExit("mmio", gpa=gpa, size=length, write=True, data=data)
        kvm.cpu.complete_mmio(vcpu, access, 0)
        return 0
    if t is not None:
        t(0, length, gpa, 0)
    vcpu.run = UserExit("mmio", gpa=gpa, size=length)

    def complete() -> int:
        data = (vcpu.user_data or 0) & (1 << 8 * length) - 1
        if (t := kvm.trace.kvm_mmio) is not None:
            t(1, length, gpa, data)
        return _finish_access(vcpu, gpa, access, data)

    vcpu.complete_userspace_io = complete
    return 0


# -- instructions -------------------------------------------------------------------------------


def _handle_io(vcpu: Vcpu, exit_: VmExit) -> int:
    kvm = vcpu.kvm
    cpu = kvm.cpu
    qualification = exit_.qualification
    vcpu.stat["io_exits"] += 1
    if qualification & 16:
        return _internal_error(vcpu, "string port I/O is not modelled")
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
    out = cpu.cpuid(vcpu, leaf, subleaf)
    if (t := vcpu.kvm.trace.kvm_cpuid) is not None:
        t(leaf, subleaf, *out, True, False)
    for name, value in zip(("rax", "rbx", "rcx", "rdx"), out, strict=True):
        cpu.set_reg(vcpu, name, value)
    cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    return 1


def _handle_rdmsr(vcpu: Vcpu, exit_: VmExit) -> int:
    cpu = vcpu.kvm.cpu
    index = cpu.get_reg(vcpu, "rcx") & 0xFFFF_FFFF
    value = cpu.get_msr(vcpu, index)
    if (t := vcpu.kvm.trace.kvm_msr) is not None:
        t(0, index, value or 0, value is None)
    if value is None:
        vcpu.queue_exception(_GP, 0)
        return 1
    cpu.set_reg(vcpu, "rax", value & 0xFFFF_FFFF)
    cpu.set_reg(vcpu, "rdx", value >> 32)
    cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    return 1


def _handle_wrmsr(vcpu: Vcpu, exit_: VmExit) -> int:
    cpu = vcpu.kvm.cpu
    index = cpu.get_reg(vcpu, "rcx") & 0xFFFF_FFFF
    value = cpu.get_reg(vcpu, "rdx") << 32 & _MASK64 | cpu.get_reg(vcpu, "rax") & 0xFFFF_FFFF
    ok = cpu.set_msr(vcpu, index, value)
    if (t := vcpu.kvm.trace.kvm_msr) is not None:
        t(1, index, value, not ok)
    if ok:
        cpu.skip_emulated_instruction(vcpu, exit_.insn_len)
    else:
        vcpu.queue_exception(_GP, 0)
    return 1


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
    REASON_EXTERNAL_INTERRUPT: _handle_external_interrupt,
    REASON_TRIPLE_FAULT: _handle_triple_fault,
    REASON_INTERRUPT_WINDOW: _handle_interrupt_window,
    REASON_CPUID: _handle_cpuid,
    REASON_HLT: _handle_hlt,
    REASON_VMCALL: _handle_vmcall,
    REASON_IO_INSTRUCTION: _handle_io,
    REASON_MSR_READ: _handle_rdmsr,
    REASON_MSR_WRITE: _handle_wrmsr,
    REASON_EPT_VIOLATION: _handle_ept_violation,
    REASON_EPT_MISCONFIG: _handle_ept_misconfig,
    REASON_PML_FULL: pml.handle_pml_full,
}
"""kvm_vmx_exit_handlers, the reasons this CPU produces."""
