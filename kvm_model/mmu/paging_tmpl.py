"""KVM's walk of the guest's page tables, in software: for shadow paging, and wherever KVM needs a gva's gpa.

Source of truth: arch/x86/kvm/mmu/paging_tmpl.h: walk_addr_generic, update_accessed_dirty_bits, gpte_access,
gpte_changed, protect_clean_gpte, gva_to_gpa, is_last_gpte; mmu.c: nonpaging_gva_to_gpa; mmutrace.h; Linux
6.18. 5.10: its cmpxchg_gpte.

The guest's entries are read and updated through the VMM's mapping of its memory, as user space would: a
table that the host swapped out or shares is faulted in, with the notifier brackets that this takes, and
A and D land by cmpxchg. If the entry changed in between the walk begins anew.

Two formats: entries of 4 bytes (32-bit paging, 2 levels, PSE36) and of 8 (PAE, 4 and 5 levels). The
PDPTEs of PAE are registers, not memory.

Not modelled: guest EPT tables (nesting), protection keys, A and D disabled, memory of the VMM that has no
struct page behind a guest table (5.10's cmpxchg_gpte maps it itself).
"""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING

from host_mm.gup import FOLL_WRITE, get_user_pages_unlocked
from host_mm.kernel.errors import KernelError
from host_mm.uaccess import copy_from_user, try_cmpxchg_user
from kvm_model.follow_pfn import kvm_release_page_dirty
from kvm_model.guest_access import (
    kvm_is_visible_memslot,
    kvm_vcpu_gfn_to_memslot,
    kvm_vcpu_mark_page_dirty,
    kvm_vcpu_read_guest_atomic,
)
from kvm_model.memslots import KVM_MEM_READONLY
from kvm_model.mmu.invalidate import INVALID_GPA
from kvm_model.mmu.kvm_mmu import (
    PF_VECTOR,
    PT32E_ROOT_LEVEL,
    KvmMmu,
    X86Exception,
    is_cr0_pg,
    is_cr4_pae,
    is_cr4_pse,
    is_cr4_smep,
    is_efer_nx,
    is_rsvd_bits_set,
    kvm_init_mmu,
    permission_fault,
)
from kvm_model.mmu.mmu_internal import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    pferr_flags,
)
from kvm_model.mmu.spte import ACC_WRITE_MASK, PG_LEVEL_4K
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "PAGING32", "PAGING64", "PTE_PREFETCH_NUM", "PT_ACCESSED_MASK", "PT_DIRTY_MASK", "PT_PAGE_SIZE_MASK",
    "PT_PRESENT_MASK", "PT_WRITABLE_MASK", "TRACEPOINTS", "GuestPaging", "GuestWalker", "gpte_access",
    "gpte_changed", "gpte_to_gfn", "gpte_to_gfn_lvl", "guest_paging", "gva_to_gpa", "is_last_gpte",
    "is_present_gpte", "kvm_pdptr_read", "prefetch_invalid_gpte", "protect_clean_gpte", "walk_addr",
]

PT_PRESENT_MASK = 1 << 0
PT_WRITABLE_MASK = 1 << 1
_PT_USER_MASK = 1 << 2
PT_ACCESSED_MASK = 1 << 5
PT_DIRTY_MASK = 1 << 6
PT_PAGE_SIZE_MASK = 1 << 7
_PT64_NX_MASK = 1 << 63
_ALL_ONES = (1 << 64) - 1
_PSE36_MASK = 15 << 13
_PSE36_SHIFT = 7
PTE_PREFETCH_NUM = 8

KVM_MMU_PAGETABLE_WALK = Tracepoint(
    "kvmmmu", "kvm_mmu_pagetable_walk", ("addr", "pferr"),
    lambda addr, pferr: f"addr {addr:x} pferr {pferr:x} {pferr_flags(pferr)}",
    doc="KVM starts to walk the guest's tables for an access.",
)
KVM_MMU_PAGING_ELEMENT = Tracepoint(
    "kvmmmu", "kvm_mmu_paging_element", ("pte", "level"), lambda pte, level: f"pte {pte:x} level {level}",
    doc="A guest entry that the walk read.",
)
KVM_MMU_SET_ACCESSED_BIT = Tracepoint(
    "kvmmmu", "kvm_mmu_set_accessed_bit", ("gpa",), lambda gpa: f"gpa {gpa:x}",
    doc="The walk sets A in the guest entry at gpa.",
)
KVM_MMU_SET_DIRTY_BIT = Tracepoint(
    "kvmmmu", "kvm_mmu_set_dirty_bit", ("gpa",), lambda gpa: f"gpa {gpa:x}",
    doc="The walk sets D in the guest entry at gpa.",
)
KVM_MMU_WALKER_ERROR = Tracepoint(
    "kvmmmu", "kvm_mmu_walker_error", ("pferr",), lambda pferr: f"pferr {pferr:x} {pferr_flags(pferr)}",
    doc="The guest's tables refuse the access: the page fault is the guest's own.",
)
TRACEPOINTS = (
    KVM_MMU_PAGETABLE_WALK, KVM_MMU_PAGING_ELEMENT, KVM_MMU_SET_ACCESSED_BIT, KVM_MMU_SET_DIRTY_BIT,
    KVM_MMU_WALKER_ERROR,
)


class GuestPaging:
    """What PTTYPE selects: entries of `gpte_size` bytes, 2 ** `level_bits` in a table of 4 KiB."""

    __slots__ = ("base_addr_mask", "gpte_size", "level_bits", "nx_mask")

    def __init__(self, gpte_size: int, level_bits: int, base_addr_mask: int, nx_mask: int) -> None:
        self.gpte_size = gpte_size
        self.level_bits = level_bits
        self.base_addr_mask = base_addr_mask
        self.nx_mask = nx_mask

    def index(self, addr: int, level: int) -> int:
        """PT_INDEX: which entry of a table of `level` translates `addr`."""
        return addr >> 12 + self.level_bits * (level - 1) & (1 << self.level_bits) - 1

    def offset_mask(self, level: int) -> int:
        """PT_LVL_OFFSET_MASK: the frame bits that a leaf of `level` leaves to the address."""
        return self.base_addr_mask & (1 << 12 + self.level_bits * (level - 1)) - 1


PAGING64 = GuestPaging(8, 9, 0x000F_FFFF_FFFF_F000, _PT64_NX_MASK)
PAGING32 = GuestPaging(4, 10, 0xFFFF_F000, 0)


def guest_paging(mmu: KvmMmu) -> GuestPaging:
    """The format of the guest's entries; paging is on."""
    return PAGING64 if is_cr4_pae(mmu) else PAGING32


class GuestWalker:
    """struct guest_walker: one walk. Lists are indexed by level - 1, and filled from `max_level` to `level`.

    `pt_access` are the rights (ACC_*) on the way down to and including that level, `pte_access` those of the
    translation. `ptep_user` is the entry's host virtual address. After a refusal `fault` says why.
    """

    __slots__ = (
        "fault", "gfn", "level", "max_level", "paging", "prefetch_ptes", "pt_access", "pte_access", "pte_gpa",
        "pte_writable", "ptep_user", "ptes", "table_gfn",
    )

    def __init__(self) -> None:
        self.paging = PAGING64
        self.level = 0
        self.max_level = 0
        self.table_gfn = [0] * 5
        self.ptes = [0] * 5
        self.prefetch_ptes = [0] * PTE_PREFETCH_NUM
        self.pte_gpa = [0] * 5
        self.ptep_user = [0] * 5
        self.pte_writable = [False] * 5
        self.pt_access = [0] * 5
        self.pte_access = 0
        self.gfn = 0
        self.fault = X86Exception()


# -- entries ------------------------------------------------------------------------------------


def gpte_to_gfn_lvl(paging: GuestPaging, gpte: int, level: int) -> int:
    """The first gfn of the page, or the gfn of the table, that an entry of `level` refers to."""
    return (gpte & paging.base_addr_mask & ~paging.offset_mask(level)) >> 12


def gpte_to_gfn(paging: GuestPaging, gpte: int) -> int:
    """The same of an entry that refers to a table or a 4K page."""
    return (gpte & paging.base_addr_mask) >> 12


def is_present_gpte(gpte: int) -> bool:
    """Whether the CPU would use the entry."""
    return gpte & PT_PRESENT_MASK != 0


def gpte_access(gpte: int) -> int:
    """ACC_* of a present entry: P is where the right to execute stands, unless NX takes it."""
    return gpte & (PT_WRITABLE_MASK | _PT_USER_MASK | PT_PRESENT_MASK) ^ gpte >> 63


def protect_clean_gpte(access: int, gpte: int) -> int:
    """`access` without the right to write if the entry is not dirty: the write that sets D must fault."""
    return access if gpte & PT_DIRTY_MASK else access & ~ACC_WRITE_MASK


def is_last_gpte(mmu: KvmMmu, level: int, gpte: int) -> bool:
    """Whether the walk ends with this entry. In 32-bit paging bit 7 is ignored without CR4.PSE."""
    if level == PG_LEVEL_4K:
        return True
    return gpte & PT_PAGE_SIZE_MASK != 0 and (is_cr4_pae(mmu) or is_cr4_pse(mmu))


def prefetch_invalid_gpte(mmu: KvmMmu, gpte: int) -> bool:
    """Whether a 4K entry maps nothing ahead of its use: not present, not accessed, reserved bits."""
    return (
        not is_present_gpte(gpte) or not gpte & PT_ACCESSED_MASK
        or is_rsvd_bits_set(mmu, gpte, PG_LEVEL_4K)
    )


# -- the walk -----------------------------------------------------------------------------------


def kvm_pdptr_read(vcpu: Vcpu, index: int) -> int:
    """A PDPTE register of the guest: the CPU's under EPT, else KVM's copy."""
    if vcpu.kvm.tdp_enabled:
        return vcpu.kvm.cpu.get_reg(vcpu, f"pdptr{index}")
    return vcpu.mmu.pae_pdptrs[index]


def walk_addr(walker: GuestWalker, vcpu: Vcpu, addr: int, access: int) -> bool:
    """Translate `addr` for `access` (PFERR_*) by the guest's tables, setting A and D; False: `walker.fault`.

    The vCPU's roles are up to date and paging is on. May sleep and fault; hold SRCU and no mmu_lock.
    """
    if (t := vcpu.kvm.trace.kvm_mmu_pagetable_walk) is not None:
        t(addr, access & 0xFFFFFFFF)
    walker.paging = guest_paging(vcpu.mmu)
    while True:
        errcode, accessed_dirty = _walk_tables(walker, vcpu, addr, access)
        if errcode < 0:
            errcode = ~errcode
            break
        if accessed_dirty:
            return True
        ret = _update_accessed_dirty_bits(walker, vcpu, access)
        if ret == 0:
            return True
        if ret < 0:
            errcode = 0
            break
    _set_fault(walker, vcpu, addr, access, errcode)
    return False


def _set_fault(walker: GuestWalker, vcpu: Vcpu, addr: int, access: int, errcode: int) -> None:
    mmu = vcpu.mmu
    errcode |= access & (PFERR_WRITE_MASK | PFERR_USER_MASK)
    if access & PFERR_FETCH_MASK and (is_efer_nx(mmu) or is_cr4_smep(mmu)):
        errcode |= PFERR_FETCH_MASK
    fault = walker.fault
    fault.vector = PF_VECTOR
    fault.error_code_valid = True
    fault.error_code = errcode
    fault.address = addr
    if (t := vcpu.kvm.trace.kvm_mmu_walker_error) is not None:
        t(errcode)


def _walk_tables(walker: GuestWalker, vcpu: Vcpu, addr: int, access: int) -> tuple[int, bool]:
    """(0, whether A and D need no update) or (~P and RSVD of the error code, _)."""
    mmu = vcpu.mmu
    paging = walker.paging
    walker.level = mmu.guest_level
    pte = vcpu.kvm.cpu.get_reg(vcpu, "cr3")
    if walker.level == PT32E_ROOT_LEVEL:
        pte = kvm_pdptr_read(vcpu, addr >> 30 & 3)
        if (t := vcpu.kvm.trace.kvm_mmu_paging_element) is not None:
            t(pte, walker.level)
        if not is_present_gpte(pte):
            return ~0, False
        walker.level -= 1
    walker.max_level = walker.level
    # NX is inverted, so that it can be ANDed like the rights.
    pte_access = _ALL_ONES
    while True:
        level = walker.level
        pt_access = pte_access
        pte = _read_gpte(walker, vcpu, addr, gpte_to_gfn(paging, pte))
        if pte < 0:
            return ~0, False
        pte_access = pt_access & (pte ^ paging.nx_mask)
        if not is_present_gpte(pte):
            return ~0, False
        if is_rsvd_bits_set(mmu, pte, level):
            return ~(PFERR_RSVD_MASK | PFERR_PRESENT_MASK), False
        walker.ptes[level - 1] = pte
        _note_pt_access(walker, vcpu, gpte_access(pt_access ^ paging.nx_mask))
        if is_last_gpte(mmu, level, pte):
            break
        walker.level -= 1
    return _check_leaf(walker, vcpu, addr, access, pte_access)


def _note_pt_access(walker: GuestWalker, vcpu: Vcpu, access: int) -> None:
    if "one-pt-access" not in vcpu.kvm.breaks:
        walker.pt_access[walker.level - 1] = access
    else:
        walker.pt_access = [access] * len(walker.pt_access)


def _check_leaf(
    walker: GuestWalker, vcpu: Vcpu, addr: int, access: int, pte_access: int
) -> tuple[int, bool]:
    mmu = vcpu.mmu
    paging = walker.paging
    level = walker.level
    pte = walker.ptes[level - 1]
    walker.pte_access = gpte_access(pte_access ^ paging.nx_mask)
    errcode = permission_fault(vcpu, mmu, walker.pte_access, access)
    if errcode:
        return ~errcode, False
    gfn = gpte_to_gfn_lvl(paging, pte, level) + ((addr & paging.offset_mask(level)) >> 12)
    if paging is PAGING32 and level > PG_LEVEL_4K:
        gfn += (pte & _PSE36_MASK) << _PSE36_SHIFT
    walker.gfn = gfn
    accessed_dirty = pte_access & PT_ACCESSED_MASK
    if access & PFERR_WRITE_MASK:
        if not pte & PT_DIRTY_MASK:
            accessed_dirty = 0
    else:
        walker.pte_access = protect_clean_gpte(walker.pte_access, pte)
    return 0, accessed_dirty != 0


def _read_gpte(walker: GuestWalker, vcpu: Vcpu, addr: int, table_gfn: int) -> int:
    """The entry of `addr` in the table at `table_gfn`, or -1 where there is no memory."""
    paging = walker.paging
    row = walker.level - 1
    offset = paging.index(addr, walker.level) * paging.gpte_size
    walker.table_gfn[row] = table_gfn
    walker.pte_gpa[row] = table_gfn << 12 | offset
    slot = kvm_vcpu_gfn_to_memslot(vcpu, table_gfn)
    if slot is None or not kvm_is_visible_memslot(slot):
        return -1
    walker.pte_writable[row] = not slot.flags & KVM_MEM_READONLY
    ptep_user = slot.gfn_to_hva(table_gfn) + offset
    try:
        data = copy_from_user(vcpu.kvm.process, ptep_user, paging.gpte_size)
    except KernelError:
        return -1
    walker.ptep_user[row] = ptep_user
    pte = int.from_bytes(data, "little")
    if (t := vcpu.kvm.trace.kvm_mmu_paging_element) is not None:
        t(pte, walker.level)
    return pte


def _update_accessed_dirty_bits(walker: GuestWalker, vcpu: Vcpu, access: int) -> int:
    """0; 1 if an entry changed meanwhile; -EFAULT. Entries in a read-only slot are left as they are."""
    trace, sched = vcpu.kvm.trace, vcpu.kvm.sched
    for level in range(walker.max_level, walker.level - 1, -1):
        row = level - 1
        pte = walker.ptes[row]
        new = pte | PT_ACCESSED_MASK
        if new != pte and (t := trace.kvm_mmu_set_accessed_bit) is not None:
            t(walker.pte_gpa[row])
        if level == walker.level and access & PFERR_WRITE_MASK and not pte & PT_DIRTY_MASK:
            if (t := trace.kvm_mmu_set_dirty_bit) is not None:
                t(walker.pte_gpa[row])
            new |= PT_DIRTY_MASK
        if new == pte or not walker.pte_writable[row]:
            continue
        if sched.preempt:
            sched.point("gpte")
        ret = _cmpxchg_gpte(walker, vcpu, walker.ptep_user[row], pte, new)
        if ret:
            return ret
        kvm_vcpu_mark_page_dirty(vcpu, walker.table_gfn[row])
        walker.ptes[row] = new
    return 0


def _cmpxchg_gpte(walker: GuestWalker, vcpu: Vcpu, ptep_user: int, old: int, new: int) -> int:
    kvm = vcpu.kvm
    size = walker.paging.gpte_size
    old_bytes, new_bytes = old.to_bytes(size, "little"), new.to_bytes(size, "little")
    if kvm.profile.cmpxchg_gpte_by_gup:
        pfn = get_user_pages_unlocked(kvm.mm, ptep_user & ~0xFFF, FOLL_WRITE)
        if pfn < 0:
            return -EFAULT
        at = pfn << 12 | ptep_user & 0xFFF
        done = kvm.ram.read(at, size) == old_bytes
        if done:
            kvm.ram.write(at, new_bytes)
        kvm_release_page_dirty(kvm, pfn)
        return 0 if done else 1
    try:
        return 0 if try_cmpxchg_user(kvm.process, ptep_user, old_bytes, new_bytes) else 1
    except KernelError:
        return -EFAULT


# -- users --------------------------------------------------------------------------------------


def gpte_changed(vcpu: Vcpu, walker: GuestWalker, level: int) -> bool:
    """Whether the entry of `level` is no longer what the walk saw; under mmu_lock, so without faults.

    At level 1 the aligned group of eight entries around it comes into `walker.prefetch_ptes`.
    """
    size = walker.paging.gpte_size
    pte_gpa = walker.pte_gpa[level - 1]
    if level != PG_LEVEL_4K:
        data = kvm_vcpu_read_guest_atomic(vcpu, pte_gpa, size)
        return data is None or int.from_bytes(data, "little") != walker.ptes[level - 1]
    base_gpa = pte_gpa & ~(PTE_PREFETCH_NUM * size - 1)
    data = kvm_vcpu_read_guest_atomic(vcpu, base_gpa, PTE_PREFETCH_NUM * size)
    if data is None:
        return True
    walker.prefetch_ptes = [
        int.from_bytes(data[at : at + size], "little") for at in range(0, PTE_PREFETCH_NUM * size, size)
    ]
    return walker.prefetch_ptes[(pte_gpa - base_gpa) // size] != walker.ptes[level - 1]


def gva_to_gpa(vcpu: Vcpu, addr: int, access: int, exception: X86Exception | None = None) -> int:
    """The gpa of `addr` for `access` (PFERR_*), setting A and D; INVALID_GPA and `exception` if refused."""
    if vcpu.kvm.tdp_enabled:
        # Under EPT the guest writes its control registers without an exit.
        kvm_init_mmu(vcpu)
    if not is_cr0_pg(vcpu.mmu):
        if exception is not None:
            exception.error_code = 0
        return addr
    walker = GuestWalker()
    if walk_addr(walker, vcpu, addr, access):
        return walker.gfn << 12 | addr & 0xFFF
    if exception is not None:
        exception.assign(walker.fault)
    return INVALID_GPA
