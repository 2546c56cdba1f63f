"""Memory of guest_memfd, what is private of it, and mapping memory ahead of the guest's faults.

Source: virt/kvm/guest_memfd.c, virt/kvm/kvm_main.c; Linux 6.18.

On a VM of the default type a guest_memfd is memory like a memfd's, which both sides reach. With
`--param vmm.vm_type=sw-protected` each slot has two memories, the VMM's and a guest_memfd, and the attribute
of a page says which of them the guest sees; the machine's RAM, too. -ENOSYS before Linux 6.8.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import LEAVES_EITHER, LEAVES_ZEROS, operation
from emu.operations.arguments import check_range, spans
from host_mm.kernel.errors import KernelError
from host_mm.ram import PAGE_SHIFT

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

_GMEM = "gmem_create(gpa=0xE0000000, pages=16); vm.host.host_write(gpa=0xE0000000, value=7)"


def _check_kernel(board: Board) -> None:
    if not board.kvm.profile.guest_memfd:
        raise KernelError(errno.ENOSYS, f"{board.kvm.profile.name} has no guest_memfd")


@operation(example="gmem_create(gpa=0xE0000000, pages=16)")
def gmem_create(board: Board, gpa: int, pages: int = 1, flags: int = 3) -> int:
    """A new guest_memfd in a new slot at `gpa`; `flags`: 1 the VMM maps it, 2 it starts shared."""
    check_range(gpa, pages)
    _check_kernel(board)
    return board.memory.create_guest_memfd(gpa, pages << PAGE_SHIFT, flags).slot


@operation("CLEAR", example=f"{_GMEM}; vm.host.gmem_punch(gpa=0xE0000000, pages=4)", leaves=LEAVES_ZEROS)
def gmem_punch(board: Board, gpa: int, pages: int = 1) -> int:
    """fallocate(PUNCH_HOLE) of the guest_memfd behind the range: its pages are zeros from now on."""
    check_range(gpa, pages)
    board.memory.punch_guest_memfd(gpa, pages << PAGE_SHIFT)
    return 0


@operation(example="memory_attributes(gpa=0x200000, pages=16, attributes=0)", leaves=LEAVES_EITHER)
def memory_attributes(board: Board, gpa: int, pages: int = 1, attributes: int = 0) -> int:
    """KVM_SET_MEMORY_ATTRIBUTES: 8 private, 0 shared. Both memories keep what is in them."""
    spans(board, gpa, pages)
    _check_kernel(board)
    board.kvm.set_memory_attributes(gpa, pages << PAGE_SHIFT, attributes)
    return 0


@operation(example="map_gpa_range(gpa=0x200000, pages=16, attributes=0)", leaves=LEAVES_EITHER)
def map_gpa_range(board: Board, gpa: int, pages: int = 1, attributes: int = 0) -> int:
    """KVM_HC_MAP_GPA_RANGE: pages become private (16) or shared (0); what they held before goes."""
    from kvm_model.mem_attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE

    check_range(gpa, pages)
    if attributes & ~_ENCRYPTED:
        raise KernelError(errno.EINVAL, f"attributes {attributes:#x}: want 0 or {_ENCRYPTED}")
    length = pages << PAGE_SHIFT
    pieces = spans(board, gpa, pages)
    private = attributes == _ENCRYPTED
    if not board.kvm.has_private_mem:
        if private:
            raise KernelError(errno.EINVAL, "this VM has no private memory")
        return 0
    board.kvm.set_memory_attributes(gpa, length, KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0)
    if private:
        from host_mm.madvise import MADV_DONTNEED

        for hva, size in pieces:
            board.vmm.madvise(hva, size, MADV_DONTNEED)
    else:
        board.memory.punch_guest_memfd(gpa, length)
    return 0


@operation(example="prefault(gpa=0x200000, pages=16)")
def prefault(board: Board, gpa: int, pages: int = 1) -> int:
    """KVM_PRE_FAULT_MEMORY: map the range before the guest touches it; answers how many pages are mapped."""
    spans(board, gpa, pages)
    if not board.kvm.profile.pre_fault_memory or not board.kvm.tdp_enabled:
        raise KernelError(errno.ENOSYS, "this KVM maps nothing ahead of faults")
    # As the VMM's other threads have to: the vCPU leaves KVM_RUN for it.
    vcpu = board.vcpus[max(board.host.sched.current.ctx.vcpu, 0)]
    if vcpu.mutex.owner is not None:
        board.kvm.request_exit(vcpu)
    return board.kvm.pre_fault_memory(vcpu, gpa, pages << PAGE_SHIFT) >> PAGE_SHIFT


_ENCRYPTED = 1 << 4
"""KVM_MAP_GPA_RANGE_ENCRYPTED."""
