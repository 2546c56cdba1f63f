"""What system calls do to huge entries: out of an address space, into a child, elsewhere, other rights.

Source of truth: mm/huge_memory.c (zap_huge_pmd, copy_huge_pmd, move_huge_pmd, change_huge_pmd,
can_change_pmd_writable, madvise_free_huge_pmd), fs/proc/task_mmu.c (clear_soft_dirty_pmd); Linux 6.18.

Each works on a whole entry, inside the bracket of its caller. Where a part of the 2 MiB is meant, the
caller splits the entry first (`split_huge_pmd`), in a bracket of its own.

Not modelled: DAX, hinting faults' access times.
"""

from __future__ import annotations

from errno import EAGAIN, ENOMEM
from typing import TYPE_CHECKING

from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_PRESENT,
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    HPAGE_PMD_NR,
    PMD_SIZE,
    is_swap_pmd,
    pmd_modify,
    pmd_pfn,
    pmd_trans_huge,
    pte_dirty,
    pte_mkclean,
    pte_mkold,
    pte_mksoft_dirty,
    pte_mkwrite,
    pte_protnone,
    pte_write,
    pte_wrprotect,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_PFN_MASK,
    is_writable_migration_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.huge_memory_pmd import split_huge_pmd
from host_mm.huge_mm import is_huge_zero_pmd, mm_get_huge_zero_folio, vma_is_anonymous
from host_mm.mm_types import (
    MM_ANONPAGES,
    MM_FILEPAGES,
    MM_SHMEMPAGES,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_UFFD_WP,
)
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_referenced,
    PG_swapbacked,
    PG_young,
    folio_maybe_mapped_shared,
    get_page,
    put_page,
    set_page_dirty,
)
from host_mm.pgtable_generic import pmd_lock, pmd_lockptr, pte_alloc_one, pte_free, set_pmd
from host_mm.pgtable_huge import (
    pgtable_trans_huge_deposit,
    pgtable_trans_huge_withdraw,
    pmd_trans_huge_lock,
    pmdp_get,
    pmdp_huge_get_and_clear,
    pmdp_invalidate,
    pmdp_test_and_clear_young,
    zap_deposited_table,
)
from host_mm.rmap_large import folio_remove_rmap_pmd, folio_try_dup_anon_rmap_pmd

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.mmu_gather import MmuGather

__all__ = [
    "change_huge_pmd", "clear_refs_huge_pmd", "copy_huge_pmd", "madvise_free_huge_pmd", "move_huge_pmd",
    "pmd_folio", "zap_huge_pmd",
]

_FLUSH_ON_CLEAR = _PAGE_DIRTY | _PAGE_PRESENT | _PAGE_ACCESSED


def pmd_folio(mm: MmStruct, entry: int) -> int:
    """The folio that a huge entry maps or stands for; -1 for the huge zero page."""
    if is_swap_pmd(entry):
        return swp_offset(pte_to_swp_entry(entry)) & SWP_PFN_MASK
    return -1 if is_huge_zero_pmd(mm.host, entry) else pmd_pfn(entry)


# -- out ----------------------------------------------------------------------------------------
def zap_huge_pmd(tlb: MmuGather, vma: VmArea, pmd: int, address: int) -> bool:
    """Clear a huge entry, its folio into the gather; false if it is not huge any more."""
    mm = vma.mm
    host = mm.host
    ptl = pmd_trans_huge_lock(mm, pmd)
    if ptl is None:
        return False
    old = pmdp_huge_get_and_clear(mm, address, pmd)
    tlb.remove_tlb_entry(address, PMD_SIZE)
    folio = pmd_folio(mm, old)
    if folio < 0:
        zap_deposited_table(mm, pmd)
        ptl.unlock()
        return True
    present = pmd_trans_huge(old)
    flags = host.pages.flags[folio]
    if present:
        folio_remove_rmap_pmd(host, folio, vma)
    if flags & PG_anon:
        zap_deposited_table(mm, pmd)
        mm.rss[MM_ANONPAGES] -= HPAGE_PMD_NR
    else:
        mm.rss[MM_SHMEMPAGES if flags & PG_swapbacked else MM_FILEPAGES] -= HPAGE_PMD_NR
        if present and pte_dirty(old):
            set_page_dirty(host, folio)
        if present and old & _PAGE_ACCESSED:
            host.lru.folio_mark_accessed(folio)
    ptl.unlock()
    if present:
        tlb.remove_page(folio)
    return True


# -- into a child -------------------------------------------------------------------------------
def copy_huge_pmd(dst_vma: VmArea, src_vma: VmArea, dst_pmd: int, src_pmd: int, address: int) -> int:
    """Fork: share a huge page with the child. 0, -ENOMEM, or -EAGAIN: there are small entries now."""
    if not vma_is_anonymous(dst_vma):
        # A fault finds it in the page cache.
        return 0
    dst_mm, src_mm = dst_vma.mm, src_vma.mm
    table = pte_alloc_one(dst_mm)
    if table < 0:
        return -ENOMEM
    dst_ptl = pmd_lock(dst_mm, dst_pmd)
    src_ptl = pmd_lockptr(src_mm, src_pmd)
    src_ptl.lock(nested=True)
    entry = pmdp_get(src_mm, src_pmd)
    if is_swap_pmd(entry):
        child = _copy_migration_entry(src_vma, src_pmd, address, entry)
        dst_mm.rss[MM_ANONPAGES] += HPAGE_PMD_NR
        if not dst_vma.flags & VM_UFFD_WP:
            child &= ~_PAGE_SWP_UFFD_WP
    elif pmd_trans_huge(entry):
        child = _copy_present(dst_vma, src_vma, src_pmd, address, entry)
        if not dst_vma.flags & VM_UFFD_WP:
            child &= ~_PAGE_UFFD_WP
    else:
        child = 0
    if child:
        dst_mm.pgtables_bytes += 4096
        pgtable_trans_huge_deposit(dst_mm, dst_pmd, table)
        set_pmd(dst_mm, address, dst_pmd, child)
    src_ptl.unlock()
    dst_ptl.unlock()
    if child:
        return 0
    pte_free(dst_mm, table)
    if pmd_trans_huge(entry):
        # It may be pinned: its pages are copied one by one.
        split_huge_pmd(src_vma, src_pmd, address)
    return -EAGAIN


def _copy_migration_entry(src_vma: VmArea, src_pmd: int, address: int, entry: int) -> int:
    swp = pte_to_swp_entry(entry)
    if swp_type(swp) == SWP_MIGRATION_READ:
        return entry
    kept = entry & (_PAGE_SWP_SOFT_DIRTY | _PAGE_SWP_UFFD_WP)
    entry = swp_entry_to_pte(swp_entry(SWP_MIGRATION_READ, swp_offset(swp))) | kept
    set_pmd(src_vma.mm, address, src_pmd, entry)
    return entry


def _copy_present(dst_vma: VmArea, src_vma: VmArea, src_pmd: int, address: int, entry: int) -> int:
    """The child's entry, the parent's without the right to write; 0: the folio may be pinned."""
    host = src_vma.mm.host
    folio = pmd_folio(src_vma.mm, entry)
    if folio < 0:
        mm_get_huge_zero_folio(dst_vma.mm)
    else:
        get_page(host, folio)
        if not folio_try_dup_anon_rmap_pmd(host, folio, dst_vma, src_vma):
            put_page(host, folio)
            return 0
        dst_vma.mm.rss[MM_ANONPAGES] += HPAGE_PMD_NR
    if pte_write(entry):
        set_pmd(src_vma.mm, address, src_pmd, pte_wrprotect(entry))
    return pte_mkold(pte_wrprotect(entry))


# -- elsewhere ----------------------------------------------------------------------------------
def move_huge_pmd(vma: VmArea, old_addr: int, new_addr: int, old_pmd: int, new_pmd: int) -> bool:
    """mremap: move a huge entry to an empty place and flush the old one; false if it is not huge now."""
    mm = vma.mm
    if pmdp_get(mm, new_pmd):
        return False
    old_ptl = pmd_trans_huge_lock(mm, old_pmd)
    if old_ptl is None:
        return False
    new_ptl = pmd_lockptr(mm, new_pmd)
    if new_ptl is not old_ptl:
        new_ptl.lock(nested=True)
    entry = pmdp_huge_get_and_clear(mm, old_addr, old_pmd)
    if new_ptl is not old_ptl and vma_is_anonymous(vma):
        pgtable_trans_huge_deposit(mm, new_pmd, pgtable_trans_huge_withdraw(mm, old_pmd))
    present = pmd_trans_huge(entry)
    entry = pte_mksoft_dirty(entry) if present else entry | _PAGE_SWP_SOFT_DIRTY
    if vma.userfaultfd_ctx is not None:
        entry &= ~(_PAGE_UFFD_WP if present else _PAGE_SWP_UFFD_WP)
    set_pmd(mm, new_addr, new_pmd, entry)
    if present:
        _tlb.flush_pmd_tlb_range(mm, old_addr, old_addr + PMD_SIZE)
    if new_ptl is not old_ptl:
        new_ptl.unlock()
    old_ptl.unlock()
    return True


# -- other rights -------------------------------------------------------------------------------
def change_huge_pmd(
    tlb: MmuGather | None, vma: VmArea, pmd: int, address: int, newprot: int, *, prot_numa: bool = False,
    uffd_wp: bool = False, uffd_wp_resolve: bool = False, try_writable: bool = False,
) -> int:
    """mprotect of a whole huge page: how many pages changed, -1 if the entry is not huge any more."""
    mm = vma.mm
    ptl = pmd_trans_huge_lock(mm, pmd)
    if ptl is None:
        return -1
    entry = pmdp_get(mm, pmd)
    changed = 0
    if is_swap_pmd(entry):
        _change_migration_entry(mm, pmd, address, entry, uffd_wp, uffd_wp_resolve)
    elif not prot_numa or not (is_huge_zero_pmd(mm.host, entry) or pte_protnone(entry)):
        old = pmdp_invalidate(mm, address, pmd)
        new = pmd_modify(old, newprot)
        if uffd_wp:
            new = pte_wrprotect(new) | _PAGE_UFFD_WP
        elif uffd_wp_resolve:
            new &= ~_PAGE_UFFD_WP
        if try_writable and not pte_write(new) and _can_change_pmd_writable(vma, new):
            new = pte_mkwrite(new)
        set_pmd(mm, address, pmd, new)
        if tlb is not None and _needs_flush(old, new):
            tlb.remove_tlb_entry(address, PMD_SIZE)
        changed = HPAGE_PMD_NR
    ptl.unlock()
    return changed


def _change_migration_entry(
    mm: MmStruct, pmd: int, address: int, entry: int, uffd_wp: bool, uffd_wp_resolve: bool
) -> None:
    swp = pte_to_swp_entry(entry)
    new = entry
    if is_writable_migration_entry(swp):
        anon = mm.host.pages.flags[swp_offset(swp) & SWP_PFN_MASK] & PG_anon
        owned = anon and mm.host.profile.anon_exclusive
        kind = SWP_MIGRATION_READ_EXCLUSIVE if owned else SWP_MIGRATION_READ
        new = swp_entry_to_pte(swp_entry(kind, swp_offset(swp))) | (entry & _PAGE_SWP_SOFT_DIRTY)
    if uffd_wp:
        new |= _PAGE_SWP_UFFD_WP
    elif uffd_wp_resolve:
        new &= ~_PAGE_SWP_UFFD_WP
    if new != entry:
        set_pmd(mm, address, pmd, new)


def _needs_flush(old: int, new: int) -> bool:
    """huge_pmd_needs_flush: the invalid entry in between was flushed already, but for what A and D say."""
    if not old & _PAGE_PRESENT:
        return False
    diff = old ^ new
    return bool(diff & old & _FLUSH_ON_CLEAR or diff & ~(_PAGE_SOFT_DIRTY | _PAGE_ACCESSED | _PAGE_DIRTY))


def _can_change_pmd_writable(vma: VmArea, entry: int) -> bool:
    host = vma.mm.host
    if pte_protnone(entry):
        return False
    if not vma.flags & VM_SOFTDIRTY and not entry & _PAGE_SOFT_DIRTY:
        return False
    if vma.flags & VM_UFFD_WP and entry & _PAGE_UFFD_WP:
        return False
    if vma.flags & VM_SHARED:
        return pte_dirty(entry)
    folio = pmd_folio(vma.mm, entry)
    both = PG_anon | PG_anon_exclusive
    return folio >= 0 and host.pages.flags[folio] & both == both


# -- madvise and clear_refs ---------------------------------------------------------------------
def madvise_free_huge_pmd(tlb: MmuGather, vma: VmArea, pmd: int, address: int, following: int) -> bool:
    """MADV_FREE of a huge page as a whole; false: it was split, or is no business of this call any more.

    A part of it means that the folio is split, so that reclaim can drop just these pages.
    """
    mm = vma.mm
    host = mm.host
    ptl = pmd_trans_huge_lock(mm, pmd)
    if ptl is None:
        return False
    entry = pmdp_get(mm, pmd)
    folio = pmd_folio(mm, entry)
    present = pmd_trans_huge(entry) and folio >= 0
    if not present or folio_maybe_mapped_shared(host.pages, folio) or not folio_trylock(host, folio):
        ptl.unlock()
        return False
    if following - address != PMD_SIZE:
        get_page(host, folio)
        ptl.unlock()
        host.split_folio(folio)
        folio_unlock(host, folio)
        put_page(host, folio)
        return False
    host.pages.flags[folio] &= ~PG_dirty
    folio_unlock(host, folio)
    if entry & _PAGE_ACCESSED or pte_dirty(entry):
        old = pmdp_invalidate(mm, address, pmd)
        set_pmd(mm, address, pmd, pte_mkclean(pte_mkold(old)))
        tlb.remove_tlb_entry(address, PMD_SIZE)
    host.lru.folio_mark_lazyfree(folio)
    ptl.unlock()
    return True


def clear_refs_huge_pmd(vma: VmArea, pmd: int, address: int, *, soft_dirty: bool) -> bool:
    """clear_refs of one huge entry; false if it is not huge any more."""
    mm = vma.mm
    ptl = pmd_trans_huge_lock(mm, pmd)
    if ptl is None:
        return False
    entry = pmdp_get(mm, pmd)
    folio = pmd_folio(mm, entry)
    if soft_dirty:
        if is_swap_pmd(entry):
            set_pmd(mm, address, pmd, entry & ~_PAGE_SWP_SOFT_DIRTY)
        else:
            old = pmdp_invalidate(mm, address, pmd)
            set_pmd(mm, address, pmd, pte_wrprotect(old) & ~_PAGE_SOFT_DIRTY)
    elif pmd_trans_huge(entry) and folio >= 0:
        pmdp_test_and_clear_young(mm, address, pmd)
        mm.host.pages.flags[folio] &= ~(PG_young | PG_referenced)
    ptl.unlock()
    return True
