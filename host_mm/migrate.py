"""Page migration: a folio's contents move to another frame and its mappings follow.

Source of truth: mm/migrate.c: alloc_migration_target, migrate_pages, do_pages_move; Linux 6.18. What is done
to each folio is in migrate_batch.py.

Not modelled: movable_ops pages.
"""

from __future__ import annotations

from errno import EACCES, EBUSY, EFAULT, ENODEV, ENOENT
from functools import partial
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pmd_pfn, pmd_trans_huge, pte_pfn, pte_present
from host_mm.huge_memory_map import pmd_folio
from host_mm.huge_mm import GFP_TRANSHUGE
from host_mm.hugetlb import folio_isolate_hugetlb, folio_putback_hugetlb
from host_mm.hugetlb_share import hugetlb_vma_lock_read, hugetlb_vma_unlock_read
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.migrate_batch import NR_RETRY, MigrationBatch
from host_mm.migrate_types import (
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    MIGRATE_SYNC_LIGHT,
    MR_COMPACTION,
    MR_CONTIG_RANGE,
    MR_LONGTERM_PIN,
    MR_MEMORY_FAILURE,
    MR_MEMORY_HOTPLUG,
    MR_MEMPOLICY_MBIND,
    MR_NUMA_MISPLACED,
    MR_SYSCALL,
    MigrationTarget,
    NewFolio,
    PutFolio,
)
from host_mm.mm_types import VM_HUGETLB, VM_IO, VM_PFNMAP
from host_mm.mmzone import ZONE_MOVABLE
from host_mm.page import (
    PG_hugetlb,
    folio_maybe_mapped_shared,
    folio_test_large,
    page_folio,
    put_page,
)
from host_mm.page_alloc import (
    GFP_COMP,
    GFP_DIRECT_RECLAIM,
    GFP_HIGHMEM,
    GFP_HIGHUSER_MOVABLE,
    GFP_KSWAPD_RECLAIM,
    GFP_THISNODE,
    alloc_pages,
)
from host_mm.pgtable_generic import pmd_lock, pmd_offset, pte_lockptr, pte_offset_map_lock, ptep_get
from host_mm.pgtable_huge import pmd_trans_huge_lock, pmdp_get

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.process import Process

__all__ = [
    "MIGRATE_ASYNC",
    "MIGRATE_SYNC",
    "MIGRATE_SYNC_LIGHT",
    "MR_COMPACTION",
    "MR_CONTIG_RANGE",
    "MR_LONGTERM_PIN",
    "MR_MEMORY_FAILURE",
    "MR_MEMORY_HOTPLUG",
    "MR_MEMPOLICY_MBIND",
    "MR_NUMA_MISPLACED",
    "MR_SYSCALL",
    "MigrationTarget",
    "migrate_pages",
    "move_pages",
    "putback_movable_pages",
]

_NR_MAX_BATCHED = 512


def alloc_migration_target(host: HostMm, src: int, target: MigrationTarget) -> int:
    """A frame for the page `src`, or -1; no process dies for it."""
    allocator = host.allocator
    nid = target.nid if target.nid >= 0 else allocator.nid_of(src)
    gfp = target.gfp | GFP_COMP
    order = 0
    if folio_test_large(host.pages, src):
        gfp = (gfp & ~(GFP_DIRECT_RECLAIM | GFP_KSWAPD_RECLAIM)) | GFP_TRANSHUGE
        order = host.pages.order[src]
    if allocator.zone_of(src).idx == ZONE_MOVABLE:
        gfp |= GFP_HIGHMEM
    if target.nodes is None:
        return alloc_pages(host, gfp, order, nid)
    for node in (nid, *(node.nid for node in allocator.nodes if node.nid != nid)):
        if node in target.nodes and (pfn := alloc_pages(host, gfp | GFP_THISNODE, order, node)) >= 0:
            return pfn
    return -1


def _new_folio(host: HostMm, target: MigrationTarget, src: int) -> int:
    return alloc_migration_target(host, src, target)


def putback_movable_pages(host: HostMm, pfns: list[int]) -> None:
    """Give folios that stay where they are back to their lists."""
    for pfn in pfns:
        if host.pages.flags[pfn] & PG_hugetlb:
            folio_putback_hugetlb(host, pfn)
        else:
            host.lru.folio_putback_lru(pfn)
    pfns.clear()


def migrate_pages(
    host: HostMm, pfns: list[int], target: int | MigrationTarget | NewFolio, reason: int, mode: int,
    put_new_folio: PutFolio | None = None,
) -> int:
    """Move isolated folios to a `target`. How many stayed, or -ENOMEM; those are left in `pfns`.

    The caller isolated them from the LRU and gives what stays to putback_movable_pages. A target is exactly
    one node, or a MigrationTarget, or who gives new frames; unused ones then go to `put_new_folio`.
    """
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.mm_migrate_pages_start) is not None:
        ctx.cause = t(mode, reason)
    if isinstance(target, int):
        target = MigrationTarget(target, GFP_HIGHUSER_MOVABLE | GFP_THISNODE)
    if isinstance(target, MigrationTarget):
        get_new_folio: NewFolio = partial(_new_folio, host, target)
    else:
        get_new_folio = target
    batch = MigrationBatch(host, get_new_folio, put_new_folio or partial(put_page, host), reason)
    rc_gather = 0
    todo = [pfn for pfn in pfns if not host.pages.flags[pfn] & PG_hugetlb]
    if len(todo) < len(pfns):
        huge = [pfn for pfn in pfns if host.pages.flags[pfn] & PG_hugetlb]
        nid = target.nid if isinstance(target, MigrationTarget) else -1
        rc_gather = batch.hugetlbs(huge, nid if nid >= 0 else host.allocator.nid_of(huge[0]), mode)
        if rc_gather < 0:
            batch.ret_folios += todo
            todo = []
    pfns[:] = []
    if not host.profile.migrate_batches:
        rc_gather += batch.one_by_one(todo, mode)
        todo = []
    while todo:
        folios, todo = todo[:_NR_MAX_BATCHED], todo[_NR_MAX_BATCHED:]
        if mode == MIGRATE_ASYNC:
            rc, left = batch.run(folios, mode, NR_RETRY)
            batch.ret_folios += left
        else:
            rc = batch.sync(folios, mode)
        if rc < 0:
            rc_gather = rc
            break
        rc_gather += rc
    if batch.split_folios:
        batch.finish_split(mode)
    pfns += batch.ret_folios + todo
    host.vmstat["pgmigrate_success"] += batch.nr_succeeded
    host.vmstat["pgmigrate_fail"] += batch.nr_failed_pages
    if (t := host.trace.mm_migrate_pages) is not None:
        thps = batch.nr_thp_succeeded, batch.nr_thp_failed, batch.nr_thp_split
        t(batch.nr_succeeded, batch.nr_failed_pages, *thps, batch.nr_thp_split, mode, reason)
    ctx.cause = saved
    return rc_gather


# -- move_pages(2) ------------------------------------------------------------------------------


def _add_folio_for_migration(mm: MmStruct, address: int, nid: int, pagelist: list[int], every: bool) -> int:
    """Isolate the page at `address`. 1: queued; 0: on that node already; or a negative errno."""
    host = mm.host
    mm.mmap_lock.read_lock()
    vma = mm.vma_lookup(address)
    if vma is None or vma.flags & (VM_IO | VM_PFNMAP):
        mm.mmap_lock.read_unlock()
        return -EFAULT
    ret = -ENOENT
    if vma.flags & VM_HUGETLB:
        ret = _add_huge_page_for_migration(vma, address, nid, pagelist, every)
        mm.mmap_lock.read_unlock()
        return ret
    pmd = pmd_offset(mm, address)
    if pmd and (lock := pmd_trans_huge_lock(mm, pmd)) is not None:
        folio = pmd_folio(mm, pmdp_get(mm, pmd))
        if pmd_trans_huge(pmdp_get(mm, pmd)):
            ret = _isolate_for_migration(host, folio, nid, pagelist, every) if folio >= 0 else -EFAULT
        lock.unlock()
        mm.mmap_lock.read_unlock()
        return ret
    pte = pte_offset_map_lock(mm, pmd, address) if pmd else 0
    if pte:
        entry = ptep_get(mm, pte)
        if pte_present(entry):
            ret = _isolate_for_migration(host, pte_pfn(entry), nid, pagelist, every)
        pte_lockptr(mm, pte).unlock()
    mm.mmap_lock.read_unlock()
    return ret


def _add_huge_page_for_migration(
    vma: VmArea, address: int, nid: int, pagelist: list[int], every: bool
) -> int:
    mm = vma.mm
    host = mm.host
    hugetlb_vma_lock_read(vma)
    pmd = pmd_offset(mm, address)
    ret = -ENOENT
    if pmd:
        lock = pmd_lock(mm, pmd)
        entry = host.ram.u64[pmd >> 3]
        if pte_present(entry):
            ret = _isolate_for_migration(host, pmd_pfn(entry), nid, pagelist, every)
        lock.unlock()
    hugetlb_vma_unlock_read(vma)
    return ret


def _isolate_for_migration(host: HostMm, pfn: int, nid: int, pagelist: list[int], every: bool) -> int:
    if pfn == host.zero_pfn:
        return -EFAULT
    pfn = page_folio(host.pages, pfn)
    if host.allocator.nid_of(pfn) == nid:
        return 0
    if folio_maybe_mapped_shared(host.pages, pfn) and not every:
        return -EACCES
    if host.pages.flags[pfn] & PG_hugetlb:
        if not folio_isolate_hugetlb(host, pfn):
            return -EBUSY
        pagelist.append(pfn)
        return 1
    if not host.lru.folio_isolate_lru(pfn):
        return -EBUSY
    pagelist.append(pfn)
    return 1


def move_pages(process: Process, hvas: list[int], nodes: list[int], *, move_all: bool = False) -> list[int]:
    """move_pages(2): each page to its node; per page the node it is on, or a negative errno.

    With `move_all` (MPOL_MF_MOVE_ALL) pages that other processes map too are moved. A page that stays
    because it is in use has -EBUSY, where Linux leaves its status alone, stops after the migrate_pages
    call it was in and returns how many were not moved.
    KernelError: ENODEV for a node that does not exist.
    """
    mm = process.mm
    host = mm.host
    host.sched.advance(COST_SYSCALL)
    for nid in nodes:
        if not 0 <= nid < len(host.allocator.nodes):
            raise KernelError(ENODEV, f"there is no node {nid}")
    status = [0] * len(hvas)
    host.lru.lru_cache_disable()
    index = 0
    while index < len(hvas):
        # One call of migrate_pages for each run of addresses that go to one node and could be queued.
        nid = nodes[index]
        pagelist: list[int] = []
        queued: list[tuple[int, int]] = []
        while index < len(hvas) and nodes[index] == nid:
            ret = _add_folio_for_migration(mm, hvas[index], nid, pagelist, move_all)
            status[index] = nid if ret >= 0 else ret
            index += 1
            if ret <= 0:
                break
            queued.append((index - 1, pagelist[-1]))
        if pagelist:
            migrate_pages(host, pagelist, nid, MR_SYSCALL, MIGRATE_SYNC)
        stayed = set(pagelist)
        for at, pfn in queued:
            if pfn in stayed:
                status[at] = -EBUSY
        putback_movable_pages(host, pagelist)
    host.lru.lru_cache_enable()
    return status
