"""Entries for pages that a device has: device-private and device-exclusive ones, in faults, zaps and forks.

Source of truth: mm/memory.c (do_swap_page, remove_device_exclusive_entry, restore_exclusive_pte,
try_restore_exclusive_pte, copy_nonpresent_pte, zap_nonpresent_ptes), include/linux/swapops.h; Linux 6.18.

Both kinds are swap entries by their form and mappings by their count: the page keeps its reference and its
map count. A private page lies in device memory; a CPU that faults on it has the driver bring it back
(migrate_to_ram). An exclusive one lies in RAM, but is the device's alone; the CPU's fault waits for the
folio lock, which the device holds while it sets its own mapping up, tells notifiers, and takes it back.

Not modelled: soft-dirty state of private entries (Linux loses it too), coherent device memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_SOFT_DIRTY,
    mk_pte,
    pte_mkdirty,
    pte_mkold,
    pte_mkuffd_wp,
    pte_mkwrite,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_PFN_MASK,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_writable_device_private_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
)
from host_mm.filemap import folio_lock_or_retry, folio_trylock, folio_unlock
from host_mm.memremap import page_pgmap
from host_mm.mm_types import MM_ANONPAGES, VM_WRITE
from host_mm.page import PG_anon_exclusive, PG_dirty, get_page, put_page, try_get_page
from host_mm.pgtable_generic import pte_lockptr, pte_offset_map_lock, ptep_get, set_pte
from host_mm.rmap import folio_remove_rmap_pte, folio_try_dup_anon_rmap_pte
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea, VmFault

__all__ = [
    "TRACEPOINTS", "copy_device_private_entry", "device_entry_pfn", "make_device_private_pte",
    "migrate_to_ram", "remove_device_exclusive_entry", "try_restore_exclusive_pte", "zap_device_entry",
]

MIGRATE_TO_RAM = Tracepoint(
    "refault", "migrate_to_ram", ("pid", "address", "pfn"),
    lambda pid, address, pfn: f"pid {pid} {address:#x} device pfn {pfn:#x}",
    scope=True, doc="The CPU faults on a page in a device's memory: its driver brings it back.",
)
RESTORE_EXCLUSIVE = Tracepoint(
    "refault", "restore_exclusive", ("pid", "address", "pfn"),
    lambda pid, address, pfn: f"pid {pid} {address:#x} pfn {pfn:#x}",
    doc="A page that was a device's alone is the CPU's again.",
)
TRACEPOINTS = (MIGRATE_TO_RAM, RESTORE_EXCLUSIVE)


def device_entry_pfn(pte: int) -> int:
    """The page of a device-private or device-exclusive entry in a page table, -1 for any other."""
    entry = pte_to_swp_entry(pte)
    if is_device_private_entry(entry) or is_device_exclusive_entry(entry):
        return swp_offset(entry) & SWP_PFN_MASK
    return -1


def make_device_private_pte(pfn: int, *, writable: bool) -> int:
    """The entry for a page in device memory."""
    return swp_entry_to_pte(swp_entry(SWP_DEVICE_WRITE if writable else SWP_DEVICE_READ, pfn))


# -- faults ---------------------------------------------------------------------------------------
def migrate_to_ram(vmf: VmFault) -> int:
    """do_swap_page on a device-private entry: the driver's answer, or 0 if somebody else is at it."""
    mm = vmf.mm
    host = mm.host
    pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if not pte:
        return 0
    ptl = pte_lockptr(mm, pte)
    pfn = device_entry_pfn(vmf.orig_pte)
    if ptep_get(mm, pte) != vmf.orig_pte or not folio_trylock(host, pfn):
        ptl.unlock()
        if host.sched.preempt:
            host.sched.point("device-fault")
        return 0
    vmf.page = pfn
    get_page(host, pfn)
    ptl.unlock()
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.migrate_to_ram) is not None:
        ctx.cause = t(mm.process.pid, vmf.address, pfn)
    ret = page_pgmap(host, pfn).migrate_to_ram(vmf)
    ctx.cause = saved
    folio_unlock(host, pfn)
    put_page(host, pfn)
    return ret


def remove_device_exclusive_entry(vmf: VmFault) -> int:
    """Wait for the device to let go of the folio, tell notifiers, map the page again; VM_FAULT_* bits."""
    mm, vma = vmf.mm, vmf.vma
    host = mm.host
    pfn = device_entry_pfn(vmf.orig_pte)
    # Without a reference the entry, and then the page, could go while this waits for the lock.
    if not try_get_page(host, pfn):
        return 0
    ret = folio_lock_or_retry(host, pfn, vmf)
    if ret:
        put_page(host, pfn)
        return ret
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, vmf.address, vmf.address + 4096, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if pte:
        if ptep_get(mm, pte) == vmf.orig_pte:
            _restore_exclusive_pte(vma, pfn, vmf.address, pte, vmf.orig_pte)
        pte_lockptr(mm, pte).unlock()
    folio_unlock(host, pfn)
    put_page(host, pfn)
    mmu_notifier.mmu_notifier_invalidate_range_end(range_)
    return 0


def _restore_exclusive_pte(vma: VmArea, pfn: int, address: int, pte: int, old: int) -> None:
    """Folio and table are locked. The entry is old and, for what is known, clean."""
    host = vma.mm.host
    flags = host.pages.flags[pfn]
    value = pte_mkold(mk_pte(pfn, vma.page_prot))
    if old & _PAGE_SWP_SOFT_DIRTY:
        value |= _PAGE_SOFT_DIRTY
    if old & _PAGE_SWP_UFFD_WP:
        value = pte_mkuffd_wp(value)
    elif vma.flags & VM_WRITE and flags & PG_anon_exclusive:
        value = pte_mkwrite(pte_mkdirty(value) if flags & PG_dirty else value)
    set_pte(vma.mm, address, pte, value)
    if (t := host.trace.restore_exclusive) is not None:
        t(vma.mm.process.pid, address, pfn)


def try_restore_exclusive_pte(vma: VmArea, address: int, pte: int, old: int) -> bool:
    """fork: take the page back from the device if its folio lock is free; the table is locked.

    The fork's own bracket has told the device already.
    """
    host = vma.mm.host
    pfn = device_entry_pfn(old)
    if not folio_trylock(host, pfn):
        return False
    _restore_exclusive_pte(vma, pfn, address, pte, old)
    folio_unlock(host, pfn)
    return True


# -- fork and zap ---------------------------------------------------------------------------------
def copy_device_private_entry(
    dst_vma: VmArea, src_vma: VmArea, src_pte: int, address: int, entry: int, *, cow: bool
) -> int:
    """The child's entry for a page in device memory, which both share read-only from now on."""
    host = src_vma.mm.host
    pfn = device_entry_pfn(entry)
    get_page(host, pfn)
    dst_vma.mm.rss[MM_ANONPAGES] += 1
    folio_try_dup_anon_rmap_pte(host, pfn, dst_vma, src_vma)
    if cow and is_writable_device_private_entry(pte_to_swp_entry(entry)):
        entry = make_device_private_pte(pfn, writable=False) | entry & _PAGE_SWP_UFFD_WP
        set_pte(src_vma.mm, address, src_pte, entry)
    return entry


def zap_device_entry(vma: VmArea, pfn: int) -> None:
    """The entry is about to go: its reference goes at once, no CPU has a translation to flush."""
    host = vma.mm.host
    vma.mm.rss[MM_ANONPAGES] -= 1
    folio_remove_rmap_pte(host, pfn, vma)
    put_page(host, pfn)
