"""SPTEs: how KVM encodes what it knows about a mapping, and how it reads that back.

Source of truth: arch/x86/kvm/mmu/spte.h and spte.c (Linux 6.18).

EPT SPTE (a leaf; PS in bit 7 above 4K). The hardware's bits are in kvm_model/vmx/ept.py:

    63 62..59  58   57  56  55  54 53..52 51      12  11  9 8 7   6   5..3 2 1 0
    +--+------+---+----+---+---+---+------+----------+---+-+-+--+----+----+-+-+-+
    |VE|      |mmu|host| X |   | R |  AD  |   pfn    |MMU|D|A|PS|IPAT| MT |X|W|R|
    +--+------+---+----+---+---+---+------+----------+---+-+-+--+----+----+-+-+-+
         writable        saved      kind              present
                         by access tracking

MMIO SPTE (R = 0, W = X = 1: the CPU reports a misconfiguration); not MMU-present:

    63 62        52 51      12  11 10       3 2 1 0
    +-+------------+----------+---+----------+-+-+-+
    |0|  gen 18:8  |   gfn    | 0 | gen  7:0 |1|1|0|
    +-+------------+----------+---+----------+-+-+-+

Shadow paging's SPTE, an entry of the x86 page tables that the CPU walks in the place of the guest's:

    63 62      52 51      12  11   10   9   8 7  6 5 4 3 2 1 0
    +--+--------+----------+---+----+----+---+--+-+-+---+-+-+-+
    |NX|        |   pfn    |MMU|mmu |host|   |PS|D|A|   |U|W|P|
    +--+--------+----------+---+----+----+---+--+-+-+---+-+-+-+
                            present  writable

and its MMIO SPTE has P and the reserved bit 51, so that the CPU reports a page fault with RSVD; W and U keep
the guest's rights. The kernel keeps the masks in globals set by the vendor module; here a VM holds a
`SpteMasks`.

Not modelled: encrypted memory (shadow_me_*), the L1TF mask of MMIO SPTEs (this CPU has 46 address
bits and is not affected), host MMIO memory types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_NX,
    _PAGE_PRESENT,
    _PAGE_USER,
)
from kvm_model.vmx.ept import (
    EPT_ACCESSED,
    EPT_DIRTY,
    EPT_EXECUTABLE,
    EPT_IPAT,
    EPT_LARGE,
    EPT_MEMTYPE_SHIFT,
    EPT_MT_WB,
    EPT_READABLE,
    EPT_RWX_MASK,
    EPT_SUPPRESS_VE,
    EPT_WRITABLE,
)

if TYPE_CHECKING:
    from kvm_model.mmu.mmu_internal import KvmMmuPage

__all__ = [
    "ACC_ALL", "ACC_EXEC_MASK", "ACC_USER_MASK", "ACC_WRITE_MASK", "DEFAULT_SPTE_HOST_WRITABLE",
    "DEFAULT_SPTE_MMU_WRITABLE", "EPT_SPTE_HOST_WRITABLE", "EPT_SPTE_MMU_WRITABLE",
    "FROZEN_SPTE", "MMIO_SPTE_GEN_MASK", "PG_LEVEL_1G", "PG_LEVEL_2M",
    "PG_LEVEL_4K", "PG_LEVEL_NUM", "PT_PAGE_SIZE_MASK", "PT_WRITABLE_MASK", "SHADOW_NONPRESENT_VALUE",
    "SPTE_BASE_ADDR_MASK", "SPTE_MMU_PRESENT_MASK", "SPTE_TDP_AD_DISABLED", "SPTE_TDP_AD_MASK",
    "SPTE_TDP_AD_WRPROT_ONLY", "SpteMasks", "decode_spte", "ept_masks", "get_mmio_spte_generation",
    "is_frozen_spte", "is_large_pte", "is_last_spte", "is_shadow_present_pte",
    "kvm_pages_per_hpage", "legacy_masks", "spte_ad_enabled", "spte_to_pfn",
]

PG_LEVEL_4K = 1
PG_LEVEL_2M = 2
PG_LEVEL_1G = 3
PG_LEVEL_NUM = 6

SPTE_MMU_PRESENT_MASK = 1 << 11
SPTE_TDP_AD_MASK = 3 << 52
SPTE_TDP_AD_DISABLED = 1 << 52
SPTE_TDP_AD_WRPROT_ONLY = 2 << 52
SPTE_BASE_ADDR_MASK = ((1 << 52) - 1) & ~0xFFF
PT_WRITABLE_MASK = 1 << 1
PT_PAGE_SIZE_MASK = 1 << 7
ACC_EXEC_MASK = 1
ACC_WRITE_MASK = 2
ACC_USER_MASK = 4
ACC_ALL = ACC_EXEC_MASK | ACC_WRITE_MASK | ACC_USER_MASK
EPT_SPTE_HOST_WRITABLE = 1 << 57
EPT_SPTE_MMU_WRITABLE = 1 << 58
DEFAULT_SPTE_HOST_WRITABLE = 1 << 9
DEFAULT_SPTE_MMU_WRITABLE = 1 << 10
SHADOW_NONPRESENT_VALUE = 1 << 63
FROZEN_SPTE = SHADOW_NONPRESENT_VALUE | 0x5A0

_ACC_TRACK_SAVED_BITS = EPT_READABLE | EPT_EXECUTABLE
_ACC_TRACK_SAVED_SHIFT = 54
_ACC_TRACK_SAVED_MASK = _ACC_TRACK_SAVED_BITS << _ACC_TRACK_SAVED_SHIFT
# A bit that this CPU's 46 physical address bits leave reserved.
_LEGACY_MMIO_VALUE = 1 << 51 | _PAGE_PRESENT
_GEN_LOW_MASK = 0xFF << 3
_GEN_HIGH_MASK = 0x7FF << 52
_GEN_LOW_SHIFT = 3
_GEN_HIGH_SHIFT = 44
MMIO_SPTE_GEN_MASK = (1 << 19) - 1


def kvm_pages_per_hpage(level: int) -> int:
    """4K pages that one entry of `level` maps."""
    return 1 << (9 * (level - 1))


def is_shadow_present_pte(spte: int) -> bool:
    """MMU-present: backed by memory, whether or not the CPU sees it as present."""
    return spte & SPTE_MMU_PRESENT_MASK != 0


def is_frozen_spte(spte: int) -> bool:
    """Whether another task is in the middle of changing it."""
    return spte == FROZEN_SPTE


def is_large_pte(spte: int) -> bool:
    """Bit 7."""
    return spte & PT_PAGE_SIZE_MASK != 0


def is_last_spte(spte: int, level: int) -> bool:
    """Whether a present SPTE of this level is a leaf."""
    return level == PG_LEVEL_4K or spte & PT_PAGE_SIZE_MASK != 0


def spte_to_pfn(spte: int) -> int:
    """The frame, of a leaf or of the child table."""
    return (spte & SPTE_BASE_ADDR_MASK) >> 12


def spte_ad_enabled(spte: int) -> bool:
    """Whether the CPU keeps A and D in this present SPTE."""
    return spte & SPTE_TDP_AD_MASK != SPTE_TDP_AD_DISABLED


def get_mmio_spte_generation(spte: int) -> int:
    """The memslot generation an MMIO SPTE was made under, 19 bits."""
    return (spte & _GEN_LOW_MASK) >> _GEN_LOW_SHIFT | (spte & _GEN_HIGH_MASK) >> _GEN_HIGH_SHIFT


class SpteMasks:
    """The shadow_*_mask globals of one MMU flavour, and what depends on them."""

    __slots__ = (
        "acc_track", "accessed", "ad_enabled", "dirty", "host_writable", "mmio_access", "mmio_mask",
        "mmio_value", "mmu_writable", "mt", "nx", "nx_huge_pages", "present", "user", "x",
    )

    def __init__(
        self, *, ad_enabled: bool, user: int, accessed: int, dirty: int, nx: int, x: int, present: int,
        acc_track: int, host_writable: int, mmu_writable: int, mmio_value: int, mmio_mask: int,
        mmio_access: int, mt: int, nx_huge_pages: bool,
    ) -> None:
        self.ad_enabled = ad_enabled
        self.user = user
        self.accessed = accessed
        self.dirty = dirty
        self.nx = nx
        self.x = x
        self.present = present
        self.acc_track = acc_track
        self.host_writable = host_writable
        self.mmu_writable = mmu_writable
        self.mmio_value = mmio_value
        self.mmio_mask = mmio_mask
        self.mmio_access = mmio_access
        self.mt = mt
        self.nx_huge_pages = nx_huge_pages

    # -- predicates -----------------------------------------------------------------------------

    def is_mmio_spte(self, spte: int) -> bool:
        """Whether it stands for emulated MMIO."""
        return spte & self.mmio_mask == self.mmio_value and self.mmio_value != 0

    def is_access_track_spte(self, spte: int) -> bool:
        """Whether a present SPTE had its rights taken away to see the next access."""
        return not spte_ad_enabled(spte) and spte & self.acc_track == 0

    def is_executable_pte(self, spte: int) -> bool:
        """Whether the CPU may fetch."""
        return spte & (self.x | self.nx) == self.x

    def is_accessed_spte(self, spte: int) -> bool:
        """The accessed bit, the CPU's or, without A/D, the software's."""
        return spte & self.accessed != 0

    def is_mmu_writable_spte(self, spte: int) -> bool:
        """Whether W may be given back without mmu_lock."""
        return spte & self.mmu_writable != 0

    def spte_needs_atomic_update(self, spte: int) -> bool:
        """Whether a present leaf can change under mmu_lock in a way that must not be lost."""
        if not spte & PT_WRITABLE_MASK and spte & self.mmu_writable:
            return True
        if not spte_ad_enabled(spte):
            return True
        return spte & PT_WRITABLE_MASK != 0 and not spte & self.dirty

    def leaf_spte_change_needs_tlb_flush(self, old: int, new: int) -> bool:
        """Whether a present leaf's change takes rights that stale TLB entries may not keep."""
        return old & self.mmu_writable != 0 and not new & self.mmu_writable

    def writable_state_is_legal(self, spte: int) -> bool:
        """check_spte_writable_invariants: one of the four (host, mmu, W) states."""
        if spte & self.mmu_writable:
            return spte & self.host_writable != 0
        return not spte & PT_WRITABLE_MASK

    def access_track_is_legal(self, spte: int) -> bool:
        """What a leaf without A/D remembers of its rights: at least R while it has none, else nothing."""
        if spte_ad_enabled(spte) or not self.acc_track:
            return True
        saved = spte & _ACC_TRACK_SAVED_MASK
        return saved & EPT_READABLE << _ACC_TRACK_SAVED_SHIFT != 0 if not spte & self.acc_track else not saved

    # -- makers ---------------------------------------------------------------------------------

    def make_spte(
        self, sp: KvmMmuPage, pte_access: int, pfn: int, *, prefetch: bool, synchronizing: bool,
        host_writable: bool, wrprot: bool = False,
    ) -> int:
        """A leaf for `pfn` in table `sp`. `wrprot`: the gfn may not become writable (write-tracked).

        The caller marks the slot dirty if W came out: see tdp_mmu_map_handle_target_level.
        """
        level = sp.level
        spte = SPTE_MMU_PRESENT_MASK | self.present
        if sp.ad_disabled:
            spte |= SPTE_TDP_AD_DISABLED
        if not prefetch or synchronizing:
            spte |= self.accessed
        if level > PG_LEVEL_4K and self.nx_huge_pages:
            pte_access &= ~ACC_EXEC_MASK
        spte |= self.x if pte_access & ACC_EXEC_MASK else self.nx
        if pte_access & ACC_USER_MASK:
            spte |= self.user
        if level > PG_LEVEL_4K:
            spte |= PT_PAGE_SIZE_MASK
        spte |= self.mt
        if host_writable:
            spte |= self.host_writable
        else:
            pte_access &= ~ACC_WRITE_MASK
        spte |= pfn << 12
        if pte_access & ACC_WRITE_MASK and not wrprot:
            spte |= PT_WRITABLE_MASK | self.mmu_writable | self.dirty
        if prefetch and not synchronizing:
            spte = self.mark_spte_for_access_track(spte)
        return spte

    def make_nonleaf_spte(self, child_pfn: int) -> int:
        """An entry that points to a child table."""
        spte = SPTE_MMU_PRESENT_MASK | child_pfn << 12 | self.present | PT_WRITABLE_MASK | self.user | self.x
        return spte | (self.accessed if self.ad_enabled else SPTE_TDP_AD_DISABLED)

    def make_small_spte(self, huge_spte: int, child_level: int, index: int) -> int:
        """What entry `index` of the table that replaces a huge SPTE must be."""
        child = huge_spte | (index * kvm_pages_per_hpage(child_level)) << 12
        if child_level == PG_LEVEL_4K:
            child &= ~PT_PAGE_SIZE_MASK
            if self.nx_huge_pages:
                child = self._modify_protections(child, self.x, self.nx)
        return child

    def make_huge_spte(self, small_spte: int, level: int) -> int:
        """The huge SPTE of `level` that covers a present small one."""
        huge = small_spte | PT_PAGE_SIZE_MASK
        huge &= ~((kvm_pages_per_hpage(level) - 1) << 12)
        if self.nx_huge_pages:
            huge = self._modify_protections(huge, self.nx, self.x)
        return huge

    def _modify_protections(self, spte: int, set_: int, clear: int) -> int:
        tracked = self.is_access_track_spte(spte)
        if tracked:
            spte = self.restore_acc_track_spte(spte)
        spte = (spte | set_) & ~clear
        return self.mark_spte_for_access_track(spte) if tracked else spte

    def mark_spte_for_access_track(self, spte: int) -> int:
        """Not accessed: A cleared, or without A/D bits all rights taken, R and X remembered."""
        if spte_ad_enabled(spte):
            return spte & ~self.accessed
        if self.is_access_track_spte(spte):
            return spte
        spte |= (spte & _ACC_TRACK_SAVED_BITS) << _ACC_TRACK_SAVED_SHIFT
        return spte & ~(self.acc_track | self.accessed)

    def restore_acc_track_spte(self, spte: int) -> int:
        """An access-tracked SPTE with its R and X back; W stays away."""
        saved = (spte >> _ACC_TRACK_SAVED_SHIFT) & _ACC_TRACK_SAVED_BITS
        return spte & ~(self.acc_track | _ACC_TRACK_SAVED_MASK) | saved

    def make_mmio_spte(self, gfn: int, access: int, generation: int) -> int:
        """An SPTE that makes accesses to `gfn` exit at once as MMIO while the generation holds."""
        gen = generation & MMIO_SPTE_GEN_MASK
        spte = (gen << _GEN_LOW_SHIFT) & _GEN_LOW_MASK | (gen << _GEN_HIGH_SHIFT) & _GEN_HIGH_MASK
        return spte | self.mmio_value | access & self.mmio_access | gfn << 12

    def get_mmio_spte_gfn(self, spte: int) -> int:
        """The gfn an MMIO SPTE stands for."""
        return (spte & SPTE_BASE_ADDR_MASK & ~self.mmio_value) >> 12


def ept_masks(*, has_ad_bits: bool, mmio_caching: bool = True, nx_huge_pages: bool = False) -> SpteMasks:
    """kvm_mmu_set_ept_masks, on a CPU with execute-only translations; memory type WB with IPAT."""
    return SpteMasks(
        ad_enabled=has_ad_bits, user=EPT_READABLE, accessed=EPT_ACCESSED, dirty=EPT_DIRTY, nx=0,
        x=EPT_EXECUTABLE, present=EPT_SUPPRESS_VE, acc_track=EPT_RWX_MASK,
        host_writable=EPT_SPTE_HOST_WRITABLE, mmu_writable=EPT_SPTE_MMU_WRITABLE,
        mmio_value=EPT_WRITABLE | EPT_EXECUTABLE if mmio_caching else 0,
        mmio_mask=EPT_RWX_MASK | EPT_SUPPRESS_VE, mmio_access=0,
        mt=EPT_MT_WB << EPT_MEMTYPE_SHIFT | EPT_IPAT, nx_huge_pages=nx_huge_pages,
    )


def legacy_masks(*, mmio_caching: bool = True, nx_huge_pages: bool = False) -> SpteMasks:
    """kvm_mmu_reset_all_pte_masks: the entries of shadow paging, which always have A and D."""
    return SpteMasks(
        ad_enabled=True, user=_PAGE_USER, accessed=_PAGE_ACCESSED, dirty=_PAGE_DIRTY, nx=_PAGE_NX, x=0,
        present=_PAGE_PRESENT, acc_track=0, host_writable=DEFAULT_SPTE_HOST_WRITABLE,
        mmu_writable=DEFAULT_SPTE_MMU_WRITABLE, mmio_value=_LEGACY_MMIO_VALUE if mmio_caching else 0,
        mmio_mask=_LEGACY_MMIO_VALUE, mmio_access=ACC_WRITE_MASK | ACC_USER_MASK, mt=0,
        nx_huge_pages=nx_huge_pages,
    )


def decode_spte(spte: int, level: int, masks: SpteMasks) -> str:
    """An SPTE in words, for people."""
    if spte == FROZEN_SPTE:
        return "frozen"
    if masks.is_mmio_spte(spte):
        return f"mmio gfn {masks.get_mmio_spte_gfn(spte):#x} gen {get_mmio_spte_generation(spte):#x}"
    if not is_shadow_present_pte(spte):
        return "not present"
    if masks.nx:
        rights = f"r{'w' if spte & 2 else '-'}{'-' if spte & masks.nx else 'x'}{'u' if spte & 4 else '-'}"
    else:
        rights = "".join(c if spte & b else "-" for b, c in ((1, "r"), (2, "w"), (4, "x")))
    if not is_last_spte(spte, level):
        return f"table {spte_to_pfn(spte):#x} {rights}"
    words = [f"pfn {spte_to_pfn(spte):#x}", rights]
    words += [n for b, n in ((masks.accessed, "A"), (masks.dirty, "D")) if spte & b]
    words += [n for b, n in ((masks.host_writable, "host-w"), (masks.mmu_writable, "mmu-w")) if spte & b]
    if masks.is_access_track_spte(spte):
        words.append("access-tracked")
    if spte & EPT_LARGE and level > PG_LEVEL_4K:
        words.append({PG_LEVEL_2M: "2M", PG_LEVEL_1G: "1G"}[level])
    return " ".join(words)
