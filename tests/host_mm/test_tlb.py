"""When the host's own translations go: before or after the bracket, and what a forgotten flush does.

(host_mm/tlb.py, mmu_gather.py, memory.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm import tlb
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.mmap import do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm
from trace_events.event import Event
from trace_events.stream import Listener

SHORT = {
    "refault:mmu_notifier_start": "start", "refault:mmu_notifier_end": "end",
    "refault:primary_flush": "flush", "refault:frame_free": "free",
}


def order(vm: Vmm, act: Callable[[], Any]) -> list[str]:
    """The brackets, flushes and frees of `act`, in order; repeats run together."""
    events: list[Event] = []
    listener = Listener(SHORT, events.append, ancestors=False)
    vm.host.stream.listen(listener)
    vm.host.sched.run_task("act", act)
    vm.host.stream.unlisten(listener)
    names = [SHORT[event.event] for event in events]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def written(vm: Vmm, pages: int = 1) -> None:
    """Populate the first pages through the VMM's own TLB."""
    for page in range(pages):
        vm.host_write(page * PAGE, page + 1)
    # A page in an LRU batch is held by it and would be freed later.
    vm.host.lru.lru_add_drain_all()


def test_a_cow_flushes_inside_its_bracket() -> None:
    vm = Vmm()
    written(vm)
    child = fork_process(vm.process)
    assert order(vm, lambda: vm.host_write(0, 2)) == ["start", "flush", "end"]
    exit_process(child)


def test_pageout_flushes_after_the_bracket() -> None:
    vm = Vmm()
    written(vm)
    seen = order(vm, lambda: do_madvise(vm.mm, vm.base, PAGE, MADV_PAGEOUT))
    assert seen[:3] == ["start", "end", "flush"]


def test_munmap_flushes_and_frees_after_its_bracket() -> None:
    vm = Vmm()
    written(vm, 3)
    assert order(vm, lambda: do_munmap(vm.mm, vm.base, 8 << 20)) == ["start", "end", "flush", "free"]


def test_a_full_gather_flushes_and_frees_inside_the_bracket() -> None:
    vm = Vmm(params={"mm.max_gather_pages": "2"})
    written(vm, 5)
    zap = order(vm, lambda: do_madvise(vm.mm, vm.base, 8 << 20, MADV_DONTNEED))
    assert zap == ["start", "flush", "free", "flush", "free", "end", "flush", "free"]


@pytest.mark.parametrize(
    "act",
    [
        lambda vm: fork_process(vm.process),
        lambda vm: do_mprotect(vm.mm, vm.base, 8 << 20, 1),
        lambda vm: clear_refs_write(vm.mm, 4),
    ],
    ids=["fork", "mprotect", "soft-dirty"],
)
def test_write_protection_is_flushed_after_its_last_bracket(act: Callable[[Vmm], Any]) -> None:
    vm = Vmm()
    written(vm, 2)
    seen = order(vm, lambda: act(vm))
    assert seen[-2:] == ["end", "flush"]
    assert seen.count("flush") == 1
    assert "free" not in seen


def test_two_gathers_at_once_flush_everything() -> None:
    vm = Vmm()
    written(vm)
    vm.mm.tlb_flush_pending += 1
    do_madvise(vm.mm, vm.base, PAGE, MADV_DONTNEED)
    vm.mm.tlb_flush_pending -= 1
    assert not vm.mm.tlb.entries
    audit(vm.host)


def test_only_a_dirty_entry_is_cached_as_writable() -> None:
    vm = Vmm()
    vm.guest_store(0, 1)
    assert vm.mm.tlb.lookup(vm.base, False) == -1
    vm.host_read(0)
    clear_refs_write(vm.mm, 4)
    vm.host_read(0)
    assert vm.mm.tlb.lookup(vm.base, False) >= 0
    assert vm.mm.tlb.lookup(vm.base, True) == -1
    vm.host_write(0, 2)
    assert vm.mm.tlb.lookup(vm.base, True) >= 0


@pytest.mark.parametrize("switch", ["no-primary-flush", "free-before-flush"])
def test_a_forgotten_flush_leaves_a_translation_to_a_freed_frame(switch: str) -> None:
    vm = Vmm(breaks=frozenset({switch}))
    written(vm)
    with pytest.raises(BrokenTruth, match="freed-frame-translated"):
        do_madvise(vm.mm, vm.base, PAGE, MADV_DONTNEED)


def test_without_primary_flush_the_vmm_reads_the_shared_page_after_its_cow() -> None:
    vm = Vmm(breaks=frozenset({"no-primary-flush"}), checks=False)
    written(vm)
    fork_process(vm.process)
    assert vm.host_read(0) == 1
    vm.guest_store(0, 5)
    assert vm.host_read(0) == 1, "the stale translation still reaches the old frame"


def _two_stores_race(breaks: frozenset[str], seed: int) -> bool:
    """Whether two threads that store into one shared page both keep what they stored."""
    vm = Vmm(breaks=breaks, checks=False)
    written(vm)
    fork_process(vm.process)
    host = vm.host
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    done: list[int] = []

    def store(word: int) -> None:
        vm.host_write(word * 8, 100 + word)
        done.append(word)

    for word in range(2):
        host.sched.spawn(f"t{word}", lambda word=word: store(word))
    host.sched.run_until(lambda: len(done) == 2)
    host.sched.set_strategy(None)
    return [vm.host_read(0), vm.host_read(8)] == [100, 101]


def test_a_cow_that_does_not_recheck_its_entry_loses_a_store() -> None:
    def survives(seed: int) -> bool:
        try:
            return _two_stores_race(frozenset({"no-fault-recheck"}), seed)
        except BrokenTruth:
            return False

    assert not all(survives(seed) for seed in range(40))


def test_a_cow_that_rechecks_its_entry_loses_nothing() -> None:
    assert all(_two_stores_race(frozenset(), seed) for seed in range(40))


def test_a_cow_that_flushes_late_lets_another_thread_write_the_old_page() -> None:
    vm = Vmm(breaks=frozenset({"cow-flush-after-unlock"}), checks=False)
    written(vm)
    seen: list[bool] = []
    child = fork_process(vm.process)
    vm.host_read(0)
    stale = vm.mm.tlb.lookup(vm.base, False)
    vm.host.pte_hooks.append(
        lambda mm, address, old, new: seen.append(bool(new) and mm.tlb.lookup(address, False) == stale)
    )
    vm.host_write(0, 2)
    assert seen == [True], "the new entry is set while the old translation is still cached"
    exit_process(child)


def test_a_cow_that_flushes_late_breaks_a_truth() -> None:
    vm = Vmm(breaks=frozenset({"cow-flush-after-unlock"}))
    written(vm)
    fork_process(vm.process)
    vm.host_read(0)
    with pytest.raises(BrokenTruth, match="flush-before-set"):
        vm.host_write(0, 2)


class SecondaryTlb(mn.MmuNotifier):
    """A device that walks the CPU's tables: told of the primary flushes."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.hook: Callable[[], None] = lambda: None

    def arch_invalidate_secondary_tlbs(self, mm: Any, start: int, end: int) -> None:
        self.told.append((start, end))
        self.hook()


def test_secondary_tlbs_hear_the_range_asked_for_and_of_a_batched_flush_once() -> None:
    vm = Vmm()
    device = SecondaryTlb()
    assert mmu_notifier_register(device, vm.mm) == 0
    written(vm, 64)
    vm.host.sched.run_task("act", lambda: do_madvise(vm.mm, vm.base, 64 * PAGE, MADV_DONTNEED))
    assert device.told == [(vm.base, vm.base + 64 * PAGE)]
    written(vm)
    device.told.clear()
    vm.host.sched.run_task("act", lambda: do_madvise(vm.mm, vm.base, PAGE, MADV_PAGEOUT))
    assert device.told == [(0, (1 << 64) - 1)]


def test_a_flush_that_is_noted_while_the_pending_one_runs_stays_pending() -> None:
    vm = Vmm()
    device = SecondaryTlb()
    assert mmu_notifier_register(device, vm.mm) == 0

    def body() -> None:
        tlb.set_tlb_ubc_flush_pending(vm.mm, False)

        def another_cpu_unmaps() -> None:
            device.hook = lambda: None
            tlb.set_tlb_ubc_flush_pending(vm.mm, False)

        device.hook = another_cpu_unmaps
        tlb.flush_tlb_batched_pending(vm.mm)
        assert vm.mm.tlb_flush_batched
        tlb.flush_tlb_batched_pending(vm.mm)
        assert not vm.mm.tlb_flush_batched
        tlb.try_to_unmap_flush(vm.host)

    vm.host.sched.run_task("act", body)
