"""Where the frames behind the guest are: compaction, exact frames, memory offline, policy, pins, bad memory.

Source: mm/compaction.c, mm/page_alloc.c (alloc_contig_range), mm/memory_hotplug.c, mm/mempolicy.c, mm/gup.c,
mm/memory-failure.c, drivers/base/memory.c; Linux 6.18.

What is taken here (frames, memory that is offline, pins) is given back when the VM goes. A frame whose memory
has failed never is.

Not modelled: what a real VMM does about a failed page besides mapping a new one: it tells the guest by a
machine check.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import LEAVES_ZEROS, operation
from emu.operations.arguments import flag, page_hvas, spans
from host_mm.kernel.errors import KernelError
from host_mm.mmzone import PAGEBLOCK_NR_PAGES

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


def _frame(board: Board, gpa: int) -> int:
    """The frame behind the page at `gpa`, a page of its own; EFAULT where nothing is mapped."""
    (hva, _), = spans(board, gpa, 1)
    pfn = board.vmm.present_pfn(hva)
    if pfn <= board.host.mm.zero_pfn:
        raise KernelError(errno.EFAULT, f"gpa {gpa:#x} has no frame of its own")
    return pfn


@operation("CLEAR", example="dontneed(gpa=0x500000, pages=64); vm.host.compact()")
def compact(board: Board) -> int:
    """Write to /proc/sys/vm/compact_memory; answers how many pages of the host were moved."""
    return board.host.admin.compact_memory()


@operation("CLEAR", example="migrate(gpa=0x200000, pages=16); vm.host.contig_alloc(gpa=0x200000, pages=4)")
def contig_alloc(board: Board, gpa: int, pages: int = 1) -> int:
    """A device takes the aligned `pages` frames around the page at `gpa`; answers the first one's number."""
    if pages <= 0 or pages & (pages - 1) or pages > PAGEBLOCK_NR_PAGES:
        raise KernelError(errno.EINVAL, f"{pages} pages: want a power of two up to {PAGEBLOCK_NR_PAGES}")
    pfn = _frame(board, gpa) & -pages
    board.host.admin.alloc_contig(pfn, pages)
    board.contig[pfn] = pages
    return pfn


@operation(
    example="migrate(gpa=0x200000, pages=16); "
    "pfn = vm.host.contig_alloc(gpa=0x200000, pages=4); answer = vm.host.contig_free(pfn=pfn)"
)
def contig_free(board: Board, pfn: int) -> int:
    """The device gives back the frames that contig_alloc answered `pfn` for; answers how many they were."""
    pages = board.contig.pop(pfn, 0)
    if not pages:
        raise KernelError(errno.EINVAL, f"frame {pfn:#x} was not answered by contig_alloc")
    board.host.admin.free_contig(pfn, pages)
    return pages


@operation("CLEAR", example="migrate(gpa=0x200000, pages=16); vm.host.offline(gpa=0x200000)")
def offline(board: Board, gpa: int) -> int:
    """Take the 2 MiB of memory that the page at `gpa` is in out of use; answers the first frame's number."""
    pfn = _frame(board, gpa) & -PAGEBLOCK_NR_PAGES
    board.host.admin.offline(pfn)
    board.offline.append(pfn)
    return pfn


@operation(
    example="migrate(gpa=0x200000, pages=16); "
    "pfn = vm.host.offline(gpa=0x200000); answer = vm.host.online(pfn=pfn)"
)
def online(board: Board, pfn: int) -> int:
    """Put the memory that offline answered `pfn` for back into use."""
    if pfn not in board.offline:
        raise KernelError(errno.EINVAL, f"frame {pfn:#x} was not answered by offline")
    board.host.admin.online(pfn)
    board.offline.remove(pfn)
    return 0


@operation("CLEAR", example="mbind(gpa=0x200000, pages=16, node=1)")
def mbind(board: Board, gpa: int, pages: int = 1, node: int = 0) -> int:
    """mbind(MPOL_BIND, MPOL_MF_MOVE) of the range to a node; answers how many of its pages are there."""
    for hva, length in spans(board, gpa, pages):
        board.vmm.mbind(hva, length, node)
    nid_of = board.host.mm.allocator.nid_of
    pfns = [board.vmm.present_pfn(hva) for hva in page_hvas(board, gpa, pages)]
    return sum(1 for pfn in pfns if pfn >= 0 and nid_of(pfn) == node)


@operation(example="pin(gpa=0x200000, pages=16)")
def pin(board: Board, gpa: int, pages: int = 1) -> int:
    """A device pins the range for long and for writing (FOLL_LONGTERM), so that its frames stay."""
    pfns: list[int] = []
    try:
        for hva, length in spans(board, gpa, pages):
            got = board.vmm.pin_range(hva, length >> 12)
            pfns += got
            if len(got) < length >> 12:
                raise KernelError(errno.EFAULT, f"gpa {gpa + (len(pfns) << 12):#x} cannot be pinned")
    except KernelError:
        board.vmm.unpin_range(pfns)
        raise
    board.pinned.append((gpa, pfns))
    return 0


@operation(example="pin(gpa=0x200000, pages=16); vm.host.unpin(gpa=0x200000, pages=16)")
def unpin(board: Board, gpa: int, pages: int = 1) -> int:
    """Give the pins of an earlier pin() of exactly this range back; the device wrote the pages."""
    for index, (at, pfns) in enumerate(board.pinned):
        if (at, len(pfns)) == (gpa, pages):
            del board.pinned[index]
            board.vmm.unpin_range(pfns)
            return 0
    raise KernelError(errno.EINVAL, f"gpa {gpa:#x}, {pages} pages: not pinned")


@operation("CLEAR", example="soft_offline(gpa=0x200000, pages=4)")
def soft_offline(board: Board, gpa: int, pages: int = 1) -> int:
    """madvise(MADV_SOFT_OFFLINE): the pages move, and the frames where they were are never used again."""
    from host_mm.madvise import MADV_SOFT_OFFLINE

    for hva, length in spans(board, gpa, pages):
        board.vmm.madvise(hva, length, MADV_SOFT_OFFLINE)
    return 0


@operation("CLEAR", example="memory_failure(gpa=0x300000)", leaves=LEAVES_ZEROS)
def memory_failure(board: Board, gpa: int, recover: int = 1) -> int:
    """The memory of the frame behind `gpa` fails: its bytes are lost, and the guest's next access finds out.

    That access has KVM send the VMM a SIGBUS. With `recover` 1 the VMM maps a new page of zeros there and
    the guest goes on; with 0 it gives up, and the run ends.
    """
    board.recovers_from_sigbus = flag("recover", recover)
    board.host.admin.hard_offline(_frame(board, gpa))
    return 0
