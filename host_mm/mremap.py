"""mremap: mappings that shrink, grow and move.

Source of truth: mm/mremap.c (do_mremap, check_mremap_params, check_prep_vma, remap_move, mremap_to,
mremap_at, expand_vma, shrink_vma, move_vma), mm/vma.c (copy_vma, vma_merge_extend); Linux 6.18. The
entries are moved in move_page_tables.py.

A move copies the VMA, moves its entries and unmaps the source: two UNMAP brackets over the old range, the
second one over nothing. The new range is told to nobody, since nothing of it was mapped. Pages keep their
index: the new VMA's pgoff makes the reverse map find them there. A VMA without pages yet takes the pgoff
of its new place, so that it can merge. MREMAP_DONTUNMAP leaves the emptied source mapped. With old_len 0 a
shared mapping is duplicated: the file is mapped once more, and no entry moves.

Where a page of a faulted VMA moves into a neighbour that was never faulted, the neighbour gets the
source's anon_vma, as in 6.18 stable; 6.18.2 forgets to.

Not modelled: file mappings' hooks, KSM's unmerging before a move, userfaultfd events, sealing,
accounting (VM_ACCOUNT, locked_vm, map count limit).
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.address_space import flush_delayed_fput
from host_mm.arch.x86.pgtable import PMD_SIZE, TASK_SIZE, page_align
from host_mm.gup_populate import mm_populate
from host_mm.hugetlb_resv import clear_vma_resv_huge_pages
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import VM_DONTEXPAND, VM_HUGETLB, VM_LOCKED, VM_LOCKED_MASK, VM_PFNMAP, VM_SHARED
from host_mm.mmap import MAP_FIXED, do_vmi_munmap, get_unmapped_area
from host_mm.move_page_tables import move_page_tables
from host_mm.rmap_anon_vma import anon_vma_clone, unlink_anon_vmas
from host_mm.userfaultfd_k import mremap_userfaultfd_prep
from host_mm.vma import insert_vma, vm_area_dup, vma_merge_new_range, vma_open

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea

__all__ = ["MREMAP_DONTUNMAP", "MREMAP_FIXED", "MREMAP_MAYMOVE", "do_mremap"]

MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4


def do_mremap(
    mm: MmStruct, addr: int, old_len: int, new_len: int, flags: int = 0, new_addr: int = 0
) -> int:
    """mremap(2): where the mapping is afterwards.

    KernelError: EINVAL, EFAULT (not one mapping), ENOMEM (no room, or it would have to move and may not).
    """
    mm.host.sched.advance(COST_SYSCALL)
    remap = _Remap(mm, addr, page_align(old_len), page_align(new_len), flags, new_addr)
    remap.check_params()
    mm.mmap_lock.lock()
    try:
        at = remap.run()
    finally:
        if remap.downgraded:
            mm.mmap_lock.read_unlock()
        else:
            mm.mmap_lock.unlock()
    flush_delayed_fput(mm.host)
    if remap.populate_expand:
        mm_populate(mm, remap.new_addr + remap.old_len, remap.delta)
    return at


class _Remap:
    """struct vma_remap_struct: what was asked for, and the VMA that it is about."""

    __slots__ = (
        "addr", "delta", "downgraded", "flags", "mm", "new_addr", "new_len", "old_len", "populate_expand",
        "vma",
    )

    def __init__(
        self, mm: MmStruct, addr: int, old_len: int, new_len: int, flags: int, new_addr: int
    ) -> None:
        self.mm = mm
        self.addr = addr
        self.old_len = old_len
        self.new_len = new_len
        self.flags = flags
        self.new_addr = new_addr
        self.vma: VmArea | None = None
        self.delta = abs(old_len - new_len)
        self.populate_expand = False
        self.downgraded = False

    # -- what may be asked --------------------------------------------------------------------

    @property
    def implies_new_addr(self) -> bool:
        """vrm_implies_new_addr."""
        return bool(self.flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))

    def check_params(self) -> None:
        """check_mremap_params: what is wrong whatever is mapped."""
        if self.flags & ~(MREMAP_FIXED | MREMAP_MAYMOVE | MREMAP_DONTUNMAP):
            raise KernelError(EINVAL, f"no mremap flags {self.flags:#x}")
        if self.addr & 4095 or not self.new_len or self.new_len > TASK_SIZE:
            raise KernelError(EINVAL, f"cannot remap {self.addr:#x} to {self.new_len:#x} bytes")
        if not self.implies_new_addr:
            return
        if self.new_addr > TASK_SIZE - self.new_len or self.new_addr & 4095:
            raise KernelError(EINVAL, f"{self.new_addr:#x} is no place for {self.new_len:#x} bytes")
        if not self.flags & MREMAP_MAYMOVE:
            raise KernelError(EINVAL, "a new address without MREMAP_MAYMOVE")
        if self.flags & MREMAP_DONTUNMAP and self.old_len != self.new_len:
            raise KernelError(EINVAL, "MREMAP_DONTUNMAP cannot resize")
        if self.addr + self.old_len > self.new_addr and self.new_addr + self.new_len > self.addr:
            raise KernelError(EINVAL, f"{self.addr:#x} and {self.new_addr:#x} overlap")

    def check_vma(self) -> VmArea:
        """check_prep_vma: the VMA at `addr`, if it can be remapped as asked."""
        vma = self.vma
        if vma is None:
            raise KernelError(EFAULT, f"nothing is mapped at {self.addr:#x}")
        if vma.flags & VM_HUGETLB:
            self._align_hugetlb()
        self.delta = abs(self.old_len - self.new_len)
        if not self.implies_new_addr:
            self.new_addr = self.addr
            if self.old_len >= self.new_len:
                return vma
        if not self.old_len and not vma.flags & VM_SHARED:
            raise KernelError(EINVAL, "a private mapping cannot be duplicated")
        if self.flags & MREMAP_DONTUNMAP and vma.flags & (VM_DONTEXPAND | VM_PFNMAP):
            raise KernelError(EINVAL, f"{vma!r} must keep its only mapping")
        old_len = min(self.old_len, self.new_len)
        if old_len > vma.end - self.addr:
            raise KernelError(EFAULT, f"{self.addr:#x}+{old_len:#x} is not in one mapping")
        if self.new_len > self.old_len:
            self.populate_expand = bool(vma.flags & VM_LOCKED)
            if vma.flags & (VM_DONTEXPAND | VM_PFNMAP):
                raise KernelError(EFAULT, f"{vma!r} may not grow")
        return vma

    def _align_hugetlb(self) -> None:
        """align_hugetlb: whole huge pages; their reservation cannot grow."""
        self.old_len = (self.old_len + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
        self.new_len = (self.new_len + PMD_SIZE - 1) & ~(PMD_SIZE - 1)
        if (self.addr | self.new_addr) & (PMD_SIZE - 1) or self.new_len > self.old_len:
            raise KernelError(EINVAL, f"{self.addr:#x} is made of huge pages")

    # -- which way ----------------------------------------------------------------------------

    def run(self) -> int:
        """The body of do_mremap, under mmap_lock."""
        if self.flags & MREMAP_FIXED and self.old_len == self.new_len:
            return self.remap_move()
        self.vma = self.mm.vma_lookup(self.addr)
        self.check_vma()
        return self.mremap_to() if self.implies_new_addr else self.mremap_at()

    def remap_move(self) -> int:
        """Move every VMA of the range, keeping the holes between them."""
        mm = self.mm
        start, end, result = self.addr, self.addr + self.old_len, -1
        target, last_end, cursor = self.new_addr, 0, self.addr
        while (vma := mm.find_vma_intersection(cursor, end)) is not None:
            if result < 0 and start < vma.start:
                break
            cursor = vma.end
            self.vma = vma
            self.addr = max(vma.start, start)
            self.new_addr = target + (vma.start - last_end if result >= 0 else 0)
            self.old_len = self.new_len = min(end, vma.end) - self.addr
            last_end = vma.end
            self.check_vma()
            moved = self.mremap_to()
            result = moved if result < 0 else result
            target = moved + self.new_len
        if result < 0:
            raise KernelError(EFAULT, f"nothing is mapped at {start:#x}")
        return result

    def mremap_at(self) -> int:
        """Resize in place, or move to the first place that fits."""
        if self.old_len == self.new_len:
            return self.addr
        if self.old_len > self.new_len:
            self.shrink(downgrade=True)
            return self.addr
        if self._can_expand_in_place():
            self._expand_in_place()
            return self.addr
        if not self.flags & MREMAP_MAYMOVE:
            raise KernelError(ENOMEM, f"no room behind {self.addr:#x}, and it may not move")
        self._set_new_addr()
        return self.move_vma()

    def mremap_to(self) -> int:
        """Move to the new address, or with DONTUNMAP alone near it."""
        mm = self.mm
        if self.flags & MREMAP_FIXED:
            end = self.new_addr + self.new_len
            if mm.find_vma_intersection(self.new_addr, end) is not None:
                do_vmi_munmap(mm, self.new_addr, end, downgrade=False)
            # That can have split the source.
            self.vma = mm.vma_lookup(self.addr)
        if self.old_len > self.new_len:
            self.shrink(downgrade=False)
            self.old_len = self.new_len
        self._set_new_addr()
        return self.move_vma()

    def _set_new_addr(self) -> None:
        """vrm_set_new_addr."""
        hint = self.new_addr if self.implies_new_addr else 0
        fixed = MAP_FIXED if self.flags & MREMAP_FIXED else 0
        huge = self.vma is not None and bool(self.vma.flags & VM_HUGETLB)
        self.new_addr = get_unmapped_area(self.mm, hint, self.new_len, fixed, huge=huge)

    # -- in place -----------------------------------------------------------------------------

    def shrink(self, *, downgrade: bool) -> None:
        """Unmap what is beyond the new length; other mappings in there go too."""
        mm = self.mm
        start, end = self.addr + self.new_len, self.addr + self.old_len
        if mm.find_vma_intersection(start, end) is not None:
            do_vmi_munmap(mm, start, end, downgrade=downgrade)
            self.downgraded = downgrade
        self.vma = mm.vma_lookup(self.addr)

    def _can_expand_in_place(self) -> bool:
        vma = self.vma
        assert vma is not None
        end = vma.end + self.delta
        if vma.end - self.addr != self.old_len or end > TASK_SIZE:
            return False
        return self.mm.find_vma_intersection(vma.end, end) is None

    def _expand_in_place(self) -> None:
        """vma_merge_extend: as a new mapping behind it, which merges; perhaps with the next one too."""
        vma = self.vma
        assert vma is not None
        extension = vm_area_dup(vma, self.mm)
        extension.pgoff = vma.page_index(vma.end)
        merged = vma_merge_new_range(self.mm, vma.end, vma.end + self.delta, vma.flags, extension, vma)
        if merged is None:
            raise KernelError(ENOMEM, f"{vma!r} cannot merge with its extension")

    # -- moving -------------------------------------------------------------------------------

    def move_vma(self) -> int:
        """Copy the VMA, move its entries, unmap the source."""
        mm = self.mm
        old_len = self.old_len
        new, need_rmap_locks = self._copy_vma()
        vma = self.vma
        assert vma is not None
        moved = move_page_tables(vma, new, self.addr, self.new_addr, old_len, need_rmap_locks)
        if moved < old_len:
            # The tables of the old range are still there, so that the way back needs no memory.
            move_page_tables(new, vma, self.new_addr, self.addr, moved, True)
            _fixup_hugetlb_reservations(new)
            do_vmi_munmap(mm, self.new_addr, self.new_addr + self.new_len, downgrade=False)
            self.populate_expand = False
            raise KernelError(ENOMEM, "no memory for page tables")
        mremap_userfaultfd_prep(new)
        _fixup_hugetlb_reservations(vma)
        if self.flags & MREMAP_DONTUNMAP:
            vma.flags &= ~VM_LOCKED_MASK
            if new is not vma and self.addr == vma.start and self.addr + old_len == vma.end:
                unlink_anon_vmas(vma)
        elif old_len:
            do_vmi_munmap(mm, self.addr, self.addr + old_len, downgrade=False)
        return self.new_addr

    def _copy_vma(self) -> tuple[VmArea, bool]:
        """copy_vma: the VMA of the new range, and whether rmap walks must be kept out while entries move.

        Without: they meet the old VMA first, so that a page that moves is seen in one of the two.
        """
        mm = self.mm
        vma = self.vma
        assert vma is not None
        start, end = self.new_addr, self.new_addr + self.new_len
        new = vm_area_dup(vma, mm)
        new.pgoff = vma.page_index(self.addr)
        if vma.file is None and vma.ops is None and vma.anon_vma is None:
            new.pgoff = start >> 12
        was_at = vma.start
        merged = vma_merge_new_range(mm, start, end, vma.flags, new, vma)
        if merged is not None:
            if merged.start <= was_at < merged.end:
                # Possible only while it has no pages: it merged with itself.
                self.vma = vma = merged
            return merged, merged.pgoff <= vma.pgoff
        new.start = start
        new.end = end
        anon_vma_clone(new, vma)
        vma_open(new)
        insert_vma(new)
        return new, False


def _fixup_hugetlb_reservations(vma: VmArea) -> None:
    """One of two VMAs that had the same reservation goes: it is the other's."""
    if vma.flags & VM_HUGETLB:
        clear_vma_resv_huge_pages(vma)
