"""Faults on files and shared memory, and taking a file's pages out of every process.

Source of truth: mm/memory.c (do_fault, do_read_fault, do_cow_fault, do_shared_fault, __do_fault,
do_fault_around, finish_fault, set_pte_range, do_page_mkwrite, wp_page_shared, finish_mkwrite_fault,
fault_dirty_shared_page, unmap_mapping_pages, unmap_mapping_folio); Linux 6.18.

A fault finds its page through the VMA's `ops`; which page that is, and whether it may be written, is the
file's business. What is mapped is the cached page itself, but for a write to a private mapping: that gets
a copy at once, without a bracket, since nothing was mapped.

    --param mm.fault_around_bytes=65536    what a read fault maps around it, if it is cached

Not modelled: preallocated page tables (they are made when needed, with the folio locked),
DAX, throttling of who dirties pages (balance_dirty_pages), file times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.address_space import vmas_of_pages
from host_mm.arch.x86.pgtable import mk_pte, pte_mkdirty, pte_mkuffd_wp, pte_mkyoung, pte_write
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.huge_memory_file import do_set_pmd
from host_mm.kernel.costs import COST_COPY_PAGE
from host_mm.memory import vmf_orig_pte_uffd_wp
from host_mm.memory_folio import folio_prealloc, maybe_mkwrite
from host_mm.memory_wp import wp_page_reuse
from host_mm.memory_zap import zap_page_range_single
from host_mm.mm_types import (
    FAULT_FLAG_MKWRITE,
    FAULT_FLAG_WRITE,
    MM_ANONPAGES,
    MMF_UNSTABLE,
    VM_FAULT_DONE_COW,
    VM_FAULT_ERROR,
    VM_FAULT_FALLBACK,
    VM_FAULT_HWPOISON,
    VM_FAULT_LOCKED,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_SHARED,
    VM_UFFD_MINOR,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
)
from host_mm.page import (
    PG_dirty,
    PG_hwpoison,
    folio_nr_pages,
    get_page,
    mm_counter,
    page_folio,
    put_page,
    set_page_dirty,
)
from host_mm.pgtable_generic import pte_alloc, pte_lockptr, pte_offset_map_lock, ptep_get, set_pte
from host_mm.rmap import folio_add_file_rmap_pte, folio_add_new_anon_rmap
from host_mm.rmap_anon_vma import anon_vma_prepare

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import VmFault

__all__ = [
    "do_fault", "finish_fault", "set_pte_range", "unmap_mapping_folio", "unmap_mapping_pages",
    "unmap_mapping_range", "wp_page_shared",
]

_NOT_MAPPED = VM_FAULT_ERROR | VM_FAULT_NOPAGE | VM_FAULT_RETRY
FAULT_AROUND_BYTES = 65536
PTRS_PER_PTE = 512
_ULONG_MAX = (1 << 64) - 1


# -- faults on empty entries ----------------------------------------------------------------------
def do_fault(vmf: VmFault) -> int:
    """Map the file's page, or a copy of it, at an empty entry; VM_FAULT_* bits.

    VM_FAULT_RETRY: mmap_lock may have been dropped. VM_FAULT_NOPAGE: somebody else was faster.
    """
    if vmf.vma.ops.fault is None:
        return _no_fault_handler(vmf)
    if not vmf.flags & FAULT_FLAG_WRITE:
        return _do_read_fault(vmf)
    if not vmf.vma.flags & VM_SHARED:
        return _do_cow_fault(vmf)
    return _do_shared_fault(vmf)


def _no_fault_handler(vmf: VmFault) -> int:
    """A mapping that its driver filled: a hole in it is an error, unless it is filled by now."""
    pte = pte_offset_map_lock(vmf.mm, vmf.pmd, vmf.address)
    if not pte:
        return VM_FAULT_SIGBUS
    ret = VM_FAULT_NOPAGE if ptep_get(vmf.mm, pte) else VM_FAULT_SIGBUS
    pte_lockptr(vmf.mm, pte).unlock()
    return ret


def _find_page(vmf: VmFault) -> int:
    """__do_fault: vmf.page with a reference and locked, or a reason why not."""
    host = vmf.mm.host
    ret: int = vmf.vma.ops.fault(vmf)
    if ret & (_NOT_MAPPED | VM_FAULT_DONE_COW):
        return ret
    head = page_folio(host.pages, vmf.page)
    if host.pages.flags[vmf.page] & PG_hwpoison:
        if ret & VM_FAULT_LOCKED:
            folio_unlock(host, head)
        put_page(host, vmf.page)
        vmf.page = -1
        return VM_FAULT_HWPOISON
    if not ret & VM_FAULT_LOCKED:
        folio_lock(host, head)
    return ret


def _fault_around_pages(host: HostMm) -> int:
    """fault_around_bytes_set: a power of two, of one page at least."""
    size = max(int(host.params.get("mm.fault_around_bytes", FAULT_AROUND_BYTES)), 4096)
    return 1 << (size.bit_length() - 13)


def _do_read_fault(vmf: VmFault) -> int:
    host = vmf.mm.host
    around = _fault_around_pages(host)
    uffd = VM_UFFD_WP | VM_UFFD_MINOR
    if vmf.vma.ops.map_pages is not None and around > 1 and not vmf.vma.flags & uffd:
        ret = _do_fault_around(vmf, around)
        if ret:
            return ret
    ret = _find_page(vmf)
    if ret & _NOT_MAPPED:
        return ret
    ret |= finish_fault(vmf)
    folio_unlock(host, page_folio(host.pages, vmf.page))
    if ret & _NOT_MAPPED:
        put_page(host, vmf.page)
    return ret


def _do_fault_around(vmf: VmFault, nr_pages: int) -> int:
    vma = vmf.vma
    pte_off = (vmf.address >> 12) & (PTRS_PER_PTE - 1)
    vma_off = vmf.pgoff - vma.pgoff
    from_pte = max(pte_off & ~(nr_pages - 1), pte_off - min(pte_off, vma_off))
    vma_pages = (vma.end - vma.start) >> 12
    to_pte = min(from_pte + nr_pages, PTRS_PER_PTE, pte_off + vma_pages - vma_off) - 1
    ret: int = vma.ops.map_pages(vmf, vmf.pgoff + from_pte - pte_off, vmf.pgoff + to_pte - pte_off)
    return ret


def _do_cow_fault(vmf: VmFault) -> int:
    host, vma = vmf.mm.host, vmf.vma
    anon_vma_prepare(vma)
    vmf.cow_page = folio_prealloc(host, vma, zero=False)
    if vmf.cow_page < 0:
        return VM_FAULT_OOM
    ret = _find_page(vmf)
    if ret & VM_FAULT_DONE_COW:
        return ret
    if not ret & _NOT_MAPPED:
        host.ram.copy_page(vmf.cow_page, vmf.page)
        host.sched.advance(COST_COPY_PAGE)
        ret |= finish_fault(vmf)
        folio_unlock(host, page_folio(host.pages, vmf.page))
        put_page(host, vmf.page)
    if ret & _NOT_MAPPED:
        put_page(host, vmf.cow_page)
    return ret


def _do_shared_fault(vmf: VmFault) -> int:
    host = vmf.mm.host
    ret = _find_page(vmf)
    if ret & _NOT_MAPPED:
        return ret
    head = page_folio(host.pages, vmf.page)
    if vmf.vma.ops.page_mkwrite is not None:
        folio_unlock(host, head)
        told = _do_page_mkwrite(vmf, head)
        if not told or told & (VM_FAULT_ERROR | VM_FAULT_NOPAGE):
            put_page(host, vmf.page)
            return told
    ret |= finish_fault(vmf)
    if ret & _NOT_MAPPED:
        folio_unlock(host, head)
        put_page(host, vmf.page)
        return ret
    _fault_dirty_shared_page(vmf, head)
    return ret


def _check_stable_address_space(vmf: VmFault) -> int:
    return VM_FAULT_SIGBUS if vmf.mm.flags & MMF_UNSTABLE else 0


def finish_fault(vmf: VmFault) -> int:
    """Map vmf.page (or the copy, vmf.cow_page); its folio is locked and the reference becomes the entry's."""
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    is_cow = vmf.flags & FAULT_FLAG_WRITE and not vma.flags & VM_SHARED
    page = vmf.cow_page if is_cow else vmf.page
    if not vma.flags & VM_SHARED and (ret := _check_stable_address_space(vmf)):
        return ret
    head = page_folio(host.pages, page)
    if not is_cow and folio_nr_pages(host.pages, head) > 1 and not ptep_get(mm, vmf.pmd):
        ret = do_set_pmd(vmf, head)
        if ret != VM_FAULT_FALLBACK:
            return ret
    if not pte_alloc(mm, vmf.pmd):
        return VM_FAULT_OOM
    pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if not pte:
        return VM_FAULT_NOPAGE
    vmf.pte = pte
    vmf.ptl = pte_lockptr(mm, pte)
    nr = _whole_folio(vmf, head, page)
    if nr > 1 and any(host.ram.u64[(pte >> 3) - (page - head) : (pte >> 3) - (page - head) + nr]):
        nr = 1
    if nr == 1 and ptep_get(mm, pte) != vmf.orig_pte:
        vmf.ptl.unlock()
        return VM_FAULT_NOPAGE
    first = head if nr > 1 else page
    if nr > 1:
        get_page(host, head, nr - 1)
    for at in range(first, first + nr):
        set_pte_range(vmf, at, vmf.address + ((at - page) << 12), pte + (at - page) * 8)
    mm.rss[MM_ANONPAGES if is_cow else mm_counter(host.pages, head)] += nr
    vmf.ptl.unlock()
    return 0


def _whole_folio(vmf: VmFault, head: int, page: int) -> int:
    """How many pages of a large folio one fault maps: all, unless file, VMA or page table end within it."""
    vma, host = vmf.vma, vmf.mm.host
    nr = folio_nr_pages(host.pages, head)
    if nr == 1 or vma.flags & (VM_UFFD_WP | VM_UFFD_MINOR | VM_UFFD_MISSING) or vma.file is None:
        return 1
    mapping: AddressSpace = vma.file
    if not mapping.a_ops.is_shmem and mapping.file_end < host.pages.index[head] + nr:
        return 1
    inside = page - head
    vma_off, pte_off = vmf.pgoff - vma.pgoff, (vmf.address >> 12) & (PTRS_PER_PTE - 1)
    if vma_off < inside or vma_off + nr - inside > (vma.end - vma.start) >> 12:
        return 1
    return 1 if pte_off < inside or pte_off + nr - inside > PTRS_PER_PTE else nr


def set_pte_range(vmf: VmFault, page: int, address: int, pte: int) -> None:
    """One entry of a fault or of what is mapped around it; the table is locked."""
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    write = vmf.flags & FAULT_FLAG_WRITE
    entry = pte_mkyoung(mk_pte(page, vma.page_prot))
    if write:
        entry = maybe_mkwrite(pte_mkdirty(entry), vma)
    elif pte_write(entry) and host.pages.flags[page_folio(host.pages, page)] & PG_dirty:
        entry = pte_mkdirty(entry)
    if vmf_orig_pte_uffd_wp(vmf):
        entry = pte_mkuffd_wp(entry)
    if write and not vma.flags & VM_SHARED:
        folio_add_new_anon_rmap(host, page, vma, address)
        host.lru.folio_add_lru_vma(page, vma)
    else:
        folio_add_file_rmap_pte(host, page, vma)
    set_pte(mm, address, pte, entry)


# -- writes to shared pages -----------------------------------------------------------------------
def _do_page_mkwrite(vmf: VmFault, head: int) -> int:
    """Tell the file that its page is written from now on; VM_FAULT_LOCKED, or 0: not its page any more."""
    host = vmf.mm.host
    saved = vmf.flags
    vmf.flags = FAULT_FLAG_WRITE | FAULT_FLAG_MKWRITE
    ret: int = vmf.vma.ops.page_mkwrite(vmf)
    vmf.flags = saved
    if ret & (VM_FAULT_ERROR | VM_FAULT_NOPAGE):
        return ret
    if not ret & VM_FAULT_LOCKED:
        folio_lock(host, head)
        if head not in host.pages.mapping:
            folio_unlock(host, head)
            return 0
        ret |= VM_FAULT_LOCKED
    return ret


def wp_page_shared(vmf: VmFault) -> int:
    """A write on a read-only entry of a shared mapping, its table locked; the lock is dropped on return."""
    host = vmf.mm.host
    page = vmf.page
    assert vmf.ptl is not None
    if page < 0 or vmf.vma.ops is None:
        # Frames without a struct page: nobody's dirty state to keep.
        wp_page_reuse(vmf)
        return 0
    get_page(host, page)
    head = page_folio(host.pages, page)
    if vmf.vma.ops.page_mkwrite is None:
        wp_page_reuse(vmf)
        folio_lock(host, head)
    else:
        vmf.ptl.unlock()
        ret = _do_page_mkwrite(vmf, head)
        if not ret or ret & (VM_FAULT_ERROR | VM_FAULT_NOPAGE):
            put_page(host, page)
            return ret
        if not _finish_mkwrite_fault(vmf):
            folio_unlock(host, head)
            put_page(host, page)
            return VM_FAULT_NOPAGE
    _fault_dirty_shared_page(vmf, head)
    put_page(host, page)
    return 0


def _finish_mkwrite_fault(vmf: VmFault) -> bool:
    mm = vmf.mm
    pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if not pte:
        return False
    vmf.pte = pte
    vmf.ptl = pte_lockptr(mm, pte)
    if ptep_get(mm, pte) != vmf.orig_pte:
        vmf.ptl.unlock()
        return False
    wp_page_reuse(vmf)
    return True


def _fault_dirty_shared_page(vmf: VmFault, head: int) -> None:
    host = vmf.mm.host
    set_page_dirty(host, head)
    folio_unlock(host, head)


# -- out of every process -------------------------------------------------------------------------
def unmap_mapping_pages(mapping: AddressSpace, start: int, nr: int, *, even_cows: bool) -> None:
    """Unmap pages [start, start+nr) of the file wherever they are mapped; nr 0: to the end.

    `even_cows`: private copies go too, as when a file is truncated. One bracket (CLEAR) per VMA.
    """
    last = start + nr - 1
    if last < start:
        last = _ULONG_MAX
    mapping.i_mmap_rwsem.read_lock()
    _unmap_mapping_range_tree(mapping, start, last, even_cows)
    mapping.i_mmap_rwsem.read_unlock()


def unmap_mapping_range(mapping: AddressSpace, begin: int, length: int, *, even_cows: bool) -> None:
    """unmap_mapping_pages by bytes: every page that has one of them; length 0: to the end."""
    unmap_mapping_pages(mapping, begin >> 12, (length + 4095) >> 12, even_cows=even_cows)


def unmap_mapping_folio(mapping: AddressSpace, head: int, nr: int) -> None:
    """Unmap a locked folio that truncation found still mapped; copies of it stay."""
    index = mapping.host.pages.index[head]
    mapping.i_mmap_rwsem.read_lock()
    _unmap_mapping_range_tree(mapping, index, index + nr - 1, False, drop_markers=True)
    mapping.i_mmap_rwsem.read_unlock()


def _unmap_mapping_range_tree(
    mapping: AddressSpace, first: int, last: int, even_cows: bool, *, drop_markers: bool = False
) -> None:
    for vma in vmas_of_pages(mapping, first, last):
        begin = max(first, vma.pgoff) - vma.pgoff
        end = min(last - vma.pgoff + 1, (vma.end - vma.start) >> 12)
        zap_page_range_single(
            vma, vma.start + (begin << 12), (end - begin) << 12, even_cows=even_cows,
            drop_markers=drop_markers,
        )
