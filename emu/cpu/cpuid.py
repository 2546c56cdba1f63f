"""CPUID: one fixed CPU, no more than Unicorn executes and the walk models.

Source: Intel SDM vol. 2A CPUID; AMD APM vol. 3 for 8000_000xH; emu/abi.py for the hypervisor's leaves.

Present: long mode, NX, SYSCALL, 1 GiB pages, SSE to SSE4.2, CMPXCHG16B, POPCNT, SMEP, SMAP, PSE, PGE,
PSE36, PAT, TSC, MSR, RDTSCP, 5-level paging. Absent although Unicorn knows some: AVX, XSAVE, RDRAND (not
deterministic), PCID, INVPCID, APIC (KVM shows it where it has one), MONITOR, SVM, VMX, protection keys.

Not modelled: cache and topology leaves beyond what makes Linux content.
"""

from __future__ import annotations

from emu.abi import CPUID_KERNEL_LEAF, CPUID_SIGNATURE_LEAF, cpuid_kernel_leaf, cpuid_signature_leaf
from emu.cpu.paging import MAXPHYADDR

__all__ = ["CPU_MODEL", "cpuid"]

CPU_MODEL = "refault virtual CPU"

_VENDOR = b"GenuineIntel"
_MAX_BASIC = 0x7
_MAX_EXTENDED = 0x8000_0008
_FAMILY_MODEL_STEPPING = 0x000306C3

# FPU VME DE PSE TSC MSR PAE CX8 SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
_FEATURES_1_EDX = sum(
    1 << b for b in (0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26)
)
# SSE3 SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT HYPERVISOR
_FEATURES_1_ECX = sum(1 << b for b in (0, 9, 13, 19, 20, 22, 23, 31))
# FSGSBASE BMI1 SMEP BMI2 ERMS SMAP
_FEATURES_7_EBX = sum(1 << b for b in (0, 3, 7, 8, 9, 20))
# LA57
_FEATURES_7_ECX = 1 << 16
# SYSCALL NX 1GPAGES RDTSCP LM
_FEATURES_8001_EDX = sum(1 << b for b in (11, 20, 26, 27, 29))
# LAHF ABM
_FEATURES_8001_ECX = sum(1 << b for b in (0, 5))
_CLFLUSH_64 = 8 << 8
_LINEAR_BITS = 57


def _u32(data: bytes) -> int:
    return int.from_bytes(data, "little")


def cpuid(
    leaf: int, subleaf: int, vcpu_id: int, nr_vcpus: int, version_code: int
) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of a leaf. Leaves above the basic range answer like the highest basic one.

    `version_code`: the host's kernel, KvmProfile.version_code.
    """
    if leaf & 0xFFFF0000 == CPUID_SIGNATURE_LEAF:
        if leaf == CPUID_SIGNATURE_LEAF:
            return cpuid_signature_leaf()
        return cpuid_kernel_leaf(version_code) if leaf == CPUID_KERNEL_LEAF else (0, 0, 0, 0)
    if leaf & 0xFFFF0000 == 0x8000_0000:
        return _extended(leaf)
    if leaf > _MAX_BASIC:
        leaf = _MAX_BASIC
    if leaf == 0:
        return _MAX_BASIC, _u32(_VENDOR[0:4]), _u32(_VENDOR[8:12]), _u32(_VENDOR[4:8])
    if leaf == 1:
        return (
            _FAMILY_MODEL_STEPPING, vcpu_id << 24 | nr_vcpus << 16 | _CLFLUSH_64,
            _FEATURES_1_ECX, _FEATURES_1_EDX,
        )
    if leaf == 7 and subleaf == 0:
        return 0, _FEATURES_7_EBX, _FEATURES_7_ECX, 0
    return 0, 0, 0, 0


def _extended(leaf: int) -> tuple[int, int, int, int]:
    if leaf == 0x8000_0000:
        return _MAX_EXTENDED, 0, 0, 0
    if leaf == 0x8000_0001:
        return 0, 0, _FEATURES_8001_ECX, _FEATURES_8001_EDX
    if 0x8000_0002 <= leaf <= 0x8000_0004:
        text = CPU_MODEL.encode().ljust(48, b"\0")
        at = 16 * (leaf - 0x8000_0002)
        a, b, c, d = (_u32(text[at + n : at + n + 4]) for n in (0, 4, 8, 12))
        return a, b, c, d
    if leaf == 0x8000_0007:
        return 0, 0, 0, 1 << 8  # invariant TSC
    if leaf == 0x8000_0008:
        return MAXPHYADDR | _LINEAR_BITS << 8, 0, 0, 0
    return 0, 0, 0, 0
