"""KVM_RUN: the loop around guest entries, blocking, and what user space has to complete.

Source of truth: arch/x86/kvm/x86.c (Linux 6.18): kvm_arch_vcpu_ioctl_run, vcpu_run,
vcpu_enter_guest, vcpu_block, kvm_vcpu_exit_request; virt/kvm/kvm_main.c: kvm_vcpu_halt;
vmx/vmx.c: vmx_vcpu_run.

The order around an entry is the protocol: SRCU is left only after `mode` says IN_GUEST_MODE, and
requests are looked at once more after that, so that whoever changes SPTEs or memslots either sees the
vCPU in guest mode and kicks it, or is seen by it.

Not modelled: fast exit paths, timers and APIC state, signals other than `immediate_exit`, halt polling.
"""

from __future__ import annotations

from errno import EFAULT, EINTR, EIO
from typing import TYPE_CHECKING

from host_mm.address_space import flush_delayed_fput
from host_mm.kernel.costs import COST_VM_ENTRY, COST_VM_EXIT
from kvm_model.dirty_ring import kvm_dirty_ring_check_request
from kvm_model.mmu.mmu_roots import kvm_mmu_free_obsolete_roots, kvm_mmu_load_pgd, kvm_mmu_reload
from kvm_model.mmu.shadow_roots import kvm_mmu_sync_prev_roots, kvm_mmu_sync_roots
from kvm_model.pv_async_pf import kvm_check_async_pf_completion
from kvm_model.pvclock import kvm_gen_kvmclock_update, kvm_guest_time_update
from kvm_model.requests import (
    EXITING_GUEST_MODE,
    IN_GUEST_MODE,
    KVM_REQ_APF_HALT,
    KVM_REQ_APF_READY,
    KVM_REQ_APIC_PAGE_RELOAD,
    KVM_REQ_CLOCK_UPDATE,
    KVM_REQ_EVENT,
    KVM_REQ_GLOBAL_CLOCK_UPDATE,
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_MMU_FREE_OBSOLETE_ROOTS,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_NMI,
    KVM_REQ_SMI,
    KVM_REQ_TLB_FLUSH,
    KVM_REQ_TLB_FLUSH_CURRENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    KVM_REQ_TRIPLE_FAULT,
    KVM_REQ_UNBLOCK,
    KVM_REQ_UPDATE_CPU_DIRTY_LOGGING,
    KVM_REQ_VM_DEAD,
    OUTSIDE_GUEST_MODE,
    kvm_check_request,
    kvm_clear_request,
    kvm_make_request,
    kvm_test_request,
)
from kvm_model.smm import process_smi
from kvm_model.vcpu import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, UserExit, Vcpu
from kvm_model.vmx.apic_access import kvm_vcpu_reload_apic_access_page
from kvm_model.vmx.exits import EXIT_REASON_NAMES, INTR_INFO_DELIVER_CODE, INTR_INFO_VALID, VmExit
from kvm_model.vmx.pml import vmx_update_cpu_dirty_logging
from kvm_model.vmx.vmx import vmx_handle_exit
from kvm_model.x86_events import kvm_check_and_inject_events, vmx_cancel_injection, vmx_complete_interrupts
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["TRACEPOINTS", "UserExit", "kvm_arch_vcpu_ioctl_run"]

KVM_ISA_VMX = 1
_RFLAGS_IF = 1 << 9
_WITH_ERROR_CODE = INTR_INFO_VALID | INTR_INFO_DELIVER_CODE
_USER_EXIT_REASONS = {
    "io": 2, "hypercall": 3, "hlt": 5, "mmio": 6, "shutdown": 8, "intr": 10, "internal-error": 17,
    "dirty-ring-full": 31,
    "memory-fault": 0, "memory-fault-exit": 39,
}
_USER_EXIT_NAMES = {
    0: "KVM_EXIT_UNKNOWN", 2: "KVM_EXIT_IO", 3: "KVM_EXIT_HYPERCALL", 5: "KVM_EXIT_HLT", 6: "KVM_EXIT_MMIO",
    8: "KVM_EXIT_SHUTDOWN", 10: "KVM_EXIT_INTR", 17: "KVM_EXIT_INTERNAL_ERROR",
    31: "KVM_EXIT_DIRTY_RING_FULL", 39: "KVM_EXIT_MEMORY_FAULT",
}


def _fmt_exit(
    reason: int, rip: int, isa: int, info1: int, info2: int, intr: int, error: int, vcpu_id: int,
    requests: int,
) -> str:
    name = EXIT_REASON_NAMES.get(reason & 0xFFFF, f"{reason & 0xFFFF:#x}")
    return (
        f"vcpu {vcpu_id} reason {name} rip 0x{rip:x} info1 0x{info1:016x} info2 0x{info2:016x} "
        f"intr_info 0x{intr:08x} error_code 0x{error:08x} requests 0x{requests:016x}"
    )


def _fmt_userspace(reason: int, errno: int) -> str:
    if errno < 0:
        return f"reason {'restart' if errno == -4 else 'error'} ({-errno})"
    return f"reason {_USER_EXIT_NAMES.get(reason, hex(reason))} ({reason})"


KVM_ENTRY = Tracepoint(
    "kvm", "kvm_entry", ("vcpu_id", "rip", "immediate_exit", "intr_info", "error_code"),
    lambda vcpu_id, rip, immediate_exit, intr_info, error_code:
        f"vcpu {vcpu_id}, rip 0x{rip:x} intr_info 0x{intr_info:08x} error_code 0x{error_code:08x}"
        f"{'[immediate exit]' if immediate_exit else ''}",
)
KVM_EXIT = Tracepoint(
    "kvm", "kvm_exit",
    ("exit_reason", "guest_rip", "isa", "info1", "info2", "intr_info", "error_code", "vcpu_id", "requests"),
    _fmt_exit,
)
KVM_USERSPACE_EXIT = Tracepoint("kvm", "kvm_userspace_exit", ("reason", "errno"), _fmt_userspace)
KVM_VCPU_WAKEUP = Tracepoint(
    "kvm", "kvm_vcpu_wakeup", ("ns", "waited", "valid"),
    lambda ns, waited, valid:
        f"{'wait' if waited else 'poll'} time {ns} ns, polling {'valid' if valid else 'invalid'}",
)
TRACEPOINTS = (KVM_ENTRY, KVM_EXIT, KVM_USERSPACE_EXIT, KVM_VCPU_WAKEUP)


def kvm_arch_vcpu_ioctl_run(vcpu: Vcpu) -> UserExit:
    """KVM_RUN: run the guest until user space is needed."""
    kvm = vcpu.kvm
    with vcpu.mutex:
        _srcu_lock(vcpu)
        vcpu.run = None
        r = 1
        try:
            if vcpu.complete_userspace_io is not None:
                complete, vcpu.complete_userspace_io = vcpu.complete_userspace_io, None
                r = complete()
                vcpu.user_data = None
            if r > 0:
                r = _vcpu_run(vcpu)
        finally:
            _srcu_unlock(vcpu)
    flush_delayed_fput(kvm.host)
    out = _user_exit(vcpu, r)
    if (t := kvm.trace.kvm_userspace_exit) is not None:
        t(_USER_EXIT_REASONS[out.kind], min(r, 0))
    return out


def _srcu_lock(vcpu: Vcpu) -> None:
    vcpu.srcu_idx = vcpu.kvm.srcu.read_lock()


def _srcu_unlock(vcpu: Vcpu) -> None:
    idx, vcpu.srcu_idx = vcpu.srcu_idx, -1
    if idx >= 0:
        vcpu.kvm.srcu.read_unlock(idx)


def _user_exit(vcpu: Vcpu, r: int) -> UserExit:
    if r == -EINTR:
        return UserExit("intr")
    if r < 0 and vcpu.run is not None and vcpu.run.kind == "memory-fault-exit":
        return vcpu.run
    if r == -EFAULT:
        return UserExit("memory-fault", gpa=vcpu.fault_gpa)
    if r < 0:
        return UserExit("internal-error", why=f"KVM_RUN failed with errno {-r}")
    if vcpu.run is None:
        return UserExit("internal-error", why="no exit reason was set")
    return vcpu.run


def _vcpu_run(vcpu: Vcpu) -> int:
    kvm = vcpu.kvm
    while True:
        if vcpu.mp_state == KVM_MP_STATE_RUNNABLE and not vcpu.apf.halted:
            r = _vcpu_enter_guest(vcpu)
        else:
            r = _vcpu_block(vcpu)
        if r <= 0:
            return r
        kvm_clear_request(KVM_REQ_UNBLOCK, vcpu)
        if vcpu.immediate_exit:
            # What a signal does: user space wants its thread.
            vcpu.immediate_exit = False
            vcpu.stat["signal_exits"] += 1
            return -EINTR
        if kvm.host.numa_balancing is not None:
            # xfer_to_guest_mode_handle_work: task work of the thread.
            _srcu_unlock(vcpu)
            kvm.host.numa_balancing.task_work(kvm.mm.process)
            _srcu_lock(vcpu)
        sched = kvm.sched
        if vcpu.need_resched or sched.preempt or sched.runnable:
            _srcu_unlock(vcpu)
            if vcpu.need_resched or (sched.runnable and sched.strategy is None):
                # xfer_to_guest_mode_handle_work: somebody else was woken and wants the CPU.
                vcpu.need_resched = False
                sched.yield_()
            else:
                sched.point("vcpu-run")
            _srcu_lock(vcpu)


# -- entering the guest -------------------------------------------------------------------------


def _service_tlb_flush_requests(vcpu: Vcpu) -> None:
    """Of everything, of the present root, and, with what KVM keeps of the guest's tables, the guest's own."""
    cpu = vcpu.kvm.cpu
    if kvm_check_request(KVM_REQ_TLB_FLUSH, vcpu):
        vcpu.stat["tlb_flush"] += 1
        cpu.flush_tlb(vcpu)
        kvm_clear_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu)
    if kvm_check_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu):
        vcpu.stat["tlb_flush"] += 1
        cpu.flush_tlb(vcpu)
    if kvm_check_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu):
        vcpu.stat["tlb_flush"] += 1
        if not vcpu.kvm.tdp_enabled:
            _sync_roots(vcpu)
            kvm_mmu_sync_prev_roots(vcpu)
        cpu.flush_tlb(vcpu)


def _sync_roots(vcpu: Vcpu) -> None:
    """The guest has flushed its TLB."""
    truths = vcpu.kvm.shadow_truths
    begun = truths.flush_begins() if truths is not None else 0
    kvm_mmu_sync_roots(vcpu)
    if truths is not None:
        truths.flush_ended(vcpu, begun)


def _service_requests(vcpu: Vcpu) -> int:
    """What was asked of the vCPU since its last entry. 1 to go on, else vcpu_enter_guest's result."""
    if kvm_check_request(KVM_REQ_VM_DEAD, vcpu):
        return -EIO
    if kvm_dirty_ring_check_request(vcpu):
        vcpu.run = UserExit("dirty-ring-full")
        return 0
    if kvm_check_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu):
        kvm_mmu_free_obsolete_roots(vcpu)
    if kvm_check_request(KVM_REQ_GLOBAL_CLOCK_UPDATE, vcpu):
        kvm_gen_kvmclock_update(vcpu)
    if kvm_check_request(KVM_REQ_CLOCK_UPDATE, vcpu):
        kvm_guest_time_update(vcpu)
    if kvm_check_request(KVM_REQ_MMU_SYNC, vcpu):
        _sync_roots(vcpu)
    if kvm_check_request(KVM_REQ_LOAD_MMU_PGD, vcpu):
        kvm_mmu_load_pgd(vcpu)
    _service_tlb_flush_requests(vcpu)
    if kvm_check_request(KVM_REQ_TRIPLE_FAULT, vcpu):
        vcpu.run = UserExit("shutdown")
        return 0
    if kvm_check_request(KVM_REQ_APF_HALT, vcpu):
        vcpu.apf.halted = True
        return 1
    if kvm_check_request(KVM_REQ_SMI, vcpu):
        process_smi(vcpu)
    kvm_check_request(KVM_REQ_NMI, vcpu)
    if kvm_check_request(KVM_REQ_APIC_PAGE_RELOAD, vcpu):
        kvm_vcpu_reload_apic_access_page(vcpu)
    if kvm_check_request(KVM_REQ_APF_READY, vcpu):
        kvm_check_async_pf_completion(vcpu)
    if kvm_check_request(KVM_REQ_UPDATE_CPU_DIRTY_LOGGING, vcpu):
        vmx_update_cpu_dirty_logging(vcpu)
    return 1


def _vcpu_enter_guest(vcpu: Vcpu) -> int:
    """One guest entry and the handling of its exit: above 0 to go on, 0 for user space, or -errno."""
    kvm = vcpu.kvm
    if vcpu.requests:
        r = _service_requests(vcpu)
        if r <= 0 or vcpu.apf.halted:
            return r
    req_immediate_exit = False
    if kvm_check_request(KVM_REQ_EVENT, vcpu) or vcpu.has_interrupt():
        vcpu.stat["req_event"] += 1
        req_immediate_exit = kvm_check_and_inject_events(vcpu)
    r = kvm_mmu_reload(vcpu)
    if r:
        _cancel(vcpu, req_immediate_exit)
        return r
    if kvm.truths is not None:
        kvm.truths.check()
    vcpu.kicked = False
    vcpu.mode = IN_GUEST_MODE
    _srcu_unlock(vcpu)
    # Only now: a request made before `mode` changed came without a kick.
    if vcpu.mode == EXITING_GUEST_MODE or vcpu.requests or vcpu.immediate_exit:
        vcpu.mode = OUTSIDE_GUEST_MODE
        _srcu_lock(vcpu)
        _cancel(vcpu, req_immediate_exit)
        return 1
    if kvm.truths is not None and vcpu.apic is not None:
        kvm.truths.note_entry(vcpu)
    if req_immediate_exit:
        kvm_make_request(KVM_REQ_EVENT, vcpu)
        vcpu.kicked = True
    exit_ = _vmx_vcpu_run(vcpu, req_immediate_exit)
    vcpu.mode = OUTSIDE_GUEST_MODE
    vcpu.stat["exits"] += 1
    _srcu_lock(vcpu)
    return vmx_handle_exit(vcpu, exit_)


def _cancel(vcpu: Vcpu, req_immediate_exit: bool) -> None:
    if req_immediate_exit:
        kvm_make_request(KVM_REQ_EVENT, vcpu)
    vmx_cancel_injection(vcpu)


def _vmx_vcpu_run(vcpu: Vcpu, force_immediate_exit: bool) -> VmExit:
    kvm = vcpu.kvm
    cpu = kvm.cpu
    if (t := kvm.trace.kvm_entry) is not None:
        t(
            vcpu.vcpu_id, cpu.get_reg(vcpu, "rip"), force_immediate_exit, vcpu.entry_intr_info,
            vcpu.entry_error_code if vcpu.entry_intr_info & _WITH_ERROR_CODE == _WITH_ERROR_CODE else 0,
        )
    kvm.sched.advance(COST_VM_ENTRY)
    exit_ = cpu.vcpu_run(vcpu)
    kvm.sched.advance(COST_VM_EXIT)
    vcpu.exit = exit_
    vcpu.entry_intr_info = 0
    vcpu.entry_error_code = 0
    _trace_exit(kvm, vcpu, exit_)
    vmx_complete_interrupts(vcpu, exit_.idt_vectoring_info, exit_.insn_len, exit_.idt_vectoring_error)
    return exit_


def _trace_exit(kvm: Kvm, vcpu: Vcpu, exit_: VmExit) -> None:
    if (t := kvm.trace.kvm_exit) is not None:
        t(
            exit_.reason, exit_.rip, KVM_ISA_VMX, exit_.qualification, exit_.idt_vectoring_info,
            exit_.intr_info, exit_.error_code, vcpu.vcpu_id, vcpu.requests,
        )


# -- blocking -----------------------------------------------------------------------------------


def _vcpu_runnable(vcpu: Vcpu) -> bool:
    """kvm_arch_vcpu_runnable, of a vCPU that halts."""
    if vcpu.async_pf.done or vcpu.exception.pending or vcpu.nmi_pending:
        return True
    if kvm_test_request(KVM_REQ_SMI, vcpu) or (vcpu.smi_pending and not vcpu.smm):
        return True
    return vcpu.has_interrupt() and vcpu.kvm.cpu.interrupt_allowed(vcpu)


def _vcpu_block(vcpu: Vcpu) -> int:
    halted = vcpu.mp_state == KVM_MP_STATE_HALTED
    if halted and not _vcpu_runnable(vcpu) and not _can_wake(vcpu):
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE
        vcpu.run = UserExit("hlt")
        return 0
    if not _vcpu_runnable(vcpu):
        _srcu_unlock(vcpu)
        _kvm_vcpu_halt(vcpu, traced=halted or vcpu.kvm.profile.block_traces_wakeup)
        _srcu_lock(vcpu)
        if not _vcpu_runnable(vcpu):
            return 1
    if vcpu.mp_state == KVM_MP_STATE_HALTED:
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE
        kvm_make_request(KVM_REQ_EVENT, vcpu)
    vcpu.apf.halted = False
    return 1


def _can_wake(vcpu: Vcpu) -> bool:
    """Whether an interrupt can ever end this halt."""
    somebody = vcpu.irq_source is not None or vcpu.async_pf.queued > 0
    return somebody and vcpu.kvm.cpu.get_reg(vcpu, "rflags") & _RFLAGS_IF != 0


def _kvm_vcpu_halt(vcpu: Vcpu, *, traced: bool) -> None:
    """kvm_vcpu_halt, or without `traced` kvm_vcpu_block alone."""
    kvm = vcpu.kvm
    start = kvm.sched.now
    waited = False
    while not (_vcpu_runnable(vcpu) or vcpu.immediate_exit or kvm_check_request(KVM_REQ_UNBLOCK, vcpu)):
        waited = True
        vcpu.wait.wait()
        if vcpu.requests:
            break
    if not traced:
        return
    vcpu.stat["halt_wait_ns"] += kvm.sched.now - start
    if (t := kvm.trace.kvm_vcpu_wakeup) is not None:
        # Only s390 knows invalid wake-ups.
        t(kvm.sched.now - start, waited, True)
