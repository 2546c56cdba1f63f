"""Faults on huge pages.

Source of truth: mm/hugetlb.c (hugetlb_fault, hugetlb_no_page, hugetlb_wp), mm/migrate.c:
migration_entry_wait_huge; Linux 6.18.

A mutex by file and index keeps two tasks from taking a page each for one place, when there may be only one
left. A private page that is written is copied unless its entry is the only one; for the owner, who was
promised that his faults succeed, the page is taken from his children if there is none to copy to.

No page and no promise of one is VM_FAULT_SIGBUS, as is an access beyond the end of the file.

Not modelled: userfaultfd, poisoned pages, pte markers, per-VMA locks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import PMD_SIZE, pmd_pfn, pte_mkdirty, pte_mkyoung, pte_present, pte_write
from host_mm.arch.x86.swapops import SWP_PFN_MASK, is_migration_entry, pte_to_swp_entry, swp_offset
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock, folio_wait_locked, folio_wait_unlock
from host_mm.filemap_cache import filemap_lock_folio
from host_mm.hugetlb import HPG_migratable
from host_mm.hugetlb_resv import (
    HPAGE_RESV_OWNER,
    HPAGE_RESV_UNMAPPED,
    alloc_hugetlb_folio,
    is_vma_resv_set,
    restore_reserve_on_error,
    vma_end_reservation,
    vma_hugecache_offset,
    vma_needs_reservation,
)
from host_mm.hugetlb_rmap import (
    copy_huge_folio,
    hugetlb_add_file_rmap,
    hugetlb_add_new_anon_rmap,
    hugetlb_add_to_page_cache,
    hugetlb_remove_rmap,
    make_huge_pte,
    set_huge_ptep_writable,
    zero_huge_folio,
)
from host_mm.hugetlb_share import (
    flush_hugetlb_tlb_range,
    huge_pte_alloc,
    hugetlb_vma_lock_read,
    hugetlb_vma_unlock_read,
    hugetlb_walk,
)
from host_mm.hugetlb_unmap import unmap_ref_private
from host_mm.mm_types import (
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_MAYSHARE,
    VM_SHARED,
    VM_WRITE,
    VmFault,
)
from host_mm.page import PG_anon, PG_anon_exclusive, get_page, put_page
from host_mm.pgtable_generic import pmd_lock, pmd_lockptr, set_pmd
from host_mm.rmap import folio_move_anon_rmap
from host_mm.rmap_anon_vma import anon_vma_prepare

if TYPE_CHECKING:
    from host_mm.kernel.locks import Mutex
    from host_mm.mm_types import VmArea

__all__ = ["hugetlb_fault"]


def hugetlb_fault(vma: VmArea, address: int, flags: int) -> tuple[str, int]:
    """Resolve a fault on a huge-page VMA under mmap_lock: (what was done, VM_FAULT_* bits)."""
    vmf = VmFault(vma, address & ~(PMD_SIZE - 1), flags)
    vmf.pgoff = vma_hugecache_offset(vma, vmf.address)
    mutex = vma.mm.host.hstate.fault_mutex(vma.file.private_data.ino, vmf.pgoff)
    mutex.lock()
    # From here until it is dropped no table that the VMA shares can be unhooked.
    hugetlb_vma_lock_read(vma)
    vmf.pmd = huge_pte_alloc(vma, vmf.address)
    waiting = -1
    if not vmf.pmd:
        kind, ret = "table", VM_FAULT_OOM
    else:
        vmf.orig_pte = vma.mm.host.ram.u64[vmf.pmd >> 3]
        if not vmf.orig_pte:
            kind, ret = _no_page(vmf, mutex)
        elif not pte_present(vmf.orig_pte):
            mutex.unlock()
            return _migration_entry_wait(vmf)
        else:
            kind, ret, waiting = _mapped(vmf, mutex)
    hugetlb_vma_unlock_read(vma)
    mutex.unlock()
    if waiting >= 0:
        # The folio lock cannot be waited for under the mutex: its holder may want that. The fault repeats.
        folio_wait_locked(vma.mm.host, waiting)
    return kind, ret


def _migration_entry_wait(vmf: VmFault) -> tuple[str, int]:
    """migration_entry_wait_huge; the VMA's lock keeps the entry's table."""
    host = vmf.mm.host
    lock = pmd_lock(vmf.mm, vmf.pmd)
    entry = host.ram.u64[vmf.pmd >> 3]
    swp = pte_to_swp_entry(entry) if entry and not pte_present(entry) else 0
    lock.unlock()
    hugetlb_vma_unlock_read(vmf.vma)
    if swp and is_migration_entry(swp):
        folio_wait_unlock(host, swp_offset(swp) & SWP_PFN_MASK)
    return "migration", 0


def _mapped(vmf: VmFault, mutex: Mutex) -> tuple[str, int, int]:
    """A present entry: (what was done, VM_FAULT_*, the folio whose lock to wait for or -1)."""
    vma, host = vmf.vma, vmf.mm.host
    wants = vmf.flags & (FAULT_FLAG_WRITE | FAULT_FLAG_UNSHARE)
    if wants and not vma.flags & VM_MAYSHARE and not pte_write(vmf.orig_pte):
        _look_at_reservation(vmf)
    vmf.ptl = pmd_lock(vmf.mm, vmf.pmd)
    kind, ret, waiting = "spurious", 0, -1
    entry = vmf.orig_pte
    if host.ram.u64[vmf.pmd >> 3] == entry:
        if wants and not pte_write(entry):
            pfn = pmd_pfn(entry)
            anon = host.pages.flags[pfn] & PG_anon
            if anon and not folio_trylock(host, pfn):
                waiting = pfn
            else:
                get_page(host, pfn)
                kind, ret = _wp(vmf, mutex)
                if anon:
                    folio_unlock(host, pfn)
                vmf.ptl.unlock()
                put_page(host, pfn)
                return kind, ret, -1
        elif vmf.flags & FAULT_FLAG_WRITE:
            entry = pte_mkyoung(pte_mkdirty(entry))
            if entry != vmf.orig_pte:
                kind = "access-flags"
                set_pmd(vmf.mm, vmf.address, vmf.pmd, entry)
    vmf.ptl.unlock()
    return kind, ret, waiting


def _look_at_reservation(vmf: VmFault) -> None:
    """What the copy will need is allocated before the page-table lock is taken."""
    vma_needs_reservation(vmf.vma, vmf.address)
    vma_end_reservation(vmf.vma, vmf.address)


def _stable(vmf: VmFault) -> bool:
    """hugetlb_pte_stable: migration clears and sets entries under their lock, without the mutex."""
    lock = pmd_lock(vmf.mm, vmf.pmd)
    same = vmf.mm.host.ram.u64[vmf.pmd >> 3] == vmf.orig_pte
    lock.unlock()
    return same


# -- an empty entry -------------------------------------------------------------------------------
def _no_page(vmf: VmFault, mutex: Mutex) -> tuple[str, int]:
    """hugetlb_no_page, but that the caller drops the locks."""
    vma, host = vmf.vma, vmf.mm.host
    mapping = vma.file
    if is_vma_resv_set(vma, HPAGE_RESV_UNMAPPED):
        return "unmapped-by-owner", VM_FAULT_SIGBUS
    pfn = filemap_lock_folio(mapping, vmf.pgoff << 9)
    fresh = pfn < 0
    if fresh:
        if vmf.pgoff >= mapping.i_size >> 21:
            return "beyond-eof", VM_FAULT_SIGBUS
        if not vma.flags & VM_MAYSHARE:
            anon_vma_prepare(vma)
        pfn = alloc_hugetlb_folio(vma, vmf.address)
        if pfn < 0:
            return "no-huge-page", VM_FAULT_SIGBUS if _stable(vmf) else 0
        zero_huge_folio(host, pfn)
        if not vma.flags & VM_MAYSHARE:
            folio_lock(host, pfn)
        elif not hugetlb_add_to_page_cache(mapping, pfn, vmf.pgoff):
            restore_reserve_on_error(vma, vmf.address, pfn)
            put_page(host, pfn)
            return "file", VM_FAULT_SIGBUS
    return _map_page(vmf, mutex, pfn, fresh)


def _map_page(vmf: VmFault, mutex: Mutex, pfn: int, fresh: bool) -> tuple[str, int]:
    """Map the locked page, and if the write needs it copy it at once."""
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    anon = fresh and not vma.flags & VM_MAYSHARE
    copy = bool(vmf.flags & FAULT_FLAG_WRITE) and not vma.flags & VM_SHARED
    if copy:
        _look_at_reservation(vmf)
    vmf.ptl = pmd_lock(mm, vmf.pmd)
    if host.ram.u64[vmf.pmd >> 3] != vmf.orig_pte:
        vmf.ptl.unlock()
        if anon:
            restore_reserve_on_error(vma, vmf.address, pfn)
        folio_unlock(host, pfn)
        put_page(host, pfn)
        return "spurious", 0
    if anon:
        hugetlb_add_new_anon_rmap(host, pfn, vma, vmf.address)
    else:
        hugetlb_add_file_rmap(host, pfn)
    entry = make_huge_pte(vma, pfn, try_mkwrite=bool(vma.flags & VM_SHARED))
    set_pmd(mm, vmf.address, vmf.pmd, entry)
    kind, ret = "hugetlb-anon" if anon else "hugetlb-file", 0
    locked = True
    if copy:
        if not anon:
            # While the copy sleeps, somebody may want the file's page.
            folio_unlock(host, pfn)
            locked = False
        cow, ret = _wp(vmf, mutex)
        kind = kind if anon else cow
    vmf.ptl.unlock()
    if fresh:
        host.pages.private[pfn] |= HPG_migratable
    if locked:
        folio_unlock(host, pfn)
    return kind, ret


# -- writes on read-only entries ------------------------------------------------------------------
def _wp(vmf: VmFault, mutex: Mutex) -> tuple[str, int]:
    """hugetlb_wp: the entry is locked, before and after, and the old page if it is private."""
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    pages = host.pages
    unshare = bool(vmf.flags & FAULT_FLAG_UNSHARE)
    assert vmf.ptl is not None
    entry = host.ram.u64[vmf.pmd >> 3]
    if vma.flags & VM_MAYSHARE:
        set_huge_ptep_writable(vma, vmf.address, vmf.pmd)
        return "hugetlb-shared", 0
    old = pmd_pfn(entry)
    while True:
        if pages.large_mapcount[old] == 1 and pages.flags[old] & PG_anon:
            if not pages.flags[old] & PG_anon_exclusive:
                folio_move_anon_rmap(host, old, vma)
                pages.flags[old] |= PG_anon_exclusive
            if not unshare and vma.flags & VM_WRITE:
                set_huge_ptep_writable(vma, vmf.address, vmf.pmd)
            return "hugetlb-reuse", 0
        owner = is_vma_resv_set(vma, HPAGE_RESV_OWNER) and bool(pages.flags[old] & PG_anon)
        get_page(host, old)
        vmf.ptl.unlock()
        new = alloc_hugetlb_folio(vma, vmf.address, cow_from_owner=owner)
        if new >= 0:
            return _copy(vmf, entry, old, new)
        put_page(host, old)
        if not owner:
            vmf.ptl.lock()
            return "no-huge-page", VM_FAULT_SIGBUS
        if not _take_from_children(vmf, mutex, old, entry):
            return "spurious", 0


def _take_from_children(vmf: VmFault, mutex: Mutex, old: int, entry: int) -> bool:
    """Unmap the page elsewhere, with the fault's locks dropped meanwhile; false: the entry changed."""
    vma = vmf.vma
    hugetlb_vma_unlock_read(vma)
    mutex.unlock()
    unmap_ref_private(vma, old, vmf.address)
    mutex.lock()
    hugetlb_vma_lock_read(vma)
    assert vmf.ptl is not None
    vmf.ptl.lock()
    vmf.pmd = hugetlb_walk(vma, vmf.address)
    return bool(vmf.pmd) and vma.mm.host.ram.u64[vmf.pmd >> 3] == entry


def _copy(vmf: VmFault, entry: int, old: int, new: int) -> tuple[str, int]:
    """The copy, made before the bracket, and the change of the entry inside it."""
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    unshare = bool(vmf.flags & FAULT_FLAG_UNSHARE)
    anon_vma_prepare(vma)
    copy_huge_folio(host, new, old)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, vmf.address, vmf.address + PMD_SIZE,
        order=mmu_notifier.ORDER_UNDER_PTL,
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    vmf.ptl = pmd_lock(mm, vmf.pmd)
    vmf.pmd = hugetlb_walk(vma, vmf.address)
    copied = bool(vmf.pmd) and host.ram.u64[vmf.pmd >> 3] == entry
    if copied:
        set_pmd(mm, vmf.address, vmf.pmd, 0)
        flush_hugetlb_tlb_range(vma, vmf.address, vmf.address + PMD_SIZE)
        if host.profile.invalidate_range:
            mmu_notifier.mmu_notifier_invalidate_range(mm, vmf.address, vmf.address + PMD_SIZE)
        hugetlb_remove_rmap(host, old)
        hugetlb_add_new_anon_rmap(host, new, vma, vmf.address)
        set_pmd(mm, vmf.address, vmf.pmd, make_huge_pte(vma, new, try_mkwrite=not unshare))
        host.pages.private[new] |= HPG_migratable
    vmf.ptl.unlock()
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    if copied:
        # The reference that the old entry held, given up with it.
        put_page(host, old)
    else:
        restore_reserve_on_error(vma, vmf.address, new)
        put_page(host, new)
    put_page(host, old)
    vmf.ptl = pmd_lockptr(mm, vmf.pmd) if vmf.pmd else vmf.ptl
    vmf.ptl.lock()
    return "hugetlb-cow" if copied else "spurious", 0
