"""x86-64 host page-table entries: bits, helpers, and the lockless walk; swap entries are in swapops.py.

Source of truth: arch/x86/include/asm/pgtable_types.h, pgtable.h, arch/x86/kvm/mmu/mmu.c:
host_pfn_mapping_level (the walk); Linux 6.18, four levels.

Present entry (4 KiB; at levels 2 and 3 bit 7 is PS):

     63 62..59  58   57 56..52 51        12  11  10  9 8  7   6 5  4   3  2  1  0
    +--+------+----+---+------+------------+---+---+--+-+---+-+-+---+---+--+--+--+
    |NX| PKEY |S.D.|   |      |   frame    | SD| WP|SP|G|PAT|D|A|PCD|PWT|US|RW| P|
    +--+------+----+---+------+------------+---+---+--+-+---+-+-+---+---+--+--+--+
     S.D. saved dirty, SD soft dirty, WP userfaultfd write-protect, SP special, G is PROTNONE if P = 0

A PROT_NONE entry stores its frame number inverted (the L1TF rule).

Not modelled: five-level tables, memory encryption bits, protection keys, PTI's second PGD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from host_mm.ram import Ram

__all__ = [
    "HPAGE_PMD_NR", "HPAGE_PMD_ORDER", "PFN_MASK", "PGDIR_SHIFT", "PGDIR_SIZE", "PMD_SHIFT", "PMD_SIZE",
    "PTRS_PER_PTE", "PUD_SHIFT", "PUD_SIZE", "TASK_SIZE", "ULONG_MAX", "_KERNPG_TABLE", "_PAGE_ACCESSED",
    "_PAGE_DIRTY", "_PAGE_DIRTY_BITS", "_PAGE_GLOBAL", "_PAGE_NX", "_PAGE_PCD", "_PAGE_PRESENT",
    "_PAGE_PROTNONE", "_PAGE_PSE", "_PAGE_PWT", "_PAGE_RW", "_PAGE_SAVED_DIRTY", "_PAGE_SOFT_DIRTY",
    "_PAGE_SPECIAL", "_PAGE_TABLE", "_PAGE_UFFD_WP", "_PAGE_USER", "is_swap_pmd", "lookup_address_in_mm",
    "mk_pmd", "mk_pte", "pmd_pfn", "pmd_present", "pmd_table", "pmd_trans_huge", "pte_dirty", "pte_mkclean",
    "pte_mkdirty", "pte_mkold", "pte_mksoft_dirty", "pte_mkuffd_wp", "pte_mkwrite", "pte_mkyoung",
    "pte_modify", "pte_pfn", "pte_present", "pte_protnone", "pte_write", "pte_wrprotect", "pte_young",
    "walk_lockless",
]

_PAGE_PRESENT = 1 << 0
_PAGE_RW = 1 << 1
_PAGE_USER = 1 << 2
_PAGE_PWT = 1 << 3
_PAGE_PCD = 1 << 4
_PAGE_ACCESSED = 1 << 5
_PAGE_DIRTY = 1 << 6
_PAGE_PSE = 1 << 7
_PAGE_GLOBAL = 1 << 8
_PAGE_PROTNONE = _PAGE_GLOBAL
_PAGE_SPECIAL = 1 << 9
_PAGE_UFFD_WP = 1 << 10
_PAGE_SOFT_DIRTY = 1 << 11
_PAGE_SAVED_DIRTY = 1 << 58
_PAGE_NX = 1 << 63
_PAGE_DIRTY_BITS = _PAGE_DIRTY | _PAGE_SAVED_DIRTY
_PAGE_TABLE = _PAGE_PRESENT | _PAGE_RW | _PAGE_USER | _PAGE_ACCESSED | _PAGE_DIRTY
_KERNPG_TABLE = _PAGE_PRESENT | _PAGE_RW | _PAGE_ACCESSED | _PAGE_DIRTY


PFN_MASK = ((1 << 52) - 1) & ~0xFFF
_CHG_MASK = (
    PFN_MASK | _PAGE_PCD | _PAGE_PWT | _PAGE_SPECIAL | _PAGE_ACCESSED | _PAGE_DIRTY_BITS
    | _PAGE_SOFT_DIRTY | _PAGE_UFFD_WP
)
_ALL = (1 << 64) - 1

PMD_SHIFT = 21
PUD_SHIFT = 30
PGDIR_SHIFT = 39
PMD_SIZE = 1 << PMD_SHIFT
PUD_SIZE = 1 << PUD_SHIFT
PGDIR_SIZE = 1 << PGDIR_SHIFT
PTRS_PER_PTE = 512
HPAGE_PMD_ORDER = PMD_SHIFT - 12
HPAGE_PMD_NR = 1 << HPAGE_PMD_ORDER
TASK_SIZE = (1 << 47) - 4096
ULONG_MAX = (1 << 64) - 1


def page_align(length: int) -> int:
    """PAGE_ALIGN of an unsigned long: what is nearly 2**64 becomes 0."""
    return (length + 4095) & ~4095 & ULONG_MAX


def pte_present(pte: int) -> bool:
    """Whether a page is mapped, PROT_NONE included."""
    return pte & (_PAGE_PRESENT | _PAGE_PROTNONE) != 0


def pte_protnone(pte: int) -> bool:
    """Whether the entry is mapped without any right (mprotect NONE, NUMA hinting)."""
    return pte & (_PAGE_PRESENT | _PAGE_PROTNONE) == _PAGE_PROTNONE


def pte_write(pte: int) -> bool:
    """Whether the entry grants writing."""
    return pte & _PAGE_RW != 0


def pte_young(pte: int) -> bool:
    """Whether the entry was used for a translation since the bit was cleared."""
    return pte & _PAGE_ACCESSED != 0


def pte_dirty(pte: int) -> bool:
    """Whether the page was written through this entry; write-protected entries keep it in bit 58."""
    return pte & _PAGE_DIRTY_BITS != 0


def pte_pfn(pte: int) -> int:
    """The frame number of a present entry."""
    if pte and not pte & _PAGE_PRESENT:
        pte ^= PFN_MASK
    return (pte & PFN_MASK) >> 12


def mk_pte(pfn: int, prot: int) -> int:
    """An entry for `pfn` with protection bits `prot`."""
    frame = pfn << 12
    if prot and not prot & _PAGE_PRESENT:
        frame ^= PFN_MASK
    return (frame & PFN_MASK) | prot


def _shift_dirty(pte: int) -> int:
    # Write=0,Dirty=1 would be a shadow-stack page; such entries keep the bit in software.
    if pte & _PAGE_RW:
        if pte & _PAGE_SAVED_DIRTY:
            return (pte & ~_PAGE_SAVED_DIRTY) | _PAGE_DIRTY
        return pte
    if pte & _PAGE_DIRTY:
        return (pte & ~_PAGE_DIRTY) | _PAGE_SAVED_DIRTY
    return pte


def pte_wrprotect(pte: int) -> int:
    """Without the right to write; a dirty bit moves to the saved-dirty bit."""
    return _shift_dirty(pte & ~_PAGE_RW)


def pte_mkwrite(pte: int) -> int:
    """With the right to write; a saved dirty bit moves back."""
    return _shift_dirty(pte | _PAGE_RW)


def pte_mkdirty(pte: int) -> int:
    """Dirty and soft-dirty."""
    return _shift_dirty(pte | _PAGE_DIRTY | _PAGE_SOFT_DIRTY)


def pte_mkclean(pte: int) -> int:
    """Without either dirty bit."""
    return pte & ~_PAGE_DIRTY_BITS


def pte_mkyoung(pte: int) -> int:
    """Accessed."""
    return pte | _PAGE_ACCESSED


def pte_mkold(pte: int) -> int:
    """Not accessed."""
    return pte & ~_PAGE_ACCESSED


def pte_mksoft_dirty(pte: int) -> int:
    """Soft-dirty."""
    return pte | _PAGE_SOFT_DIRTY


def pte_mkuffd_wp(pte: int) -> int:
    """Write-protected by userfaultfd."""
    return pte_wrprotect(pte | _PAGE_UFFD_WP)


def pte_modify(pte: int, newprot: int) -> int:
    """The same page and history with other rights (mprotect)."""
    val = (pte & _CHG_MASK) | (newprot & ~_CHG_MASK)
    if bool(pte & _PAGE_PRESENT) != bool(val & _PAGE_PRESENT):
        val ^= PFN_MASK
    return _shift_dirty(val)


# -- entries of level 2 -------------------------------------------------------------------------
# The bits of a huge leaf are those of a level-1 entry, so that pte_mkdirty and its like serve both.
def pmd_table(pmd: int) -> bool:
    """Whether a level-1 table hangs here."""
    return pmd & (_PAGE_PRESENT | _PAGE_PSE) == _PAGE_PRESENT


def pmd_modify(pmd: int, newprot: int) -> int:
    """The same huge page with other rights."""
    return pte_modify(pmd, newprot) | (pmd & _PAGE_PSE)


def pmd_present(pmd: int) -> bool:
    """Whether there is a table or a huge page; one that is being split counts, as PSE stays."""
    return pmd & (_PAGE_PRESENT | _PAGE_PROTNONE | _PAGE_PSE) != 0


def pmd_trans_huge(pmd: int) -> bool:
    """Whether a huge page is mapped here."""
    return pmd & _PAGE_PSE != 0


def is_swap_pmd(pmd: int) -> bool:
    """Whether the entry is neither empty nor present: a huge page under migration."""
    return pmd != 0 and not pmd_present(pmd)


def mk_pmd(pfn: int, prot: int) -> int:
    """A huge leaf for the 2 MiB at `pfn` with protection bits `prot`."""
    return mk_pte(pfn, prot) | _PAGE_PSE


def pmd_pfn(pmd: int) -> int:
    """The first frame of a huge leaf."""
    if not pmd & _PAGE_PRESENT:
        pmd ^= PFN_MASK
    return (pmd & PFN_MASK) >> 12


def walk_lockless(ram: Ram, pgd: int, address: int) -> tuple[int, int]:
    """(entry, level) of `address` in the tables at physical address `pgd`, without locks.

    Level 1 is a PTE, 2 and 3 a huge leaf or an empty or non-present entry there, 4 an empty PGD entry.
    """
    u64 = ram.u64
    entry = u64[(pgd >> 3) + ((address >> 39) & 511)]
    if not entry & 1:
        return entry, 4
    entry = u64[((entry & PFN_MASK) >> 3) + ((address >> 30) & 511)]
    if not entry & 1 or entry & _PAGE_PSE:
        return entry, 3
    entry = u64[((entry & PFN_MASK) >> 3) + ((address >> 21) & 511)]
    if not entry & 1 or entry & _PAGE_PSE:
        return entry, 2
    return u64[((entry & PFN_MASK) >> 3) + ((address >> 12) & 511)], 1


def lookup_address_in_mm(mm: MmStruct, address: int) -> tuple[int, int]:
    """(entry, level) of `address` in `mm`, without locks: what KVM's host_pfn_mapping_level reads."""
    return walk_lockless(mm.host.ram, mm.pgd, address)
