"""Faults on files: finding the page, and mapping what is cached around it.

Source of truth: mm/filemap.c (filemap_fault, lock_folio_maybe_drop_mmap, do_sync_mmap_readahead,
filemap_map_pages, next_uptodate_folio, filemap_map_folio_range, filemap_map_order0_folio,
filemap_page_mkwrite), mm/internal.h: maybe_unlock_mmap_for_io; Linux 6.18.

A fault that has to wait for I/O lets go of mmap_lock first, if it may, and is tried again; the file stays
open meanwhile. Fault-around waits for nothing: it maps the folios that are up to date and not locked.

Not modelled: asynchronous readahead, the count of misses, read errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.address_space import fput, get_file
from host_mm.arch.x86.pgtable import pmd_trans_huge
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock, folio_wait_locked
from host_mm.filemap_cache import filemap_add_folio, filemap_get_folio, filemap_page
from host_mm.huge_memory_file import do_set_pmd
from host_mm.memory_file import set_pte_range
from host_mm.mm_types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_RETRY_NOWAIT,
    FAULT_FLAG_TRIED,
    VM_FAULT_LOCKED,
    VM_FAULT_MAJOR,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
)
from host_mm.page import (
    PG_hwpoison,
    PG_locked,
    PG_readahead,
    PG_uptodate,
    folio_nr_pages,
    get_page,
    mm_counter,
    put_page,
    try_get_page,
)
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, alloc_pages
from host_mm.pgtable_generic import pte_alloc, pte_lockptr, pte_offset_map_lock, ptep_get
from host_mm.readahead import mmap_readahead_window, page_cache_ra
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.mm_types import VmArea, VmFault

__all__ = ["TRACEPOINTS", "filemap_fault", "filemap_map_pages", "maybe_unlock_mmap_for_io"]

MM_FILEMAP_FAULT = Tracepoint(
    "filemap", "mm_filemap_fault", ("file", "index"), lambda file, index: f"{file} ofs={index << 12}",
)
MM_FILEMAP_MAP_PAGES = Tracepoint(
    "filemap", "mm_filemap_map_pages", ("file", "first", "last"),
    lambda file, first, last: f"{file} ofs={first << 12}-{last << 12}",
)
TRACEPOINTS = (MM_FILEMAP_FAULT, MM_FILEMAP_MAP_PAGES)


def maybe_unlock_mmap_for_io(vmf: VmFault) -> bool:
    """Let go of mmap_lock before waiting, if this is a first try that may: true, and the file is pinned."""
    flags = vmf.flags & (FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_RETRY_NOWAIT | FAULT_FLAG_TRIED)
    if flags != FAULT_FLAG_ALLOW_RETRY:
        return False
    get_file(vmf.vma.file)
    vmf.mm.mmap_lock.read_unlock()
    return True


# -- the fault ------------------------------------------------------------------------------------
class _FilemapFault:
    """One call of filemap_fault. `dropped`: mmap_lock was let go, so the answer is RETRY."""

    __slots__ = ("dropped", "host", "index", "invalidate_locked", "mapping", "vmf")

    def __init__(self, vmf: VmFault) -> None:
        self.vmf = vmf
        self.mapping: AddressSpace = vmf.vma.file
        self.host = vmf.mm.host
        self.index = vmf.pgoff
        self.dropped = False
        self.invalidate_locked = False

    def drop_mmap(self) -> None:
        """maybe_unlock_mmap_for_io, once."""
        if not self.dropped:
            self.dropped = maybe_unlock_mmap_for_io(self.vmf)

    def read_around(self) -> None:
        """do_sync_mmap_readahead."""
        first, nr = mmap_readahead_window(self.host, self.vmf.vma, self.index)
        if nr:
            mm = self.vmf.mm
            self.drop_mmap()
            page_cache_ra(self.mapping, first, nr, mm)

    def find_or_create(self) -> int:
        """The folio with a reference, made if it is not cached; -1: no memory."""
        if not self.invalidate_locked:
            self.mapping.invalidate_lock.read_lock()
            self.invalidate_locked = True
        while True:
            head = filemap_get_folio(self.mapping, self.index)
            if head >= 0:
                return head
            head = alloc_pages(self.host, GFP_HIGHUSER_MOVABLE | GFP_COMP, 0, self.mapping.nid)
            if head < 0:
                return -1
            if not filemap_add_folio(self.mapping, head, self.index, self.vmf.mm):
                folio_unlock(self.host, head)
                return head
            put_page(self.host, head)

    def lock(self, head: int) -> bool:
        """lock_folio_maybe_drop_mmap: false if it would have to wait and may not."""
        if folio_trylock(self.host, head):
            return True
        if self.vmf.flags & FAULT_FLAG_RETRY_NOWAIT:
            return False
        self.drop_mmap()
        folio_lock(self.host, head)
        return True

    def run(self) -> tuple[int, int]:
        """(VM_FAULT_* bits, the folio with a reference or -1)."""
        mapping, host = self.mapping, self.host
        flags = host.pages.flags
        ret = 0
        head = filemap_get_folio(mapping, self.index)
        if head < 0:
            host.vmstat["pgmajfault"] += 1
            ret = VM_FAULT_MAJOR
            self.read_around()
            head = self.find_or_create()
        elif not flags[head] & PG_uptodate:
            mapping.invalidate_lock.read_lock()
            self.invalidate_locked = True
        while True:
            if head < 0:
                return (ret | VM_FAULT_RETRY if self.dropped else VM_FAULT_OOM), -1
            if not self.lock(head):
                return ret | VM_FAULT_RETRY, head
            if host.pages.mapping.get(head) is not mapping or (
                not flags[head] & PG_uptodate and not self.invalidate_locked
            ):
                # Truncated, or no longer what it was: look again with the invalidate lock held.
                folio_unlock(host, head)
                put_page(host, head)
            elif flags[head] & PG_uptodate:
                break
            else:
                self.drop_mmap()
                mapping.a_ops.read_folio(mapping, head)
                folio_wait_locked(host, head)
                if self.dropped:
                    return ret | VM_FAULT_RETRY, head
                put_page(host, head)
            head = self.find_or_create()
        if self.dropped:
            folio_unlock(host, head)
            return ret | VM_FAULT_RETRY, head
        return ret | VM_FAULT_LOCKED, head


def filemap_fault(vmf: VmFault) -> int:
    """The page of a fault, read if it is not cached: VM_FAULT_LOCKED and vmf.page, or why not."""
    fault = _FilemapFault(vmf)
    mapping, host = fault.mapping, fault.host
    if vmf.pgoff >= mapping.file_end:
        return VM_FAULT_SIGBUS
    if (t := host.trace.mm_filemap_fault) is not None:
        t(mapping.name, vmf.pgoff)
    ret, head = fault.run()
    if fault.invalidate_locked:
        mapping.invalidate_lock.read_unlock()
    if ret & VM_FAULT_LOCKED and vmf.pgoff >= mapping.file_end:
        folio_unlock(host, head)
        put_page(host, head)
        return VM_FAULT_SIGBUS
    if ret & VM_FAULT_LOCKED:
        vmf.page = filemap_page(mapping, head, vmf.pgoff)
        return ret
    if head >= 0:
        put_page(host, head)
    if fault.dropped:
        fput(mapping)
    return ret


# -- fault-around ---------------------------------------------------------------------------------
def _next_uptodate_folio(mapping: AddressSpace, index: int, last: int) -> tuple[int, int]:
    """(index, folio with a reference and locked) of the next page from `index` on that can be mapped at once.

    The folio is -1 if there is none up to `last`.
    """
    host = mapping.host
    pages = host.pages
    for at in range(index, last + 1):
        head = mapping.i_pages.get(at, -1)
        if head < 0 or not try_get_page(host, head):
            continue
        value = pages.flags[head]
        if not value & (PG_locked | PG_readahead) and value & PG_uptodate and folio_trylock(host, head):
            if pages.mapping.get(head) is mapping and at < mapping.file_end:
                return at, head
            folio_unlock(host, head)
        put_page(host, head)
    return last + 1, -1


def _map_range(vma: VmArea, head: int, first: int, count: int, address: int) -> tuple[int, int]:
    """What of the folio to map: all of it where VMA, file and page table allow; (first page, count)."""
    host = vma.mm.host
    nr = folio_nr_pages(host.pages, head)
    if nr == 1:
        return first, count
    base = address - (first << 12)
    mapping = vma.file
    whole = mapping.file_end >= host.pages.index[head] + nr or mapping.a_ops.is_shmem
    end = base + (nr << 12)
    if whole and vma.start <= base and end <= vma.end and base >> 21 == (end - 1) >> 21:
        return 0, nr
    return first, count


def filemap_map_pages(vmf: VmFault, first: int, last: int) -> int:
    """Map those of pages [first, last] that are ready; VM_FAULT_NOPAGE if the fault's is among them."""
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    mapping: AddressSpace = vma.file
    index, head = _next_uptodate_folio(mapping, first, last)
    if head < 0:
        return 0
    if _map_pmd(vmf, head):
        return VM_FAULT_NOPAGE
    last = min(last, mapping.file_end - 1)
    pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address) if pte_alloc(mm, vmf.pmd) else 0
    if not pte:
        folio_unlock(host, head)
        put_page(host, head)
        return 0
    vmf.ptl = pte_lockptr(mm, pte)
    ret = 0
    while head >= 0:
        address = vma.start + ((index - vma.pgoff) << 12)
        inside = index - host.pages.index[head]
        count = min(folio_nr_pages(host.pages, head) - inside, last - index + 1)
        page, nr = _map_range(vma, head, inside, count, address)
        ret |= _map_folio(vmf, head, page, nr, address + ((page - inside) << 12), pte)
        folio_unlock(host, head)
        put_page(host, head)
        index, head = _next_uptodate_folio(mapping, index + count, last)
    vmf.ptl.unlock()
    if (t := host.trace.mm_filemap_map_pages) is not None:
        t(mapping.name, first, last)
    return ret


def _map_pmd(vmf: VmFault, head: int) -> bool:
    """filemap_map_pmd: whether the fault's 2 MiB are huge by now; the folio is given back then."""
    host, mm = vmf.mm.host, vmf.mm
    huge = pmd_trans_huge(ptep_get(mm, vmf.pmd))
    if not ptep_get(mm, vmf.pmd) and folio_nr_pages(host.pages, head) > 1 and not do_set_pmd(vmf, head):
        # The reference is the entry's now.
        folio_unlock(host, head)
        return True
    if huge:
        folio_unlock(host, head)
        put_page(host, head)
    return huge


def _map_folio(vmf: VmFault, head: int, first: int, nr: int, address: int, pte: int) -> int:
    """Map pages [first, first+nr) of a locked folio where nothing is mapped. `pte` is the fault's entry."""
    host, mm = vmf.mm.host, vmf.mm
    u64 = host.ram.u64
    counter = mm_counter(host.pages, head)
    ret = 0
    for page in range(head + first, head + first + nr):
        at = pte + ((address - vmf.address) >> 12) * 8
        if not host.pages.flags[page] & PG_hwpoison and not u64[at >> 3]:
            get_page(host, head)
            set_pte_range(vmf, page, address, at)
            mm.rss[counter] += 1
            if address == vmf.address:
                ret = VM_FAULT_NOPAGE
        address += 4096
    return ret
