"""Taking a page out of every page table: swap entries, migration entries, and back.

Source of truth: mm/rmap.c (try_to_unmap_one, try_to_migrate_one, try_to_unmap, try_to_migrate,
should_defer_flush), mm/migrate.c (remove_migration_pte); Linux 6.18. Linux 5.10 has one function for both.

One bracket per VMA per folio. With TTU_BATCH_FLUSH the entry is cleared and the flush only noted, so
that the bracket ends before the primary flush: the caller flushes (try_to_unmap_flush) before it
frees the page or starts I/O.

Not modelled: transparent huge pages, should_defer_flush's look at the CPU
mask (a flush is always deferred when asked).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_SOFT_DIRTY,
    _PAGE_SWP_EXCLUSIVE,
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    _PAGE_UFFD_WP,
    SWP_HWPOISON,
    SWP_MIG_DIRTY,
    SWP_MIG_YOUNG,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    is_writable_device_private_entry,
    make_migration_entry,
    mk_pte,
    pte_dirty,
    pte_mkdirty,
    pte_mkold,
    pte_mkuffd_wp,
    pte_mkwrite,
    pte_present,
    pte_to_swp_entry,
    pte_write,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)
from host_mm.memory_device import make_device_private_pte
from host_mm.mm_types import MM_ANONPAGES, MM_SWAPENTS, VM_LOCKED
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_hwpoison,
    PG_ksm,
    PG_swapbacked,
    PG_swapcache,
    PG_zone_device,
    get_page,
    mm_counter,
    put_page,
    set_page_dirty,
)
from host_mm.pgtable_generic import pte_lockptr, ptep_clear_flush, ptep_get, ptep_get_and_clear, set_pte
from host_mm.rmap import (
    folio_add_anon_rmap_pte,
    folio_add_file_rmap_pte,
    folio_get_anon_vma,
    folio_remove_rmap_pte,
    folio_try_share_anon_rmap_pte,
    page_vma_mapped_walk,
    rmap_walk,
)
from host_mm.userfaultfd_k import pte_install_uffd_wp_if_needed
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import AnonVma, MmStruct, VmArea

__all__ = [
    "TRACEPOINTS", "TTU_BATCH_FLUSH", "TTU_HWPOISON", "TTU_IGNORE_MLOCK", "TTU_RMAP_LOCKED", "TTU_SYNC",
    "remove_migration_ptes", "try_to_migrate", "try_to_unmap",
]

TTU_IGNORE_MLOCK = 0x8
TTU_SYNC = 0x10
TTU_HWPOISON = 0x20
TTU_BATCH_FLUSH = 0x40
TTU_RMAP_LOCKED = 0x80

SET_MIGRATION_PTE = Tracepoint(
    "migrate", "set_migration_pte", ("addr", "pte", "order"),
    lambda addr, pte, order: f"addr={addr:x}, pte={pte:x} order={order}",
)
REMOVE_MIGRATION_PTE = Tracepoint(
    "migrate", "remove_migration_pte", ("addr", "pte", "order"),
    lambda addr, pte, order: f"addr={addr:x}, pte={pte:x} order={order}",
)
TRACEPOINTS = (SET_MIGRATION_PTE, REMOVE_MIGRATION_PTE)


def _clear_entry(mm: MmStruct, address: int, pte: int, flags: int) -> int:
    """Empty the entry, the flush now or noted for later. A device's entry has nothing to flush."""
    if flags & TTU_BATCH_FLUSH and pte_present(ptep_get(mm, pte)):
        old = ptep_get_and_clear(mm, address, pte)
        _tlb.set_tlb_ubc_flush_pending(mm, pte_dirty(old))
        return old
    return ptep_clear_flush(mm, address, pte)


def _swp_bits(old: int) -> int:
    """The bits that a swap or migration entry takes over from the entry it replaces."""
    if not pte_present(old):
        return old & (_PAGE_SWP_SOFT_DIRTY | _PAGE_SWP_UFFD_WP)
    bits = _PAGE_SWP_SOFT_DIRTY if old & _PAGE_SOFT_DIRTY else 0
    return bits | (_PAGE_SWP_UFFD_WP if old & _PAGE_UFFD_WP else 0)


class _Unmap:
    """One page on its way out of the VMAs that map it: by swap entries, or by migration entries."""

    __slots__ = ("flags", "host", "order", "pfn")

    def __init__(self, host: HostMm, pfn: int, flags: int) -> None:
        self.host = host
        self.pfn = pfn
        self.flags = flags
        batched = flags & TTU_BATCH_FLUSH
        self.order = mmu_notifier.ORDER_BATCHED if batched else mmu_notifier.ORDER_UNDER_PTL

    def try_to_unmap_one(self, vma: VmArea, address: int) -> bool:
        """Unmap from one VMA; false ends the walk."""
        return self._in_bracket(vma, address, self._unmap_locked)

    def try_to_migrate_one(self, vma: VmArea, address: int) -> bool:
        """Replace the entry of one VMA by a migration entry; false ends the walk."""
        return self._in_bracket(vma, address, self._set_migration_entry)

    def _in_bracket(self, vma: VmArea, address: int, change: Callable[[VmArea, int, int], bool]) -> bool:
        """`change(vma, address, pte)` with the entry locked, inside a bracket of its own."""
        mm = vma.mm
        range_ = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_CLEAR, mm, address, address + 4096,
            order=self.order,
        )
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        ret = True
        pte = page_vma_mapped_walk(self.host, self.pfn, vma, address)
        if pte:
            ptl = pte_lockptr(mm, pte)
            ret = change(vma, address, pte)
            ptl.unlock()
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        return ret

    def _unmap_locked(self, vma: VmArea, address: int, pte: int) -> bool:
        host, pfn, mm = self.host, self.pfn, vma.mm
        if vma.flags & VM_LOCKED and not self.flags & TTU_IGNORE_MLOCK:
            # Restore the mlock that got missed.
            host.lru.mlock_vma_folio(pfn, vma)
            return False
        pages = host.pages
        exclusive = pages.flags[pfn] & (PG_anon | PG_anon_exclusive) == PG_anon | PG_anon_exclusive
        old = _clear_entry(mm, address, pte, self.flags)
        if pte_present(old) and pte_dirty(old):
            set_page_dirty(host, pfn)
        mm.update_hiwater_rss()
        flags = pages.flags[pfn]
        if flags & PG_hwpoison and self.flags & TTU_HWPOISON:
            set_pte(mm, address, pte, swp_entry_to_pte(swp_entry(SWP_HWPOISON, pfn)))
            mm.rss[mm_counter(pages, pfn)] -= 1
        elif not flags & PG_anon:
            # The folio is locked, so that nothing else can be mapped here before the bracket ends.
            pte_install_uffd_wp_if_needed(vma, address, pte, old)
            mm.rss[mm_counter(pages, pfn)] -= 1
        elif bool(flags & PG_swapbacked) != bool(flags & PG_swapcache):
            set_pte(mm, address, pte, old)
            return False
        else:
            if not flags & PG_swapbacked:
                gone = self._discard_lazyfree(mm, address, pte, old)
            else:
                gone = self._set_swap_entry(mm, address, pte, old, bool(exclusive))
            if not gone:
                return False
            mmu_notifier.mmu_notifier_invalidate_range(mm, address, address + 4096)
        folio_remove_rmap_pte(host, pfn, vma)
        put_page(host, pfn)
        return True

    def _discard_lazyfree(self, mm: MmStruct, address: int, pte: int, old: int) -> bool:
        """A MADV_FREE page goes without a copy, unless it was written or somebody holds it."""
        pages = self.host.pages
        pfn = self.pfn
        if pages.flags[pfn] & PG_dirty:
            set_pte(mm, address, pte, old)
            pages.flags[pfn] |= PG_swapbacked
            return False
        held = pages.refcount[pfn] != 1 + pages.mapcount[pfn]
        if held and self.host.profile.lazyfree_checks_references:
            set_pte(mm, address, pte, old)
            return False
        mm.rss[MM_ANONPAGES] -= 1
        return True

    def _set_swap_entry(self, mm: MmStruct, address: int, pte: int, old: int, exclusive: bool) -> bool:
        host, pfn = self.host, self.pfn
        entry = host.pages.private[pfn]
        swap = host.swap
        assert swap is not None
        if swap.swap_duplicate(entry) < 0:
            set_pte(mm, address, pte, old)
            return False
        if exclusive and not folio_try_share_anon_rmap_pte(host, pfn):
            swap.swap_free(entry)
            set_pte(mm, address, pte, old)
            return False
        mm.rss[MM_ANONPAGES] -= 1
        mm.rss[MM_SWAPENTS] += 1
        value = swp_entry_to_pte(entry)
        if exclusive:
            value |= _PAGE_SWP_EXCLUSIVE
        value |= _swp_bits(old)
        set_pte(mm, address, pte, value)
        return True

    def _set_migration_entry(self, vma: VmArea, address: int, pte: int) -> bool:
        host, pfn, mm = self.host, self.pfn, vma.mm
        flags = host.pages.flags[pfn]
        exclusive = flags & (PG_anon | PG_anon_exclusive) == PG_anon | PG_anon_exclusive
        old = _clear_entry(mm, address, pte, self.flags)
        present = pte_present(old)
        if present and pte_dirty(old):
            set_page_dirty(host, pfn)
        mm.update_hiwater_rss()
        if exclusive and not folio_try_share_anon_rmap_pte(host, pfn):
            set_pte(mm, address, pte, old)
            return False
        writable = pte_write(old) if present else is_writable_device_private_entry(pte_to_swp_entry(old))
        if writable:
            kind = SWP_MIGRATION_WRITE
        else:
            kind = SWP_MIGRATION_READ_EXCLUSIVE if exclusive else SWP_MIGRATION_READ
        keep = old if present and host.profile.migration_keeps_ad else 0
        entry = make_migration_entry(kind, pfn, young=bool(keep & _PAGE_ACCESSED), dirty=pte_dirty(keep))
        value = swp_entry_to_pte(entry) | _swp_bits(old)
        set_pte(mm, address, pte, value)
        if (t := host.trace.set_migration_pte) is not None:
            t(address, value, 0)
        folio_remove_rmap_pte(host, pfn, vma)
        if vma.flags & VM_LOCKED:
            host.lru.mlock_drain_local()
        put_page(host, pfn)
        return True


def try_to_unmap(host: HostMm, pfn: int, flags: int = 0) -> bool:
    """Replace every entry that maps a locked page; true if none is left.

    An anonymous page is in the swap cache, or is a MADV_FREE page that just goes; of a file's page
    nothing is left behind.
    """
    unmap = _Unmap(host, pfn, flags)
    pages = host.pages
    locked = bool(flags & TTU_RMAP_LOCKED)
    rmap_walk(host, pfn, unmap.try_to_unmap_one, locked=locked, done=lambda: not pages.mapcount[pfn])
    return not pages.mapcount[pfn]


def try_to_migrate(host: HostMm, pfn: int, flags: int = 0) -> bool:
    """Replace every entry that maps a locked page by a migration entry; true if none is left."""
    unmap = _Unmap(host, pfn, flags)
    pages = host.pages
    locked = bool(flags & TTU_RMAP_LOCKED)
    rmap_walk(host, pfn, unmap.try_to_migrate_one, locked=locked, done=lambda: not pages.mapcount[pfn])
    return not pages.mapcount[pfn]


def remove_migration_ptes(
    host: HostMm, src: int, dst: int, anon_vma: AnonVma | None = None, *, locked: bool = False
) -> None:
    """Point the migration entries of `src` at `dst` (the same page if the migration failed).

    `anon_vma` is what the caller pinned before unmapping; by default dst's own. No bracket: nothing
    was mapped.
    """
    pages = host.pages

    def one(vma: VmArea, address: int) -> bool:
        mm = vma.mm
        pte = page_vma_mapped_walk(host, src, vma, address, migration=True)
        if not pte:
            return True
        old = ptep_get(mm, pte)
        entry = pte_to_swp_entry(old)
        kind = swp_type(entry)
        bits = swp_offset(entry)
        get_page(host, dst)
        value = mk_pte(dst, vma.page_prot)
        value = value | _PAGE_ACCESSED if bits & SWP_MIG_YOUNG else pte_mkold(value)
        if pages.flags[dst] & PG_dirty and bits & SWP_MIG_DIRTY:
            value = pte_mkdirty(value)
        if old & _PAGE_SWP_SOFT_DIRTY:
            value |= _PAGE_SOFT_DIRTY
        else:
            value &= ~_PAGE_SOFT_DIRTY
        if kind == SWP_MIGRATION_WRITE:
            value = pte_mkwrite(value)
        elif old & _PAGE_SWP_UFFD_WP:
            value = pte_mkuffd_wp(value)
        if pages.flags[dst] & PG_anon:
            folio_add_anon_rmap_pte(host, dst, vma, address, exclusive=kind != SWP_MIGRATION_READ)
        else:
            folio_add_file_rmap_pte(host, dst, vma)
        if pages.flags[dst] & PG_zone_device:
            bits = old & (_PAGE_SWP_SOFT_DIRTY | _PAGE_SWP_UFFD_WP)
            value = make_device_private_pte(dst, writable=pte_write(value)) | bits
        set_pte(mm, address, pte, value)
        if (t := host.trace.remove_migration_pte) is not None:
            t(address, value, 0)
        if vma.flags & VM_LOCKED:
            host.lru.mlock_drain_local()
        pte_lockptr(mm, pte).unlock()
        return True

    if anon_vma is None and pages.flags[dst] & (PG_anon | PG_ksm) == PG_anon:
        anon_vma = pages.mapping.get(dst) or folio_get_anon_vma(host, dst)
        if anon_vma is None:
            return
    rmap_walk(host, dst, one, anon_vma=anon_vma, locked=locked)
