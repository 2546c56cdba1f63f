"""Kernel samepage merging: what madvise, fork, exit and the administrator have to do with it.

Source of truth: mm/ksm.c (ksm_madvise, __ksm_enter, __ksm_exit, run_store,
unmerge_and_remove_all_rmap_items), include/linux/ksm.h: ksm_fork; Linux 6.18, 4 KiB anonymous pages.

ksmd's rounds are in ksm_scan.py, breaking in ksm_break.py, data and reverse mapping in ksm_types.py. The
thread starts with the first write of 1 to `run`.

Not modelled: PR_SET_MEMORY_MERGE, exec, memory hotplug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.ksm_break import unmerge_ksm_pages
from host_mm.ksm_scan import (
    ksm_scan_thread,
    next_mm_slot,
    remove_trailing_rmap_items,
)
from host_mm.ksm_tree import (
    remove_stable_node,
)
from host_mm.ksm_types import (
    KSM_RUN_MERGE,
    KSM_RUN_STOP,
    KSM_RUN_UNMERGE,
    KsmMmSlot,
    KsmStableChain,
    ksm_test_exit,
)
from host_mm.mm_types import (
    MMF_VM_MERGEABLE,
    VM_HUGETLB,
    VM_MAYSHARE,
    VM_MERGEABLE,
    VM_SHARED,
    VM_SPECIAL,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["ksm_exit", "ksm_fork", "ksm_madvise", "run_store", "scan_until_quiet"]

_MM_DOC = "For the pointer: the pid of the mm."
KSM_ENTER = Tracepoint("ksm", "ksm_enter", ("mm",), lambda mm: f"mm {mm:016x}", doc=_MM_DOC)
KSM_EXIT = Tracepoint("ksm", "ksm_exit", ("mm",), lambda mm: f"mm {mm:016x}", doc=_MM_DOC)
TRACEPOINTS = (KSM_ENTER, KSM_EXIT)

_INCOMPATIBLE = VM_SHARED | VM_MAYSHARE | VM_SPECIAL | VM_HUGETLB
SCANS_AT_MOST = 12
"""scan_until_quiet gives up waiting for quiet after so many full scans: some page changes all the time."""


# -- madvise, fork, exit ----------------------------------------------------------------------
def ksm_madvise(vma: VmArea, start: int, end: int, *, mergeable: bool) -> tuple[int, int]:
    """MADV_MERGEABLE or MADV_UNMERGEABLE of a part of the VMA: (0 or -ENOMEM, VM flags it shall have).

    mmap_lock is held for write. UNMERGEABLE breaks every KSM page of the part.
    """
    mm = vma.mm
    if mergeable:
        if vma.flags & (VM_MERGEABLE | _INCOMPATIBLE):
            return 0, vma.flags
        if not mm.flags & MMF_VM_MERGEABLE:
            _ksm_enter(mm)
        return 0, vma.flags | VM_MERGEABLE
    if not vma.flags & VM_MERGEABLE:
        return 0, vma.flags
    err = unmerge_ksm_pages(vma, start, end) if vma.anon_vma is not None else 0
    return err, vma.flags if err else vma.flags & ~VM_MERGEABLE


def _ksm_enter(mm: MmStruct) -> None:
    host = mm.host
    ksm = host.ksm
    needs_wakeup = not ksm.mm_slots
    ksm.mmlist_lock.lock()
    behind = len(ksm.mm_slots)
    if not ksm.run & KSM_RUN_UNMERGE and ksm.cursor is not None:
        # Just behind the cursor: the area may settle down before its turn comes.
        behind = ksm.mm_slots.index(ksm.cursor)
    ksm.mm_slots.insert(behind, KsmMmSlot(mm))
    ksm.mmlist_lock.unlock()
    mm.flags |= MMF_VM_MERGEABLE
    mm.mm_count += 1
    if needs_wakeup:
        ksm.thread_wait.wake_all()
    if (t := host.trace.ksm_enter) is not None:
        t(mm.process.pid)


def ksm_fork(mm: MmStruct, oldmm: MmStruct) -> None:
    """The child of a process on ksmd's round is on it too; its KSM pages are found by the parent's."""
    if oldmm.flags & MMF_VM_MERGEABLE:
        mm.ksm_zero_pages = oldmm.ksm_zero_pages
        mm.host.ksm.ksm_zero_pages += mm.ksm_zero_pages
        _ksm_enter(mm)


def ksm_exit(mm: MmStruct) -> None:
    """The last user is gone, nothing is unmapped yet: off the round, or left to ksmd if it is not easy."""
    if not mm.flags & MMF_VM_MERGEABLE:
        return
    host = mm.host
    ksm = host.ksm
    easy = False
    ksm.mmlist_lock.lock()
    slot = next((slot for slot in ksm.mm_slots if slot.mm is mm), None)
    if slot is not None and ksm.cursor is not slot:
        ksm.mm_slots.remove(slot)
        easy = not slot.rmap_list
        if not easy:
            ksm.mm_slots.insert(0 if ksm.cursor is None else ksm.mm_slots.index(ksm.cursor) + 1, slot)
    ksm.mmlist_lock.unlock()
    if easy:
        mm.flags &= ~MMF_VM_MERGEABLE
        mm.mmdrop()
    elif slot is not None:
        # Whoever breaks or merges in this address space now is waited for; who comes later sees mm_users.
        mm.mmap_lock.lock()
        mm.mmap_lock.unlock()
    if (t := host.trace.ksm_exit) is not None:
        t(mm.process.pid)


# -- /sys/kernel/mm/ksm/run -------------------------------------------------------------------
def run_store(host: HostMm, value: int) -> int:
    """0 stops ksmd, 1 lets it run, 2 stops it and breaks every KSM page of the host; 0 or -ENOMEM."""
    ksm = host.ksm
    ksm.thread_mutex.lock()
    err = 0
    if ksm.run != value:
        ksm.run = value
        if value & KSM_RUN_UNMERGE:
            err = _unmerge_and_remove_all_rmap_items(host)
            if err:
                ksm.run = KSM_RUN_STOP
    ksm.thread_mutex.unlock()
    if value & KSM_RUN_MERGE:
        ksm.cause = host.stream.ctx.cause
        if ksm.thread is None:
            ksm.thread = host.sched.spawn("ksmd", lambda: ksm_scan_thread(host))
        ksm.thread_wait.wake_all()
    return err


def _unmerge_and_remove_all_rmap_items(host: HostMm) -> int:
    ksm = host.ksm
    ksm.cursor = ksm.mm_slots[0] if ksm.mm_slots else None
    while (slot := ksm.cursor) is not None:
        mm = slot.mm
        mm.mmap_lock.read_lock()
        for vma in [] if ksm_test_exit(mm) else mm.vmas:
            if vma.flags & VM_MERGEABLE and vma.anon_vma is not None:
                err = unmerge_ksm_pages(vma, vma.start, vma.end)
                if err:
                    mm.mmap_lock.read_unlock()
                    ksm.cursor = None
                    return err
        remove_trailing_rmap_items(host, slot, 0)
        # Not 0, which would say that the address space leaves the round although it goes on living.
        ksm.address = int(not ksm_test_exit(mm))
        next_mm_slot(host, slot)
    for entry in list(ksm.stable_tree):
        if not isinstance(entry, KsmStableChain):
            remove_stable_node(host, entry)
        elif all(remove_stable_node(host, dup) for dup in list(entry.dups)):
            ksm.stable_tree.remove(entry)
            ksm.ksm_stable_node_chains -= 1
    ksm.seqnr = ksm.address = ksm.index = 0
    return 0


def scan_until_quiet(host: HostMm) -> int:
    """What a tester does by hand: fast knobs, run 1, wait until a full scan changes nothing, run 0.

    Returns how many full scans that took. Skipping by age is off meanwhile.
    """
    ksm = host.ksm
    knobs = ksm.pages_to_scan, ksm.sleep_millisecs, ksm.smart_scan
    ksm.pages_to_scan, ksm.sleep_millisecs, ksm.smart_scan = 5000, 10, False
    # A scan that has begun does not count: it may have passed what is new.
    first = ksm.full_scans + (ksm.cursor is not None)
    run_store(host, KSM_RUN_MERGE)
    while ksm.should_run() and ksm.full_scans < first + SCANS_AT_MOST:
        if ksm.full_scans > first and ksm.quiet_scans:
            break
        ksm.scan_wait.wait()
    run_store(host, KSM_RUN_STOP)
    ksm.pages_to_scan, ksm.sleep_millisecs, ksm.smart_scan = knobs
    return ksm.full_scans - first
