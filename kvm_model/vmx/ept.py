"""The EPT entry and EPTP: bit layout and the rules of misconfiguration. Constants, as plain ints.

Source: Intel SDM vol. 3C, section 29.3.2 (EPT translation), tables 29-1 to 29-6, section 29.3.3.1
(EPT misconfigurations), section 25.6.11 (EPTP); arch/x86/include/asm/vmx.h: VMX_EPT_*.

EPT entry (4K leaf; `L`: large page, or reserved in a 4K entry and ignored):

    63 62          52 51                  12 11 10 9 8 7 6 5  3 2 1 0
    +-+--------------+----------------------+--+--+-+-+-+-+----+-+-+-+
    |V|   ignored    |    physical frame    |ig|UX|D|A|L|I| MT |X|W|R|
    +-+--------------+----------------------+--+--+-+-+-+-+----+-+-+-+
     suppress #VE                                        |  memory type (leaf)
                                                         IPAT (leaf)

A non-leaf entry has bits 7:3 reserved (0). Bit 8 is A and bit 9 D (leaf only) where EPTP bit 6 is
set; else they are ignored. Addresses above MAXPHYADDR are reserved.

All masks but bit 63 fit a signed 64-bit int, so that compiled code can use them; bit 63 is tested
there as `entry < 0`.

Not modelled: mode-based execute control (bit 10), supervisor shadow stacks (60), paging-write
(58), verify-guest-paging (57), sub-page write permissions (61), #VE delivery, 5-level EPT.
"""

from __future__ import annotations

__all__ = [
    "EPTP_AD_ENABLE", "EPTP_MT_WB", "EPTP_PWL_4", "EPT_ACCESSED", "EPT_ADDR_MASK", "EPT_DIRTY",
    "EPT_EXECUTABLE", "EPT_IPAT", "EPT_LARGE", "EPT_MAXPHYADDR", "EPT_MEMTYPE_MASK",
    "EPT_MEMTYPE_SHIFT", "EPT_MT_UC", "EPT_MT_WB", "EPT_MT_WC", "EPT_MT_WP", "EPT_MT_WT",
    "EPT_READABLE", "EPT_RWX_MASK", "EPT_SUPPRESS_VE", "EPT_WRITABLE", "PML_ENTRIES", "VMCS_PML_ADDRESS",
    "VMCS_PML_INDEX", "ept_index", "ept_misconfigured",
    "make_eptp",
]

EPT_READABLE = 1 << 0
EPT_WRITABLE = 1 << 1
EPT_EXECUTABLE = 1 << 2
EPT_RWX_MASK = 0x7
EPT_MEMTYPE_SHIFT = 3
EPT_MEMTYPE_MASK = 0x7 << 3
EPT_IPAT = 1 << 6
EPT_LARGE = 1 << 7
EPT_ACCESSED = 1 << 8
EPT_DIRTY = 1 << 9
EPT_SUPPRESS_VE = 1 << 63

EPT_MT_UC = 0
EPT_MT_WC = 1
EPT_MT_WT = 4
EPT_MT_WP = 5
EPT_MT_WB = 6

EPT_MAXPHYADDR = 46
"""Physical address width of the modelled CPU: frame bits are 45:12, bits 51:46 reserved."""
EPT_ADDR_MASK = 0x000F_FFFF_FFFF_F000

EPTP_MT_WB = 6
EPTP_PWL_4 = 3 << 3
EPTP_AD_ENABLE = 1 << 6

PML_ENTRIES = 512
"""Entries of a page-modification log: one page of guest-physical addresses."""
VMCS_PML_ADDRESS = 0
VMCS_PML_INDEX = 1
"""Words of the VMCS that the CPU reads, and for the index writes, in the middle of an access. A VMCS's
layout is the CPU's own affair (SDM vol. 3C 25.2); this CPU keeps no other field in memory."""

_ADDR_RESERVED = EPT_ADDR_MASK & ~((1 << EPT_MAXPHYADDR) - 1)
_LEAF_MT_LEGAL = 1 << EPT_MT_UC | 1 << EPT_MT_WC | 1 << EPT_MT_WT | 1 << EPT_MT_WP | 1 << EPT_MT_WB


def make_eptp(root_hpa: int, ad_enabled: bool) -> int:
    """The EPTP that points at a 4-level root (vmx.c: construct_eptp)."""
    return root_hpa | EPTP_MT_WB | EPTP_PWL_4 | (EPTP_AD_ENABLE if ad_enabled else 0)


def ept_index(gpa: int, level: int) -> int:
    """Index of the entry that translates `gpa` in a table of `level` (1: 4K entries)."""
    return gpa >> (12 + 9 * (level - 1)) & 511


def ept_misconfigured(entry: int, level: int) -> bool:
    """Whether an entry with any of R, W, X set is one that the CPU refuses (SDM 29.3.3.1).

    An entry without R, W and X is not present and never misconfigured. Execute-only translations
    are supported, so X alone is legal.
    """
    rwx = entry & EPT_RWX_MASK
    if not rwx:
        return False
    if not rwx & EPT_READABLE and rwx & EPT_WRITABLE:
        return True
    if entry & _ADDR_RESERVED:
        return True
    leaf = level == 1 or (entry & EPT_LARGE and level <= 3)
    if not leaf:
        # Bit 7 is reserved in a level-4 entry and clear here otherwise; bits 6:3 are reserved.
        return entry & (EPT_MEMTYPE_MASK | EPT_IPAT | EPT_LARGE) != 0
    if not _LEAF_MT_LEGAL >> (entry >> EPT_MEMTYPE_SHIFT & 7) & 1:
        return True
    return level > 1 and entry & EPT_ADDR_MASK & ((1 << (9 * (level - 1) + 12)) - 1) != 0
