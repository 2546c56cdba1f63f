"""Memory attributes: which guest frames are private.

Source of truth: virt/kvm/kvm_main.c (kvm_supported_mem_attributes, kvm_range_has_memory_attributes),
include/linux/kvm_host.h (kvm_get_memory_attributes, kvm_mem_is_private); Linux 6.18.

A frame without an attribute is shared: it is what its memslot's host address maps. A private one is a page of
the slot's guest_memfd. For a VM of type KVM_X86_SW_PROTECTED_VM the attribute is all there is to it: nothing
is encrypted, and a fault is one on private memory if the frame is private when KVM looks.
`mmu/set_mem_attributes.py` changes them.

Not modelled: the xarray (a dict is one), attributes of VMs whose memory is encrypted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = [
    "KVM_MEMORY_ATTRIBUTE_PRIVATE", "KVM_X86_DEFAULT_VM", "KVM_X86_SW_PROTECTED_VM",
    "gfn_is_in_guest_memfd", "kvm_get_memory_attributes", "kvm_mem_is_private",
    "kvm_range_has_memory_attributes", "kvm_supported_mem_attributes",
]

KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1
KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3


def kvm_supported_mem_attributes(kvm: Kvm) -> int:
    """The attributes that frames of this VM can have."""
    return KVM_MEMORY_ATTRIBUTE_PRIVATE if kvm.has_private_mem else 0


def kvm_get_memory_attributes(kvm: Kvm, gfn: int) -> int:
    """The attributes of one frame."""
    return kvm.mem_attr_array.get(gfn, 0)


def kvm_mem_is_private(kvm: Kvm, gfn: int) -> bool:
    """Whether the guest's accesses to the frame must go to guest_memfd."""
    return kvm.mem_attr_array.get(gfn, 0) & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0


def kvm_range_has_memory_attributes(kvm: Kvm, start: int, end: int, attrs: int) -> bool:
    """Whether every frame of [start, end) has exactly these attributes."""
    array = kvm.mem_attr_array
    if attrs & ~kvm_supported_mem_attributes(kvm):
        return False
    if not attrs:
        if end - start <= len(array):
            return not any(gfn in array for gfn in range(start, end))
        return not any(start <= gfn < end for gfn in array)
    return all(array.get(gfn, 0) == attrs for gfn in range(start, end))


def gfn_is_in_guest_memfd(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> bool:
    """Whether faults on the frame are served from the slot's guest_memfd, not from its host address."""
    return slot.gmem_only or kvm_mem_is_private(kvm, gfn)
