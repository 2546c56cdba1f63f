"""NUMA placement: the policy of a VMA, mbind and migrate_pages.

Source of truth: mm/mempolicy.c: do_mbind, queue_folios_pte_range, mbind_range, do_migrate_pages;
include/uapi/linux/mempolicy.h (Linux 6.18).

mbind of a part of a VMA splits it, and a split brackets the 2 MiB around the cut; with MPOL_MF_MOVE
the pages on other nodes are moved, each unmapped in a bracket of its own.

Not modelled: interleaving, weights, task policies, cpusets, MPOL_F_*, merging VMAs that came to have
one policy; MPOL_BIND prefers its node but does not refuse the others when it is full.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, EIO
from typing import TYPE_CHECKING

import msgspec

from host_mm.arch.x86.pgtable import is_swap_pmd, pte_pfn, pte_present
from host_mm.arch.x86.swapops import is_migration_entry, pte_to_swp_entry
from host_mm.huge_memory_map import pmd_folio
from host_mm.hugetlb_migrate import queue_folios_hugetlb
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.migrate import (
    MIGRATE_SYNC,
    MR_MEMPOLICY_MBIND,
    MR_SYSCALL,
    migrate_pages,
    putback_movable_pages,
)
from host_mm.mm_types import VM_HUGETLB, VM_IO, VM_PFNMAP
from host_mm.page import folio_maybe_mapped_shared, page_folio
from host_mm.pgtable_generic import pmd_slots, pte_lockptr, pte_offset_map_lock
from host_mm.pgtable_huge import pmd_trans_huge_lock, pmdp_get
from host_mm.vma import split_vma

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.process import Process

__all__ = [
    "MPOL_BIND", "MPOL_DEFAULT", "MPOL_MF_MOVE", "MPOL_MF_MOVE_ALL", "MPOL_MF_STRICT", "MPOL_PREFERRED",
    "Mempolicy", "do_mbind", "do_migrate_pages",
]

MPOL_DEFAULT = 0
MPOL_PREFERRED = 1
MPOL_BIND = 2
MPOL_MF_STRICT = 1
MPOL_MF_MOVE = 2
MPOL_MF_MOVE_ALL = 4
_MF_VALID = MPOL_MF_STRICT | MPOL_MF_MOVE | MPOL_MF_MOVE_ALL


class Mempolicy(msgspec.Struct, frozen=True):
    """struct mempolicy: a mode and one node."""

    mode: int
    node: int

    def preferred_node(self) -> int:
        """Where a page of the VMA is allocated first."""
        return self.node


def _check_node(host: HostMm, nid: int) -> None:
    if not 0 <= nid < len(host.allocator.nodes):
        raise KernelError(EINVAL, f"there is no node {nid}")


def _queue_pages(
    vma: VmArea, start: int, end: int, wrong: frozenset[int], flags: int, queue: list[int]
) -> int:
    """queue_pages_range for one VMA: isolate its pages on the `wrong` nodes; how many could not be."""
    mm = vma.mm
    host = mm.host
    failed = 0
    queued = dict.fromkeys(queue)
    if vma.flags & VM_HUGETLB:
        return queue_folios_hugetlb(
            vma, max(start, vma.start), min(end, vma.end), wrong, queue,
            move=bool(flags & MPOL_MF_MOVE), move_all=bool(flags & MPOL_MF_MOVE_ALL),
        )
    for pmd, address, following in pmd_slots(mm, max(start, vma.start), min(end, vma.end)):
        if (lock := pmd_trans_huge_lock(mm, pmd)) is not None:
            entry = pmdp_get(mm, pmd)
            folio = pmd_folio(mm, entry)
            if is_swap_pmd(entry):
                failed += 1
            elif folio >= 0:
                failed += not _queue_folio(host, folio, wrong, flags, queued)
            lock.unlock()
            continue
        pte = pte_offset_map_lock(mm, pmd, address)
        if not pte:
            continue
        ptl = pte_lockptr(mm, pte)
        count = (following - address) >> 12
        for entry in host.ram.u64[pte >> 3 : (pte >> 3) + count].tolist():
            if not entry:
                continue
            if not pte_present(entry):
                failed += is_migration_entry(pte_to_swp_entry(entry))
                continue
            pfn = pte_pfn(entry)
            if pfn != host.zero_pfn:
                failed += not _queue_folio(host, page_folio(host.pages, pfn), wrong, flags, queued)
        ptl.unlock()
    queue[:] = queued
    return failed


def _queue_folio(
    host: HostMm, folio: int, wrong: frozenset[int], flags: int, queued: dict[int, None]
) -> bool:
    """migrate_folio_add for a folio that is where it should not be; false: it cannot be moved."""
    if host.allocator.nid_of(folio) not in wrong or folio in queued:
        return True
    shared = folio_maybe_mapped_shared(host.pages, folio)
    if not (flags & MPOL_MF_MOVE_ALL or (flags & MPOL_MF_MOVE and not shared)):
        return False
    if not host.lru.folio_isolate_lru(folio):
        return False
    queued[folio] = None
    return True


def _mbind_range(vma: VmArea, start: int, end: int, policy: Mempolicy | None) -> None:
    if vma.policy == policy:
        return
    if vma.start < start:
        split_vma(vma, start, new_below=True)
    if vma.end > end:
        split_vma(vma, end, new_below=False)
    vma.policy = policy


def do_mbind(process: Process, start: int, length: int, mode: int, node: int, flags: int = 0) -> None:
    """mbind(2) with one node. KernelError: EINVAL, EFAULT (a hole), EIO (strict, pages stayed)."""
    mm = process.mm
    host = mm.host
    host.sched.advance(COST_SYSCALL)
    end = start + ((length + 4095) & ~4095)
    known = mode in (MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND) and not flags & ~_MF_VALID
    if start & 4095 or end < start or not known:
        raise KernelError(EINVAL, f"mode {mode}, flags {flags} for {start:#x}+{length:#x}")
    if mode == MPOL_DEFAULT:
        flags &= ~MPOL_MF_STRICT
    _check_node(host, node)
    if start == end:
        return
    policy = Mempolicy(mode, node) if mode != MPOL_DEFAULT else None
    target = node if policy is not None else process.home_node
    moving = bool(flags & (MPOL_MF_MOVE | MPOL_MF_MOVE_ALL))
    wrong = frozenset(range(len(host.allocator.nodes))) - {target}
    if moving:
        host.lru.lru_cache_disable()
    try:
        mm.mmap_lock.lock()
        queue: list[int] = []
        try:
            failed = _bind_locked(mm, start, end, policy, wrong, flags, queue)
        except KernelError:
            # A huge page would have to be cut.
            putback_movable_pages(host, queue)
            raise
        finally:
            mm.mmap_lock.unlock()
        if queue:
            migrate_pages(host, queue, target, MR_MEMPOLICY_MBIND, MIGRATE_SYNC)
            failed += len(queue)
            putback_movable_pages(host, queue)
    finally:
        if moving:
            host.lru.lru_cache_enable()
    if failed < 0:
        raise KernelError(EFAULT, f"{start:#x}+{length:#x} has holes")
    if failed and flags & MPOL_MF_STRICT:
        raise KernelError(EIO, f"{failed} pages are elsewhere")


def _bind_locked(
    mm: MmStruct, start: int, end: int, policy: Mempolicy | None, wrong: frozenset[int], flags: int,
    queue: list[int],
) -> int:
    """Queue what must move and set the policy. How many pages could not be queued, -1 for a hole."""
    vmas = mm.vmas_in(start, end)
    reach = start
    for vma in vmas:
        if vma.start > reach:
            break
        reach = vma.end
    if reach < end and policy is not None:
        return -1
    failed = 0
    for vma in vmas:
        if flags and not vma.flags & (VM_IO | VM_PFNMAP):
            failed += _queue_pages(vma, start, end, wrong, flags, queue)
    if failed and flags == MPOL_MF_STRICT:
        # Nothing was to be moved, so that nothing is done at all.
        return failed
    for vma in vmas:
        _mbind_range(vma, start, end, policy)
    return failed


def do_migrate_pages(process: Process, source: int, target: int, *, move_all: bool = False) -> int:
    """migrate_pages(2): every page of the process from one node to another; how many stayed."""
    mm = process.mm
    host = mm.host
    host.sched.advance(COST_SYSCALL)
    for nid in (source, target):
        _check_node(host, nid)
    flags = MPOL_MF_MOVE_ALL if move_all else MPOL_MF_MOVE
    host.lru.lru_cache_disable()
    queue: list[int] = []
    mm.mmap_lock.read_lock()
    failed = 0
    for vma in mm.vmas:
        if not vma.flags & (VM_IO | VM_PFNMAP):
            failed += _queue_pages(vma, vma.start, vma.end, frozenset({source}), flags, queue)
    mm.mmap_lock.read_unlock()
    if queue:
        migrate_pages(host, queue, target, MR_SYSCALL, MIGRATE_SYNC)
        failed += len(queue)
        putback_movable_pages(host, queue)
    host.lru.lru_cache_enable()
    return failed
