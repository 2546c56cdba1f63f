"""The pool of huge pages: who gets a page of it, and where pages go back.

Source of truth: mm/hugetlb.c (struct hstate, dequeue_hugetlb_folio_vma, alloc_hugetlb_folio_nodemask,
free_huge_folio, folio_isolate_hugetlb, folio_putback_hugetlb, move_hugetlb_state), include/linux/hugetlb.h
(enum hugetlb_page_flags); Linux 6.18. How large the pool is and what it has promised is in hugetlb_pool.py.

    nr          pages the pool owns: persistent ones and `surplus`, which go back to the buddy when freed
    free        on a free list, with reference count 0, so that nobody can take a reference
    resv        promised to mappings and not yet handed out; `free - resv` may be had without a promise. It
                can be less than 0 while a page that its owner unmapped is still held by somebody else

A free page is poisoned and told to `host.free_hooks` like one that the buddy allocator gets: whoever still
translates to it is wrong from then on. What it was (page flags, mapping) is forgotten there and not, as in
Linux, bit by bit by those who used it.

Not modelled: pages of 1 GiB, subpools (mount options size and min_size), the hugetlb cgroup, vmemmap
optimisation, CMA, cpusets, poisoned pages, the
count of huge pages per process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PMD_SIZE
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Mutex, Spinlock
from host_mm.mmzone import MIGRATE_ISOLATE, ZONE_MOVABLE
from host_mm.page import PG_head, PG_hugetlb, put_page, try_get_page
from host_mm.page_alloc import (
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_NOWARN,
    GFP_THISNODE,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = [
    "HPAGE_SIZE", "HPG_freed", "HPG_migratable", "HPG_restore_reserve", "HPG_temporary", "Hstate",
    "alloc_hugetlb_folio_nodemask", "dequeue_hugetlb_folio_vma", "folio_isolate_hugetlb",
    "folio_putback_hugetlb", "free_huge_folio", "move_hugetlb_state",
]

HPAGE_SIZE = PMD_SIZE
HTLB_ALLOC_MASK = GFP_HIGHUSER_MOVABLE | GFP_COMP | GFP_NOWARN
NR_FAULT_MUTEXES = 64
"""num_fault_mutexes: a power of two, eight for each CPU."""

# enum hugetlb_page_flags: in `private` of the head.
HPG_restore_reserve = 1 << 0
HPG_migratable = 1 << 1
HPG_temporary = 1 << 2
HPG_freed = 1 << 3


class Hstate:
    """struct hstate for 2 MiB pages. Counts are of huge pages, `*_node` by node; all under `lock`.

    A list of pages is a dict used as an ordered set whose end is the kernel list's head.
    """

    __slots__ = (
        "active", "fault_mutexes", "free", "free_node", "freelists", "host", "lock", "max_huge_pages",
        "next_nid_to_alloc", "next_nid_to_free", "nr", "nr_node", "nr_overcommit", "resize_lock", "resv",
        "surplus", "surplus_node",
    )

    def __init__(self, host: HostMm, nr_nodes: int) -> None:
        self.host = host
        self.lock = Spinlock(host.sched, "hugetlb_lock")
        self.resize_lock = Mutex(host.sched, "hugetlb_resize_lock")
        self.fault_mutexes = [Mutex(host.sched, "hugetlb_fault_mutex") for _ in range(NR_FAULT_MUTEXES)]
        self.nr = self.free = self.surplus = self.resv = self.nr_overcommit = self.max_huge_pages = 0
        self.nr_node = [0] * nr_nodes
        self.free_node = [0] * nr_nodes
        self.surplus_node = [0] * nr_nodes
        self.freelists: list[dict[int, None]] = [{} for _ in range(nr_nodes)]
        self.active: dict[int, None] = {}
        self.next_nid_to_alloc = self.next_nid_to_free = 0

    @property
    def persistent(self) -> int:
        """persistent_huge_pages: what nr_hugepages shows."""
        return self.nr - self.surplus

    @property
    def available(self) -> int:
        """available_huge_pages: free and promised to nobody."""
        return self.free - self.resv

    def fault_mutex(self, ino: int, index: int) -> Mutex:
        """hugetlb_fault_mutex_table[hash]: serialises faults on huge page `index` of the file `ino`."""
        return self.fault_mutexes[(ino * 31 + index) & (NR_FAULT_MUTEXES - 1)]

    # -- lists, under the lock ----------------------------------------------------------------

    def enqueue(self, pfn: int) -> None:
        """enqueue_hugetlb_folio: a page without references becomes free."""
        nid = self.host.allocator.nid_of(pfn)
        self.active.pop(pfn, None)
        self.freelists[nid][pfn] = None
        self.free += 1
        self.free_node[nid] += 1
        self.host.pages.private[pfn] |= HPG_freed

    def dequeue(self, nid: int) -> int:
        """dequeue_hugetlb_folio_node_exact: a free page of the node, with one reference; or -1.

        None of an isolated block, and for a long-term pin none of ZONE_MOVABLE.
        """
        allocator, free = self.host.allocator, self.freelists[nid]
        fixed = self.host.sched.current in allocator.memalloc_pin
        for pfn in reversed(free):
            movable = fixed and allocator.zone_of(pfn).idx == ZONE_MOVABLE
            if not movable and allocator.blocks.migratetype(pfn) != MIGRATE_ISOLATE:
                break
        else:
            return -1
        del free[pfn]
        pages = self.host.pages
        self.active[pfn] = None
        pages.refcount[pfn] = 1
        pages.private[pfn] &= ~HPG_freed
        self.free -= 1
        self.free_node[nid] -= 1
        return pfn

    def dequeue_nodemask(self, nid: int, *, this_node: bool = False) -> int:
        """The same from the nearest node that has one."""
        nodes = [nid] if this_node else [*range(nid, len(self.freelists)), *range(nid)]
        for node in nodes:
            pfn = self.dequeue(node)
            if pfn >= 0:
                return pfn
        return -1

    def account_new(self, pfn: int) -> None:
        """account_new_hugetlb_folio."""
        self.nr += 1
        self.nr_node[self.host.allocator.nid_of(pfn)] += 1

    def remove(self, pfn: int, *, surplus: bool) -> None:
        """remove_hugetlb_folio: the page is the pool's no longer."""
        nid = self.host.allocator.nid_of(pfn)
        pages = self.host.pages
        self.active.pop(pfn, None)
        if pages.private[pfn] & HPG_freed:
            del self.freelists[nid][pfn]
            self.free -= 1
            self.free_node[nid] -= 1
        if surplus:
            self.surplus -= 1
            self.surplus_node[nid] -= 1
        pages.flags[pfn] &= ~PG_hugetlb
        pages.private[pfn] = 0
        self.nr -= 1
        self.nr_node[nid] -= 1

    # -- nodes in turn ------------------------------------------------------------------------

    def nodes_to_alloc(self) -> list[int]:
        """for_each_node_mask_to_alloc, as far as the next caller is concerned: one step."""
        return self._turn("next_nid_to_alloc")

    def nodes_to_free(self) -> list[int]:
        """for_each_node_mask_to_free."""
        return self._turn("next_nid_to_free")

    def _turn(self, which: str) -> list[int]:
        first: int = getattr(self, which)
        count = len(self.freelists)
        return [(first + step) % count for step in range(count)]

    def turned_to_alloc(self, nid: int) -> None:
        """`nid` was the last node that was looked at."""
        self.next_nid_to_alloc = (nid + 1) % len(self.freelists)

    def turned_to_free(self, nid: int) -> None:
        """`nid` was the last node that was looked at."""
        self.next_nid_to_free = (nid + 1) % len(self.freelists)


# -- from and to the buddy ------------------------------------------------------------------------
def alloc_fresh_hugetlb_folio(host: HostMm, gfp: int, nid: int) -> int:
    """only_alloc_fresh_hugetlb_folio: 2 MiB from the buddy without a reference, or -1."""
    pfn = host.allocator.alloc_pages(gfp, HPAGE_PMD_ORDER, nid)
    if pfn < 0:
        host.vmstat["htlb_buddy_alloc_fail"] += 1
        return -1
    host.vmstat["htlb_buddy_alloc_success"] += 1
    host.pages.refcount[pfn] = 0
    host.pages.flags[pfn] |= PG_hugetlb
    return pfn


def update_and_free_pages_bulk(host: HostMm, pfns: list[int]) -> None:
    """update_and_free_pages_bulk: pages that left the pool go to the buddy."""
    for pfn in pfns:
        host.allocator.free_frozen_pages(pfn, HPAGE_PMD_ORDER)
        if host.sched.preempt:
            host.sched.point("cond_resched")


def _forget(host: HostMm, pfn: int) -> None:
    """The page goes back to the pool: nothing of what it was is left, and nobody may reach it."""
    pages = host.pages
    pages.flags[pfn] = PG_head | PG_hugetlb
    pages.private[pfn] = 0
    pages.index[pfn] = 0
    for frame in range(pfn, pfn + HPAGE_PMD_NR):
        pages.generation[frame] = (pages.generation[frame] + 1) & 0xFFFFFFFF
        host.ram.poison_page(frame)
    if (t := host.trace.frame_free) is not None:
        t(pfn, HPAGE_PMD_ORDER, host.allocator.nid_of(pfn))
    for hook in host.free_hooks:
        hook(pfn, HPAGE_PMD_ORDER)


def free_huge_folio(host: HostMm, pfn: int) -> None:
    """The last reference is gone: to the pool, or to the buddy if it is one too many for it."""
    h = host.hstate
    pages = host.pages
    if pages.entire_mapcount[pfn] or pages.refcount[pfn]:
        raise BrokenTruth("bad-page-state", f"huge page {pfn:#x} is freed in use", host.stream.here())
    pages.mapping.pop(pfn, None)
    restore = pages.private[pfn] & HPG_restore_reserve
    temporary = pages.private[pfn] & HPG_temporary
    pages.private[pfn] &= ~(HPG_restore_reserve | HPG_migratable)
    h.lock.lock()
    if restore:
        h.resv += 1
    surplus = not temporary and h.surplus_node[host.allocator.nid_of(pfn)] > 0
    if temporary or surplus:
        h.remove(pfn, surplus=surplus)
        h.lock.unlock()
        update_and_free_pages_bulk(host, [pfn])
        return
    _forget(host, pfn)
    h.enqueue(pfn)
    h.lock.unlock()


# -- a page for somebody --------------------------------------------------------------------------
def huge_node(vma: VmArea) -> int:
    """The node that the VMA's policy, or its process, prefers."""
    policy = vma.policy
    nid: int = policy.preferred_node() if policy is not None else vma.mm.process.home_node
    return nid


def dequeue_hugetlb_folio_vma(host: HostMm, nid: int, *, reserved: bool) -> int:
    """A free page with one reference, of that node if it has one; or -1. The lock is held.

    Without `reserved` none that was promised.
    """
    h = host.hstate
    if not reserved and not h.available:
        return -1
    return h.dequeue_nodemask(nid)


def alloc_hugetlb_folio_nodemask(host: HostMm, nid: int) -> int:
    """A page to migrate to: a free one of the node, or a temporary one from the buddy; or -1."""
    h = host.hstate
    h.lock.lock()
    pfn = h.dequeue_nodemask(nid, this_node=True) if h.available > 0 else -1
    h.lock.unlock()
    if pfn >= 0:
        return pfn
    pfn = alloc_fresh_hugetlb_folio(host, HTLB_ALLOC_MASK | GFP_THISNODE, nid)
    if pfn < 0:
        return -1
    h.lock.lock()
    h.account_new(pfn)
    h.active[pfn] = None
    h.lock.unlock()
    host.pages.refcount[pfn] = 1
    host.pages.private[pfn] |= HPG_temporary
    return pfn


# -- isolation ------------------------------------------------------------------------------------
def folio_isolate_hugetlb(host: HostMm, pfn: int) -> bool:
    """Claim a page that is in use for a migration, with a reference; see folio_putback_hugetlb."""
    pages = host.pages
    h = host.hstate
    h.lock.lock()
    ok = bool(pages.flags[pfn] & PG_hugetlb and pages.private[pfn] & HPG_migratable)
    ok = ok and try_get_page(host, pfn)
    if ok:
        pages.private[pfn] &= ~HPG_migratable
    h.lock.unlock()
    return ok


def folio_putback_hugetlb(host: HostMm, pfn: int) -> None:
    """Undo folio_isolate_hugetlb."""
    h = host.hstate
    h.lock.lock()
    host.pages.private[pfn] |= HPG_migratable
    h.active.pop(pfn, None)
    h.active[pfn] = None
    h.lock.unlock()
    put_page(host, pfn)


def move_hugetlb_state(host: HostMm, old: int, new: int) -> None:
    """After a migration: the old page is the temporary one now, and the new one may be migrated."""
    pages = host.pages
    h = host.hstate
    if pages.private[new] & HPG_temporary:
        pages.private[old] |= HPG_temporary
        pages.private[new] &= ~HPG_temporary
        old_nid, new_nid = host.allocator.nid_of(old), host.allocator.nid_of(new)
        if new_nid == old_nid:
            return
        h.lock.lock()
        if h.surplus_node[old_nid]:
            h.surplus_node[old_nid] -= 1
            h.surplus_node[new_nid] += 1
        h.lock.unlock()
    h.lock.lock()
    pages.private[new] |= HPG_migratable
    h.active.pop(new, None)
    h.active[new] = None
    h.lock.unlock()
