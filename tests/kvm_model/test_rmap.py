"""Reverse maps: the lists, the heads of a memslot, the walk over a range."""

from __future__ import annotations

import random
from collections import deque

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import Task
from kvm_model.instrument import leaf_spte
from kvm_model.mmu.rmap import (
    PTE_LIST_EXT,
    RMAP_RECYCLE_THRESHOLD,
    RmapHead,
    gfn_to_rmap,
    pte_list_add,
    pte_list_count,
    pte_list_remove,
    rmap_sptes,
    walk_slot_rmaps,
)
from tests.kvm_model.direct_machine import direct, direct_huge, dontneed, rmap
from tests.kvm_model.machine import PAGE
from tests.kvm_model.shadow_machine import DATA_GPA, PT_GPA, USER_4K, ShadowMachine


@pytest.mark.parametrize("seed", range(4))
def test_a_list_holds_what_was_added_and_not_removed(seed: int) -> None:
    rng = random.Random(seed)
    head, have = RmapHead(), set()
    for sptep in range(200):
        assert pte_list_add(head, sptep) == len(have)
        have.add(sptep)
        if rng.random() < 0.45:
            gone = rng.choice(sorted(have))
            pte_list_remove(head, gone)
            have.remove(gone)
        assert set(rmap_sptes(head)) == have
        assert pte_list_count(head) == len(have) == len(list(rmap_sptes(head)))
    for sptep in sorted(have):
        pte_list_remove(head, sptep)
    assert head.val is None


def test_only_the_first_descriptor_of_a_chain_has_room() -> None:
    head = RmapHead()
    for sptep in range(3 * PTE_LIST_EXT + 2):
        pte_list_add(head, sptep)
    for sptep in (0, 5, 20):
        pte_list_remove(head, sptep)
    desc, sizes = head.val, []
    while not isinstance(desc, int) and desc is not None:
        sizes.append(len(desc.sptes))
        desc = desc.more
    assert sizes == [13, PTE_LIST_EXT, PTE_LIST_EXT]
    assert pte_list_count(head) == 41


def test_what_is_not_in_a_list_cannot_leave_it() -> None:
    head = RmapHead()
    for wrong in (RmapHead(), None):
        with pytest.raises(BrokenTruth, match="rmap"):
            pte_list_remove(wrong, 1)
    pte_list_add(head, 1)
    pte_list_add(head, 2)
    with pytest.raises(BrokenTruth, match="rmap"):
        pte_list_remove(head, 3)


def test_a_leaf_is_in_the_rmap_of_its_gfn_and_level_and_leaves_with_the_mapping() -> None:
    m = direct()
    m.run(("w", 3 * PAGE, 1))
    assert rmap(m, 3) == [leaf_spte(m.kvm, 3)[0]]
    assert m.kvm.stat["pages_4k"] == 1
    dontneed(m, 3)
    assert rmap(m, 3) == []
    slot = m.kvm.slots().gfn_to_memslot(3)
    assert slot is not None
    assert slot.rmap == ({}, {}, {})
    assert m.kvm.stat["pages_4k"] == 0


def test_a_huge_leaf_is_in_the_rmap_of_its_level_only() -> None:
    m = direct_huge()
    m.run(("w", 5 * PAGE, 1))
    assert rmap(m, 5, 2) == rmap(m, 0, 2) == [leaf_spte(m.kvm, 5)[0]]
    assert rmap(m, 5, 1) == []
    assert m.kvm.stat["pages_2m"] == 1


def test_a_list_that_grows_too_long_is_zapped_whole_and_flushed() -> None:
    # Only a guest whose tables KVM shadows can have so many: here by two tables full of one page.
    m = ShadowMachine(checks=False)
    m.do(lambda: [m.put(PT_GPA + 8 * entry, DATA_GPA | USER_4K) for entry in range(1024)])
    m.host_write(DATA_GPA, 7)
    slot = m.kvm.slots().gfn_to_memslot(DATA_GPA >> 12)
    assert slot is not None

    def mapped() -> int:
        return pte_list_count(gfn_to_rmap(DATA_GPA >> 12, 1, slot))

    # The neighbours of each come along; entry 1001 is the last of its group of eight to do so.
    loads = [("r", DATA_GPA + page * PAGE) for page in range(0, RMAP_RECYCLE_THRESHOLD, 8)]
    assert m.run(*loads) == [7] * 125
    assert mapped() == RMAP_RECYCLE_THRESHOLD
    flushes = m.kvm.stat["remote_tlb_flush_requests"]
    m.run(("r", DATA_GPA + RMAP_RECYCLE_THRESHOLD * PAGE))
    assert m.kvm.stat["max_mmu_rmap_size"] == RMAP_RECYCLE_THRESHOLD + 1
    assert m.kvm.stat["remote_tlb_flush_requests"] > flushes
    assert mapped() == 8, "the one that faulted went too, and came back with its group"
    assert m.run(("r", DATA_GPA)) == [7]


@pytest.mark.parametrize(("start", "end", "want"), [
    (0, 1024, [(1, 0), (1, 700), (2, 0), (2, 512), (3, 0)]),
    (1, 700, [(2, 0), (2, 512), (3, 0)]),
    (1, 512, [(2, 0), (3, 0)]),
    (700, 701, [(1, 700), (2, 512), (3, 0)]),
    (511, 513, [(2, 0), (2, 512), (3, 0)]),
])
def test_a_walk_visits_every_level_over_the_range_in_order(
    start: int, end: int, want: list[tuple[int, int]]
) -> None:
    m = direct(pages=1024)
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None
    for level, gfn in ((1, 0), (1, 700), (2, 0), (2, 512), (3, 0)):
        index = gfn >> 9 * (level - 1)
        slot.rmap[level - 1][index] = head = RmapHead(slot.rmap[level - 1], index)
        head.val = level << 20 | gfn
    seen: list[tuple[int, int]] = []

    def visit(kvm: object, head: RmapHead, slot: object) -> bool:
        assert isinstance(head.val, int)
        seen.append((head.val >> 20, head.val & 0xFFFFF))
        return False

    m.do(lambda: walk_slot_rmaps(m.kvm, slot, visit, range(1, 4), start, end, can_yield=False))
    assert seen == want


class GiveWay:
    """A strategy that lets others run wherever a walk asks, and nowhere else."""

    def switch_here(self, kind: str) -> bool:
        return kind == "need_resched"

    def pick(self, runnable: deque[Task]) -> Task:
        return runnable.popleft()


@pytest.mark.parametrize("can_yield", [True, False])
def test_a_walk_that_gives_the_lock_away_flushes_what_is_due_before_it(can_yield: bool) -> None:
    m = direct()
    m.run(("w", 0, 1), ("w", PAGE, 1))
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None
    before = m.kvm.stat["remote_tlb_flush_requests"]
    seen: list[tuple[int, int]] = []
    visited: list[RmapHead] = []

    def visit(kvm: object, head: RmapHead, slot: object) -> bool:
        visited.append(head)
        return True

    def walk() -> None:
        with m.kvm.mmu_lock:
            due.append(walk_slot_rmaps(
                m.kvm, slot, visit, range(1, 2), 0, 64, can_yield=can_yield, flush_on_yield=True
            ))

    def other() -> None:
        with m.kvm.mmu_lock:
            seen.append((len(visited), m.kvm.stat["remote_tlb_flush_requests"] - before))

    due: list[bool] = []
    m.sched.set_strategy(GiveWay())
    m.finish(m.sched.spawn("walk", walk), m.sched.spawn("other", other))
    assert len(visited) == 2
    # What came after the last break is the caller's to flush.
    assert due == [True]
    assert seen == ([(1, 1)] if can_yield else [(2, 0)])
