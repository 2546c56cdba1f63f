"""How many huge pages the pool has: as many as the administrator asked for, and what promises add to that.

Source of truth: mm/hugetlb.c (set_max_huge_pages, alloc_pool_huge_folio, remove_pool_hugetlb_folio,
adjust_pool_surplus, alloc_surplus_hugetlb_folio, gather_surplus_pages, return_unused_surplus_pages,
hugetlb_acct_memory, dissolve_free_hugetlb_folios); Linux 6.18.

Not modelled: pages of 1 GiB, demotion, CMA, boot parameters, nr_hugepages_mempolicy and the files by node.
"""

from __future__ import annotations

from errno import EBUSY, ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR
from host_mm.hugetlb import (
    HTLB_ALLOC_MASK,
    HPG_temporary,
    Hstate,
    alloc_fresh_hugetlb_folio,
    free_huge_folio,
    update_and_free_pages_bulk,
)
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.page import PG_hugetlb
from host_mm.page_alloc import GFP_NORETRY, GFP_THISNODE

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = [
    "alloc_surplus_hugetlb_folio", "dissolve_free_hugetlb_folios", "hugetlb_acct_memory",
    "set_max_huge_pages",
]


def _alloc_pool_folio(h: Hstate, noretry: set[int]) -> int:
    """alloc_pool_huge_folio: from the node whose turn it is, or the next that has one."""
    for nid in h.nodes_to_alloc():
        h.turned_to_alloc(nid)
        gfp = HTLB_ALLOC_MASK | GFP_THISNODE | (GFP_NORETRY if nid in noretry else 0)
        pfn = alloc_fresh_hugetlb_folio(h.host, gfp, nid)
        if pfn >= 0:
            noretry.discard(nid)
            return pfn
        noretry.add(nid)
    return -1


def _remove_pool_folio(h: Hstate, *, surplus: bool) -> int:
    """remove_pool_hugetlb_folio: a free page of the node whose turn it is, out of the pool; or -1."""
    for nid in h.nodes_to_free():
        h.turned_to_free(nid)
        if h.freelists[nid] and (not surplus or h.surplus_node[nid]):
            pfn = next(reversed(h.freelists[nid]))
            h.remove(pfn, surplus=surplus)
            return pfn
    return -1


def _free_pool_folios(h: Hstate, most: int, *, surplus: bool) -> None:
    """Give up to so many free pages of the pool to the buddy, for which the lock is dropped."""
    gone: list[int] = []
    for _ in range(most):
        pfn = _remove_pool_folio(h, surplus=surplus)
        if pfn < 0:
            break
        gone.append(pfn)
    h.lock.unlock()
    update_and_free_pages_bulk(h.host, gone)
    h.lock.lock()


def _adjust_pool_surplus(h: Hstate, delta: int) -> bool:
    """One page more or less counts as surplus; false if no node has one to change."""
    for nid in h.nodes_to_alloc() if delta < 0 else h.nodes_to_free():
        if delta < 0:
            h.turned_to_alloc(nid)
            found = h.surplus_node[nid] > 0
        else:
            h.turned_to_free(nid)
            found = h.surplus_node[nid] < h.nr_node[nid]
        if found:
            h.surplus += delta
            h.surplus_node[nid] += delta
            return True
    return False


def _grow(h: Hstate, count: int) -> bool:
    """Allocate until `count` pages are persistent, with the lock dropped meanwhile; false: out of memory."""
    noretry: set[int] = set()
    fresh: list[int] = []
    complete = True
    while count > h.persistent + len(fresh):
        h.lock.unlock()
        if h.host.sched.preempt:
            h.host.sched.point("cond_resched")
        pfn = _alloc_pool_folio(h, noretry)
        h.lock.lock()
        if pfn < 0:
            complete = False
            break
        fresh.append(pfn)
    for pfn in fresh:
        h.account_new(pfn)
        h.enqueue(pfn)
    return complete


def _shrink(h: Hstate, count: int) -> None:
    persistent_free = h.free
    if h.free > h.persistent:
        persistent_free = max(0, h.free - h.surplus)
    floor = max(count, h.resv + h.persistent - persistent_free)
    _free_pool_folios(h, h.persistent - floor, surplus=False)
    # What is in use becomes surplus and leaves the pool when it is freed.
    while count < h.persistent and _adjust_pool_surplus(h, 1):
        pass


def set_max_huge_pages(host: HostMm, count: int) -> int:
    """Write `count` to /proc/sys/vm/nr_hugepages; how many persistent pages there are then.

    Fewer than asked for where memory is short or fragmented; more where pages are in use or reserved.
    """
    h = host.hstate
    host.sched.advance(COST_SYSCALL)
    h.resize_lock.lock()
    h.lock.lock()
    while h.surplus and count > h.persistent and _adjust_pool_surplus(h, -1):
        pass
    if _grow(h, count):
        _shrink(h, count)
    h.max_huge_pages = h.persistent
    h.lock.unlock()
    h.resize_lock.unlock()
    return h.max_huge_pages


def dissolve_free_hugetlb_folios(host: HostMm, start: int, end: int) -> int:
    """Give the free huge pages of these frames to the buddy: 0, or -EBUSY if one is in use or promised."""
    h = host.hstate
    for pfn in range(start & -HPAGE_PMD_NR, end, HPAGE_PMD_NR):
        h.lock.lock()
        if not host.pages.flags[pfn] & PG_hugetlb:
            h.lock.unlock()
            continue
        if host.pages.refcount[pfn] or h.available <= 0:
            h.lock.unlock()
            return -EBUSY
        h.remove(pfn, surplus=h.surplus_node[host.allocator.nid_of(pfn)] > 0)
        h.max_huge_pages -= 1
        h.lock.unlock()
        update_and_free_pages_bulk(host, [pfn])
    return 0


# -- surplus and reservations ---------------------------------------------------------------------
def alloc_surplus_hugetlb_folio(host: HostMm, nid: int) -> int:
    """A page beyond the pool, without a reference, if nr_overcommit_hugepages allows one; or -1."""
    h = host.hstate
    h.lock.lock()
    full = h.surplus >= h.nr_overcommit
    h.lock.unlock()
    if full:
        return -1
    pfn = alloc_fresh_hugetlb_folio(host, HTLB_ALLOC_MASK, nid)
    if pfn < 0:
        return -1
    h.lock.lock()
    h.account_new(pfn)
    if h.surplus >= h.nr_overcommit:
        host.pages.private[pfn] |= HPG_temporary
        h.lock.unlock()
        free_huge_folio(host, pfn)
        return -1
    h.surplus += 1
    h.surplus_node[host.allocator.nid_of(pfn)] += 1
    h.lock.unlock()
    return pfn


def _gather_surplus(h: Hstate, delta: int) -> bool:
    """gather_surplus_pages: promise `delta` pages, allocating what the pool lacks. The lock is held."""
    needed = h.resv + delta - h.free
    fresh: list[int] = []
    complete = True
    while needed > 0 and complete:
        h.lock.unlock()
        for _ in range(needed):
            pfn = alloc_surplus_hugetlb_folio(h.host, 0)
            if pfn < 0:
                complete = False
                break
            fresh.append(pfn)
        h.lock.lock()
        needed = h.resv + delta - (h.free + len(fresh))
    enough = needed <= 0
    if enough:
        h.resv += delta
        for _ in range(needed + len(fresh)):
            h.enqueue(fresh.pop())
    h.lock.unlock()
    for pfn in fresh:
        free_huge_folio(h.host, pfn)
    h.lock.lock()
    return enough


def _return_unused_surplus(h: Hstate, unused: int) -> None:
    """return_unused_surplus_pages: take back a promise, and the surplus made for it. The lock is held."""
    h.resv -= unused
    _free_pool_folios(h, min(unused, h.surplus), surplus=True)


def hugetlb_acct_memory(host: HostMm, delta: int) -> int:
    """Promise `delta` pages more, or -delta fewer; 0 or -ENOMEM."""
    if not delta:
        return 0
    h = host.hstate
    h.lock.lock()
    ret = 0
    if delta < 0:
        _return_unused_surplus(h, -delta)
    elif not _gather_surplus(h, delta):
        ret = -ENOMEM
    h.lock.unlock()
    return ret
