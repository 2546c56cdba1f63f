"""Filling a registered range: UFFDIO_COPY, ZEROPAGE, CONTINUE and POISON.

Source of truth: mm/userfaultfd.c (mfill_atomic, mfill_atomic_pte_copy, mfill_atomic_pte_zeropage,
mfill_atomic_pte_continue, mfill_atomic_pte_poison, mfill_atomic_install_pte, uffd_mfill_lock), mm/shmem.c:
shmem_mfill_atomic_pte; Linux 6.18.

Nothing was mapped, so that nobody has to be told: no bracket, no flush. The page is made and filled first
and put in under the page-table lock if the entry is still empty. While mmap_lock is held the source may
not fault; if it would, the lock is dropped, the bytes are fetched with faults, and everything is looked up
again.

In a shared mapping of shared memory COPY and ZEROPAGE put the page into the file; CONTINUE maps the page
that is in the file already.

Not modelled: hugetlb, fatal signals; the destination is kept by mmap_lock, as in
a kernel without per-VMA locks.
"""

from __future__ import annotations

from errno import EAGAIN, EEXIST, EFAULT, EINVAL, EIO, ENOENT, ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import _PAGE_SPECIAL, mk_pte, pmd_table, pte_mkdirty, pte_mkuffd_wp, pte_mkwrite
from host_mm.arch.x86.swapops import PTE_MARKER_POISONED, make_pte_marker, pte_none_mostly
from host_mm.filemap import folio_unlock
from host_mm.filemap_cache import filemap_add_folio, filemap_page, filemap_remove_folio
from host_mm.kernel.costs import COST_COPY_PAGE
from host_mm.kernel.errors import KernelError
from host_mm.memory_folio import folio_alloc, folio_prealloc
from host_mm.mm_types import VM_SHARED, VM_UFFD_WP, VM_WRITE
from host_mm.page import PG_hwpoison, PG_swapbacked, mm_counter, page_folio, put_page
from host_mm.pgtable_generic import (
    pmd_alloc,
    pte_alloc,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_get,
    set_pte,
)
from host_mm.rmap import folio_add_file_rmap_pte, folio_add_new_anon_rmap
from host_mm.rmap_anon_vma import anon_vma_prepare
from host_mm.shmem import SGP_NOALLOC, shmem_get_folio
from host_mm.uaccess import copy_from_user, copy_from_user_nofault
from host_mm.userfaultfd_wp import vma_is_shmem

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.userfaultfd_k import UserfaultfdCtx

__all__ = [
    "MFILL_ATOMIC_CONTINUE", "MFILL_ATOMIC_COPY", "MFILL_ATOMIC_POISON", "MFILL_ATOMIC_ZEROPAGE",
    "mfill_atomic",
]

MFILL_ATOMIC_COPY = 0
MFILL_ATOMIC_ZEROPAGE = 1
MFILL_ATOMIC_CONTINUE = 2
MFILL_ATOMIC_POISON = 3


def mfill_atomic(ctx: UserfaultfdCtx, dst: int, src: int, length: int, mode: int, *, wp: bool = False) -> int:
    """Fill [dst, dst + length) by MFILL_ATOMIC_*; how many bytes were, or a negative errno if none.

    -ENOENT: not registered, or not in one mapping; -EEXIST: a page is there; -EINVAL: not this kind of
    mapping, or `wp` where it is not registered for it; -EFAULT: no source; -ENOMEM.
    """
    return _Fill(ctx, dst, src, length, mode, wp).run()


class _Fill:
    """One call of mfill_atomic. `page` is filled already but not mapped yet, -1: none."""

    __slots__ = ("ctx", "done", "dst", "length", "mm", "mode", "page", "src", "wp")

    def __init__(self, ctx: UserfaultfdCtx, dst: int, src: int, length: int, mode: int, wp: bool) -> None:
        self.ctx = ctx
        self.mm = ctx.mm
        self.dst = dst
        self.src = src
        self.length = length
        self.mode = mode
        self.wp = wp
        self.done = 0
        self.page = -1

    def run(self) -> int:
        """mfill_atomic."""
        mm = self.mm
        while True:
            mm.mmap_lock.read_lock()
            err = self._fill_locked()
            mm.mmap_lock.read_unlock()
            if err != -ENOENT or self.page < 0:
                break
            try:
                data = copy_from_user(mm.process, self.src + self.done, 4096)
                mm.host.ram.write(self.page << 12, data)
                mm.host.sched.advance(COST_COPY_PAGE)
            except KernelError:
                err = -EFAULT
                break
        if self.page >= 0:
            put_page(mm.host, self.page)
        return self.done or err

    def _fill_locked(self) -> int:
        mm = self.mm
        vma = mm.vma_lookup(self.dst)
        if vma is None:
            return -ENOENT
        if not vma.flags & VM_SHARED:
            anon_vma_prepare(vma)
        if self.dst + self.length > vma.end or vma.userfaultfd_ctx is None:
            return -ENOENT
        shmem = vma_is_shmem(vma)
        if self.wp and not vma.flags & VM_UFFD_WP:
            return -EINVAL
        if not shmem and (vma.ops is not None or self.mode == MFILL_ATOMIC_CONTINUE):
            return -EINVAL
        sched = mm.host.sched
        while self.done < self.length:
            address = self.dst + self.done
            pmd = pmd_alloc(mm, address)
            if not pmd or not pte_alloc(mm, pmd):
                return -ENOMEM
            if not pmd_table(mm.host.ram.u64[pmd >> 3]):
                # A huge page is there.
                return -EEXIST
            err = self._fill_pte(vma, pmd, address)
            if sched.preempt:
                sched.point("cond_resched")
            if err:
                return err
            self.done += 4096
        return 0

    def _fill_pte(self, vma: VmArea, pmd: int, address: int) -> int:
        if self.mode == MFILL_ATOMIC_CONTINUE:
            return self._fill_continue(vma, pmd, address)
        if self.mode != MFILL_ATOMIC_POISON and vma.flags & VM_SHARED:
            return self._fill_shared(vma, pmd, address)
        if self.mode == MFILL_ATOMIC_ZEROPAGE:
            entry = mk_pte(vma.mm.host.zero_pfn, vma.page_prot) | _PAGE_SPECIAL
            return _set_if_empty(vma.mm, pmd, address, entry, over_marker=False)
        if self.mode == MFILL_ATOMIC_POISON:
            marker = make_pte_marker(PTE_MARKER_POISONED)
            return _set_if_empty(vma.mm, pmd, address, marker, over_marker=True)
        return self._fill_copy(vma, pmd, address)

    def _new_page(self, vma: VmArea) -> int:
        """A filled page; -ENOENT with `page` set: the source must be faulted in first."""
        host = self.mm.host
        pfn, self.page = self.page, -1
        if pfn >= 0:
            return pfn
        zero = self.mode == MFILL_ATOMIC_ZEROPAGE
        # A page of a file is charged when the file gets it.
        alloc = folio_alloc if vma.flags & VM_SHARED else folio_prealloc
        pfn = alloc(host, vma, zero=zero)
        if pfn < 0:
            return -ENOMEM
        if not zero:
            data = copy_from_user_nofault(self.mm.process, self.src + self.done, 4096)
            if data is None:
                self.page = pfn
                return -ENOENT
            host.ram.write(pfn << 12, data)
            host.sched.advance(COST_COPY_PAGE)
        return pfn

    def _fill_copy(self, vma: VmArea, pmd: int, address: int) -> int:
        """mfill_atomic_pte_copy."""
        pfn = self._new_page(vma)
        if pfn < 0:
            return pfn
        err = _install_pte(vma, pmd, address, pfn, self.wp)
        if err:
            put_page(self.mm.host, pfn)
        return err

    def _fill_shared(self, vma: VmArea, pmd: int, address: int) -> int:
        """shmem_mfill_atomic_pte: into the file first, then into the entry."""
        host = self.mm.host
        mapping = vma.file
        index = vma.page_index(address)
        pfn = self._new_page(vma)
        if pfn < 0:
            return pfn
        host.pages.flags[pfn] |= PG_swapbacked
        err = -EFAULT if index << 12 >= mapping.i_size else filemap_add_folio(mapping, pfn, index, self.mm)
        if err:
            put_page(host, pfn)
            return err
        err = _install_pte(vma, pmd, address, pfn, self.wp)
        if err:
            filemap_remove_folio(mapping, pfn)
        folio_unlock(host, pfn)
        if err:
            put_page(host, pfn)
        return err

    def _fill_continue(self, vma: VmArea, pmd: int, address: int) -> int:
        """mfill_atomic_pte_continue: the page must be in the file, or in its swap."""
        host = self.mm.host
        index = vma.page_index(address)
        head = shmem_get_folio(vma.file, index, SGP_NOALLOC)
        if head < 0:
            return -EFAULT if head == -ENOENT else head
        page = filemap_page(vma.file, head, index)
        err = -EIO if host.pages.flags[page] & PG_hwpoison else _install_pte(vma, pmd, address, page, self.wp)
        folio_unlock(host, head)
        if err:
            put_page(host, head)
        return err


def _set_if_empty(mm: MmStruct, pmd: int, address: int, entry: int, *, over_marker: bool) -> int:
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return -EAGAIN
    old = ptep_get(mm, pte)
    free = pte_none_mostly(old) if over_marker else not old
    if free:
        set_pte(mm, address, pte, entry)
    pte_lockptr(mm, pte).unlock()
    return 0 if free else -EEXIST


def _install_pte(vma: VmArea, pmd: int, address: int, pfn: int, wp: bool) -> int:
    """mfill_atomic_install_pte: the caller's reference becomes the entry's. A page of a file is mapped as
    such, a fresh one as anonymous."""
    mm = vma.mm
    host = mm.host
    in_cache = vma.file is not None and host.pages.mapping.get(page_folio(host.pages, pfn)) is vma.file
    entry = pte_mkdirty(mk_pte(pfn, vma.page_prot))
    if vma.flags & VM_WRITE and (vma.flags & VM_SHARED or not in_cache):
        entry = pte_mkwrite(entry)
    if wp:
        entry = pte_mkuffd_wp(entry)
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return -EAGAIN
    ptl = pte_lockptr(mm, pte)
    if vma.file is not None and vma.page_index(address) << 12 >= vma.file.i_size:
        ptl.unlock()
        return -EFAULT
    # A marker may be replaced: the range can have been write-protected before the page was there.
    if not pte_none_mostly(ptep_get(mm, pte)):
        ptl.unlock()
        return -EEXIST
    if in_cache:
        folio_add_file_rmap_pte(host, pfn, vma)
    else:
        folio_add_new_anon_rmap(host, pfn, vma, address)
        host.lru.folio_add_lru_vma(pfn, vma)
    mm.rss[mm_counter(host.pages, page_folio(host.pages, pfn))] += 1
    set_pte(mm, address, pte, entry)
    ptl.unlock()
    return 0
