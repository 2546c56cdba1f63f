"""Taking a page out of every page table: swap entries, migration entries, and back.

Source of truth: mm/rmap.c (try_to_unmap_one, try_to_migrate_one, try_to_unmap, try_to_migrate,
should_defer_flush), mm/migrate.c (remove_migration_pte); Linux 6.18. Linux 5.10 has one function for both.

One bracket per VMA per folio, over all of the folio that lies in the VMA. A huge entry becomes a huge
migration entry, or is split first (TTU_SPLIT_HUGE_PMD). With TTU_BATCH_FLUSH the entry is cleared and
the flush only noted, so that the bracket ends before the primary flush: the caller flushes
(try_to_unmap_flush) before it frees the page or starts I/O.

After the split the walk goes on with the small entries and the other VMAs, as in 6.18 stable; 6.18.2 stops
there, so that it cannot split what two processes share.

Not modelled: batches of entries of one large folio, should_defer_flush's look at the CPU mask (a flush is
always deferred when asked).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_SOFT_DIRTY,
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    mk_pte,
    pte_dirty,
    pte_mkdirty,
    pte_mkold,
    pte_mkuffd_wp,
    pte_mkwrite,
    pte_pfn,
    pte_present,
    pte_write,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_EXCLUSIVE,
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    SWP_HWPOISON,
    SWP_MIG_DIRTY,
    SWP_MIG_YOUNG,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    SWP_PFN_MASK,
    is_writable_device_private_entry,
    make_migration_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)
from host_mm.huge_memory_pmd import (
    remove_migration_pmd,
    set_pmd_migration_entry,
    split_huge_pmd_locked,
    unmap_huge_pmd_locked,
)
from host_mm.memory_device import make_device_private_pte
from host_mm.mm_types import MM_ANONPAGES, MM_SWAPENTS, VM_LOCKED
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_hwpoison,
    PG_ksm,
    PG_mlocked,
    PG_swapbacked,
    PG_swapcache,
    PG_zone_device,
    folio_mapcount,
    get_page,
    mm_counter,
    put_page,
    set_page_dirty,
)
from host_mm.page_vma_mapped import PageVmaMappedWalk
from host_mm.pgtable_generic import ptep_clear_flush, ptep_get, ptep_get_and_clear, set_pte
from host_mm.rmap import (
    folio_add_anon_rmap_pte,
    folio_add_file_rmap_pte,
    folio_get_anon_vma,
    folio_remove_rmap_pte,
    folio_try_share_anon_rmap_pte,
    rmap_walk,
)
from host_mm.userfaultfd_k import pte_install_uffd_wp_if_needed
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import AnonVma, MmStruct, VmArea

__all__ = [
    "TRACEPOINTS", "TTU_BATCH_FLUSH", "TTU_HWPOISON", "TTU_IGNORE_MLOCK", "TTU_RMAP_LOCKED",
    "TTU_SPLIT_HUGE_PMD", "TTU_SYNC",
    "remove_migration_ptes", "try_to_migrate", "try_to_unmap",
]

TTU_SPLIT_HUGE_PMD = 0x4
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
    """One folio on its way out of the VMAs that map it: by swap entries, or by migration entries.

    `page` is the page of it whose entry is being changed.
    """

    __slots__ = ("flags", "host", "order", "page", "pfn")

    def __init__(self, host: HostMm, pfn: int, flags: int) -> None:
        self.host = host
        self.pfn = pfn
        self.page = pfn
        self.flags = flags
        batched = flags & TTU_BATCH_FLUSH
        self.order = mmu_notifier.ORDER_BATCHED if batched else mmu_notifier.ORDER_UNDER_PTL

    def try_to_unmap_one(self, vma: VmArea, address: int) -> bool:
        """Unmap from one VMA; false ends the walk."""
        return self._in_bracket(vma, address, self._unmap_locked, self._unmap_huge)

    def try_to_migrate_one(self, vma: VmArea, address: int) -> bool:
        """Replace the entries of one VMA, locked or not, by migration entries; false ends the walk."""
        self.flags |= TTU_IGNORE_MLOCK
        return self._in_bracket(vma, address, self._set_migration_entry, self._migrate_huge)

    def _in_bracket(
        self, vma: VmArea, address: int, change: Callable[[VmArea, int, int], bool],
        change_huge: Callable[[VmArea, PageVmaMappedWalk], bool],
    ) -> bool:
        """`change(vma, address, pte)` with each entry locked, inside one bracket."""
        mm = vma.mm
        walk = PageVmaMappedWalk(self.host, self.pfn, vma, address, sync=bool(self.flags & TTU_SYNC))
        range_ = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_CLEAR, mm, address, walk.end, order=self.order
        )
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        ret = True
        keep_locked = vma.flags & VM_LOCKED and not self.flags & TTU_IGNORE_MLOCK
        while walk.next():
            if keep_locked:
                ret = False
                self._mlock_missed(vma, walk)
                continue
            if not walk.pte:
                ret = change_huge(vma, walk)
            else:
                if walk.nr_pages > 1:
                    self.page = pte_pfn(ptep_get(mm, walk.pte))
                ret = change(vma, walk.address, walk.pte)
            if not ret:
                walk.done()
                break
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        return ret

    def _mlock_missed(self, vma: VmArea, walk: PageVmaMappedWalk) -> None:
        """Restore the mlock that got missed, of a folio that the VMA maps as a whole."""
        if walk.pte and walk.nr_pages > 1 and self.host.pages.large_mapcount[self.pfn] != walk.nr_pages:
            return
        self.host.lru.mlock.mlock_vma_folio(self.pfn, vma)

    def _unmap_huge(self, vma: VmArea, walk: PageVmaMappedWalk) -> bool:
        if not self.host.pages.flags[self.pfn] & PG_swapbacked:
            return unmap_huge_pmd_locked(vma, walk.address, walk.pmd, self.pfn)
        return self._split(vma, walk, freeze=False)

    def _migrate_huge(self, vma: VmArea, walk: PageVmaMappedWalk) -> bool:
        if self.flags & TTU_SPLIT_HUGE_PMD:
            return self._split(vma, walk, freeze=True)
        return set_pmd_migration_entry(vma, walk.address, walk.pmd, self.pfn)

    def _split(self, vma: VmArea, walk: PageVmaMappedWalk, *, freeze: bool) -> bool:
        split_huge_pmd_locked(vma, walk.address, walk.pmd, freeze=freeze)
        walk.restart()
        return True

    def _unmap_locked(self, vma: VmArea, address: int, pte: int) -> bool:
        host, pfn, page, mm = self.host, self.pfn, self.page, vma.mm
        pages = host.pages
        exclusive = pages.flags[pfn] & PG_anon and pages.flags[page] & PG_anon_exclusive
        old = _clear_entry(mm, address, pte, self.flags)
        if pte_present(old) and pte_dirty(old):
            set_page_dirty(host, pfn)
        mm.update_hiwater_rss()
        flags = pages.flags[pfn]
        if pages.flags[page] & PG_hwpoison and self.flags & TTU_HWPOISON:
            set_pte(mm, address, pte, swp_entry_to_pte(swp_entry(SWP_HWPOISON, page)))
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
        folio_remove_rmap_pte(host, page, vma)
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
        held = pages.refcount[pfn] != 1 + folio_mapcount(pages, pfn)
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
        host, pfn, page, mm = self.host, self.pfn, self.page, vma.mm
        flags = host.pages.flags
        exclusive = bool(flags[pfn] & PG_anon and flags[page] & PG_anon_exclusive)
        old = _clear_entry(mm, address, pte, self.flags)
        present = pte_present(old)
        if present and pte_dirty(old):
            set_page_dirty(host, pfn)
        mm.update_hiwater_rss()
        if exclusive and not folio_try_share_anon_rmap_pte(host, page):
            set_pte(mm, address, pte, old)
            return False
        writable = pte_write(old) if present else is_writable_device_private_entry(pte_to_swp_entry(old))
        if writable:
            kind = SWP_MIGRATION_WRITE
        else:
            kind = SWP_MIGRATION_READ_EXCLUSIVE if exclusive else SWP_MIGRATION_READ
        keep = old if present and host.profile.migration_keeps_ad else 0
        entry = make_migration_entry(kind, page, young=bool(keep & _PAGE_ACCESSED), dirty=pte_dirty(keep))
        value = swp_entry_to_pte(entry) | _swp_bits(old)
        set_pte(mm, address, pte, value)
        if (t := host.trace.set_migration_pte) is not None:
            t(address, value, 0)
        folio_remove_rmap_pte(host, page, vma)
        if vma.flags & VM_LOCKED:
            host.lru.mlock.mlock_drain_local()
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
    rmap_walk(host, pfn, unmap.try_to_unmap_one, locked=locked, done=lambda: not folio_mapcount(pages, pfn))
    return not folio_mapcount(pages, pfn)


def try_to_migrate(host: HostMm, pfn: int, flags: int = 0) -> bool:
    """Replace every entry that maps a locked page by a migration entry; true if none is left."""
    unmap = _Unmap(host, pfn, flags)
    pages = host.pages
    locked = bool(flags & TTU_RMAP_LOCKED)
    rmap_walk(host, pfn, unmap.try_to_migrate_one, locked=locked, done=lambda: not folio_mapcount(pages, pfn))
    return not folio_mapcount(pages, pfn)


def remove_migration_ptes(
    host: HostMm, src: int, dst: int, anon_vma: AnonVma | None = None, *, locked: bool = False,
    use_shared_zeropage: bool = False,
) -> None:
    """Point the migration entries of `src` at `dst` (the same folio if the migration failed).

    `anon_vma` is what the caller pinned before unmapping; by default dst's own. No bracket: nothing
    was mapped. `use_shared_zeropage`: pages of zeros, of a folio that was split, become the zero page.
    """
    pages = host.pages

    def one(vma: VmArea, address: int) -> bool:
        walk = PageVmaMappedWalk(host, src, vma, address, migration=True)
        while walk.next():
            if not walk.pte:
                remove_migration_pmd(vma, walk.address, walk.pmd, dst)
            elif not (use_shared_zeropage and _map_unused_to_zeropage(vma, walk, dst)):
                _restore_pte(vma, walk, src, dst)
        return True

    if anon_vma is None and pages.flags[dst] & (PG_anon | PG_ksm) == PG_anon:
        anon_vma = pages.mapping.get(dst) or folio_get_anon_vma(host, dst)
        if anon_vma is None:
            return
    rmap_walk(host, dst, one, anon_vma=anon_vma, locked=locked)


def _restore_pte(vma: VmArea, walk: PageVmaMappedWalk, src: int, dst: int) -> None:
    """remove_migration_pte of one locked entry."""
    host, mm = walk.host, vma.mm
    old = ptep_get(mm, walk.pte)
    entry = pte_to_swp_entry(old)
    kind = swp_type(entry)
    bits = swp_offset(entry)
    page = dst + (bits & SWP_PFN_MASK) - src
    get_page(host, dst)
    value = mk_pte(page, vma.page_prot)
    value = value | _PAGE_ACCESSED if bits & SWP_MIG_YOUNG else pte_mkold(value)
    if host.pages.flags[dst] & PG_dirty and bits & SWP_MIG_DIRTY:
        value = pte_mkdirty(value)
    if old & _PAGE_SWP_SOFT_DIRTY:
        value |= _PAGE_SOFT_DIRTY
    else:
        value &= ~_PAGE_SOFT_DIRTY
    if kind == SWP_MIGRATION_WRITE:
        value = pte_mkwrite(value)
    elif old & _PAGE_SWP_UFFD_WP:
        value = pte_mkuffd_wp(value)
    if host.pages.flags[dst] & PG_anon:
        folio_add_anon_rmap_pte(host, page, vma, walk.address, exclusive=kind != SWP_MIGRATION_READ)
    else:
        folio_add_file_rmap_pte(host, page, vma)
    if host.pages.flags[dst] & PG_zone_device:
        bits = old & (_PAGE_SWP_SOFT_DIRTY | _PAGE_SWP_UFFD_WP)
        value = make_device_private_pte(page, writable=pte_write(value)) | bits
    set_pte(mm, walk.address, walk.pte, value)
    if (t := host.trace.remove_migration_pte) is not None:
        t(walk.address, value, 0)
    if vma.flags & VM_LOCKED:
        host.lru.mlock.mlock_drain_local()


def _map_unused_to_zeropage(vma: VmArea, walk: PageVmaMappedWalk, pfn: int) -> bool:
    """try_to_map_unused_to_zeropage: whether the page is all zeros and its entry the zero page's now."""
    host, mm = walk.host, vma.mm
    if host.pages.flags[pfn] & (PG_mlocked | PG_hwpoison) or vma.flags & VM_LOCKED:
        return False
    if not host.ram.page_is_zero(pfn):
        return False
    value = mk_pte(host.zero_pfn, vma.page_prot) | _PAGE_SPECIAL
    if ptep_get(mm, walk.pte) & _PAGE_SWP_SOFT_DIRTY:
        value |= _PAGE_SOFT_DIRTY
    if ptep_get(mm, walk.pte) & _PAGE_SWP_UFFD_WP:
        value = pte_mkuffd_wp(value)
    set_pte(mm, walk.address, walk.pte, value)
    mm.rss[MM_ANONPAGES] -= 1
    return True
