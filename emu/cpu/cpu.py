"""The CPUs of one VM: kvm_model's KvmX86Ops on Unicorn.

`vcpu_run` is a VM entry: it injects, runs slices of guest code and comes back with a VmExit. What
leaves emu_start is a refused fill (faults.py) or a stop (stops.py). Under EPT the exception bitmap is empty;
without it #PF exits. Nothing here runs inside a Unicorn callback.

Time: each guest instruction takes `NS_PER_INSN`; a slice never runs past the next timer. Between slices
other tasks may run while the vCPU stays in guest mode, until somebody kicks it.

Source: arch/x86/include/asm/kvm_host.h: struct kvm_x86_ops; Intel SDM vol. 3C 26.1.2, 26.1.3
(instructions that exit), 26.8 (event injection), 28 (VM exits); arch/x86/kvm/vmx/vmx.c.

Not modelled: NMI blocking, debug exceptions of hardware breakpoints, monitor trap flag, posted
interrupts, preemption timer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from emu.cpu import mmio, msr
from emu.cpu.apic_access import apic_access
from emu.cpu.cpuid import cpuid
from emu.cpu.env import HF_INHIBIT_IRQ
from emu.cpu.events import deliver, exception_info, is_hardware_exception, memory_vmexit
from emu.cpu.faults import FillFailures
from emu.cpu.fill_body import APIC_ACCESS, P_REFUSED
from emu.cpu.insn import Decoder
from emu.cpu.memory import GuestFault, GuestNotSupported, MemoryExit
from emu.cpu.portio import finish_element
from emu.cpu.registers import GENERAL_REGISTERS, read_register, write_register
from emu.cpu.smm import rsm_load_state, smm_enter, smm_save_state
from emu.cpu.stops import COST_RDTSC, Stops
from emu.cpu.vcpu import EMU_EXCEPTION, EMU_INSN_INVALID, EMU_OK, UnicornVcpu
from emu.cpu.walk import OK
from emu.loaders.image import BOOT_CR3, BOOT_GDT, BOOT_STACK, GDT_CODE32, GDT_CODE64, GDT_DATA, GDT_LIMIT
from kvm_model.kvm_x86_ops import EMULATE_RETRY, PT32E_ROOT_LEVEL
from kvm_model.mmu.mmu_roots import kvm_mmu_flush_ahead
from kvm_model.requests import IN_GUEST_MODE
from kvm_model.vmx.ept import make_eptp
from kvm_model.vmx.exits import (
    INTR_INFO_VALID,
    REASON_EPT_MISCONFIG,
    REASON_EXTERNAL_INTERRUPT,
    REASON_INVALID_STATE,
    VmExit,
)

if TYPE_CHECKING:
    from emu.cpu.fill import FillResult
    from emu.loaders.image import Image
    from host_mm.host import HostMm
    from host_mm.kernel.sched import Scheduler
    from kvm_model.kvm_x86_ops import MmioAccess
    from kvm_model.vcpu import Vcpu

__all__ = ["COST_RDTSC", "EXIT_INSNS", "NS_PER_INSN", "SLICE_INSNS", "UnicornCpu"]

NS_PER_INSN = 1
SLICE_INSNS = 1_000_000
"""Guest instructions: a tick of HZ=1000, 1 to 20 ms of real time. After 50 ms Ctrl-C would feel late."""
EXIT_INSNS = 10_000
"""What an exit takes from the slice: handling it here takes as long as thousands of instructions."""

_EMULATE_RETRIES = 64
_IF = 1 << 9


class UnicornCpu:
    """All vCPUs of a VM. KVM's vCPU objects name them by `vcpu_id`; a new number is a new CPU.

    `exit_filter(vcpu, vmexit)`: true for an exit that KVM is not to see; the guest is then entered
    again. `ept_ad`: EPTP bit 6 from the next load_mmu_pgd or flush_tlb on. Without `ept` it runs on tables
    that KVM makes of the guest's: shadow_walk.py, cr_exits.py.
    """

    def __init__(
        self, host: HostMm, sched: Scheduler, *, interpreted: bool = False, ept: bool = True,
        params: dict[str, str] | None = None,
    ) -> None:
        self.host = host
        self.ram = host.ram
        self.sched = sched
        self.interpreted = interpreted
        self.ept = ept
        self.ept_ad = (params or {}).get("kvm_intel.eptad", "Y") not in ("0", "N", "n")
        self.unsupported = ""
        self.exit_filter: Callable[[Vcpu, VmExit], bool] | None = None
        self.slice_insns = SLICE_INSNS
        self.vcpus: dict[int, UnicornVcpu] = {}
        self.decoder = Decoder()
        self.fills = FillFailures(self.vcpus, self.decoder)
        self.stops = Stops(sched, self.fills, ept=ept)
        self._retries: dict[int, tuple[int, int]] = {}
        self._root: dict[int, int] = {}

    def vcpu(self, vcpu: Vcpu) -> UnicornVcpu:
        """The CPU behind KVM's vCPU, made on first use."""
        found = self.vcpus.get(vcpu.vcpu_id)
        if found is None:
            found = UnicornVcpu(
                self.ram, vcpu.vcpu_id, interpreted=self.interpreted, shadow=not self.ept
            )
            self.vcpus[vcpu.vcpu_id] = found
        return found

    def close(self) -> None:
        """Give all Unicorn instances back."""
        for found in self.vcpus.values():
            found.close()
        self.vcpus.clear()

    # -- starting ------------------------------------------------------------------------------

    def start_image(self, vcpu: Vcpu, image: Image) -> None:
        """Put the vCPU where a loaded image wants to start. The image's boot structures must be in memory."""
        v = self.vcpu(vcpu)
        if image.mode == "long":
            v.start_long(image.entry, BOOT_CR3, BOOT_GDT, GDT_LIMIT, GDT_CODE64, GDT_DATA)
            v.env.set_reg(4, BOOT_STACK)
        else:
            v.start_protected(image.entry, BOOT_GDT, GDT_LIMIT, GDT_CODE32, GDT_DATA)
        for name, value in image.registers.items():
            v.env.set_reg(GENERAL_REGISTERS[name], value)

    def start_like(self, vcpu: Vcpu, other: Vcpu, entry: int, stack: int, args: tuple[int, int]) -> None:
        """64-bit mode with the control registers and tables of `other`, RDI and RSI from `args`."""
        v = self.vcpu(vcpu)
        v.start_like(self.vcpu(other), entry)
        v.env.set_reg(4, stack)
        v.env.set_reg(7, args[0])
        v.env.set_reg(6, args[1])

    # -- running -------------------------------------------------------------------------------

    def vcpu_run(self, vcpu: Vcpu) -> VmExit:
        """VM entry: inject `vcpu.entry_intr_info` if valid, run until a VM exit, return it."""
        v = self.vcpu(vcpu)
        if not self.ept:
            v.fill.load_pdptes()
        info, error, length = vcpu.entry_intr_info, vcpu.entry_error_code, vcpu.entry_insn_len
        vcpu.entry_intr_info = 0
        while True:
            try:
                vmexit = self._enter(vcpu, v, info, error, length)
            except GuestNotSupported as exc:
                # As a CPU without that mode would refuse the state; the VMM tells why.
                self.unsupported = str(exc)
                return VmExit(REASON_INVALID_STATE, v.env.eip)
            if self.exit_filter is None or not self.exit_filter(vcpu, vmexit):
                return vmexit
            info, error = vmexit.idt_vectoring_info, vmexit.idt_vectoring_error
            length = vmexit.insn_len if info & INTR_INFO_VALID else 0

    def _enter(self, vcpu: Vcpu, v: UnicornVcpu, info: int, error: int, length: int) -> VmExit:
        vmexit = None
        if not self.ept and is_hardware_exception(info):
            # KVM found the rest's fault to be the guest's own: the instruction starts anew after it.
            v.deferred = None
        if v.deferred is not None:
            vmexit = self._guest_step(v, v.run_deferred)
            if vmexit is not None and info & INTR_INFO_VALID and not vmexit.idt_vectoring_info:
                vmexit.idt_vectoring_info, vmexit.idt_vectoring_error, vmexit.insn_len = info, error, length
        if vmexit is None and info & INTR_INFO_VALID:
            vmexit = deliver(v, info, error, length)
        if vmexit is not None:
            return vmexit
        v.intercepts.request_interrupt_window(vcpu.irq_window)
        while True:
            if vcpu.kicked:
                return VmExit(REASON_EXTERNAL_INTERRUPT, v.env.eip)
            if v.slice_left <= 0:
                v.slice_left = self.slice_insns
                self._between_slices()
                continue
            before = v.counter.count
            vmexit = self._run_slice(v, v.slice_left)
            v.slice_left -= v.counter.count - before
            if vmexit is not None:
                v.slice_left -= EXIT_INSNS
                return vmexit

    def _between_slices(self) -> None:
        # Always by way of the hub: limits and Ctrl-C are looked at there, even with one task.
        if self.sched.preempt:
            self.sched.point("slice")
        self.sched.yield_()

    def _run_slice(self, v: UnicornVcpu, budget: int) -> VmExit | None:
        timer = self.sched.next_timer()
        if timer is not None:
            budget = min(budget, (timer - self.sched.now) // NS_PER_INSN)
        if v.stale:
            v.drop_stale_code()
        if v.evict:
            v.evict = False
            v.intercepts.flush_tlb()
        # an opened frame or an implicit page is for the next instruction alone
        alone = v.opened is not None or v.fill.implicit_page is not None
        v.counter.allow(1 if alone else budget)
        params = v.fill.params
        refused, count = params[P_REFUSED], v.counter.count
        error = v.emu_start()
        self.sched.advance((v.counter.count - count) * NS_PER_INSN)
        if alone:
            self.fills.close_opened(v)
            v.fill.implicit_page = None
        if error == EMU_OK:
            v.stepped_from = None
            return None
        if v.fill.error is not None:
            raise v.fill.error
        return self._guest_step(v, lambda: self._stopped(v, error, params[P_REFUSED] != refused))

    def _guest_step(self, v: UnicornVcpu, step: Callable[[], VmExit | None]) -> VmExit | None:
        """Do something for the guest that may fault or exit; faults are delivered to it."""
        try:
            return step()
        except MemoryExit as exit_:
            return memory_vmexit(v, exit_)
        except GuestFault as fault:
            info = exception_info(fault.vector, fault.error_code is not None)
            return deliver(v, info, fault.error_code or 0, 0, fault.cr2)

    def _apic_access(self, v: UnicornVcpu, last: FillResult) -> VmExit | None:
        gpa = last.a & ~0xFFF | v.env.invalid_addr & 0xFFF
        return apic_access(v, self.fills.decode(v), gpa, last.access)

    def _stopped(self, v: UnicornVcpu, error: int, refused: bool) -> VmExit | None:
        if error == EMU_EXCEPTION and refused:
            last = v.fill.last()
            if last.status == APIC_ACCESS and not self.fills.ahead(v, last):
                return self._apic_access(v, last)
            if last.status != OK:
                self.fills.handle(v, last)
                return None
        v.stepped_from = None
        if error == EMU_INSN_INVALID:
            return self.stops.undefined(v)
        if error != EMU_EXCEPTION:
            raise RuntimeError(f"Unicorn stopped with error {error} at rip {v.env.eip:#x}")
        return self.stops.handle(v, v.intercepts.stop_reason())

    @property
    def instructions(self) -> int:
        """Guest instructions so far, over all vCPUs."""
        return sum(v.counter.count for v in self.vcpus.values())

    # -- translations --------------------------------------------------------------------------

    def flush_tlb(self, vcpu: Vcpu) -> None:
        """Empty the vCPU's translations of every kind (INVEPT of its root, or INVVPID)."""
        v = self.vcpu(vcpu)
        if self.ept:
            root = self._root.get(v.vcpu_id, 0)
            v.fill.eptp = make_eptp(root, self.ept_ad) if root else 0
        v.fill.flush()

    def flush_tlb_guest(self, vcpu: Vcpu) -> None:
        """Empty the vCPU's translations: it has no others than the guest's."""
        self.vcpu(vcpu).fill.flush()

    def flush_tlb_gva(self, vcpu: Vcpu, gva: int) -> None:
        """Forget what translates `gva`: no flush that rests on an epoch, since that is of one address."""
        self.vcpu(vcpu).intercepts.flush_tlb()

    def may_translate(self, vcpu: Vcpu, pfn: int) -> bool:
        """Whether the vCPU could still use a translation to the frame: it has one and no flush ahead."""
        v = self.vcpus.get(vcpu.vcpu_id)
        if v is None or not v.fill.may_reach(pfn):
            return False
        return vcpu.mode == IN_GUEST_MODE or not kvm_mmu_flush_ahead(vcpu)

    def may_store(self, vcpu: Vcpu, pfn: int) -> bool:
        """Whether the vCPU could still write to the frame unseen, by a translation that it has."""
        v = self.vcpus.get(vcpu.vcpu_id)
        if v is None or not v.fill.may_write(pfn):
            return False
        return vcpu.mode == IN_GUEST_MODE or not kvm_mmu_flush_ahead(vcpu)

    def evict_tlb(self, vcpu: Vcpu) -> None:
        """Empty the TLB before the vCPU runs on, as hardware may at any time: no new epoch."""
        self.vcpu(vcpu).evict = True

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int) -> None:
        """Use the root at `root_hpa` from the next entry on: as EPTP, or as CR3 without EPT."""
        v = self.vcpu(vcpu)
        if not self.ept:
            if v.fill.set_root(root_hpa, root_level == PT32E_ROOT_LEVEL):
                v.intercepts.flush_tlb()
            return
        self._root[v.vcpu_id] = root_hpa
        eptp = make_eptp(root_hpa, self.ept_ad)
        if v.fill.eptp != eptp:
            v.fill.eptp = eptp
            # Unicorn's TLB has no EPTP tag; what another root left behind must not be used
            v.intercepts.flush_tlb()

    def smm_save_state(self, vcpu: Vcpu, smbase: int) -> bytes:
        """The SMM save area."""
        return smm_save_state(self.vcpu(vcpu), smbase)

    def smm_enter(self, vcpu: Vcpu, smbase: int) -> None:
        """SMM's environment."""
        smm_enter(self.vcpu(vcpu), smbase)

    def rsm_load_state(self, vcpu: Vcpu, image: bytes) -> int:
        """RSM; the SMBASE, or -1."""
        return rsm_load_state(self.vcpu(vcpu), image)

    def set_apic_pages(self, vcpu: Vcpu, access: int, virtual: int) -> None:
        """The VMCS's APIC-access and virtual-APIC addresses, from the next fill on."""
        v = self.vcpu(vcpu)
        v.fill.set_apic_access_page(access)
        v.virtual_apic = virtual

    def enable_pml(self, vcpu: Vcpu, vmcs: int) -> None:
        """Log what sets an EPT dirty flag, as the VMCS says; 0: do not."""
        self.vcpu(vcpu).fill.set_vmcs(vmcs)

    # -- KVM's view of the guest's state -----------------------------------------------------------

    def emulate(self, vcpu: Vcpu, gpa: int, code: bytes | None = None) -> MmioAccess | None:
        """Start the instruction at RIP, whose memory operand is at `gpa`; None if it is unknown.

        With `code`, its bytes, as KVM sees the guest: by linear addresses.
        """
        v = self.vcpu(vcpu)
        try:
            if code is not None:
                insn = self.decoder.decode(code, v.code_bits)
            else:
                insn = self.fills.decode(v)
                if insn is None and self.fills.code_gone(v, gpa) and self._again(v):
                    return EMULATE_RETRY
            access = mmio.emulate(v, insn, gpa)
        except MemoryExit as exit_:
            return EMULATE_RETRY if exit_.reason != REASON_EPT_MISCONFIG and self._again(v) else None
        except GuestFault:
            return None
        if access is not None:
            self._retries.pop(v.vcpu_id, None)
            access.insn = bytes(insn.bytes)
            access.mode = 9 if v.long_code else 5
        return access

    def _again(self, v: UnicornVcpu) -> bool:
        # An instruction that nobody can decode, at the end of a page, may look as if its rest were gone.
        rip, count = self._retries.get(v.vcpu_id, (0, 0))
        count = count + 1 if rip == v.env.eip else 1
        self._retries[v.vcpu_id] = v.env.eip, count
        return count <= _EMULATE_RETRIES

    def complete_mmio(self, vcpu: Vcpu, access: MmioAccess, data: int) -> MmioAccess | None:
        """Finish an access. A read-modify-write's load gives back its store, to be made and finished too."""
        finish = cast("mmio.Finish", access.priv)
        store = finish(data & ((1 << (8 * access.length)) - 1))
        if store is not None:
            store.insn, store.mode, store.parts = access.insn, access.mode, access.parts
            if store.gva < 0:
                store.gva = access.gva
        return store

    def get_reg(self, vcpu: Vcpu, name: str) -> int:
        """A register by its name in registers.py."""
        v = self.vcpu(vcpu)
        if name == "rax" and v.vcpu_id in self.stops.elements:
            return self.stops.elements[v.vcpu_id].data
        return read_register(v, name)

    def set_reg(self, vcpu: Vcpu, name: str, value: int) -> None:
        """Write a register: rax..r15, rip, rflags, cr0..cr4, efer."""
        v = self.vcpu(vcpu)
        if name == "rax" and v.vcpu_id in self.stops.elements:
            self.stops.elements[v.vcpu_id].data = value
        else:
            write_register(v, name, value)

    def get_msr(self, vcpu: Vcpu, index: int) -> int | None:
        """An MSR's value, or None where reading it is #GP."""
        v = self.vcpu(vcpu)
        return msr.read_msr(v, index, self.stops.tsc(v))

    def set_msr(self, vcpu: Vcpu, index: int, value: int) -> bool:
        """Write an MSR; False where writing that is #GP."""
        if index == msr.MSR_TSC:
            self.stops.tsc_offset[vcpu.vcpu_id] = value - self.sched.now
            return True
        return msr.write_msr(self.vcpu(vcpu), index, value)

    def cpuid(self, vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        return cpuid(leaf, subleaf, vcpu.vcpu_id, len(self.vcpus), vcpu.kvm.profile.version_code)

    def skip_emulated_instruction(self, vcpu: Vcpu, insn_len: int) -> None:
        """Step RIP over an instruction that KVM emulated; ends an STI shadow."""
        v = self.vcpu(vcpu)
        element = self.stops.elements.pop(v.vcpu_id, None)
        if element is not None:
            finish_element(v, element)
        else:
            v.skip(insn_len)

    def interrupt_allowed(self, vcpu: Vcpu) -> bool:
        """RFLAGS.IF and no STI or MOV-SS shadow."""
        env = self.vcpu(vcpu).env
        return bool(env.eflags & _IF) and not env.hflags & HF_INHIBIT_IRQ
