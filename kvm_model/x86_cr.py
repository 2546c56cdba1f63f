"""The guest's control registers and EFER, as KVM sets them.

Source of truth: arch/x86/kvm/x86.c, kvm_cache_regs.h, vmx/vmx.c (Linux 6.18).

Not modelled: CR8.
"""

from __future__ import annotations

__all__ = ["CR0_GUEST_OWNED", "CR4_GUEST_OWNED"]


def _bits(*numbers: int) -> int:
    return sum(1 << n for n in numbers)


CR0_GUEST_OWNED = _bits(3)
"""TS: what a guest without EPT may write without an exit (vmx_l1_guest_owned_cr0_bits)."""
CR4_GUEST_OWNED = _bits(1, 2, 3, 8, 9, 10, 16)
"""PVI TSD DE PCE OSFXSR OSXMMEXCPT FSGSBASE (set_cr4_guest_host_mask, without enable_ept)."""
