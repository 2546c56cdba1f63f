"""Reverse maps: from a gfn of a memslot to the SPTEs that map it, and from a table to those that point to it.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): pte_list_add, pte_list_remove, rmap_add, rmap_remove,
kvm_rmap_lock, rmap_get_first/next, slot_rmap_walk_*, __walk_slot_rmaps, kvm_zap_all_rmap_sptes.

A head (struct kvm_rmap_head) is empty, or one SPTE, or a chain of descriptors of up to PTE_LIST_EXT SPTEs;
only the first may have room. A memslot has a head for each gfn and level, a table page has one,
`parent_ptes`. The TDP MMU has no rmaps: it walks its roots. Writers hold mmu_lock for write; aging reads
without it and holds only the head, so that no SPTE leaves the list, and no table is freed, under it.

A walk of a range goes level by level, 4K first, and at each level by index: a change of one 4K page meets the
2M and 1G leaves over it. Heads exist only while they hold something, so a walk costs what is mapped.

Not modelled: descriptors of three that grow at the tail (5.10), the slab caches they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Spinlock
from kvm_model.mmu.mmu_internal import role_smm
from kvm_model.mmu.shadow_spte import (
    kvm_mmu_page_get_gfn,
    kvm_mmu_page_set_translation,
    mmu_spte_clear_track_bits,
)
from kvm_model.mmu.tdp_zap import need_resched
from kvm_model.requests import kvm_flush_remote_tlbs, kvm_flush_remote_tlbs_gfn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot

__all__ = [
    "PTE_LIST_EXT", "RMAP_RECYCLE_THRESHOLD", "RmapHandler", "RmapHead", "gfn_to_rmap",
    "kvm_zap_all_rmap_sptes", "kvm_zap_one_rmap_spte", "pte_list_add", "pte_list_count", "pte_list_remove",
    "rmap_add", "rmap_remove", "rmap_sptes", "walk_slot_rmaps",
]

PTE_LIST_EXT = 14
RMAP_RECYCLE_THRESHOLD = 1000


class _PteListDesc:
    """struct pte_list_desc."""

    __slots__ = ("more", "sptes", "tail_count")

    def __init__(self, sptes: list[int], more: _PteListDesc | None, tail_count: int) -> None:
        self.sptes = sptes
        self.more = more
        self.tail_count = tail_count


class RmapHead:
    """struct kvm_rmap_head. `val`: None, an index in Ram.u64, or the first descriptor of a chain.

    `home` and `index` say where a memslot's head stands; a head that empties leaves it. `lock` is the bit
    that keeps it as it is while aging reads it.
    """

    __slots__ = ("home", "index", "lock", "val")

    def __init__(
        self, home: dict[int, RmapHead] | None = None, index: int = 0, lock: Spinlock | None = None
    ) -> None:
        self.val: int | _PteListDesc | None = None
        self.home = home
        self.index = index
        self.lock = lock


RmapHandler = Callable[["Kvm", RmapHead, "KvmMemorySlot"], bool]


# -- lists --------------------------------------------------------------------------------------


def rmap_sptes(head: RmapHead | None) -> Iterator[int]:
    """for_each_rmap_spte: the SPTEs, first descriptor first. None may be removed meanwhile."""
    val = head.val if head is not None else None
    if isinstance(val, int):
        yield val
        return
    while val is not None:
        yield from val.sptes
        val = val.more


def pte_list_count(head: RmapHead | None) -> int:
    """How many SPTEs it holds."""
    val = head.val if head is not None else None
    if val is None:
        return 0
    return 1 if isinstance(val, int) else val.tail_count + len(val.sptes)


def pte_list_add(head: RmapHead, sptep: int) -> int:
    """Add an SPTE; how many were there before."""
    lock = head.lock
    if lock is not None:
        lock.lock()
    val = head.val
    count = 0
    if val is None:
        head.val = sptep
    elif isinstance(val, int):
        head.val = _PteListDesc([val, sptep], None, 0)
        count = 1
    else:
        count = val.tail_count + len(val.sptes)
        if len(val.sptes) == PTE_LIST_EXT:
            head.val = val = _PteListDesc([], val, count)
        val.sptes.append(sptep)
    if lock is not None:
        lock.unlock()
    return count


def pte_list_remove(head: RmapHead | None, sptep: int) -> None:
    """Take an SPTE out; it must be there."""
    if head is None:
        raise BrokenTruth("rmap-matches-sptes", f"SPTE {sptep << 3:#x} is to leave an rmap that is empty")
    lock = head.lock
    if lock is not None:
        lock.lock()
    if isinstance(head.val, _PteListDesc):
        found = _remove_from_chain(head, head.val, sptep)
    else:
        found = head.val == sptep
        head.val = None
    if lock is not None:
        lock.unlock()
    if not found:
        raise BrokenTruth("rmap-matches-sptes", f"SPTE {sptep << 3:#x} is not in the rmap it is to leave")
    if head.val is None and head.home is not None:
        del head.home[head.index]


def _remove_from_chain(head: RmapHead, first: _PteListDesc, sptep: int) -> bool:
    desc: _PteListDesc | None = first
    while desc is not None:
        if sptep in desc.sptes:
            # The last of the first fills the gap, so that only the first ever has room.
            desc.sptes[desc.sptes.index(sptep)] = first.sptes[-1]
            first.sptes.pop()
            if not first.sptes:
                head.val = first.more
            return True
        desc = desc.more
    return False


# -- a memslot's heads --------------------------------------------------------------------------


def gfn_to_rmap(gfn: int, level: int, slot: KvmMemorySlot) -> RmapHead | None:
    """The head of `gfn` at `level`, None while it holds nothing."""
    shift = 9 * (level - 1)
    return slot.rmap[level - 1].get((gfn >> shift) - (slot.base_gfn >> shift))


def rmap_add(kvm: Kvm, slot: KvmMemorySlot, sptep: int, gfn: int, access: int) -> None:
    """The SPTE maps `gfn` now, with the guest's rights. A list too long is zapped, this SPTE with it."""
    sp = kvm.sps[sptep >> 9]
    level = sp.level
    kvm_mmu_page_set_translation(kvm, sp, sptep & 511, gfn, access)
    kvm.stat[("pages_4k", "pages_2m", "pages_1g")[level - 1]] += 1
    head = gfn_to_rmap(gfn, level, slot)
    if head is None:
        shift = 9 * (level - 1)
        index = (gfn >> shift) - (slot.base_gfn >> shift)
        home = slot.rmap[level - 1]
        lock = Spinlock(kvm.sched, "rmap_head") if kvm.profile.lockless_aging else None
        head = home[index] = RmapHead(home, index, lock)
    count = pte_list_add(head, sptep)
    kvm.stat["max_mmu_rmap_size"] = max(kvm.stat["max_mmu_rmap_size"], count)
    if count > RMAP_RECYCLE_THRESHOLD:
        kvm_zap_all_rmap_sptes(kvm, head, "recycle")
        kvm_flush_remote_tlbs_gfn(kvm, gfn, level)


def rmap_remove(kvm: Kvm, sptep: int) -> None:
    """The SPTE maps nothing any more."""
    sp = kvm.sps[sptep >> 9]
    gfn = kvm_mmu_page_get_gfn(sp, sptep & 511)
    slot = kvm.memslots[role_smm(sp.role)].gfn_to_memslot(gfn)
    if slot is None:
        why = f"gfn {gfn:#x} was mapped but has no memslot"
        raise BrokenTruth("rmap-matches-sptes", why, kvm.stream.here())
    pte_list_remove(gfn_to_rmap(gfn, sp.level, slot), sptep)


def kvm_zap_one_rmap_spte(kvm: Kvm, head: RmapHead, sptep: int, why: str) -> None:
    """Zap one SPTE of the list, mmu_lock held for write."""
    mmu_spte_clear_track_bits(kvm, sptep, why)
    pte_list_remove(head, sptep)


def kvm_zap_all_rmap_sptes(kvm: Kvm, head: RmapHead, why: str) -> bool:
    """Zap every SPTE of the list, mmu_lock held for write; whether there was one."""
    lock = head.lock
    if lock is not None:
        lock.lock()
    zapped = False
    for sptep in rmap_sptes(head):
        mmu_spte_clear_track_bits(kvm, sptep, why)
        zapped = True
    head.val = None
    if lock is not None:
        lock.unlock()
    if zapped and head.home is not None:
        del head.home[head.index]
    return zapped


# -- walks --------------------------------------------------------------------------------------


def _indices(heads: dict[int, RmapHead], first: int, last: int) -> list[int]:
    """Indices of the heads in [first, last] that hold something, in order."""
    if last - first < len(heads):
        return [index for index in range(first, last + 1) if index in heads]
    return sorted(index for index in heads if first <= index <= last)


def walk_slot_rmaps(
    kvm: Kvm, slot: KvmMemorySlot, fn: RmapHandler, levels: range, start: int, end: int,
    *, can_yield: bool, flush_on_yield: bool = False, flush: bool = False,
) -> bool:
    """__walk_slot_rmaps: `fn` on each head of gfns [start, end), level by level, mmu_lock held for write.

    `flush` or'ed with the answers: whether a flush is due. With `can_yield` the lock may be dropped between
    heads; with `flush_on_yield` what is due is flushed before that.
    """
    for level in levels:
        heads = slot.rmap[level - 1]
        shift = 9 * (level - 1)
        base = slot.base_gfn >> shift
        last = (end - 1 >> shift) - base
        todo = _indices(heads, (start >> shift) - base, last)
        at = 0
        while at < len(todo):
            index = todo[at]
            at += 1
            head = heads.get(index)
            if head is not None:
                flush |= fn(kvm, head, slot)
            if can_yield and need_resched(kvm):
                if flush and flush_on_yield:
                    kvm_flush_remote_tlbs(kvm)
                    flush = False
                kvm.mmu_lock.unlock()
                kvm.sched.yield_()
                kvm.mmu_lock.lock()
                todo = _indices(heads, index + 1, last)
                at = 0
    return flush
