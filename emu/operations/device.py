"""Others who reach the guest's memory: a mirroring device, a device that pins, KVM for itself.

Source: mm/hmm.c (a driver's loop), mm/gup.c: pin_user_pages, unpin_user_pages_dirty_lock;
virt/kvm/kvm_main.c: kvm_vcpu_map, kvm_vcpu_unmap; Linux 6.18.

Each is transparent to a guest that does not use the word meanwhile: a mirror keeps no reference and must
obey interval notifiers, a pin keeps the frame where it is, a page that KVM mapped for itself is
neither locked nor mapped when KVM says at last that it is dirty.

Not modelled: an IOMMU (the device's address is the host frame's), nested guests, for whose VMCS12 KVM
maps pages; of these the page is all there is.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import LEAVES_GIVEN, operation
from emu.operations.arguments import check_scalar, scalar_bytes
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board
    from host_mm.hmm_mirror import HmmMirror

__all__: list[str] = []

MAX_TIME = 1_000_000_000


def _check(gpa: int, size: int, ns: int) -> None:
    check_scalar(gpa, size)
    if not 0 <= ns <= MAX_TIME:
        raise KernelError(errno.EINVAL, f"{ns} ns: want at most {MAX_TIME}")


def _mirror(board: Board, gpa: int) -> HmmMirror:
    """The device's mirror of the region that holds `gpa`; it watches from its first use on."""
    region = board.memory.region_of(gpa)
    mirror = board.mirrors.get(region.slot)
    if mirror is None:
        from host_mm.hmm_mirror import HmmMirror

        mirror = board.mirrors[region.slot] = HmmMirror(board.process)
        mirror.open(region.hva, region.size)
    return mirror


@operation(example="mirror_read(gpa=0x200000, size=8)")
def mirror_read(board: Board, gpa: int, size: int = 8) -> int:
    """A device with page tables of its own (an interval notifier's user) reads `size` bytes."""
    check_scalar(gpa, size)
    hva = board.memory.hva(gpa)
    pfn = _mirror(board, gpa).access(hva, write=False)
    return int.from_bytes(board.host.mm.ram.read((pfn << 12) + (hva & 0xFFF), size), "little")


@operation(
    "CLEAR", example="host_read(gpa=0x700000); vm.host.dma_write(gpa=0x700000, value=7, ns=10000)",
    leaves=LEAVES_GIVEN,
)
def dma_write(board: Board, gpa: int, value: int, size: int = 8, ns: int = 10_000) -> int:
    """A device pins the page, stores `value` by DMA `ns` later, and unpins it dirty."""
    from host_mm.gup import FOLL_WRITE
    from host_mm.gup_pin import pin_user_page, unpin_user_page

    _check(gpa, size, ns)
    mm, host = board.process.mm, board.host.mm
    pfn = pin_user_page(mm, board.memory.hva(gpa), FOLL_WRITE)
    if pfn < 0:
        raise KernelError(-pfn, f"gpa {gpa:#x} cannot be pinned")
    host.sched.sleep(ns)
    host.ram.write((pfn << 12) + (gpa & 0xFFF), scalar_bytes(value, size))
    unpin_user_page(host, pfn, dirty=True)
    return 0


@operation(
    "CLEAR", example="host_read(gpa=0x700000); vm.host.kvm_map_write(gpa=0x700000, value=7, ns=10000)",
    leaves=LEAVES_GIVEN,
)
def kvm_map_write(board: Board, gpa: int, value: int, size: int = 8, ns: int = 10_000) -> int:
    """KVM maps the page for itself, stores `value` `ns` later, and unmaps it dirty (kvm_vcpu_map)."""
    from host_mm.gup import FOLL_WRITE
    from host_mm.page import page_folio
    from kvm_model.follow_pfn import kvm_faultin_pfn, kvm_release_page_dirty
    from kvm_model.memslots import mark_page_dirty_in_slot

    _check(gpa, size, ns)
    kvm, host = board.kvm, board.host.mm
    slot = kvm.slots().gfn_to_memslot(gpa >> 12)
    if slot is None:
        raise KernelError(errno.EFAULT, f"gpa {gpa:#x} is not in a memory slot")
    pfn, _, held = kvm_faultin_pfn(kvm, slot, gpa >> 12, FOLL_WRITE)
    if held < 0:
        raise KernelError(errno.EFAULT, f"gpa {gpa:#x} cannot be mapped")
    head = page_folio(host.pages, held)
    host.held[head] += 1
    host.sched.sleep(ns)
    host.ram.write((pfn << 12) + (gpa & 0xFFF), scalar_bytes(value, size))
    host.held[head] -= 1
    # kvm_vcpu_unmap, by the vCPU that KVM maps the page for.
    mark_page_dirty_in_slot(board.vcpus[0], slot, gpa >> 12)
    kvm_release_page_dirty(kvm, held)
    return 0
