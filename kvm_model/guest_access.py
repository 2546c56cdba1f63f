"""KVM's own reads and writes of guest memory, through the memslots and the VMM's mapping.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18): kvm_read_guest_page, kvm_write_guest_page,
kvm_vcpu_read_guest, kvm_vcpu_read_guest_atomic, kvm_vcpu_write_guest, kvm_vcpu_gfn_to_memslot,
kvm_is_visible_memslot, mark_page_dirty_in_slot; kvm_vcpu_memslots; arch/x86/kvm/x86.c:
kvm_arch_vcpu_memslots_id.

A write goes by the host's page tables, past every SPTE: what must hear of it (the dirty log, the TLBs'
code, page_track's nodes) is told here or by the caller.

Not modelled: accesses through a gfn_to_hva_cache; each looks its slot up.
"""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from host_mm.uaccess import copy_from_user, copy_from_user_nofault, copy_to_user
from kvm_model.memslots import (
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
    KVM_USER_MEM_SLOTS,
    KvmMemorySlot,
    KvmMemslots,
    mark_page_dirty_in_slot,
)

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "kvm_is_visible_memslot", "kvm_vcpu_gfn_to_hva", "kvm_vcpu_gfn_to_memslot", "kvm_vcpu_mark_page_dirty",
    "kvm_vcpu_memslots",
    "kvm_vcpu_read_guest", "kvm_vcpu_read_guest_atomic", "kvm_vcpu_write_guest",
]


def kvm_vcpu_memslots(vcpu: Vcpu) -> KvmMemslots:
    """The memslots of the address space that the vCPU is in."""
    return vcpu.kvm.memslots[int(vcpu.smm)]


def kvm_vcpu_gfn_to_memslot(vcpu: Vcpu, gfn: int) -> KvmMemorySlot | None:
    """The slot that holds `gfn` there, one that is being deleted included."""
    return kvm_vcpu_memslots(vcpu).gfn_to_memslot(gfn)


def kvm_is_visible_memslot(slot: KvmMemorySlot) -> bool:
    """Whether guests may find memory there: not one of KVM's own slots, and not one being deleted."""
    return slot.id < KVM_USER_MEM_SLOTS and not slot.flags & KVM_MEMSLOT_INVALID


def kvm_vcpu_gfn_to_hva(vcpu: Vcpu, gfn: int, *, write: bool) -> int:
    """Where the VMM maps `gfn`; -1 if no slot has it, or only one that may not be written."""
    slot = kvm_vcpu_gfn_to_memslot(vcpu, gfn)
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID or (write and slot.flags & KVM_MEM_READONLY):
        return -1
    return slot.gfn_to_hva(gfn)


def kvm_vcpu_mark_page_dirty(vcpu: Vcpu, gfn: int) -> None:
    """`vcpu` changes `gfn` without an SPTE's help."""
    mark_page_dirty_in_slot(vcpu, kvm_vcpu_gfn_to_memslot(vcpu, gfn), gfn)


def _pieces(gpa: int, length: int) -> list[tuple[int, int]]:
    pieces = []
    while length:
        size = min(length, 4096 - (gpa & 0xFFF))
        pieces.append((gpa, size))
        gpa += size
        length -= size
    return pieces


def kvm_vcpu_read_guest(vcpu: Vcpu, gpa: int, length: int) -> bytes:
    """`length` bytes at `gpa`. KernelError(EFAULT) where there is no memory."""
    parts = []
    for at, size in _pieces(gpa, length):
        hva = kvm_vcpu_gfn_to_hva(vcpu, at >> 12, write=False)
        if hva < 0:
            raise KernelError(EFAULT, f"no memslot at gpa {at:#x}")
        parts.append(copy_from_user(vcpu.kvm.process, hva | at & 0xFFF, size))
    return b"".join(parts)


def kvm_vcpu_read_guest_atomic(vcpu: Vcpu, gpa: int, length: int) -> bytes | None:
    """`length` bytes at `gpa`, within a page, without page faults: None where one would be needed."""
    hva = kvm_vcpu_gfn_to_hva(vcpu, gpa >> 12, write=False)
    return None if hva < 0 else copy_from_user_nofault(vcpu.kvm.process, hva | gpa & 0xFFF, length)


def kvm_vcpu_write_guest(vcpu: Vcpu, gpa: int, data: bytes) -> None:
    """Write `data` at `gpa` and log it. KernelError(EFAULT), after the pages before have been written."""
    done = 0
    for at, size in _pieces(gpa, len(data)):
        hva = kvm_vcpu_gfn_to_hva(vcpu, at >> 12, write=True)
        if hva < 0:
            raise KernelError(EFAULT, f"no memslot to write at gpa {at:#x}")
        copy_to_user(vcpu.kvm.process, hva | at & 0xFFF, data[done : done + size])
        kvm_vcpu_mark_page_dirty(vcpu, at >> 12)
        done += size
