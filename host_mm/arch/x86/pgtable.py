"""x86-64 host page-table entries: bits, helpers, swap and migration entries, and the lockless walk.

Source of truth: arch/x86/include/asm/pgtable_types.h, pgtable.h, pgtable_64.h (__swp_entry),
include/linux/swap.h and swapops.h (entry types), arch/x86/kvm/mmu/mmu.c: host_pfn_mapping_level
(the walk); Linux 6.18, four levels.

Present entry (4 KiB; at levels 2 and 3 bit 7 is PS):

     63 62..59  58   57 56..52 51        12  11  10  9 8  7   6 5  4   3  2  1  0
    +--+------+----+---+------+------------+---+---+--+-+---+-+-+---+---+--+--+--+
    |NX| PKEY |S.D.|   |      |   frame    | SD| WP|SP|G|PAT|D|A|PCD|PWT|US|RW| P|
    +--+------+----+---+------+------------+---+---+--+-+---+-+-+---+---+--+--+--+
     S.D. saved dirty, SD soft dirty, WP userfaultfd write-protect, SP special, G is PROTNONE if P = 0

Swap entry (P = 0, PROTNONE = 0):

     63  59 58                9  8  7..4  3   2   1  0
    +------+-------------------+---+----+---+---+--+--+
    | type |      ~offset      | 0 | 0  | E | WP|SD| 0|    E: anon-exclusive, SD: soft dirty
    +------+-------------------+---+----+---+---+--+--+

A PROT_NONE entry stores its frame number inverted (the L1TF rule).

Not modelled: five-level tables, memory encryption bits, protection keys, PTI's second PGD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from host_mm.ram import Ram

__all__ = [
    "HPAGE_PMD_NR",
    "HPAGE_PMD_ORDER",
    "MAX_SWAPFILES",
    "PFN_MASK",
    "PGDIR_SHIFT",
    "PGDIR_SIZE",
    "PMD_SHIFT",
    "PMD_SIZE",
    "PTE_MARKER_GUARD",
    "PTE_MARKER_POISONED",
    "PTE_MARKER_UFFD_WP",
    "PTRS_PER_PTE",
    "PUD_SHIFT",
    "PUD_SIZE",
    "SWP_DEVICE_EXCLUSIVE",
    "SWP_DEVICE_READ",
    "SWP_DEVICE_WRITE",
    "SWP_HWPOISON",
    "SWP_MIGRATION_READ",
    "SWP_MIGRATION_READ_EXCLUSIVE",
    "SWP_MIGRATION_WRITE",
    "SWP_MIG_DIRTY",
    "SWP_MIG_YOUNG",
    "SWP_OFFSET_MASK",
    "SWP_PFN_MASK",
    "SWP_PTE_MARKER",
    "SWP_TYPE_SHIFT",
    "TASK_SIZE",
    "ULONG_MAX",
    "_KERNPG_TABLE",
    "_PAGE_ACCESSED",
    "_PAGE_DIRTY",
    "_PAGE_DIRTY_BITS",
    "_PAGE_GLOBAL",
    "_PAGE_NX",
    "_PAGE_PCD",
    "_PAGE_PRESENT",
    "_PAGE_PROTNONE",
    "_PAGE_PSE",
    "_PAGE_PWT",
    "_PAGE_RW",
    "_PAGE_SAVED_DIRTY",
    "_PAGE_SOFT_DIRTY",
    "_PAGE_SPECIAL",
    "_PAGE_SWP_EXCLUSIVE",
    "_PAGE_SWP_SOFT_DIRTY",
    "_PAGE_SWP_UFFD_WP",
    "_PAGE_TABLE",
    "_PAGE_UFFD_WP",
    "_PAGE_USER",
    "decode_pte",
    "is_device_exclusive_entry",
    "is_device_private_entry",
    "is_migration_entry",
    "is_pte_marker",
    "is_swap_pmd",
    "is_swap_pte",
    "is_writable_device_private_entry",
    "is_writable_migration_entry",
    "lookup_address_in_mm",
    "make_migration_entry",
    "make_pte_marker",
    "mk_pmd",
    "mk_pte",
    "non_swap_entry",
    "pmd_pfn",
    "pmd_present",
    "pmd_table",
    "pmd_trans_huge",
    "pte_dirty",
    "pte_marker_get",
    "pte_mkclean",
    "pte_mkdirty",
    "pte_mkold",
    "pte_mksoft_dirty",
    "pte_mkuffd_wp",
    "pte_mkwrite",
    "pte_mkyoung",
    "pte_modify",
    "pte_none_mostly",
    "pte_pfn",
    "pte_present",
    "pte_protnone",
    "pte_swp_uffd_wp_any",
    "pte_to_swp_entry",
    "pte_write",
    "pte_wrprotect",
    "pte_young",
    "swp_entry",
    "swp_entry_to_pte",
    "swp_offset",
    "swp_type",
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

_PAGE_SWP_SOFT_DIRTY = _PAGE_RW
_PAGE_SWP_UFFD_WP = _PAGE_USER
_PAGE_SWP_EXCLUSIVE = _PAGE_PWT
_SWP_FLAGS = _PAGE_SWP_SOFT_DIRTY | _PAGE_SWP_UFFD_WP | _PAGE_SWP_EXCLUSIVE

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

SWP_TYPE_SHIFT = 58
SWP_OFFSET_MASK = (1 << SWP_TYPE_SHIFT) - 1
MAX_SWAPFILES = 24
SWP_HWPOISON = 24
SWP_MIGRATION_READ = 25
SWP_MIGRATION_READ_EXCLUSIVE = 26
SWP_MIGRATION_WRITE = 27
SWP_DEVICE_WRITE = 28
SWP_DEVICE_READ = 29
SWP_DEVICE_EXCLUSIVE = 30
SWP_PTE_MARKER = 31
PTE_MARKER_UFFD_WP = 1
PTE_MARKER_POISONED = 2
PTE_MARKER_GUARD = 4
_SWP_PFN_BITS = 46 - 12
SWP_PFN_MASK = (1 << _SWP_PFN_BITS) - 1
SWP_MIG_YOUNG = 1 << _SWP_PFN_BITS
SWP_MIG_DIRTY = 1 << (_SWP_PFN_BITS + 1)
_ARCH_OFFSET_BITS = 50


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


# -- swap entries -------------------------------------------------------------------------------
def swp_entry(swap_type: int, offset: int) -> int:
    """An arch-independent swp_entry_t."""
    return (swap_type << SWP_TYPE_SHIFT) | (offset & SWP_OFFSET_MASK)


def swp_type(entry: int) -> int:
    """The type of a swp_entry_t: a swap file's number or one of SWP_*."""
    return entry >> SWP_TYPE_SHIFT


def swp_offset(entry: int) -> int:
    """The offset of a swp_entry_t: a slot, or a frame number with its bits."""
    return entry & SWP_OFFSET_MASK


def swp_entry_to_pte(entry: int) -> int:
    """The page-table form of a swp_entry_t."""
    inverted = ~entry & ((1 << _ARCH_OFFSET_BITS) - 1)
    return ((entry >> SWP_TYPE_SHIFT) << 59) | (inverted << 9)


def pte_to_swp_entry(pte: int) -> int:
    """The swp_entry_t of a swap entry in a page table, its flag bits dropped."""
    offset = ~(pte >> 9) & ((1 << _ARCH_OFFSET_BITS) - 1)
    return ((pte >> 59) << SWP_TYPE_SHIFT) | offset


def is_swap_pte(pte: int) -> bool:
    """Whether the entry is neither empty nor mapped: swap, migration, poison or marker."""
    return pte != 0 and pte & (_PAGE_PRESENT | _PAGE_PROTNONE) == 0


def non_swap_entry(entry: int) -> bool:
    """Whether the swp_entry_t is not in a swap file."""
    return (entry >> SWP_TYPE_SHIFT) >= MAX_SWAPFILES


def is_migration_entry(entry: int) -> bool:
    """Whether the swp_entry_t stands for a page under migration."""
    return SWP_MIGRATION_READ <= (entry >> SWP_TYPE_SHIFT) <= SWP_MIGRATION_WRITE


def is_writable_migration_entry(entry: int) -> bool:
    """Whether the page under migration was mapped writable."""
    return (entry >> SWP_TYPE_SHIFT) == SWP_MIGRATION_WRITE


def is_device_private_entry(entry: int) -> bool:
    """Whether the page is in a device's memory, where the CPU cannot reach it."""
    return (entry >> SWP_TYPE_SHIFT) in (SWP_DEVICE_WRITE, SWP_DEVICE_READ)


def is_writable_device_private_entry(entry: int) -> bool:
    """Whether a page in a device's memory was mapped writable."""
    return (entry >> SWP_TYPE_SHIFT) == SWP_DEVICE_WRITE


def is_device_exclusive_entry(entry: int) -> bool:
    """Whether a page of RAM is a device's alone until the CPU asks for it."""
    return (entry >> SWP_TYPE_SHIFT) == SWP_DEVICE_EXCLUSIVE


def make_pte_marker(marker: int) -> int:
    """The entry that says PTE_MARKER_* of a page that is not there."""
    return swp_entry_to_pte(swp_entry(SWP_PTE_MARKER, marker))


def is_pte_marker(pte: int) -> bool:
    """Whether the entry is a marker."""
    return is_swap_pte(pte) and pte >> 59 == SWP_PTE_MARKER


def pte_marker_get(pte: int) -> int:
    """The PTE_MARKER_* bits of an entry, 0 if it is no marker."""
    return swp_offset(pte_to_swp_entry(pte)) if is_pte_marker(pte) else 0


def pte_none_mostly(pte: int) -> bool:
    """Whether no page and no swap slot is behind the entry: it is empty or a marker."""
    return not pte or is_pte_marker(pte)


def pte_swp_uffd_wp_any(pte: int) -> bool:
    """Whether a swap or migration entry or a marker is write-protected by userfaultfd."""
    if not is_swap_pte(pte):
        return False
    return bool(pte & _PAGE_SWP_UFFD_WP) or bool(pte_marker_get(pte) & PTE_MARKER_UFFD_WP)


def make_migration_entry(migration_type: int, pfn: int, *, young: bool, dirty: bool) -> int:
    """A migration swp_entry_t for `pfn` that keeps the old entry's A and D bits."""
    offset = pfn | (SWP_MIG_YOUNG if young else 0) | (SWP_MIG_DIRTY if dirty else 0)
    return swp_entry(migration_type, offset)


_DECODE = (
    (_PAGE_PRESENT, "P"), (_PAGE_RW, "RW"), (_PAGE_USER, "US"), (_PAGE_ACCESSED, "A"), (_PAGE_DIRTY, "D"),
    (_PAGE_PSE, "PS"), (_PAGE_GLOBAL, "G"), (_PAGE_SPECIAL, "SPECIAL"), (_PAGE_UFFD_WP, "UFFD_WP"),
    (_PAGE_SOFT_DIRTY, "SOFT_DIRTY"), (_PAGE_SAVED_DIRTY, "SAVED_DIRTY"), (_PAGE_NX, "NX"),
)
_SWP_NAMES = {
    SWP_HWPOISON: "hwpoison", SWP_MIGRATION_READ: "migration-read", SWP_PTE_MARKER: "marker",
    SWP_MIGRATION_READ_EXCLUSIVE: "migration-read-exclusive", SWP_MIGRATION_WRITE: "migration-write",
    SWP_DEVICE_WRITE: "device-write", SWP_DEVICE_READ: "device-read",
    SWP_DEVICE_EXCLUSIVE: "device-exclusive",
}


def decode_pte(pte: int) -> str:
    """A host page-table entry in words, for people."""
    if pte == 0:
        return "none"
    if is_swap_pte(pte):
        entry = pte_to_swp_entry(pte)
        kind = _SWP_NAMES.get(swp_type(entry), f"swap type {swp_type(entry)}")
        if SWP_MIGRATION_READ <= swp_type(entry) <= SWP_DEVICE_EXCLUSIVE:
            return f"{kind} pfn {swp_offset(entry) & SWP_PFN_MASK:#x}"
        return f"{kind} offset {swp_offset(entry):#x}" + (" exclusive" if pte & _PAGE_SWP_EXCLUSIVE else "")
    bits = "|".join(name for bit, name in _DECODE if pte & bit)
    return f"pfn {pte_pfn(pte):#x} {bits}"


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
