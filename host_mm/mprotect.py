"""mprotect and NUMA hinting: changing the rights of mapped entries.

Source of truth: mm/mprotect.c (do_mprotect_pkey, mprotect_fixup, change_protection_range,
change_pud_range, change_pte_range, prot_numa_skip, can_change_pte_writable), arch/x86/include/asm/tlbflush.h:
pte_needs_flush; Linux 6.18.

The bracket is opened at the first populated level-3 entry and reaches to the end of the enclosing
512 GiB or of the call: a call over nothing populated fires none, one over pages never touched whose
neighbourhood is populated fires one. Linux 5.10 opens it in the level-2 walker, to the end of the 1 GiB.
The flush follows the bracket's end: what a gather found to need one, in 5.10 the VMA's whole range.
Userfaultfd's write-protection takes the same way; where it must hold for pages that are not there, the walk
makes the tables and puts markers in.

Not modelled: protection keys, prot_none_walk, memory tiers.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EACCES, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_DIRTY,
    _PAGE_NX,
    _PAGE_PRESENT,
    _PAGE_RW,
    _PAGE_SOFT_DIRTY,
    _PAGE_UFFD_WP,
    _PAGE_USER,
    PFN_MASK,
    PGDIR_SIZE,
    PMD_SIZE,
    PUD_SIZE,
    ULONG_MAX,
    page_align,
    pmd_table,
    pte_dirty,
    pte_mkuffd_wp,
    pte_mkwrite,
    pte_modify,
    pte_present,
    pte_protnone,
    pte_write,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_SOFT_DIRTY,
    _PAGE_SWP_UFFD_WP,
    PTE_MARKER_UFFD_WP,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_PFN_MASK,
    is_pte_marker,
    is_writable_device_private_entry,
    is_writable_migration_entry,
    make_pte_marker,
    pte_marker_get,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
)
from host_mm.huge_memory_map import change_huge_pmd
from host_mm.huge_memory_pmd import split_huge_pmd
from host_mm.huge_mm import vma_is_anonymous
from host_mm.hugetlb_unmap import hugetlb_change_protection
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.memory_copy import is_cow_mapping
from host_mm.memory_device import make_device_private_pte
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import (
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_EXEC,
    VM_HUGETLB,
    VM_NORESERVE,
    VM_READ,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
)
from host_mm.mmu_gather import MmuGather
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_ksm,
    PG_swapbacked,
    folio_maybe_dma_pinned,
    folio_maybe_mapped_shared,
    page_folio,
)
from host_mm.pgtable_generic import (
    pmd_alloc,
    pmd_slots,
    pte_alloc,
    pte_clear,
    pte_lockptr,
    pte_offset_map_lock,
    ptep_get_and_clear,
    pud_entries,
    set_pte,
)
from host_mm.pgtable_huge import pmdp_get
from host_mm.userfaultfd_k import userfaultfd_pte_wp, userfaultfd_wp_use_markers
from host_mm.vma import vm_get_page_prot, vma_modify_flags, vma_set_page_prot, vma_wants_writenotify

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "MM_CP_PROT_NUMA", "MM_CP_TRY_CHANGE_WRITABLE", "MM_CP_UFFD_WP", "MM_CP_UFFD_WP_RESOLVE",
    "can_change_pte_writable", "change_protection", "do_mprotect", "vma_wants_manual_pte_write_upgrade",
]

MM_CP_TRY_CHANGE_WRITABLE = 1 << 0
MM_CP_PROT_NUMA = 1 << 1
MM_CP_UFFD_WP = 1 << 2
MM_CP_UFFD_WP_RESOLVE = 1 << 3
_PAGE_NONE = vm_get_page_prot(0)
_PROT_MASK = 0xF
_COUNTED_OR_NEVER = VM_ACCOUNT | VM_WRITE | VM_HUGETLB | VM_SHARED | VM_NORESERVE
"""Read, write, execute and PROT_SEM, which means nothing."""
_FLUSH_ON_CLEAR = _PAGE_DIRTY | _PAGE_PRESENT | _PAGE_ACCESSED
_FLUSH_ON_CHANGE = _PAGE_RW | _PAGE_USER | _PAGE_NX


def _pte_needs_flush(old: int, new: int) -> bool:
    if not old & _PAGE_PRESENT:
        return False
    diff = old ^ new
    return bool(diff & old & _FLUSH_ON_CLEAR or diff & (_FLUSH_ON_CHANGE | PFN_MASK))


def do_mprotect(mm: MmStruct, start: int, length: int, prot: int) -> None:
    """Give [start, start+length) the rights `prot`. KernelError: EINVAL, ENOMEM (a hole, or beyond), EACCES.

    What lies before a hole has been changed by then, as in Linux.
    """
    mm.host.sched.advance(COST_SYSCALL)
    if start & 4095:
        raise KernelError(EINVAL, f"{start:#x} is not page-aligned")
    if not length:
        return
    end = start + page_align(length)
    if not start < end <= ULONG_MAX:
        raise KernelError(ENOMEM, f"{start:#x}+{length:#x} wraps around")
    if prot & ~_PROT_MASK:
        raise KernelError(EINVAL, f"no rights {prot:#x}")
    mm.mmap_lock.lock()
    tlb = MmuGather(mm)
    try:
        address = start
        while address < end:
            vma = mm.vma_lookup(address)
            if vma is None:
                raise KernelError(ENOMEM, f"nothing is mapped at {address:#x}")
            wanted = (prot & 1 and VM_READ) | (prot & 2 and VM_WRITE) | (prot & 4 and VM_EXEC)
            if wanted & ~(vma.flags >> 4) & VM_ACCESS_FLAGS:
                raise KernelError(EACCES, f"the mapping at {address:#x} may not get these rights")
            following = min(vma.end, end)
            _mprotect_fixup(tlb, vma, address, following, (vma.flags & ~VM_ACCESS_FLAGS) | wanted)
            address = following
    finally:
        tlb.finish()
        mm.mmap_lock.unlock()


def _accounted(vma: VmArea, flags: int) -> int:
    """The new flags with VM_ACCOUNT as it will be.

    What may be written counts, what was once touched for good. VMAs that differ in it do not merge.
    """
    old = vma.flags
    if flags & VM_WRITE:
        return flags if old & _COUNTED_OR_NEVER else flags | VM_ACCOUNT
    unaccounts = vma.mm.host.profile.mprotect_unaccounts
    if unaccounts and old & VM_ACCOUNT and vma_is_anonymous(vma) and vma.anon_vma is None:
        return flags & ~VM_ACCOUNT
    return flags


def _mprotect_fixup(tlb: MmuGather, vma: VmArea, start: int, end: int, flags: int) -> None:
    if flags == vma.flags:
        return
    flags = _accounted(vma, flags)
    vma = vma_modify_flags(vma, start, end, flags)
    vma.flags = flags | (vma.flags & VM_SOFTDIRTY)
    vma_set_page_prot(vma)
    cp = MM_CP_TRY_CHANGE_WRITABLE if vma_wants_manual_pte_write_upgrade(vma) else 0
    change_protection(tlb, vma, start, end, cp)


def vma_wants_manual_pte_write_upgrade(vma: VmArea) -> bool:
    """Whether the VMA's page_prot alone does not say which entries are writable."""
    return vma_wants_writenotify(vma) if vma.flags & VM_SHARED else bool(vma.flags & VM_WRITE)


def change_protection(tlb: MmuGather, vma: VmArea, start: int, end: int, cp_flags: int) -> int:
    """Apply the VMA's rights (for NUMA hinting: none) to its entries, or set or lift uffd-wp.

    How many changed, or -ENOMEM where markers need tables.
    """
    if vma.flags & VM_HUGETLB:
        return hugetlb_change_protection(vma, start, end, vma.page_prot)
    profile = vma.mm.host.profile
    if profile.mprotect_gathers:
        return _change_chunks(_Change(tlb, vma, cp_flags), start, end)
    _tlb.inc_tlb_flush_pending(vma.mm)
    pages = _change_chunks(_Change(None, vma, cp_flags), start, end)
    if pages:
        _tlb.flush_tlb_range(vma.mm, start, end)
    _tlb.dec_tlb_flush_pending(vma.mm)
    return pages


def _change_chunks(change: _Change, start: int, end: int) -> int:
    span = PGDIR_SIZE if change.mm.host.profile.mprotect_bracket_level == 3 else PUD_SIZE
    pages = 0
    for address, following in _chunks(start, end, span):
        done = change.span(address, following, by_pud=span == PGDIR_SIZE)
        if done < 0:
            return done
        pages += done
    return pages


def _chunks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """pXd_addr_end: [start, end) cut at multiples of `size`."""
    while start < end:
        following = min(end, (start & ~(size - 1)) + size)
        yield start, following
        start = following


class _Change:
    """One call of change_protection."""

    __slots__ = ("cp_flags", "mm", "newprot", "populate", "target_node", "tlb", "vma")

    def __init__(self, tlb: MmuGather | None, vma: VmArea, cp_flags: int) -> None:
        self.tlb = tlb
        self.vma = vma
        self.mm = vma.mm
        self.cp_flags = cp_flags
        self.newprot = _PAGE_NONE if cp_flags & MM_CP_PROT_NUMA else vma.page_prot
        # Markers for pages that are not there need tables to be in.
        self.populate = bool(cp_flags & MM_CP_UFFD_WP) and userfaultfd_wp_use_markers(vma)
        self.target_node = -1

    # -- tables -------------------------------------------------------------------------------

    def span(self, start: int, end: int, *, by_pud: bool) -> int:
        """change_pud_range (5.10: change_pmd_range): a bracket from the first populated entry on."""
        mm = self.mm
        if by_pud and self.populate:
            puds = list(_chunks(start, end, PUD_SIZE))
        elif by_pud:
            puds = [(address, following) for _, address, following in pud_entries(mm, start, end)]
        else:
            pmds = pmd_slots(mm, start, end)
            puds = [(pmds[0][1], end)] if pmds else []
        range_ = None
        pages = 0
        for address, following in puds:
            if self.populate and not pmd_alloc(mm, address):
                pages = -ENOMEM
                break
            if range_ is None:
                range_ = mmu_notifier.mmu_notifier_range_init(
                    mmu_notifier.MMU_NOTIFY_PROTECTION_VMA, mm, address, end,
                    order=mmu_notifier.ORDER_AFTER_END,
                )
                mmu_notifier.mmu_notifier_invalidate_range_start(range_)
            done = self._pmd_range(address, following)
            if done < 0:
                pages = done
                break
            pages += done
        if range_ is not None:
            mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        return pages

    def _pmd_range(self, start: int, end: int) -> int:
        mm = self.mm
        if self.populate:
            pmds = [(0, address, following) for address, following in _chunks(start, end, PMD_SIZE)]
        else:
            pmds = pmd_slots(mm, start, end)
        pages = 0
        for pmd, address, following in pmds:
            if self.populate:
                pmd = pmd_alloc(mm, address)
                if not pmd or not pte_alloc(mm, pmd):
                    return -ENOMEM
            if not pmd_table(pmdp_get(mm, pmd)):
                changed = self._huge_pmd(pmd, address, following)
                if changed >= 0:
                    pages += changed
                    continue
            pages += self._pte_range(pmd, address, following)
            if mm.host.sched.preempt:
                mm.host.sched.point("cond_resched")
        return pages

    def _huge_pmd(self, pmd: int, address: int, following: int) -> int:
        """A huge entry, split if only a part of it changes; how many pages did, -1: it is not huge now."""
        flags = self.cp_flags
        by_page = flags & (MM_CP_UFFD_WP | MM_CP_UFFD_WP_RESOLVE) and self.vma.ops is not None
        if following - address != PMD_SIZE or by_page:
            split_huge_pmd(self.vma, pmd, address)
            return -1
        return change_huge_pmd(
            self.tlb, self.vma, pmd, address, self.newprot, prot_numa=bool(flags & MM_CP_PROT_NUMA),
            uffd_wp=bool(flags & MM_CP_UFFD_WP), uffd_wp_resolve=bool(flags & MM_CP_UFFD_WP_RESOLVE),
            try_writable=bool(flags & MM_CP_TRY_CHANGE_WRITABLE),
        )

    def _pte_range(self, pmd: int, address: int, end: int) -> int:
        mm = self.mm
        pte = pte_offset_map_lock(mm, pmd, address)
        if not pte:
            return 0
        ptl = pte_lockptr(mm, pte)
        alone = mm.mm_users == 1 and mm.process.threads == 1
        if self.cp_flags & MM_CP_PROT_NUMA and alone and not self.vma.flags & VM_SHARED:
            # A page is where it should be on the node that the process's one thread runs on.
            self.target_node = mm.host.numa_node_id(mm.process)
        _tlb.flush_tlb_batched_pending(mm)
        u64 = mm.host.ram.u64
        pages = 0
        while address < end:
            entry = u64[pte >> 3]
            if not entry:
                pages += self._none(address, pte)
            elif pte_present(entry):
                pages += self._present(address, pte, entry)
            else:
                pages += self._nonpresent(address, pte, entry)
            pte += 8
            address += 4096
        ptl.unlock()
        return pages

    # -- entries ------------------------------------------------------------------------------

    def _none(self, address: int, pte: int) -> int:
        if not self.populate:
            return 0
        set_pte(self.mm, address, pte, make_pte_marker(PTE_MARKER_UFFD_WP))
        return 1

    def _present(self, address: int, pte: int, entry: int) -> int:
        mm, vma, cp_flags = self.mm, self.vma, self.cp_flags
        if cp_flags & MM_CP_PROT_NUMA and self._prot_numa_skip(entry):
            return 0
        old = ptep_get_and_clear(mm, address, pte)
        new = pte_modify(old, self.newprot)
        if cp_flags & MM_CP_UFFD_WP:
            new = pte_mkuffd_wp(new)
        elif cp_flags & MM_CP_UFFD_WP_RESOLVE:
            new &= ~_PAGE_UFFD_WP
        if cp_flags & MM_CP_TRY_CHANGE_WRITABLE and not pte_write(new) and can_change_pte_writable(vma, new):
            new = pte_mkwrite(new)
        set_pte(mm, address, pte, new)
        if self.tlb is not None and _pte_needs_flush(old, new):
            self.tlb.remove_tlb_entry(address)
        return 1

    def _prot_numa_skip(self, entry: int) -> bool:
        """Pages whose hinting faults would tell nothing, or that could not be moved."""
        host = self.mm.host
        pages = host.pages
        pfn = vm_normal_page(host, entry)
        if pte_protnone(entry) or pfn < 0:
            return True
        folio = page_folio(pages, pfn)
        flags = pages.flags[folio]
        if flags & PG_ksm:
            return True
        shared = folio_maybe_mapped_shared(pages, folio) or folio_maybe_dma_pinned(pages, folio)
        if is_cow_mapping(self.vma.flags) and shared:
            return True
        if not flags & PG_swapbacked and flags & PG_dirty:
            return True
        return host.allocator.nid_of(pfn) == self.target_node

    def _nonpresent(self, address: int, pte: int, entry: int) -> int:
        swp = pte_to_swp_entry(entry)
        new = entry
        if is_writable_migration_entry(swp):
            pages = self.mm.host.pages
            anon = pages.flags[page_folio(pages, swp_offset(swp) & SWP_PFN_MASK)] & PG_anon
            owned = anon and self.mm.host.profile.anon_exclusive
            kind = SWP_MIGRATION_READ_EXCLUSIVE if owned else SWP_MIGRATION_READ
            new = swp_entry_to_pte(swp_entry(kind, swp_offset(swp))) | (entry & _PAGE_SWP_SOFT_DIRTY)
        elif is_writable_device_private_entry(swp):
            new = make_device_private_pte(swp_offset(swp) & SWP_PFN_MASK, writable=False)
            new |= entry & _PAGE_SWP_UFFD_WP
        elif is_pte_marker(entry):
            if self.cp_flags & MM_CP_UFFD_WP_RESOLVE and pte_marker_get(entry) == PTE_MARKER_UFFD_WP:
                pte_clear(self.mm, address, pte)
                return 1
            return 0
        if self.cp_flags & MM_CP_UFFD_WP:
            new |= _PAGE_SWP_UFFD_WP
        elif self.cp_flags & MM_CP_UFFD_WP_RESOLVE:
            new &= ~_PAGE_SWP_UFFD_WP
        if new == entry:
            return 0
        set_pte(self.mm, address, pte, new)
        return 1


def can_change_pte_writable(vma: VmArea, entry: int) -> bool:
    """Whether an entry without the right to write may get it without a fault.

    Private: an exclusive page needs no COW. Shared: a dirty entry was told to the file system before.
    """
    if not vma.flags & VM_WRITE or pte_protnone(entry) or userfaultfd_pte_wp(vma, entry):
        return False
    if not vma.flags & VM_SOFTDIRTY and not entry & _PAGE_SOFT_DIRTY:
        return False
    if vma.flags & VM_SHARED:
        return pte_dirty(entry)
    host = vma.mm.host
    pages = host.pages
    pfn = vm_normal_page(host, entry)
    anon = pfn >= 0 and pages.flags[page_folio(pages, pfn)] & PG_anon
    return bool(anon and pages.flags[pfn] & PG_anon_exclusive)
