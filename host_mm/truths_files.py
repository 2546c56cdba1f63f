"""What must hold of files at rest: the page cache, its dirty marks, the mappings.

Source of truth: the rules themselves; in Linux they are spread over mm/filemap.c:
filemap_unaccount_folio, mm/page-writeback.c and fs/inode.c: clear_inode.

    page-cache     every page of a file is in its folio, at its index; nobody's file has been evicted
    i-mmap         i_mmap has each VMA of a file once, and no others
    file-dirty     the marks say which folios are dirty, and only those are mapped writable where the file
                   must know; a clean folio has the bytes that the file has (dirty-dropped)
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import _PAGE_RW
from host_mm.arch.x86.swapops import swp_offset
from host_mm.kernel.errors import BrokenTruth
from host_mm.page import PG_anon, PG_dirty, PG_locked, PG_writeback, folio_nr_pages, page_folio

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm

__all__ = ["check_file_entry", "check_mappings", "check_page_cache"]


def check_page_cache(host: HostMm, refs: Counter[int], slots: Counter[int]) -> None:
    """Look at every file; its references to frames and to swap slots are added to `refs` and `slots`."""
    for mapping in host.mappings:
        cached = 0
        for index, head in mapping.i_pages.items():
            if head < 0:
                slots[swp_offset(~head)] += 1
                continue
            cached += 1
            refs[head] += 1
            offset = index - host.pages.index[head]
            inside = 0 <= offset < folio_nr_pages(host.pages, head)
            if host.pages.mapping.get(head) is not mapping or not inside:
                raise BrokenTruth("page-cache", f"{mapping!r} page {index:#x} is not in pfn {head:#x}")
            if not offset:
                _check_folio(mapping, head, index)
        if mapping.nrpages != cached:
            raise BrokenTruth("page-cache", f"{mapping!r} counts {mapping.nrpages} pages, has {cached}")
        if not mapping.f_count and not mapping.i_mmap:
            raise BrokenTruth("page-cache", f"{mapping!r} has no user and was not evicted")


def _check_folio(mapping: AddressSpace, head: int, index: int) -> None:
    if not mapping.a_ops.can_writeback:
        return
    flags = mapping.host.pages.flags[head]
    if bool(flags & PG_dirty) != (index in mapping.dirty):
        raise BrokenTruth("file-dirty", f"{mapping!r} page {index:#x}: pfn {head:#x} and the mark disagree")
    if not flags & (PG_dirty | PG_writeback | PG_locked):
        mapping.a_ops.dropped_clean(mapping, head)


def check_mappings(host: HostMm) -> None:
    """Every VMA of a file is linked to it, and nothing else is."""
    linked = 0
    for process in host.processes:
        for vma in process.mm.vmas:
            if vma.file is not None:
                linked += 1
                if vma.file.i_mmap.count(vma) != 1:
                    raise BrokenTruth("i-mmap", f"{vma!r} is linked {vma.file.i_mmap.count(vma)} times")
    found = sum(len(mapping.i_mmap) for mapping in host.mappings)
    if found != linked:
        raise BrokenTruth("i-mmap", f"{found} VMAs are linked to files, {linked} exist")


def check_file_entry(host: HostMm, pfn: int, entry: int) -> None:
    """A present entry: whoever can write through it must be known to have made the page dirty."""
    head = page_folio(host.pages, pfn)
    flags = host.pages.flags[head]
    if not entry & _PAGE_RW or flags & (PG_anon | PG_dirty):
        return
    mapping = host.pages.mapping.get(head)
    if mapping is not None and mapping.a_ops.can_writeback:
        raise BrokenTruth("file-dirty", f"clean pfn {head:#x} of {mapping!r} has writable {entry:#x}")
