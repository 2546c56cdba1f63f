"""The guest's paging-structure entry, the control bits that steer paging, the #PF error code.

Source: Intel SDM vol. 3A, section 4.3 (32-bit paging), 4.4 (PAE), 4.5 (4-level and 5-level), tables 4-4 to
4-20 (entry formats), 4.6 (access rights), 4.7 (page-fault exceptions), 4.8 (accessed and dirty flags).

Entry of 8 bytes (`PS`: leaf in a PDPTE or PDE, reserved above, PAT in a PTE):

    63 62          52 51                  12 11   9 8 7 6 5 4 3 2 1 0
    +--+-------------+----------------------+------+-+-+-+-+-+-+-+-+-+
    |XD|   ignored   |    physical frame    | ign. |G|P|D|A|P|P|U|R|P|
    |  |             |                      |      | |S| | |C|W|/|/| |
    |  |             |                      |      | | | | |D|T|S|W| |
    +--+-------------+----------------------+------+-+-+-+-+-+-+-+-+-+

Bits 51:MAXPHYADDR are reserved, XD is reserved while EFER.NXE is 0; a 2M leaf has bits 20:13
reserved and a 1G leaf bits 29:13 (bit 12 is PAT there). In PAE paging bits 62:52 are reserved, too, and the
four PDPTEs are registers: of them bits 2:1, 8:5 and all from MAXPHYADDR up are reserved.

Entry of 4 bytes, 32-bit paging: the low half, frame in bits 31:12. With CR4.PSE a PDE may map 4M (PS; else
the bit is ignored), and its bits 20:13 are bits 39:32 of the address, bit 21 is reserved.

All masks but XD fit a signed 64-bit int, so that compiled code can use them; XD is tested there as
`entry < 0`.

Not modelled: protection keys, shadow-stack pages.
"""

from __future__ import annotations

__all__ = [
    "CR0_PE", "CR0_PG", "CR0_WP", "CR4_LA57", "CR4_PAE", "CR4_PGE", "CR4_PSE", "CR4_SMAP", "CR4_SMEP",
    "EFER_LMA", "EFER_LME", "EFER_NXE", "EFER_SCE", "EFLAGS_AC", "MAXPHYADDR", "PDE32_RESERVED",
    "PFERR_FETCH", "PFERR_PRESENT", "PFERR_RSVD", "PFERR_USER", "PFERR_WRITE", "PTE_ACCESSED",
    "PTE_ADDR_MASK", "PTE_DIRTY", "PTE_GLOBAL", "PTE_PCD", "PTE_PRESENT", "PTE_PS", "PTE_PWT", "PTE_RW",
    "PTE_USER", "PTE_XD", "is_canonical", "pae_paging", "pde32_frame", "pdpte_reserved", "pte_reserved",
    "table_index",
]

CR0_PE = 1 << 0
CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_PGE = 1 << 7
CR4_LA57 = 1 << 12
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
EFER_SCE = 1 << 0
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11
EFLAGS_AC = 1 << 18

PTE_PRESENT = 1 << 0
PTE_RW = 1 << 1
PTE_USER = 1 << 2
PTE_PWT = 1 << 3
PTE_PCD = 1 << 4
PTE_ACCESSED = 1 << 5
PTE_DIRTY = 1 << 6
PTE_PS = 1 << 7
PTE_GLOBAL = 1 << 8
PTE_XD = 1 << 63

MAXPHYADDR = 46
"""What CPUID.80000008H:EAX[7:0] must tell the guest; the same as the width of the EPT's frames."""
PTE_ADDR_MASK = 0x000F_FFFF_FFFF_F000

PFERR_PRESENT = 1 << 0
PFERR_WRITE = 1 << 1
PFERR_USER = 1 << 2
PFERR_RSVD = 1 << 3
PFERR_FETCH = 1 << 4

_PAE_RESERVED = 0x7FF0_0000_0000_0000
_ADDR_RESERVED = PTE_ADDR_MASK & ~((1 << MAXPHYADDR) - 1)
PDE32_RESERVED = 1 << 21
"""The reserved bit of a PDE that maps 4M."""


def is_canonical(gva: int, cr4: int) -> bool:
    """Whether bits 63:47 (with CR4.LA57 63:56) are equal; `gva` as a signed or an unsigned 64-bit number."""
    if cr4 & CR4_LA57:
        top = gva >> 56
        return top == 0 or top == -1 or top == 0xFF
    top = gva >> 47
    return top == 0 or top == -1 or top == 0x1FFFF


def pae_paging(cr0: int, cr4: int, efer: int) -> bool:
    """Whether these make PAE paging. By LME, since LMA only follows when PG is set."""
    return cr0 & CR0_PG != 0 and cr4 & CR4_PAE != 0 and not efer & EFER_LME


def table_index(gva: int, level: int) -> int:
    """Index of the 8-byte entry that translates `gva` in a table of `level` (4: PML4, 1: page table)."""
    return gva >> (12 + 9 * (level - 1)) & 511


def pde32_frame(entry: int) -> int:
    """Address of the 4M page that a PDE of 32-bit paging maps."""
    return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32


def pdpte_reserved(entry: int) -> bool:
    """Whether a PDPTE register of PAE paging may not be loaded with this entry, if it is present."""
    return entry < 0 or entry & (_ADDR_RESERVED | _PAE_RESERVED | 0x1E6) != 0


def pte_reserved(entry: int, level: int, efer: int) -> bool:
    """Whether a present 8-byte entry of a table of `level` has a reserved bit set; without LMA in PAE."""
    if entry & _ADDR_RESERVED:
        return True
    if not efer & EFER_LMA and entry & _PAE_RESERVED:
        return True
    if entry < 0 and not efer & EFER_NXE:
        return True
    if level == 1 or not entry & PTE_PS:
        return False
    if level >= 4:
        return True
    return entry & ((1 << (12 + 9 * (level - 1))) - 1) & ~0x1FFF != 0
