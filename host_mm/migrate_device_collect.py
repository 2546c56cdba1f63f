"""The first step of a migration to or from a device: pages are found, locked and given migration entries.

Source of truth: mm/migrate_device.c (migrate_vma_collect, migrate_vma_collect_pmd, migrate_vma_collect_hole),
include/linux/migrate.h: struct migrate_vma, MIGRATE_PFN_*; Linux 6.18.

Not modelled: huge pages (skipped; Linux splits them), KSM pages and file pages (skipped), coherent device
memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    pte_dirty,
    pte_pfn,
    pte_present,
    pte_write,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    SWP_PFN_MASK,
    is_device_private_entry,
    is_writable_device_private_entry,
    make_migration_entry,
    pte_to_swp_entry,
    swp_entry_to_pte,
    swp_offset,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.memory_folio import vm_normal_page
from host_mm.memremap import page_pgmap
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_ksm,
    folio_test_large,
    get_page,
    put_page,
    set_page_dirty,
)
from host_mm.pgtable_generic import (
    pmd_offset,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_clear_flush,
    ptep_get,
    ptep_get_and_clear,
    set_pte,
)
from host_mm.rmap import folio_remove_rmap_pte, folio_try_share_anon_rmap_pte

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea

__all__ = [
    "MIGRATE_PFN_MIGRATE",
    "MIGRATE_PFN_VALID",
    "MIGRATE_PFN_WRITE",
    "MIGRATE_VMA_SELECT_DEVICE_PRIVATE",
    "MIGRATE_VMA_SELECT_SYSTEM",
    "MigrateVma",
    "migrate_pfn",
    "migrate_pfn_to_page",
    "migrate_vma_collect",
]

MIGRATE_PFN_VALID = 1 << 0
MIGRATE_PFN_MIGRATE = 1 << 1
MIGRATE_PFN_WRITE = 1 << 3
_PFN_SHIFT = 6
MIGRATE_VMA_SELECT_SYSTEM = 1 << 0
MIGRATE_VMA_SELECT_DEVICE_PRIVATE = 1 << 1


def migrate_pfn(pfn: int) -> int:
    """The word of a page."""
    return pfn << _PFN_SHIFT | MIGRATE_PFN_VALID


def migrate_pfn_to_page(word: int) -> int:
    """The page of a word, or -1."""
    return word >> _PFN_SHIFT if word & MIGRATE_PFN_VALID else -1


class MigrateVma:
    """struct migrate_vma: [start, end) of one VMA. `fault_page`: the locked page of a CPU fault, or -1."""

    __slots__ = (
        "cpages", "dst", "end", "fault_page", "flags", "pgmap_owner", "src", "start", "vma",
    )

    def __init__(
        self, vma: VmArea | None, start: int, end: int, *, pgmap_owner: Any, flags: int, fault_page: int = -1
    ) -> None:
        self.vma = vma
        self.start = start & ~0xFFF
        self.end = end & ~0xFFF
        self.pgmap_owner = pgmap_owner
        self.flags = flags
        self.fault_page = fault_page
        self.src: list[int] = []
        self.dst: list[int] = []
        self.cpages = 0


# -- collecting -----------------------------------------------------------------------------------
def migrate_vma_collect(args: MigrateVma, vma: VmArea) -> None:
    mm = vma.mm
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_MIGRATE, mm, args.start, args.end, order=mmu_notifier.ORDER_UNDER_PTL,
        owner=args.pgmap_owner,
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    address = args.start
    while address < args.end:
        following = min(args.end, (address & -(1 << 21)) + (1 << 21))
        _collect_pmd(args, vma, address, following)
        address = following
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)


def _collect_pmd(args: MigrateVma, vma: VmArea, start: int, end: int) -> None:
    mm = vma.mm
    pmd = pmd_offset(mm, start)
    if not pmd or not mm.host.ram.u64[pmd >> 3]:
        _collect_hole(args, vma, start, end)
        return
    pte = pte_offset_map_lock(mm, pmd, start)
    if not pte:
        return
    ptl = pte_lockptr(mm, pte)
    unmapped = False
    for address in range(start, end, 4096):
        word, present = _collect_pte(args, vma, address, pte)
        args.src[(address - args.start) >> 12] = word
        unmapped |= present
        pte += 8
    if unmapped:
        _tlb.flush_tlb_range(mm, start, end)
    ptl.unlock()


def _collect_hole(args: MigrateVma, vma: VmArea, start: int, end: int) -> None:
    if vma.ops is None:
        for address in range(start, end, 4096):
            args.src[(address - args.start) >> 12] = MIGRATE_PFN_MIGRATE
            args.cpages += 1


def _collect_pte(args: MigrateVma, vma: VmArea, address: int, pte: int) -> tuple[int, bool]:
    """(word, whether a present entry was replaced)."""
    host = vma.mm.host
    entry = ptep_get(vma.mm, pte)
    if not entry:
        hole = vma.ops is None
        args.cpages += hole
        return (MIGRATE_PFN_MIGRATE if hole else 0), False
    pfn, word = -1, 0
    if not pte_present(entry):
        swp = pte_to_swp_entry(entry)
        if not is_device_private_entry(swp) or not args.flags & MIGRATE_VMA_SELECT_DEVICE_PRIVATE:
            return 0, False
        pfn = swp_offset(swp) & SWP_PFN_MASK
        if page_pgmap(host, pfn).owner is not args.pgmap_owner:
            return 0, False
        word = MIGRATE_PFN_WRITE if is_writable_device_private_entry(swp) else 0
    elif args.flags & MIGRATE_VMA_SELECT_SYSTEM:
        if pte_pfn(entry) == host.zero_pfn:
            args.cpages += 1
            return MIGRATE_PFN_MIGRATE, False
        pfn = vm_normal_page(host, entry)
        word = MIGRATE_PFN_WRITE if pte_write(entry) else 0
    unfit = pfn < 0 or pfn not in host.pages.mapping or folio_test_large(host.pages, pfn)
    if unfit or host.pages.flags[pfn] & (PG_anon | PG_ksm) != PG_anon:
        return 0, False
    get_page(host, pfn)
    if pfn != args.fault_page and not folio_trylock(host, pfn):
        put_page(host, pfn)
        return 0, False
    if not _set_migration_entry(vma, address, pte, pfn, bool(word)):
        if pfn != args.fault_page:
            folio_unlock(host, pfn)
        put_page(host, pfn)
        return 0, False
    args.cpages += 1
    return word | migrate_pfn(pfn) | MIGRATE_PFN_MIGRATE, pte_present(entry)


def _set_migration_entry(vma: VmArea, address: int, pte: int, pfn: int, writable: bool) -> bool:
    """The entry of a locked page with a reference becomes a migration entry; false if it is pinned."""
    mm = vma.mm
    host = mm.host
    flags = host.pages.flags[pfn]
    exclusive = flags & (PG_anon | PG_anon_exclusive) == PG_anon | PG_anon_exclusive
    if exclusive:
        old = ptep_clear_flush(mm, address, pte)
        if not folio_try_share_anon_rmap_pte(host, pfn):
            set_pte(mm, address, pte, old)
            return False
    else:
        old = ptep_get_and_clear(mm, address, pte)
    present = pte_present(old)
    if present and pte_dirty(old):
        set_page_dirty(host, pfn)
    kind = SWP_MIGRATION_READ_EXCLUSIVE if exclusive else SWP_MIGRATION_READ
    if writable:
        kind = SWP_MIGRATION_WRITE
    keep = old if present else 0
    value = swp_entry_to_pte(
        make_migration_entry(kind, pfn, young=bool(keep & _PAGE_ACCESSED), dirty=pte_dirty(keep))
    )
    if present:
        value |= _PAGE_SWP_SOFT_DIRTY if old & _PAGE_SOFT_DIRTY else 0
        value |= _PAGE_SWP_UFFD_WP if old & _PAGE_UFFD_WP else 0
    else:
        value |= old & (_PAGE_SWP_SOFT_DIRTY | _PAGE_SWP_UFFD_WP)
    set_pte(mm, address, pte, value)
    folio_remove_rmap_pte(host, pfn, vma)
    put_page(host, pfn)
    return True
