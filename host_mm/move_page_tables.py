"""Moving page-table entries from one range of an address space to another.

Source of truth: mm/mremap.c (move_page_tables, move_ptes, move_normal_pmd, move_normal_pud, get_extent,
can_realign_addr, try_realign_addr), mm/huge_memory.c: move_huge_pmd (in huge_memory_map.py); Linux 6.18.

One bracket (UNMAP) over the old range. Entries move under the page-table locks of both places, and the
old translations are flushed before these are dropped: from then on somebody who finds the page at its new
place may unmap, flush there and free it. Whole tables of 2 MiB and 1 GiB are hung to their new place under
the rmap locks where both addresses allow; for that the range, and the bracket with it, is extended down
to the 2 MiB boundary if nothing else is mapped there. Entries that move one by one become soft-dirty,
those that move with their table do not. A userfaultfd's range moves entry by entry and loses its write
protections.

Huge pages move as a whole where both places allow, else they are split.

Not modelled: exec's move of the stack; that 5.10 takes the rmap locks for a table
only where it does for entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_UFFD_WP,
    PMD_SIZE,
    PUD_SIZE,
    pmd_table,
    pte_mksoft_dirty,
    pte_present,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    PTE_MARKER_UFFD_WP,
    pte_marker_get,
)
from host_mm.huge_memory_map import move_huge_pmd
from host_mm.huge_memory_pmd import split_huge_pmd
from host_mm.hugetlb_copy import move_hugetlb_page_tables
from host_mm.mm_types import VM_HUGETLB
from host_mm.pgtable_generic import (
    move_table,
    pmd_alloc,
    pmd_lockptr,
    pmd_offset,
    pte_alloc,
    pte_lockptr,
    pte_offset_map,
    pte_offset_map_lock,
    ptep_get_and_clear,
    pud_alloc,
    pud_offset,
    set_pte,
)
from host_mm.userfaultfd_k import vma_has_uffd_without_event_remap

if TYPE_CHECKING:
    from host_mm.kernel.locks import Spinlock
    from host_mm.mm_types import VmArea

__all__ = ["move_page_tables"]


def move_page_tables(
    old_vma: VmArea, new_vma: VmArea, old_addr: int, new_addr: int, length: int, need_rmap_locks: bool
) -> int:
    """Move the entries of `length` bytes; how many bytes are done, fewer only if there was no memory."""
    if not length:
        return 0
    if old_vma.flags & VM_HUGETLB:
        return move_hugetlb_page_tables(old_vma, new_vma, old_addr, new_addr, length)
    return _Move(old_vma, new_vma, old_addr, new_addr, length, need_rmap_locks).run()


class _Move:
    """struct pagetable_move_control."""

    __slots__ = (
        "by_entry", "clear_uffd_wp", "length", "need_rmap_locks", "new_addr", "new_vma", "old_addr",
        "old_end", "old_vma", "unflushed",
    )

    def __init__(
        self, old_vma: VmArea, new_vma: VmArea, old_addr: int, new_addr: int, length: int,
        need_rmap_locks: bool,
    ) -> None:
        self.old_vma = old_vma
        self.new_vma = new_vma
        self.old_addr = old_addr
        self.new_addr = new_addr
        self.old_end = old_addr + length
        self.length = length
        self.need_rmap_locks = need_rmap_locks
        self.unflushed: list[tuple[int, int]] = []
        # The new VMA is not registered, so that its entries may not say they were.
        self.clear_uffd_wp = vma_has_uffd_without_event_remap(old_vma)
        self.by_entry = self.clear_uffd_wp or vma_has_uffd_without_event_remap(new_vma)

    def run(self) -> int:
        """The walk, inside its bracket."""
        mm = self.old_vma.mm
        sched = mm.host.sched
        self._try_realign()
        range_ = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_UNMAP, mm, self.old_addr, self.old_end,
            order=mmu_notifier.ORDER_UNDER_PTL,
        )
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        while self.old_addr < self.old_end:
            if sched.preempt:
                sched.point("cond_resched")
            extent = self._step()
            if not extent:
                break
            self.old_addr += extent
            self.new_addr += extent
        for start, end in self.unflushed:
            _tlb.flush_tlb_range(mm, start, end)
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        return max(0, self.old_addr - (self.old_end - self.length))

    def _step(self) -> int:
        """Move what lies in one table of both places; how many bytes that was, 0 for no memory."""
        mm = self.old_vma.mm
        u64 = mm.host.ram.u64
        extent = self._extent(PUD_SIZE)
        old_pud = pud_offset(mm, self.old_addr)
        if not old_pud or not u64[old_pud >> 3]:
            return extent
        new_pud = pud_alloc(mm, self.new_addr)
        if not new_pud:
            return 0
        by_puds = mm.host.profile.mremap_moves_level == 3
        if extent == PUD_SIZE and by_puds and self._move_table(old_pud, new_pud, PUD_SIZE):
            return extent
        extent = self._extent(PMD_SIZE)
        old_pmd = pmd_offset(mm, self.old_addr)
        if not old_pmd or not u64[old_pmd >> 3]:
            return extent
        new_pmd = pmd_alloc(mm, self.new_addr)
        if not new_pmd:
            return 0
        if not pmd_table(u64[old_pmd >> 3]):
            if extent == PMD_SIZE and self._move_huge(old_pmd, new_pmd):
                return extent
            split_huge_pmd(self.old_vma, old_pmd, self.old_addr)
            if not u64[old_pmd >> 3]:
                return extent
        elif extent == PMD_SIZE and self._move_table(old_pmd, new_pmd, PMD_SIZE):
            return extent
        if not pte_alloc(mm, new_pmd):
            return 0
        self._move_ptes(old_pmd, new_pmd, extent)
        return extent

    def _extent(self, size: int) -> int:
        """get_extent: to the end of the entry of this size, in both places, or of the range."""
        left = size - (self.old_addr & (size - 1))
        return min(left, self.old_end - self.old_addr, size - (self.new_addr & (size - 1)))

    # -- realigning ---------------------------------------------------------------------------

    def _try_realign(self) -> None:
        offset = self.old_addr & (PMD_SIZE - 1)
        if not self.old_vma.mm.host.profile.mremap_realigns:
            return
        if not offset or offset != self.new_addr & (PMD_SIZE - 1) or self.length < PMD_SIZE - offset:
            return
        if _can_align_down(self.old_vma, self.old_addr) and _can_align_down(self.new_vma, self.new_addr):
            self.old_addr -= offset
            self.new_addr -= offset

    # -- moving -------------------------------------------------------------------------------

    def _take_rmap_locks(self) -> None:
        if self.old_vma.file is not None:
            self.old_vma.file.i_mmap_rwsem.lock()
        if self.old_vma.anon_vma is not None:
            self.old_vma.anon_vma.root.rwsem.lock()

    def _drop_rmap_locks(self) -> None:
        if self.old_vma.anon_vma is not None:
            self.old_vma.anon_vma.root.rwsem.unlock()
        if self.old_vma.file is not None:
            self.old_vma.file.i_mmap_rwsem.unlock()

    def _flush(self, start: int, end: int) -> None:
        mm = self.old_vma.mm
        if "mremap-flush-after-unlock" in mm.host.breaks:
            self.unflushed.append((start, end))
        else:
            _tlb.flush_tlb_range(mm, start, end)
        if mm.host.checks is not None:
            mm.host.checks.entries_moved(mm, start, end)

    def _move_table(self, old_entry: int, new_entry: int, size: int) -> bool:
        """move_normal_pmd, move_normal_pud: false if something hangs at the new place."""
        mm = self.old_vma.mm
        if self.by_entry:
            return False
        self._take_rmap_locks()
        moved = not mm.host.ram.u64[new_entry >> 3]
        if moved:
            old_ptl, new_ptl = self._entry_locks(old_entry, new_entry, size)
            old_ptl.lock()
            if new_ptl is not old_ptl:
                new_ptl.lock(nested=True)
            move_table(mm, old_entry, new_entry, self.old_addr, self.new_addr, size)
            self._flush(self.old_addr, self.old_addr + size)
            if new_ptl is not old_ptl:
                new_ptl.unlock()
            old_ptl.unlock()
        self._drop_rmap_locks()
        return moved

    def _move_huge(self, old_pmd: int, new_pmd: int) -> bool:
        """move_huge_pmd; false if something hangs at the new place."""
        if self.need_rmap_locks:
            self._take_rmap_locks()
        moved = move_huge_pmd(self.old_vma, self.old_addr, self.new_addr, old_pmd, new_pmd)
        if self.need_rmap_locks:
            self._drop_rmap_locks()
        return moved

    def _entry_locks(self, old_entry: int, new_entry: int, size: int) -> tuple[Spinlock, Spinlock]:
        mm = self.old_vma.mm
        if size == PMD_SIZE:
            return pmd_lockptr(mm, old_entry), pmd_lockptr(mm, new_entry)
        return mm.page_table_lock, mm.page_table_lock

    def _move_ptes(self, old_pmd: int, new_pmd: int, extent: int) -> None:
        mm = self.old_vma.mm
        if self.need_rmap_locks:
            self._take_rmap_locks()
        old_pte = pte_offset_map_lock(mm, old_pmd, self.old_addr)
        new_pte = pte_offset_map(mm, new_pmd, self.new_addr)
        old_ptl, new_ptl = pte_lockptr(mm, old_pte), pte_lockptr(mm, new_pte)
        if new_ptl is not old_ptl:
            new_ptl.lock(nested=True)
        _tlb.flush_tlb_batched_pending(mm)
        u64 = mm.host.ram.u64
        force_flush = False
        for offset in range(0, extent, 4096):
            at = offset >> 9
            if not u64[(old_pte + at) >> 3]:
                continue
            entry = ptep_get_and_clear(mm, self.old_addr + offset, old_pte + at)
            if pte_present(entry):
                force_flush = True
                entry = pte_mksoft_dirty(entry)
            else:
                entry |= _PAGE_SWP_SOFT_DIRTY
            if self.clear_uffd_wp:
                entry = _clear_uffd_wp(entry)
            if entry:
                set_pte(mm, self.new_addr + offset, new_pte + at, entry)
        if force_flush:
            self._flush(self.old_addr, self.old_addr + extent)
        if new_ptl is not old_ptl:
            new_ptl.unlock()
        old_ptl.unlock()
        if self.need_rmap_locks:
            self._drop_rmap_locks()


def _clear_uffd_wp(entry: int) -> int:
    if pte_marker_get(entry) & PTE_MARKER_UFFD_WP:
        return 0
    return entry & ~(_PAGE_UFFD_WP if pte_present(entry) else _PAGE_SWP_UFFD_WP)


def _can_align_down(vma: VmArea, address: int) -> bool:
    """Whether the VMA starts there and nothing else is mapped below it in the same 2 MiB."""
    base = address & ~(PMD_SIZE - 1)
    return vma.start == address and vma.mm.find_vma_intersection(base, vma.start) is None
