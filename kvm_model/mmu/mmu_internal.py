"""What the parts of the MMU share: RET_PF_*, PFERR_*, struct kvm_page_fault, struct kvm_mmu_page.

Source of truth: arch/x86/kvm/mmu/mmu_internal.h, arch/x86/include/asm/kvm_host.h (kvm_mmu_page_role,
PFERR_*), arch/x86/kvm/mmu/mmutrace.h (KVM_MMU_PAGE_PRINTK); Linux 6.18.

Not modelled: encrypted memory, mirror roots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot
    from kvm_model.mmu.rmap import RmapHead

__all__ = [
    "INVALID_PAGE", "KVM_MAX_HUGEPAGE_LEVEL", "KVM_PFN_ERR_FAULT", "KVM_PFN_ERR_HWPOISON",
    "KVM_PFN_ERR_NEEDS_IO", "KVM_PFN_ERR_RO_FAULT", "KVM_PFN_ERR_SIGPENDING", "KVM_PFN_NOSLOT",
    "MMU_PAGE_FIELDS",
    "PFERR_FETCH_MASK", "PFERR_GUEST_FINAL_MASK", "PFERR_GUEST_PAGE_MASK", "PFERR_PRESENT_MASK",
    "PFERR_PRIVATE_ACCESS", "PFERR_RSVD_MASK", "PFERR_USER_MASK", "PFERR_WRITE_MASK",
    "RET_PF_CONTINUE", "RET_PF_EMULATE", "RET_PF_FIXED", "RET_PF_INVALID", "RET_PF_RETRY", "RET_PF_SPURIOUS",
    "RET_PF_WRITE_PROTECTED", "ROLE_4_BYTE_GPTE", "ROLE_ACCESS_MASK", "ROLE_ACCESS_SHIFT",
    "ROLE_AD_DISABLED", "ROLE_CR0_WP", "ROLE_DIRECT", "ROLE_EFER_NX", "ROLE_GUEST_MODE", "ROLE_INVALID",
    "ROLE_LEVEL_MASK", "ROLE_PASSTHROUGH", "ROLE_QUADRANT_MASK", "ROLE_QUADRANT_SHIFT",
    "ROLE_SMAP_ANDNOT_WP", "ROLE_SMEP_ANDNOT_WP", "ROLE_SMM", "ROLE_SMM_SHIFT", "KvmMmuPage", "KvmPageFault",
    "fmt_mmu_page", "is_error_noslot_pfn", "is_error_pfn", "is_obsolete_sp", "page_args", "pferr_flags",
    "role_access", "role_direct", "role_has_4_byte_gpte", "role_level", "role_quadrant", "role_smm",
    "role_with_access", "role_with_level", "role_with_quadrant", "tdp_root_role",
]

RET_PF_CONTINUE = 0
RET_PF_RETRY = 1
RET_PF_EMULATE = 2
RET_PF_WRITE_PROTECTED = 3
RET_PF_INVALID = 4
RET_PF_FIXED = 5
RET_PF_SPURIOUS = 6

PFERR_PRESENT_MASK = 1 << 0
PFERR_WRITE_MASK = 1 << 1
PFERR_USER_MASK = 1 << 2
PFERR_RSVD_MASK = 1 << 3
PFERR_FETCH_MASK = 1 << 4
PFERR_GUEST_FINAL_MASK = 1 << 32
PFERR_GUEST_PAGE_MASK = 1 << 33
PFERR_PRIVATE_ACCESS = 1 << 49

KVM_MAX_HUGEPAGE_LEVEL = 3
INVALID_PAGE = (1 << 64) - 1

# include/linux/kvm_host.h: error pfns live above bit 62, the noslot pfn is bit 63.
KVM_PFN_ERR_FAULT = 0x7FF << 52
KVM_PFN_ERR_HWPOISON = KVM_PFN_ERR_FAULT + 1
KVM_PFN_ERR_RO_FAULT = KVM_PFN_ERR_FAULT + 2
KVM_PFN_ERR_SIGPENDING = KVM_PFN_ERR_FAULT + 3
KVM_PFN_ERR_NEEDS_IO = KVM_PFN_ERR_FAULT + 4
KVM_PFN_NOSLOT = 1 << 63

# union kvm_mmu_page_role: the word that with the gfn is a shadow page's key.
ROLE_LEVEL_MASK = 15
ROLE_4_BYTE_GPTE = 1 << 4
ROLE_QUADRANT_SHIFT = 5
ROLE_QUADRANT_MASK = 3 << ROLE_QUADRANT_SHIFT
ROLE_DIRECT = 1 << 7
ROLE_ACCESS_SHIFT = 8
ROLE_ACCESS_MASK = 7 << ROLE_ACCESS_SHIFT
ROLE_INVALID = 1 << 11
ROLE_EFER_NX = 1 << 12
ROLE_CR0_WP = 1 << 13
ROLE_SMEP_ANDNOT_WP = 1 << 14
ROLE_SMAP_ANDNOT_WP = 1 << 15
ROLE_AD_DISABLED = 1 << 16
ROLE_GUEST_MODE = 1 << 17
ROLE_PASSTHROUGH = 1 << 18
ROLE_SMM_SHIFT = 24
ROLE_SMM = 1 << ROLE_SMM_SHIFT

_PFERR_NAMES = (
    (1 << 0, "P"), (1 << 1, "W"), (1 << 2, "U"), (1 << 5, "PK"), (1 << 6, "SS"), (1 << 15, "SGX"),
    (1 << 3, "RSVD"), (1 << 4, "F"),
)
_ACCESS_STR = ("---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux")


def is_error_pfn(pfn: int) -> bool:
    """Whether GUP failed."""
    return pfn & KVM_PFN_ERR_FAULT != 0


def is_error_noslot_pfn(pfn: int) -> bool:
    """Whether there is no frame: GUP failed, or no memslot."""
    return pfn & (KVM_PFN_ERR_FAULT | KVM_PFN_NOSLOT) != 0


def pferr_flags(error_code: int) -> str:
    """`__print_flags(error_code, "|", kvm_mmu_trace_pferr_flags)`."""
    words = []
    for bit, name in _PFERR_NAMES:
        if error_code & bit:
            words.append(name)
            error_code &= ~bit
    if error_code:
        words.append(f"{error_code:#x}")
    return "|".join(words)


# -- the role word ------------------------------------------------------------------------------


def role_level(role: int) -> int:
    """The level of the page's entries: 1 maps 4K pages."""
    return role & ROLE_LEVEL_MASK


def role_access(role: int) -> int:
    """ACC_* that the guest's tables grant on the way to the page."""
    return role >> ROLE_ACCESS_SHIFT & 7


def role_quadrant(role: int) -> int:
    """Which part of a guest table of 4-byte entries the page shadows."""
    return role >> ROLE_QUADRANT_SHIFT & 3


def role_has_4_byte_gpte(role: int) -> bool:
    """Whether the guest's entries are those of 32-bit paging without PAE."""
    return role & ROLE_4_BYTE_GPTE != 0


def role_direct(role: int) -> bool:
    """Whether the page maps gfns in order and shadows no table of the guest's."""
    return role & ROLE_DIRECT != 0


def role_smm(role: int) -> int:
    """The address space whose memslots the page maps: 1 in system-management mode."""
    return role >> ROLE_SMM_SHIFT


def role_with_level(role: int, level: int) -> int:
    """The role at another level."""
    return role & ~ROLE_LEVEL_MASK | level


def role_with_access(role: int, access: int) -> int:
    """The role with other rights."""
    return role & ~ROLE_ACCESS_MASK | access << ROLE_ACCESS_SHIFT


def role_with_quadrant(role: int, quadrant: int) -> int:
    """The role of another part of the same guest table."""
    return role & ~ROLE_QUADRANT_MASK | quadrant << ROLE_QUADRANT_SHIFT


def tdp_root_role(*, ad_disabled: bool, level: int = 4) -> int:
    """kvm_calc_tdp_mmu_root_page_role, outside SMM and nesting."""
    role = level | ROLE_DIRECT | ROLE_ACCESS_MASK | ROLE_EFER_NX | ROLE_CR0_WP
    return role | ROLE_AD_DISABLED if ad_disabled else role


class KvmMmuPage:
    """struct kvm_mmu_page: one page of SPTEs.

    `spt` is its pfn, `ptep` the index in Ram.u64 of the SPTE that points to it (-1: a root), which only the
    TDP MMU's pages have; of the others any number may point to one, `parent_ptes`. `scheduled_to_zap` and
    `root_count` matter for roots only.

    Only pages that shadow a guest table (at `gfn`) have the rest. `unsync`: the guest may write that table.
    `unsync_child_bitmap`: the entries that lead to such a page. `shadowed_translation`: for each entry
    gfn << 12 | ACC_* of the guest's, where the level can have leaves. `write_flooding_count`: emulated writes
    to the table since it was last used.
    """

    __slots__ = (
        "gfn", "level", "mmu_valid_gen", "nx_huge_page_disallowed", "parent_ptes", "ptep", "role",
        "root_count", "scheduled_to_zap", "shadowed_translation", "spt", "tdp_mmu_page", "unsync",
        "unsync_child_bitmap", "write_flooding_count",
    )

    def __init__(self, spt: int, ptep: int, gfn: int, role: int) -> None:
        self.spt = spt
        self.ptep = ptep
        self.gfn = gfn
        self.role = role
        self.level = role & 15
        self.mmu_valid_gen = 0
        self.root_count = 0
        self.scheduled_to_zap = False
        self.nx_huge_page_disallowed = False
        self.tdp_mmu_page = True
        self.parent_ptes: RmapHead
        self.unsync = False
        self.unsync_child_bitmap: set[int] = set()
        self.shadowed_translation: list[int] | None = None
        self.write_flooding_count = 0

    @property
    def invalid(self) -> bool:
        """role.invalid."""
        return self.role & ROLE_INVALID != 0

    @property
    def ad_disabled(self) -> bool:
        """role.ad_disabled."""
        return self.role & ROLE_AD_DISABLED != 0

    def __repr__(self) -> str:
        return (
            f"<KvmMmuPage spt {self.spt:#x} gfn {self.gfn:#x} level {self.level} "
            f"root_count {self.root_count}>"
        )


def page_args(sp: KvmMmuPage) -> tuple[int, int, int, int, bool]:
    """What the kernel's events tell of a page: the arguments of fmt_mmu_page."""
    return sp.mmu_valid_gen, sp.gfn, sp.role, sp.root_count, sp.unsync


def is_obsolete_sp(kvm: Kvm, sp: KvmMmuPage) -> bool:
    """Whether vCPUs must drop the page: it is invalid or, outside the TDP MMU, of an old generation."""
    return sp.invalid or (not sp.tdp_mmu_page and sp.mmu_valid_gen != kvm.mmu_valid_gen)


MMU_PAGE_FIELDS = ("mmu_valid_gen", "gfn", "role", "root_count", "unsync")
"""KVM_MMU_PAGE_FIELDS: how the events of mmutrace.h describe a page; page_args has the values."""


def fmt_mmu_page(gen: int, gfn: int, role: int, root_count: int, unsync: bool) -> str:
    """KVM_MMU_PAGE_PRINTK, with its NUL byte."""
    return (
        f"sp gen {gen} gfn {gfn:x} l{role & 15} {4 if role >> 4 & 1 else 8}-byte q{role >> 5 & 3}"
        f"{' direct' if role >> 7 & 1 else ''} {_ACCESS_STR[role >> 8 & 7]}"
        f"{' invalid' if role >> 11 & 1 else ''} {'' if role >> 12 & 1 else '!'}nxe "
        f"{'!' if role >> 16 & 1 else ''}ad root {root_count} {'unsync' if unsync else 'sync'}\0"
    )


class KvmPageFault:
    """struct kvm_page_fault: one fault on its way. `refcounted_page` is a pfn, -1: none.

    `addr` is a gpa under TDP, else the guest's linear address; then `gfn` is known after the guest's tables
    were walked. `write_fault_to_shadow_pgtable`: the write is to a table that translates its own address.
    """

    __slots__ = (
        "addr", "error_code", "exec", "gfn", "goal_level", "huge_page_disallowed", "is_private",
        "map_writable", "max_level", "mmu_seq", "nx_huge_page_workaround_enabled", "pfn", "prefetch",
        "present", "refcounted_page", "req_level", "rsvd", "slot", "user", "write",
        "write_fault_to_shadow_pgtable",
    )

    def __init__(
        self, addr: int, error_code: int, *, prefetch: bool = False, nx_workaround: bool = False,
        max_level: int = KVM_MAX_HUGEPAGE_LEVEL,
    ) -> None:
        self.addr = addr
        self.error_code = error_code
        self.prefetch = prefetch
        self.exec = error_code & PFERR_FETCH_MASK != 0
        self.write = error_code & PFERR_WRITE_MASK != 0
        self.present = error_code & PFERR_PRESENT_MASK != 0
        self.rsvd = error_code & PFERR_RSVD_MASK != 0
        self.user = error_code & PFERR_USER_MASK != 0
        self.is_private = error_code & PFERR_PRIVATE_ACCESS != 0
        self.nx_huge_page_workaround_enabled = nx_workaround
        self.huge_page_disallowed = False
        self.max_level = max_level
        self.req_level = 1
        self.goal_level = 1
        self.gfn = addr >> 12
        self.slot: KvmMemorySlot | None = None
        self.mmu_seq = 0
        self.pfn = KVM_PFN_ERR_FAULT
        self.refcounted_page = -1
        self.map_writable = False
        self.write_fault_to_shadow_pgtable = False
