"""Locked memory: what mlock brackets and faults in, and what reclaim and migration do about it."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.arch.x86.pgtable import pte_pfn, pte_present, walk_lockless
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.lru import LRU_INACTIVE_ANON, LRU_UNEVICTABLE
from host_mm.madvise import MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT, MADV_POPULATE_READ, do_madvise
from host_mm.migrate import move_pages
from host_mm.mlock import (
    MCL_CURRENT,
    MCL_FUTURE,
    MCL_ONFAULT,
    MLOCK_ONFAULT,
    do_mlock,
    do_mlockall,
    do_munlock,
    do_munlockall,
)
from host_mm.mm_types import VM_LOCKED, VM_LOCKED_MASK, VM_LOCKONFAULT
from host_mm.mmap import MAP_LOCKED, do_mmap, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.page import PG_mlocked
from host_mm.truths import audit
from tests.host_mm.machine import ANON, PAGE, RW, SLOT, Vmm

M2 = 2 << 20


@pytest.fixture
def vm() -> Vmm:
    return Vmm()


def lock(vm: Vmm, offset: int, length: int, flags: int = 0) -> None:
    do_mlock(vm.mm, vm.base + offset, length, flags)


def unlock(vm: Vmm, offset: int, length: int) -> None:
    do_munlock(vm.mm, vm.base + offset, length)


def frame(vm: Vmm, offset: int) -> int:
    """The frame mapped at `offset`, or -1."""
    entry, level = walk_lockless(vm.host.ram, vm.mm.pgd, vm.base + offset)
    return pte_pfn(entry) if level == 1 and pte_present(entry) else -1


def listed(vm: Vmm, lru: int, pfn: int) -> bool:
    vm.host.lru.lru_add_drain_all()
    return pfn in vm.host.lru.lruvec(pfn).lists[lru]


def flags_at(vm: Vmm, offset: int) -> int:
    vma = vm.mm.vma_lookup(vm.base + offset)
    assert vma is not None
    return vma.flags & VM_LOCKED_MASK


def reclaim_everything(vm: Vmm) -> None:
    def body() -> None:
        for nid in range(len(vm.host.nodes)):
            for _ in range(12):
                vm.host.reclaim(0, nid)

    vm.host.sched.run_task("reclaim", body)


# -- brackets and VMAs ----------------------------------------------------------------------------
def test_mlock_of_a_page_brackets_only_the_2m_of_its_split_and_munlock_nothing(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    vm.brackets()
    lock(vm, 0x3000, PAGE)
    assert vm.brackets() == [("clear", 0, M2)]
    assert [(v.start - vm.base, v.end - vm.base) for v in vm.mm.vmas_in(vm.base, vm.base + SLOT)] == [
        (0, 0x3000), (0x3000, 0x4000), (0x4000, SLOT)
    ]
    unlock(vm, 0x3000, PAGE)
    assert vm.brackets() == []
    assert len(vm.mm.vmas_in(vm.base, vm.base + SLOT)) == 1


def test_mlock_takes_every_page_that_the_bytes_touch(vm: Vmm) -> None:
    lock(vm, 0x3FFF, 2)
    assert [bool(flags_at(vm, page * PAGE)) for page in range(2, 6)] == [False, True, True, False]


def test_mlock_populates_for_writing_and_breaks_the_zero_page(vm: Vmm) -> None:
    vm.guest_load(0x3000)
    vm.brackets()
    lock(vm, 0x3000, 2 * PAGE)
    assert vm.brackets() == [("clear", 0, M2), ("clear", 0x3000, 0x4000)]
    assert frame(vm, 0x3000) > vm.host.zero_pfn
    assert frame(vm, 0x4000) > vm.host.zero_pfn
    vm.guest_store(0x4000, 1)
    assert vm.brackets() == []


def test_mlock_of_what_may_only_be_read_maps_the_zero_page(vm: Vmm) -> None:
    do_mprotect(vm.mm, vm.base, PAGE, 1)
    lock(vm, 0, PAGE)
    assert frame(vm, 0) == vm.host.zero_pfn


def test_onfault_populates_nothing_but_locks_what_is_and_what_comes(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    lock(vm, 0x3000, 2 * PAGE, MLOCK_ONFAULT)
    assert flags_at(vm, 0x3000) == VM_LOCKED | VM_LOCKONFAULT
    assert frame(vm, 0x4000) == -1
    vm.guest_store(0x4000, 1)
    for offset in (0x3000, 0x4000):
        assert listed(vm, LRU_UNEVICTABLE, frame(vm, offset))


def test_a_second_mlock_does_not_count_a_page_twice(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    lock(vm, 0x3000, PAGE, MLOCK_ONFAULT)
    lock(vm, 0x3000, PAGE)
    lock(vm, 0x3000, PAGE)
    unlock(vm, 0x3000, PAGE)
    assert listed(vm, LRU_INACTIVE_ANON, frame(vm, 0x3000))


def test_errors_are_those_of_the_system_call(vm: Vmm) -> None:
    for act, name in (
        (lambda: lock(vm, 0, PAGE, 2), "EINVAL"),
        (lambda: lock(vm, SLOT - PAGE, 2 * PAGE), "ENOMEM"),
        (lambda: do_mlock(vm.mm, vm.base, (1 << 64) - PAGE), "EINVAL"),
        (lambda: unlock(vm, SLOT, PAGE), "ENOMEM"),
        (lambda: do_mlockall(vm.mm, 0), "EINVAL"),
        (lambda: do_mlockall(vm.mm, MCL_ONFAULT), "EINVAL"),
        (lambda: do_mlockall(vm.mm, 8), "EINVAL"),
    ):
        with pytest.raises(KernelError, match=name):
            act()
    assert flags_at(vm, SLOT - PAGE), "what lies before the hole is locked by then"
    do_mprotect(vm.mm, vm.base, PAGE, 0)
    with pytest.raises(KernelError, match="ENOMEM"):
        lock(vm, 0, PAGE)


def test_a_locked_range_refuses_to_be_dropped_or_paged_out(vm: Vmm) -> None:
    lock(vm, 0x3000, PAGE)
    for advice in (MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT):
        with pytest.raises(KernelError, match="EINVAL"):
            do_madvise(vm.mm, vm.base + 0x3000, PAGE, advice)


def test_mlockall_locks_what_is_and_what_will_be(vm: Vmm) -> None:
    vm.guest_store(0, 1)
    do_mlockall(vm.mm, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)
    assert all(vma.flags & VM_LOCKED for vma in vm.mm.vmas)
    do_mlockall(vm.mm, MCL_FUTURE)
    later = do_mmap(vm.mm, 0, 2 * PAGE, RW, ANON)
    assert frame(vm, later - vm.base) > vm.host.zero_pfn, "a locked mapping is populated"
    do_munlockall(vm.mm)
    assert not any(vma.flags & VM_LOCKED_MASK for vma in vm.mm.vmas)
    after = do_mmap(vm.mm, 0, PAGE, RW, ANON)
    assert frame(vm, after - vm.base) == -1
    assert vm.host.lru.batched() == []
    assert vm.host.vmstat["nr_mlock"] == 0


def test_map_locked_populates(vm: Vmm) -> None:
    at = do_mmap(vm.mm, 0, 3 * PAGE, RW, ANON | MAP_LOCKED)
    for page in range(3):
        assert listed(vm, LRU_UNEVICTABLE, frame(vm, at - vm.base + page * PAGE))


# -- the folios -----------------------------------------------------------------------------------
def test_reclaim_leaves_locked_pages_and_takes_them_after_munlock(vm: Vmm) -> None:
    for page in range(8):
        vm.guest_store(page * PAGE, page + 1)
    lock(vm, 0, 4 * PAGE)
    locked = [frame(vm, page * PAGE) for page in range(4)]
    assert all(listed(vm, LRU_UNEVICTABLE, pfn) for pfn in locked)
    reclaim_everything(vm)
    assert [frame(vm, page * PAGE) for page in range(4)] == locked
    assert all(frame(vm, page * PAGE) == -1 for page in range(4, 8))
    unlock(vm, 0, 4 * PAGE)
    reclaim_everything(vm)
    assert all(frame(vm, page * PAGE) == -1 for page in range(8))
    assert [vm.host_read(page * PAGE) for page in range(8)] == list(range(1, 9))
    audit(vm.host)


def test_reclaim_locks_again_what_it_finds_mapped_by_a_locked_vma(vm: Vmm) -> None:
    vm.guest_store(0, 1)
    vm.host.lru.lru_add_drain_all()
    pfn = frame(vm, 0)
    vma = vm.mm.vma_lookup(vm.base)
    assert vma is not None
    # The window of the race in which mlock missed the page: the VMA says locked, the page does not.
    vma.flags |= VM_LOCKED
    reclaim_everything(vm)
    assert frame(vm, 0) == pfn
    assert vm.host.pages.flags[pfn] & PG_mlocked
    assert listed(vm, LRU_UNEVICTABLE, pfn)


def test_a_page_in_two_locked_vmas_is_evictable_after_both_let_go(vm: Vmm) -> None:
    vm.guest_store(0, 1)
    pfn = frame(vm, 0)
    child = fork_process(vm.process)
    do_mprotect(vm.mm, vm.base, PAGE, 1)
    do_mprotect(child.mm, vm.base, PAGE, 1)
    lock(vm, 0, PAGE)
    do_mlock(child.mm, vm.base, PAGE)
    unlock(vm, 0, PAGE)
    assert listed(vm, LRU_UNEVICTABLE, pfn)
    do_munlock(child.mm, vm.base, PAGE)
    assert listed(vm, LRU_INACTIVE_ANON, pfn)
    exit_process(child)


def test_the_child_of_a_fork_locks_nothing(vm: Vmm) -> None:
    vm.guest_store(0, 1)
    do_mlockall(vm.mm, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)
    child = fork_process(vm.process)
    assert not any(vma.flags & VM_LOCKED_MASK for vma in child.mm.vmas)
    assert not child.mm.def_flags & VM_LOCKED_MASK
    exit_process(child)
    assert listed(vm, LRU_UNEVICTABLE, frame(vm, 0))


def test_a_cow_in_a_locked_vma_locks_the_copy_and_lets_the_old_page_go(vm: Vmm) -> None:
    vm.guest_store(0, 1)
    lock(vm, 0, PAGE)
    old = frame(vm, 0)
    child = fork_process(vm.process)
    vm.guest_store(0, 2)
    assert listed(vm, LRU_UNEVICTABLE, frame(vm, 0))
    assert listed(vm, LRU_INACTIVE_ANON, old)
    exit_process(child)
    audit(vm.host)


def test_migration_moves_locked_pages_and_they_stay_locked(vm: Vmm) -> None:
    vm.guest_store(0, 7)
    lock(vm, 0, PAGE)
    old = frame(vm, 0)
    vm.host.sched.run_task("move", lambda: move_pages(vm.process, [vm.base], [1]))
    new = frame(vm, 0)
    assert new not in (old, -1)
    assert listed(vm, LRU_UNEVICTABLE, new)
    assert vm.host.vmstat["nr_mlock"] == 1
    unlock(vm, 0, PAGE)
    assert listed(vm, LRU_INACTIVE_ANON, new), "one mapping, one count"
    assert vm.host_read(0) == 7


def test_munmap_of_locked_memory_frees_it_and_counts_it_out(vm: Vmm) -> None:
    free = vm.host.allocator.nr_free_pages()
    lock(vm, 0, 40 * PAGE)
    assert vm.host.vmstat["nr_mlock"] == 40
    do_munmap(vm.mm, vm.base, 40 * PAGE)
    vm.host.lru.lru_add_drain_all()
    assert vm.host.vmstat["nr_mlock"] == 0
    # The table of the first 2 MiB may go with its pages.
    assert vm.host.allocator.nr_free_pages() >= free - 1
    audit(vm.host)


@pytest.mark.parametrize("seed", range(6))
def test_locking_beside_reclaim_migration_and_writes_keeps_bytes_and_counts(seed: int) -> None:
    vm = Vmm(ram=4 << 20, swap=4 << 20)
    sched = vm.host.sched
    sched.set_strategy(RandomStrategy(seed))
    rng = sched.strategy.rng
    left = 3
    expected: dict[int, int] = {}

    def done(body: Any) -> None:
        nonlocal left
        for _ in range(60):
            body()
        left -= 1

    def locker() -> None:
        first = rng.randrange(60)
        length = rng.choice((1, 3, 20)) * PAGE
        rng.choice((lock, unlock))(vm, first * PAGE, length)

    def writer() -> None:
        page, value = rng.randrange(80), rng.getrandbits(32)
        vm.host_write(page * PAGE, value)
        expected[page] = value

    def disturb() -> None:
        addresses = [vm.base + rng.randrange(80) * PAGE for _ in range(4)]
        if rng.random() < 0.5:
            move_pages(vm.process, addresses, [rng.randrange(2)] * 4)
        else:
            vm.host.reclaim(0, rng.randrange(2))

    for body in (locker, writer, disturb):
        sched.spawn(body.__name__, lambda body=body: done(body))
    sched.run_until(lambda: not left)
    sched.set_strategy(None)

    def finish() -> None:
        assert {page: vm.host_read(page * PAGE) for page in expected} == expected
        do_munlockall(vm.mm)
        vm.host.lru.lru_add_drain_all()
        do_madvise(vm.mm, vm.base, 80 * PAGE, MADV_POPULATE_READ)

    sched.run_task("finish", finish)
    sched.run_until(lambda: not vm.host.swap_device.inflight)
    vm.host.lru.lru_add_drain_all()
    audit(vm.host)


def test_the_walk_of_mlock_is_not_counted_by_rmap_walkers(vm: Vmm) -> None:
    vm.guest_store(0, 1)
    vm.host.lru.lru_add_drain_all()
    pfn = frame(vm, 0)
    seen: list[int] = []
    original = vm.host.lru.mlock.mlock_folio

    def mlock_folio(found: int) -> None:
        # A walker between the setting of VM_LOCKED and the end of the walk.
        inside = vm.mm.vma_lookup(vm.base)
        assert inside is not None
        seen.append(found)
        vm.host.lru.mlock.mlock_vma_folio(found, inside)
        original(found)

    vm.host.lru.mlock.mlock_folio = mlock_folio  # type: ignore[method-assign]
    lock(vm, 0, PAGE, MLOCK_ONFAULT)
    assert seen == [pfn]
    unlock(vm, 0, PAGE)
    assert listed(vm, LRU_INACTIVE_ANON, pfn), "one mapping, one count"
