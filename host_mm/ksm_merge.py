"""Merging: one page is write-protected, another one's entry is pointed at it.

Source of truth: mm/ksm.c (write_protect_page, replace_page, try_to_merge_one_page,
try_to_merge_with_zero_page, try_to_merge_with_ksm_page, try_to_merge_two_pages); Linux 6.18.

Each of the two steps has a bracket of order class 1 over its one page: start, page-table lock, clear and
flush, set, unlock, end. The page that becomes the KSM page is write-protected only and gets one bracket,
a page merged into it gets both. Whoever may write to the page by a reference of his own shows in its
reference count, which is compared after the clear and the flush: from then on no new reference can come
by the entry.

    break ksm-ignore-refs     merge a page although somebody holds a reference to it

Not modelled: device-exclusive entries.
"""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_SPECIAL,
    mk_pte,
    pte_dirty,
    pte_mkclean,
    pte_mkdirty,
    pte_present,
    pte_write,
    pte_wrprotect,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.ksm_break import break_cow, find_mergeable_vma
from host_mm.ksm_tree import memcmp_pages, remove_rmap_item_from_tree
from host_mm.ksm_types import folio_set_stable_node, ksm_map_zero_page
from host_mm.mm_types import MM_ANONPAGES
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_ksm,
    PG_swapcache,
    folio_test_large,
    get_page,
    page_folio,
    put_page,
    set_page_dirty,
)
from host_mm.pgtable_generic import (
    mm_find_pmd,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_clear_flush,
    ptep_get,
    set_pte,
)
from host_mm.rmap import (
    folio_add_anon_rmap_pte,
    folio_remove_rmap_pte,
    folio_try_share_anon_rmap_pte,
    page_vma_mapped_walk,
)
from host_mm.swap_state import folio_free_swap
from host_mm.tlb import mm_tlb_flush_pending
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.ksm_types import KsmRmapItem
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "TRACEPOINTS", "try_to_merge_two_pages", "try_to_merge_with_ksm_page", "try_to_merge_with_zero_page",
]

KSM_MERGE_ONE_PAGE = Tracepoint(
    "ksm", "ksm_merge_one_page", ("pfn", "rmap_item", "mm", "err"),
    lambda pfn, rmap_item, mm, err: f"ksm pfn {pfn} rmap_item {rmap_item:016x} mm {mm:016x} error {err}",
    doc="For the pointers: the address that the rmap_item tracks, and the pid of the mm.",
)
KSM_MERGE_WITH_KSM_PAGE = Tracepoint(
    "ksm", "ksm_merge_with_ksm_page", ("ksm_page", "pfn", "rmap_item", "mm", "err"),
    lambda ksm_page, pfn, rmap_item, mm, err: (
        f"{'ksm ' if ksm_page else ''}pfn {pfn} rmap_item {rmap_item:016x} mm {mm:016x} error {err}"
    ),
    doc="For the pointers: 1 or 0, the address that the rmap_item tracks, and the pid of the mm.",
)
TRACEPOINTS = (KSM_MERGE_ONE_PAGE, KSM_MERGE_WITH_KSM_PAGE)

_NOT_PROTECTED = -1


def _page_address_in_vma(host: HostMm, pfn: int, vma: VmArea) -> int:
    """Where the VMA would map this anonymous page, or -1."""
    anon_vma = host.pages.mapping.get(pfn)
    if host.pages.flags[pfn] & PG_ksm or anon_vma is None or vma.anon_vma is None:
        return -1
    if anon_vma.root is not vma.anon_vma.root:
        return -1
    return vma.address_of_index(host.pages.index[pfn])


def _bracket(mm: MmStruct, address: int) -> mmu_notifier.MmuNotifierRange | None:
    if "ksm-without-bracket" in mm.host.breaks:
        return None
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, address, address + 4096, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    return range_


def _set_pte(mm: MmStruct, address: int, pte: int, entry: int) -> None:
    """set_pte_at; set_pte_at_notify where secondary MMUs are told of it."""
    mmu_notifier.mmu_notifier_change_pte(mm, address, entry)
    set_pte(mm, address, pte, entry)


# -- the two brackets -------------------------------------------------------------------------
def write_protect_page(vma: VmArea, pfn: int) -> int:
    """Take the right to write from the one entry that has it; the entry as it is then, or -1.

    The folio is locked; the caller holds one reference.
    """
    mm = vma.mm
    host = mm.host
    address = _page_address_in_vma(host, pfn, vma)
    if address < 0:
        return _NOT_PROTECTED
    range_ = _bracket(mm, address)
    found = _NOT_PROTECTED
    pte = page_vma_mapped_walk(host, pfn, vma, address)
    if pte:
        found = _write_protect_locked(mm, address, pte, pfn)
        pte_lockptr(mm, pte).unlock()
    if range_ is not None:
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return found


def _write_protect_locked(mm: MmStruct, address: int, pte: int, pfn: int) -> int:
    host = mm.host
    pages = host.pages
    entry = ptep_get(mm, pte)
    if not pte_present(entry):
        # A device has the page for itself.
        return _NOT_PROTECTED
    exclusive = pages.flags[pfn] & PG_anon_exclusive
    if not (pte_write(entry) or pte_dirty(entry) or exclusive or mm_tlb_flush_pending(mm)):
        return entry
    swapped = bool(pages.flags[pfn] & PG_swapcache)
    entry = ptep_clear_flush(mm, address, pte)
    if host.sched.preempt:
        host.sched.race("pte")
    alone = pages.mapcount[pfn] + 1 + swapped == pages.refcount[pfn]
    if alone and exclusive:
        alone = folio_try_share_anon_rmap_pte(host, pfn)
    if "ksm-ignore-refs" in host.breaks:
        pages.flags[pfn] &= ~PG_anon_exclusive
    elif not alone:
        set_pte(mm, address, pte, entry)
        return _NOT_PROTECTED
    if host.checks is not None:
        host.checks.folio_merges(pfn)
    if pte_dirty(entry):
        set_page_dirty(host, pfn)
    entry = pte_wrprotect(pte_mkclean(entry))
    _set_pte(mm, address, pte, entry)
    return entry


def replace_page(vma: VmArea, pfn: int, kpfn: int, orig_pte: int) -> int:
    """Point the entry of `pfn`, if it is still `orig_pte`, at the KSM page or the zero page; 0 or -EFAULT."""
    mm = vma.mm
    address = _page_address_in_vma(mm.host, pfn, vma)
    pmd = mm_find_pmd(mm, address) if address >= 0 else 0
    if not pmd:
        return -EFAULT
    range_ = _bracket(mm, address)
    err = -EFAULT
    pte = pte_offset_map_lock(mm, pmd, address)
    if pte:
        if ptep_get(mm, pte) == orig_pte:
            _replace_locked(vma, address, pte, pfn, kpfn)
            err = 0
        pte_lockptr(mm, pte).unlock()
    if range_ is not None:
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return err


def _replace_locked(vma: VmArea, address: int, pte: int, pfn: int, kpfn: int) -> None:
    mm = vma.mm
    host = mm.host
    if kpfn != host.zero_pfn:
        get_page(host, kpfn)
        folio_add_anon_rmap_pte(host, kpfn, vma, address, exclusive=False)
        entry = mk_pte(kpfn, vma.page_prot)
    else:
        # The dirty bit of a read-only entry says that KSM put the zero page there.
        entry = pte_mkdirty(mk_pte(kpfn, vma.page_prot) | _PAGE_SPECIAL)
        ksm_map_zero_page(mm)
        mm.rss[MM_ANONPAGES] -= 1
    ptep_clear_flush(mm, address, pte)
    _set_pte(mm, address, pte, entry)
    folio_remove_rmap_pte(host, pfn, vma)
    if not host.pages.mapcount[pfn]:
        folio_free_swap(host, pfn)
    put_page(host, pfn)


# -- merging ----------------------------------------------------------------------------------
def _try_to_merge_one_page(vma: VmArea, pfn: int, kpfn: int) -> int:
    """Make `pfn` a KSM page (`kpfn` -1), or put `kpfn` in its place in this VMA; 0 or -EFAULT."""
    host = vma.mm.host
    if pfn == kpfn:
        return 0
    folio = page_folio(host.pages, pfn)
    if not host.pages.flags[folio] & PG_anon or not folio_trylock(host, folio):
        return -EFAULT
    err = -EFAULT
    if folio_test_large(host.pages, folio):
        # The page shall be merged alone.
        if host.split_folio(pfn):
            folio_unlock(host, folio)
            return -EFAULT
    orig_pte = write_protect_page(vma, pfn)
    if orig_pte != _NOT_PROTECTED:
        if kpfn < 0:
            folio_set_stable_node(host, pfn, None)
            host.lru.folio_mark_accessed(pfn)
            # Reclaim frees a clean folio that no dirty entry maps; this one must be swapped.
            set_page_dirty(host, pfn)
            err = 0
        elif not memcmp_pages(host, pfn, kpfn):
            err = replace_page(vma, pfn, kpfn, orig_pte)
    folio_unlock(host, pfn)
    return err


def try_to_merge_with_zero_page(host: HostMm, item: KsmRmapItem, pfn: int) -> int:
    """Put the zero page in the place of a page of zeros. 0: done, or the item is out of date; -EFAULT."""
    mm = item.mm
    host.ksm.changes += 1
    mm.mmap_lock.read_lock()
    vma = find_mergeable_vma(mm, item.address)
    err = 0
    if vma is not None:
        err = _try_to_merge_one_page(vma, pfn, host.zero_pfn)
        if (t := host.trace.ksm_merge_one_page) is not None:
            t(host.zero_pfn, item.address, mm.process.pid, err)
    mm.mmap_lock.read_unlock()
    return err


def try_to_merge_with_ksm_page(host: HostMm, item: KsmRmapItem, pfn: int, kpfn: int = -1) -> int:
    """Merge `pfn` into KSM page `kpfn`, or make it one; 0, and the item holds its anon_vma, or -EFAULT."""
    mm = item.mm
    err = -EFAULT
    host.ksm.changes += 1
    mm.mmap_lock.read_lock()
    vma = find_mergeable_vma(mm, item.address)
    if vma is not None:
        err = _try_to_merge_one_page(vma, pfn, kpfn)
        if not err:
            remove_rmap_item_from_tree(host, item)
            assert vma.anon_vma is not None
            vma.anon_vma.refcount += 1
            item.anon_vma = vma.anon_vma
    mm.mmap_lock.read_unlock()
    if (t := host.trace.ksm_merge_with_ksm_page) is not None:
        t(int(kpfn >= 0), kpfn if kpfn >= 0 else pfn, item.address, mm.process.pid, err)
    return err


def try_to_merge_two_pages(
    host: HostMm, item: KsmRmapItem, pfn: int, tree_item: KsmRmapItem, tree_pfn: int
) -> bool:
    """Make `pfn` a KSM page and merge `tree_pfn` into it; if that fails the first is undone."""
    err = try_to_merge_with_ksm_page(host, item, pfn)
    if not err:
        err = try_to_merge_with_ksm_page(host, tree_item, tree_pfn, pfn)
        if err:
            break_cow(item)
    return not err
