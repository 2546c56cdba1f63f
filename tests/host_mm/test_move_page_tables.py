"""What mremap does to the entries: how they move, alone or with their tables, and when the flush comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

import host_mm.move_page_tables
from host_mm.arch.x86.pgtable import _PAGE_SOFT_DIRTY, pte_pfn, pte_present
from host_mm.arch.x86.swapops import is_swap_pte
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy, Task
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.migrate import MIGRATE_SYNC, MR_SYSCALL, migrate_pages, move_pages
from host_mm.mm_types import VM_SOFTDIRTY
from host_mm.mmap import MAP_FIXED, do_mmap
from host_mm.mremap import do_mremap
from host_mm.pgtable_generic import pmd_offset
from host_mm.rmap_unmap import remove_migration_ptes, try_to_migrate
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from host_mm.truths_running import HostTruths
from tests.host_mm.machine import ANON, PAGE, RW, Vmm, run
from tests.host_mm.mremap_machine import AWAY, BREAK, G1, M2, MOVE, entry, move, read, written
from tests.host_mm.test_order_classes import BASE, record
from trace_events.stream import Listener


@pytest.fixture
def vm() -> Vmm:
    return Vmm()


@pytest.mark.parametrize("length", [PAGE, M2])
@pytest.mark.parametrize("late", [False, True])
def test_the_flush_is_done_while_the_page_table_locks_are_held(length: int, late: bool) -> None:
    # With the checks on the first page that moves would end it.
    vm = Vmm(breaks=frozenset({BREAK}) if late else frozenset(), checks=not late)
    written(vm, 1)
    atomic: list[bool] = []
    listener = Listener(
        ["refault:primary_flush"], lambda event: atomic.append(vm.host.sched.current.no_preempt > 0),
        ancestors=False,
    )
    vm.host.stream.listen(listener)
    vm.host.sched.run_task("move", lambda: move(vm, 0, length, AWAY))
    assert atomic[0] is not late


@pytest.mark.parametrize("length", [PAGE, M2])
def test_a_flush_that_comes_too_late_breaks_a_truth(length: int) -> None:
    vm = Vmm(breaks=frozenset({BREAK}))
    written(vm, 1)
    with pytest.raises(BrokenTruth, match="moved-still-translated"):
        vm.host.sched.run_task("move", lambda: move(vm, 0, length, AWAY))


def test_a_move_without_present_entries_flushes_nothing() -> None:
    def prepare(process: object) -> None:
        do_madvise(process.mm, BASE, PAGE, MADV_PAGEOUT)  # type: ignore[attr-defined]
        process.mm.host.swap_device.drain()  # type: ignore[attr-defined]
        process.mm.tlb_flush_batched = 0  # type: ignore[attr-defined]

    seen = record(lambda p: do_mremap(p.mm, BASE, PAGE, PAGE, MOVE, AWAY), prepare=prepare)
    assert seen.log[:4] == ["start", "clear", "swap-entry", "end"]


@pytest.mark.parametrize("act", ["pageout", "migrate", "fork"])
def test_the_reverse_map_finds_moved_pages(vm: Vmm, act: str) -> None:
    written(vm, 3)
    move(vm, 0, 3 * PAGE, AWAY)
    if act == "pageout":
        vm.host.sched.run_task("out", lambda: do_madvise(vm.mm, AWAY, 3 * PAGE, MADV_PAGEOUT))
        assert all(is_swap_pte(entry(vm, AWAY + page * PAGE)) for page in range(3))
    elif act == "migrate":
        old = [entry(vm, AWAY + page * PAGE) for page in range(3)]
        nodes = [1, 1, 1]
        vm.host.sched.run_task(
            "move", lambda: move_pages(vm.process, [AWAY + page * PAGE for page in range(3)], nodes)
        )
        assert all(entry(vm, AWAY + page * PAGE) != old[page] for page in range(3))
    else:
        exit_process(fork_process(vm.process))
    assert [read(vm, AWAY + page * PAGE) for page in range(3)] == [1, 2, 3]


def test_swap_entries_move_and_come_back_at_the_new_place(vm: Vmm) -> None:
    written(vm, 2)
    vm.host.sched.run_task("out", lambda: do_madvise(vm.mm, vm.base, 2 * PAGE, MADV_PAGEOUT))
    old = entry(vm, vm.base)
    move(vm, 0, 2 * PAGE, AWAY)
    assert is_swap_pte(entry(vm, AWAY))
    assert entry(vm, AWAY) & ~0x2 == old & ~0x2
    assert entry(vm, AWAY) & 0x2, "soft-dirty"
    assert [read(vm, AWAY + page * PAGE) for page in range(2)] == [1, 2]
    audit(vm.host)


def test_a_page_under_migration_moves_as_its_migration_entry(vm: Vmm) -> None:
    written(vm, 1)
    host = vm.host
    pfn = pte_pfn(entry(vm, vm.base))

    def act() -> None:
        assert host.lru.folio_isolate_lru(pfn)
        folio_lock(host, pfn)
        anon_vma = host.pages.mapping[pfn]
        assert try_to_migrate(host, pfn)
        move(vm, 0, PAGE, AWAY)
        assert not pte_present(entry(vm, AWAY))
        remove_migration_ptes(host, pfn, pfn, anon_vma)
        folio_unlock(host, pfn)
        host.lru.folio_putback_lru(pfn)

    host.sched.run_task("act", act)
    assert pte_pfn(entry(vm, AWAY)) == pfn
    assert read(vm, AWAY) == 1
    host.lru.lru_add_drain_all()
    audit(host)


def test_moved_entries_are_soft_dirty_and_the_vma_is_as_it_was(vm: Vmm) -> None:
    written(vm, 1)
    clear_refs_write(vm.mm, 4)
    vm.host_read(0)
    assert not entry(vm, vm.base) & _PAGE_SOFT_DIRTY
    move(vm, 0, PAGE, AWAY)
    assert entry(vm, AWAY) & _PAGE_SOFT_DIRTY
    moved = vm.mm.vma_lookup(AWAY)
    assert moved is not None
    assert not moved.flags & VM_SOFTDIRTY


# -- whole tables ---------------------------------------------------------------------------------
def test_whole_tables_are_hung_to_their_new_place(vm: Vmm) -> None:
    written(vm, 3)
    vm.mm.tlb_flush_pending = 0
    clear_refs_write(vm.mm, 4)
    table = vm.host.ram.u64[pmd_offset(vm.mm, vm.base) >> 3]
    move(vm, 0, M2, AWAY)
    assert vm.host.ram.u64[pmd_offset(vm.mm, AWAY) >> 3] == table
    assert not entry(vm, AWAY) & _PAGE_SOFT_DIRTY, "entries that move with their table are not touched"
    assert [read(vm, AWAY + page * PAGE) for page in range(3)] == [1, 2, 3]
    audit(vm.host)


def test_a_table_of_a_gigabyte_moves_as_one() -> None:
    vm = Vmm()
    do_mmap(vm.mm, AWAY, 2 * G1, RW, ANON | MAP_FIXED)
    for address in (AWAY, AWAY + G1 - PAGE, AWAY + G1, AWAY + 2 * G1 - PAGE):
        vm.host_write(address - vm.base, address & 0xFFFFFFFF)
    told: list[int] = []
    vm.host.pte_hooks.append(lambda mm, address, old, new: told.append(address))
    target = AWAY - 16 * G1
    do_mremap(vm.mm, AWAY, 2 * G1, 2 * G1, MOVE, target)
    assert len(told) == 8, "each entry is told once as cleared and once as set"
    for address in (AWAY, AWAY + G1 - PAGE, AWAY + G1, AWAY + 2 * G1 - PAGE):
        assert read(vm, address - AWAY + target) == address & 0xFFFFFFFF
    audit(vm.host)


def test_the_bracket_reaches_down_to_2m_where_the_tables_can_move_whole(vm: Vmm) -> None:
    at = AWAY + 0x5000
    do_mmap(vm.mm, at, M2, RW, ANON | MAP_FIXED)
    vm.host_write(at - vm.base, 5)
    vm.brackets()
    table = vm.host.ram.u64[pmd_offset(vm.mm, at) >> 3]
    do_mremap(vm.mm, at, M2, M2, MOVE, at + G1)
    first = next(bracket for bracket in vm.brackets() if bracket[0] == "unmap")
    assert (first[1] + vm.base, first[2] + vm.base) == (AWAY, at + M2)
    assert vm.host.ram.u64[pmd_offset(vm.mm, at + G1) >> 3] == table
    assert read(vm, at + G1) == 5


def test_a_neighbour_below_keeps_the_bracket_to_the_range(vm: Vmm) -> None:
    at = AWAY + 0x5000
    do_mmap(vm.mm, at, M2, RW, ANON | MAP_FIXED)
    do_mmap(vm.mm, at - 2 * PAGE, PAGE, RW, ANON | MAP_FIXED)
    vm.host_write(at - vm.base, 5)
    vm.brackets()
    do_mremap(vm.mm, at, M2, M2, MOVE, at + G1)
    first = next(bracket for bracket in vm.brackets() if bracket[0] == "unmap")
    assert first[1] + vm.base == at
    assert read(vm, at + G1) == 5


def test_without_memory_for_tables_everything_goes_back(
    vm: Vmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(vm, 4)
    at = vm.base + M2 - 2 * PAGE
    for page in range(4):
        vm.host_write(at + page * PAGE - vm.base, 10 + page)
    original, calls = host_mm.move_page_tables.pmd_alloc, 0

    def pmd_alloc(mm: object, address: int) -> int:
        nonlocal calls
        calls += 1
        return 0 if calls == 2 else original(mm, address)  # type: ignore[arg-type]

    monkeypatch.setattr(host_mm.move_page_tables, "pmd_alloc", pmd_alloc)
    with pytest.raises(KernelError, match="ENOMEM"):
        do_mremap(vm.mm, at, 4 * PAGE, 4 * PAGE, MOVE, AWAY)
    assert [read(vm, at + page * PAGE) for page in range(4)] == [10, 11, 12, 13]
    assert vm.mm.find_vma_intersection(AWAY, AWAY + 4 * PAGE) is None
    audit(vm.host)


# -- races ----------------------------------------------------------------------------------------
class _AfterTheMove(RandomStrategy):
    """Lets the migration go on at the first point after the locks of the moved entry are dropped."""

    def __init__(self, vm: Vmm, release: Callable[[], None]) -> None:
        super().__init__(0)
        self.vm = vm
        self.release = release
        self.released = self.switched = False

    def on_point(self, kind: str) -> None:
        sched = self.vm.host.sched
        moved = self.vm.mm.pgd and pte_present(entry(self.vm, AWAY))
        if moved and kind == "unlock" and not sched.current.no_preempt and not self.released:
            self.released = True
            self.release()

    def switch_here(self, kind: str) -> bool:
        moved = pte_present(entry(self.vm, AWAY))
        first = bool(moved) and kind == "unlock" and not self.switched
        self.switched |= first
        return first

    def pick(self, runnable: deque[Task]) -> Task:
        return runnable.popleft()


def migrate_beside_mremap(vm: Vmm) -> None:
    """A page whose migration waited for its lock is migrated in the moment after mremap moved it."""
    host = vm.host
    written(vm, 1)
    pfn = pte_pfn(entry(vm, vm.base))
    host.sched.run_task("hold", lambda: folio_lock(host, pfn))
    waiting = [False]

    def migrate() -> None:
        assert host.lru.folio_isolate_lru(pfn)
        waiting[0] = True
        assert migrate_pages(host, [pfn], 1, MR_SYSCALL, MIGRATE_SYNC) == 0

    def remap() -> None:
        host.sched.sleep(1_000_000)
        strategy = _AfterTheMove(vm, lambda: folio_unlock(host, pfn))
        host.sched.set_strategy(strategy)
        host.sched.set_on_point(strategy.on_point)
        move(vm, 0, PAGE, AWAY)
        host.sched.set_on_point(None)
        host.sched.set_strategy(None)
        assert strategy.switched

    run(host, migrate, remap)
    assert waiting[0]
    assert host.allocator.nid_of(pte_pfn(entry(vm, AWAY))) == 1
    assert read(vm, AWAY) == 1
    host.lru.lru_add_drain_all()
    audit(host)


def test_a_page_may_be_migrated_as_soon_as_it_was_moved(vm: Vmm) -> None:
    migrate_beside_mremap(vm)


def test_a_flush_after_the_locks_frees_a_frame_that_the_old_address_still_reaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What follows from it, if nobody tells at once.
    monkeypatch.setattr(HostTruths, "entries_moved", lambda *args: None)
    with pytest.raises(BrokenTruth, match="freed-frame-translated"):
        migrate_beside_mremap(Vmm(breaks=frozenset({BREAK})))
