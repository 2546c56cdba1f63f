"""Faults on entries that are not present: swap-in through the swap cache, and migration entries.

Source of truth: mm/memory.c: do_swap_page, should_try_to_free_swap; mm/migrate.c:
migration_entry_wait (Linux 6.18); mm/swapfile.c: reuse_swap_page for profiles without
PG_anon_exclusive (Linux 5.10).

The entry's exclusive marker, or being the only holder of the page, makes the new entry writable
even on a read fault. A folio that is still under writeback is mapped like any other: what is
written then makes the entry dirty, and the folio is written out again.

From a synchronous device a page that only this entry holds is read past the swap cache: the slot is
claimed as for the cache, so that nobody else reads it, and given back once the page is mapped.

Not modelled: hardware-poison entries beyond an error, per-VMA locks, large folios.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_SOFT_DIRTY,
    mk_pte,
    pte_mkdirty,
    pte_mksoft_dirty,
    pte_mkuffd_wp,
    pte_mkwrite,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_EXCLUSIVE,
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    SWP_HWPOISON,
    SWP_PFN_MASK,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_swap_pte,
    non_swap_entry,
    pte_to_swp_entry,
    swp_offset,
    swp_type,
)
from host_mm.filemap import folio_lock_or_retry, folio_unlock, folio_wait_unlock
from host_mm.ksm_break import ksm_might_need_to_copy
from host_mm.memory_device import migrate_to_ram, remove_device_exclusive_entry
from host_mm.memory_folio import folio_alloc
from host_mm.mm_types import (
    FAULT_FLAG_WRITE,
    MM_ANONPAGES,
    MM_SWAPENTS,
    VM_FAULT_ERROR,
    VM_FAULT_HWPOISON,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_LOCKED,
    VM_SOFTDIRTY,
    VM_WRITE,
)
from host_mm.page import (
    PG_anon,
    PG_hwpoison,
    PG_ksm,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_swapbacked,
    PG_swapcache,
    PG_uptodate,
    PG_writeback,
    put_page,
    set_page_dirty,
)
from host_mm.page_io import swap_read_folio
from host_mm.pgtable_generic import pte_lockptr, pte_offset_map_lock, ptep_get, set_pte
from host_mm.rmap import folio_add_anon_rmap_pte, folio_add_new_anon_rmap
from host_mm.swap_readahead import swap_update_readahead, swapin_readahead
from host_mm.swap_state import folio_free_swap, read_swap_cache, swap_cache_del_folio, swap_cache_get_folio
from host_mm.userfaultfd_k import userfaultfd_pte_wp
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea, VmFault
    from host_mm.swapfile import SwapInfo

__all__ = ["TRACEPOINTS", "do_swap_page", "migration_entry_wait", "read_swap_cache_async"]

_JIFFY = 1_000_000

SWAP_IN = Tracepoint(
    "refault", "swap_in", ("pid", "address", "pfn", "slot", "major", "exclusive", "writable"),
    lambda pid, address, pfn, slot, major, exclusive, writable: (
        f"pid {pid} addr {address:#x} pfn {pfn:#x} slot {slot:#x}"
        + (" major" if major else "") + (" exclusive" if exclusive else "")
        + (" writable" if writable else "")
    ),
    doc="A swap entry becomes a present entry again.",
)
MIGRATION_WAIT = Tracepoint(
    "refault", "migration_entry_wait", ("pid", "address", "pfn"),
    lambda pid, address, pfn: f"pid {pid} addr {address:#x} pfn {pfn:#x}",
    doc="A fault waits until the page under migration has arrived.",
)
TRACEPOINTS = (SWAP_IN, MIGRATION_WAIT)


def do_swap_page(vmf: VmFault) -> int:
    """Handle a fault on a swap or migration entry, `vmf.orig_pte`; returns VM_FAULT_* bits.

    mmap_lock is held for reading, the page table is not locked. When VM_FAULT_RETRY comes back,
    mmap_lock was dropped unless the fault had FAULT_FLAG_RETRY_NOWAIT.
    """
    mm = vmf.mm
    host = mm.host
    entry = pte_to_swp_entry(vmf.orig_pte)
    if non_swap_entry(entry):
        return _non_swap_entry(vmf, entry)
    swap = host.swap
    assert swap is not None
    ret = 0
    pfn = swap_cache_get_folio(host, entry)
    if pfn >= 0:
        if host.pages.flags[pfn] & PG_hwpoison:
            # Kept for this: whoever wants the bytes must not get older ones.
            put_page(host, pfn)
            return VM_FAULT_HWPOISON
        swap_update_readahead(host, pfn, vmf.vma, vmf.address)
    else:
        if swap.zram is not None and swap.swap_count(swp_offset(entry)) == 1:
            return _skip_swapcache(vmf, swap, entry)
        pfn = swapin_readahead(vmf, entry, mm.process.home_node)
        if pfn < 0:
            return _nothing_read(vmf)
        ret = VM_FAULT_MAJOR
        host.vmstat["pgmajfault"] += 1
    ret |= folio_lock_or_retry(host, pfn, vmf)
    if ret & VM_FAULT_RETRY:
        put_page(host, pfn)
        return ret
    return _map_locked(vmf, pfn, entry, ret)


def _skip_swapcache(vmf: VmFault, swap: SwapInfo, entry: int) -> int:
    """The page comes straight from a synchronous device; SWAP_HAS_CACHE keeps everybody else out."""
    host = vmf.mm.host
    pfn = folio_alloc(host, vmf.vma, zero=False)
    if pfn < 0:
        return _nothing_read(vmf)
    if host.memcg.groups and host.memcg.swapin_charge(pfn, swp_offset(entry), vmf.mm):
        put_page(host, pfn)
        return _nothing_read(vmf)
    host.pages.flags[pfn] = host.pages.flags[pfn] & ~PG_uptodate | PG_locked | PG_swapbacked
    if swap.swapcache_prepare(entry):
        folio_unlock(host, pfn)
        put_page(host, pfn)
        host.sched.sleep(_JIFFY)
        return 0
    host.lru.folio_add_lru(pfn)
    host.pages.private[pfn] = entry
    swap_read_folio(host, pfn)
    host.pages.private[pfn] = 0
    host.vmstat["pgmajfault"] += 1
    ret = VM_FAULT_MAJOR | folio_lock_or_retry(host, pfn, vmf)
    if ret & VM_FAULT_RETRY:
        put_page(host, pfn)
    else:
        ret = _map_locked(vmf, pfn, entry, ret, direct=True)
    swap.put_cache(swp_offset(entry))
    return ret


def read_swap_cache_async(host: HostMm, entry: int) -> None:
    """MADV_WILLNEED: start reading a swap entry into the swap cache; nobody waits for it."""
    pfn = read_swap_cache(host, entry, 0, swap_read_folio)
    if pfn >= 0:
        put_page(host, pfn)


def _nothing_read(vmf: VmFault) -> int:
    # No memory, or somebody else faulted the page in and the entry is gone.
    pte = pte_offset_map_lock(vmf.mm, vmf.pmd, vmf.address)
    if not pte:
        return 0
    same = ptep_get(vmf.mm, pte) == vmf.orig_pte
    pte_lockptr(vmf.mm, pte).unlock()
    return VM_FAULT_OOM if same else 0


def _give_up(vmf: VmFault, swapcache: int, ret: int, pfn: int = -1) -> int:
    host = vmf.mm.host
    if pfn not in (-1, swapcache):
        folio_unlock(host, pfn)
        put_page(host, pfn)
    folio_unlock(host, swapcache)
    put_page(host, swapcache)
    return ret


def _map_locked(vmf: VmFault, swapcache: int, entry: int, ret: int, *, direct: bool = False) -> int:
    """From the locked folio to the present entry; the reference becomes the entry's.

    `direct`: the folio is a fresh one that never was in the swap cache.
    """
    mm = vmf.mm
    host = mm.host
    pages = host.pages
    flags = pages.flags
    # The folio may have left the swap cache, and its slot another owner, while it was not locked.
    if not direct and (not flags[swapcache] & PG_swapcache or pages.private[swapcache] != entry):
        return _give_up(vmf, swapcache, ret)
    pfn = swapcache if direct else ksm_might_need_to_copy(host, swapcache, vmf.vma, vmf.address)
    if pfn < 0:
        return _give_up(vmf, swapcache, VM_FAULT_OOM)
    copied = pfn != swapcache
    if vmf.flags & FAULT_FLAG_WRITE and not copied and not flags[pfn] & (PG_ksm | PG_lru):
        host.lru.lru_add_drain()
    pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if not pte:
        return _give_up(vmf, swapcache, ret, pfn)
    ptl = vmf.ptl = pte_lockptr(mm, pte)
    vmf.pte = pte
    if ptep_get(mm, pte) != vmf.orig_pte or not flags[pfn] & PG_uptodate:
        same = ptep_get(mm, pte) == vmf.orig_pte
        ptl.unlock()
        return _give_up(vmf, swapcache, VM_FAULT_SIGBUS if same else ret, pfn)
    exclusive, new = _new_entry(vmf, pfn, entry, fresh=copied or direct)
    if copied:
        folio_add_new_anon_rmap(host, pfn, vmf.vma, vmf.address)
        host.lru.folio_add_lru_vma(pfn, vmf.vma)
    elif flags[pfn] & PG_anon:
        folio_add_anon_rmap_pte(host, pfn, vmf.vma, vmf.address, exclusive=exclusive)
    else:
        folio_add_new_anon_rmap(host, pfn, vmf.vma, vmf.address, exclusive=exclusive)
    set_pte(mm, vmf.address, pte, new)
    vmf.orig_pte = new
    if (t := host.trace.swap_in) is not None:
        pid = mm.process.pid if mm.process is not None else 0
        t(pid, vmf.address, pfn, swp_offset(entry), bool(ret & VM_FAULT_MAJOR), exclusive, bool(new & 2))
    folio_unlock(host, pfn)
    if copied:
        folio_unlock(host, swapcache)
        put_page(host, swapcache)
    if vmf.flags & FAULT_FLAG_WRITE:
        ret |= host.do_wp_page(vmf)[1]
        return ret & VM_FAULT_ERROR if ret & VM_FAULT_ERROR else ret
    ptl.unlock()
    return ret


def _new_entry(vmf: VmFault, pfn: int, entry: int, *, fresh: bool) -> tuple[bool, int]:
    """Give the swap entry up and decide what the present one may: (exclusive, pte).

    A fresh page that nobody else can know is exclusive, a KSM page never is, nor is one that a device
    is reading which must not change meanwhile (SWP_STABLE_WRITES).
    """
    mm = vmf.mm
    host = mm.host
    vma = vmf.vma
    old = vmf.orig_pte
    assert host.swap is not None
    ksm = bool(host.pages.flags[pfn] & PG_ksm)
    exclusive = fresh or bool(old & _PAGE_SWP_EXCLUSIVE)
    if not fresh and host.swap.zram is not None and host.pages.flags[pfn] & PG_writeback:
        exclusive = False
    reuse = False
    if not host.profile.anon_exclusive and vmf.flags & FAULT_FLAG_WRITE:
        reuse = fresh or _reuse_swap_page(host, pfn, entry)
    host.swap.swap_free(entry)
    if _should_try_to_free_swap(host, pfn, vma, vmf.flags):
        folio_free_swap(host, pfn)
    mm.rss[MM_ANONPAGES] += 1
    mm.rss[MM_SWAPENTS] -= 1
    pte = mk_pte(pfn, vma.page_prot)
    if old & _PAGE_SWP_SOFT_DIRTY:
        pte = pte_mksoft_dirty(pte)
    if old & _PAGE_SWP_UFFD_WP:
        pte = pte_mkuffd_wp(pte)
    if host.profile.anon_exclusive:
        reuse = not ksm and (exclusive or host.pages.refcount[pfn] == 1)
    tracked = userfaultfd_pte_wp(vma, pte) or _needs_soft_dirty_wp(vma, pte)
    if reuse and vma.flags & VM_WRITE and not tracked:
        pte = pte_mkwrite(pte)
        if vmf.flags & FAULT_FLAG_WRITE:
            pte = pte_mkdirty(pte)
            vmf.flags &= ~FAULT_FLAG_WRITE
    return reuse, pte


def _needs_soft_dirty_wp(vma: VmArea, pte: int) -> bool:
    return not vma.flags & VM_SOFTDIRTY and not pte & _PAGE_SOFT_DIRTY


def _should_try_to_free_swap(host: HostMm, pfn: int, vma: VmArea, fault_flags: int) -> bool:
    pages = host.pages
    flags = pages.flags[pfn]
    if not flags & PG_swapcache:
        return False
    assert host.swap is not None
    if host.swap.vm_swap_full() or vma.flags & VM_LOCKED or flags & PG_mlocked:
        return True
    # A write wants the page to itself: without the swap cache's reference it may have it.
    return bool(fault_flags & FAULT_FLAG_WRITE) and not flags & PG_ksm and pages.refcount[pfn] == 2


def _reuse_swap_page(host: HostMm, pfn: int, entry: int) -> bool:
    """Linux 5.10: whether this entry is the page's only user; if so it leaves the swap cache."""
    assert host.swap is not None
    pages = host.pages
    if pages.flags[pfn] & PG_ksm or pages.mapcount[pfn] + host.swap.swap_count(swp_offset(entry)) > 1:
        return False
    if not pages.flags[pfn] & PG_writeback:
        swap_cache_del_folio(host, pfn)
        set_page_dirty(host, pfn)
    return True


def _non_swap_entry(vmf: VmFault, entry: int) -> int:
    if is_migration_entry(entry):
        migration_entry_wait(vmf.mm, vmf.pmd, vmf.address)
        return 0
    if is_device_exclusive_entry(entry):
        return remove_device_exclusive_entry(vmf)
    if is_device_private_entry(entry):
        return migrate_to_ram(vmf)
    return VM_FAULT_HWPOISON if swp_type(entry) == SWP_HWPOISON else VM_FAULT_SIGBUS


def migration_entry_wait(mm: MmStruct, pmd: int, address: int) -> None:
    """Sleep until the page that the entry at `address` stands for was unlocked by its migration."""
    pte = pte_offset_map_lock(mm, pmd, address)
    if not pte:
        return
    value = ptep_get(mm, pte)
    pfn = -1
    if is_swap_pte(value):
        entry = pte_to_swp_entry(value)
        if is_migration_entry(entry):
            pfn = swp_offset(entry) & SWP_PFN_MASK
    pte_lockptr(mm, pte).unlock()
    if pfn < 0:
        return
    host = mm.host
    if (t := host.trace.migration_entry_wait) is not None:
        t(mm.process.pid if mm.process is not None else 0, address, pfn)
    folio_wait_unlock(host, pfn)
