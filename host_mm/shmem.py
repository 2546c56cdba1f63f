"""Shared memory: memfd, MAP_SHARED | MAP_ANONYMOUS, and the pages behind them.

Source of truth: mm/shmem.c (shmem_get_folio_gfp, shmem_swapin_folio, shmem_writeout, shmem_fault,
shmem_falloc_wait); Linux 6.18.

A shmem page has no backing file: the page cache is where it lives, and swap is where it goes. Its pages are
on the anonymous LRU lists, but belong to the file and not to who maps them. On the way out the folio moves
from the page cache to the swap cache and leaves its swap entry in its place; page tables hold nothing of it.
On the way in it is read into the swap cache first, so that it is found in one of the two at any time.

Huge pages are in huge_memory_file.py. Truncation, holes, allocation and the file itself are in shmem_file.py.

Not modelled: tmpfs as a file system, quotas and size limits, seals, mempolicies of files, swap-in
past the swap cache from synchronous devices, swapoff's search for shmem's entries.
"""

from __future__ import annotations

from errno import EEXIST, EINVAL, EIO, ENOENT, ENOMEM
from typing import TYPE_CHECKING

from host_mm.address_space import fput
from host_mm.arch.x86.swapops import swp_offset
from host_mm.filemap import folio_lock, folio_unlock, folio_wait_writeback
from host_mm.filemap_cache import (
    NOT_CACHED,
    filemap_add_folio,
    filemap_get_entry,
    filemap_page,
    filemap_remove_folio,
    page_cache_delete,
    page_cache_store,
)
from host_mm.filemap_fault import maybe_unlock_mmap_for_io
from host_mm.huge_memory_file import shmem_alloc_huge
from host_mm.kernel.costs import COST_CLEAR_PAGE
from host_mm.kernel.sched import WaitQueue
from host_mm.mm_types import (
    VM_FAULT_LOCKED,
    VM_FAULT_MAJOR,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_UFFD_MINOR,
    VM_UFFD_MISSING,
)
from host_mm.page import (
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_uptodate,
    folio_nr_pages,
    put_page,
    set_page_dirty,
)
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, alloc_pages
from host_mm.page_io import swap_read_folio, swap_writeout
from host_mm.swap_state import (
    folio_alloc_swap,
    read_swap_cache,
    swap_cache_del_folio,
    swap_cache_get_folio,
)
from host_mm.userfaultfd_k import handle_userfault
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmFault

__all__ = [
    "SGP_CACHE", "SGP_FALLOC", "SGP_NOALLOC", "SGP_READ", "SGP_WRITE", "TRACEPOINTS", "ShmemFalloc",
    "shmem_clear_folio", "shmem_fault", "shmem_get_folio", "shmem_writeout",
]

# enum sgp_type: what the caller wants of a page that is not there.
SGP_READ, SGP_NOALLOC, SGP_CACHE, SGP_WRITE, SGP_FALLOC = range(5)

SHMEM_SWAPOUT = Tracepoint(
    "refault", "shmem_swapout", ("file", "index", "pfn", "slot"),
    lambda file, index, pfn, slot: f"{file} page {index:#x} pfn {pfn:#x} slot {slot:#x}",
    doc="A shmem page leaves the page cache for the swap cache; its swap entry takes its place.",
)
SHMEM_SWAPIN = Tracepoint(
    "refault", "shmem_swapin", ("file", "index", "pfn", "slot", "major"),
    lambda file, index, pfn, slot, major: (
        f"{file} page {index:#x} pfn {pfn:#x} slot {slot:#x}" + (" major" if major else "")
    ),
    doc="A shmem page is back in the page cache.",
)
TRACEPOINTS = (SHMEM_SWAPOUT, SHMEM_SWAPIN)


class ShmemFalloc:
    """struct shmem_falloc: a hole being punched (faults on its pages hang on `waitq`), or an allocation."""

    __slots__ = ("next", "nr_falloced", "nr_unswapped", "start", "waitq")

    def __init__(self, start: int, next_: int, waitq: WaitQueue | None = None) -> None:
        self.start = start
        self.next = next_
        self.waitq = waitq
        self.nr_falloced = self.nr_unswapped = 0


# -- finding pages --------------------------------------------------------------------------------
def shmem_get_folio(mapping: AddressSpace, index: int, sgp: int, vmf: VmFault | None = None) -> int:
    """The folio of page `index`, locked and with a reference; made or swapped in if `sgp` allows it.

    SGP_READ on a hole: NOT_CACHED; so too where a fault was put to a userfaultfd, with its answer in
    `vmf.fault_type`. A negative errno: -EINVAL beyond the end of the file, -ENOMEM,
    -ENOENT for SGP_NOALLOC on a hole. For a fault, `vmf.fault_type` says if the page had to be read.
    """
    host = mapping.host
    while True:
        if sgp <= SGP_CACHE and index << 12 >= mapping.i_size:
            return -EINVAL
        head = filemap_get_entry(mapping, index)
        if head != NOT_CACHED and vmf is not None and vmf.vma.flags & VM_UFFD_MINOR:
            # The page is known, but this mapping may have it only when its userfaultfd says so.
            if head >= 0:
                put_page(host, head)
            vmf.fault_type = handle_userfault(vmf, VM_UFFD_MINOR)
            return NOT_CACHED
        if NOT_CACHED < head < 0:
            head = _swapin_folio(mapping, index, ~head, sgp, vmf)
            if head != -EEXIST:
                return head
            continue
        if head >= 0:
            folio_lock(host, head)
            if host.pages.mapping.get(head) is not mapping:
                # Truncated or swapped out while this task waited.
                folio_unlock(host, head)
                put_page(host, head)
                continue
            if sgp == SGP_WRITE:
                host.lru.folio_mark_accessed(head)
            if host.pages.flags[head] & PG_uptodate:
                return head
            if sgp != SGP_READ:
                return _initialise(mapping, head, index, sgp)
            # Allocated, but nobody wrote to it: reads as the hole that it was.
            folio_unlock(host, head)
            put_page(host, head)
        if sgp == SGP_READ:
            return NOT_CACHED
        if sgp == SGP_NOALLOC:
            return -ENOENT
        if vmf is not None and vmf.vma.flags & VM_UFFD_MISSING:
            vmf.fault_type = handle_userfault(vmf, VM_UFFD_MISSING)
            return NOT_CACHED
        head = shmem_alloc_huge(mapping, index, vmf) if vmf is not None else -1
        if head == -1:
            head = _alloc_and_add_folio(mapping, index, vmf.mm if vmf is not None else None)
        if head == -EEXIST:
            continue
        if head < 0:
            return head
        if sgp == SGP_WRITE:
            host.pages.flags[head] |= PG_referenced
        # SGP_FALLOC leaves a new folio as it is, so that an allocation that fails can be undone.
        return _initialise(mapping, head, index, SGP_WRITE if sgp == SGP_FALLOC else sgp, alloced=True)


def _initialise(mapping: AddressSpace, head: int, index: int, sgp: int, *, alloced: bool = False) -> int:
    host = mapping.host
    if sgp != SGP_WRITE and not host.pages.flags[head] & PG_uptodate:
        shmem_clear_folio(host, head)
    if sgp <= SGP_CACHE and index << 12 >= mapping.i_size:
        # Truncated while it was made.
        if alloced:
            filemap_remove_folio(mapping, head)
        folio_unlock(host, head)
        put_page(host, head)
        return -EINVAL
    return head


def shmem_clear_folio(host: HostMm, head: int) -> None:
    """Fill a folio that was only allocated so far with zeros."""
    for page in range(head, head + folio_nr_pages(host.pages, head)):
        host.ram.clear_page(page)
        host.sched.advance(COST_CLEAR_PAGE)
    host.pages.flags[head] |= PG_uptodate


def _alloc_and_add_folio(mapping: AddressSpace, index: int, mm: MmStruct | None) -> int:
    """A new locked folio in the cache, not up to date; -ENOMEM or -EEXIST."""
    host = mapping.host
    head = alloc_pages(host, GFP_HIGHUSER_MOVABLE | GFP_COMP, 0, mapping.nid)
    if head < 0:
        return -ENOMEM
    host.pages.flags[head] |= PG_swapbacked
    ret = filemap_add_folio(mapping, head, index, mm)
    if ret:
        put_page(host, head)
        return ret
    return head


# -- swap -----------------------------------------------------------------------------------------
def _confirm_swap(mapping: AddressSpace, index: int, entry: int) -> bool:
    return mapping.i_pages.get(index, NOT_CACHED) == ~entry


def _swapin_folio(mapping: AddressSpace, index: int, entry: int, sgp: int, vmf: VmFault | None) -> int:
    """shmem_swapin_folio: from the swap entry to the locked folio in the page cache, or a negative errno.

    -EEXIST: the entry is not the page's any more, look again.
    """
    host = mapping.host
    pages = host.pages
    swap = host.swap
    assert swap is not None
    if not _confirm_swap(mapping, index, entry):
        return -EEXIST
    major = False
    head = swap_cache_get_folio(host, entry)
    if head < 0:
        head = read_swap_cache(
            host, entry, mapping.nid, swap_read_folio, mm=vmf.mm if vmf is not None else None
        )
        if head < 0:
            return -ENOMEM if _confirm_swap(mapping, index, entry) else -EEXIST
        major = True
        if vmf is not None:
            vmf.fault_type |= VM_FAULT_MAJOR
            host.vmstat["pgmajfault"] += 1
    folio_lock(host, head)
    ret = 0
    if (
        not pages.flags[head] & PG_swapcache or not _confirm_swap(mapping, index, entry)
        or pages.private[head] != entry
    ):
        ret = -EEXIST
    elif not pages.flags[head] & PG_uptodate:
        ret = -EIO
    else:
        folio_wait_writeback(host, head)
        ret = page_cache_store(mapping, head, index, expected=~entry)
    if ret:
        folio_unlock(host, head)
        put_page(host, head)
        return ret
    if sgp == SGP_WRITE:
        host.lru.folio_mark_accessed(head)
    swap_cache_del_folio(host, head)
    set_page_dirty(host, head)
    swap.swap_free(entry)
    if (t := host.trace.shmem_swapin) is not None:
        t(mapping.name, index, head, swp_offset(entry), major)
    return head


def shmem_writeout(mapping: AddressSpace, head: int) -> bool:
    """Write a locked, unmapped folio to swap; unlocks it. False: no slot, it stays dirty and locked."""
    host = mapping.host
    index = host.pages.index[head]
    falloc: ShmemFalloc | None = mapping.private_data
    if not host.pages.flags[head] & PG_uptodate:
        if falloc is not None and falloc.waitq is None and falloc.start <= index < falloc.next:
            # An allocation is under way: it should rather end than push its own pages out.
            falloc.nr_unswapped += 1
            set_page_dirty(host, head)
            return False
        shmem_clear_folio(host, head)
    if host.swap is None or folio_alloc_swap(host, head):
        set_page_dirty(host, head)
        return False
    entry = host.pages.private[head]
    host.swap.swap_shmem_alloc(entry)
    if (t := host.trace.shmem_swapout) is not None:
        t(mapping.name, index, head, swp_offset(entry))
    put_page(host, head, page_cache_delete(mapping, head, value=~entry))
    swap_writeout(host, head)
    return True


# -- faults ---------------------------------------------------------------------------------------
def _falloc_wait(vmf: VmFault, falloc: ShmemFalloc) -> int:
    """shmem_falloc_wait: keep out of a hole that is being punched, or the puncher might never get done."""
    if falloc.waitq is None or not falloc.start <= vmf.pgoff < falloc.next:
        return 0
    mapping = vmf.vma.file
    dropped = maybe_unlock_mmap_for_io(vmf)
    # i_lock keeps the puncher from ending between these two.
    if mapping.private_data is falloc:
        falloc.waitq.wait()
    if not dropped:
        return VM_FAULT_NOPAGE
    fput(mapping)
    return VM_FAULT_RETRY


def shmem_fault(vmf: VmFault) -> int:
    """The page of a fault: VM_FAULT_LOCKED, or VM_FAULT_SIGBUS beyond the end of the file."""
    mapping: AddressSpace = vmf.vma.file
    if mapping.private_data is not None and (ret := _falloc_wait(vmf, mapping.private_data)):
        return ret
    head = shmem_get_folio(mapping, vmf.pgoff, SGP_CACHE, vmf)
    if head == NOT_CACHED:
        return vmf.fault_type
    if head < 0:
        return VM_FAULT_OOM if head == -ENOMEM else VM_FAULT_SIGBUS
    vmf.page = filemap_page(mapping, head, vmf.pgoff)
    return VM_FAULT_LOCKED | vmf.fault_type
