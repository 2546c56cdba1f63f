"""Faults on huge pages: a fresh one, the huge zero page, a write to what is shared.

Source of truth: mm/huge_memory.c (do_huge_pmd_anonymous_page, __do_huge_pmd_anonymous_page,
vma_alloc_anon_folio_pmd, map_anon_folio_pmd, set_huge_zero_folio, do_huge_pmd_wp_page,
do_huge_zero_wp_pmd, huge_pmd_set_accessed, touch_pmd, do_huge_pmd_numa_page), mm/memory.c:
__handle_mm_fault, wp_huge_pmd; Linux 6.18. Policy and state are in huge_mm.py, splitting in
huge_memory_pmd.py, what system calls do to huge entries in huge_memory_map.py.

A read of an empty 2 MiB maps the huge zero page, a write a folio of its own, whose pages are exclusive
together. A write to the huge zero page replaces it in a bracket over the 2 MiB; a write to a huge page that
another process maps as well splits the entry and copies 4 KiB.

Not modelled: NUMA balancing of huge pages (a hinting fault restores the rights and moves nothing), DAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    PMD_SIZE,
    is_swap_pmd,
    mk_pmd,
    pmd_modify,
    pmd_pfn,
    pmd_table,
    pmd_trans_huge,
    pte_mkdirty,
    pte_mkwrite,
    pte_mkyoung,
    pte_protnone,
    pte_write,
)
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock
from host_mm.huge_memory_pmd import pmd_migration_entry_wait, split_huge_pmd
from host_mm.huge_mm import (
    TVA_PAGEFAULT,
    deferred_split_folio,
    is_huge_zero_pmd,
    mm_get_huge_zero_folio,
    thp_vma_allowable_order,
    thp_vma_suitable_order,
    vma_is_anonymous,
    vma_thp_gfp_mask,
)
from host_mm.kernel.costs import COST_CLEAR_HUGE_PAGE
from host_mm.mm_types import (
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    MM_ANONPAGES,
    MMF_UNSTABLE,
    VM_ACCESS_FLAGS,
    VM_FAULT_FALLBACK,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_SHARED,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
)
from host_mm.page import PG_anon_exclusive, PG_swapcache, PG_uptodate, get_page, put_page
from host_mm.pgtable_generic import pmd_lock, pmd_lockptr, pte_alloc_one, pte_free, set_pmd
from host_mm.pgtable_huge import (
    pgtable_trans_huge_deposit,
    pmdp_get,
    pmdp_huge_clear_flush,
    pmdp_set_access_flags,
)
from host_mm.rmap import folio_add_new_anon_rmap, folio_move_anon_rmap
from host_mm.rmap_anon_vma import anon_vma_prepare
from host_mm.userfaultfd_k import handle_userfault, userfaultfd_wp_async

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea, VmFault

__all__ = ["handle_huge_pmd", "map_anon_folio_pmd", "touch_pmd", "vma_alloc_anon_folio_pmd"]

_Outcome = tuple[str, int]
"""What a fault did, in a word, and its VM_FAULT_* bits; VM_FAULT_FALLBACK: try it with small pages."""


def handle_huge_pmd(vmf: VmFault) -> _Outcome | None:
    """What __handle_mm_fault does with a level-2 entry; None: go on with a table of small entries."""
    entry = vmf.orig_pmd = pmdp_get(vmf.mm, vmf.pmd)
    if pmd_table(entry):
        return None
    if not entry:
        if not thp_vma_allowable_order(vmf.vma, vmf.vma.flags, TVA_PAGEFAULT):
            return None
        done = _create_huge_pmd(vmf)
    elif is_swap_pmd(entry):
        pmd_migration_entry_wait(vmf.mm, vmf.pmd)
        return "migration", 0
    elif pte_protnone(entry) and vmf.vma.flags & VM_ACCESS_FLAGS:
        done = _do_huge_pmd_numa_page(vmf)
    elif vmf.flags & (FAULT_FLAG_WRITE | FAULT_FLAG_UNSHARE) and not pte_write(entry):
        done = _wp_huge_pmd(vmf)
    else:
        done = _huge_pmd_set_accessed(vmf)
    return None if done[1] & VM_FAULT_FALLBACK else done


def _create_huge_pmd(vmf: VmFault) -> _Outcome:
    if vma_is_anonymous(vmf.vma):
        return _do_huge_pmd_anonymous_page(vmf)
    fault = getattr(vmf.vma.ops, "huge_fault", None)
    return ("file-huge", fault(vmf)) if fault is not None else ("", VM_FAULT_FALLBACK)


def _wp_huge_pmd(vmf: VmFault) -> _Outcome:
    if vma_is_anonymous(vmf.vma):
        wp = vmf.vma.flags & VM_UFFD_WP and vmf.orig_pmd & _PAGE_UFFD_WP
        if not wp or vmf.flags & FAULT_FLAG_UNSHARE:
            return _do_huge_pmd_wp_page(vmf)
        if not userfaultfd_wp_async(vmf.vma):
            return "userfault", handle_userfault(vmf, VM_UFFD_WP)
    # Copies and write notification of files are made page by page.
    split_huge_pmd(vmf.vma, vmf.pmd, vmf.address)
    return "", VM_FAULT_FALLBACK


# -- a fresh page -------------------------------------------------------------------------------


def vma_alloc_anon_folio_pmd(vma: VmArea) -> int:
    """A zeroed huge folio by the VMA's memory policy, or -1."""
    host = vma.mm.host
    nid = vma.policy.preferred_node() if vma.policy is not None else host.numa_node_id(vma.mm.process)
    folio: int = host.allocator.alloc_pages(vma_thp_gfp_mask(vma), HPAGE_PMD_ORDER, nid)
    if folio < 0:
        host.vmstat["thp_fault_fallback"] += 1
        return -1
    if host.memcg.charge(folio, vma.mm, vma_thp_gfp_mask(vma)):
        put_page(host, folio)
        host.vmstat["thp_fault_fallback"] += 1
        host.vmstat["thp_fault_fallback_charge"] += 1
        return -1
    for pfn in range(folio, folio + HPAGE_PMD_NR):
        host.ram.clear_page(pfn)
    host.sched.advance(COST_CLEAR_HUGE_PAGE)
    host.pages.flags[folio] |= PG_uptodate
    return folio


def map_anon_folio_pmd(vma: VmArea, base: int, pmd: int, folio: int) -> None:
    """Map a fresh folio, whose reference becomes the entry's, at an empty locked entry."""
    mm = vma.mm
    entry = pte_mkdirty(mk_pmd(folio, vma.page_prot))
    if vma.flags & VM_WRITE:
        entry = pte_mkwrite(entry)
    folio_add_new_anon_rmap(mm.host, folio, vma, base)
    mm.host.lru.folio_add_lru_vma(folio, vma)
    set_pmd(mm, base, pmd, entry)
    mm.rss[MM_ANONPAGES] += HPAGE_PMD_NR


def _do_huge_pmd_anonymous_page(vmf: VmFault) -> _Outcome:
    vma = vmf.vma
    if not thp_vma_suitable_order(vma, vmf.address) or vma.flags & VM_SHARED:
        return "", VM_FAULT_FALLBACK
    anon_vma_prepare(vma)
    vma.mm.host.khugepaged_enter_vma(vma, vma.flags)
    if not vmf.flags & FAULT_FLAG_WRITE and vma.mm.host.thp.use_zero_page:
        return _map_huge_zero(vmf)
    return _map_new_folio(vmf)


def _stopped(vmf: VmFault) -> _Outcome | None:
    """What else a fault may find at an empty entry, which is unlocked then; None: nothing."""
    ptl = pmd_lockptr(vmf.mm, vmf.pmd)
    if pmdp_get(vmf.mm, vmf.pmd):
        ptl.unlock()
        return "spurious", 0
    if vmf.mm.flags & MMF_UNSTABLE:
        ptl.unlock()
        return "anon-huge", VM_FAULT_SIGBUS
    if vmf.vma.flags & VM_UFFD_MISSING:
        ptl.unlock()
        return "userfault", handle_userfault(vmf, VM_UFFD_MISSING)
    return None


def _map_huge_zero(vmf: VmFault) -> _Outcome:
    mm, vma = vmf.mm, vmf.vma
    table = pte_alloc_one(mm)
    if table < 0:
        return "zero-page-huge", VM_FAULT_OOM
    zero = mm_get_huge_zero_folio(mm)
    if zero < 0:
        pte_free(mm, table)
        mm.host.vmstat["thp_fault_fallback"] += 1
        return "", VM_FAULT_FALLBACK
    ptl = pmd_lock(mm, vmf.pmd)
    if (stopped := _stopped(vmf)) is not None:
        pte_free(mm, table)
        return stopped
    pgtable_trans_huge_deposit(mm, vmf.pmd, table)
    mm.pgtables_bytes += 4096
    set_pmd(mm, vmf.address & ~(PMD_SIZE - 1), vmf.pmd, mk_pmd(zero, vma.page_prot) | _PAGE_SPECIAL)
    ptl.unlock()
    return "zero-page-huge", 0


def _map_new_folio(vmf: VmFault) -> _Outcome:
    mm, vma = vmf.mm, vmf.vma
    host = mm.host
    folio = vma_alloc_anon_folio_pmd(vma)
    if folio < 0:
        return "", VM_FAULT_FALLBACK
    table = pte_alloc_one(mm)
    if table < 0:
        put_page(host, folio)
        return "anon-huge", VM_FAULT_OOM
    ptl = pmd_lock(mm, vmf.pmd)
    if (stopped := _stopped(vmf)) is not None:
        pte_free(mm, table)
        put_page(host, folio)
        return stopped
    pgtable_trans_huge_deposit(mm, vmf.pmd, table)
    map_anon_folio_pmd(vma, vmf.address & ~(PMD_SIZE - 1), vmf.pmd, folio)
    host.vmstat["thp_fault_alloc"] += 1
    mm.pgtables_bytes += 4096
    deferred_split_folio(host, folio, partially_mapped=False)
    ptl.unlock()
    return "anon-huge", 0


# -- a page that is there -----------------------------------------------------------------------
def touch_pmd(vma: VmArea, address: int, pmd: int, *, write: bool) -> bool:
    """Set the bits of an access in a locked huge entry; true if that changed it."""
    entry = pte_mkyoung(pmdp_get(vma.mm, pmd))
    if write:
        entry = pte_mkdirty(entry)
    return pmdp_set_access_flags(vma.mm, address & ~(PMD_SIZE - 1), pmd, entry, write)


def _huge_pmd_set_accessed(vmf: VmFault) -> _Outcome:
    ptl = pmd_lock(vmf.mm, vmf.pmd)
    changed = False
    if pmdp_get(vmf.mm, vmf.pmd) == vmf.orig_pmd and pmd_trans_huge(vmf.orig_pmd):
        changed = touch_pmd(vmf.vma, vmf.address, vmf.pmd, write=bool(vmf.flags & FAULT_FLAG_WRITE))
    ptl.unlock()
    return ("access-flags" if changed else "spurious"), 0


def _do_huge_pmd_numa_page(vmf: VmFault) -> _Outcome:
    vma, mm = vmf.vma, vmf.mm
    ptl = pmd_lock(mm, vmf.pmd)
    old = pmdp_get(mm, vmf.pmd)
    if old != vmf.orig_pmd:
        ptl.unlock()
        return "spurious", 0
    entry = pte_mkyoung(pmd_modify(old, vma.page_prot))
    exclusive = mm.host.pages.flags[pmd_pfn(old)] & PG_anon_exclusive
    if vma.flags & VM_WRITE and exclusive and not entry & _PAGE_UFFD_WP:
        entry = pte_mkwrite(entry)
    set_pmd(mm, vmf.address & ~(PMD_SIZE - 1), vmf.pmd, entry)
    ptl.unlock()
    mm.host.vmstat["numa_hint_faults"] += 1
    return "numa", 0


# -- writes to what is shared -------------------------------------------------------------------
def _do_huge_pmd_wp_page(vmf: VmFault) -> _Outcome:
    mm, vma = vmf.mm, vmf.vma
    if is_huge_zero_pmd(mm.host, vmf.orig_pmd):
        done = _do_huge_zero_wp_pmd(vmf)
        if not done[1] & VM_FAULT_FALLBACK:
            return done
        return _split_and_fall_back(vmf)
    folio = pmd_pfn(vmf.orig_pmd)
    ptl = pmd_lock(mm, vmf.pmd)
    if pmdp_get(mm, vmf.pmd) != vmf.orig_pmd:
        ptl.unlock()
        return "spurious", 0
    flags = mm.host.pages.flags
    if not flags[folio] & PG_anon_exclusive:
        if not _lock_folio(vmf, folio):
            return "spurious", 0
        alone = bool(flags[folio] & PG_anon_exclusive) or _make_exclusive(vma, folio)
        folio_unlock(mm.host, folio)
        if not alone:
            ptl.unlock()
            return _split_and_fall_back(vmf)
    if not vmf.flags & FAULT_FLAG_UNSHARE:
        entry = pte_mkdirty(pte_mkyoung(vmf.orig_pmd))
        if vma.flags & VM_WRITE:
            entry = pte_mkwrite(entry)
        pmdp_set_access_flags(mm, vmf.address & ~(PMD_SIZE - 1), vmf.pmd, entry, True)
    ptl.unlock()
    return "reuse-huge", 0


def _lock_folio(vmf: VmFault, folio: int) -> bool:
    """Lock the folio under the entry's lock; false, and neither is held: the entry changed meanwhile."""
    mm = vmf.mm
    host = mm.host
    if folio_trylock(host, folio):
        return True
    ptl = pmd_lockptr(mm, vmf.pmd)
    get_page(host, folio)
    ptl.unlock()
    folio_lock(host, folio)
    ptl.lock()
    same = pmdp_get(mm, vmf.pmd) == vmf.orig_pmd
    if not same:
        ptl.unlock()
        folio_unlock(host, folio)
    put_page(host, folio)
    return same


def _make_exclusive(vma: VmArea, folio: int) -> bool:
    """Whether this entry holds the folio's only reference: then its pages are exclusive from now on."""
    host = vma.mm.host
    pages = host.pages
    if pages.refcount[folio] != 1 or pages.flags[folio] & PG_swapcache:
        return False
    folio_move_anon_rmap(host, folio, vma)
    if host.profile.anon_exclusive:
        pages.flags[folio] |= PG_anon_exclusive
    return True


def _split_and_fall_back(vmf: VmFault) -> _Outcome:
    split_huge_pmd(vmf.vma, vmf.pmd, vmf.address)
    return "", VM_FAULT_FALLBACK


def _do_huge_zero_wp_pmd(vmf: VmFault) -> _Outcome:
    mm, vma = vmf.mm, vmf.vma
    folio = vma_alloc_anon_folio_pmd(vma)
    if folio < 0:
        return "", VM_FAULT_FALLBACK
    base = vmf.address & ~(PMD_SIZE - 1)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, base, base + PMD_SIZE, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    ptl = pmd_lock(mm, vmf.pmd)
    same = pmdp_get(mm, vmf.pmd) == vmf.orig_pmd
    ret = VM_FAULT_SIGBUS if same and mm.flags & MMF_UNSTABLE else 0
    if same and not ret:
        pmdp_huge_clear_flush(mm, base, vmf.pmd)
        map_anon_folio_pmd(vma, base, vmf.pmd, folio)
        mm.host.vmstat["thp_fault_alloc"] += 1
    else:
        put_page(mm.host, folio)
    ptl.unlock()
    mmu_notifier.mmu_notifier_invalidate_range_only_end(range_)
    return ("cow-huge" if same else "spurious"), ret
