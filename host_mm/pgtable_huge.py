"""Level-2 entries that are leaves: their stores, and the tables kept for the day they are split.

Source of truth: mm/pgtable-generic.c (pgtable_trans_huge_deposit, pgtable_trans_huge_withdraw,
pmdp_huge_clear_flush, pmdp_collapse_flush, pmdp_invalidate), arch/x86/mm/pgtable.c
(pmdp_set_access_flags, pmdp_test_and_clear_young), include/linux/huge_mm.h: pmd_trans_huge_lock;
Linux 6.18.

Whoever maps a huge page deposits an empty level-1 table beside it, so that a split never needs memory.
The deposits of one level-2 table hang on that table (`host.thp.deposited`, by its frame): which of them a
split gets does not matter.

Not modelled: huge entries at level 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_PRESENT,
    _PAGE_PROTNONE,
    _PAGE_TABLE,
    PFN_MASK,
    PMD_SIZE,
    is_swap_pmd,
    pmd_pfn,
    pmd_trans_huge,
)
from host_mm.kernel.errors import BrokenTruth
from host_mm.pgtable_generic import pmd_lock, pte_free, set_pmd

if TYPE_CHECKING:
    from host_mm.kernel.locks import Spinlock
    from host_mm.mm_types import MmStruct

__all__ = [
    "pgtable_trans_huge_deposit", "pgtable_trans_huge_withdraw", "pmd_populate", "pmd_trans_huge_lock",
    "pmdp_clear_young_notify", "pmdp_collapse_flush", "pmdp_get", "pmdp_huge_clear_flush",
    "pmdp_huge_get_and_clear", "pmdp_invalidate", "pmdp_set_access_flags", "pmdp_test_and_clear_young",
    "zap_deposited_table",
]


# -- deposits -----------------------------------------------------------------------------------
def pgtable_trans_huge_deposit(mm: MmStruct, pmd: int, table: int) -> None:
    """Keep level-1 table `table` (a frame) for the huge page that `pmd` maps; counted as the mm's."""
    mm.host.thp.deposited.setdefault(pmd >> 12, []).append(table)


def pgtable_trans_huge_withdraw(mm: MmStruct, pmd: int) -> int:
    """Take a deposited table back."""
    deposited = mm.host.thp.deposited
    tables = deposited.get(pmd >> 12)
    if not tables:
        raise BrokenTruth(
            "page-table-deposit", f"no table is deposited beside the entry at {pmd:#x}", mm.host.stream.here()
        )
    table = tables.pop()
    if not tables:
        del deposited[pmd >> 12]
    return table


def zap_deposited_table(mm: MmStruct, pmd: int) -> None:
    """The huge page is gone, nothing is left to split: free its table."""
    pte_free(mm, pgtable_trans_huge_withdraw(mm, pmd))
    mm.pgtables_bytes -= 4096


# -- entries ------------------------------------------------------------------------------------
def pmdp_get(mm: MmStruct, pmd: int) -> int:
    """The entry at physical address `pmd`."""
    return mm.host.ram.u64[pmd >> 3]


def pmd_populate(mm: MmStruct, address: int, pmd: int, table: int) -> None:
    """Hang level-1 table `table`, filled already, where a huge page was."""
    set_pmd(mm, address, pmd, table << 12 | _PAGE_TABLE)


def pmdp_huge_get_and_clear(mm: MmStruct, address: int, pmd: int) -> int:
    """Empty the entry; returns what it was. Its translations may still be cached."""
    old = mm.host.ram.u64[pmd >> 3]
    set_pmd(mm, address, pmd, 0)
    return old


def pmdp_huge_clear_flush(mm: MmStruct, address: int, pmd: int) -> int:
    """Empty the entry and flush its translations."""
    old = pmdp_huge_get_and_clear(mm, address, pmd)
    _tlb.flush_pmd_tlb_range(mm, address, address + PMD_SIZE)
    return old


def pmdp_collapse_flush(mm: MmStruct, address: int, pmd: int) -> int:
    """Unhook a level-1 table, whose pages' translations are flushed; returns the entry."""
    old = pmdp_huge_get_and_clear(mm, address, pmd)
    _tlb.flush_tlb_range(mm, address, address + PMD_SIZE)
    return old


def pmdp_invalidate(mm: MmStruct, address: int, pmd: int) -> int:
    """No CPU may use the entry any more, though it still says what it maps; returns what it was."""
    old = mm.host.ram.u64[pmd >> 3]
    bits = old & ~(PFN_MASK | _PAGE_PRESENT | _PAGE_PROTNONE)
    # Without P the frame number is stored inverted (the L1TF rule), as in any such entry.
    set_pmd(mm, address, pmd, bits | (pmd_pfn(old) << 12 ^ PFN_MASK))
    _tlb.flush_pmd_tlb_range(mm, address, address + PMD_SIZE)
    return old


def pmdp_set_access_flags(mm: MmStruct, address: int, pmd: int, entry: int, dirty: bool) -> bool:
    """Grant rights or set A/D bits; true if the entry changed. Growing rights need no flush on x86."""
    changed = mm.host.ram.u64[pmd >> 3] != entry
    if changed and dirty:
        set_pmd(mm, address, pmd, entry)
    return changed


def pmdp_test_and_clear_young(mm: MmStruct, address: int, pmd: int) -> bool:
    """Clear the accessed bit; true if it was set. x86 does not flush for this."""
    entry = mm.host.ram.u64[pmd >> 3]
    if not entry & _PAGE_ACCESSED:
        return False
    set_pmd(mm, address, pmd, entry & ~_PAGE_ACCESSED)
    return True


def pmdp_clear_young_notify(mm: MmStruct, address: int, pmd: int) -> bool:
    """Clear the accessed bit here and in secondary MMUs, none of which need flush; whether any was set."""
    young = int(pmdp_test_and_clear_young(mm, address, pmd))
    return bool(young | mmu_notifier.mmu_notifier_clear_young(mm, address, address + PMD_SIZE))


def pmd_trans_huge_lock(mm: MmStruct, pmd: int) -> Spinlock | None:
    """The entry's lock, taken, if it maps a huge page or stands for one under migration; else None."""
    entry = mm.host.ram.u64[pmd >> 3]
    if not (is_swap_pmd(entry) or pmd_trans_huge(entry)):
        return None
    ptl = pmd_lock(mm, pmd)
    entry = mm.host.ram.u64[pmd >> 3]
    if is_swap_pmd(entry) or pmd_trans_huge(entry):
        return ptl
    ptl.unlock()
    return None
