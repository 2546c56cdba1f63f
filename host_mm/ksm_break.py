"""Finding KSM's pages in page tables, and giving their owners pages of their own again.

Source of truth: mm/ksm.c (find_mergeable_vma, get_mergeable_page, break_ksm, break_cow,
unmerge_ksm_pages, ksm_might_need_to_copy); Linux 6.18.

A KSM page is never made writable again: breaking is an unshare fault, which copies and leaves the copy
exclusive but read-only.

Not modelled: signals that interrupt an unmerge, per-VMA locks.
"""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pte_present
from host_mm.arch.x86.swapops import SWP_PFN_MASK, is_migration_entry, pte_to_swp_entry, swp_offset
from host_mm.kernel.costs import COST_COPY_PAGE
from host_mm.kernel.errors import BrokenTruth
from host_mm.ksm_types import KSM_RUN_UNMERGE, is_ksm_zero_pte, ksm_test_exit
from host_mm.memory import handle_mm_fault
from host_mm.memory_folio import folio_prealloc, vm_normal_page
from host_mm.mm_types import (
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_UNSHARE,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
    VM_MERGEABLE,
)
from host_mm.page import PG_anon, PG_ksm, PG_locked, PG_uptodate, get_page, set_page_dirty
from host_mm.pgtable_generic import mm_find_pmd, pte_lockptr, pte_offset_map_lock, ptep_get

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.ksm_types import KsmRmapItem
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "break_cow", "break_ksm", "find_mergeable_vma", "get_mergeable_page", "ksm_might_need_to_copy",
    "unmerge_ksm_pages",
]

_HOPELESS = VM_FAULT_SIGBUS | VM_FAULT_SIGSEGV | VM_FAULT_OOM


def find_mergeable_vma(mm: MmStruct, address: int) -> VmArea | None:
    """The VMA of `address` if ksmd may merge there; mmap_lock is held."""
    if ksm_test_exit(mm):
        return None
    vma = mm.vma_lookup(address)
    if vma is None or not vma.flags & VM_MERGEABLE or vma.anon_vma is None:
        return None
    return vma


def get_mergeable_page(item: KsmRmapItem) -> int:
    """The anonymous page that is at the item's address now, with a reference, or -1."""
    mm = item.mm
    host = mm.host
    found = -1
    mm.mmap_lock.read_lock()
    if find_mergeable_vma(mm, item.address) is not None:
        pmd = mm_find_pmd(mm, item.address)
        pte = pte_offset_map_lock(mm, pmd, item.address) if pmd else 0
        if pte:
            entry = ptep_get(mm, pte)
            pfn = vm_normal_page(host, entry) if entry and pte_present(entry) else -1
            if pfn >= 0 and host.pages.flags[pfn] & PG_anon:
                get_page(host, pfn)
                found = pfn
            pte_lockptr(mm, pte).unlock()
    mm.mmap_lock.read_unlock()
    return found


def _maps_ksm_page(mm: MmStruct, address: int) -> bool:
    """folio_walk_start with migration entries and zero pages: whether what is there is KSM's."""
    host = mm.host
    pmd = mm_find_pmd(mm, address)
    pte = pte_offset_map_lock(mm, pmd, address) if pmd else 0
    if not pte:
        return False
    entry = ptep_get(mm, pte)
    ksm = False
    if entry and pte_present(entry):
        pfn = vm_normal_page(host, entry)
        ksm = bool(host.pages.flags[pfn] & PG_ksm) if pfn >= 0 else is_ksm_zero_pte(host, entry)
    elif entry and is_migration_entry(swp := pte_to_swp_entry(entry)):
        ksm = bool(host.pages.flags[swp_offset(swp) & SWP_PFN_MASK] & PG_ksm)
    pte_lockptr(mm, pte).unlock()
    return ksm


def break_ksm(vma: VmArea, address: int) -> int:
    """See that no KSM page is mapped at `address`; 0 or -ENOMEM. mmap_lock is held."""
    sched = vma.mm.host.sched
    while True:
        if sched.preempt:
            sched.point("cond_resched")
        if not _maps_ksm_page(vma.mm, address):
            return 0
        ret = handle_mm_fault(vma, address, FAULT_FLAG_UNSHARE | FAULT_FLAG_REMOTE)
        if ret & _HOPELESS:
            return -ENOMEM if ret & VM_FAULT_OOM else 0


def break_cow(item: KsmRmapItem) -> None:
    """Undo a merge that could not be finished; the item's anon_vma is given up with it."""
    mm = item.mm
    assert item.anon_vma is not None
    item.anon_vma.refcount -= 1
    item.anon_vma = None
    mm.mmap_lock.read_lock()
    vma = find_mergeable_vma(mm, item.address)
    if vma is not None:
        break_ksm(vma, item.address)
    mm.mmap_lock.read_unlock()


def unmerge_ksm_pages(vma: VmArea, start: int, end: int) -> int:
    """break_ksm for every page of [start, end); 0 or -ENOMEM."""
    for address in range(start, end, 4096):
        if ksm_test_exit(vma.mm):
            break
        err = break_ksm(vma, address)
        if err:
            return err
    return 0


# -- swap-in ----------------------------------------------------------------------------------
def ksm_might_need_to_copy(host: HostMm, pfn: int, vma: VmArea, address: int) -> int:
    """The page to map at `address` for this swap cache folio: itself, a locked copy of it, or -1.

    What was a KSM page when it was swapped out is one no more when it comes back: it gets the place
    that asks first, and everybody else with the same swap entry needs a copy.
    """
    pages = host.pages
    anon_vma = pages.mapping.get(pfn)
    if pages.flags[pfn] & PG_ksm:
        if anon_vma is not None and not host.ksm.run & KSM_RUN_UNMERGE:
            return pfn
    elif anon_vma is None:
        return pfn
    elif vma.anon_vma is None:
        raise BrokenTruth("anon-vma", f"a swap entry at {address:#x} without an anon_vma", host.stream.here())
    elif pages.index[pfn] == vma.page_index(address) and anon_vma.root is vma.anon_vma.root:
        return pfn
    if not pages.flags[pfn] & PG_uptodate:
        return pfn
    new = folio_prealloc(host, vma, zero=False)
    if new >= 0:
        host.ram.copy_page(new, pfn)
        host.sched.advance(COST_COPY_PAGE)
        set_page_dirty(host, new)
        pages.flags[new] |= PG_locked
        host.vmstat["ksm_swpin_copy"] += 1
    return new
