"""Shadow pages out of sync: guest tables that the guest may write, and what their parents know of them.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): mmu_try_to_unsync_pages, kvm_unsync_page,
kvm_unlink_unsync_page, mark_unsync, kvm_mmu_mark_parents_unsync, __mmu_unsync_walk, mmu_pages_add,
for_each_sp, mmu_pages_clear_parents, sp_has_gptes, for_each_gfn_valid_sp_with_gptes; mmu/mmutrace.h; 5.10:
mmu_need_write_protect.

A guest table at the lowest level need not stay write-protected: its shadow pages become unsync, the guest
writes it at full speed, and what it wrote counts from its next flush on, as on real hardware. Every table on
the way down to an unsync page has the bit of the entry that leads there in `unsync_child_bitmap`, so that a
flush finds them from the root. A bit may outlive its reason; none may be missing.

The marks must stand before the SPTE that lets the guest write: who flushes looks at them without mmu_lock.

Not modelled: unsync shadow pages of a nested guest's EPT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.memslots import KvmMemorySlot, kvm_gfn_is_write_tracked
from kvm_model.mmu.mmu_internal import (
    MMU_PAGE_FIELDS,
    KvmMmuPage,
    fmt_mmu_page,
    is_obsolete_sp,
    page_args,
    role_direct,
)
from kvm_model.mmu.rmap import rmap_sptes
from kvm_model.mmu.spte import (
    ACC_WRITE_MASK,
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    is_large_pte,
    is_last_spte,
    is_shadow_present_pte,
    spte_to_pfn,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.kvm_main import Kvm

__all__ = [
    "TRACEPOINTS", "MmuPagePath", "for_each_gfn_valid_sp_with_gptes", "for_each_sp", "kvm_unlink_unsync_page",
    "mark_unsync", "mmu_pages_clear_parents", "mmu_try_to_unsync_pages", "mmu_unsync_walk", "must_protect",
    "sp_has_gptes",
]

_KVM_PAGE_ARRAY_NR = 16
_PT64_ROOT_MAX_LEVEL = 5

KVM_MMU_SYNC_PAGE = Tracepoint("kvmmmu", "kvm_mmu_sync_page", MMU_PAGE_FIELDS, fmt_mmu_page)
KVM_MMU_UNSYNC_PAGE = Tracepoint("kvmmmu", "kvm_mmu_unsync_page", MMU_PAGE_FIELDS, fmt_mmu_page)
TRACEPOINTS = (KVM_MMU_SYNC_PAGE, KVM_MMU_UNSYNC_PAGE)

UnsyncPages = list[tuple[KvmMmuPage, int]]
"""struct kvm_mmu_pages: pages on the way to unsync ones, those too, each with its index in the one above."""


def sp_has_gptes(sp: KvmMmuPage) -> bool:
    """Whether the page shadows a table of the guest's."""
    return not role_direct(sp.role)


def for_each_gfn_valid_sp_with_gptes(kvm: Kvm, gfn: int) -> Iterator[KvmMmuPage]:
    """The valid pages that shadow the guest table at `gfn`, newest first. They may be zapped meanwhile."""
    # Looked at only when its turn comes: one may go with another.
    for sp in tuple(kvm.mmu_page_hash.get(gfn, ())):
        if sp_has_gptes(sp) and not is_obsolete_sp(kvm, sp):
            yield sp


# -- marks --------------------------------------------------------------------------------------


def _kvm_mmu_mark_parents_unsync(kvm: Kvm, sp: KvmMmuPage) -> None:
    for sptep in rmap_sptes(sp.parent_ptes):
        mark_unsync(kvm, sptep)


def mark_unsync(kvm: Kvm, sptep: int) -> None:
    """Below this entry is an unsync page: note it here and, for a table that had none, in those above."""
    sp = kvm.sps[sptep >> 9]
    bitmap = sp.unsync_child_bitmap
    if sptep & 511 in bitmap:
        return
    bitmap.add(sptep & 511)
    if len(bitmap) == 1:
        _kvm_mmu_mark_parents_unsync(kvm, sp)


def _kvm_unsync_page(kvm: Kvm, sp: KvmMmuPage) -> None:
    if (t := kvm.trace.kvm_mmu_unsync_page) is not None:
        t(*page_args(sp))
    kvm.stat["mmu_unsync"] += 1
    sp.unsync = True
    if "no-mark-parents" not in kvm.breaks:
        _kvm_mmu_mark_parents_unsync(kvm, sp)


def kvm_unlink_unsync_page(kvm: Kvm, sp: KvmMmuPage) -> None:
    """The page is about to be synced, or to go."""
    if (t := kvm.trace.kvm_mmu_sync_page) is not None:
        t(*page_args(sp))
    sp.unsync = False
    kvm.stat["mmu_unsync"] -= 1


def mmu_try_to_unsync_pages(
    kvm: Kvm, slot: KvmMemorySlot, gfn: int, *, synchronizing: bool, prefetch: bool
) -> bool:
    """Before the guest may write `gfn`: make the pages that shadow it unsync. Whether that may not be."""
    if kvm_gfn_is_write_tracked(slot, gfn):
        return True
    locked = False
    may_not = False
    for sp in for_each_gfn_valid_sp_with_gptes(kvm, gfn):
        if synchronizing:
            may_not = True
            break
        if sp.unsync:
            continue
        if prefetch:
            may_not = True
            break
        if not locked:
            # The TDP MMU's faults hold mmu_lock shared.
            locked = True
            kvm.mmu_unsync_pages_lock.lock()
            if sp.unsync:
                continue
        _kvm_unsync_page(kvm, sp)
    if locked:
        kvm.mmu_unsync_pages_lock.unlock()
    return may_not


def must_protect(
    kvm: Kvm, sp: KvmMmuPage, slot: KvmMemorySlot, access: int, gfn: int, old_spte: int,
    *, host_writable: bool, prefetch: bool, synchronizing: bool = False,
) -> bool:
    """make_spte's question: whether a leaf for `gfn` in `sp`, in the place of `old_spte`, may not get W."""
    if not access & ACC_WRITE_MASK or not host_writable:
        return False
    # Behind a writable leaf all pages are unsync already.
    old_is_leaf = is_shadow_present_pte(old_spte) and is_last_spte(old_spte, sp.level)
    if old_is_leaf and old_spte & PT_WRITABLE_MASK:
        return False
    return mmu_try_to_unsync_pages(kvm, slot, gfn, synchronizing=synchronizing, prefetch=prefetch)


# -- walks --------------------------------------------------------------------------------------


def _mmu_pages_add(pvec: UnsyncPages, sp: KvmMmuPage, index: int) -> bool:
    if sp.unsync and any(page is sp for page, _ in pvec):
        return False
    pvec.append((sp, index))
    return len(pvec) == _KVM_PAGE_ARRAY_NR


def _unsync_walk(kvm: Kvm, sp: KvmMmuPage, pvec: UnsyncPages) -> int:
    """__mmu_unsync_walk: how many unsync pages are below, -1 if `pvec` is full before all are in it."""
    leaves = 0
    for index in sorted(sp.unsync_child_bitmap):
        spte = kvm.ram.u64[sp.spt << 9 | index]
        found = 0
        if is_shadow_present_pte(spte) and not is_large_pte(spte):
            child = kvm.sps[spte_to_pfn(spte)]
            if child.unsync_child_bitmap:
                if _mmu_pages_add(pvec, child, index):
                    return -1
                found = _unsync_walk(kvm, child, pvec)
                if found < 0:
                    return -1
            elif child.unsync:
                found = 1
                if _mmu_pages_add(pvec, child, index):
                    return -1
        if found:
            leaves += found
        else:
            sp.unsync_child_bitmap.discard(index)
    return leaves


def mmu_unsync_walk(kvm: Kvm, sp: KvmMmuPage) -> UnsyncPages:
    """Up to 16 of the pages that lead to unsync ones below `sp`, from `sp` on; none if there are none."""
    if not sp.unsync_child_bitmap:
        return []
    pvec: UnsyncPages = []
    _mmu_pages_add(pvec, sp, -1)
    return pvec if _unsync_walk(kvm, sp, pvec) else []


class MmuPagePath:
    """struct mmu_page_path: the tables above the page at hand, and the entries that lead to it."""

    __slots__ = ("idx", "parent")

    def __init__(self) -> None:
        self.parent: list[KvmMmuPage | None] = [None] * _PT64_ROOT_MAX_LEVEL
        self.idx = [0] * _PT64_ROOT_MAX_LEVEL


def for_each_sp(pvec: UnsyncPages, path: MmuPagePath) -> Iterator[KvmMmuPage]:
    """The unsync pages of `pvec`, with `path` leading to each."""
    top = pvec[0][0]
    path.parent[top.level - 2] = top
    path.parent[top.level - 1] = None
    for sp, index in pvec[1:]:
        path.idx[sp.level - 1] = index
        if sp.level == PG_LEVEL_4K:
            yield sp
        else:
            path.parent[sp.level - 2] = sp


def mmu_pages_clear_parents(path: MmuPagePath) -> None:
    """The page that `path` leads to is unsync no more: tell the tables above, as far as that changes them."""
    for level in range(_PT64_ROOT_MAX_LEVEL):
        sp = path.parent[level]
        if sp is None:
            return
        sp.unsync_child_bitmap.discard(path.idx[level])
        if sp.unsync_child_bitmap:
            return
