"""Transparent huge pages: which mappings may have them, and what the host keeps about them.

Source of truth: include/linux/huge_mm.h (thp_vma_suitable_order, vma_thp_disabled), mm/huge_memory.c
(__thp_vma_allowable_orders, vma_thp_gfp_mask, get_huge_zero_folio, mm_get_huge_zero_folio,
shrink_huge_zero_folio_scan, deferred_split_folio, __folio_unqueue_deferred_split); Linux 6.18, order 9.

    --param thp.enabled=always|madvise|never                     which anonymous mappings get huge pages
    --param thp.defrag=always|defer|defer+madvise|madvise|never  how hard a fault tries to get one
    --param thp.use_zero_page=Y|N                                whether a read fault maps the huge zero page
    --param thp.shmem_enabled=always|within_size|advise|never|deny|force

Not modelled: orders other than 9, the per-size files (hugepages-2048kB/enabled inherits), prctl's
PR_SET_THP_DISABLE, DAX, device mappings.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_ORDER, PMD_SIZE, pmd_pfn, pmd_trans_huge
from host_mm.kernel.costs import COST_CLEAR_PAGE
from host_mm.kernel.locks import Spinlock
from host_mm.mm_types import (
    MMF_HUGE_ZERO_FOLIO,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_NOHUGEPAGE,
    VM_SPECIAL,
)
from host_mm.page import PG_swapcache, PG_uptodate, put_page
from host_mm.page_alloc import (
    GFP_COMP,
    GFP_DIRECT_RECLAIM,
    GFP_HIGHUSER_MOVABLE,
    GFP_KSWAPD_RECLAIM,
    GFP_MOVABLE,
    GFP_NORETRY,
    GFP_NOWARN,
    GFP_ZERO,
    alloc_pages,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "GFP_TRANSHUGE",
    "GFP_TRANSHUGE_LIGHT",
    "TVA_FORCED_COLLAPSE",
    "TVA_KHUGEPAGED",
    "TVA_PAGEFAULT",
    "Thp",
    "deferred_split_folio",
    "is_huge_zero_pfn",
    "is_huge_zero_pmd",
    "mm_get_huge_zero_folio",
    "mm_put_huge_zero_folio",
    "shrink_huge_zero_folio",
    "thp_enabled",
    "thp_vma_allowable_order",
    "thp_vma_suitable_order",
    "vma_is_anonymous",
    "vma_thp_gfp_mask",
]

# enum tva_type: who asks.
TVA_PAGEFAULT, TVA_KHUGEPAGED, TVA_FORCED_COLLAPSE = 1, 2, 3

_GFP_RECLAIM = GFP_DIRECT_RECLAIM | GFP_KSWAPD_RECLAIM
GFP_TRANSHUGE_LIGHT = (GFP_HIGHUSER_MOVABLE | GFP_COMP | GFP_NOWARN) & ~_GFP_RECLAIM
GFP_TRANSHUGE = GFP_TRANSHUGE_LIGHT | GFP_DIRECT_RECLAIM
_VM_NO_KHUGEPAGED = VM_SPECIAL | VM_HUGETLB
_NO = ("n", "0", "no", "off", "false")


class Thp:
    """What mm/huge_memory.c has as its globals, for one host.

    `deposited`: level-1 tables kept for splits, by the frame of the level-2 table they hang on.
    `split_queues`: by node, the folios that a shrinker may split, oldest first; `partially_mapped`: those
    of which some page has no entry any more.
    """

    __slots__ = (
        "defrag", "deposited", "enabled", "host", "huge_zero_pfn", "huge_zero_refcount", "nr_deferred",
        "partially_mapped",
        "shmem_enabled", "split_queue_lock", "split_queues", "use_zero_page",
    )

    def __init__(self, host: HostMm) -> None:
        params = host.params
        self.host = host
        self.enabled = params.get("thp.enabled", "madvise")
        self.defrag = params.get("thp.defrag", "madvise")
        self.use_zero_page = params.get("thp.use_zero_page", "Y").lower() not in _NO
        self.shmem_enabled = params.get("thp.shmem_enabled", "never")
        self.deposited: dict[int, list[int]] = {}
        self.huge_zero_pfn = -1
        self.huge_zero_refcount = 0
        self.nr_deferred: dict[str, int] = {}
        self.split_queue_lock = Spinlock(host.sched, "split_queue_lock")
        self.split_queues: list[OrderedDict[int, None]] = [OrderedDict() for _ in host.allocator.nodes]
        self.partially_mapped: set[int] = set()

    def unqueue_deferred_split(self, folio: int) -> None:
        """folio_unqueue_deferred_split: the folio is being freed or has been split."""
        self.split_queues[self.host.allocator.nid_of(folio)].pop(folio, None)
        self.partially_mapped.discard(folio)

    def holders(self) -> dict[int, int]:
        """The references that are not mappings: deposited tables and the huge zero page itself."""
        found = {table: 1 for tables in self.deposited.values() for table in tables}
        if self.huge_zero_pfn >= 0:
            found[self.huge_zero_pfn] = 1
        return found


# -- which mappings -----------------------------------------------------------------------------
def vma_is_anonymous(vma: VmArea) -> bool:
    """Whether nothing but anonymous pages is mapped here."""
    return vma.ops is None


def thp_enabled(host: HostMm, vm_flags: int) -> bool:
    """Whether the policy wants huge pages in anonymous mappings with these flags."""
    enabled = host.thp.enabled
    return enabled == "always" or (enabled == "madvise" and bool(vm_flags & VM_HUGEPAGE))


def thp_vma_suitable_order(vma: VmArea, address: int) -> bool:
    """Whether the aligned 2 MiB around `address` lies in the VMA (and in the file at the same offset)."""
    if not vma_is_anonymous(vma) and ((vma.start >> 12) - vma.pgoff) & 511:
        return False
    base = address & ~(PMD_SIZE - 1)
    return vma.start <= base and base + PMD_SIZE <= vma.end


def thp_vma_allowable_order(vma: VmArea, vm_flags: int, tva: int) -> bool:
    """Whether the VMA may have huge pages of order 9 for who asks (TVA_*). Anonymous and shmem VMAs."""
    host = vma.mm.host
    forced = tva == TVA_FORCED_COLLAPSE
    anonymous = vma_is_anonymous(vma)
    if vm_flags & VM_NOHUGEPAGE:
        return False
    if anonymous and not forced and not thp_enabled(host, vm_flags):
        return False
    if tva != TVA_PAGEFAULT:
        if vm_flags & _VM_NO_KHUGEPAGED or not thp_vma_suitable_order(vma, vma.end - PMD_SIZE):
            return False
    if not anonymous:
        return vma.ops is not None and bool(vma.ops.allowable_huge_order(vma, forced))
    return vma.anon_vma is not None or tva == TVA_PAGEFAULT


def vma_thp_gfp_mask(vma: VmArea) -> int:
    """How a fault in this VMA asks for its huge page."""
    defrag = vma.mm.host.thp.defrag
    madvised = bool(vma.flags & VM_HUGEPAGE)
    if defrag == "always":
        return GFP_TRANSHUGE | (0 if madvised else GFP_NORETRY)
    if defrag == "defer":
        return GFP_TRANSHUGE_LIGHT | GFP_KSWAPD_RECLAIM
    if defrag == "defer+madvise":
        return GFP_TRANSHUGE_LIGHT | (GFP_DIRECT_RECLAIM if madvised else GFP_KSWAPD_RECLAIM)
    if defrag == "madvise":
        return GFP_TRANSHUGE_LIGHT | (GFP_DIRECT_RECLAIM if madvised else 0)
    return GFP_TRANSHUGE_LIGHT


# -- the huge zero page -------------------------------------------------------------------------
def is_huge_zero_pfn(host: HostMm, pfn: int) -> bool:
    """Whether the frame is part of the huge zero page."""
    first = host.thp.huge_zero_pfn
    return first >= 0 and first <= pfn < first + (1 << HPAGE_PMD_ORDER)


def is_huge_zero_pmd(host: HostMm, pmd: int) -> bool:
    """Whether the entry maps the huge zero page."""
    return pmd_trans_huge(pmd) and pmd_pfn(pmd) == host.thp.huge_zero_pfn


def _get_huge_zero_folio(host: HostMm) -> bool:
    thp = host.thp
    if not thp.huge_zero_refcount:
        pfn = alloc_pages(host, (GFP_TRANSHUGE | GFP_ZERO) & ~GFP_MOVABLE, HPAGE_PMD_ORDER)
        if pfn < 0:
            host.vmstat["thp_zero_page_alloc_failed"] += 1
            return False
        host.sched.advance(COST_CLEAR_PAGE)
        if thp.huge_zero_refcount:
            put_page(host, pfn)
        else:
            host.pages.flags[pfn] |= PG_uptodate
            thp.huge_zero_pfn = pfn
            # One more, which the shrinker gives back.
            thp.huge_zero_refcount = 1
            host.vmstat["thp_zero_page_alloc"] += 1
    thp.huge_zero_refcount += 1
    return True


def mm_get_huge_zero_folio(mm: MmStruct) -> int:
    """The huge zero page, which stays as long as the address space; -1: no memory for it."""
    thp = mm.host.thp
    if not mm.flags & MMF_HUGE_ZERO_FOLIO:
        if not _get_huge_zero_folio(mm.host):
            return -1
        if mm.flags & MMF_HUGE_ZERO_FOLIO:
            thp.huge_zero_refcount -= 1
        mm.flags |= MMF_HUGE_ZERO_FOLIO
    return thp.huge_zero_pfn


def mm_put_huge_zero_folio(mm: MmStruct) -> None:
    """The address space has been unmapped."""
    if mm.flags & MMF_HUGE_ZERO_FOLIO:
        mm.host.thp.huge_zero_refcount -= 1


def huge_zero_freeable(host: HostMm) -> int:
    """How many pages shrink_huge_zero_folio would free."""
    return 1 << HPAGE_PMD_ORDER if host.thp.huge_zero_refcount == 1 else 0


def shrink_huge_zero_folio(host: HostMm) -> int:
    """Under memory pressure: free the huge zero page if no address space has it; pages freed."""
    thp = host.thp
    if not huge_zero_freeable(host):
        return 0
    pfn, thp.huge_zero_pfn, thp.huge_zero_refcount = thp.huge_zero_pfn, -1, 0
    put_page(host, pfn)
    return 1 << HPAGE_PMD_ORDER


# -- folios that memory pressure may split ------------------------------------------------------
def deferred_split_folio(host: HostMm, folio: int, *, partially_mapped: bool) -> None:
    """Queue a large anonymous folio for the shrinker: all are, those with unmapped pages for good."""
    if host.pages.flags[folio] & PG_swapcache:
        return
    thp = host.thp
    with thp.split_queue_lock:
        if partially_mapped and folio not in thp.partially_mapped:
            thp.partially_mapped.add(folio)
            host.vmstat["thp_deferred_split_page"] += 1
        thp.split_queues[host.allocator.nid_of(folio)].setdefault(folio)
