"""hugetlbfs: files of huge pages, their mapping, holes and truncation.

Source of truth: fs/hugetlbfs/inode.c (hugetlb_file_setup, hugetlbfs_file_mmap, hugetlbfs_punch_hole,
hugetlbfs_zero_partial_page, hugetlb_vmtruncate, hugetlb_vmdelete_list, remove_inode_hugepages,
remove_inode_single_folio, hugetlb_unmap_file_folio, hugetlbfs_fallocate, hugetlbfs_evict_inode),
mm/hugetlb.c (hugetlb_vm_op_open, hugetlb_vm_op_close, hugetlb_vm_op_split); Linux 6.18.

A hole unmaps the whole huge pages in it, one bracket a mapping, and zeroes what is left at its ends
without telling anybody. Pages are taken out of the file one by one, under the fault mutex of each and its
folio lock; one that somebody faulted in again meanwhile, or whose VMA was busy before, is unmapped again.
A fault that had looked at the file's size before a truncation, and puts its page into the file after it,
leaves that page beyond the end until the file goes, and with it a promise less than none; so does Linux.

Not modelled: mounts and their limits, names, seals, poisoned pages.
"""

from __future__ import annotations

from errno import EINVAL, ENOMEM, ENOSPC, EOPNOTSUPP
from typing import TYPE_CHECKING

from host_mm.address_space import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    AddressSpace,
    AddressSpaceOperations,
    VmOperations,
    fput,
    vmas_of_pages,
)
from host_mm.arch.x86.pgtable import PMD_SIZE, pmd_pfn, pte_present
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.filemap_cache import NOT_CACHED, filemap_lock_folio
from host_mm.hugetlb import HPG_migratable
from host_mm.hugetlb_pool import hugetlb_acct_memory
from host_mm.hugetlb_resv import (
    HPAGE_RESV_OWNER,
    LONG_MAX,
    HugetlbInode,
    ResvMap,
    alloc_hugetlb_folio,
    hugetlb_reserve_pages,
    hugetlb_unreserve_pages,
    hugetlb_vma_lock_alloc,
    hugetlb_vma_lock_free,
    is_vma_resv_set,
    restore_reserve_on_error,
    resv_map_put,
    vma_hugecache_offset,
    vma_resv_map,
)
from host_mm.hugetlb_rmap import (
    hugetlb_add_to_page_cache,
    hugetlb_delete_from_page_cache,
    zero_huge_folio,
)
from host_mm.hugetlb_share import (
    hugetlb_vma_sema,
    hugetlb_vma_trylock_write,
    hugetlb_vma_unlock_write,
    hugetlb_walk,
)
from host_mm.hugetlb_unmap import unmap_hugepage_range
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import RwSem
from host_mm.mm_types import (
    VM_DONTEXPAND,
    VM_HUGETLB,
    VM_LOCKED_MASK,
    VM_MAYSHARE,
    VM_NORESERVE,
    VM_SHARED,
    VM_WRITE,
    VmArea,
)
from host_mm.page import get_page, put_page

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["hugetlb_file_setup"]


class _VmOps(VmOperations):
    """hugetlb_vm_ops."""

    def may_split(self, vma: VmArea, address: int) -> bool:
        """A huge page cannot be cut."""
        return not address & (PMD_SIZE - 1)

    def open(self, vma: VmArea) -> None:
        """A copy of a VMA: it shares the reservations of a private one and has a lock of its own."""
        resv = vma_resv_map(vma)
        if resv is not None and is_vma_resv_set(vma, HPAGE_RESV_OWNER):
            resv.refs += 1
        if vma.flags & VM_MAYSHARE:
            lock = vma.private_data
            if lock is None or lock.vma is not vma:
                vma.private_data = None
                hugetlb_vma_lock_alloc(vma)

    def close(self, vma: VmArea) -> None:
        """The VMA is gone, and with it the promises it did not use."""
        hugetlb_vma_lock_free(vma)
        resv = vma_resv_map(vma)
        if resv is None or not is_vma_resv_set(vma, HPAGE_RESV_OWNER):
            return
        first, last = vma_hugecache_offset(vma, vma.start), vma_hugecache_offset(vma, vma.end)
        hugetlb_acct_memory(vma.mm.host, resv.count(first, last) - (last - first))
        resv_map_put(resv)


class _AOps(AddressSpaceOperations):
    """hugetlbfs_aops, and the mmap of its files."""

    is_hugetlb = True

    def mmap(self, mapping: AddressSpace, vma: VmArea) -> None:
        """hugetlbfs_file_mmap. KernelError: EINVAL, ENOMEM (no huge pages left)."""
        if vma.pgoff & 511:
            raise KernelError(EINVAL, f"page {vma.pgoff:#x} of the file is not the first of a huge page")
        # Huge pages never leave memory, so that locking them means nothing.
        vma.flags = (vma.flags | VM_HUGETLB | VM_DONTEXPAND) & ~VM_LOCKED_MASK
        length = vma.end - vma.start + (vma.pgoff << 12)
        mapping.i_rwsem.lock()
        ret = hugetlb_reserve_pages(mapping, vma.pgoff >> 9, length >> 21, vma, vma.flags)
        if not ret and vma.flags & VM_WRITE and mapping.i_size < length:
            mapping.i_size = length
        mapping.i_rwsem.unlock()
        if ret:
            raise KernelError(ENOMEM, f"{(vma.end - vma.start) >> 21} huge pages cannot be reserved")

    def fallocate(self, mapping: AddressSpace, mode: int, offset: int, length: int) -> None:
        """hugetlbfs_fallocate. KernelError: EINVAL, EOPNOTSUPP, ENOSPC (no huge page left)."""
        mapping.host.sched.advance(COST_SYSCALL)
        if offset < 0 or length <= 0:
            raise KernelError(EINVAL, f"[{offset:#x}, +{length:#x}) is no range of a file")
        punch = mode & FALLOC_FL_PUNCH_HOLE
        known = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        if mode & ~known or (punch and not mode & FALLOC_FL_KEEP_SIZE):
            raise KernelError(EOPNOTSUPP, f"fallocate mode {mode:#x}")
        if punch:
            _punch_hole(mapping, offset, offset + length)
            return
        with mapping.i_rwsem:
            _preallocate(mapping, offset >> 21, (offset + length + PMD_SIZE - 1) >> 21)
            if not mode & FALLOC_FL_KEEP_SIZE:
                mapping.i_size = max(mapping.i_size, offset + length)

    def set_size(self, mapping: AddressSpace, size: int) -> None:
        """hugetlbfs_setattr. KernelError(EINVAL): not whole huge pages."""
        mapping.host.sched.advance(COST_SYSCALL)
        if size < 0 or size & (PMD_SIZE - 1):
            raise KernelError(EINVAL, f"a file of huge pages cannot have {size:#x} bytes")
        with mapping.i_rwsem:
            _vmtruncate(mapping, size)

    def read_begin(self, mapping: AddressSpace, index: int) -> int:
        """hugetlbfs_read_iter: a hole reads as zeros and stays one."""
        pfn = filemap_lock_folio(mapping, index)
        return pfn if pfn >= 0 else NOT_CACHED

    def write_begin(self, mapping: AddressSpace, index: int, inside: int, length: int) -> int:
        """write(2) does not exist here."""
        raise KernelError(EINVAL, f"no write(2) on {mapping!r}")

    def evict_inode(self, mapping: AddressSpace) -> None:
        """hugetlbfs_evict_inode."""
        _remove_pages(mapping, 0, LONG_MAX)
        resv: ResvMap = mapping.private_data.resv_map
        resv_map_put(resv)


VM_OPS = _VmOps()
A_OPS = _AOps()


def hugetlb_file_setup(host: HostMm, name: str, size: int, *, noreserve: bool = True) -> AddressSpace:
    """A file of `size` bytes, whole huge pages, for whoever closes it with fput.

    Without `noreserve` its pages are promised at once. KernelError: EINVAL, ENOMEM.
    """
    host.sched.advance(COST_SYSCALL)
    if size <= 0 or size & (PMD_SIZE - 1):
        raise KernelError(EINVAL, f"a file of huge pages cannot have {size:#x} bytes")
    mapping = AddressSpace(host, name, size, A_OPS, VM_OPS)
    mapping.i_rwsem = RwSem(host.sched, "hugetlbfs_i_rwsem")
    mapping.i_mmap_rwsem = RwSem(host.sched, "hugetlbfs_i_mmap_rwsem")
    host.hugetlb_inodes += 1
    mapping.private_data = HugetlbInode(host.hugetlb_inodes, ResvMap(host))
    if hugetlb_reserve_pages(mapping, 0, size >> 21, None, VM_NORESERVE if noreserve else 0):
        fput(mapping)
        raise KernelError(ENOMEM, f"{size >> 21} huge pages cannot be reserved")
    return mapping


# -- holes ----------------------------------------------------------------------------------------
def _preallocate(mapping: AddressSpace, first: int, last: int) -> None:
    host = mapping.host
    # No process maps these pages: they are the file's.
    vma = VmArea(None, 0, last << 21, VM_HUGETLB | VM_MAYSHARE | VM_SHARED, 0)  # type: ignore[arg-type]
    vma.file = mapping
    for index in range(first, last):
        if host.sched.preempt:
            host.sched.point("cond_resched")
        mutex = host.hstate.fault_mutex(mapping.private_data.ino, index)
        mutex.lock()
        if index << 9 in mapping.i_pages:
            mutex.unlock()
            continue
        pfn = alloc_hugetlb_folio(vma, index << 21, nid=mapping.nid)
        if pfn < 0:
            mutex.unlock()
            raise KernelError(ENOSPC, f"no huge page for {index << 21:#x}")
        zero_huge_folio(host, pfn)
        added = hugetlb_add_to_page_cache(mapping, pfn, index)
        if added:
            host.pages.private[pfn] |= HPG_migratable
            folio_unlock(host, pfn)
        else:
            restore_reserve_on_error(vma, index << 21, pfn)
        put_page(host, pfn)
        mutex.unlock()


def _punch_hole(mapping: AddressSpace, start: int, end: int) -> None:
    first, last = -(-start // PMD_SIZE) * PMD_SIZE, end & ~(PMD_SIZE - 1)
    mapping.i_rwsem.lock()
    mapping.i_mmap_rwsem.lock()
    if start < first:
        _zero_partial(mapping, start, min(end, first))
    if last > first:
        _vmdelete_list(mapping, first >> 12, last >> 12)
    if end > last and end > first:
        _zero_partial(mapping, last, end)
    mapping.i_mmap_rwsem.unlock()
    if last > first:
        _remove_pages(mapping, first, last)
    mapping.i_rwsem.unlock()


def _zero_partial(mapping: AddressSpace, start: int, end: int) -> None:
    """hugetlbfs_zero_partial_page: [start, end) lies in one huge page."""
    host = mapping.host
    pfn = filemap_lock_folio(mapping, start >> 21 << 9)
    if pfn < 0:
        return
    base = (pfn << 12) - (start & ~(PMD_SIZE - 1))
    at = start
    while at < end:
        step = min(end, (at & ~0xFFF) + 4096) - at
        host.ram.write(base + at, bytes(step))
        at += step
    folio_unlock(host, pfn)
    put_page(host, pfn)


def _vmtruncate(mapping: AddressSpace, size: int) -> None:
    """hugetlb_vmtruncate."""
    mapping.i_size = size
    mapping.i_mmap_rwsem.lock()
    _vmdelete_list(mapping, size >> 12, 0)
    mapping.i_mmap_rwsem.unlock()
    _remove_pages(mapping, size, LONG_MAX)


# -- unmapping by the file ------------------------------------------------------------------------
def _span(vma: VmArea, first: int, last: int) -> tuple[int, int]:
    """vma_offset_start, vma_offset_end: where the VMA maps the pages [first, last); last 0: to its end."""
    start = vma.start + (max(0, first - vma.pgoff) << 12)
    return start, min(vma.end, vma.start + ((last - vma.pgoff) << 12)) if last else vma.end


def _vmdelete_list(mapping: AddressSpace, first: int, last: int) -> None:
    """hugetlb_vmdelete_list: VMAs whose lock somebody holds are left for the second pass."""
    for vma in vmas_of_pages(mapping, first, last - 1 if last else LONG_MAX):
        if hugetlb_vma_trylock_write(vma):
            unmap_hugepage_range(vma, *_span(vma, first, last))
            hugetlb_vma_unlock_write(vma)


def _maps_pfn(vma: VmArea, address: int, pfn: int) -> bool:
    pmd = hugetlb_walk(vma, address)
    entry = vma.mm.host.ram.u64[pmd >> 3] if pmd else 0
    return pte_present(entry) and pmd_pfn(entry) == pfn


def _unmap_file_folio(mapping: AddressSpace, pfn: int, index: int) -> None:
    """hugetlb_unmap_file_folio: no new mapping of it can come, as the fault mutex is held."""
    first, last = index << 9, index + 1 << 9
    held: RwSem | None = None
    while True:
        busy: RwSem | None = None
        mapping.i_mmap_rwsem.lock()
        for vma in vmas_of_pages(mapping, first, last - 1):
            start, end = _span(vma, first, last)
            if not _maps_pfn(vma, start, pfn):
                continue
            sema = hugetlb_vma_sema(vma)
            if sema is not None and sema is not held and not sema.trylock():
                busy = sema
                break
            unmap_hugepage_range(vma, start, end)
            if sema is not None and sema is not held:
                sema.unlock()
        mapping.i_mmap_rwsem.unlock()
        if held is not None:
            held.unlock()
        if busy is None:
            return
        # It comes before i_mmap_rwsem, so it is taken without that; by then its VMA may be gone.
        busy.lock()
        held = busy


def _remove_pages(mapping: AddressSpace, start: int, end: int) -> None:
    """remove_inode_hugepages: take the pages of [start, end) out of the file; end LONG_MAX: truncation."""
    host = mapping.host
    truncating = end == LONG_MAX
    freed = 0
    cached = sorted(small >> 9 for small in mapping.i_pages if not small & 511)
    for index in cached:
        if not start >> 21 <= index < end >> 21:
            continue
        pfn = mapping.i_pages[index << 9]
        get_page(host, pfn)
        mutex = host.hstate.fault_mutex(mapping.private_data.ino, index)
        mutex.lock()
        folio_lock(host, pfn)
        if host.pages.large_mapcount[pfn]:
            _unmap_file_folio(mapping, pfn, index)
        hugetlb_delete_from_page_cache(mapping, pfn)
        freed += 1
        if not truncating:
            hugetlb_unreserve_pages(mapping, index, index + 1, 1)
        folio_unlock(host, pfn)
        mutex.unlock()
        put_page(host, pfn)
        if host.sched.preempt:
            host.sched.point("cond_resched")
    if truncating:
        hugetlb_unreserve_pages(mapping, start >> 21, LONG_MAX, freed)
