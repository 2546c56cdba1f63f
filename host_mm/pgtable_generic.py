"""Page tables as they lie in RAM: allocation of tables, location of entries, the store funnel.

Source of truth: include/linux/pgtable.h (set_pte_at, ptep_*), mm/pgtable-generic.c (ptep_clear_flush,
__pte_offset_map_lock), mm/memory.c (__pud_alloc, __pmd_alloc, __pte_alloc, free_pgd_range),
mm/rmap.c: mm_find_pmd; Linux 6.18.

An entry is named by its physical address. Every store to a table of level 1 goes through `set_pte`,
which tells `host.pte_hooks` (mm, address, old, new); each store of a huge leaf or of what takes its place
through `set_pmd`, which tells `host.pmd_hooks`; tables come and go through `_set_table`.

Level-2 entries are locked by their table's lock (`pmd_lock`), level-1 entries by theirs, taken after it.

Not modelled: huge leaves at level 3, five levels, RCU freeing of tables (gathers free them after
the flush), PT_RECLAIM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_PSE,
    _PAGE_TABLE,
    PFN_MASK,
    PGDIR_SIZE,
    PMD_SIZE,
    PUD_SIZE,
    pmd_table,
    pte_wrprotect,
)
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Spinlock
from host_mm.page import PG_table, put_page
from host_mm.page_alloc import GFP_COMP, GFP_PGTABLE_USER

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = [
    "free_pgd_range", "free_tables", "mm_find_pmd", "move_table", "pgd_alloc", "pgd_free", "pmd_alloc",
    "pmd_entries", "pmd_lock", "pmd_lockptr", "pmd_offset", "pmd_slots", "pte_alloc", "pte_alloc_one",
    "pte_clear", "pte_free", "pte_lockptr", "pte_offset_map", "pte_offset_map_lock", "ptep_clear_flush",
    "ptep_get", "ptep_get_and_clear", "ptep_set_access_flags", "ptep_set_wrprotect",
    "ptep_test_and_clear_young", "pud_alloc", "pud_entries", "pud_offset", "set_pmd", "set_pte",
]


# -- entries of level 1 -------------------------------------------------------------------------
def ptep_get(mm: MmStruct, pte: int) -> int:
    """The entry at physical address `pte`."""
    return mm.host.ram.u64[pte >> 3]


def set_pte(mm: MmStruct, address: int, pte: int, value: int) -> None:
    """set_pte_at: store an entry. The only place where a level-1 entry changes."""
    host = mm.host
    u64 = host.ram.u64
    index = pte >> 3
    if host.pte_hooks:
        old = u64[index]
        u64[index] = value
        for hook in host.pte_hooks:
            hook(mm, address, old, value)
    else:
        u64[index] = value


def pte_clear(mm: MmStruct, address: int, pte: int) -> None:
    """Make the entry empty."""
    set_pte(mm, address, pte, 0)


def ptep_get_and_clear(mm: MmStruct, address: int, pte: int) -> int:
    """Empty the entry, atomically; returns what it was. The translation may still be cached."""
    old = mm.host.ram.u64[pte >> 3]
    set_pte(mm, address, pte, 0)
    return old


def ptep_clear_flush(mm: MmStruct, address: int, pte: int) -> int:
    """Empty the entry and flush its translation."""
    old = ptep_get_and_clear(mm, address, pte)
    if old & 1:
        _tlb.flush_tlb_page(mm, address)
    return old


def ptep_set_wrprotect(mm: MmStruct, address: int, pte: int) -> None:
    """Take the right to write away, keeping the dirty bit."""
    set_pte(mm, address, pte, pte_wrprotect(mm.host.ram.u64[pte >> 3]))


def ptep_set_access_flags(mm: MmStruct, address: int, pte: int, entry: int, dirty: bool) -> bool:
    """Grant rights or set A/D bits; true if the entry changed. Growing rights need no flush on x86."""
    changed = mm.host.ram.u64[pte >> 3] != entry
    if changed and dirty:
        set_pte(mm, address, pte, entry)
    return changed


def ptep_test_and_clear_young(mm: MmStruct, address: int, pte: int) -> bool:
    """Clear the accessed bit; true if it was set. x86 does not flush for this."""
    entry = mm.host.ram.u64[pte >> 3]
    if not entry & 0x20:
        return False
    set_pte(mm, address, pte, entry & ~0x20)
    return True


# -- entries of level 2 -------------------------------------------------------------------------
def set_pmd(mm: MmStruct, address: int, pmd: int, value: int) -> None:
    """set_pmd_at: store a huge leaf, a migration entry or 0. The only place where one changes.

    `address` is that of the 2 MiB. Hanging a table where a huge leaf was is told here, too.
    """
    host = mm.host
    u64 = host.ram.u64
    old = u64[pmd >> 3]
    u64[pmd >> 3] = value
    for hook in host.pmd_hooks:
        hook(mm, address, old, value)


def pmd_lockptr(mm: MmStruct, pmd: int) -> Spinlock:
    """The lock of the level-2 table that the entry at `pmd` is in."""
    return mm.host.pmd_locks[pmd >> 12]


def pmd_lock(mm: MmStruct, pmd: int) -> Spinlock:
    """The same, taken."""
    lock = mm.host.pmd_locks[pmd >> 12]
    lock.lock()
    return lock


# -- locating entries ---------------------------------------------------------------------------
def pud_offset(mm: MmStruct, address: int) -> int:
    """Physical address of the level-3 entry of `address`, or 0 where no level-3 table is."""
    entry = mm.host.ram.u64[(mm.pgd >> 3) + ((address >> 39) & 511)]
    return (entry & PFN_MASK) + ((address >> 30) & 511) * 8 if entry & 1 else 0


def pmd_offset(mm: MmStruct, address: int) -> int:
    """Physical address of the level-2 entry of `address`, or 0 where no level-2 table is."""
    u64 = mm.host.ram.u64
    entry = u64[(mm.pgd >> 3) + ((address >> 39) & 511)]
    if not entry & 1:
        return 0
    entry = u64[((entry & PFN_MASK) >> 3) + ((address >> 30) & 511)]
    if not entry & 1 or entry & _PAGE_PSE:
        return 0
    return (entry & PFN_MASK) + ((address >> 21) & 511) * 8


def mm_find_pmd(mm: MmStruct, address: int) -> int:
    """pmd_offset under the name that rmap and huge_memory use; the entry itself may be empty."""
    return pmd_offset(mm, address)


def pte_offset_map(mm: MmStruct, pmd: int, address: int) -> int:
    """Physical address of the level-1 entry below level-2 entry `pmd`, or 0 if no table is there."""
    entry = mm.host.ram.u64[pmd >> 3]
    if not entry & 1 or entry & _PAGE_PSE:
        return 0
    return (entry & PFN_MASK) + ((address >> 12) & 511) * 8


def pte_lockptr(mm: MmStruct, pte: int) -> Spinlock:
    """The lock of the level-1 table that the entry at `pte` is in."""
    return mm.pte_locks[pte >> 12]


def pte_offset_map_lock(mm: MmStruct, pmd: int, address: int) -> int:
    """The level-1 entry's physical address with its table locked, or 0 and no lock."""
    while True:
        pte = pte_offset_map(mm, pmd, address)
        if not pte:
            return 0
        lock = mm.pte_locks[pte >> 12]
        lock.lock()
        # The table can have been freed or replaced while this task waited for its lock.
        if pte_offset_map(mm, pmd, address) == pte and mm.pte_locks.get(pte >> 12) is lock:
            return pte
        lock.unlock()


# -- tables -------------------------------------------------------------------------------------
def _alloc_table(mm: MmStruct) -> int:
    host = mm.host
    pfn = host.allocator.alloc_pages(GFP_PGTABLE_USER | GFP_COMP, 0, mm.process.home_node)
    if pfn >= 0:
        host.pages.flags[pfn] |= PG_table
        host.vmstat["nr_page_table_pages"] += 1
    return pfn


def _free_table(mm: MmStruct, pfn: int) -> None:
    host = mm.host
    host.pages.flags[pfn] &= ~PG_table
    host.vmstat["nr_page_table_pages"] -= 1
    put_page(host, pfn)
    if not host.pages.refcount[pfn]:
        host.pmd_locks.pop(pfn, None)


def _set_table(mm: MmStruct, entry: int, value: int) -> None:
    mm.host.ram.u64[entry >> 3] = value


def pgd_alloc(mm: MmStruct) -> bool:
    """Give `mm` its level-4 table."""
    pfn = _alloc_table(mm)
    if pfn < 0:
        return False
    mm.pgd = pfn << 12
    return True


def pgd_free(mm: MmStruct) -> None:
    """Free the level-4 table."""
    pfn, mm.pgd = mm.pgd >> 12, 0
    _free_table(mm, pfn)


def _next_table(mm: MmStruct, entry: int, locks: dict[int, Spinlock] | None = None) -> int:
    """Physical address of the table below the entry at `entry`, made if missing; 0: no memory.

    `locks` gets the lock of a level-2 table, before anybody can find the table.
    """
    u64 = mm.host.ram.u64
    value = u64[entry >> 3]
    if not value & 1:
        new = _alloc_table(mm)
        if new < 0:
            return 0
        if locks is not None:
            locks[new] = Spinlock(mm.host.sched, "pmd_ptl")
        mm.page_table_lock.lock()
        value = u64[entry >> 3]
        if value & 1:
            mm.page_table_lock.unlock()
            if locks is not None:
                del locks[new]
            _free_table(mm, new)
        else:
            value = new << 12 | _PAGE_TABLE
            mm.pgtables_bytes += 4096
            _set_table(mm, entry, value)
            mm.page_table_lock.unlock()
    return value & PFN_MASK


def pud_alloc(mm: MmStruct, address: int) -> int:
    """Physical address of the level-3 entry of `address`, its table made if missing; 0: no memory."""
    pud_table = _next_table(mm, mm.pgd + ((address >> 39) & 511) * 8)
    return pud_table + ((address >> 30) & 511) * 8 if pud_table else 0


def pmd_alloc(mm: MmStruct, address: int) -> int:
    """Physical address of the level-2 entry of `address`, tables made as needed; 0: no memory."""
    pud = pud_alloc(mm, address)
    if not pud:
        return 0
    table = _next_table(mm, pud, mm.host.pmd_locks)
    return table + ((address >> 21) & 511) * 8 if table else 0


def pte_alloc_one(mm: MmStruct) -> int:
    """A level-1 table that hangs nowhere yet and is counted nowhere, or -1."""
    new = _alloc_table(mm)
    if new >= 0:
        mm.pte_locks[new] = Spinlock(mm.host.sched, "ptl")
    return new


def pte_free(mm: MmStruct, pfn: int) -> None:
    """Give back a table of pte_alloc_one that hangs nowhere."""
    del mm.pte_locks[pfn]
    _free_table(mm, pfn)


def pte_alloc(mm: MmStruct, pmd: int) -> bool:
    """See that something hangs below level-2 entry `pmd`, a table if it was empty; false: no memory."""
    if mm.host.ram.u64[pmd >> 3]:
        return True
    new = pte_alloc_one(mm)
    if new < 0:
        return False
    lock = pmd_lock(mm, pmd)
    if mm.host.ram.u64[pmd >> 3]:
        lock.unlock()
        pte_free(mm, new)
        return True
    mm.pgtables_bytes += 4096
    _set_table(mm, pmd, new << 12 | _PAGE_TABLE)
    lock.unlock()
    return True


def move_table(mm: MmStruct, old_entry: int, new_entry: int, old: int, new: int, size: int) -> None:
    """Hang the table below `old_entry` below `new_entry`, which is empty; both entries are locked.

    `old` and `new` are the addresses that the entries are for, `size` what one of them spans. Each
    leaf that moves with the table is told to the hooks as cleared here and set there.
    """
    u64 = mm.host.ram.u64
    value = u64[old_entry >> 3]
    _set_table(mm, old_entry, 0)
    _set_table(mm, new_entry, value)
    if mm.host.pte_hooks or mm.host.pmd_hooks:
        _tell_moved(mm, value & PFN_MASK, old, new, size)


def _tell_moved(mm: MmStruct, table: int, old: int, new: int, size: int) -> None:
    step = size >> 9
    words = mm.host.ram.u64[table >> 3 : (table >> 3) + 512].tolist()
    for index, entry in enumerate(words):
        offset = index * step
        if step > 4096 and pmd_table(entry):
            _tell_moved(mm, entry & PFN_MASK, old + offset, new + offset, step)
        elif entry:
            for hook in mm.host.pte_hooks if step == 4096 else mm.host.pmd_hooks:
                hook(mm, old + offset, entry, 0)
                hook(mm, new + offset, 0, entry)


# -- ranges -------------------------------------------------------------------------------------
def pud_entries(mm: MmStruct, start: int, end: int) -> list[tuple[int, int, int]]:
    """(table, address, next) of each present level-3 entry in [start, end); table is the level-2 one's."""
    u64 = mm.host.ram.u64
    found: list[tuple[int, int, int]] = []
    address = start
    while address < end:
        entry = u64[(mm.pgd >> 3) + ((address >> 39) & 511)]
        chunk = min(end, (address & ~(PGDIR_SIZE - 1)) + PGDIR_SIZE)
        if entry & 1:
            base = (entry & PFN_MASK) >> 3
            while address < chunk:
                following = min(chunk, (address & ~(PUD_SIZE - 1)) + PUD_SIZE)
                value = u64[base + ((address >> 30) & 511)]
                if value & 1:
                    found.append((value & PFN_MASK, address, following))
                address = following
        address = chunk
    return found


def pmd_entries(mm: MmStruct, start: int, end: int) -> list[tuple[int, int, int]]:
    """(pmd, address, next) of each level-2 entry in [start, end) that has a level-1 table now."""
    u64 = mm.host.ram.u64
    return [slot for slot in pmd_slots(mm, start, end) if pmd_table(u64[slot[0] >> 3])]


def pmd_slots(mm: MmStruct, start: int, end: int) -> list[tuple[int, int, int]]:
    """(pmd, address, next) of each level-2 entry in [start, end) that is not empty, table or not."""
    u64 = mm.host.ram.u64
    found: list[tuple[int, int, int]] = []
    for table, first, last in pud_entries(mm, start, end):
        address = first
        while address < last:
            following = min(last, (address & ~(PMD_SIZE - 1)) + PMD_SIZE)
            pmd = table + ((address >> 21) & 511) * 8
            if u64[pmd >> 3]:
                found.append((pmd, address, following))
            address = following
    return found


def free_pgd_range(
    mm: MmStruct, gather_table: list[int], address: int, end: int, floor: int, ceiling: int
) -> None:
    """Unhook the tables that lie between `floor` and `ceiling` wholly; they are freed after the flush.

    [address, end) is what was unmapped; a ceiling of 0 means the top. Pfns go to `gather_table`.
    """
    top = ceiling or 1 << 47
    u64 = mm.host.ram.u64
    limit = min(top, (end + PMD_SIZE - 1) & ~(PMD_SIZE - 1))
    for table, first, last in pud_entries(mm, address & ~(PMD_SIZE - 1), limit):
        at = first
        while at < last:
            base = at & ~(PMD_SIZE - 1)
            pmd = table + ((at >> 21) & 511) * 8
            value = u64[pmd >> 3]
            if value & 1 and base >= floor and base + PMD_SIZE <= top:
                _set_table(mm, pmd, 0)
                pfn = (value & PFN_MASK) >> 12
                _check_empty(mm, pfn, base)
                del mm.pte_locks[pfn]
                mm.pgtables_bytes -= 4096
                gather_table.append(pfn)
            at = base + PMD_SIZE
        _free_upper(mm, gather_table, first, PUD_SIZE, floor, top)
    at = address & ~(PGDIR_SIZE - 1)
    while at < end:
        _free_upper(mm, gather_table, at, PGDIR_SIZE, floor, top)
        at += PGDIR_SIZE


def _free_upper(mm: MmStruct, gather_table: list[int], address: int, size: int, floor: int, top: int) -> None:
    base = address & ~(size - 1)
    if base < floor or base + size > top:
        return
    u64 = mm.host.ram.u64
    slot = mm.pgd + ((base >> 39) & 511) * 8
    value = u64[slot >> 3]
    if not value & 1:
        return
    if size == PUD_SIZE:
        slot = (value & PFN_MASK) + ((base >> 30) & 511) * 8
        value = u64[slot >> 3]
        if not value & 1:
            return
    _set_table(mm, slot, 0)
    mm.pgtables_bytes -= 4096
    gather_table.append((value & PFN_MASK) >> 12)


def _check_empty(mm: MmStruct, pfn: int, address: int) -> None:
    ram = mm.host.ram
    if not ram.page_is_zero(pfn):
        raise BrokenTruth("page-table-empty", f"the table of {address:#x} is freed with entries in it")


def free_tables(mm: MmStruct, pfns: list[int]) -> None:
    """Give the tables of a finished gather back."""
    for pfn in pfns:
        _free_table(mm, pfn)
