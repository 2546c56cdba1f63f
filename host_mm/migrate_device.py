"""Migration between RAM and a device's memory, in three steps that the device's driver calls.

Source of truth: mm/migrate_device.c (migrate_vma_setup, migrate_device_unmap, migrate_vma_check_page,
migrate_vma_pages, migrate_vma_insert_page, migrate_vma_finalize, migrate_device_range); Linux 6.18.
Collecting is in migrate_device_collect.py.

    migrate_vma_setup       collects: entries become migration entries, pages are locked and, if nobody else
                            holds them, taken off the LRU
    the driver              allocates and locks destination pages and copies
    migrate_vma_pages       gives the destinations the sources' identity; fills holes
    migrate_vma_finalize    replaces the migration entries, by device-private ones where the page is in device
                            memory now; what did not move gets its old entry back

A word a page in `src` and `dst`: bit 0 a page (its number from bit 6), bit 1 it moves, bit 3 writable.
The brackets of collecting and of filling holes are MIGRATE with the driver's owner, so that its own
notifier can leave them out: it knows. Others, KVM among them, unmap as ever.

Not modelled: huge pages (skipped; Linux splits them), KSM pages and file pages (skipped), coherent device
memory.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    mk_pte,
    pte_mkdirty,
    pte_mkwrite,
    pte_pfn,
    pte_present,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.kernel.errors import BrokenTruth
from host_mm.memory_device import make_device_private_pte
from host_mm.migrate_batch import folio_migrate_flags
from host_mm.migrate_device_collect import (
    MIGRATE_PFN_MIGRATE,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_page,
    migrate_vma_collect,
)
from host_mm.mm_types import MM_ANONPAGES, MMF_UNSTABLE, VM_SPECIAL, VM_WRITE
from host_mm.page import (
    PG_lru,
    PG_swapcache,
    PG_uptodate,
    PG_writeback,
    PG_zone_device,
    get_page,
    put_page,
    try_get_page,
)
from host_mm.pgtable_generic import (
    pmd_alloc,
    pte_alloc,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_clear_flush,
    ptep_get,
    set_pte,
)
from host_mm.rmap import folio_add_new_anon_rmap
from host_mm.rmap_anon_vma import anon_vma_prepare
from host_mm.rmap_unmap import remove_migration_ptes, try_to_migrate
from host_mm.swap_state import folio_free_swap
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "TRACEPOINTS", "migrate_device_finalize", "migrate_device_pages", "migrate_device_range",
    "migrate_vma_finalize", "migrate_vma_pages", "migrate_vma_setup",
]


MIGRATE_DEVICE = Tracepoint(
    "refault", "migrate_device", ("src", "dst", "moved"),
    lambda src, dst, moved: f"pfn {src:#x} to {dst:#x} {'moved' if moved else 'stays'}",
    doc="A page went to or from a device's memory, or could not.",
)
TRACEPOINTS = (MIGRATE_DEVICE,)


def migrate_vma_setup(args: MigrateVma) -> int:
    """Lock and unmap what can move; 0, or -EINVAL. mmap_lock is held."""
    vma = args.vma
    if vma is None or vma.flags & VM_SPECIAL or args.start >= args.end:
        return -EINVAL
    if not vma.start <= args.start < vma.end or args.end > vma.end:
        return -EINVAL
    nr = (args.end - args.start) >> 12
    args.src, args.dst, args.cpages = [0] * nr, [0] * nr, 0
    migrate_vma_collect(args, vma)
    if args.cpages:
        args.cpages = _unmap(vma.mm.host, args.src, args.fault_page)
    return 0


# -- unmapping ------------------------------------------------------------------------------------
def _check_page(host: HostMm, pfn: int, fault_page: int) -> bool:
    """migrate_vma_check_page: whether only the migration and the mappings hold it."""
    pages = host.pages
    flags = pages.flags[pfn]
    extra = 1 + (pfn == fault_page) + bool(flags & PG_zone_device) + bool(flags & PG_swapcache)
    return pages.refcount[pfn] - extra <= pages.mapcount[pfn]


def _unmap(host: HostMm, src: list[int], fault_page: int) -> int:
    """migrate_device_unmap: isolate and unmap the rest; what cannot is put back. How many will move."""
    pages = host.pages
    drained = False
    unmapped = 0
    host.lru.lru_add_drain()
    for index, word in enumerate(src):
        pfn = migrate_pfn_to_page(word)
        if pfn < 0:
            unmapped += bool(word & MIGRATE_PFN_MIGRATE)
            continue
        ram = not pages.flags[pfn] & PG_zone_device
        if ram:
            if not pages.flags[pfn] & PG_lru and not drained:
                host.lru.lru_add_drain_all()
                drained = True
            if not host.lru.folio_isolate_lru(pfn):
                src[index] &= ~MIGRATE_PFN_MIGRATE
                continue
            # The reference that collecting took.
            put_page(host, pfn)
        if pages.mapcount[pfn]:
            try_to_migrate(host, pfn)
        if pages.mapcount[pfn] or not _check_page(host, pfn, fault_page):
            if ram:
                get_page(host, pfn)
                host.lru.folio_putback_lru(pfn)
            src[index] &= ~MIGRATE_PFN_MIGRATE
            continue
        unmapped += 1
    for index, word in enumerate(src):
        pfn = migrate_pfn_to_page(word)
        if pfn >= 0 and not word & MIGRATE_PFN_MIGRATE:
            remove_migration_ptes(host, pfn, pfn)
            src[index] = 0
            if pfn != fault_page:
                folio_unlock(host, pfn)
            put_page(host, pfn)
    return unmapped


def migrate_device_range(host: HostMm, start: int, nr: int) -> list[int]:
    """Lock and unmap the device's own pages, wherever they are mapped; their words."""
    src: list[int] = []
    for pfn in range(start, start + nr):
        taken = try_get_page(host, pfn)
        if taken and not folio_trylock(host, pfn):
            put_page(host, pfn)
            taken = False
        src.append(migrate_pfn(pfn) | MIGRATE_PFN_MIGRATE if taken else 0)
    _unmap(host, src, -1)
    return src


# -- the pages' identity --------------------------------------------------------------------------
def migrate_vma_pages(args: MigrateVma) -> None:
    """Move the struct pages; what cannot move loses MIGRATE_PFN_MIGRATE."""
    assert args.vma is not None
    _pages(args.vma.mm.host, args.src, args.dst, args)


def migrate_device_pages(host: HostMm, src: list[int], dst: list[int]) -> None:
    """The same for pages that migrate_device_range found."""
    _pages(host, src, dst, None)


def _pages(host: HostMm, src: list[int], dst: list[int], args: MigrateVma | None) -> None:
    range_ = None
    for index, word in enumerate(src):
        new, old = migrate_pfn_to_page(dst[index]), migrate_pfn_to_page(word)
        if new < 0:
            src[index] &= ~MIGRATE_PFN_MIGRATE
        elif old < 0:
            if not word & MIGRATE_PFN_MIGRATE:
                continue
            assert args is not None
            assert args.vma is not None
            address = args.start + (index << 12)
            if range_ is None:
                range_ = _insert_range(args.vma.mm, address, args)
                mmu_notifier.mmu_notifier_invalidate_range_start(range_)
            if not _insert_page(args.vma, address, new):
                src[index] &= ~MIGRATE_PFN_MIGRATE
        else:
            moved = _move_identity(host, old, new, extra=int(args is not None and args.fault_page == old))
            if not moved:
                src[index] &= ~MIGRATE_PFN_MIGRATE
            if (t := host.trace.migrate_device) is not None:
                t(old, new, moved)
    if range_ is not None:
        mmu_notifier.mmu_notifier_invalidate_range_only_end(range_)


def _insert_range(mm: MmStruct, address: int, args: MigrateVma) -> mmu_notifier.MmuNotifierRange:
    named = mm.host.profile.device_inserts_name_owner
    return mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_MIGRATE if named else mmu_notifier.MMU_NOTIFY_CLEAR, mm, address, args.end,
        order=mmu_notifier.ORDER_UNDER_PTL, owner=args.pgmap_owner if named else None,
    )


def _move_identity(host: HostMm, src: int, dst: int, *, extra: int) -> bool:
    """folio_migrate_mapping and folio_migrate_flags of a page that nobody maps."""
    pages = host.pages
    # A page on its way to the swap file stays in the swap cache, and so in RAM.
    if pages.flags[src] & PG_swapcache and not folio_free_swap(host, src):
        return False
    if pages.flags[src] & PG_writeback:
        raise BrokenTruth("migrate", f"pfn {src:#x} under writeback moves to a device", host.stream.here())
    if pages.refcount[src] != 1 + extra:
        return False
    if host.checks is not None:
        host.checks.folio_moves(src)
    pages.index[dst] = pages.index[src]
    pages.mapping[dst] = pages.mapping[src]
    folio_migrate_flags(host, dst, src)
    return True


def _insert_page(vma: VmArea, address: int, pfn: int) -> bool:
    """migrate_vma_insert_page: map a device page where nothing, or the zero page, was."""
    mm = vma.mm
    host = mm.host
    pmd = pmd_alloc(mm, address) if vma.ops is None else 0
    if not pmd or not pte_alloc(mm, pmd):
        return False
    anon_vma_prepare(vma)
    if mm.process.memcg is not None and host.memcg.charge(pfn, mm):
        return False
    host.pages.flags[pfn] |= PG_uptodate
    if host.pages.flags[pfn] & PG_zone_device:
        entry = make_device_private_pte(pfn, writable=bool(vma.flags & VM_WRITE))
    else:
        entry = mk_pte(pfn, vma.page_prot)
        if vma.flags & VM_WRITE:
            entry = pte_mkwrite(pte_mkdirty(entry))
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return False
    ptl = pte_lockptr(mm, pte)
    old = ptep_get(mm, pte)
    zero = pte_present(old) and pte_pfn(old) == host.zero_pfn
    if mm.flags & MMF_UNSTABLE or (old and not zero):
        ptl.unlock()
        return False
    mm.rss[MM_ANONPAGES] += 1
    folio_add_new_anon_rmap(host, pfn, vma, address)
    if not host.pages.flags[pfn] & PG_zone_device:
        host.lru.folio_add_lru_vma(pfn, vma)
    get_page(host, pfn)
    if zero:
        ptep_clear_flush(mm, address, pte)
        mmu_notifier.mmu_notifier_invalidate_range(mm, address, address + 4096)
        mmu_notifier.mmu_notifier_change_pte(mm, address, entry)
    set_pte(mm, address, pte, entry)
    ptl.unlock()
    return True


# -- the end --------------------------------------------------------------------------------------
def migrate_vma_finalize(args: MigrateVma) -> None:
    """Replace the migration entries, unlock, and give the pages back that are not used any more."""
    assert args.vma is not None
    _finalize(args.vma.mm.host, args.src, args.dst, args.fault_page)


def migrate_device_finalize(host: HostMm, src: list[int], dst: list[int]) -> None:
    """The same for pages that migrate_device_range found."""
    _finalize(host, src, dst, -1)


def _finalize(host: HostMm, src: list[int], dst: list[int], fault_page: int) -> None:
    for word, target in zip(src, dst, strict=True):
        new, old = migrate_pfn_to_page(target), migrate_pfn_to_page(word)
        if old < 0 or not word & MIGRATE_PFN_MIGRATE:
            if new >= 0:
                folio_unlock(host, new)
                put_page(host, new)
            new = old
        if old < 0:
            continue
        new = old if new < 0 else new
        if not host.pages.flags[new] & PG_zone_device:
            host.lru.folio_add_lru(new)
        remove_migration_ptes(host, old, new)
        if old != fault_page:
            folio_unlock(host, old)
        put_page(host, old)
        if new != old:
            folio_unlock(host, new)
            put_page(host, new)
