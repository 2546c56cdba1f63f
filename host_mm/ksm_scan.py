"""ksmd's rounds: page after page of the mergeable VMAs of all address spaces, each looked up and merged.

Source of truth: mm/ksm.c (cmp_and_merge_page, scan_get_next_rmap_item, ksm_next_page_pmd_entry,
should_skip_rmap_item, ksm_do_scan, ksm_scan_thread); Linux 6.18, 4 KiB anonymous pages.

A page whose checksum is the same as on the last round is looked for among the KSM pages and then among the
other pages of this round; two equal pages become one KSM page, write-protected in all places. Merging is in
ksm_merge.py, the two trees in ksm_tree.py.

Not modelled: merge_across_nodes=0, the advisor; the checksum is CRC-32, not xxhash.
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING
from zlib import crc32

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR, PMD_SIZE, TASK_SIZE, pmd_trans_huge, pte_present
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.huge_memory_map import pmd_folio
from host_mm.kernel.costs import COST_KSM_CHECKSUM, COST_SCAN_PAGE
from host_mm.ksm_merge import try_to_merge_two_pages, try_to_merge_with_ksm_page, try_to_merge_with_zero_page
from host_mm.ksm_tree import (
    remove_rmap_item_from_tree,
    stable_tree_append,
    stable_tree_insert,
    stable_tree_search,
    unstable_tree_search_insert,
)
from host_mm.ksm_types import KsmMmSlot, KsmRmapItem, folio_stable_node, ksm_test_exit
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import MMF_VM_MERGEABLE, VM_MERGEABLE
from host_mm.page import PG_anon, PG_ksm, get_page, page_folio, put_page
from host_mm.pgtable_generic import mm_find_pmd, pte_lockptr, pte_offset_map_lock
from host_mm.pgtable_huge import pmd_trans_huge_lock, pmdp_get
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["KSM_START_SCAN", "KSM_STOP_SCAN", "ksm_scan_thread", "next_mm_slot", "remove_trailing_rmap_items"]

_SCAN_FIELDS = ("seq", "rmap_entries")
KSM_START_SCAN = Tracepoint(
    "ksm", "ksm_start_scan", _SCAN_FIELDS, lambda seq, entries: f"seq {seq} rmap size {entries}"
)
KSM_STOP_SCAN = Tracepoint(
    "ksm", "ksm_stop_scan", _SCAN_FIELDS, lambda seq, entries: f"seq {seq} rmap size {entries}"
)
TRACEPOINTS = (KSM_START_SCAN, KSM_STOP_SCAN)

_MSEC = 1_000_000
_U8_MAX = 255
_ZERO_CHECKSUM = crc32(bytes(4096))


# -- one page ---------------------------------------------------------------------------------
def _calc_checksum(host: HostMm, pfn: int) -> int:
    host.sched.advance(COST_KSM_CHECKSUM)
    return crc32(host.ram.read(pfn << 12, 4096))


def cmp_and_merge_page(host: HostMm, pfn: int, item: KsmRmapItem) -> None:
    """Merge the page into the stable tree, or with one of the unstable tree, or put it there."""
    ksm = host.ksm
    node = folio_stable_node(host, pfn)
    if node is not None:
        if item.head is node:
            return
    else:
        remove_rmap_item_from_tree(host, item)
        checksum = _calc_checksum(host, pfn)
        if item.oldchecksum != checksum:
            item.oldchecksum = checksum
            ksm.changes += 1
            return
        zeros = ksm.use_zero_pages and checksum == _ZERO_CHECKSUM
        if zeros and not try_to_merge_with_zero_page(host, item, pfn):
            return
    kpfn = stable_tree_search(host, pfn)
    if kpfn == pfn and item.head is node:
        put_page(host, kpfn)
        return
    remove_rmap_item_from_tree(host, item)
    if kpfn == -EBUSY:
        ksm.changes += 1
    elif kpfn >= 0:
        if not try_to_merge_with_ksm_page(host, item, pfn, kpfn):
            folio_lock(host, kpfn)
            node = folio_stable_node(host, kpfn)
            assert node is not None
            stable_tree_append(host, item, node)
            folio_unlock(host, kpfn)
        put_page(host, kpfn)
    else:
        _merge_with_unstable(host, pfn, item)


def _merge_with_unstable(host: HostMm, pfn: int, item: KsmRmapItem) -> None:
    tree_item, tree_pfn = unstable_tree_search_insert(host, item, pfn)
    if tree_item is None:
        return
    merged = try_to_merge_two_pages(host, item, pfn, tree_item, tree_pfn)
    put_page(host, tree_pfn)
    if merged:
        folio_lock(host, pfn)
        node = stable_tree_insert(host, pfn)
        stable_tree_append(host, tree_item, node)
        stable_tree_append(host, item, node)
        folio_unlock(host, pfn)


# -- the round --------------------------------------------------------------------------------
def _get_next_rmap_item(host: HostMm, slot: KsmMmSlot, address: int) -> KsmRmapItem:
    """The item of this address, new if need be; those passed over on the way have lost their page."""
    ksm = host.ksm
    items = slot.rmap_list
    while ksm.index < len(items):
        item = items[ksm.index]
        if item.address == address:
            return item
        if item.address > address:
            break
        del items[ksm.index]
        _free_rmap_item(host, item)
    item = KsmRmapItem(slot.mm, address)
    ksm.ksm_rmap_items += 1
    slot.mm.ksm_rmap_items += 1
    items.insert(ksm.index, item)
    return item


def _free_rmap_item(host: HostMm, item: KsmRmapItem) -> None:
    remove_rmap_item_from_tree(host, item)
    host.ksm.ksm_rmap_items -= 1
    item.mm.ksm_rmap_items -= 1


def remove_trailing_rmap_items(host: HostMm, slot: KsmMmSlot, index: int) -> None:
    while len(slot.rmap_list) > index:
        _free_rmap_item(host, slot.rmap_list.pop(index))


def _skip_age(age: int) -> int:
    return 1 if age <= 3 else 2 if age <= 5 else 4 if age <= 8 else 8


def _should_skip_rmap_item(host: HostMm, pfn: int, item: KsmRmapItem) -> bool:
    ksm = host.ksm
    if not ksm.smart_scan or host.pages.flags[pfn] & PG_ksm:
        return False
    age = item.age
    if age != _U8_MAX:
        item.age += 1
    if age < 3:
        return False
    if not item.remaining_skips:
        item.remaining_skips = _skip_age(age)
        return False
    ksm.ksm_pages_skipped += 1
    item.remaining_skips -= 1
    remove_rmap_item_from_tree(host, item)
    return True


def _next_page(vma: VmArea, start: int) -> tuple[int, int] | None:
    """The first anonymous page in [start, end of the VMA), with a reference, and its address."""
    mm = vma.mm
    host = mm.host
    u64 = host.ram.u64
    while start < vma.end:
        if host.sched.preempt:
            host.sched.point("cond_resched")
        following = min(vma.end, (start & ~(PMD_SIZE - 1)) + PMD_SIZE)
        pmd = mm_find_pmd(mm, start)
        pte = pte_offset_map_lock(mm, pmd, start) if pmd else 0
        if pmd and not pte and (pfn := _huge_page(mm, pmd, start)) >= 0:
            return pfn, start
        if pte:
            ptl = pte_lockptr(mm, pte)
            for address in range(start, following, 4096):
                entry = u64[pte >> 3]
                if entry and pte_present(entry):
                    pfn = vm_normal_page(host, entry)
                    if pfn >= 0 and host.pages.flags[page_folio(host.pages, pfn)] & PG_anon:
                        get_page(host, pfn)
                        ptl.unlock()
                        return pfn, address
                pte += 8
            ptl.unlock()
        start = following
    return None


def _huge_page(mm: MmStruct, pmd: int, address: int) -> int:
    """The page of an anonymous huge entry, with a reference, or -1."""
    host = mm.host
    ptl = pmd_trans_huge_lock(mm, pmd)
    if ptl is None:
        return -1
    pfn = -1
    entry = pmdp_get(mm, pmd)
    folio = pmd_folio(mm, entry)
    if pmd_trans_huge(entry) and folio >= 0 and host.pages.flags[folio] & PG_anon:
        pfn = folio + ((address >> 12) & (HPAGE_PMD_NR - 1))
        get_page(host, pfn)
    ptl.unlock()
    return pfn


def _scan_mm(host: HostMm, slot: KsmMmSlot) -> tuple[KsmRmapItem, int] | None:
    """The next page of this address space with its item; None: the cursor is at the next one."""
    ksm = host.ksm
    mm = slot.mm
    mm.mmap_lock.read_lock()
    vmas = [] if ksm_test_exit(mm) else mm.vmas_in(ksm.address, TASK_SIZE)
    for vma in vmas:
        if not vma.flags & VM_MERGEABLE:
            continue
        ksm.address = max(ksm.address, vma.start)
        if vma.anon_vma is None:
            ksm.address = vma.end
        while ksm.address < vma.end and not ksm_test_exit(mm):
            found = _next_page(vma, ksm.address)
            if found is None:
                ksm.address = vma.end
                break
            pfn, address = found
            item = _get_next_rmap_item(host, slot, address)
            ksm.index += 1
            ksm.address = address + 4096
            if not _should_skip_rmap_item(host, pfn, item):
                mm.mmap_lock.read_unlock()
                return item, pfn
            put_page(host, pfn)
    if ksm_test_exit(mm):
        ksm.address = ksm.index = 0
    remove_trailing_rmap_items(host, slot, ksm.index)
    next_mm_slot(host, slot)
    return None


def next_mm_slot(host: HostMm, slot: KsmMmSlot) -> None:
    """Move the cursor on; an address space without mergeable VMAs leaves the round. Drops mmap_lock."""
    ksm = host.ksm
    mm = slot.mm
    ksm.mmlist_lock.lock()
    at = ksm.mm_slots.index(slot) + 1
    ksm.cursor = ksm.mm_slots[at] if at < len(ksm.mm_slots) else None
    leaves = not ksm.address
    if leaves:
        ksm.mm_slots.remove(slot)
    ksm.mmlist_lock.unlock()
    if leaves:
        mm.flags &= ~MMF_VM_MERGEABLE
    mm.mmap_lock.read_unlock()
    if leaves:
        mm.mmdrop()


def _start_scan(host: HostMm) -> None:
    ksm = host.ksm
    if (t := host.trace.ksm_start_scan) is not None:
        t(ksm.seqnr, ksm.ksm_rmap_items)
    ksm.changes_at_start = ksm.changes
    # A batch's reference would keep its pages from being merged.
    host.lru.lru_add_drain_all()
    ksm.unstable_tree.clear()
    ksm.mmlist_lock.lock()
    ksm.cursor = ksm.mm_slots[0] if ksm.mm_slots else None
    ksm.mmlist_lock.unlock()
    ksm.address = ksm.index = 0


def _stop_scan(host: HostMm) -> None:
    ksm = host.ksm
    if (t := host.trace.ksm_stop_scan) is not None:
        t(ksm.seqnr, ksm.ksm_rmap_items)
    ksm.seqnr += 1
    ksm.full_scans += 1
    ksm.quiet_scans = ksm.quiet_scans + 1 if ksm.changes == ksm.changes_at_start else 0
    ksm.scan_wait.wake_all()


def scan_get_next_rmap_item(host: HostMm) -> tuple[KsmRmapItem, int] | None:
    """The next page to look at, with a reference, and its item; None: a full scan has ended."""
    ksm = host.ksm
    if not ksm.mm_slots:
        return None
    if ksm.cursor is None:
        _start_scan(host)
        if ksm.cursor is None:
            return None
    while True:
        assert ksm.cursor is not None
        found = _scan_mm(host, ksm.cursor)
        if found is not None:
            return found
        if ksm.cursor is None:
            _stop_scan(host)
            return None
        ksm.address = ksm.index = 0


def ksm_do_scan(host: HostMm, scan_npages: int) -> None:
    """Look at up to so many pages; a full scan's end is an end too."""
    sched = host.sched
    for _ in range(scan_npages):
        if sched.preempt:
            sched.point("cond_resched")
        found = scan_get_next_rmap_item(host)
        if found is None:
            return
        item, pfn = found
        sched.advance(COST_SCAN_PAGE)
        cmp_and_merge_page(host, pfn, item)
        put_page(host, pfn)
        host.ksm.ksm_pages_scanned += 1


def ksm_scan_thread(host: HostMm) -> None:
    """ksmd: pages_to_scan pages, sleep_millisecs of sleep, for as long as it is to run."""
    ksm = host.ksm
    ctx = host.sched.current.ctx
    while True:
        ctx.cause = ksm.cause
        ksm.thread_mutex.lock()
        if ksm.should_run():
            ksm_do_scan(host, ksm.pages_to_scan)
        ksm.thread_mutex.unlock()
        ctx.cause = None
        if ksm.should_run():
            host.sched.sleep(ksm.sleep_millisecs * _MSEC)
        else:
            ksm.scan_wait.wake_all()
            ksm.thread_wait.wait_event(ksm.should_run)
