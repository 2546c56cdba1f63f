"""make_device_exclusive: a page of RAM that only a device may touch until a CPU asks for it.

Source of truth: mm/rmap.c: make_device_exclusive; mm/gup.c: get_user_page_vma_remote; Linux 6.18.

The page is faulted in writable and locked, the bracket (EXCLUSIVE, with its owner) makes every secondary MMU
let go of it, KVM's too, and its entry becomes a device-exclusive one, which keeps reference and map count.
The caller sets its mapping up before it unlocks the folio, and must have filtered its own event, or each
attempt would invalidate itself.

Not modelled: huge mappings, which Linux splits first; here they are refused with EOPNOTSUPP.
"""

from __future__ import annotations

from errno import EFAULT, EOPNOTSUPP
from typing import TYPE_CHECKING, Any

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import (
    _PAGE_SOFT_DIRTY,
    pmd_trans_huge,
    pte_dirty,
    pte_pfn,
    pte_present,
    pte_write,
)
from host_mm.arch.x86.swapops import _PAGE_SWP_SOFT_DIRTY, SWP_DEVICE_EXCLUSIVE, swp_entry, swp_entry_to_pte
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.gup import FOLL_WRITE, get_user_page_remote
from host_mm.page import PG_anon, PG_hugetlb, page_folio, put_page, set_page_dirty
from host_mm.pgtable_generic import (
    pmd_offset,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_clear_flush,
    ptep_get,
    set_pte,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = ["TRACEPOINTS", "make_device_exclusive"]

DEVICE_EXCLUSIVE = Tracepoint(
    "refault", "device_exclusive", ("pid", "address", "pfn"),
    lambda pid, address, pfn: f"pid {pid} {address:#x} pfn {pfn:#x}",
    doc="A page of RAM becomes a device's alone: a CPU that touches it will fault.",
)
TRACEPOINTS = (DEVICE_EXCLUSIVE,)


def make_device_exclusive(mm: MmStruct, address: int, owner: Any) -> int:
    """The page at `address`, locked and with a reference, out of the CPU's reach; or a negative errno.

    mmap_lock is held for reading. -EOPNOTSUPP: not anonymous, huge, or a kernel that has no such
    entries; -EFAULT, -ENOMEM: get_user_pages's.
    """
    host = mm.host
    address &= ~0xFFF
    if not host.profile.device_exclusive:
        return -EOPNOTSUPP
    while True:
        pfn = get_user_page_remote(mm, address, FOLL_WRITE)
        if pfn < 0:
            return pfn
        if mm.vma_lookup(address) is None:
            put_page(host, pfn)
            return -EFAULT
        pmd = pmd_offset(mm, address)
        huge = pmd and pmd_trans_huge(host.ram.u64[pmd >> 3])
        if huge or host.pages.flags[page_folio(host.pages, pfn)] & (PG_anon | PG_hugetlb) != PG_anon:
            put_page(host, pfn)
            return -EOPNOTSUPP
        folio_lock(host, pfn)
        range_ = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_EXCLUSIVE, mm, address, address + 4096,
            order=mmu_notifier.ORDER_UNDER_PTL, owner=owner,
        )
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        made = _set_exclusive(mm, address, pfn)
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        if made:
            return pfn
        folio_unlock(host, pfn)
        put_page(host, pfn)


def _set_exclusive(mm: MmStruct, address: int, pfn: int) -> bool:
    """Replace the entry, if it still maps this page writable: such an entry is the page's only one."""
    host = mm.host
    pmd = pmd_offset(mm, address)
    pte = pte_offset_map_lock(mm, pmd, address) if pmd else 0
    if not pte:
        return False
    ptl = pte_lockptr(mm, pte)
    entry = ptep_get(mm, pte)
    same = pte_present(entry) and pte_pfn(entry) == pfn and pte_write(entry)
    if same:
        entry = ptep_clear_flush(mm, address, pte)
        if pte_dirty(entry):
            set_page_dirty(host, pfn)
        value = swp_entry_to_pte(swp_entry(SWP_DEVICE_EXCLUSIVE, pfn))
        if entry & _PAGE_SOFT_DIRTY:
            value |= _PAGE_SWP_SOFT_DIRTY
        set_pte(mm, address, pte, value)
        if (t := host.trace.device_exclusive) is not None:
            t(mm.process.pid, address, pfn)
    ptl.unlock()
    return same
