"""A huge entry becomes a table of small ones, or an entry that stands for a page under migration.

Source of truth: mm/huge_memory.c (__split_huge_pmd, __split_huge_pmd_locked, __split_huge_zero_page_pmd,
split_huge_pmd_address, vma_adjust_trans_huge, set_pmd_migration_entry, remove_migration_pmd,
unmap_huge_pmd_locked), mm/migrate.c: pmd_migration_entry_wait; Linux 6.18.

Splitting changes no translation, but it is bracketed all the same (CLEAR, the aligned 2 MiB): secondary
MMUs map it small afterwards. Under the entry's lock it is made invalid and flushed, the deposited table
is filled, and then hung in its place: no CPU can have a small and a huge translation at once. With
`freeze` the small entries are migration entries, unless the page may be pinned.

A file's huge entry is zapped instead: its pages are found again in the page cache.

Not modelled: userfaultfd write-protection of huge pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_SOFT_DIRTY,
    _PAGE_SPECIAL,
    HPAGE_PMD_NR,
    PMD_SIZE,
    is_swap_pmd,
    mk_pmd,
    mk_pte,
    pmd_pfn,
    pmd_trans_huge,
    pte_dirty,
    pte_mkdirty,
    pte_mkold,
    pte_mksoft_dirty,
    pte_mkwrite,
    pte_write,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    SWP_MIG_DIRTY,
    SWP_MIG_YOUNG,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    SWP_PFN_MASK,
    make_migration_entry,
    pte_to_swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)
from host_mm.filemap import folio_wait_unlock
from host_mm.huge_mm import is_huge_zero_pmd, vma_is_anonymous
from host_mm.mm_types import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES, VM_LOCKED
from host_mm.page import (
    PG_anon_exclusive,
    PG_dirty,
    PG_referenced,
    PG_swapbacked,
    get_page,
    put_page,
    set_page_dirty,
)
from host_mm.pgtable_generic import mm_find_pmd, pmd_lock, set_pmd, set_pte
from host_mm.pgtable_huge import (
    pgtable_trans_huge_withdraw,
    pmd_populate,
    pmdp_get,
    pmdp_huge_clear_flush,
    pmdp_invalidate,
    zap_deposited_table,
)
from host_mm.rmap_large import (
    folio_add_anon_rmap_pmd,
    folio_add_anon_rmap_ptes,
    folio_add_large_rmap_pmd,
    folio_remove_rmap_pmd,
    folio_try_share_anon_rmap_pmd,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "TRACEPOINTS", "pmd_migration_entry_wait", "remove_migration_pmd", "set_pmd_migration_entry",
    "split_huge_pmd", "split_huge_pmd_address", "split_huge_pmd_if_needed", "split_huge_pmd_locked",
    "unmap_huge_pmd_locked", "vma_adjust_trans_huge",
]

SET_MIGRATION_PMD = Tracepoint(
    "migrate", "set_migration_pmd", ("addr", "pmd"), lambda addr, pmd: f"addr={addr:x}, pmd={pmd:x}"
)
REMOVE_MIGRATION_PMD = Tracepoint(
    "migrate", "remove_migration_pmd", ("addr", "pmd"), lambda addr, pmd: f"addr={addr:x}, pmd={pmd:x}"
)
SPLIT_HUGE_PMD = Tracepoint(
    "refault", "split_huge_pmd", ("pid", "address", "pmd"),
    lambda pid, address, pmd: f"pid {pid} address {address:#x} pmd {pmd:#x}",
    doc="A huge entry is split into a table of small ones; what it maps stays where it is.",
)
TRACEPOINTS = (SET_MIGRATION_PMD, REMOVE_MIGRATION_PMD, SPLIT_HUGE_PMD)


# -- splitting ----------------------------------------------------------------------------------
def split_huge_pmd(vma: VmArea, pmd: int, address: int) -> None:
    """__split_huge_pmd: the bracket, and in it the split, if there is still something to split."""
    mm = vma.mm
    base = address & ~(PMD_SIZE - 1)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, base, base + PMD_SIZE, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    ptl = pmd_lock(mm, pmd)
    split_huge_pmd_locked(vma, base, pmd, freeze=False)
    ptl.unlock()
    mmu_notifier.mmu_notifier_invalidate_range_only_end(range_)


def split_huge_pmd_address(vma: VmArea, address: int) -> None:
    """split_huge_pmd of the entry of `address`, if a level-2 table is there."""
    pmd = mm_find_pmd(vma.mm, address)
    if pmd:
        split_huge_pmd(vma, pmd, address)


def split_huge_pmd_if_needed(vma: VmArea, address: int) -> None:
    """The VMA is about to be cut at `address`: no huge page may lie across it."""
    base = address & ~(PMD_SIZE - 1)
    if base != address and vma.start <= base and base + PMD_SIZE <= vma.end:
        split_huge_pmd_address(vma, address)


def vma_adjust_trans_huge(vma: VmArea, start: int, end: int, following: VmArea | None) -> None:
    """The VMA becomes [start, end); `following` begins at `end` then."""
    split_huge_pmd_if_needed(vma, start)
    split_huge_pmd_if_needed(vma, end)
    if following is not None:
        split_huge_pmd_if_needed(following, end)


def split_huge_pmd_locked(vma: VmArea, base: int, pmd: int, *, freeze: bool) -> None:
    """Split the entry of the 2 MiB at `base`, if it is huge; its lock is held, the bracket is open."""
    mm = vma.mm
    host = mm.host
    entry = pmdp_get(mm, pmd)
    if not pmd_trans_huge(entry) and not is_swap_pmd(entry):
        return
    host.vmstat["thp_split_pmd"] += 1
    if (t := host.trace.split_huge_pmd) is not None:
        t(mm.process.pid, base, entry)
    if not vma_is_anonymous(vma):
        _zap_file_pmd(vma, base, pmd)
    elif is_huge_zero_pmd(host, entry):
        _split_huge_zero_pmd(vma, base, pmd)
    elif is_swap_pmd(entry):
        folio = swp_offset(pte_to_swp_entry(entry)) & SWP_PFN_MASK
        _populate(vma, base, pmd, _small_migration_entries(entry, folio))
    else:
        _split_present(vma, base, pmd, freeze)


def _populate(vma: VmArea, base: int, pmd: int, entries: list[int], folio: int = -1) -> None:
    """Fill the deposited table and hang it in the huge entry's place, which mapped `folio` until now."""
    mm = vma.mm
    table = pgtable_trans_huge_withdraw(mm, pmd)
    for index, entry in enumerate(entries):
        set_pte(mm, base + (index << 12), (table << 12) + index * 8, entry)
    if folio >= 0:
        folio_remove_rmap_pmd(mm.host, folio, vma)
    pmd_populate(mm, base, pmd, table)


def _split_huge_zero_pmd(vma: VmArea, base: int, pmd: int) -> None:
    mm = vma.mm
    pmdp_huge_clear_flush(mm, base, pmd)
    entry = mk_pte(mm.host.zero_pfn, vma.page_prot) | _PAGE_SPECIAL
    _populate(vma, base, pmd, [entry] * HPAGE_PMD_NR)


def _small_migration_entries(entry: int, folio: int) -> list[int]:
    """The entries of the pages of a folio that huge migration entry `entry` stands for."""
    swp = pte_to_swp_entry(entry)
    kind, bits = swp_type(swp), swp_offset(swp)
    soft_dirty = entry & _PAGE_SWP_SOFT_DIRTY
    young, dirty = bool(bits & SWP_MIG_YOUNG), bool(bits & SWP_MIG_DIRTY)
    return [
        swp_entry_to_pte(make_migration_entry(kind, pfn, young=young, dirty=dirty)) | soft_dirty
        for pfn in range(folio, folio + HPAGE_PMD_NR)
    ]


def _split_present(vma: VmArea, base: int, pmd: int, freeze: bool) -> None:
    mm = vma.mm
    host = mm.host
    old = pmdp_invalidate(mm, base, pmd)
    folio = pmd_pfn(old)
    flags = host.pages.flags
    if pte_dirty(old):
        flags[folio] |= PG_dirty
    exclusive = bool(flags[folio] & PG_anon_exclusive)
    if freeze and exclusive and not folio_try_share_anon_rmap_pmd(host, folio):
        # It may be pinned. The caller sees that it is still mapped.
        freeze = False
    if freeze:
        entry = _migration_entry(old, folio, exclusive)
        _populate(vma, base, pmd, _small_migration_entries(entry, folio), folio)
        put_page(host, folio)
        return
    get_page(host, folio, HPAGE_PMD_NR - 1)
    folio_add_anon_rmap_ptes(host, folio, folio, HPAGE_PMD_NR, vma, exclusive=exclusive)
    # The rights of NUMA hinting are not carried over: a new fault decides.
    first = mk_pte(folio, vma.page_prot)
    if pte_write(old):
        first = pte_mkwrite(first)
    if not old & _PAGE_ACCESSED:
        first = pte_mkold(first)
    if pte_dirty(old):
        first = pte_mkdirty(first)
    if old & _PAGE_SOFT_DIRTY:
        first = pte_mksoft_dirty(first)
    step = 4096 if first & 1 else -4096
    _populate(vma, base, pmd, [first + step * n for n in range(HPAGE_PMD_NR)], folio)


def _zap_file_pmd(vma: VmArea, base: int, pmd: int) -> None:
    mm = vma.mm
    host = mm.host
    old = pmdp_huge_clear_flush(mm, base, pmd)
    folio = pmd_pfn(old)
    flags = host.pages.flags
    counter = MM_SHMEMPAGES if flags[folio] & PG_swapbacked else MM_FILEPAGES
    if pte_dirty(old):
        set_page_dirty(host, folio)
    if old & _PAGE_ACCESSED:
        flags[folio] |= PG_referenced
    folio_remove_rmap_pmd(host, folio, vma)
    put_page(host, folio)
    mm.rss[counter] -= HPAGE_PMD_NR


# -- migration entries --------------------------------------------------------------------------
def _migration_entry(old: int, folio: int, exclusive: bool) -> int:
    """The entry for a folio under migration whose huge entry was `old`."""
    if pte_write(old):
        kind = SWP_MIGRATION_WRITE
    else:
        kind = SWP_MIGRATION_READ_EXCLUSIVE if exclusive else SWP_MIGRATION_READ
    swp = make_migration_entry(kind, folio, young=bool(old & _PAGE_ACCESSED), dirty=pte_dirty(old))
    return swp_entry_to_pte(swp) | (_PAGE_SWP_SOFT_DIRTY if old & _PAGE_SOFT_DIRTY else 0)


def set_pmd_migration_entry(vma: VmArea, address: int, pmd: int, folio: int) -> bool:
    """Replace a locked huge entry by a migration entry; false if the folio may be pinned."""
    mm = vma.mm
    host = mm.host
    flags = host.pages.flags
    old = pmdp_invalidate(mm, address, pmd)
    exclusive = bool(flags[folio] & PG_anon_exclusive)
    if exclusive and not folio_try_share_anon_rmap_pmd(host, folio):
        set_pmd(mm, address, pmd, old)
        return False
    if pte_dirty(old):
        set_page_dirty(host, folio)
    value = _migration_entry(old, folio, exclusive)
    set_pmd(mm, address, pmd, value)
    folio_remove_rmap_pmd(host, folio, vma)
    put_page(host, folio)
    if (t := host.trace.set_migration_pmd) is not None:
        t(address, value)
    return True


def remove_migration_pmd(vma: VmArea, address: int, pmd: int, folio: int) -> None:
    """Point a locked huge migration entry at `folio`. No bracket: nothing was mapped."""
    mm = vma.mm
    host = mm.host
    old = pmdp_get(mm, pmd)
    swp = pte_to_swp_entry(old)
    kind, bits = swp_type(swp), swp_offset(swp)
    get_page(host, folio)
    entry = mk_pmd(folio, vma.page_prot)
    if old & _PAGE_SWP_SOFT_DIRTY:
        entry = pte_mksoft_dirty(entry)
    if kind == SWP_MIGRATION_WRITE:
        entry = pte_mkwrite(entry)
    if not bits & SWP_MIG_YOUNG:
        entry = pte_mkold(entry)
    if host.pages.flags[folio] & PG_dirty and bits & SWP_MIG_DIRTY:
        entry = pte_mkdirty(entry)
    if vma_is_anonymous(vma):
        folio_add_anon_rmap_pmd(host, folio, vma, exclusive=kind != SWP_MIGRATION_READ)
    else:
        folio_add_large_rmap_pmd(host, folio, mm)
    set_pmd(mm, address, pmd, entry)
    if (t := host.trace.remove_migration_pmd) is not None:
        t(address, entry)


def pmd_migration_entry_wait(mm: MmStruct, pmd: int) -> None:
    """Sleep until the folio that a huge migration entry stands for was unlocked by its migration."""
    ptl = pmd_lock(mm, pmd)
    entry = pmdp_get(mm, pmd)
    folio = swp_offset(pte_to_swp_entry(entry)) & SWP_PFN_MASK if is_swap_pmd(entry) else -1
    ptl.unlock()
    if folio >= 0:
        folio_wait_unlock(mm.host, folio)


# -- discarding ---------------------------------------------------------------------------------
def unmap_huge_pmd_locked(vma: VmArea, address: int, pmd: int, folio: int) -> bool:
    """Reclaim takes a MADV_FREE folio from its locked huge entry; false if it was written or is held."""
    mm = vma.mm
    host = mm.host
    pages = host.pages
    if pte_dirty(pmdp_get(mm, pmd)):
        pages.flags[folio] |= PG_dirty
    if pages.flags[folio] & PG_dirty:
        pages.flags[folio] |= PG_swapbacked
        return False
    old = pmdp_huge_clear_flush(mm, address, pmd)
    if host.sched.preempt:
        host.sched.point("pmd")
    if pte_dirty(old):
        pages.flags[folio] |= PG_dirty
    if pages.flags[folio] & PG_dirty:
        pages.flags[folio] |= PG_swapbacked
        set_pmd(mm, address, pmd, old)
        return False
    if pages.refcount[folio] != pages.large_mapcount[folio] + 1:
        set_pmd(mm, address, pmd, old)
        return False
    folio_remove_rmap_pmd(host, folio, vma)
    zap_deposited_table(mm, pmd)
    mm.rss[MM_ANONPAGES] -= HPAGE_PMD_NR
    if vma.flags & VM_LOCKED:
        host.lru.mlock.mlock_drain_local()
    put_page(host, folio)
    return True
