"""Huge-page entries in their tables, and level-2 tables that address spaces share.

Source of truth: mm/hugetlb.c (huge_pte_alloc, huge_pte_offset, want_pmd_share, page_table_shareable,
huge_pmd_share, huge_pmd_unshare, adjust_range_if_pmd_sharing_possible, hugetlb_unshare_pmds,
hugetlb_unshare_all_pmds, hugetlb_split, hugetlb_vma_lock_*); include/linux/hugetlb.h: hugetlb_walk;
Linux 6.18.

Where a shared mapping covers a whole aligned 1 GiB of a file, its level-2 table is the one of another
mapping of the same file that covers it at a compatible address with the same rights. Such a table counts
its further users (pt_share_count, in `private` of its frame); folios count an entry of it once. Nobody
unmaps an entry of a table that others use: the whole table is unhooked instead, and with it all that it
maps in this 1 GiB, so that brackets and flushes are widened to that size wherever a table might be shared.

An entry is a leaf of level 2, locked by its table's lock. A table stays where it is while the VMA's
hugetlb lock is held, for reading at least; unhooking one needs that lock and i_mmap_rwsem for writing.

Not modelled: userfaultfd's refusal to share, tlb_remove_table_sync_one (a fast GUP under way compares the
walk again).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import _PAGE_TABLE, PFN_MASK, PMD_SIZE, PUD_SIZE
from host_mm.hugetlb_resv import HPAGE_RESV_OWNER, is_vma_resv_set, vma_resv_map
from host_mm.mm_types import VM_LOCKED_MASK, VM_MAYSHARE
from host_mm.pgtable_generic import pmd_alloc, pmd_lock, pmd_offset, pud_alloc, pud_offset

if TYPE_CHECKING:
    from host_mm.kernel.locks import RwSem
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "adjust_range_if_pmd_sharing_possible", "flush_hugetlb_tlb_range", "huge_pmd_unshare", "huge_pte_alloc",
    "hugetlb_split", "hugetlb_unshare_all_pmds", "hugetlb_unshare_pmds", "hugetlb_vma_lock_read",
    "hugetlb_vma_lock_write", "hugetlb_vma_sema", "hugetlb_vma_trylock_write", "hugetlb_vma_unlock_read",
    "hugetlb_vma_unlock_write", "hugetlb_walk", "last_huge_page", "vma_private_lock", "want_pmd_share",
]


# -- the VMA's lock -------------------------------------------------------------------------------
def vma_private_lock(vma: VmArea) -> bool:
    """__vma_private_lock: a private VMA that owns reservations uses its map's lock."""
    return vma_resv_map(vma) is not None and is_vma_resv_set(vma, HPAGE_RESV_OWNER)


def hugetlb_vma_sema(vma: VmArea) -> RwSem | None:
    """What hugetlb_vma_lock_* lock."""
    if vma.flags & VM_MAYSHARE:
        lock: RwSem | None = vma.private_data.rw_sema if vma.private_data is not None else None
        return lock
    resv = vma_resv_map(vma)
    return resv.rw_sema if resv is not None and is_vma_resv_set(vma, HPAGE_RESV_OWNER) else None


def hugetlb_vma_lock_read(vma: VmArea) -> None:
    """Keep the VMA's tables and its file's pages in place; VMAs that need it not have no lock."""
    if (sema := hugetlb_vma_sema(vma)) is not None:
        sema.read_lock()


def hugetlb_vma_unlock_read(vma: VmArea) -> None:
    """Undo hugetlb_vma_lock_read."""
    if (sema := hugetlb_vma_sema(vma)) is not None:
        sema.read_unlock()


def hugetlb_vma_lock_write(vma: VmArea) -> None:
    """Nobody else walks the VMA's tables."""
    if (sema := hugetlb_vma_sema(vma)) is not None:
        sema.lock()


def hugetlb_vma_trylock_write(vma: VmArea) -> bool:
    """The same under i_mmap_rwsem, which is taken after this lock elsewhere; false: somebody has it."""
    sema = hugetlb_vma_sema(vma)
    return sema is None or sema.trylock()


def hugetlb_vma_unlock_write(vma: VmArea) -> None:
    """Undo hugetlb_vma_lock_write."""
    if (sema := hugetlb_vma_sema(vma)) is not None:
        sema.unlock()


# -- entries --------------------------------------------------------------------------------------
def hugetlb_walk(vma: VmArea, address: int) -> int:
    """Physical address of the entry of `address`, or 0 where there is no level-2 table."""
    return pmd_offset(vma.mm, address)


def last_huge_page(address: int) -> int:
    """The last huge page that the same level-2 table maps: where a walk goes on after skipping it."""
    return address | (PUD_SIZE - PMD_SIZE)


def huge_pte_alloc(vma: VmArea, address: int, *, share: bool = True) -> int:
    """The entry of `address`, its tables shared or made if they are missing; 0: no memory.

    i_mmap_rwsem is not held, but without `share`.
    """
    mm = vma.mm
    pud = pud_alloc(mm, address)
    if not pud:
        return 0
    if share and want_pmd_share(vma, address) and not mm.host.ram.u64[pud >> 3]:
        return _huge_pmd_share(vma, address, pud)
    return pmd_alloc(mm, address)


def flush_hugetlb_tlb_range(vma: VmArea, start: int, end: int) -> None:
    """Flush [start, end) of a huge-page VMA."""
    _tlb.flush_pmd_tlb_range(vma.mm, start, end)


# -- sharing --------------------------------------------------------------------------------------
def _range_in_vma(vma: VmArea, start: int, end: int) -> bool:
    return vma.start <= start and end <= vma.end


def want_pmd_share(vma: VmArea, address: int) -> bool:
    """Whether the level-2 table of `address` may be shared."""
    base = address & ~(PUD_SIZE - 1)
    if not vma.flags & VM_MAYSHARE or vma.private_data is None:
        return False
    return _range_in_vma(vma, base, base + PUD_SIZE)


def _page_table_shareable(svma: VmArea, vma: VmArea, address: int, index: int) -> int:
    """Where `svma` maps what `vma` maps at `address` if both can use one table, else 0."""
    saddr = ((index - svma.pgoff) << 12) + svma.start
    base = saddr & ~(PUD_SIZE - 1)
    same_place = not (address ^ saddr) & (PUD_SIZE - 1)
    same_flags = not (vma.flags ^ svma.flags) & ~VM_LOCKED_MASK
    if not same_place or not same_flags or svma.private_data is None:
        return 0
    return saddr if _range_in_vma(svma, base, base + PUD_SIZE) else 0


def _huge_pmd_share(vma: VmArea, address: int, pud: int) -> int:
    mm = vma.mm
    host = mm.host
    mapping = vma.file
    index = vma.page_index(address)
    mapping.i_mmap_rwsem.read_lock()
    table = 0
    for svma in mapping.i_mmap:
        if svma is vma or svma.address_of_index(index) < 0:
            continue
        saddr = _page_table_shareable(svma, vma, address, index)
        entry = hugetlb_walk(svma, saddr) if saddr else 0
        if entry:
            table = entry & PFN_MASK
            host.pages.private[table >> 12] += 1
            break
    if table:
        mm.page_table_lock.lock()
        if not host.ram.u64[pud >> 3]:
            host.ram.u64[pud >> 3] = table | _PAGE_TABLE
            mm.pgtables_bytes += 4096
            _tell(mm, table, address & ~(PUD_SIZE - 1), hooked=True)
        else:
            host.pages.private[table >> 12] -= 1
        mm.page_table_lock.unlock()
    # While i_mmap_rwsem is held, or somebody could miss that this table may be shared.
    pmd = pmd_alloc(mm, address)
    mapping.i_mmap_rwsem.read_unlock()
    return pmd


def _tell(mm: MmStruct, table: int, base: int, *, hooked: bool) -> None:
    """What a table maps has come into the address space, or left it, at once."""
    hooks = mm.host.pmd_hooks
    if not hooks:
        return
    for number, entry in enumerate(mm.host.ram.u64[table >> 3 : (table >> 3) + 512].tolist()):
        if entry:
            for hook in hooks:
                hook(mm, base + number * PMD_SIZE, 0 if hooked else entry, entry if hooked else 0)


def huge_pmd_unshare(vma: VmArea, address: int, pmd: int) -> bool:
    """Unhook the table of `address` if others use it; false: it is this address space's alone.

    Its lock, the VMA's and i_mmap_rwsem are held for writing. The caller flushes the whole 1 GiB before
    it drops i_mmap_rwsem: from then on the last user may free the table.
    """
    mm = vma.mm
    host = mm.host
    table = pmd >> 12
    if not host.pages.private[table]:
        return False
    host.ram.u64[pud_offset(mm, address) >> 3] = 0
    host.pages.private[table] -= 1
    mm.pgtables_bytes -= 4096
    _tell(mm, table << 12, address & ~(PUD_SIZE - 1), hooked=False)
    return True


def adjust_range_if_pmd_sharing_possible(vma: VmArea, start: int, end: int) -> tuple[int, int]:
    """The range that a change of [start, end) may unmap: all of each 1 GiB whose table may be shared."""
    first, last = -(-vma.start // PUD_SIZE) * PUD_SIZE, vma.end & ~(PUD_SIZE - 1)
    if not vma.flags & VM_MAYSHARE or last <= first or end <= first or start >= last:
        return start, end
    if "hugetlb-narrow-unshare" in vma.mm.host.breaks:
        return start, end
    if start > first:
        start &= ~(PUD_SIZE - 1)
    if end < last:
        end = -(-end // PUD_SIZE) * PUD_SIZE
    return start, end


# -- unsharing ------------------------------------------------------------------------------------
def hugetlb_unshare_pmds(vma: VmArea, start: int, end: int, *, take_locks: bool) -> None:
    """Unhook every shared table of [start, end), which are multiples of 1 GiB, in one bracket.

    Without `take_locks` the caller holds i_mmap_rwsem for writing and keeps walkers away.
    """
    if not vma.flags & VM_MAYSHARE or start >= end:
        return
    mm = vma.mm
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, start, end, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    if take_locks:
        hugetlb_vma_lock_write(vma)
        vma.file.i_mmap_rwsem.lock()
    for address in range(start, end, PUD_SIZE):
        pmd = hugetlb_walk(vma, address)
        if pmd:
            lock = pmd_lock(mm, pmd)
            huge_pmd_unshare(vma, address, pmd)
            lock.unlock()
    flush_hugetlb_tlb_range(vma, start, end)
    if take_locks:
        vma.file.i_mmap_rwsem.unlock()
        hugetlb_vma_unlock_write(vma)
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)


def hugetlb_unshare_all_pmds(vma: VmArea) -> None:
    """No table of the VMA is shared afterwards; faults may share it again."""
    first, last = -(-vma.start // PUD_SIZE) * PUD_SIZE, vma.end & ~(PUD_SIZE - 1)
    hugetlb_unshare_pmds(vma, first, last, take_locks=True)


def hugetlb_split(vma: VmArea, address: int) -> None:
    """The VMA is about to be cut at `address`: the 1 GiB around it cannot be shared any more."""
    floor = address & ~(PUD_SIZE - 1)
    if address != floor and _range_in_vma(vma, floor, floor + PUD_SIZE):
        hugetlb_unshare_pmds(vma, floor, floor + PUD_SIZE, take_locks=False)
