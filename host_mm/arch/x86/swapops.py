"""Swap entries: what a page-table entry says of a page that it does not map.

Source of truth: arch/x86/include/asm/pgtable_64.h (__swp_entry), include/linux/swap.h and swapops.h (entry
types); Linux 6.18.

Swap entry (P = 0, PROTNONE = 0):

     63  59 58                9  8  7..4  3   2   1  0
    +------+-------------------+---+----+---+---+--+--+
    | type |      ~offset      | 0 | 0  | E | WP|SD| 0|    E: anon-exclusive, SD: soft dirty
    +------+-------------------+---+----+---+---+--+--+

Not modelled: entries of level 2 other than those of migration.
"""

from __future__ import annotations

from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_GLOBAL,
    _PAGE_NX,
    _PAGE_PRESENT,
    _PAGE_PROTNONE,
    _PAGE_PSE,
    _PAGE_PWT,
    _PAGE_RW,
    _PAGE_SAVED_DIRTY,
    _PAGE_SOFT_DIRTY,
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    _PAGE_USER,
    pte_pfn,
)

__all__ = [
    "MAX_SWAPFILES", "PTE_MARKER_GUARD", "PTE_MARKER_POISONED", "PTE_MARKER_UFFD_WP", "SWP_DEVICE_EXCLUSIVE",
    "SWP_DEVICE_READ", "SWP_DEVICE_WRITE", "SWP_HWPOISON", "SWP_MIGRATION_READ",
    "SWP_MIGRATION_READ_EXCLUSIVE", "SWP_MIGRATION_WRITE", "SWP_MIG_DIRTY", "SWP_MIG_YOUNG",
    "SWP_OFFSET_MASK", "SWP_PFN_MASK", "SWP_PTE_MARKER", "SWP_TYPE_SHIFT", "_PAGE_SWP_EXCLUSIVE",
    "_PAGE_SWP_SOFT_DIRTY", "_PAGE_SWP_UFFD_WP", "decode_pte", "is_device_exclusive_entry",
    "is_device_private_entry", "is_migration_entry", "is_pte_marker", "is_swap_pte",
    "is_writable_device_private_entry", "is_writable_migration_entry", "make_migration_entry",
    "make_pte_marker", "non_swap_entry", "pte_marker_get", "pte_none_mostly", "pte_swp_uffd_wp_any",
    "pte_to_swp_entry", "swp_entry", "swp_entry_to_pte", "swp_offset", "swp_type",
]

_PAGE_SWP_SOFT_DIRTY = _PAGE_RW
_PAGE_SWP_UFFD_WP = _PAGE_USER
_PAGE_SWP_EXCLUSIVE = _PAGE_PWT
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
