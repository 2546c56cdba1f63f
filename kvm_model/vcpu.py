"""struct kvm_vcpu, and what KVM_RUN hands to user space.

Source of truth: include/linux/kvm_host.h (kvm_vcpu), arch/x86/include/asm/kvm_host.h (kvm_vcpu_arch,
kvm_queued_exception, kvm_queued_interrupt, kvm_vcpu_stat), include/uapi/linux/kvm.h (kvm_run);
Linux 6.18.

Not modelled: in-kernel local APIC (interrupts come from `irq_source`, as with a user-space irqchip), but for
the vectors that KVM itself raises;
guest debugging, XSAVE, steal time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from host_mm.kernel.locks import Mutex
from host_mm.kernel.sched import WaitQueue
from kvm_model.mmu.kvm_mmu import KvmMmu
from kvm_model.mmu.mmu_internal import INVALID_PAGE
from kvm_model.pvclock import PvClock
from kvm_model.requests import (
    KVM_REQ_EVENT,
    KVM_REQ_NMI,
    KVM_REQ_TRIPLE_FAULT,
    OUTSIDE_GUEST_MODE,
    kvm_make_request,
    kvm_vcpu_kick,
)
from kvm_model.vmx.exits import VmExit

if TYPE_CHECKING:
    from kvm_model.async_pf import AsyncPfQueues
    from kvm_model.dirty_ring import KvmDirtyRing
    from kvm_model.kvm_main import Kvm
    from kvm_model.lapic import Lapic

__all__ = [
    "KVM_MP_STATE_HALTED",
    "KVM_MP_STATE_RUNNABLE",
    "VCPU_STATS",
    "IrqSource",
    "QueuedException",
    "UserExit",
    "Vcpu",
    "VcpuApf",
]

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_HALTED = 3

VCPU_STATS = (
    "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_mmio_spte_created", "pf_guest",
    "tlb_flush", "invlpg", "exits", "io_exits", "mmio_exits", "signal_exits", "irq_window_exits",
    "halt_exits", "irq_exits", "insn_emulation", "insn_emulation_fail", "hypercalls", "irq_injections",
    "nmi_injections", "req_event", "halt_wakeup", "halt_wait_ns",
)
"""The kernel's per-vCPU statistics that this model moves."""


class IrqSource(Protocol):
    """An interrupt controller in user space, as KVM asks it."""

    def has_interrupt(self) -> bool:
        """Whether an interrupt is pending."""
        ...

    def ack(self) -> int:
        """Acknowledge the most urgent interrupt; its vector."""
        ...


class UserExit(msgspec.Struct):
    """What KVM_RUN returned. `kind` is one of

    `io` (port, size, write, data), `mmio` (gpa, size, write, data), `hypercall` (nr, args), `hlt`,
    `shutdown` (triple fault), `dirty-ring-full` (harvest and reset it first),
    `memory-fault` (gpa: no usable host memory), `memory-fault-exit` (KVM_EXIT_MEMORY_FAULT: gpa, size,
    private: no guest_memfd, or the page was of the other kind), `internal-error` (why) and
    `intr` (user space asked for the vCPU back).
    """

    kind: str
    port: int = 0
    gpa: int = 0
    size: int = 0
    write: bool = False
    data: int = 0
    nr: int = 0
    args: tuple[int, int, int, int] = (0, 0, 0, 0)
    private: bool = False
    why: str = ""


_DF_VECTOR = 8
_BENIGN, _CONTRIBUTORY, _PAGE_FAULT = range(3)


def _exception_class(vector: int) -> int:
    if vector == 14:
        return _PAGE_FAULT
    return _CONTRIBUTORY if vector in (0, 10, 11, 12, 13) else _BENIGN


class QueuedException:
    """struct kvm_queued_exception."""

    __slots__ = ("error_code", "has_error_code", "injected", "pending", "vector")

    def __init__(self) -> None:
        self.pending = False
        self.injected = False
        self.vector = 0
        self.has_error_code = False
        self.error_code = 0


class VcpuApf:
    """kvm_vcpu_arch.apf. `halted`: the vCPU sleeps until a page is there; `gfns` of pages under way."""

    __slots__ = ("data_gpa", "gfns", "halted", "id", "msr_en_val", "msr_int_val", "pageready_pending")

    def __init__(self) -> None:
        self.halted = False
        self.gfns: list[int] = []
        self.id = 0
        self.msr_en_val = 0
        self.msr_int_val = 0
        self.data_gpa = 0
        self.pageready_pending = False


class Vcpu:
    """struct kvm_vcpu. The CPU reads `entry_*`, `irq_window` and `kicked`; the board sets `irq_source`.

    `irq_window`: leave guest mode with REASON_INTERRUPT_WINDOW as soon as an interrupt could be taken.
    `kicked`: leave with REASON_EXTERNAL_INTERRUPT before the next guest instruction.
    `need_resched`: its thread gives way to others before the next entry (TIF_NEED_RESCHED).
    `immediate_exit`: KVM_RUN returns `intr` instead of entering the guest (a pending signal).
    `last_retry_eip` and `last_retry_addr`: where a write to a protected page was left to the CPU.
    `pml_pg` and `vmcs`: frames of the CPU's page-modification log and of its VMCS, -1 without PML.
    """

    def __init__(self, kvm: Kvm, vcpu_id: int) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.mutex = Mutex(kvm.sched, "vcpu_mutex")
        self.wait = WaitQueue(kvm.sched, f"vcpu{vcpu_id} halt")
        self.requests = 0
        self.mode = OUTSIDE_GUEST_MODE
        self.kicked = False
        self.immediate_exit = False
        self.need_resched = False
        self.mp_state = KVM_MP_STATE_RUNNABLE
        self.stat: dict[str, int] = dict.fromkeys(VCPU_STATS, 0)
        self.srcu_idx = -1

        self.root_hpa = INVALID_PAGE
        self.mmu = KvmMmu()
        self.mmu_shadow_page_cache: list[int] = []
        self.dirty_ring: KvmDirtyRing | None = None
        self.pml_pg = -1
        self.vmcs = -1
        self.mmio_gva = 0
        self.mmio_access = 0
        self.mmio_gfn = 0
        self.mmio_gen = 0
        self.fault_gpa = 0
        self.pv_time = PvClock(kvm)
        self.smm = False
        self.smbase = 0x30000
        self.smi_pending = False
        self.apic: Lapic | None = None
        self.last_retry_eip = 0
        self.last_retry_addr = 0
        self.write_fault_to_shadow_pgtable = False
        self._init_events()

        self.exit = VmExit(0, 0)
        self.run: UserExit | None = None
        self.complete_userspace_io: Callable[[], int] | None = None
        self.user_data: int | None = None

    # -- events ---------------------------------------------------------------------------------

    def _init_events(self) -> None:
        self.entry_intr_info = 0
        self.entry_error_code = 0
        self.entry_insn_len = 0
        self.irq_window = False
        self.irq_source: IrqSource | None = None
        self.exception = QueuedException()
        self.interrupt_injected = False
        self.interrupt_nr = 0
        self.interrupt_soft = False
        self.nmi_pending = 0
        self.nmi_injected = False
        self.lapic_irr: set[int] = set()
        self.apf = VcpuApf()
        self.async_pf: AsyncPfQueues
        self.event_exit_inst_len = 0

    @property
    def event_needs_reinjection(self) -> bool:
        """kvm_event_needs_reinjection: an event's delivery was cut short by the exit."""
        return self.exception.injected or self.interrupt_injected or self.nmi_injected

    def queue_exception(self, vector: int, error_code: int | None = None) -> None:
        """kvm_multiple_exception: deliver at the next entry. With one that waits already it makes a double
        fault, replaces it, or is the end of the guest."""
        ex = self.exception
        if ex.pending or ex.injected:
            if ex.vector == _DF_VECTOR:
                kvm_make_request(KVM_REQ_EVENT, self)
                kvm_make_request(KVM_REQ_TRIPLE_FAULT, self)
                return
            first, second = _exception_class(ex.vector), _exception_class(vector)
            if (first == second == _CONTRIBUTORY) or (first == _PAGE_FAULT and second != _BENIGN):
                vector, error_code = _DF_VECTOR, 0
        ex.pending = True
        ex.injected = False
        ex.vector = vector
        ex.has_error_code = error_code is not None
        ex.error_code = error_code or 0
        kvm_make_request(KVM_REQ_EVENT, self)

    def queue_nmi(self) -> None:
        """kvm_inject_nmi."""
        self.nmi_pending = min(self.nmi_pending + 1, 2)
        kvm_make_request(KVM_REQ_NMI, self)
        kvm_make_request(KVM_REQ_EVENT, self)
        kvm_vcpu_kick(self)

    def has_interrupt(self) -> bool:
        """kvm_cpu_has_interrupt: the interrupt controller has something."""
        return bool(self.lapic_irr) or (self.irq_source is not None and self.irq_source.has_interrupt())

    def ack_interrupt(self) -> int:
        """kvm_cpu_get_interrupt: the vector to deliver, of the controller in user space first."""
        if self.irq_source is not None and self.irq_source.has_interrupt():
            return self.irq_source.ack()
        vector = max(self.lapic_irr)
        self.lapic_irr.remove(vector)
        return vector

    def apic_set_irq(self, vector: int) -> None:
        """kvm_apic_set_irq with a fixed vector to this vCPU."""
        self.lapic_irr.add(vector)
        kvm_make_request(KVM_REQ_EVENT, self)
        kvm_vcpu_kick(self)

    # -- answers of user space ------------------------------------------------------------------

    def complete_io(self, data: int) -> None:
        """The value read from the port of an `io` exit."""
        self.user_data = data

    def complete_mmio(self, data: int) -> None:
        """The value read by an `mmio` exit."""
        self.user_data = data

    def complete_hypercall(self, ret: int) -> None:
        """The result of a `hypercall` exit."""
        self.user_data = ret

    def __repr__(self) -> str:
        return f"<Vcpu {self.vcpu_id}>"
