"""Instruments: what no kernel offers. EPT entries armed for one exit, and questions about the VM.

`ept_set` makes the CPU meet one EPT entry with chosen permission bits; the exit that follows is
caught before KVM's handler sees it, recorded, and the entry gets its bits back. Nothing of the
host changes: the model's SPTE is the same before and after.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import msgspec

from emu.abi import (
    LAST_EXIT_CAUGHT,
    LAST_EXIT_GPA,
    LAST_EXIT_GVA,
    LAST_EXIT_QUALIFICATION,
    LAST_EXIT_REASON,
    MMIO_TEST_GPA,
)
from emu.hostops import operation
from emu.operations.arguments import check_range, flag, spans
from host_mm.kernel.errors import KernelError
from kvm_model.instrument import leaf_spte, map_for_instrument, mapping_level, zap_for_instrument
from kvm_model.memslots import kvm_slot_dirty_track_enabled
from kvm_model.vmx.exits import REASON_EPT_MISCONFIG, REASON_EPT_VIOLATION, VmExit

if TYPE_CHECKING:
    from emu.board import Board
    from kvm_model.vcpu import Vcpu

__all__ = ["ArmedEntry"]


_ACCESSED_DIRTY = 1 << 8 | 1 << 9
"""EPT's flags, which the CPU sets and aging clears."""


class ArmedEntry(msgspec.Struct):
    """The one EPT leaf that is armed: where it is, what it holds, its own rights, what was caught."""

    gfn: int
    sptep: int
    value: int
    rwx: int
    armed: bool = True
    caught: VmExit | None = None

    def disarm(self, board: Board) -> None:
        """Give the entry its bits back; if KVM changed it or looked at its W bit, drop it instead."""
        if not self.armed:
            return
        self.armed = False
        kvm = board.kvm
        u64 = board.host.mm.ram.u64
        index = self.sptep >> 3
        kvm.instrumented.discard(index)
        slot = kvm.slots().gfn_to_memslot(self.gfn)
        logged = slot is not None and kvm_slot_dirty_track_enabled(slot)
        if (u64[index] ^ self.value) & ~_ACCESSED_DIRTY or logged:
            zap_for_instrument(kvm, self.gfn)
        else:
            u64[index] = (u64[index] & ~7) | self.rwx

    def filter(self, board: Board, vcpu: Vcpu, vmexit: VmExit) -> bool:
        """Whether this exit is the one waited for; then it is recorded and KVM never sees it."""
        if not self.armed or vmexit.reason not in (REASON_EPT_VIOLATION, REASON_EPT_MISCONFIG):
            return False
        if vmexit.guest_physical >> 12 != self.gfn:
            return False
        self.caught = vmexit
        self.disarm(board)
        board.cpu.flush_tlb(vcpu)
        return True


def _leaf(board: Board, gpa: int) -> tuple[int, int]:
    """(address, level) of the present leaf SPTE of `gpa` in vCPU 0's root, or (0, 0)."""
    return leaf_spte(board.kvm, gpa >> 12)


def _ept_only(board: Board) -> None:
    if board.config.mmu != "ept":
        raise KernelError(errno.ENOSYS, f"mmu {board.config.mmu} has no EPT")


@operation(example="ept_set(gpa=0x200000, rwx=0)")
def ept_set(board: Board, gpa: int, rwx: int) -> int:
    """Arm the 4 KiB EPT entry of `gpa` with permission bits `rwx` for one exit."""
    _ept_only(board)
    if not 0 <= rwx <= 7:
        raise KernelError(errno.EINVAL, f"rwx {rwx}: want read 1 | write 2 | execute 4")
    gpa &= ~0xFFF
    spans(board, gpa, 1)
    ept_restore(board)
    map_for_instrument(board.kvm, gpa >> 12)
    sptep, level = _leaf(board, gpa)
    if level != 1:
        raise KernelError(errno.EFAULT, f"no 4 KiB EPT leaf maps gpa {gpa:#x}")
    u64 = board.host.mm.ram.u64
    entry = u64[sptep >> 3]
    armed = (entry & ~7) | rwx
    board.armed = ArmedEntry(gpa >> 12, sptep, armed, entry & 7)
    u64[sptep >> 3] = armed
    board.flush_all()
    return 0


@operation(example="ept_restore()")
def ept_restore(board: Board) -> int:
    """Give the armed entry its bits back; answers how many exits were caught (0 or 1)."""
    _ept_only(board)
    if board.armed is None:
        return 0
    board.armed.disarm(board)
    board.flush_all()
    return int(board.armed.caught is not None)


@operation(example="ept_ad(on=1)")
def ept_ad(board: Board, on: int) -> int:
    """EPTP bit 6 of every vCPU from the next entry on; answers the setting before."""
    _ept_only(board)
    wanted = flag("on", on)
    if not wanted and board.kvm.cpu_dirty_log_size:
        raise KernelError(errno.EINVAL, "page-modification logging needs the dirty flags")
    before, board.cpu.ept_ad = board.cpu.ept_ad, wanted
    board.flush_all()
    return int(before)


@operation(example="last_exit(field=4)")
def last_exit(board: Board, field: int) -> int:
    """A field of the exit that ept_set caught: 0 reason, 1 qualification, 2 gpa, 3 gva, 4 caught."""
    caught = board.armed.caught if board.armed is not None else None
    if field == LAST_EXIT_CAUGHT:
        return int(caught is not None)
    if not LAST_EXIT_REASON <= field < LAST_EXIT_CAUGHT:
        raise KernelError(errno.EINVAL, f"field {field}: want 0 to {LAST_EXIT_CAUGHT}")
    if caught is None:
        raise KernelError(errno.ENODATA, "no exit was caught since ept_set")
    return {
        LAST_EXIT_REASON: caught.reason,
        LAST_EXIT_QUALIFICATION: caught.qualification,
        LAST_EXIT_GPA: caught.guest_physical,
        LAST_EXIT_GVA: caught.guest_linear,
    }[field]


@operation(example="map_level(gpa=0x200000)")
def map_level(board: Board, gpa: int) -> int:
    """The level of the leaf SPTE that maps `gpa`: 1 4K, 2 2M, 3 1G, 0 none; the highest of several."""
    check_range(gpa & ~0xFFF, 1)
    return mapping_level(board.kvm, gpa >> 12)


@operation(example="cpu_count()")
def cpu_count(board: Board) -> int:
    """How many vCPUs the VM has."""
    return len(board.vcpus)


@operation(example="start_cpu(cpu=1, entry=0x100000, stack=0x8000, arg=0)")
def start_cpu(board: Board, cpu: int, entry: int, stack: int, arg: int = 0) -> int:
    """Start vCPU `cpu` in 64-bit mode with the calling vCPU's control registers and tables."""
    board.start_cpu(cpu, entry, stack, arg)
    return 0


@operation(example="mmio_device()")
def mmio_device(board: Board) -> int:
    """Where the MMIO test device is."""
    return MMIO_TEST_GPA
