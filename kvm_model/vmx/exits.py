"""VM exits as VMX reports them: basic reasons, the EPT-violation qualification, VmExit.

Source: Intel SDM vol. 3C, Appendix C (basic exit reasons), Table 28-7 (exit qualification for EPT
violations), Table 28-5 (I/O instructions), section 25.8.3 (VM-entry event injection) and 28.2.2
(VM-exit interruption information).

EPT-violation exit qualification:

    63        12 11 10  9  8  7  6 5 4 3 2 1 0
    +-----------+--+--+--+--+--+--+-+-+-+-+-+-+
    | reserved  |NX|RW|US|FT|GV| 0|X|W|R|X|W|R|
    +-----------+--+--+--+--+--+--+-+-+-+-+-+-+
                 |  |  |  |  |    \\___/ \\___/
                 |  |  |  |  |  entry's  access
                 |  |  |  |  guest linear address valid
                 |  |  |  final translation (1) or guest paging-structure access (0)
                 advanced information (not reported by this CPU)

Not modelled: exits of what this CPU has not: VMX instructions, SGX, XSAVES, the preemption timer, posted
interrupts, NMI windows.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "EPT_ACC_EXEC", "EPT_ACC_READ", "EPT_ACC_WRITE", "EPT_ENTRY_EXEC", "EPT_ENTRY_READ",
    "EPT_ENTRY_WRITE", "EPT_GVA_TRANSLATED", "EPT_GVA_VALID", "EXIT_REASON_NAMES",
    "INTR_INFO_DELIVER_CODE", "INTR_INFO_VALID", "INTR_TYPE_EXT_INTR", "INTR_TYPE_HARD_EXCEPTION",
    "INTR_TYPE_NMI", "INTR_TYPE_SOFT_EXCEPTION", "INTR_TYPE_SOFT_INTR",
    "REASON_APIC_ACCESS", "REASON_APIC_WRITE", "REASON_CPUID", "REASON_CR_ACCESS", "REASON_EPT_MISCONFIG",
    "REASON_EPT_VIOLATION",
    "REASON_EXCEPTION_NMI", "REASON_EXTERNAL_INTERRUPT", "REASON_HLT", "REASON_INTERRUPT_WINDOW",
    "REASON_INVALID_STATE", "REASON_INVLPG", "REASON_IO_INSTRUCTION", "REASON_MSR_READ", "REASON_MSR_WRITE",
    "REASON_PML_FULL",
    "REASON_TRIPLE_FAULT", "REASON_VMCALL", "VmExit",
]

REASON_EXCEPTION_NMI = 0
REASON_EXTERNAL_INTERRUPT = 1
REASON_TRIPLE_FAULT = 2
REASON_INTERRUPT_WINDOW = 7
REASON_CPUID = 10
REASON_HLT = 12
REASON_INVLPG = 14
REASON_VMCALL = 18
REASON_CR_ACCESS = 28
REASON_IO_INSTRUCTION = 30
REASON_MSR_READ = 31
REASON_MSR_WRITE = 32
REASON_INVALID_STATE = 33
REASON_APIC_ACCESS = 44
REASON_EPT_VIOLATION = 48
REASON_EPT_MISCONFIG = 49
REASON_APIC_WRITE = 56
REASON_PML_FULL = 62

EXIT_REASON_NAMES = {
    REASON_EXCEPTION_NMI: "EXCEPTION_NMI",
    REASON_EXTERNAL_INTERRUPT: "EXTERNAL_INTERRUPT",
    REASON_TRIPLE_FAULT: "TRIPLE_FAULT",
    REASON_INTERRUPT_WINDOW: "INTERRUPT_WINDOW",
    REASON_CPUID: "CPUID",
    REASON_HLT: "HLT",
    REASON_INVLPG: "INVLPG",
    REASON_VMCALL: "VMCALL",
    REASON_CR_ACCESS: "CR_ACCESS",
    REASON_IO_INSTRUCTION: "IO_INSTRUCTION",
    REASON_MSR_READ: "MSR_READ",
    REASON_MSR_WRITE: "MSR_WRITE",
    REASON_INVALID_STATE: "INVALID_STATE",
    REASON_APIC_ACCESS: "APIC_ACCESS",
    REASON_APIC_WRITE: "APIC_WRITE",
    REASON_EPT_VIOLATION: "EPT_VIOLATION",
    REASON_EPT_MISCONFIG: "EPT_MISCONFIG",
    REASON_PML_FULL: "PML_FULL",
}
"""arch/x86/include/uapi/asm/vmx.h: VMX_EXIT_REASONS, those this CPU produces."""

EPT_ACC_READ = 1 << 0
EPT_ACC_WRITE = 1 << 1
EPT_ACC_EXEC = 1 << 2
EPT_ENTRY_READ = 1 << 3
EPT_ENTRY_WRITE = 1 << 4
EPT_ENTRY_EXEC = 1 << 5
EPT_GVA_VALID = 1 << 7
EPT_GVA_TRANSLATED = 1 << 8

INTR_INFO_VALID = 1 << 31
INTR_INFO_DELIVER_CODE = 1 << 11
INTR_TYPE_EXT_INTR = 0 << 8
INTR_TYPE_NMI = 2 << 8
INTR_TYPE_HARD_EXCEPTION = 3 << 8
INTR_TYPE_SOFT_INTR = 4 << 8
INTR_TYPE_SOFT_EXCEPTION = 6 << 8


class VmExit(msgspec.Struct):
    """What the CPU leaves in the VMCS at a VM exit. All integers; 0 where not defined.

    `qualification` is the exit qualification of the reason; `guest_linear` and `guest_physical`
    are full addresses; `insn_len` is bytes; `idt_vectoring_info`/`idt_vectoring_error` say which
    event's delivery was cut off, in VM-entry interruption format, valid bit included.
    """

    reason: int
    rip: int
    qualification: int = 0
    guest_linear: int = 0
    guest_physical: int = 0
    insn_len: int = 0
    intr_info: int = 0
    error_code: int = 0
    idt_vectoring_info: int = 0
    idt_vectoring_error: int = 0
