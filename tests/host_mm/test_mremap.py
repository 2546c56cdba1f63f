"""mremap: what its brackets cover, in which order entries, flush and bracket go, and where pages are after.

(host_mm/mremap.py, move_page_tables.py)
"""

from __future__ import annotations

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import pte_pfn, pte_present, walk_lockless
from host_mm.arch.x86.swapops import is_swap_pte
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mlock import do_mlock
from host_mm.mm_types import VM_DONTEXPAND, VM_LOCKED
from host_mm.mmap import MAP_FIXED, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import ANON, PAGE, RW, SLOT, Recorder, Vmm, run
from tests.host_mm.mremap_machine import AWAY, G1, M2, MOVE, entry, move, read, written
from tests.host_mm.test_order_classes import BASE, record
from tests.host_mm.test_tlb import order


@pytest.fixture
def vm() -> Vmm:
    return Vmm()


# -- order ----------------------------------------------------------------------------------------
def test_class_1_mremap_moves_then_flushes_the_old_range_inside_the_bracket() -> None:
    seen = record(lambda p: do_mremap(p.mm, BASE, 2 * PAGE, 2 * PAGE, MOVE, AWAY), pages=2)
    assert seen.log[:9] == ["start", "clear", "set", "clear", "set", "flush", "end", "start", "end"]
    assert seen.ranges == [
        (mn.MMU_NOTIFY_UNMAP, BASE, BASE + 2 * PAGE, mn.ORDER_UNDER_PTL),
        (mn.MMU_NOTIFY_UNMAP, BASE, BASE + 2 * PAGE, mn.ORDER_GATHER),
    ], "the new range is told to nobody; unmapping the emptied source brackets it again"


def test_class_1_a_table_of_2m_moves_with_its_flush_inside_the_bracket(vm: Vmm) -> None:
    written(vm, 3)
    seen = order(vm, lambda: move(vm, 0, M2, AWAY))
    assert seen[:5] == ["start", "flush", "end", "start", "end"]


# -- moving ---------------------------------------------------------------------------------------
def test_bytes_move_with_their_frames_and_the_old_range_is_a_hole(vm: Vmm) -> None:
    written(vm, 4)
    frames = [pte_pfn(entry(vm, vm.base + page * PAGE)) for page in range(4)]
    assert move(vm, PAGE, 2 * PAGE, AWAY) == AWAY
    assert [pte_pfn(entry(vm, AWAY + page * PAGE)) for page in range(2)] == frames[1:3]
    assert [read(vm, AWAY + page * PAGE) for page in range(2)] == [2, 3]
    assert [vm.host_read(page * PAGE) for page in (0, 3)] == [1, 4]
    with pytest.raises(KernelError, match="EFAULT"):
        vm.host_read(PAGE)
    audit(vm.host)


def test_a_partial_move_brackets_the_old_range_then_the_split_then_the_old_range(vm: Vmm) -> None:
    written(vm, 4)
    move(vm, PAGE, 2 * PAGE, AWAY)
    assert vm.brackets() == [
        ("unmap", 0x1000, 0x3000), ("clear", 0, M2), ("unmap", 0x1000, 0x3000)
    ]


def test_moving_away_and_back_leaves_one_vma_as_before(vm: Vmm) -> None:
    written(vm, 8)
    before = [(v.start, v.end, v.pgoff, v.anon_vma) for v in vm.mm.vmas]
    move(vm, 2 * PAGE, 3 * PAGE, AWAY)
    do_mremap(vm.mm, AWAY, 3 * PAGE, 3 * PAGE, MOVE, vm.base + 2 * PAGE)
    assert [(v.start, v.end, v.pgoff, v.anon_vma) for v in vm.mm.vmas] == before
    assert [vm.host_read(page * PAGE) for page in range(8)] == list(range(1, 9))
    audit(vm.host)


def test_untouched_memory_takes_the_index_of_its_new_place_and_merges_there(vm: Vmm) -> None:
    do_mmap(vm.mm, AWAY, PAGE, RW, ANON | MAP_FIXED)
    do_mmap(vm.mm, AWAY + G1, PAGE, RW, ANON | MAP_FIXED)
    do_mremap(vm.mm, AWAY + G1, PAGE, PAGE, MOVE, AWAY + PAGE)
    merged = vm.mm.vma_lookup(AWAY)
    assert merged is not None
    assert (merged.start, merged.end) == (AWAY, AWAY + 2 * PAGE)


def test_a_neighbour_never_faulted_gets_the_anon_vma_of_the_pages_that_move_to_it(vm: Vmm) -> None:
    # Two pages from one mapping; the first is moved where its index says that it belongs.
    at = do_mmap(vm.mm, AWAY, 2 * PAGE, RW, ANON | MAP_FIXED)
    vm.host_write(at + PAGE - vm.base, 7)
    vm.host.lru.lru_add_drain_all()
    do_mremap(vm.mm, at + PAGE, PAGE, PAGE, MOVE, AWAY + G1)
    do_munmap(vm.mm, at, PAGE)
    fresh = do_mmap(vm.mm, at, PAGE, RW, ANON | MAP_FIXED)
    do_mremap(vm.mm, AWAY + G1, PAGE, PAGE, MOVE, at + PAGE)
    merged = vm.mm.vma_lookup(fresh)
    assert merged is not None
    assert (merged.start, merged.end) == (at, at + 2 * PAGE)
    vm.host.sched.run_task("out", lambda: do_madvise(vm.mm, at, 2 * PAGE, MADV_PAGEOUT))
    assert is_swap_pte(entry(vm, at + PAGE)), "rmap finds the page at its new place"
    assert read(vm, at + PAGE) == 7


def test_a_forked_childs_page_is_found_in_both_after_one_side_moved_it(vm: Vmm) -> None:
    written(vm, 1)
    child = fork_process(vm.process)
    move(vm, 0, PAGE, AWAY)
    vm.host.sched.run_task(
        "move", lambda: move_pages(vm.process, [AWAY], [1], move_all=True)
    )
    assert vm.host.allocator.nid_of(pte_pfn(entry(vm, AWAY))) == 1
    value, _ = walk_lockless(vm.host.ram, child.mm.pgd, vm.base)
    assert pte_pfn(value) == pte_pfn(entry(vm, AWAY))
    exit_process(child)
    audit(vm.host)


def test_several_mappings_move_with_the_holes_between_them(vm: Vmm) -> None:
    written(vm, 6)
    do_munmap(vm.mm, vm.base + 2 * PAGE, PAGE)
    do_mprotect(vm.mm, vm.base + 4 * PAGE, PAGE, 1)
    assert move(vm, 0, 6 * PAGE, AWAY) == AWAY
    assert [read(vm, AWAY + page * PAGE) for page in (0, 1, 3, 4, 5)] == [1, 2, 4, 5, 6]
    assert vm.mm.vma_lookup(AWAY + 2 * PAGE) is None
    audit(vm.host)


def test_what_was_at_a_fixed_address_is_unmapped_first(vm: Vmm) -> None:
    written(vm, 4)
    move(vm, 0, PAGE, vm.base + 2 * PAGE)
    assert [bracket for bracket in vm.brackets() if bracket[0] == "unmap"] == [
        ("unmap", 0x2000, 0x3000), ("unmap", 0, 0x1000), ("unmap", 0, 0x1000)
    ]
    assert vm.host_read(2 * PAGE) == 1
    audit(vm.host)


# -- resizing -------------------------------------------------------------------------------------
def test_shrinking_unmaps_the_tail(vm: Vmm) -> None:
    written(vm, 4)
    assert do_mremap(vm.mm, vm.base, 4 * PAGE, 2 * PAGE) == vm.base
    assert vm.brackets() == [("clear", 0, M2), ("unmap", 0x2000, 0x4000)]
    with pytest.raises(KernelError, match="EFAULT"):
        vm.host_read(2 * PAGE)
    assert vm.host_read(PAGE) == 2


def test_growing_in_place_needs_the_end_of_the_mapping_and_room_behind_it(vm: Vmm) -> None:
    at = do_mmap(vm.mm, AWAY, 2 * PAGE, RW, ANON | MAP_FIXED)
    vm.brackets()
    assert do_mremap(vm.mm, at + PAGE, PAGE, 3 * PAGE) == at + PAGE
    grown = vm.mm.vma_lookup(at)
    assert grown is not None
    assert (grown.start, grown.end) == (at, at + 4 * PAGE)
    assert vm.brackets() == []
    with pytest.raises(KernelError, match="ENOMEM"):
        do_mremap(vm.mm, at, PAGE, 2 * PAGE)
    do_mmap(vm.mm, at + 4 * PAGE, PAGE, 1, ANON | MAP_FIXED)
    with pytest.raises(KernelError, match="ENOMEM"):
        do_mremap(vm.mm, at, 4 * PAGE, 5 * PAGE)


def test_growing_where_there_is_no_room_moves_if_it_may(vm: Vmm) -> None:
    written(vm, 1)
    at = do_mremap(vm.mm, vm.base, PAGE, 3 * PAGE, MREMAP_MAYMOVE)
    assert at != vm.base
    assert [read(vm, at + page * PAGE) for page in range(3)] == [1, 0, 0]
    assert vm.brackets()[0] == ("unmap", 0, 0x1000)


def test_the_same_size_in_place_is_no_operation(vm: Vmm) -> None:
    assert do_mremap(vm.mm, vm.base, PAGE, PAGE, MREMAP_MAYMOVE) == vm.base
    assert vm.brackets() == []


def test_a_fixed_move_may_shrink_and_grow(vm: Vmm) -> None:
    written(vm, 4)
    do_mremap(vm.mm, vm.base, 3 * PAGE, 2 * PAGE, MOVE, AWAY)
    assert [read(vm, AWAY + page * PAGE) for page in range(2)] == [1, 2]
    assert vm.host_read(3 * PAGE) == 4
    do_mremap(vm.mm, AWAY, 2 * PAGE, 4 * PAGE, MOVE, AWAY + G1)
    assert [read(vm, AWAY + G1 + page * PAGE) for page in range(4)] == [1, 2, 0, 0]
    audit(vm.host)


def test_a_locked_mapping_that_grows_is_populated_and_stays_locked_where_it_goes(vm: Vmm) -> None:
    at = do_mmap(vm.mm, AWAY, 2 * PAGE, RW, ANON | MAP_FIXED)
    do_mlock(vm.mm, at, 2 * PAGE)
    do_mremap(vm.mm, at, 2 * PAGE, 4 * PAGE)
    assert all(pte_present(entry(vm, at + page * PAGE)) for page in range(4))
    do_mremap(vm.mm, at, 4 * PAGE, 4 * PAGE, MOVE, at + G1)
    moved = vm.mm.vma_lookup(at + G1)
    assert moved is not None
    assert moved.flags & VM_LOCKED
    vm.host.lru.lru_add_drain_all()
    assert vm.host.vmstat["nr_mlock"] == 4


# -- MREMAP_DONTUNMAP -----------------------------------------------------------------------------
def test_dontunmap_leaves_the_source_mapped_empty_and_unlocked(vm: Vmm) -> None:
    at = do_mmap(vm.mm, AWAY, 2 * PAGE, RW, ANON | MAP_FIXED)
    vm.host_write(at - vm.base, 9)
    do_mlock(vm.mm, at, 2 * PAGE)
    vm.brackets()
    new = do_mremap(vm.mm, at, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP)
    assert [(kind, start + vm.base, end + vm.base) for kind, start, end in vm.brackets()] == [
        ("unmap", at, at + 2 * PAGE)
    ]
    source, moved = vm.mm.vma_lookup(at), vm.mm.vma_lookup(new)
    assert source is not None
    assert moved is not None
    assert source.anon_vma is None
    assert not source.flags & VM_LOCKED
    assert moved.flags & VM_LOCKED
    assert (read(vm, at), read(vm, new)) == (0, 9)
    vm.host_write(at - vm.base, 1)
    assert (read(vm, at), read(vm, new)) == (1, 9)
    audit(vm.host)


# -- errors ---------------------------------------------------------------------------------------
def test_errors_are_those_of_the_system_call(vm: Vmm) -> None:
    base, mm = vm.base, vm.mm
    dontunmap = MREMAP_MAYMOVE | MREMAP_DONTUNMAP
    for args, name in (
        ((base, PAGE, PAGE, 8), "EINVAL"),
        ((base + 1, PAGE, PAGE), "EINVAL"),
        ((base, PAGE, 0), "EINVAL"),
        ((base, PAGE, 1 << 48), "EINVAL"),
        ((base, PAGE, PAGE, MREMAP_FIXED, AWAY), "EINVAL"),
        ((base, PAGE, PAGE, MOVE, AWAY + 1), "EINVAL"),
        ((base, PAGE, PAGE, MOVE, 1 << 47), "EINVAL"),
        ((base, 2 * PAGE, 2 * PAGE, MOVE, base + PAGE), "EINVAL"),
        ((base, PAGE, 2 * PAGE, dontunmap), "EINVAL"),
        ((base, 0, PAGE, MREMAP_MAYMOVE), "EINVAL"),
        ((base + SLOT, PAGE, 2 * PAGE, MREMAP_MAYMOVE), "EFAULT"),
        ((base + SLOT, PAGE, PAGE, MOVE, AWAY), "EFAULT"),
        ((base + SLOT - PAGE, 2 * PAGE, 3 * PAGE, MREMAP_MAYMOVE), "EFAULT"),
    ):
        with pytest.raises(KernelError, match=name):
            do_mremap(mm, *args)
    vma = mm.vma_lookup(base)
    assert vma is not None
    vma.flags |= VM_DONTEXPAND
    for args, name in (((base, PAGE, 2 * PAGE, 1), "EFAULT"), ((base, PAGE, PAGE, dontunmap), "EINVAL")):
        with pytest.raises(KernelError, match=name):
            do_mremap(mm, *args)
    assert vm.brackets() == []


def test_a_mapping_grows_only_when_no_reverse_map_walk_is_under_way(vm: Vmm) -> None:
    written(vm, 2)
    move(vm, PAGE, PAGE, AWAY)
    left = vm.mm.vma_lookup(vm.base)
    assert left is not None
    assert left.anon_vma is not None
    rwsem = left.anon_vma.root.rwsem
    ends: list[int] = []

    def walk() -> None:
        rwsem.read_lock()
        vm.host.sched.sleep(1_000_000)
        ends.append(left.end)
        rwsem.read_unlock()

    run(vm.host, walk, lambda: do_mremap(vm.mm, AWAY, PAGE, PAGE, MOVE, vm.base + PAGE))
    assert ends == [vm.base + PAGE]
    assert left.end > vm.base + PAGE
    assert [vm.host_read(page * PAGE) for page in range(2)] == [1, 2]


@pytest.mark.parametrize("seed", range(8))
def test_moving_beside_reclaim_and_migration_keeps_every_byte(seed: int) -> None:
    vm = Vmm(ram=4 << 20, swap=4 << 20)
    written(vm, 40)
    sched = vm.host.sched
    sched.set_strategy(RandomStrategy(seed))
    rng = sched.strategy.rng  # type: ignore[union-attr]
    left = 2

    def mover() -> None:
        nonlocal left
        for _ in range(30):
            first, pages = rng.randrange(38), rng.choice((1, 2))
            move(vm, first * PAGE, pages * PAGE, AWAY)
            do_mremap(vm.mm, AWAY, pages * PAGE, pages * PAGE, MOVE, vm.base + first * PAGE)
        left -= 1

    def disturb() -> None:
        nonlocal left
        for _ in range(40):
            if rng.random() < 0.6:
                addresses = [vm.base + rng.randrange(40) * PAGE for _ in range(6)]
                move_pages(vm.process, addresses, [rng.randrange(2)] * 6)
            else:
                vm.host.reclaim(0, rng.randrange(2))
        left -= 1

    sched.spawn("mover", mover)
    sched.spawn("disturb", disturb)
    sched.run_until(lambda: not left)
    sched.set_strategy(None)
    seen = vm.host.sched.run_task("read", lambda: [vm.host_read(page * PAGE) for page in range(40)])
    assert seen == list(range(1, 41))
    sched.run_until(lambda: not vm.host.swap_device.inflight)
    vm.host.lru.lru_add_drain_all()
    audit(vm.host)


def test_old_length_zero_maps_a_shared_file_once_more_and_moves_nothing() -> None:
    s = Shared(pages=8)
    copy_to_user(s.a, s.at + 2 * PAGE, b"shared")
    notifier = Recorder(s.at)
    mmu_notifier_register(notifier, s.a.mm)
    again = do_mremap(s.a.mm, s.at + 2 * PAGE, 0, 4 * PAGE, MREMAP_MAYMOVE)
    assert notifier.take() == [], "there was nothing to move"
    assert copy_from_user(s.a, again, 6) == b"shared"
    copy_to_user(s.a, again + PAGE, b"both")
    assert copy_from_user(s.a, s.at + 3 * PAGE, 4) == b"both"
    s.end()
