"""Shared memory: memfd, MAP_SHARED | MAP_ANONYMOUS, and the pages behind them.

Source of truth: mm/shmem.c (shmem_get_folio_gfp, shmem_fault, shmem_file_setup, shmem_evict_inode),
mm/memfd.c; Linux 6.18.

A shmem page has no backing file: the page cache is where it lives, and swap is where it goes. Its pages are
on the anonymous LRU lists, but belong to the file and not to who maps them.

Not modelled: tmpfs as a file system, quotas and size limits, seals, huge pages, mempolicies of files,
userfaultfd.
"""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOENT, ENOMEM
from typing import TYPE_CHECKING

from host_mm.address_space import AddressSpace, AddressSpaceOperations, VmOperations
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.filemap_cache import (
    NOT_CACHED,
    filemap_add_folio,
    filemap_get_entry,
    filemap_page,
    filemap_remove_folio,
)
from host_mm.kernel.costs import COST_CLEAR_PAGE
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import VM_FAULT_LOCKED, VM_FAULT_OOM, VM_FAULT_SIGBUS
from host_mm.page import PG_referenced, PG_swapbacked, PG_uptodate, folio_nr_pages, put_page
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, alloc_pages

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmFault

__all__ = [
    "SGP_CACHE", "SGP_FALLOC", "SGP_NOALLOC", "SGP_READ", "SGP_WRITE", "memfd_create", "shmem_file_setup",
    "shmem_get_folio", "shmem_mapping",
]

# enum sgp_type: what the caller wants of a page that is not there.
SGP_READ, SGP_NOALLOC, SGP_CACHE, SGP_WRITE, SGP_FALLOC = range(5)


def shmem_mapping(mapping: AddressSpace) -> bool:
    """Whether the file is shmem's."""
    return mapping.a_ops.is_shmem


def shmem_get_folio(mapping: AddressSpace, index: int, sgp: int) -> int:
    """The folio of page `index`, locked and with a reference; made if `sgp` allows it.

    SGP_READ on a hole: NOT_CACHED. A negative errno: -EINVAL beyond the end of the file, -ENOMEM,
    -ENOENT for SGP_NOALLOC on a hole.
    """
    host = mapping.host
    flags = host.pages.flags
    while True:
        if sgp <= SGP_CACHE and index << 12 >= mapping.i_size:
            return -EINVAL
        head = filemap_get_entry(mapping, index)
        if head >= 0:
            folio_lock(host, head)
            if host.pages.mapping.get(head) is not mapping:
                folio_unlock(host, head)
                put_page(host, head)
                continue
            if sgp == SGP_WRITE:
                host.lru.folio_mark_accessed(head)
            return head
        if sgp == SGP_READ:
            return NOT_CACHED
        if sgp == SGP_NOALLOC:
            return -ENOENT
        head = _alloc_and_add_folio(mapping, index)
        if head == -EEXIST:
            continue
        if head < 0:
            return head
        if sgp == SGP_WRITE:
            flags[head] |= PG_referenced
        if not flags[head] & PG_uptodate:
            _clear(host, head)
        if sgp <= SGP_CACHE and index << 12 >= mapping.i_size:
            # Truncated while it was made.
            filemap_remove_folio(mapping, head)
            folio_unlock(host, head)
            put_page(host, head)
            return -EINVAL
        return head


def _clear(host: HostMm, head: int) -> None:
    for page in range(head, head + folio_nr_pages(host.pages, head)):
        host.ram.clear_page(page)
        host.sched.advance(COST_CLEAR_PAGE)
    host.pages.flags[head] |= PG_uptodate


def _alloc_and_add_folio(mapping: AddressSpace, index: int) -> int:
    """A new locked folio in the cache, not up to date; -ENOMEM or -EEXIST."""
    host = mapping.host
    head = alloc_pages(host, GFP_HIGHUSER_MOVABLE | GFP_COMP, 0, mapping.nid)
    if head < 0:
        return -ENOMEM
    host.pages.flags[head] |= PG_swapbacked
    ret = filemap_add_folio(mapping, head, index)
    if ret:
        put_page(host, head)
        return ret
    return head


def shmem_fault(vmf: VmFault) -> int:
    """The page of a fault: VM_FAULT_LOCKED, or VM_FAULT_SIGBUS beyond the end of the file."""
    mapping: AddressSpace = vmf.vma.file
    head = shmem_get_folio(mapping, vmf.pgoff, SGP_CACHE)
    if head < 0:
        return VM_FAULT_OOM if head == -ENOMEM else VM_FAULT_SIGBUS
    vmf.page = filemap_page(mapping, head, vmf.pgoff)
    return VM_FAULT_LOCKED


class ShmemVmOperations(VmOperations):
    """shmem_vm_ops."""

    def fault(self, vmf: VmFault) -> int:
        """shmem_fault."""
        return shmem_fault(vmf)


class ShmemOperations(AddressSpaceOperations):
    """shmem_aops, and its inodes' end."""

    is_shmem = True

    def evict_inode(self, mapping: AddressSpace) -> None:
        """shmem_evict_inode: nobody can ask for the pages any more."""
        host = mapping.host
        mapping.i_size = 0
        for index in sorted(mapping.i_pages):
            head = filemap_get_entry(mapping, index)
            if head < 0:
                continue
            folio_lock(host, head)
            if host.pages.mapping.get(head) is mapping:
                filemap_remove_folio(mapping, head)
            folio_unlock(host, head)
            put_page(host, head)


_A_OPS = ShmemOperations()
_VM_OPS = ShmemVmOperations()


def shmem_file_setup(host: HostMm, name: str, size: int, nid: int = 0) -> AddressSpace:
    """A new shmem file of `size` bytes, all hole, with one descriptor."""
    return AddressSpace(host, name, size, _A_OPS, _VM_OPS, nid)


def memfd_create(host: HostMm, name: str, size: int = 0, nid: int = 0) -> AddressSpace:
    """memfd_create(2), and ftruncate(2) to `size`; close with fput. KernelError(EINVAL)."""
    if size < 0 or len(name) > 249:
        raise KernelError(EINVAL, f"memfd {name!r} of {size} bytes")
    return shmem_file_setup(host, f"memfd:{name}", size, nid)
