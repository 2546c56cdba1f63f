"""The PAGEMAP_SCAN ioctl: what ranges of pages are, with the choice to write-protect what it finds.

Source of truth: fs/proc/task_mmu.c (do_pagemap_scan, pagemap_scan_pmd_entry, pagemap_scan_pte_hole,
pagemap_scan_test_walk, make_uffd_wp_pte), include/uapi/linux/fs.h: struct pm_scan_arg; Linux 6.18.

With PM_SCAN_WP_MATCHING each pass is one PROTECTION_VMA bracket from where it starts to the end of the
range; what was found written is protected and flushed table by table under the page-table lock, so that no
write falls between the question and the protection. Holes are given markers in brackets of their own,
inside that one. Who asks for written pages and nothing else is told of entries that are empty, too.
Only ranges whose userfaultfd is asynchronous can be protected; the next write lifts it.

Not modelled: scans of hugetlb, protecting a huge page as a whole (it is split), fatal signals.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EFAULT, EINVAL, ENOSPC, ENOTTY, EPERM
from typing import TYPE_CHECKING

import msgspec

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_PSE,
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    PFN_MASK,
    PGDIR_SIZE,
    PMD_SIZE,
    PUD_SIZE,
    TASK_SIZE,
    pte_mkuffd_wp,
    pte_pfn,
    pte_present,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    PTE_MARKER_GUARD,
    PTE_MARKER_UFFD_WP,
    SWP_PFN_MASK,
    is_migration_entry,
    make_pte_marker,
    pte_marker_get,
    pte_swp_uffd_wp_any,
    pte_to_swp_entry,
    swp_offset,
)
from host_mm.huge_memory_pmd import split_huge_pmd
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import VM_HUGETLB, VM_PFNMAP, VM_SOFTDIRTY
from host_mm.page import PG_anon, page_folio
from host_mm.pagemap import entry_at
from host_mm.pgtable_generic import pte_lockptr, pte_offset_map_lock, ptep_get_and_clear, set_pte
from host_mm.userfaultfd_k import userfaultfd_wp_async, userfaultfd_wp_use_markers
from host_mm.userfaultfd_wp import uffd_wp_range

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "PAGE_IS_FILE", "PAGE_IS_GUARD", "PAGE_IS_PFNZERO", "PAGE_IS_PRESENT", "PAGE_IS_SOFT_DIRTY",
    "PAGE_IS_SWAPPED", "PAGE_IS_WPALLOWED", "PAGE_IS_WRITTEN", "PM_SCAN_CHECK_WPASYNC", "PM_SCAN_WP_MATCHING",
    "PageRegion", "PmScanArg", "do_pagemap_scan",
]

PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_SOFT_DIRTY = 1 << 7
PAGE_IS_GUARD = 1 << 8
_CATEGORIES = (1 << 9) - 1
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
_BOUNCE_REGIONS = 512
_NO_LIMIT = (1 << 64) - 1


class PageRegion(msgspec.Struct):
    """struct page_region: [start, end) with these categories."""

    start: int
    end: int
    categories: int


class PmScanArg(msgspec.Struct):
    """struct pm_scan_arg. `vec_len` regions are wanted at most, 0: none are reported; `max_pages` 0: all.

    A page matches if, of its categories with those of `category_inverted` flipped, it has all of
    `category_mask` and one of `category_anyof_mask`. `walk_end` comes back: where the scan stopped.
    """

    start: int
    end: int
    flags: int = 0
    vec_len: int = 0
    max_pages: int = 0
    category_inverted: int = 0
    category_mask: int = 0
    category_anyof_mask: int = 0
    return_mask: int = 0
    walk_end: int = 0


def do_pagemap_scan(mm: MmStruct, arg: PmScanArg) -> list[PageRegion]:
    """PAGEMAP_SCAN: the regions that match. KernelError: EINVAL, EFAULT, EPERM (CHECK_WPASYNC).

    ENOTTY: this kernel has no such ioctl.
    """
    if not mm.host.profile.pagemap_scan:
        raise KernelError(ENOTTY, "/proc/PID/pagemap takes no ioctl")
    if arg.flags & ~(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC) or arg.start & 4095:
        raise KernelError(EINVAL, f"flags {arg.flags:#x}, start {arg.start:#x}")
    masks = arg.category_inverted | arg.category_mask | arg.category_anyof_mask | arg.return_mask
    if masks & ~_CATEGORIES:
        raise KernelError(EINVAL, f"no category {masks & ~_CATEGORIES:#x}")
    if not 0 <= arg.start <= arg.end <= TASK_SIZE:
        raise KernelError(EFAULT, f"{arg.start:#x} -- {arg.end:#x} is not user space")
    mm.host.sched.advance(COST_SYSCALL)
    arg.end = (arg.end + 4095) & ~4095
    arg.walk_end = 0
    scan = _Scan(mm, arg)
    walk_start = arg.start
    while walk_start < arg.end:
        ret = scan.one_pass(walk_start)
        if ret not in (0, -ENOSPC):
            raise KernelError(-ret, f"the scan of {arg.start:#x} -- {arg.end:#x} failed")
        if ret != -ENOSPC or scan.full():
            break
        walk_start = arg.walk_end
    arg.walk_end = arg.walk_end or arg.end
    return scan.regions


class _Scan:
    """struct pagemap_scan_private: `regions` are out already, `buffer` is what the pass found."""

    __slots__ = (
        "arg", "buffer", "found_pages", "max_pages", "mm", "regions", "vma_category",
        "written_only",
    )

    def __init__(self, mm: MmStruct, arg: PmScanArg) -> None:
        self.mm = mm
        self.arg = arg
        self.regions: list[PageRegion] = []
        self.buffer: list[PageRegion] = []
        self.found_pages = 0
        self.max_pages = arg.max_pages or _NO_LIMIT
        self.vma_category = 0
        self.written_only = (
            arg.category_mask == arg.return_mask == PAGE_IS_WRITTEN
            and not arg.category_anyof_mask and not arg.category_inverted
        )

    def full(self) -> bool:
        """Whether the caller has no room for more, or all that it wanted."""
        return len(self.regions) == self.arg.vec_len or self.found_pages == self.max_pages

    # -- the walk -----------------------------------------------------------------------------

    def one_pass(self, start: int) -> int:
        """Scan from `start` until the buffer is full or the end: 0 or a negative errno."""
        mm, arg = self.mm, self.arg
        protect = bool(arg.flags & PM_SCAN_WP_MATCHING)
        mm.mmap_lock.read_lock()
        range_ = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_PROTECTION_VMA, mm, start, arg.end, order=mmu_notifier.ORDER_UNDER_PTL
        )
        if protect:
            mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        ret = 0
        for vma in mm.vmas_in(start, arg.end):
            ret = self._vma(vma, max(start, vma.start), min(arg.end, vma.end))
            if ret:
                break
        if protect:
            mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        mm.mmap_lock.read_unlock()
        self.regions += self.buffer
        self.buffer = []
        return ret

    def _vma(self, vma: VmArea, start: int, end: int) -> int:
        ret = self._test_walk(vma)
        if ret:
            return min(ret, 0)
        sched = self.mm.host.sched
        for pmd, address, following in _chunks(self.mm, start, end):
            ret = self._table(vma, pmd, address, following) if pmd else self._hole(vma, address, following)
            if sched.preempt:
                sched.point("cond_resched")
            if ret:
                return ret
        return 0

    def _test_walk(self, vma: VmArea) -> int:
        """1: nothing for us in this VMA."""
        arg = self.arg
        if vma.flags & VM_HUGETLB:
            return 1
        wp_allowed = userfaultfd_wp_async(vma) and userfaultfd_wp_use_markers(vma)
        if not wp_allowed and arg.flags & PM_SCAN_CHECK_WPASYNC:
            return -EPERM
        if (not wp_allowed and arg.flags & PM_SCAN_WP_MATCHING) or vma.flags & VM_PFNMAP:
            return 1
        category = PAGE_IS_WPALLOWED if wp_allowed else 0
        soft_dirty = vma.flags & VM_SOFTDIRTY and vma.mm.host.soft_dirty
        category |= PAGE_IS_SOFT_DIRTY if soft_dirty else 0
        required = arg.category_mask & PAGE_IS_WPALLOWED
        if (category ^ arg.category_inverted) & required != required:
            return 1
        self.vma_category = category
        return 0

    def _hole(self, vma: VmArea, start: int, end: int) -> int:
        """pagemap_scan_pte_hole: pages that were never there, or whose table is gone."""
        if not self._interesting(self.vma_category):
            return 0
        ret, stop = self._output(self.vma_category, start, end)
        if stop == start or not self.arg.flags & PM_SCAN_WP_MATCHING:
            return ret
        err = uffd_wp_range(vma, start, stop, enable_wp=True)
        return err if err < 0 else ret

    def _table(self, vma: VmArea, pmd: int, start: int, end: int) -> int:
        """pagemap_scan_pmd_entry: the pages of one table."""
        mm, arg = self.mm, self.arg
        pte = pte_offset_map_lock(mm, pmd, start)
        if not pte and arg.flags & PM_SCAN_WP_MATCHING:
            split_huge_pmd(vma, pmd, start)
            pte = pte_offset_map_lock(mm, pmd, start)
        if not pte:
            return self._huge(vma, start, end)
        ptl = pte_lockptr(mm, pte)
        protect = bool(arg.flags & PM_SCAN_WP_MATCHING)
        # Who only protects wants every page of the VMA protected, whatever it matches.
        silent = protect and not arg.vec_len
        first, last, ret, address = 0, 0, 0, start
        while address < end and not ret:
            entry = mm.host.ram.u64[pte >> 3]
            if self.written_only:
                categories = self.vma_category | (0 if _is_wp(entry) else PAGE_IS_WRITTEN)
            else:
                categories = self.vma_category | _categories(vma, entry)
            stop = address + 4096
            if silent or self._interesting(categories):
                if not silent:
                    ret, stop = self._output(categories, address, stop)
                if stop == address:
                    break
                if protect and not _is_wp(entry) and (silent or categories & PAGE_IS_WRITTEN):
                    _make_uffd_wp_pte(mm, address, pte, entry)
                    first = first if last else address
                    last = stop
            pte += 8
            address += 4096
        if last:
            _tlb.flush_tlb_range(mm, first, address)
        ptl.unlock()
        return ret

    def _huge(self, vma: VmArea, start: int, end: int) -> int:
        """pagemap_scan_thp_entry: the part of a huge page."""
        entry = entry_at(self.mm, start)
        categories = self.vma_category | _categories(vma, entry) | PAGE_IS_HUGE
        if not entry or not self._interesting(categories):
            return 0
        return self._output(categories, start, end)[0]

    # -- what matches -------------------------------------------------------------------------

    def _interesting(self, categories: int) -> bool:
        arg = self.arg
        categories ^= arg.category_inverted
        if categories & arg.category_mask != arg.category_mask:
            return False
        return not arg.category_anyof_mask or bool(categories & arg.category_anyof_mask)

    def _output(self, categories: int, start: int, end: int) -> tuple[int, int]:
        """pagemap_scan_output: (0 or -ENOSPC, where what fitted ends)."""
        arg = self.arg
        if not arg.vec_len:
            return 0, end
        ret = 0
        pages = (end - start) >> 12
        if self.found_pages + pages > self.max_pages:
            pages = self.max_pages - self.found_pages
            end = start + (pages << 12)
            ret = -ENOSPC
        if not self._push(categories & arg.return_mask, start, end):
            pages, end, ret = 0, start, -ENOSPC
        self.found_pages += pages
        if ret:
            arg.walk_end = end
        return ret, end

    def _push(self, categories: int, start: int, end: int) -> bool:
        last = self.buffer[-1] if self.buffer else None
        if last is not None and last.end == start and last.categories == categories:
            last.end = end
            return True
        if len(self.buffer) >= min(_BOUNCE_REGIONS, self.arg.vec_len - len(self.regions)):
            return False
        if start < end:
            self.buffer.append(PageRegion(start, end, categories))
        return True


def _chunks(mm: MmStruct, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(pmd, address, next) of each table's part of the range; pmd 0: a hole, as large as its level's."""
    u64 = mm.host.ram.u64
    while start < end:
        table, size, pmd = mm.pgd, PGDIR_SIZE, 0
        while True:
            slot = table + ((start // size) & 511) * 8
            entry = u64[slot >> 3]
            if not entry & 1:
                break
            if size == PMD_SIZE or entry & _PAGE_PSE:
                pmd = slot
                break
            table = entry & PFN_MASK
            size = PUD_SIZE if size == PGDIR_SIZE else PMD_SIZE
        following = min(end, (start & -size) + size)
        yield pmd, start, following
        start = following


def _is_wp(entry: int) -> bool:
    return bool(entry & _PAGE_UFFD_WP) if pte_present(entry) else pte_swp_uffd_wp_any(entry)


def _categories(vma: VmArea, entry: int) -> int:
    """pagemap_page_category."""
    host = vma.mm.host
    if not entry:
        return 0
    categories = 0 if _is_wp(entry) else PAGE_IS_WRITTEN
    pfn = -1
    if pte_present(entry):
        categories |= PAGE_IS_PRESENT
        categories |= PAGE_IS_PFNZERO if pte_pfn(entry) == host.zero_pfn else 0
        categories |= PAGE_IS_SOFT_DIRTY if entry & _PAGE_SOFT_DIRTY else 0
        pfn = vm_normal_page(host, entry)
    else:
        categories |= PAGE_IS_SWAPPED
        categories |= PAGE_IS_SOFT_DIRTY if entry & _PAGE_SWP_SOFT_DIRTY else 0
        categories |= PAGE_IS_GUARD if pte_marker_get(entry) & PTE_MARKER_GUARD else 0
        swp = pte_to_swp_entry(entry)
        if is_migration_entry(swp):
            pfn = swp_offset(swp) & SWP_PFN_MASK
    if pfn >= 0 and not host.pages.flags[page_folio(host.pages, pfn)] & PG_anon:
        categories |= PAGE_IS_FILE
    return categories if host.soft_dirty else categories & ~PAGE_IS_SOFT_DIRTY


def _make_uffd_wp_pte(mm: MmStruct, address: int, pte: int, entry: int) -> None:
    if pte_present(entry):
        set_pte(mm, address, pte, pte_mkuffd_wp(ptep_get_and_clear(mm, address, pte)))
    elif entry:
        set_pte(mm, address, pte, entry | _PAGE_SWP_UFFD_WP)
    else:
        set_pte(mm, address, pte, make_pte_marker(PTE_MARKER_UFFD_WP))
