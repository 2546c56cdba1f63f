"""Registering ranges with a userfaultfd and write-protecting them.

Source of truth: mm/userfaultfd.c (uffd_wp_range, mwriteprotect_range, userfaultfd_register_range,
userfaultfd_clear_vma, userfaultfd_release_all), include/linux/userfaultfd_k.h: vma_can_userfault;
Linux 6.18.

Protection is a bit in each entry and goes the way of mprotect: PROTECTION_VMA brackets, the flush after
their end. Taking the registration away lifts it the same way first.

Not modelled: hugetlb.
"""

from __future__ import annotations

from errno import ENOENT
from typing import TYPE_CHECKING

from host_mm.mm_types import VM_HUGETLB, VM_UFFD_FLAGS, VM_UFFD_MINOR, VM_UFFD_WP
from host_mm.mmu_gather import MmuGather
from host_mm.mprotect import (
    MM_CP_TRY_CHANGE_WRITABLE,
    MM_CP_UFFD_WP,
    MM_CP_UFFD_WP_RESOLVE,
    change_protection,
    vma_wants_manual_pte_write_upgrade,
)
from host_mm.userfaultfd_k import userfaultfd_reset_ctx, userfaultfd_set_ctx
from host_mm.vma import vma_modify_flags_uffd

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea
    from host_mm.userfaultfd_k import UserfaultfdCtx

__all__ = [
    "mwriteprotect_range", "uffd_wp_range", "userfaultfd_clear_vma", "userfaultfd_register_range",
    "userfaultfd_release_all", "vma_can_userfault", "vma_is_shmem",
]


_MINOR_SHMEM = 1 << 10
_WP_SHMEM = 1 << 12
"""UFFD_FEATURE_MINOR_SHMEM and UFFD_FEATURE_WP_HUGETLBFS_SHMEM: what kernels without them refuse."""


def vma_is_shmem(vma: VmArea) -> bool:
    """Whether the VMA maps shared memory: a memfd, or shared anonymous memory."""
    return vma.file is not None and bool(vma.file.a_ops.is_shmem)


def vma_can_userfault(vma: VmArea, vm_flags: int, *, wp_async: bool) -> bool:
    """Whether a VMA of this kind can be registered in these modes."""
    modes = vm_flags & VM_UFFD_FLAGS
    if vma.flags & VM_HUGETLB or (modes & VM_UFFD_MINOR and not vma_is_shmem(vma)):
        return False
    offered = vma.mm.host.profile.userfaultfd_features
    needed = (_MINOR_SHMEM if modes & VM_UFFD_MINOR else 0) | (_WP_SHMEM if modes & VM_UFFD_WP else 0)
    if vma_is_shmem(vma) and needed & ~offered:
        return False
    return (wp_async and modes == VM_UFFD_WP) or vma.ops is None or vma_is_shmem(vma)


def uffd_wp_range(vma: VmArea, start: int, end: int, *, enable_wp: bool) -> int:
    """Write-protect a part of a VMA, or lift that; how many entries changed, or a negative errno."""
    flags = MM_CP_UFFD_WP if enable_wp else MM_CP_UFFD_WP_RESOLVE
    if not enable_wp and vma_wants_manual_pte_write_upgrade(vma):
        flags |= MM_CP_TRY_CHANGE_WRITABLE
    tlb = MmuGather(vma.mm)
    changed = change_protection(tlb, vma, start, end, flags)
    tlb.finish()
    return changed


def mwriteprotect_range(ctx: UserfaultfdCtx, start: int, end: int, *, enable_wp: bool) -> int:
    """UFFDIO_WRITEPROTECT: 0, or -ENOENT where a mapping is not registered for it. Holes are skipped."""
    mm = ctx.mm
    mm.mmap_lock.read_lock()
    err = -ENOENT
    for vma in mm.vmas_in(start, end):
        if not vma.flags & VM_UFFD_WP:
            err = -ENOENT
            break
        err = min(0, uffd_wp_range(vma, max(vma.start, start), min(vma.end, end), enable_wp=enable_wp))
        if err < 0:
            break
    mm.mmap_lock.read_unlock()
    return err


def userfaultfd_register_range(
    ctx: UserfaultfdCtx, vmas: list[VmArea], flags: int, start: int, end: int
) -> None:
    """Give the range's part of each VMA to `ctx`, under mmap_lock for write; VMAs are split and merged."""
    for vma in vmas:
        if vma.userfaultfd_ctx is ctx and vma.flags & flags == flags:
            continue
        first, last = max(vma.start, start), min(vma.end, end)
        new_flags = (vma.flags & ~VM_UFFD_FLAGS) | flags
        vma = vma_modify_flags_uffd(vma, first, last, new_flags, ctx)
        userfaultfd_set_ctx(vma, ctx, flags)


def userfaultfd_clear_vma(vma: VmArea, start: int, end: int) -> None:
    """Take the registration from a part of a VMA, under mmap_lock for write."""
    if vma.flags & VM_UFFD_WP:
        uffd_wp_range(vma, start, end, enable_wp=False)
    vma = vma_modify_flags_uffd(vma, start, end, vma.flags & ~VM_UFFD_FLAGS, None)
    userfaultfd_reset_ctx(vma)


def userfaultfd_release_all(mm: MmStruct, ctx: UserfaultfdCtx) -> None:
    """The userfaultfd is closed: nothing stays registered with it."""
    if not mm.mm_users:
        return
    mm.mmap_lock.lock()
    for vma in list(mm.vmas):
        # A neighbour can have taken it over meanwhile.
        if vma.userfaultfd_ctx is ctx and mm.vma_lookup(vma.start) is vma:
            userfaultfd_clear_vma(vma, vma.start, vma.end)
    mm.mmap_lock.unlock()
