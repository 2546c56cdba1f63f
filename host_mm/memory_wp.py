"""Writes to pages that are mapped read-only: reuse, or copy.

Source of truth: mm/memory.c (do_wp_page, wp_can_reuse_anon_folio, wp_page_reuse, wp_page_copy); Linux 6.18.

A write to a shared page copies it: the copy is made before the bracket opens, and under the page-table lock
the old entry is cleared and flushed before the new one is set.

Not modelled: delay accounting, memory that fails while it is copied (copy_mc_user_highpage).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    mk_pte,
    pte_mkdirty,
    pte_mkyoung,
    pte_pfn,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.kernel.costs import COST_COPY_PAGE
from host_mm.ksm_types import ksm_might_unmap_zero_page
from host_mm.memory_folio import folio_prealloc, is_zero_pfn, maybe_mkwrite, vm_normal_page
from host_mm.mm_types import (
    FAULT_FLAG_UNSHARE,
    MM_ANONPAGES,
    VM_FAULT_OOM,
    VM_MAYSHARE,
    VM_SHARED,
    VM_UFFD_WP,
    VmFault,
)
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_ksm,
    PG_lru,
    PG_swapcache,
    folio_mapcount,
    folio_maybe_mapped_shared,
    folio_test_large,
    get_page,
    mm_counter,
    page_folio,
    put_page,
)
from host_mm.pgtable_generic import (
    pte_lockptr,
    pte_offset_map_lock,
    ptep_clear_flush,
    ptep_get,
    ptep_set_access_flags,
    set_pte,
)
from host_mm.rmap import folio_add_new_anon_rmap, folio_move_anon_rmap, folio_remove_rmap_pte
from host_mm.rmap_anon_vma import anon_vma_prepare
from host_mm.swap_state import folio_free_swap, free_swap_cache
from host_mm.userfaultfd_k import handle_userfault, userfaultfd_pte_wp, userfaultfd_wp_async

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = ["do_wp_page", "wp_page_reuse"]


def do_wp_page(vmf: VmFault) -> tuple[str, int]:
    """A write (or unshare) on a read-only entry, its table locked; the lock is dropped on return."""
    vma, host = vmf.vma, vmf.mm.host
    assert vmf.ptl is not None
    if vma.flags & VM_UFFD_WP and not vmf.flags & FAULT_FLAG_UNSHARE and _userfaultfd_wp(vmf):
        vmf.ptl.unlock()
        return "userfault", handle_userfault(vmf, VM_UFFD_WP)
    pfn = vm_normal_page(host, vmf.orig_pte)
    vmf.page = pfn
    if vma.flags & (VM_SHARED | VM_MAYSHARE):
        return "shared", host.wp_page_shared(vmf)
    anon = pfn >= 0 and host.pages.flags[page_folio(host.pages, pfn)] & PG_anon
    if anon and _may_reuse(host, vma, pfn):
        if vmf.flags & FAULT_FLAG_UNSHARE:
            vmf.ptl.unlock()
            return "reuse", 0
        wp_page_reuse(vmf)
        return "reuse", 0
    if pfn >= 0:
        get_page(host, pfn)
        if host.pages.flags[pfn] & PG_ksm:
            host.vmstat["cow_ksm"] += 1
    vmf.ptl.unlock()
    return "cow", _wp_page_copy(vmf)


def _userfaultfd_wp(vmf: VmFault) -> bool:
    """Whether the write is userfaultfd's business. In asynchronous mode it just lifts the protection."""
    mm = vmf.mm
    entry = ptep_get(mm, vmf.pte)
    if userfaultfd_pte_wp(vmf.vma, entry):
        if not userfaultfd_wp_async(vmf.vma):
            return True
        vmf.orig_pte = entry & ~_PAGE_UFFD_WP
        set_pte(mm, vmf.address, vmf.pte, vmf.orig_pte)
    if _tlb.mm_tlb_flush_pending(mm):
        # The protection's flush may still be to come, and the copy would miss what is written till then.
        _tlb.flush_tlb_page(mm, vmf.address)
    return False


def _may_reuse(host: HostMm, vma: VmArea, pfn: int) -> bool:
    flags = host.pages.flags
    if not host.profile.anon_exclusive:
        return _nobody_else_refers(host, pfn)
    if flags[pfn] & PG_anon_exclusive:
        return True
    if _wp_can_reuse_anon_folio(host, vma, pfn):
        flags[pfn] |= PG_anon_exclusive
        return True
    return False


def _nobody_else_refers(host: HostMm, pfn: int) -> bool:
    """Linux 5.10's do_wp_page: any reference beside the entry's, even the swap cache's, means a copy."""
    pages = host.pages
    if pages.flags[pfn] & PG_ksm or pages.refcount[pfn] != 1 or not folio_trylock(host, pfn):
        return False
    alone = not pages.flags[pfn] & PG_ksm and pages.mapcount[pfn] == 1 and pages.refcount[pfn] == 1
    folio_unlock(host, pfn)
    return alone


def _wp_can_reuse_anon_folio(host: HostMm, vma: VmArea, pfn: int) -> bool:
    """Whether this entry holds the only reference, the swap cache's and an LRU batch's apart."""
    pages = host.pages
    folio = page_folio(pages, pfn)
    if folio_test_large(pages, folio):
        # All references are entries of this address space. A last one is copied, to have the rest freed.
        mapcount = folio_mapcount(pages, folio)
        return 1 < mapcount == pages.refcount[folio] and not folio_maybe_mapped_shared(pages, folio)
    if pages.flags[pfn] & PG_ksm or pages.refcount[pfn] > 3:
        return False
    if not pages.flags[pfn] & PG_lru:
        host.lru.lru_add_drain()
    if pages.refcount[pfn] > 1 + bool(pages.flags[pfn] & PG_swapcache):
        return False
    if not folio_trylock(host, pfn):
        return False
    if pages.flags[pfn] & PG_swapcache:
        folio_free_swap(host, pfn)
    alone = not pages.flags[pfn] & PG_ksm and pages.refcount[pfn] == 1
    if alone:
        folio_move_anon_rmap(host, pfn, vma)
    folio_unlock(host, pfn)
    return alone


def wp_page_reuse(vmf: VmFault) -> None:
    """Make the entry writable: no flush on x86, no bracket."""
    entry = maybe_mkwrite(pte_mkdirty(pte_mkyoung(vmf.orig_pte)), vmf.vma)
    ptep_set_access_flags(vmf.mm, vmf.address, vmf.pte, entry, True)
    assert vmf.ptl is not None
    vmf.ptl.unlock()
    vmf.mm.host.vmstat["pgreuse"] += 1


def _wp_page_copy(vmf: VmFault) -> int:
    vma, mm, old = vmf.vma, vmf.mm, vmf.page
    host = mm.host
    anon_vma_prepare(vma)
    zero = is_zero_pfn(host, pte_pfn(vmf.orig_pte))
    new = folio_prealloc(host, vma, zero=zero)
    if new < 0:
        if old >= 0:
            put_page(host, old)
        return VM_FAULT_OOM
    if not zero:
        host.ram.copy_page(new, pte_pfn(vmf.orig_pte))
        host.sched.advance(COST_COPY_PAGE)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, vmf.address, vmf.address + 4096, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    if host.sched.preempt:
        host.sched.point("pte")
    copied = _install_copy(vmf, new)
    mmu_notifier.mmu_notifier_invalidate_range_only_end(range_)
    if not copied:
        put_page(host, new)
    elif old >= 0:
        # The reference that the old entry held, given up with it.
        put_page(host, old)
    if old >= 0:
        if copied and host.profile.cow_frees_swap_cache:
            free_swap_cache(host, old)
        put_page(host, old)
    return 0


def _install_copy(vmf: VmFault, new: int) -> bool:
    """The half of wp_page_copy under the page-table lock: recheck, clear, flush, set."""
    vma, mm, old = vmf.vma, vmf.mm, vmf.page
    host = mm.host
    vmf.pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if not vmf.pte:
        return False
    vmf.ptl = pte_lockptr(mm, vmf.pte)
    if ptep_get(mm, vmf.pte) != vmf.orig_pte and "no-fault-recheck" not in host.breaks:
        vmf.ptl.unlock()
        return False
    if old < 0:
        ksm_might_unmap_zero_page(mm, vmf.orig_pte)
        mm.rss[MM_ANONPAGES] += 1
    elif not host.pages.flags[page_folio(host.pages, old)] & PG_anon:
        mm.rss[mm_counter(host.pages, page_folio(host.pages, old))] -= 1
        mm.rss[MM_ANONPAGES] += 1
    entry = pte_mkyoung(mk_pte(new, vma.page_prot))
    if vmf.flags & FAULT_FLAG_UNSHARE:
        entry |= vmf.orig_pte & (_PAGE_SOFT_DIRTY | _PAGE_UFFD_WP)
    else:
        entry = maybe_mkwrite(pte_mkdirty(entry), vma)
    late_flush = "cow-flush-after-unlock" in host.breaks
    if not late_flush:
        ptep_clear_flush(mm, vmf.address, vmf.pte)
    mmu_notifier.mmu_notifier_invalidate_range(mm, vmf.address, vmf.address + 4096)
    folio_add_new_anon_rmap(host, new, vma, vmf.address)
    host.lru.folio_add_lru_vma(new, vma)
    mmu_notifier.mmu_notifier_change_pte(mm, vmf.address, entry)
    set_pte(mm, vmf.address, vmf.pte, entry)
    if old >= 0:
        # Only now: whoever saw one mapping less could reuse a page that this entry still reached.
        folio_remove_rmap_pte(host, old, vma)
    host.vmstat["cow_break"] += 1
    vmf.ptl.unlock()
    if late_flush:
        _tlb.flush_tlb_page(mm, vmf.address)
    return True
