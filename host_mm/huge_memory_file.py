"""Huge pages of shared memory: who may have them, and mapping one by one entry.

Source of truth: mm/shmem.c (shmem_allowable_huge_orders, shmem_huge_global_enabled, shmem_suitable_orders,
shmem_alloc_and_add_folio), mm/memory.c: do_set_pmd, mm/filemap.c: filemap_map_pmd; Linux 6.18.

A fault on a hole makes a huge folio if the policy wants one there, the mapping lies right and the file has
nothing yet in those 2 MiB. Whoever finds a huge folio at an empty level-2 entry maps it whole.

    --param thp.shmem_enabled=always|within_size|advise|never

Not modelled: sizes between a page and 2 MiB, a policy by file system or by size, huge folios made by
write(2) and fallocate(2), the shrinker of what lies beyond the end of a file.
"""

from __future__ import annotations

from errno import EEXIST
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PMD_SIZE, mk_pmd, pte_mkdirty
from host_mm.filemap_cache import filemap_add_folio
from host_mm.huge_mm import thp_vma_suitable_order, vma_thp_gfp_mask
from host_mm.memory_folio import maybe_mkwrite
from host_mm.mm_types import FAULT_FLAG_WRITE, VM_FAULT_FALLBACK, VM_HUGEPAGE, VM_NOHUGEPAGE
from host_mm.page import PG_swapbacked, mm_counter, put_page
from host_mm.page_alloc import alloc_pages
from host_mm.pgtable_generic import pmd_lock, set_pmd
from host_mm.pgtable_huge import pmdp_get
from host_mm.rmap_large import folio_add_large_rmap_pmd

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.mm_types import VmArea, VmFault

__all__ = ["do_set_pmd", "shmem_alloc_huge", "shmem_allowable_huge_order"]


def shmem_allowable_huge_order(mapping: AddressSpace, vma: VmArea, index: int, *, forced: bool) -> bool:
    """Whether a fault of `vma` on page `index` may have a huge folio; `forced`: whatever the policy."""
    if vma.flags & VM_NOHUGEPAGE:
        return False
    if forced:
        return True
    policy = mapping.host.thp.shmem_enabled
    if policy == "always":
        return True
    within = policy == "within_size" and mapping.file_end >= (index // HPAGE_PMD_NR + 1) * HPAGE_PMD_NR
    return within or (policy in ("within_size", "advise") and bool(vma.flags & VM_HUGEPAGE))


def shmem_alloc_huge(mapping: AddressSpace, index: int, vmf: VmFault) -> int:
    """A new locked huge folio in the cache around page `index`, not up to date; -EEXIST, or -1: none."""
    vma = vmf.vma
    host = mapping.host
    if not shmem_allowable_huge_order(mapping, vma, index, forced=False):
        return -1
    if not thp_vma_suitable_order(vma, vmf.address):
        return -1
    first = index & ~(HPAGE_PMD_NR - 1)
    if any(at in mapping.i_pages for at in range(first, first + HPAGE_PMD_NR)):
        return -1
    head = alloc_pages(host, vma_thp_gfp_mask(vma), HPAGE_PMD_ORDER, mapping.nid)
    if head < 0:
        host.vmstat["thp_file_fallback"] += 1
        return -1
    host.pages.flags[head] |= PG_swapbacked
    ret = filemap_add_folio(mapping, head, first, vmf.mm)
    if ret:
        put_page(host, head)
        return ret if ret == -EEXIST else -1
    host.vmstat["thp_file_alloc"] += 1
    return head


def do_set_pmd(vmf: VmFault, head: int) -> int:
    """Map a locked folio by a huge entry: 0, the reference is the entry's then, or VM_FAULT_FALLBACK."""
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    if vma.flags & VM_NOHUGEPAGE or not thp_vma_suitable_order(vma, vmf.address):
        return VM_FAULT_FALLBACK
    if host.pages.order[head] != HPAGE_PMD_ORDER:
        return VM_FAULT_FALLBACK
    ptl = pmd_lock(mm, vmf.pmd)
    ret = VM_FAULT_FALLBACK
    if not pmdp_get(mm, vmf.pmd):
        entry = mk_pmd(head, vma.page_prot)
        if vmf.flags & FAULT_FLAG_WRITE:
            entry = maybe_mkwrite(pte_mkdirty(entry), vma)
        mm.rss[mm_counter(host.pages, head)] += HPAGE_PMD_NR
        folio_add_large_rmap_pmd(host, head, mm)
        set_pmd(mm, vmf.address & ~(PMD_SIZE - 1), vmf.pmd, entry)
        host.vmstat["thp_file_mapped"] += 1
        ret = 0
    ptl.unlock()
    return ret
