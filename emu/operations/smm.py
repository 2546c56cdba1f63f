"""System-management mode: the VMM's second address space with SMRAM, and SMIs.

Source: virt/kvm/kvm_main.c (KVM_SET_USER_MEMORY_REGION of address space 1), arch/x86/kvm/smm.c; Linux 6.18.

SMRAM is 64 KiB at 0x30000, where a CPU has its SMBASE after reset; the rest of the second space shows the
memory slots of the first as they are then.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.memory import PROT_RW
from emu.operations.arguments import check_range
from host_mm.kernel.errors import KernelError
from kvm_model.smm import kvm_inject_smi

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

SMRAM_GPA, SMRAM_BYTES, HANDLER_AT = 0x3_0000, 0x1_0000, 0x8000
AS_SMM = 1 << 16


@operation(example="smram(gpa=0x200000, size=64)")
def smram(board: Board, gpa: int, size: int) -> int:
    """Make the SMM address space; `size` bytes of guest memory at `gpa` are its handler of SMIs."""
    check_range(gpa & ~0xFFF, 1)
    if not 0 < size <= 4096 - (gpa & 0xFFF):
        raise KernelError(errno.EINVAL, f"a handler of {size} bytes at {gpa:#x}: want one within a page")
    if board.smram:
        raise KernelError(errno.EEXIST, "there is an SMM address space already")
    code = board.memory.read(gpa, size)
    board.smram = board.vmm.mmap(SMRAM_BYTES, PROT_RW)
    board.vmm.write(board.smram + HANDLER_AT, code)
    pieces = [(SMRAM_GPA, SMRAM_BYTES, board.smram)]
    for region in board.memory.regions:
        if not region.deleted:
            pieces += _around(region.gpa, region.size, region.hva)
    for number, (start, length, hva) in enumerate(pieces):
        board.kvm.set_user_memory_region(AS_SMM | number, start, length, hva)
    return 0


def _around(gpa: int, size: int, hva: int) -> list[tuple[int, int, int]]:
    """What of a region SMRAM does not hide."""
    end = gpa + size
    parts = [(gpa, min(end, SMRAM_GPA)), (max(gpa, SMRAM_GPA + SMRAM_BYTES), end)]
    return [(start, stop - start, hva + start - gpa) for start, stop in parts if start < stop]


@operation(example="smram(gpa=0x200000, size=64); vm.host.smi()")
def smi(board: Board, cpu: int = 0) -> int:
    """A chipset's SMI to vCPU `cpu`, which enters SMM before its next instruction."""
    if not 0 <= cpu < len(board.vcpus):
        raise KernelError(errno.EINVAL, f"cpu {cpu}: want 0 to {len(board.vcpus) - 1}")
    if not board.smram:
        raise KernelError(errno.ENOTTY, "there is no SMM address space")
    kvm_inject_smi(board.vcpus[cpu])
    return 0


@operation(example="smram_out()")
def smram_out(board: Board) -> int:
    """MADV_PAGEOUT of SMRAM; answers how many of its 16 pages have no frame afterwards, without SMRAM 0."""
    from host_mm.madvise import MADV_PAGEOUT

    if not board.smram:
        return 0
    board.vmm.madvise(board.smram, SMRAM_BYTES, MADV_PAGEOUT)
    board.host.admin.wait_for_writeback()
    pages = range(board.smram, board.smram + SMRAM_BYTES, 4096)
    return sum(board.vmm.present_pfn(hva) < 0 for hva in pages)
