"""Folios for faults, and what an entry says of the page behind it.

Source of truth: mm/memory.c (vm_normal_page, folio_prealloc), include/linux/mm.h: maybe_mkwrite,
include/linux/pgtable.h: is_zero_pfn; Linux 6.18.

Not modelled: anonymous folios between 4 KiB and 2 MiB (alloc_anon_folio).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import _PAGE_SPECIAL, pte_mkwrite, pte_pfn
from host_mm.mm_types import VM_WRITE
from host_mm.page import PG_uptodate, put_page
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_ZERO

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = ["folio_alloc", "folio_prealloc", "is_zero_pfn", "maybe_mkwrite", "vm_normal_page"]


def is_zero_pfn(host: HostMm, pfn: int) -> bool:
    """Whether the frame is the zero page."""
    return pfn == host.zero_pfn


def vm_normal_page(host: HostMm, pte: int) -> int:
    """The frame of a present entry if a struct page counts its mappings, else -1 (zero page, PFNMAP)."""
    if pte & _PAGE_SPECIAL:
        return -1
    pfn = pte_pfn(pte)
    return -1 if pfn == host.zero_pfn else pfn


def maybe_mkwrite(pte: int, vma: VmArea) -> int:
    """Writable if the VMA is (a forced COW in a read-only VMA stays read-only)."""
    return pte_mkwrite(pte) if vma.flags & VM_WRITE else pte


def folio_prealloc(host: HostMm, vma: VmArea, *, zero: bool) -> int:
    """A page for this VMA by its memory policy, charged to its process's memory cgroup, or -1."""
    pfn = folio_alloc(host, vma, zero=zero)
    if pfn >= 0 and vma.mm.process.memcg is not None and host.memcg.charge(pfn, vma.mm):
        put_page(host, pfn)
        return -1
    return pfn


def folio_alloc(host: HostMm, vma: VmArea, *, zero: bool) -> int:
    """A page for this VMA by its memory policy that is not charged yet, or -1."""
    nid = vma.policy.preferred_node() if vma.policy is not None else host.numa_node_id(vma.mm.process)
    pfn = host.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_COMP | (GFP_ZERO if zero else 0), 0, nid)
    if pfn >= 0:
        host.pages.flags[pfn] |= PG_uptodate
    return pfn
