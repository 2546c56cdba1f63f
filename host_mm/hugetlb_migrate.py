"""Migration of huge pages.

Source of truth: mm/migrate.c (unmap_and_move_huge_page, migrate_hugetlbs, migrate_huge_page_move_mapping,
alloc_migration_target), mm/mempolicy.c: queue_folios_hugetlb, mm/rmap.c: try_to_migrate_one's huge-page
half, fs/hugetlbfs/inode.c: hugetlbfs_migrate_folio; Linux 6.18.

Each page is unmapped and moved by itself. A bracket (CLEAR) per mapping, widened to 1 GiB where its table
may be shared; entries are flushed one by one, inside it. Where a table is shared the whole table is unhooked
instead, and the page has lost its last entry when the last user of the table was met. i_mmap_rwsem and the
VMA's lock come in the wrong order here and are only tried: if somebody has them the page stays for another
attempt.

Not modelled: poisoned pages, subpools.
"""

from __future__ import annotations

from errno import EAGAIN, ENOMEM
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.address_space import AddressSpace, vmas_of_pages
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_PSE,
    _PAGE_SOFT_DIRTY,
    HPAGE_PMD_NR,
    HPAGE_PMD_ORDER,
    PMD_SIZE,
    mk_pmd,
    pmd_pfn,
    pte_dirty,
    pte_mkdirty,
    pte_mkold,
    pte_mkwrite,
    pte_present,
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
    is_migration_entry,
    is_swap_pte,
    make_migration_entry,
    pte_to_swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock
from host_mm.hugetlb import (
    alloc_hugetlb_folio_nodemask,
    folio_isolate_hugetlb,
    folio_putback_hugetlb,
    move_hugetlb_state,
)
from host_mm.hugetlb_rmap import (
    copy_huge_folio,
    hugetlb_add_anon_rmap,
    hugetlb_add_file_rmap,
    hugetlb_remove_rmap,
    hugetlb_try_share_anon_rmap,
)
from host_mm.hugetlb_share import (
    adjust_range_if_pmd_sharing_possible,
    flush_hugetlb_tlb_range,
    huge_pmd_unshare,
    hugetlb_vma_lock_read,
    hugetlb_vma_trylock_write,
    hugetlb_vma_unlock_read,
    hugetlb_vma_unlock_write,
    hugetlb_walk,
)
from host_mm.kernel.costs import COST_MIGRATE_PAGE
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_referenced,
    PG_swapbacked,
    PG_uptodate,
    folio_ref_freeze,
    folio_ref_unfreeze,
    get_page,
    put_page,
    set_page_dirty,
)
from host_mm.pgtable_generic import pmd_lock, pmd_slots, set_pmd
from host_mm.rmap import rmap_walk

if TYPE_CHECKING:
    from collections.abc import Callable

    from host_mm.host import HostMm
    from host_mm.mm_types import AnonVma, VmArea

__all__ = ["migrate_hugetlbs", "queue_folios_hugetlb"]

NR_MAX_MIGRATE_PAGES_RETRY = 10
_COPIED_FLAGS = PG_uptodate | PG_referenced | PG_swapbacked | PG_anon


def queue_folios_hugetlb(
    vma: VmArea, start: int, end: int, wrong: frozenset[int], queue: list[int], *, move: bool, move_all: bool
) -> int:
    """Isolate the huge pages of [start, end) that are on the `wrong` nodes; how many could not be.

    Pages that others may map too are left, and not counted, without `move_all`.
    """
    host = vma.mm.host
    failed = 0
    hugetlb_vma_lock_read(vma)
    for pmd, _, _ in pmd_slots(vma.mm, start, end):
        lock = pmd_lock(vma.mm, pmd)
        entry = host.ram.u64[pmd >> 3]
        if pte_present(entry):
            pfn = pmd_pfn(entry)
            shared = host.pages.large_mapcount[pfn] > 1 or host.pages.private[pmd >> 12]
            if host.allocator.nid_of(pfn) not in wrong or pfn in queue:
                pass
            elif not move and not move_all:
                failed += 1
            elif move_all or not shared:
                if folio_isolate_hugetlb(host, pfn):
                    queue.append(pfn)
                else:
                    failed += 1
        elif entry:
            failed += 1
        lock.unlock()
    hugetlb_vma_unlock_read(vma)
    return failed


def migrate_hugetlbs(host: HostMm, folios: list[int], nid: int, *, sync: bool) -> tuple[int, int, list[int]]:
    """Move isolated huge pages to a node: how many stayed or -ENOMEM, how many moved, and those that stayed.

    `sync`: from the fourth attempt on their folio locks are waited for.
    """
    moved = 0
    for attempt in range(NR_MAX_MIGRATE_PAGES_RETRY):
        if not folios:
            break
        left: list[int] = []
        for position, pfn in enumerate(folios):
            if host.sched.preempt:
                host.sched.point("cond_resched")
            rc = _unmap_and_move_huge_page(host, pfn, nid, wait=sync and attempt > 2)
            if rc == -ENOMEM:
                return rc, moved, left + folios[position:]
            if rc:
                left.append(pfn)
            else:
                moved += 1
        folios = left
    return len(folios), moved, folios


def _unmap_and_move_huge_page(host: HostMm, src: int, nid: int, *, wait: bool) -> int:
    """Move an isolated huge page to a node: 0 and the isolation is over, -EAGAIN, or -ENOMEM.

    `wait`: the folio lock may be waited for.
    """
    pages = host.pages
    if pages.refcount[src] == 1:
        # Freed from under us: only the isolation's reference is left.
        folio_putback_hugetlb(host, src)
        return 0
    dst = alloc_hugetlb_folio_nodemask(host, nid)
    if dst < 0:
        return -ENOMEM
    if not folio_trylock(host, src):
        if not wait:
            put_page(host, dst)
            return -EAGAIN
        folio_lock(host, src)
    anon_vma = pages.mapping.get(src) if pages.flags[src] & PG_anon else None
    rc = -EAGAIN
    if folio_trylock(host, dst):
        rc = _move_locked(host, src, dst, anon_vma)
        folio_unlock(host, dst)
    if not rc:
        move_hugetlb_state(host, src, dst)
    folio_unlock(host, src)
    if not rc:
        folio_putback_hugetlb(host, src)
    put_page(host, dst)
    return rc


def _move_locked(host: HostMm, src: int, dst: int, anon_vma: AnonVma | None) -> int:
    pages = host.pages
    mapping = pages.mapping.get(src)
    was_mapped = pages.large_mapcount[src] > 0
    if was_mapped:
        if isinstance(mapping, AddressSpace):
            # For writing, since tables may have to be unhooked; the folio lock is held, so only tried.
            if not mapping.i_mmap_rwsem.trylock():
                return -EAGAIN
            _walk_file(host, mapping, src, lambda vma, at: _unmap_one(host, src, vma, at))
            mapping.i_mmap_rwsem.unlock()
        else:
            rmap_walk(host, src, lambda vma, at: _unmap_one(host, src, vma, at), anon_vma=anon_vma,
                      done=lambda: not pages.large_mapcount[src])
    rc = -EAGAIN if pages.large_mapcount[src] else _move_to_new_folio(host, src, dst)
    if (t := host.trace.migrate_folio) is not None:
        t(src, dst, "again" if rc else "moved")
    if was_mapped:
        _restore(host, src, src if rc else dst, anon_vma)
    return rc


def _walk_file(
    host: HostMm, mapping: AddressSpace, pfn: int, one: Callable[[VmArea, int], bool]
) -> None:
    """rmap_walk_file; i_mmap_rwsem is held."""
    first = host.pages.index[pfn]
    for vma in vmas_of_pages(mapping, first, first + HPAGE_PMD_NR - 1):
        if host.sched.preempt:
            host.sched.point("cond_resched")
        if not one(vma, vma.address_of_index(first)):
            break


# -- out of the tables ----------------------------------------------------------------------------
def _unmap_one(host: HostMm, src: int, vma: VmArea, address: int) -> bool:
    """try_to_migrate_one: a migration entry in this VMA; false ends the walk."""
    wide = adjust_range_if_pmd_sharing_possible(vma, address, address + PMD_SIZE)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, vma.mm, *wide, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    ret = True
    pmd = hugetlb_walk(vma, address)
    if pmd:
        lock = pmd_lock(vma.mm, pmd)
        entry = host.ram.u64[pmd >> 3]
        if pte_present(entry) and pmd_pfn(entry) == src:
            ret = _unmap_locked(host, src, vma, address, pmd, wide)
        lock.unlock()
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return ret


def _unmap_locked(
    host: HostMm, src: int, vma: VmArea, address: int, pmd: int, wide: tuple[int, int]
) -> bool:
    anon = host.pages.flags[src] & PG_anon
    if not anon:
        if not hugetlb_vma_trylock_write(vma):
            return False
        unshared = huge_pmd_unshare(vma, address, pmd)
        hugetlb_vma_unlock_write(vma)
        if unshared:
            flush_hugetlb_tlb_range(vma, *wide)
            return True
    old = host.ram.u64[pmd >> 3]
    set_pmd(vma.mm, address, pmd, 0)
    flush_hugetlb_tlb_range(vma, address, address + PMD_SIZE)
    if pte_dirty(old):
        set_page_dirty(host, src)
    exclusive = anon and host.pages.flags[src] & PG_anon_exclusive
    if exclusive and not hugetlb_try_share_anon_rmap(host, src):
        set_pmd(vma.mm, address, pmd, old)
        return False
    if pte_write(old):
        kind = SWP_MIGRATION_WRITE
    else:
        kind = SWP_MIGRATION_READ_EXCLUSIVE if exclusive else SWP_MIGRATION_READ
    entry = make_migration_entry(kind, src, young=bool(old & _PAGE_ACCESSED), dirty=pte_dirty(old))
    value = swp_entry_to_pte(entry) | (_PAGE_SWP_SOFT_DIRTY if old & _PAGE_SOFT_DIRTY else 0)
    set_pmd(vma.mm, address, pmd, value)
    if (t := host.trace.set_migration_pte) is not None:
        t(address, value, HPAGE_PMD_ORDER)
    hugetlb_remove_rmap(host, src)
    put_page(host, src)
    return True


# -- and back -------------------------------------------------------------------------------------
def _restore(host: HostMm, src: int, dst: int, anon_vma: AnonVma | None) -> None:
    """remove_migration_ptes: point what is left of `src` at `dst`. No bracket: nothing was mapped."""
    mapping = host.pages.mapping.get(dst)
    if isinstance(mapping, AddressSpace):
        mapping.i_mmap_rwsem.read_lock()
        _walk_file(host, mapping, dst, lambda vma, at: _restore_one(host, src, dst, vma, at))
        mapping.i_mmap_rwsem.read_unlock()
    else:
        rmap_walk(host, dst, lambda vma, at: _restore_one(host, src, dst, vma, at), anon_vma=anon_vma)


def _restore_one(host: HostMm, src: int, dst: int, vma: VmArea, address: int) -> bool:
    pmd = hugetlb_walk(vma, address)
    if not pmd:
        return True
    lock = pmd_lock(vma.mm, pmd)
    old = host.ram.u64[pmd >> 3]
    swp = pte_to_swp_entry(old) if is_swap_pte(old) else 0
    if swp and is_migration_entry(swp) and swp_offset(swp) & SWP_PFN_MASK == src:
        get_page(host, dst)
        value = mk_pmd(dst, vma.page_prot)
        value = value | _PAGE_ACCESSED if swp & SWP_MIG_YOUNG else pte_mkold(value)
        if host.pages.flags[dst] & PG_dirty and swp & SWP_MIG_DIRTY:
            value = pte_mkdirty(value)
        value = value | _PAGE_SOFT_DIRTY if old & _PAGE_SWP_SOFT_DIRTY else value & ~_PAGE_SOFT_DIRTY
        if swp_type(swp) == SWP_MIGRATION_WRITE:
            value = pte_mkwrite(value)
        if host.pages.flags[dst] & PG_anon:
            hugetlb_add_anon_rmap(host, dst, exclusive=swp_type(swp) != SWP_MIGRATION_READ)
        else:
            hugetlb_add_file_rmap(host, dst)
        set_pmd(vma.mm, address, pmd, value | _PAGE_PSE)
        if (t := host.trace.remove_migration_pte) is not None:
            t(address, value, HPAGE_PMD_ORDER)
    lock.unlock()
    return True


# -- the move -------------------------------------------------------------------------------------
def _move_to_new_folio(host: HostMm, src: int, dst: int) -> int:
    """Give the new page the old one's place and bytes; -EAGAIN if somebody else holds the old one."""
    pages = host.pages
    mapping = pages.mapping.get(src)
    cached = HPAGE_PMD_NR if isinstance(mapping, AddressSpace) else 0
    # One reference is the isolation's.
    if pages.refcount[src] != 1 + cached and "migrate-ignore-refs" not in host.breaks:
        return -EAGAIN
    if host.checks is not None:
        host.checks.folio_moves(src)
    copy_huge_folio(host, dst, src)
    host.sched.advance(COST_MIGRATE_PAGE)
    if isinstance(mapping, AddressSpace):
        if not folio_ref_freeze(pages, src, 1 + cached):
            return -EAGAIN
        first = pages.index[src]
        get_page(host, dst, cached)
        for small in range(first, first + HPAGE_PMD_NR):
            mapping.i_pages[small] = dst
        folio_ref_unfreeze(pages, src, 1)
        del pages.mapping[src]
    pages.index[dst] = pages.index[src]
    if mapping is not None:
        pages.mapping[dst] = mapping
    pages.flags[dst] |= pages.flags[src] & (_COPIED_FLAGS | PG_dirty)
    pages.flags[src] &= ~PG_dirty
    return 0
