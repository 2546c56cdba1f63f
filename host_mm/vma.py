"""VMAs: merge, split, insertion, and the bracket a split fires.

Source of truth: mm/vma.c (vma_merge_existing_range, vma_merge_new_range, commit_merge, __split_vma,
vma_modify), mm/mmap.c: vm_get_page_prot; Linux 6.18.

A split at an address that is not 2 MiB aligned fires a bracket over the aligned 2 MiB around it,
whether or not anything huge is mapped there, if that 2 MiB lies wholly inside the VMA and a level-2
table exists for it.

Not modelled: the maple tree (a sorted list), per-VMA locks, VMA names, merge limits by map count.
"""

from __future__ import annotations

from bisect import bisect_left
from errno import EINVAL
from typing import TYPE_CHECKING

from host_mm.address_space import i_mmap_insert, i_mmap_remove, vma_file_lock
from host_mm.arch.x86.pgtable import (
    _PAGE_ACCESSED,
    _PAGE_NX,
    _PAGE_PRESENT,
    _PAGE_PROTNONE,
    _PAGE_RW,
    _PAGE_USER,
)
from host_mm.huge_memory_pmd import vma_adjust_trans_huge
from host_mm.hugetlb_share import hugetlb_split
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import (
    VM_ACCESS_FLAGS,
    VM_EXEC,
    VM_HUGETLB,
    VM_PFNMAP,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_SPECIAL,
    VM_UFFD_WP,
    VM_WRITE,
    VmArea,
)
from host_mm.rmap_anon_vma import anon_vma_clone, unlink_anon_vmas

if TYPE_CHECKING:
    from host_mm.kernel.locks import RwSem
    from host_mm.mm_types import MmStruct
    from host_mm.userfaultfd_k import UserfaultfdCtx

__all__ = [
    "insert_vma",
    "remove_vma",
    "split_vma",
    "vm_area_dup",
    "vm_get_page_prot",
    "vma_close",
    "vma_merge_new_range",
    "vma_modify_flags",
    "vma_modify_flags_uffd",
    "vma_needs_dirty_tracking",
    "vma_open",
    "vma_set_page_prot",
    "vma_wants_writenotify",
]


def vm_get_page_prot(flags: int) -> int:
    """The protection bits of a fresh entry; private mappings never get RW from here."""
    if not flags & VM_ACCESS_FLAGS:
        return _PAGE_PROTNONE | _PAGE_ACCESSED
    prot = _PAGE_PRESENT | _PAGE_USER | _PAGE_ACCESSED
    if not flags & VM_EXEC:
        prot |= _PAGE_NX
    if flags & VM_WRITE and flags & VM_SHARED:
        prot |= _PAGE_RW
    return prot


def vma_wants_writenotify(vma: VmArea) -> bool:
    """Whether the first write of each page must fault: for the file, its dirty tracking or soft-dirty."""
    if vma.flags & (VM_SHARED | VM_WRITE) != VM_SHARED | VM_WRITE:
        return False
    if vma.ops is not None and vma.ops.page_mkwrite is not None:
        return True
    if not vma.flags & VM_SOFTDIRTY and not vma.flags & VM_HUGETLB:
        return True
    if vma.flags & VM_UFFD_WP:
        return True
    return vma.file is not None and bool(vma.file.a_ops.can_writeback) and not vma.flags & VM_PFNMAP


def vma_needs_dirty_tracking(vma: VmArea) -> bool:
    """Whether the file must be told of each page that is written through this mapping."""
    if vma.flags & (VM_SHARED | VM_WRITE) != VM_SHARED | VM_WRITE or vma.file is None:
        return False
    return vma.ops.page_mkwrite is not None or bool(vma.file.a_ops.can_writeback)


def vma_set_page_prot(vma: VmArea) -> None:
    """page_prot by the VMA's flags; a mapping that wants write faults has no RW in it."""
    vma.page_prot = vm_get_page_prot(vma.flags & ~VM_SHARED if vma_wants_writenotify(vma) else vma.flags)


def vm_area_dup(vma: VmArea, mm: MmStruct) -> VmArea:
    """A copy of the VMA, not yet linked anywhere."""
    new = VmArea(mm, vma.start, vma.end, vma.flags, vma.pgoff)
    new.page_prot = vma.page_prot
    new.anon_vma = vma.anon_vma
    new.file = vma.file
    new.ops = vma.ops
    new.policy = vma.policy
    new.private_data = vma.private_data
    new.swap_readahead_info = vma.swap_readahead_info
    new.userfaultfd_ctx = vma.userfaultfd_ctx
    return new


def vma_open(vma: VmArea) -> None:
    """The file hears of a copy of one of its VMAs."""
    if vma.ops is not None and vma.ops.open is not None:
        vma.ops.open(vma)


def vma_close(vma: VmArea) -> None:
    """And of a VMA that is gone, with its entries and tables."""
    if vma.ops is not None and vma.ops.close is not None:
        vma.ops.close(vma)


def insert_vma(vma: VmArea, after: VmArea | None = None) -> None:
    """vma_link: put it into its mm and among the mappings of its file, there behind `after` (fork)."""
    _insert(vma)
    if vma.file is not None:
        with vma.file.i_mmap_rwsem:
            i_mmap_insert(vma, after)


def _insert(vma: VmArea) -> None:
    mm = vma.mm
    index = bisect_left(mm.starts, vma.start)
    mm.starts.insert(index, vma.start)
    mm.vmas.insert(index, vma)
    mm.total_vm += (vma.end - vma.start) >> 12


def remove_vma(vma: VmArea) -> None:
    """Take it out of its mm; free_pgtables hides it from rmap."""
    mm = vma.mm
    index = bisect_left(mm.starts, vma.start)
    del mm.starts[index]
    del mm.vmas[index]
    mm.total_vm -= (vma.end - vma.start) >> 12


def _forget(vma: VmArea) -> None:
    """A VMA whose range another one takes over, under the locks of vma_prepare."""
    remove_vma(vma)
    if vma.file is not None:
        i_mmap_remove(vma)


def _vma_prepare(vma: VmArea) -> list[RwSem]:
    """Keep rmap walks out of the VMAs of this file and anon_vma while their ranges change."""
    anon = vma.anon_vma.root.rwsem if vma.anon_vma is not None else None
    locks = [lock for lock in (vma_file_lock(vma), anon) if lock is not None]
    for lock in locks:
        lock.lock()
    return locks


def _vma_complete(locks: list[RwSem]) -> None:
    for lock in reversed(locks):
        lock.unlock()


def _set_range(vma: VmArea, start: int, end: int) -> None:
    """vma_set_range, keeping the list sorted: nothing lies between the old and the new start."""
    mm = vma.mm
    index = bisect_left(mm.starts, vma.start)
    mm.total_vm += ((end - start) - (vma.end - vma.start)) >> 12
    vma.pgoff += (start - vma.start) >> 12
    vma.start = start
    vma.end = end
    mm.starts[index] = start


# -- splitting ----------------------------------------------------------------------------------
def split_vma(vma: VmArea, address: int, *, new_below: bool) -> VmArea:
    """Cut the VMA at `address`; the new one is the lower or the upper part. Returns the new one.

    KernelError(EINVAL): huge pages cannot be cut.
    """
    if vma.ops is not None and vma.ops.may_split is not None and not vma.ops.may_split(vma, address):
        raise KernelError(EINVAL, f"{vma!r} cannot be cut at {address:#x}")
    new = vm_area_dup(vma, vma.mm)
    if new_below:
        new.end = address
    else:
        new.start = address
        new.pgoff += (address - vma.start) >> 12
    anon_vma_clone(new, vma)
    vma_open(new)
    locks = _vma_prepare(vma)
    vma_adjust_trans_huge(vma, vma.start, address, None)
    if vma.flags & VM_HUGETLB:
        hugetlb_split(vma, address)
    if new_below:
        _set_range(vma, address, vma.end)
    else:
        _set_range(vma, vma.start, address)
    _insert(new)
    if new.file is not None:
        i_mmap_insert(new)
    _vma_complete(locks)
    return new


# -- merging ------------------------------------------------------------------------------------
def _same_kind(vma: VmArea, flags: int, template: VmArea | None, uffd_ctx: UserfaultfdCtx | None) -> bool:
    if (vma.flags ^ flags) & ~VM_SOFTDIRTY or vma.userfaultfd_ctx is not uffd_ctx:
        return False
    if template is None:
        return vma.file is None and vma.ops is None and vma.policy is None
    return vma.file is template.file and vma.ops is template.ops and vma.policy == template.policy


def _uncowed_parents(vma: VmArea) -> bool:
    return len(vma.anon_vma_chain) > 1


def _anon_vmas_merge(target: VmArea, middle: VmArea | None) -> bool:
    source = middle.anon_vma if middle is not None else None
    if target.anon_vma is None and source is not None and middle is not None:
        return not _uncowed_parents(middle)
    if target.anon_vma is not None and source is None:
        return not _uncowed_parents(target)
    return target.anon_vma is source


def _dup_anon_vma(dst: VmArea, src: VmArea) -> None:
    if src.anon_vma is not None and dst.anon_vma is None:
        dst.anon_vma = src.anon_vma
        anon_vma_clone(dst, src)


def vma_merge_new_range(
    mm: MmStruct, start: int, end: int, flags: int, template: VmArea, copied_from: VmArea | None = None
) -> VmArea | None:
    """Grow a neighbour over a new mapping; None if neither side fits.

    `copied_from`: the VMA whose pages mremap moves here; the neighbour must be able to have them.
    """
    if flags & VM_SPECIAL:
        return None
    uffd_ctx = template.userfaultfd_ctx
    previous = mm.vma_lookup(start - 1) if start else None
    following = mm.vma_lookup(end)
    left = (
        previous is not None and _same_kind(previous, flags, template, uffd_ctx)
        and _anon_vmas_merge(previous, copied_from)
        and previous.pgoff + ((start - previous.start) >> 12) == template.pgoff
    )
    right = (
        following is not None and _same_kind(following, flags, template, uffd_ctx)
        and _anon_vmas_merge(following, copied_from)
        and following.pgoff == template.pgoff + ((end - start) >> 12)
    )
    if left and right and not _sides_share(previous, following):
        right = False
    if not left and not right:
        return None
    if left and right:
        assert previous is not None
        assert following is not None
        _dup_anon_vma(previous, following)
        if copied_from is not None:
            _dup_anon_vma(previous, copied_from)
        _expand(previous, previous.start, following.end, following)
        return previous
    target = previous if left else following
    assert target is not None
    if copied_from is not None:
        _dup_anon_vma(target, copied_from)
    _expand(target, min(target.start, start), max(target.end, end))
    return target


def _expand(vma: VmArea, start: int, end: int, swallowed: VmArea | None = None) -> None:
    """vma_expand: rmap walks that are under way have looked at its old range only, so wait for them."""
    locks = _vma_prepare(vma)
    if swallowed is not None:
        _forget(swallowed)
    _set_range(vma, start, end)
    _vma_complete(locks)
    if swallowed is not None:
        unlink_anon_vmas(swallowed)


def _sides_share(a: VmArea | None, b: VmArea | None) -> bool:
    """The last test of merging both sides: at most one anon_vma between them."""
    assert a is not None
    assert b is not None
    return a.anon_vma is None or b.anon_vma is None or a.anon_vma is b.anon_vma


def _merge_existing(
    vma: VmArea, start: int, end: int, flags: int, uffd_ctx: UserfaultfdCtx | None
) -> VmArea | None:
    """[start, end) of `vma` gets `flags`: give it to a neighbour that has them already."""
    mm = vma.mm
    left_side, right_side = start == vma.start, end == vma.end
    if flags & VM_SPECIAL or (not left_side and not right_side):
        return None
    previous = mm.vma_lookup(start - 1) if left_side and start else None
    following = mm.vma_lookup(end) if right_side else None
    left = previous is not None and _fits(previous, vma, flags, uffd_ctx)
    right = following is not None and _fits(following, vma, flags, uffd_ctx)
    if left and right and not _sides_share(previous, following):
        right = False
    if left:
        assert previous is not None
        return _merge_left(previous, vma, end, following if right else None, right_side)
    if right:
        assert following is not None
        return _merge_right(vma, following, start, left_side)
    return None


def _fits(neighbour: VmArea, vma: VmArea, flags: int, uffd_ctx: UserfaultfdCtx | None) -> bool:
    return (
        _same_kind(neighbour, flags, vma, uffd_ctx) and _anon_vmas_merge(neighbour, vma)
        and neighbour.pgoff - (neighbour.start >> 12) == vma.pgoff - (vma.start >> 12)
    )


def _merge_left(previous: VmArea, vma: VmArea, end: int, following: VmArea | None, whole: bool) -> VmArea:
    source = following if following is not None and following.anon_vma is not None else vma
    _dup_anon_vma(previous, source)
    limit = following.end if following is not None else end
    gone = ([vma] if whole else []) + ([following] if whole and following is not None else [])
    locks = _vma_prepare(previous)
    vma_adjust_trans_huge(previous, previous.start, limit, None if whole else vma)
    for each in gone:
        _forget(each)
    if not whole:
        _set_range(vma, end, vma.end)
    _set_range(previous, previous.start, limit)
    _vma_complete(locks)
    for each in gone:
        unlink_anon_vmas(each)
    return previous


def _merge_right(vma: VmArea, following: VmArea, start: int, whole: bool) -> VmArea:
    _dup_anon_vma(following, vma)
    locks = _vma_prepare(following)
    if whole:
        vma_adjust_trans_huge(following, start, following.end, None)
        _forget(vma)
    else:
        vma_adjust_trans_huge(vma, vma.start, start, None)
        _set_range(vma, vma.start, start)
    _set_range(following, start, following.end)
    _vma_complete(locks)
    if whole:
        unlink_anon_vmas(vma)
    return following


def vma_modify_flags(vma: VmArea, start: int, end: int, flags: int) -> VmArea:
    """The VMA that covers exactly what `flags` are for: merged into a neighbour, or split off.

    The caller sets the flags of a VMA that is returned unmerged.
    """
    return vma_modify_flags_uffd(vma, start, end, flags, vma.userfaultfd_ctx)


def vma_modify_flags_uffd(
    vma: VmArea, start: int, end: int, flags: int, uffd_ctx: UserfaultfdCtx | None
) -> VmArea:
    """As vma_modify_flags, for a range that is about to be registered with `uffd_ctx`."""
    merged = _merge_existing(vma, start, end, flags, uffd_ctx)
    if merged is not None:
        return merged
    if vma.start < start:
        split_vma(vma, start, new_below=True)
    if vma.end > end:
        split_vma(vma, end, new_below=False)
    return vma
