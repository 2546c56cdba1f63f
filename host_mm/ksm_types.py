"""What KSM knows: its knobs and counts, rmap_items, stable nodes; and the reverse mapping of a KSM page.

Source of truth: mm/ksm.c (struct ksm_rmap_item, ksm_stable_node, ksm_mm_slot, ksm_scan, rmap_walk_ksm,
folio_migrate_ksm), include/linux/ksm.h (is_ksm_zero_pte, ksm_might_unmap_zero_page); Linux 6.18.

A KSM page has PG_ksm and PG_anon; its `mapping` is its stable node, which in turn holds the places that
share it, as rmap_items. A node holds no reference to its page: while the page's mapping names the node,
the page is the node's.

Not modelled: the trees' red-black shape (ksm_tree.py searches sorted lists by halves), the mm_slot hash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pte_dirty, pte_pfn
from host_mm.kernel.locks import Mutex, Spinlock
from host_mm.kernel.sched import WaitQueue
from host_mm.page import PG_ksm

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.sched import Task
    from host_mm.mm_types import AnonVma, MmStruct, VmArea

__all__ = [
    "KSM_RUN_MERGE", "KSM_RUN_STOP", "KSM_RUN_UNMERGE", "SEQNR_MASK", "STABLE_FLAG", "UNSTABLE_FLAG", "Ksm",
    "KsmMmSlot", "KsmRmapItem", "KsmStableChain", "KsmStableNode", "folio_migrate_ksm",
    "folio_set_stable_node", "folio_stable_node", "is_ksm_zero_pte", "ksm_map_zero_page",
    "ksm_might_unmap_zero_page", "ksm_test_exit", "rmap_walk_ksm",
]

KSM_RUN_STOP = 0
KSM_RUN_MERGE = 1
KSM_RUN_UNMERGE = 2

SEQNR_MASK = 0x0FF
UNSTABLE_FLAG = 0x100
STABLE_FLAG = 0x200


class KsmRmapItem:
    """struct ksm_rmap_item: one virtual address that ksmd looks at.

    `flags` is what the kernel keeps in the low bits of the address: UNSTABLE_FLAG with the scan's
    number, or STABLE_FLAG. `head` is its stable node, `anon_vma` is held with it.
    """

    __slots__ = ("address", "age", "anon_vma", "flags", "head", "mm", "oldchecksum", "remaining_skips")

    def __init__(self, mm: MmStruct, address: int) -> None:
        self.mm = mm
        self.address = address
        self.flags = 0
        self.head: KsmStableNode | None = None
        self.anon_vma: AnonVma | None = None
        self.oldchecksum = 0
        self.age = 0
        self.remaining_skips = 0


class KsmStableNode:
    """struct ksm_stable_node of one KSM page: frame `kpfn`, its rmap_items newest first.

    `chain` is the chain it is a duplicate in, or None if it stands in the tree itself.
    """

    __slots__ = ("chain", "hlist", "kpfn")

    def __init__(self, kpfn: int) -> None:
        self.kpfn = kpfn
        self.hlist: list[KsmRmapItem] = []
        self.chain: KsmStableChain | None = None


class KsmStableChain:
    """A stable node of STABLE_NODE_CHAIN: KSM pages with the same bytes, each full but perhaps one."""

    __slots__ = ("dups", "prune_time")

    def __init__(self, now: int) -> None:
        self.dups: list[KsmStableNode] = []
        self.prune_time = now


class KsmMmSlot:
    """struct ksm_mm_slot: an address space on ksmd's round; its rmap_items are sorted by address."""

    __slots__ = ("mm", "rmap_list")

    def __init__(self, mm: MmStruct) -> None:
        self.mm = mm
        self.rmap_list: list[KsmRmapItem] = []


class Ksm:
    """KSM of one host: /sys/kernel/mm/ksm and what mm/ksm.c keeps in static variables.

    The cursor (struct ksm_scan) is `cursor`, None at the list's head, `address` and `index` into the
    slot's rmap_items. `changes` counts checksums that changed and merges that were tried; `quiet_scans`
    the latest full scans in a row that met neither. `scan_wait` is woken after each full scan.
    """

    def __init__(self, host: HostMm) -> None:
        self.run = KSM_RUN_STOP
        self.pages_to_scan = 100
        self.sleep_millisecs = 20
        self.use_zero_pages = False
        self.max_page_sharing = 256
        self.smart_scan = host.profile.ksm_smart_scan
        self.stable_node_chains_prune_millisecs = 2000

        self.ksm_pages_scanned = 0
        self.ksm_pages_shared = 0
        self.ksm_pages_sharing = 0
        self.ksm_pages_unshared = 0
        self.ksm_pages_skipped = 0
        self.ksm_rmap_items = 0
        self.ksm_stable_node_chains = 0
        self.ksm_stable_node_dups = 0
        self.ksm_zero_pages = 0

        self.stable_tree: list[KsmStableNode | KsmStableChain] = []
        self.unstable_tree: list[KsmRmapItem] = []
        self.mm_slots: list[KsmMmSlot] = []
        self.cursor: KsmMmSlot | None = None
        self.address = 0
        self.index = 0
        self.seqnr = 0

        self.changes = self.changes_at_start = self.quiet_scans = self.full_scans = 0
        self.thread: Task | None = None
        self.cause: int | None = None
        self.thread_mutex = Mutex(host.sched, "ksm_thread_mutex")
        self.mmlist_lock = Spinlock(host.sched, "ksm_mmlist_lock")
        self.thread_wait = WaitQueue(host.sched, "ksm_thread_wait")
        self.scan_wait = WaitQueue(host.sched, "ksm_scan")

    @property
    def scanning(self) -> bool:
        """Whether ksmd is at work now, not between two batches."""
        return self.thread_mutex.owner is not None

    def should_run(self) -> bool:
        """ksmd_should_run."""
        return bool(self.run & KSM_RUN_MERGE and self.mm_slots)

    def stat(self) -> dict[str, int]:
        """The counts in /sys/kernel/mm/ksm, by file name."""
        shared, sharing, unshared = self.ksm_pages_shared, self.ksm_pages_sharing, self.ksm_pages_unshared
        return {
            "full_scans": self.seqnr,
            "ksm_zero_pages": self.ksm_zero_pages,
            "pages_scanned": self.ksm_pages_scanned,
            "pages_shared": shared,
            "pages_sharing": sharing,
            "pages_skipped": self.ksm_pages_skipped,
            "pages_unshared": unshared,
            "pages_volatile": max(0, self.ksm_rmap_items - shared - sharing - unshared),
            "stable_node_chains": self.ksm_stable_node_chains,
            "stable_node_dups": self.ksm_stable_node_dups,
        }


def ksm_test_exit(mm: MmStruct) -> bool:
    """Whether nobody uses the address space any more: ksmd keeps off."""
    return mm.mm_users == 0


# -- KSM pages --------------------------------------------------------------------------------
def folio_stable_node(host: HostMm, pfn: int) -> KsmStableNode | None:
    """The stable node of a KSM page; None for other pages and before the page is in the tree."""
    return host.pages.mapping.get(pfn) if host.pages.flags[pfn] & PG_ksm else None


def folio_set_stable_node(host: HostMm, pfn: int, node: KsmStableNode | None) -> None:
    """Make the page a KSM page, of `node` or for the time being of none; the folio lock is held."""
    pages = host.pages
    pages.flags[pfn] |= PG_ksm
    if node is None:
        pages.mapping.pop(pfn, None)
    else:
        pages.mapping[pfn] = node


def folio_migrate_ksm(host: HostMm, new: int, old: int) -> None:
    """Migration: the stable node follows the bytes. Both folios are locked, `new` has old's mapping."""
    node = folio_stable_node(host, old)
    if node is not None:
        node.kpfn = new
        folio_set_stable_node(host, old, None)


# -- zero pages -------------------------------------------------------------------------------
def is_ksm_zero_pte(host: HostMm, entry: int) -> bool:
    """Whether KSM put the zero page there: it says so by the dirty bit."""
    return pte_pfn(entry) == host.zero_pfn and pte_dirty(entry)


def ksm_map_zero_page(mm: MmStruct) -> None:
    """One more place where KSM put the zero page."""
    mm.host.ksm.ksm_zero_pages += 1
    mm.ksm_zero_pages += 1


def ksm_might_unmap_zero_page(mm: MmStruct, entry: int) -> None:
    """A present entry without a struct page goes; count it if it was KSM's."""
    if is_ksm_zero_pte(mm.host, entry):
        mm.host.ksm.ksm_zero_pages -= 1
        mm.ksm_zero_pages -= 1


# -- reverse mapping --------------------------------------------------------------------------
def rmap_walk_ksm(
    host: HostMm, pfn: int, rmap_one: Callable[[VmArea, int], bool], *,
    try_lock: bool = False, done: Callable[[], bool] | None = None,
) -> bool:
    """rmap_walk of a locked KSM page: the rmap_items' own processes first, then those forked since.

    False: `try_lock` and an anon_vma's lock was contended.
    """
    node = folio_stable_node(host, pfn)
    if node is None:
        return True
    sched = host.sched
    for search_new_forks in (False, True):
        for item in list(node.hlist):
            anon_vma = item.anon_vma
            assert anon_vma is not None
            rwsem = anon_vma.root.rwsem
            if sched.preempt:
                sched.point("cond_resched")
            if not rwsem.read_trylock():
                if try_lock:
                    return False
                rwsem.read_lock()
            vmas = [
                avc.vma for avc in anon_vma.chains.values()
                if avc.vma.start <= item.address < avc.vma.end
                and (avc.vma.mm is item.mm) != search_new_forks
            ]
            for vma in sorted(vmas, key=lambda vma: vma.pgoff):
                if not rmap_one(vma, item.address) or (done is not None and done()):
                    rwsem.read_unlock()
                    return True
            rwsem.read_unlock()
    return True
