"""A large folio becomes small ones; which of them memory pressure splits.

Source of truth: mm/huge_memory.c (__folio_split with order 0, unmap_folio, can_split_folio,
__split_folio_to_order, lru_add_split_folio, remap_page, deferred_split_scan, thp_underused,
split_huge_pages_pid); Linux 6.18.

The folio is locked and its caller has one reference. Under the anon_vma's lock (a file's: i_mmap's) every
mapping becomes migration entries (a file's just goes), in a bracket per VMA; then the references are
frozen, which fails if anybody else has one; then the pages are folios of their own and their entries come
back, without a bracket. Pages of zeros come back as the zero page, pages that nobody mapped are freed.

Not modelled: splitting to orders other than 0, the place that the new folios get
beside the first on its LRU list (they come at its head), the memory cgroups' own queues.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EINVAL
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_SPECIAL,
    HPAGE_PMD_NR,
    PMD_SIZE,
    pte_pfn,
    pte_present,
    walk_lockless,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.huge_mm import is_huge_zero_pfn
from host_mm.kernel.costs import COST_SCAN_PAGE
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import VM_HUGETLB, VM_IO, VM_PFNMAP
from host_mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
    PG_head,
    PG_hugetlb,
    PG_hwpoison,
    PG_idle,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_referenced,
    PG_swapbacked,
    PG_unevictable,
    PG_uptodate,
    PG_workingset,
    PG_writeback,
    PG_young,
    folio_mapcount,
    folio_nr_pages,
    folio_ref_freeze,
    folio_ref_unfreeze,
    folio_test_large,
    get_page,
    page_folio,
    put_page,
    try_get_page,
)
from host_mm.pgtable_generic import pmd_offset
from host_mm.rmap import folio_get_anon_vma
from host_mm.rmap_unmap import (
    TTU_BATCH_FLUSH,
    TTU_IGNORE_MLOCK,
    TTU_RMAP_LOCKED,
    TTU_SPLIT_HUGE_PMD,
    TTU_SYNC,
    remove_migration_ptes,
    try_to_migrate,
    try_to_unmap,
)
from host_mm.tlb import try_to_unmap_flush
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import AnonVma, MmStruct

__all__ = [
    "SPLIT_COPIED", "TRACEPOINTS", "can_split_folio", "deferred_split_count", "deferred_split_scan",
    "split_folio_to_list", "split_huge_pages", "unmap_folio",
]

SPLIT_FOLIO = Tracepoint(
    "refault", "split_folio", ("pfn", "order", "result"),
    lambda pfn, order, result: f"pfn {pfn:#x} order {order} " + (f"error {-result}" if result else "split"),
    doc="A large folio becomes small ones, or is held by somebody and stays.",
)
TRACEPOINTS = (SPLIT_FOLIO,)

SPLIT_COPIED = (
    PG_referenced | PG_swapbacked | PG_mlocked | PG_uptodate | PG_active | PG_workingset | PG_locked
    | PG_unevictable | PG_dirty | PG_anon | PG_young | PG_idle
)
"""What each piece of a folio that is split has of its flags."""


def _cached(host: HostMm, folio: int) -> int:
    """The page cache's references."""
    return 0 if host.pages.flags[folio] & PG_anon else folio_nr_pages(host.pages, folio)


def can_split_folio(host: HostMm, folio: int, caller_pins: int) -> bool:
    """Whether nobody has a reference but its mappings, the page cache and the caller; may be out of date."""
    pages = host.pages
    return folio_mapcount(pages, folio) == pages.refcount[folio] - _cached(host, folio) - caller_pins


def split_folio_to_list(host: HostMm, page: int, folios: list[int] | None = None) -> int:
    """Split the locked folio of a page, to which the caller has a reference.

    0, -EBUSY, or -EAGAIN: somebody holds it. `page` stays locked and the caller's; the others go to the LRU
    or, isolated, to `folios`, and `page` is their first then.
    """
    pages = host.pages
    folio = page_folio(pages, page)
    order = pages.order[folio]
    ret = _split(host, folio, page, folios)
    host.vmstat["thp_split_page_failed" if ret else "thp_split_page"] += 1
    if (t := host.trace.split_folio) is not None:
        t(folio, order, ret)
    return ret


def _split(host: HostMm, folio: int, lock_at: int, folios: list[int] | None) -> int:
    pages = host.pages
    if is_huge_zero_pfn(host, folio) or pages.flags[folio] & PG_writeback:
        return -EBUSY
    if not pages.flags[folio] & PG_anon:
        mapping: AddressSpace | None = pages.mapping.get(folio)
        if mapping is None or not mapping.a_ops.release_folio(mapping, folio):
            return -EBUSY
        mapping.i_mmap_rwsem.read_lock()
        ret = _split_locked(host, folio, lock_at, folios, None, mapping)
        mapping.i_mmap_rwsem.read_unlock()
        return ret
    anon_vma = folio_get_anon_vma(host, folio)
    if anon_vma is None:
        return -EBUSY
    anon_vma.root.rwsem.lock()
    ret = _split_locked(host, folio, lock_at, folios, anon_vma, None)
    anon_vma.root.rwsem.unlock()
    return ret


def _split_locked(
    host: HostMm, folio: int, lock_at: int, folios: list[int] | None, anon_vma: AnonVma | None,
    mapping: AddressSpace | None,
) -> int:
    pages = host.pages
    nr = folio_nr_pages(pages, folio)
    if not can_split_folio(host, folio, 1):
        return -EAGAIN
    unmap_folio(host, folio)
    if host.sched.preempt:
        host.sched.point("ref-freeze")
    frozen = folio_ref_freeze(pages, folio, 1 + _cached(host, folio))
    if frozen:
        host.thp.unqueue_deferred_split(folio)
        _split_to_order_0(host, folio, nr, folios, mapping)
    if anon_vma is not None:
        for page in range(folio, folio + (nr if frozen else 1)):
            remove_migration_ptes(host, page, page, anon_vma, locked=True, use_shared_zeropage=frozen)
    if not frozen:
        return -EAGAIN
    for page in range(folio, folio + nr):
        if page != lock_at:
            folio_unlock(host, page)
            put_page(host, page)
    return 0


def unmap_folio(host: HostMm, folio: int) -> None:
    """Take a locked folio out of every page table, in a bracket per VMA, and flush; rmap is locked."""
    flags = TTU_RMAP_LOCKED | TTU_SYNC | TTU_BATCH_FLUSH | TTU_SPLIT_HUGE_PMD
    if host.pages.flags[folio] & PG_anon:
        try_to_migrate(host, folio, flags)
    else:
        try_to_unmap(host, folio, flags | TTU_IGNORE_MLOCK)
    try_to_unmap_flush(host)


def _split_to_order_0(
    host: HostMm, folio: int, nr: int, folios: list[int] | None, mapping: AddressSpace | None
) -> None:
    """__split_folio_to_order and what follows, up to the last unfreeze."""
    pages = host.pages
    flags = pages.flags
    vec = host.lru.lruvec(folio)
    cached = 1 if mapping is not None else 0
    dirty = mapping is not None and flags[folio] & PG_dirty and mapping.a_ops.can_writeback
    vec.lock.lock()
    listed = flags[folio] & PG_lru
    if listed:
        vec.remove(folio, flags[folio])
    flags[folio] &= ~PG_head
    pages.order[folio] = 0
    copied = flags[folio] & SPLIT_COPIED
    owner = pages.mapping.get(folio)
    index = pages.index[folio]
    for distance in range(1, nr):
        page = folio + distance
        flags[page] = copied | (flags[page] & PG_hwpoison)
        pages.tail[page] = 0
        pages.index[page] = index + distance
        if owner is not None:
            pages.mapping[page] = owner
    host.memcg.split(folio, nr)
    for page in range(folio + 1, folio + nr):
        folio_ref_unfreeze(pages, page, 1 + cached)
        if folios is not None:
            get_page(host, page)
            folios.append(page)
        elif listed:
            vec.add(page, flags[page])
            flags[page] |= PG_lru
        if mapping is not None and pages.index[page] < mapping.file_end:
            mapping.i_pages[pages.index[page]] = page
            if dirty:
                mapping.dirty[pages.index[page]] = None
        elif mapping is not None:
            _drop_beyond_end(host, mapping, page)
    if listed:
        vec.add(folio, flags[folio])
    folio_ref_unfreeze(pages, folio, 1 + cached)
    vec.lock.unlock()


def _drop_beyond_end(host: HostMm, mapping: AddressSpace, page: int) -> None:
    pages = host.pages
    del mapping.i_pages[pages.index[page]]
    mapping.nrpages -= 1
    del pages.mapping[page]
    pages.flags[page] &= ~PG_dirty
    pages.refcount[page] -= 1


# -- the shrinker -------------------------------------------------------------------------------
def deferred_split_count(host: HostMm, nid: int) -> int:
    """How many folios of a node are queued."""
    return len(host.thp.split_queues[nid])


def _thp_underused(host: HostMm, folio: int) -> bool:
    """Whether more pages of it are zeros than khugepaged would make empty ones of."""
    most = host.khugepaged.max_ptes_none
    if most == HPAGE_PMD_NR - 1:
        return False
    zeros = filled = 0
    for page in range(folio, folio + folio_nr_pages(host.pages, folio)):
        if host.ram.page_is_zero(page):
            zeros += 1
            if zeros > most:
                return True
        else:
            filled += 1
            if filled >= HPAGE_PMD_NR - most:
                return False
    return False


def deferred_split_scan(host: HostMm, nid: int, nr_to_scan: int) -> int:
    """Split up to so many queued folios: those mapped in part, and those that are mostly zeros."""
    thp = host.thp
    taken: list[int] = []
    thp.split_queue_lock.lock()
    for folio in list(thp.split_queues[nid])[:nr_to_scan]:
        if try_get_page(host, folio):
            taken.append(folio)
        else:
            thp.unqueue_deferred_split(folio)
    thp.split_queue_lock.unlock()
    split = 0
    for folio in taken:
        host.sched.advance(COST_SCAN_PAGE)
        partly = folio in thp.partially_mapped
        underused = not partly and not host.pages.flags[folio] & PG_mlocked and _thp_underused(host, folio)
        done = False
        if (partly or underused) and folio_trylock(host, folio):
            done = not split_folio_to_list(host, folio)
            folio_unlock(host, folio)
        if done:
            split += 1
            host.vmstat["thp_underused_split_page"] += underused
        elif folio not in thp.partially_mapped:
            thp.unqueue_deferred_split(folio)
        put_page(host, folio)
    return split


# -- /sys/kernel/debug/split_huge_pages ---------------------------------------------------------
def split_huge_pages(mm: MmStruct, start: int, end: int) -> tuple[int, int]:
    """Split the large folios mapped in [start, end): (how many there were, how many were split)."""
    if start & 4095 or end < start:
        raise KernelError(EINVAL, f"{start:#x} -- {end:#x} is not a page range")
    host = mm.host
    total = split = 0
    address = start
    mm.mmap_lock.read_lock()
    while address < end:
        vma = mm.vma_lookup(address)
        if vma is None:
            break
        if vma.flags & (VM_IO | VM_PFNMAP | VM_HUGETLB):
            address = vma.end
            continue
        folio = _large_folio_at(mm, address)
        if folio >= 0:
            total += 1
            if can_split_folio(host, folio, 0) and folio_trylock(host, folio):
                get_page(host, folio)
                split += not split_folio_to_list(host, folio)
                folio_unlock(host, folio)
                put_page(host, folio)
        if host.sched.preempt:
            host.sched.point("cond_resched")
        address += 4096
        if not pmd_offset(mm, address):
            address = (address + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
    mm.mmap_lock.read_unlock()
    return total, split


def _large_folio_at(mm: MmStruct, address: int) -> int:
    """The transparent huge folio that is mapped at `address`, or -1."""
    host = mm.host
    entry, level = walk_lockless(host.ram, mm.pgd, address)
    if level > 2 or not pte_present(entry) or entry & _PAGE_SPECIAL:
        return -1
    folio = page_folio(host.pages, pte_pfn(entry))
    hugetlb = host.pages.flags[folio] & PG_hugetlb
    return folio if folio_test_large(host.pages, folio) and not hugetlb else -1
