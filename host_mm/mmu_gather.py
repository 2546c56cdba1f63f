"""struct mmu_gather: unmap now, flush and free later, in batches.

Source of truth: mm/mmu_gather.c (tlb_gather_mmu, tlb_flush_mmu, tlb_finish_mmu, tlb_next_batch),
include/asm-generic/tlb.h (MAX_GATHER_BATCH); Linux 6.18.

Pages leave their entries at once but go back to the allocator only after the primary TLB was flushed.
A gather that is full flushes and frees in the middle of the bracket; what is left goes after its end.

    --param mm.max_gather_pages=N   pages in a full gather (the kernel's: 8 + 19 * 510)

Not modelled: delayed rmap of dirty file pages, encoded page flags, per-arch page-size tracking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import PMD_SIZE
from host_mm.page import PG_swapcache, put_page
from host_mm.pgtable_generic import free_tables
from host_mm.swap_state import free_swap_cache

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = ["MAX_GATHER_PAGES", "MmuGather"]

MAX_GATHER_PAGES = 8 + 19 * 510


class MmuGather:
    """One gather. `fullmm`: the whole address space goes away, so one flush of everything will do."""

    __slots__ = ("end", "fullmm", "limit", "mm", "pages", "start", "stride", "tables")

    def __init__(self, mm: MmStruct, *, fullmm: bool = False) -> None:
        self.mm = mm
        self.fullmm = fullmm
        self.pages: list[int] = []
        self.tables: list[int] = []
        self.limit = int(mm.host.params.get("mm.max_gather_pages", MAX_GATHER_PAGES))
        self.start = _tlb.TLB_FLUSH_ALL
        self.end = 0
        self.stride = _tlb.TLB_FLUSH_ALL
        _tlb.inc_tlb_flush_pending(mm)

    def remove_tlb_entry(self, address: int, size: int = 4096) -> None:
        """An entry that mapped `size` bytes was cleared: its translation must be flushed."""
        if address < self.start:
            self.start = address
        if address + size > self.end:
            self.end = address + size
        if size < self.stride:
            self.stride = size

    def remove_page(self, pfn: int) -> bool:
        """Queue a page that lost its entry; true when the gather is full."""
        self.pages.append(pfn)
        return len(self.pages) >= self.limit

    def remove_table(self, pfn: int, address: int) -> None:
        """Queue an unhooked page table."""
        self.tables.append(pfn)
        self.remove_tlb_entry(address)

    def flush_tlbonly(self) -> None:
        """tlb_flush_mmu_tlbonly: flush what was collected so far."""
        if self.end:
            if self.fullmm:
                _tlb.flush_tlb_mm(self.mm)
            else:
                flush = _tlb.flush_tlb_range if self.stride < PMD_SIZE else _tlb.flush_pmd_tlb_range
                flush(self.mm, self.start, self.end)
            self.start = _tlb.TLB_FLUSH_ALL
            self.end = 0
            self.stride = _tlb.TLB_FLUSH_ALL

    def flush(self) -> None:
        """tlb_flush_mmu: flush, then free."""
        if "free-before-flush" in self.mm.host.breaks:
            self._free()
            self.flush_tlbonly()
        else:
            self.flush_tlbonly()
            self._free()

    def _free(self) -> None:
        host = self.mm.host
        pages, self.pages = self.pages, []
        flags = host.pages.flags
        for pfn in pages:
            if flags[pfn] & PG_swapcache:
                free_swap_cache(host, pfn)
            put_page(host, pfn)
        tables, self.tables = self.tables, []
        free_tables(self.mm, tables)

    def finish(self) -> None:
        """tlb_finish_mmu. If another gather runs on this mm its cleared entries count as ours."""
        if _tlb.mm_tlb_flush_nested(self.mm):
            self.fullmm = True
            self.start = 0
            self.end = _tlb.TLB_FLUSH_ALL
        self.flush()
        _tlb.dec_tlb_flush_pending(self.mm)
