"""How KVM meets the CPU: the kernel's kvm_x86_ops, as far as this model calls it.

emu implements it on Unicorn; a test may pass a scripted CPU. KVM never touches the CPU otherwise.

Being kicked: `kvm_vcpu_kick` and the requests that wait set `vcpu.kicked`. A CPU whose slice was
switched away must look at it before it executes another instruction and then leave with
REASON_EXTERNAL_INTERRUPT: that is what makes a remote flush complete when it was asked for.

Not modelled: nested virtualisation, SVM, posted interrupts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from kvm_model.vmx.exits import VmExit

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = ["EMULATE_RETRY", "PT32E_ROOT_LEVEL", "KvmX86Ops", "MmioAccess"]

PT32E_ROOT_LEVEL = 3


class MmioAccess(msgspec.Struct):
    """The memory operand of an instruction that KVM emulates, at most 8 bytes.

    `data` is what a store writes. A `lock`ed store is made only if memory still holds `old`. `parts`:
    (gpa, length) of the two pieces of an access that crosses a page; without them it is all at the gpa that
    exited. `gva` is the access's linear address where KVM translates itself, -1 elsewhere; `page_table`:
    instructions of this kind are what guests write page tables with. `insn` and `mode` (kvm_emulate_insn's
    flags: prot64 is 9, prot32 5, prot16 1, real 0) are for the trace. What else the CPU needs to finish it
    keeps in `priv`.
    """

    write: bool
    length: int
    data: int = 0
    insn: bytes = b""
    mode: int = 9
    priv: object = None
    lock: bool = False
    old: int = 0
    parts: tuple[tuple[int, int], ...] = ()
    gva: int = -1
    page_table: bool = False


EMULATE_RETRY = MmioAccess(False, 0)
"""Let the guest execute the instruction again."""


class KvmX86Ops(Protocol):
    """The CPU under one VM. `vcpu` is always KVM's object; `vcpu.vcpu_id` tells which."""

    def vcpu_run(self, vcpu: Vcpu) -> VmExit:
        """VM entry: inject `vcpu.entry_intr_info` if valid, run until a VM exit, return it."""
        ...

    def flush_tlb(self, vcpu: Vcpu) -> None:
        """Empty the vCPU's translations of every kind (INVEPT of its root)."""
        ...

    def flush_tlb_guest(self, vcpu: Vcpu) -> None:
        """Empty what the guest can see of its translations (INVVPID)."""
        ...

    def evict_tlb(self, vcpu: Vcpu) -> None:
        """Lose translations, as a TLB may at any time: no flush that KVM may count on."""
        ...

    def flush_tlb_gva(self, vcpu: Vcpu, gva: int) -> None:
        """Lose what translates the linear address `gva` (INVVPID of one address)."""
        ...

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int) -> None:
        """Use the root at `root_hpa` from the next entry on: of EPT, or of the tables that CR3 is to hold,
        which are PAE paging's at level PT32E_ROOT_LEVEL."""
        ...

    def enable_pml(self, vcpu: Vcpu, vmcs: int) -> None:
        """Log what sets an EPT dirty flag as the VMCS at physical address `vmcs` says; 0: do not."""
        ...

    def set_apic_pages(self, vcpu: Vcpu, access: int, virtual: int) -> None:
        """Accesses that translate to the page at `access` are to the APIC registers at `virtual`."""
        ...

    def smm_save_state(self, vcpu: Vcpu, smbase: int) -> bytes:
        """The SMM save area of the state that an SMI interrupts (struct kvm_smram_state_64)."""
        ...

    def smm_enter(self, vcpu: Vcpu, smbase: int) -> None:
        """Put the vCPU where SMM code begins."""
        ...

    def rsm_load_state(self, vcpu: Vcpu, image: bytes) -> int:
        """Restore a save area; the SMBASE that it has, or -1: it is no state to go back to."""
        ...

    def emulate(self, vcpu: Vcpu, gpa: int, code: bytes | None = None) -> MmioAccess | None:
        """Decode and start the instruction at RIP, whose memory operand is at `gpa`, MMIO or not.

        None where the instruction cannot be emulated, EMULATE_RETRY where its bytes or its other
        operand are not mapped (any more): the guest then meets that fault itself. With `code`, the
        instruction's bytes, no access goes by the CPU's own walk: each is told with its linear address.
        """
        ...

    def complete_mmio(self, vcpu: Vcpu, access: MmioAccess, data: int) -> MmioAccess | None:
        """Finish an emulated access: put `data` where a load wants it, set flags, step RIP.

        Completing the load of a read-modify-write gives its store to the same place, that of a move
        between two places the store to the other, which KVM makes and completes in turn.
        """
        ...

    def get_reg(self, vcpu: Vcpu, name: str) -> int:
        """A register by its lower-case name: rax..r15, rip, rflags, cr0..cr4, efer, pdptr0..pdptr3, cs..."""
        ...

    def set_reg(self, vcpu: Vcpu, name: str, value: int) -> None:
        """Write a register."""
        ...

    def get_msr(self, vcpu: Vcpu, index: int) -> int | None:
        """An MSR's value, or None where reading it is #GP."""
        ...

    def set_msr(self, vcpu: Vcpu, index: int, value: int) -> bool:
        """Write an MSR; False where writing that is #GP."""
        ...

    def cpuid(self, vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        ...

    def skip_emulated_instruction(self, vcpu: Vcpu, insn_len: int) -> None:
        """Step RIP over an instruction that KVM emulated; ends an STI shadow."""
        ...

    def interrupt_allowed(self, vcpu: Vcpu) -> bool:
        """RFLAGS.IF and no STI or MOV-SS shadow."""
        ...
