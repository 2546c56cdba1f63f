"""The guest's clock, as the VMM's ioctls change it. Source: arch/x86/kvm/x86.c; Linux 6.18.

Both make KVM write each vCPU's page of the time anew, before that enters the guest again.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from host_mm.kernel.errors import KernelError
from kvm_model.pvclock import kvm_set_guest_paused, kvm_vm_ioctl_set_clock

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation(example="set_clock(ns=1_000_000_000)")
def set_clock(board: Board, ns: int) -> int:
    """KVM_SET_CLOCK: the guest's kvmclock shows `ns` now and goes on from there."""
    if not 0 <= ns < 1 << 63:
        raise KernelError(errno.EINVAL, f"the time is no {ns} ns")
    kvm_vm_ioctl_set_clock(board.kvm, ns)
    return 0


@operation(example="kvmclock_ctrl(cpu=0)")
def kvmclock_ctrl(board: Board, cpu: int = 0) -> int:
    """KVM_KVMCLOCK_CTRL: tell the guest on `cpu` that it was stopped; answers 1, without a clock 0."""
    if not 0 <= cpu < len(board.vcpus):
        raise KernelError(errno.EINVAL, f"cpu {cpu}: want 0 to {len(board.vcpus) - 1}")
    return int(kvm_set_guest_paused(board.vcpus[cpu]))
