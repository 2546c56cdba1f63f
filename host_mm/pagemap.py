"""/proc/PID/pagemap: what each page is; the ioctl on it is in pagemap_scan.py.

Source of truth: fs/proc/task_mmu.c (pagemap_read, pte_to_pagemap_entry); Linux 6.18.

An entry of the pagemap:

     63  62  61  60 59 58  57  56   55  54                     0
    +---+---+---+-----+---+---+----+---+------------------------+
    | P | SW| FI|     | GR| WP| EX | SD| pfn, or slot and type  |
    +---+---+---+-----+---+---+----+---+------------------------+

Not modelled: the capability that shows frame numbers.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_PSE,
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    PFN_MASK,
    PMD_SIZE,
    PUD_SIZE,
    TASK_SIZE,
    pte_pfn,
    pte_present,
    walk_lockless,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    PTE_MARKER_GUARD,
    SWP_PFN_MASK,
    is_migration_entry,
    pte_marker_get,
    pte_swp_uffd_wp_any,
    pte_to_swp_entry,
    swp_offset,
    swp_type,
)
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import VM_SOFTDIRTY
from host_mm.page import PG_anon, folio_test_large, page_folio

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.page import Pages

__all__ = [
    "PM_FILE", "PM_GUARD_REGION", "PM_MMAP_EXCLUSIVE", "PM_PFRAME_MASK", "PM_PRESENT", "PM_SOFT_DIRTY",
    "PM_SWAP", "PM_UFFD_WP", "pagemap_read",
]

PM_PFRAME_MASK = (1 << 55) - 1
PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_GUARD_REGION = 1 << 58
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63


_MAX_SWAPFILES_SHIFT = 5


def pagemap_read(mm: MmStruct, start: int, pages: int) -> list[int]:
    """read(2): one word a page from address `start` on, fewer at the end of user space.

    KernelError(EINVAL).
    """
    if start & 4095 or pages < 0:
        raise KernelError(EINVAL, f"{start:#x} is not page-aligned")
    mm.host.sched.advance(COST_SYSCALL)
    found: list[int] = []
    address, end = start, min(start + (pages << 12), TASK_SIZE)
    while address < end:
        following = min(end, (address & -PMD_SIZE) + PMD_SIZE)
        mm.mmap_lock.read_lock()
        for at in range(address, following, 4096):
            vma = mm.vma_lookup(at)
            found.append(_pagemap_entry(vma, entry_at(mm, at)) if vma is not None else 0)
        mm.mmap_lock.read_unlock()
        address = following
    return found


def entry_at(mm: MmStruct, address: int) -> int:
    """The 4 KiB entry of a page, made up from its leaf where that is huge; 0: none."""
    entry, level = walk_lockless(mm.host.ram, mm.pgd, address)
    if level == 1 or not entry & _PAGE_PSE:
        return entry if level == 1 else 0
    size = PMD_SIZE if level == 2 else PUD_SIZE
    return (entry & ~_PAGE_PSE) + (address & (size - 1) & PFN_MASK)


def _mapcount(pages: Pages, pfn: int) -> int:
    """How often this page is mapped, by itself or with its whole folio."""
    head = page_folio(pages, pfn)
    return pages.mapcount[pfn] + (pages.entire_mapcount[head] if folio_test_large(pages, head) else 0)


def _pagemap_entry(vma: VmArea, entry: int) -> int:
    """pte_to_pagemap_entry."""
    host = vma.mm.host
    word = PM_SOFT_DIRTY if vma.flags & VM_SOFTDIRTY else 0
    pfn = -1
    if pte_present(entry):
        word |= PM_PRESENT | pte_pfn(entry)
        word |= PM_SOFT_DIRTY if entry & _PAGE_SOFT_DIRTY else 0
        word |= PM_UFFD_WP if entry & _PAGE_UFFD_WP else 0
        pfn = vm_normal_page(host, entry)
        if pfn >= 0 and _mapcount(host.pages, pfn) == 1:
            word |= PM_MMAP_EXCLUSIVE
    elif entry:
        swp = pte_to_swp_entry(entry)
        offset = swp_offset(swp)
        if is_migration_entry(swp):
            pfn = offset = offset & SWP_PFN_MASK
        word |= PM_SWAP | ((swp_type(swp) | offset << _MAX_SWAPFILES_SHIFT) & PM_PFRAME_MASK)
        word |= PM_SOFT_DIRTY if entry & _PAGE_SWP_SOFT_DIRTY else 0
        word |= PM_UFFD_WP if pte_swp_uffd_wp_any(entry) else 0
        word |= PM_GUARD_REGION if pte_marker_get(entry) & PTE_MARKER_GUARD else 0
    if pfn >= 0 and not host.pages.flags[page_folio(host.pages, pfn)] & PG_anon:
        word |= PM_FILE
    return word if host.soft_dirty else word & ~PM_SOFT_DIRTY
