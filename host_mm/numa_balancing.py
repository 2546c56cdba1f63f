"""NUMA balancing: pages go to the node of the CPU that uses them.

Source of truth: kernel/sched/fair.c (task_tick_numa, task_numa_work), mm/mempolicy.c (change_prot_numa,
mpol_misplaced, vma_policy_mof), mm/memory.c (do_numa_page, numa_migrate_check,
numa_rebuild_single_mapping), mm/migrate.c (migrate_misplaced_folio_prepare, migrate_misplaced_folio,
migrate_balanced_pgdat); Linux 6.18.

A scan takes the rights from mapped pages, inside PROTECTION_VMA brackets, as mprotect does. The fault that
follows gives them back, or has the page moved to the faulting CPU's node at once, which brackets it once
more (CLEAR). Scans are the work of the process's own threads, each before it returns to user space or to
the guest:

    --param kernel.numa_balancing=Y                     scan (the kernel's default, not the machine's)
    --param kernel.numa_balancing_scan_period_min_ms=N  how often at most
    --param kernel.numa_balancing_scan_size_mb=N        how much at once

Not modelled: which threads use a VMA, scan periods that adapt, groups of tasks and the preferred node, the
filter by who used the page last (a page that is elsewhere is moved at its first hinting fault, as Linux
does early in a task's life), memory tiers, moving large folios, 5.10's
order (rights back first, then the move); time is the machine's, not the thread's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import PMD_SIZE, pte_mkwrite, pte_mkyoung, pte_modify, pte_write
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.memory_folio import vm_normal_page
from host_mm.migrate import (
    MIGRATE_ASYNC,
    MR_NUMA_MISPLACED,
    MigrationTarget,
    migrate_pages,
    putback_movable_pages,
)
from host_mm.mm_types import (
    VM_ACCESS_FLAGS,
    VM_EXEC,
    VM_HUGETLB,
    VM_IO,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_READ,
    VM_WRITE,
)
from host_mm.mmu_gather import MmuGather
from host_mm.mprotect import (
    MM_CP_PROT_NUMA,
    can_change_pte_writable,
    change_protection,
    vma_wants_manual_pte_write_upgrade,
)
from host_mm.page import PG_dirty, PG_swapbacked, folio_test_large, page_folio
from host_mm.page_alloc import (
    GFP_COMP,
    GFP_DIRECT_RECLAIM,
    GFP_HIGHUSER_MOVABLE,
    GFP_KSWAPD_RECLAIM,
    GFP_NORETRY,
    GFP_NOWARN,
    GFP_THISNODE,
)
from host_mm.pgtable_generic import pte_lockptr, pte_offset_map_lock, ptep_get, ptep_get_and_clear, set_pte

if TYPE_CHECKING:
    from collections.abc import Mapping

    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea, VmFault
    from host_mm.process import Process

__all__ = ["NumaBalancing", "change_prot_numa", "do_numa_page", "task_numa_scan"]

_MISPLACED_GFP = (
    (GFP_HIGHUSER_MOVABLE | GFP_THISNODE | GFP_COMP | GFP_NORETRY | GFP_NOWARN)
    & ~(GFP_DIRECT_RECLAIM | GFP_KSWAPD_RECLAIM)
)


# -- scanning -------------------------------------------------------------------------------------
def change_prot_numa(vma: VmArea, start: int, end: int) -> int:
    """Take the rights from the mapped pages of a part of a VMA; how many entries changed."""
    tlb = MmuGather(vma.mm)
    updated = change_protection(tlb, vma, start, end, MM_CP_PROT_NUMA)
    vma.mm.host.vmstat["numa_pte_updates"] += updated
    tlb.finish()
    return updated


def _wanted(vma: VmArea) -> bool:
    """Whether hinting faults in this VMA could lead to anything."""
    flags = vma.flags
    if flags & (VM_IO | VM_PFNMAP | VM_HUGETLB | VM_MIXEDMAP) or vma.policy is not None:
        return False
    if vma.file is not None and flags & (VM_READ | VM_WRITE) == VM_READ:
        return False
    return bool(flags & VM_ACCESS_FLAGS)


def task_numa_scan(process: Process, start: int, end: int) -> int:
    """One scan of [start, end) whatever was scanned before; how many entries changed."""
    mm = process.mm
    mm.host.sched.advance(COST_SYSCALL)
    mm.mmap_lock.read_lock()
    updated = sum(
        change_prot_numa(vma, max(vma.start, start), min(vma.end, end))
        for vma in mm.vmas_in(start, end) if _wanted(vma)
    )
    mm.mmap_lock.read_unlock()
    return updated


class _Scan:
    """What struct mm_struct has of it: numa_next_scan (ns) and numa_scan_offset."""

    __slots__ = ("next_scan", "offset")

    def __init__(self, next_scan: int) -> None:
        self.next_scan = next_scan
        self.offset = 0


class NumaBalancing:
    """The host's policy and where each process's scan is."""

    __slots__ = ("period", "scan_pages", "scans")

    def __init__(self, params: Mapping[str, str]) -> None:
        self.period = int(params.get("kernel.numa_balancing_scan_period_min_ms", "1000")) * 1_000_000
        self.scan_pages = int(params.get("kernel.numa_balancing_scan_size_mb", "256")) << 8
        self.scans: dict[int, _Scan] = {}

    def task_work(self, process: Process) -> None:
        """task_tick_numa and task_numa_work: a thread of `process` is about to leave the kernel."""
        now = process.host.sched.now
        scan = self.scans.setdefault(process.pid, _Scan(now + self.period))
        if now < scan.next_scan:
            return
        scan.next_scan = now + self.period
        mm = process.mm
        if not mm.mmap_lock.read_trylock():
            return
        self._scan(mm, scan)
        mm.mmap_lock.read_unlock()

    def _scan(self, mm: MmStruct, scan: _Scan) -> None:
        pages, virtpages = self.scan_pages, self.scan_pages * 8
        start = scan.offset
        if mm.find_vma(start) is None:
            start = 0
        for vma in [vma for vma in mm.vmas if vma.end > start]:
            if not _wanted(vma):
                continue
            start = max(start, vma.start)
            while start < vma.end:
                end = min(vma.end, (start + (pages << 12) + PMD_SIZE - 1) & -PMD_SIZE)
                if change_prot_numa(vma, start, end):
                    pages -= (end - start) >> 12
                virtpages -= (end - start) >> 12
                start = end
                if pages <= 0 or virtpages <= 0:
                    scan.offset = start
                    return
        scan.offset = 0


# -- the hinting fault ----------------------------------------------------------------------------
def do_numa_page(vmf: VmFault) -> tuple[str, int]:
    """A fault on an entry that a scan took the rights from; what was done, and VM_FAULT_* bits."""
    mm, vma = vmf.mm, vmf.vma
    host = mm.host
    vmf.ptl = pte_lockptr(mm, vmf.pte)
    vmf.ptl.lock()
    old = ptep_get(mm, vmf.pte)
    if old != vmf.orig_pte:
        vmf.ptl.unlock()
        return "spurious", 0
    entry = pte_modify(old, vma.page_prot)
    writable = pte_write(entry)
    if not writable and vma_wants_manual_pte_write_upgrade(vma):
        writable = can_change_pte_writable(vma, entry)
    pfn = vm_normal_page(host, old)
    large = pfn >= 0 and folio_test_large(host.pages, page_folio(host.pages, pfn))
    target = _numa_migrate_check(vmf, pfn) if pfn >= 0 and not large else -1
    if target >= 0 and _migrate_misplaced_folio_prepare(host, pfn, vma, target):
        vmf.ptl.unlock()
        if _migrate_misplaced_folio(host, pfn, target):
            return "numa-migrate", 0
        # It stayed. What was known of its exclusivity may not hold any more.
        writable = False
        pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
        if not pte:
            return "spurious", 0
        vmf.pte, vmf.ptl = pte, pte_lockptr(mm, pte)
        if ptep_get(mm, pte) != vmf.orig_pte:
            vmf.ptl.unlock()
            return "spurious", 0
    _numa_rebuild_single_mapping(vmf, writable)
    vmf.ptl.unlock()
    return "numa", 0


def _numa_rebuild_single_mapping(vmf: VmFault, writable: bool) -> None:
    """From no rights to the VMA's: nothing to flush, and nobody to tell."""
    mm, vma = vmf.mm, vmf.vma
    entry = pte_mkyoung(pte_modify(ptep_get_and_clear(mm, vmf.address, vmf.pte), vma.page_prot))
    set_pte(mm, vmf.address, vmf.pte, pte_mkwrite(entry) if writable else entry)


def _numa_migrate_check(vmf: VmFault, pfn: int) -> int:
    """The node that the page should be on, -1 if it is there or its policy does not say so."""
    host = vmf.mm.host
    here = host.numa_node_id(vmf.mm.process)
    nid = host.allocator.nid_of(pfn)
    host.vmstat["numa_hint_faults"] += 1
    if nid == here:
        host.vmstat["numa_hint_faults_local"] += 1
        return -1
    return here if vmf.vma.policy is None else -1


def _migrate_misplaced_folio_prepare(host: HostMm, pfn: int, vma: VmArea, nid: int) -> bool:
    """Isolate the folio if it may go, its table locked."""
    pages = host.pages
    flags = pages.flags[pfn]
    if not flags & PG_swapbacked:
        if vma.flags & VM_EXEC and pages.mapcount[pfn] > 1:
            return False
        if flags & PG_dirty:
            return False
    zone = host.allocator.nodes[nid].zone
    if not zone.watermark_ok(zone.wmark_high + 1, 0):
        return False
    return host.lru.folio_isolate_lru(pfn)


def _migrate_misplaced_folio(host: HostMm, pfn: int, nid: int) -> bool:
    """Move the isolated folio without waiting for anybody, or put it back."""
    left = [pfn]
    target = MigrationTarget(nid, _MISPLACED_GFP)
    remaining = migrate_pages(host, left, target, MR_NUMA_MISPLACED, MIGRATE_ASYNC)
    putback_movable_pages(host, left)
    if remaining:
        return False
    host.vmstat["numa_pages_migrated"] += 1
    return True
