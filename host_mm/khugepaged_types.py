"""What khugepaged knows: which address spaces to scan, how far it is, and what it may tolerate.

Source of truth: mm/khugepaged.c (struct khugepaged_scan, __khugepaged_enter, __khugepaged_exit,
khugepaged_enter_vma, hugepage_pmd_enabled); Linux 6.18.

    --param khugepaged.pages_to_scan=N           entries looked at between two sleeps (4096)
    --param khugepaged.scan_sleep_millisecs=N    how long it sleeps then (10000)
    --param khugepaged.alloc_sleep_millisecs=N   how long after it found no huge page (60000)
    --param khugepaged.max_ptes_none=N           empty entries and zero pages in a 2 MiB (511)
    --param khugepaged.max_ptes_swap=N           swapped out pages (64)
    --param khugepaged.max_ptes_shared=N         pages that other processes map too (256)

Not modelled: khugepaged's effect on min_free_kbytes; that it is running before anything is to scan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.huge_mm import TVA_KHUGEPAGED, thp_vma_allowable_order
from host_mm.kernel.locks import Spinlock
from host_mm.kernel.sched import WaitQueue
from host_mm.mm_types import MMF_VM_HUGEPAGE

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.sched import Task
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["Khugepaged", "khugepaged_enter_vma", "khugepaged_exit", "khugepaged_fork"]

_HPAGE_PMD_NR = 512


class Khugepaged:
    """The daemon's state: `mms` in the order of its round, `mm` the one it is in, at `address`.

    `max_ptes_*` and the sleeps are /sys/kernel/mm/transparent_hugepage/khugepaged's files.
    """

    __slots__ = (
        "address", "alloc_sleep_millisecs", "full_scans", "max_ptes_none", "max_ptes_shared", "max_ptes_swap",
        "mm", "mm_lock", "mms", "pages_collapsed", "pages_to_scan", "scan_sleep_millisecs", "scanning",
        "sleep_expire", "task", "wait",
    )

    def __init__(self, host: HostMm) -> None:
        params = host.params

        self.pages_to_scan = int(params.get("khugepaged.pages_to_scan", _HPAGE_PMD_NR * 8))
        self.scan_sleep_millisecs = int(params.get("khugepaged.scan_sleep_millisecs", 10_000))
        self.alloc_sleep_millisecs = int(params.get("khugepaged.alloc_sleep_millisecs", 60_000))
        self.max_ptes_none = int(params.get("khugepaged.max_ptes_none", _HPAGE_PMD_NR - 1))
        self.max_ptes_swap = int(params.get("khugepaged.max_ptes_swap", _HPAGE_PMD_NR // 8))
        self.max_ptes_shared = int(params.get("khugepaged.max_ptes_shared", _HPAGE_PMD_NR // 2))
        self.mm_lock = Spinlock(host.sched, "khugepaged_mm_lock")
        self.wait = WaitQueue(host.sched, "khugepaged")
        self.mms: list[MmStruct] = []
        self.mm: MmStruct | None = None
        self.address = 0
        self.full_scans = 0
        self.pages_collapsed = 0
        self.task: Task | None = None
        self.scanning = False
        self.sleep_expire = 0


def khugepaged_enter_vma(vma: VmArea, vm_flags: int) -> bool:
    """Put the VMA's address space on the round if memory with these flags is to be collapsed.

    True if it is the first there, so that somebody must scan.
    """
    mm = vma.mm
    if mm.flags & MMF_VM_HUGEPAGE or not thp_vma_allowable_order(vma, vm_flags, TVA_KHUGEPAGED):
        return False
    return _khugepaged_enter(mm)


def khugepaged_fork(mm: MmStruct, oldmm: MmStruct) -> bool:
    """The child of a process on the round is on it too; true as for khugepaged_enter_vma."""
    return bool(oldmm.flags & MMF_VM_HUGEPAGE) and _khugepaged_enter(mm)


def _khugepaged_enter(mm: MmStruct) -> bool:
    state = mm.host.khugepaged
    mm.flags |= MMF_VM_HUGEPAGE
    state.mm_lock.lock()
    first = not state.mms
    # Just behind the cursor: the area may settle down before its turn comes.
    state.mms.insert(len(state.mms) if state.mm is None else state.mms.index(state.mm), mm)
    state.mm_lock.unlock()
    mm.mm_count += 1
    return first


def khugepaged_exit(mm: MmStruct) -> None:
    """The last user of the address space is gone; nothing is unmapped before khugepaged is out of it."""
    if not mm.flags & MMF_VM_HUGEPAGE:
        return
    state = mm.host.khugepaged
    state.mm_lock.lock()
    here = state.mm is mm
    if not here:
        state.mms.remove(mm)
    state.mm_lock.unlock()
    if here:
        # It sees mm_users when it has mmap_lock next, and lets go of the address space.
        mm.mmap_lock.lock()
        mm.mmap_lock.unlock()
    else:
        mm.flags &= ~MMF_VM_HUGEPAGE
        mm.mmdrop()
