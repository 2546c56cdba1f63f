"""Model-specific registers: what this CPU has. Everything else is #GP.

Source: Intel SDM vol. 4 (tables 2-2 ff.); arch/x86/kvm/x86.c: kvm_set_msr_common,
kvm_get_msr_common, set_efer; arch/x86/kvm/vmx/vmx.c: vmx_possible_passthrough_msrs.

Not modelled: performance counters, machine checks, x2APIC, MTRR effects, PAT effects.
"""

from __future__ import annotations

from emu.cpu.env import (
    CSTAR,
    FMASK,
    KERNEL_GS_BASE,
    LSTAR,
    R_FS,
    R_GS,
    SEG_SIZE,
    SEGS,
    STAR,
    SYSENTER_CS,
    SYSENTER_EIP,
    SYSENTER_ESP,
    TSC_AUX,
)
from emu.cpu.paging import CR0_PG, CR4_LA57, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, is_canonical
from emu.cpu.vcpu import UnicornVcpu

__all__ = ["MSR_EFER", "MSR_TSC", "PASSTHROUGH", "read_msr", "write_msr"]

MSR_TSC = 0x10
MSR_EFER = 0xC0000080
_MSR_APIC_BASE = 0x1B
_MSR_PAT = 0x277
_MSR_TSC_AUX = 0xC0000103
_EFER_KNOWN = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE

_BASES = {
    0xC0000100: SEGS + SEG_SIZE * R_FS + 8,
    0xC0000101: SEGS + SEG_SIZE * R_GS + 8,
    0xC0000102: KERNEL_GS_BASE,
    0xC0000082: LSTAR,
    0xC0000083: CSTAR,
    0x175: SYSENTER_ESP,
    0x176: SYSENTER_EIP,
}
"""MSRs that hold an address, by the place of it in CPUX86State. Writes must be canonical."""
_PLAIN = {0xC0000081: STAR, 0xC0000084: FMASK, 0x174: SYSENTER_CS}

PASSTHROUGH = frozenset((0xC0000100, 0xC0000101, 0xC0000102, 0x174, 0x175, 0x176, MSR_TSC))
"""Those whose accesses do not exit under KVM; of MSR_TSC only reads."""

_CONSTANT = {
    0x17: 0, 0x3A: 1, 0x8B: 0, 0xCE: 0, 0xFE: 0x508, 0x179: 0, 0x17A: 0, 0x198: 0,
    0x1A0: 1 | 1 << 11 | 1 << 12,
}
"""Read as given; writes of any value are ignored where Linux probes them so."""
_STORED = {_MSR_PAT: 0x0007040600070406, 0x2FF: 0xC06, 0x3B: 0, 0x1D9: 0}
"""Kept as written, with the value after reset."""
_PAT_TYPES = (0, 1, 4, 5, 6, 7)


def read_msr(vcpu: UnicornVcpu, index: int, tsc: int) -> int | None:
    """The value, or None where RDMSR is #GP. `tsc` is what the time-stamp counter shows."""
    env = vcpu.env
    if index in _BASES:
        return env.q[_BASES[index] // 8]
    if index in _PLAIN:
        return env.q[_PLAIN[index] // 8] & (0xFFFF if index == 0x174 else (1 << 64) - 1)
    if index == MSR_EFER:
        return env.efer
    if index == MSR_TSC:
        return tsc
    if index == _MSR_TSC_AUX:
        return env.q[TSC_AUX // 8]
    if index == _MSR_APIC_BASE:
        return 0xFEE00000 | (1 << 8 if vcpu.vcpu_id == 0 else 0)
    if index in _STORED:
        return vcpu.msrs.get(index, _STORED[index])
    if 0x200 <= index < 0x210 or index in (0x250, 0x258, 0x259) or 0x268 <= index < 0x270:
        return vcpu.msrs.get(index, 0)
    return _CONSTANT.get(index)


def write_msr(vcpu: UnicornVcpu, index: int, value: int) -> bool:
    """Write; False where WRMSR is #GP. The time-stamp counter is the CPU's (UnicornCpu.write_tsc)."""
    env = vcpu.env
    if index in _BASES:
        # By what the CPU has, not by the mode it is in.
        if not is_canonical(value, CR4_LA57):
            return False
        env.q[_BASES[index] // 8] = value
        return True
    if index in _PLAIN:
        env.q[_PLAIN[index] // 8] = value & (0xFFFF if index == 0x174 else (1 << 64) - 1)
        return True
    if index == MSR_EFER:
        return _write_efer(vcpu, value)
    if index == _MSR_TSC_AUX:
        env.q[TSC_AUX // 8] = value & 0xFFFFFFFF
        return value >> 32 == 0
    if index == _MSR_PAT and any(value >> (8 * n) & 0xFF not in _PAT_TYPES for n in range(8)):
        return False
    if index in _STORED or 0x200 <= index < 0x210 or index in (0x250, 0x258, 0x259) or 0x268 <= index < 0x270:
        vcpu.msrs[index] = value
        return True
    return index in _CONSTANT or index == _MSR_APIC_BASE


def _write_efer(vcpu: UnicornVcpu, value: int) -> bool:
    env = vcpu.env
    old = env.efer
    if value & ~_EFER_KNOWN:
        return False
    if env.cr(0) & CR0_PG and (value ^ old) & EFER_LME:
        return False
    env.efer = value & ~EFER_LMA | old & EFER_LMA
    if (value ^ old) & EFER_NXE:
        vcpu.fill.flush()
    return True
