"""Scans that take rights away, and the faults that give them back or move the page."""

from __future__ import annotations

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import pte_pfn, pte_protnone, pte_write, walk_lockless
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_HONOR_NUMA_FAULT, FOLL_LONGTERM, FOLL_WRITE, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.sched import RandomStrategy
from host_mm.mempolicy import MPOL_PREFERRED, do_mbind
from host_mm.migrate import move_pages
from host_mm.mprotect import do_mprotect
from host_mm.numa_balancing import NumaBalancing, task_numa_scan
from host_mm.page import put_page
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user
from tests.host_mm.machine import PAGE, SLOT, Vmm, run
from tests.host_mm.test_order_classes import BASE, record


class NumaVmm(Vmm):
    """A process of two threads, at home on node 0."""

    def __init__(self) -> None:
        super().__init__()
        self.process.threads = 2

    def scan(self, pages: int = 1, offset: int = 0) -> int:
        at = self.base + offset
        return int(self.on(0, lambda: task_numa_scan(self.process, at, at + pages * PAGE)))

    def on(self, node: int, body):  # type: ignore[no-untyped-def]
        """Run `body` in a thread on `node`."""
        task = self.host.sched.spawn(f"thread on {node}", body)
        task.node = node
        self.host.sched.run_until(lambda: task.done)
        if task.error is not None:
            raise task.error
        return task.result

    def entry(self, offset: int = 0) -> int:
        return walk_lockless(self.host.ram, self.mm.pgd, self.base + offset)[0]

    def node(self, offset: int = 0) -> int:
        return self.host.allocator.nid_of(pte_pfn(self.entry(offset)))

    def drained(self) -> None:
        self.host.lru.lru_add_drain_all()


def test_the_order_is_start_protect_end_flush() -> None:
    def two_threads(process: Process) -> None:
        process.threads = 2

    seen = record(lambda p: task_numa_scan(p, BASE, BASE + 2 * PAGE), pages=2, prepare=two_threads)
    assert seen.log == ["start", "clear", "set", "clear", "set", "end", "flush"]
    (only,) = seen.ranges
    assert (only[0], only[3]) == (mn.MMU_NOTIFY_PROTECTION_VMA, mn.ORDER_AFTER_END)


def test_a_fault_on_the_pages_own_node_gives_the_rights_back_and_tells_nobody() -> None:
    vm = NumaVmm()
    vm.guest_store(0, 7)
    pfn = pte_pfn(vm.entry())
    assert vm.scan() == 1
    assert pte_protnone(vm.entry())
    assert pte_pfn(vm.entry()) == pfn
    assert vm.brackets() == [("protection-vma", 0, PAGE)]
    assert vm.on(0, lambda: vm.host_read(0)) == 7
    assert pte_write(vm.entry())
    assert vm.brackets() == []
    assert vm.host.vmstat["numa_hint_faults_local"] == 1
    vm.drained()
    audit(vm.host)


def test_a_fault_on_another_node_moves_the_page_there_in_a_bracket() -> None:
    vm = NumaVmm()
    vm.guest_store(0, 7)
    vm.drained()
    vm.scan()
    vm.brackets()
    assert vm.on(1, lambda: vm.host_read(0)) == 7
    assert vm.node() == 1
    assert vm.brackets() == [("clear", 0, PAGE)]
    assert vm.host.vmstat["numa_pages_migrated"] == 1
    assert vm.on(0, lambda: vm.host_read(0)) == 7
    assert vm.node() == 1, "without another hinting fault it stays"
    vm.drained()
    audit(vm.host)


def test_pages_are_allocated_where_the_thread_runs() -> None:
    vm = NumaVmm()
    vm.on(1, lambda: vm.guest_store(0, 1))
    vm.on(0, lambda: vm.guest_store(PAGE, 1))
    assert (vm.node(0), vm.node(PAGE)) == (1, 0)


def test_only_who_honours_hinting_faults_makes_them() -> None:
    vm = NumaVmm()
    vm.guest_store(0, 1)
    vm.drained()
    vm.scan()
    pfn = vm.on(1, lambda: get_user_pages_unlocked(vm.mm, vm.base, 0))
    assert pte_protnone(vm.entry()), "it got the page all the same"
    put_page(vm.host, pfn)
    # A page in an LRU batch could not be isolated.
    vm.drained()
    pfn = vm.on(1, lambda: get_user_pages_unlocked(vm.mm, vm.base, FOLL_HONOR_NUMA_FAULT))
    assert not pte_protnone(vm.entry())
    assert vm.host.allocator.nid_of(pfn) == 1
    put_page(vm.host, pfn)


def test_what_a_scan_leaves_alone() -> None:
    vm = NumaVmm()
    vm.guest_load(0)
    vm.guest_store(PAGE, 1)
    vm.guest_store(2 * PAGE, 1)
    vm.guest_store(3 * PAGE, 1)
    pfn = pin_user_page(vm.mm, vm.base + PAGE, FOLL_WRITE | FOLL_LONGTERM)
    do_mprotect(vm.mm, vm.base + 2 * PAGE, PAGE, 0)
    do_mbind(vm.process, vm.base + 3 * PAGE, PAGE, MPOL_PREFERRED, 1)
    assert vm.scan(5) == 0, "zero page, pinned page, PROT_NONE mapping, policy, hole"
    unpin_user_page(vm.host, pfn)
    assert vm.scan(5) == 1
    assert vm.scan(5) == 0, "it is marked already"
    child = fork_process(vm.process)
    vm.on(0, lambda: vm.guest_load(PAGE))
    assert vm.scan(5) == 0, "shared with the child"
    exit_process(child)


def test_pages_of_a_single_thread_on_its_own_node_are_left_alone() -> None:
    vm = NumaVmm()
    vm.process.threads = 1
    vm.guest_store(0, 1)
    assert vm.scan() == 0
    vm.drained()
    vm.host.sched.run_task("t", lambda: move_pages(vm.process, [vm.base], [1]))
    assert vm.scan() == 1
    assert vm.on(0, lambda: vm.host_read(0)) == 1
    assert vm.node() == 0


def test_a_node_that_is_nearly_full_gets_no_pages() -> None:
    vm = NumaVmm()
    vm.guest_store(0, 7)
    vm.drained()
    zone = vm.host.nodes[1].zone
    zone.wmark_high = zone.nr_free
    vm.scan()
    assert vm.on(1, lambda: vm.host_read(0)) == 7
    assert vm.node() == 0
    assert not pte_protnone(vm.entry())


def test_a_page_that_cannot_move_now_stays_readable_and_its_next_write_asks_again() -> None:
    vm = NumaVmm()
    vm.guest_store(0, 7)
    vm.drained()
    vm.scan()
    pfn = pte_pfn(vm.entry())
    vm.host.pages.refcount[pfn] += 1
    vm.host.held[pfn] += 1
    assert vm.on(1, lambda: vm.host_read(0)) == 7
    assert (vm.node(), pte_write(vm.entry())) == (0, False)
    vm.host.held[pfn] -= 1
    put_page(vm.host, pfn)
    vm.on(1, lambda: vm.guest_store(0, 8))
    assert vm.host_read(0) == 8


def test_an_mprotect_range_with_hinting_entries_gets_its_rights() -> None:
    vm = NumaVmm()
    vm.guest_store(0, 7)
    vm.scan()
    do_mprotect(vm.mm, vm.base, PAGE, 1)
    assert not pte_protnone(vm.entry())
    assert copy_from_user(vm.process, vm.base, 1) == b"\x07"


def test_a_thread_scans_a_part_at_a_time_and_not_too_often() -> None:
    vm = NumaVmm()
    balancing = NumaBalancing(
        {"kernel.numa_balancing_scan_period_min_ms": "10", "kernel.numa_balancing_scan_size_mb": "4"}
    )
    offsets = (0, 3 << 20, 5 << 20)
    for offset in offsets:
        vm.guest_store(offset, 1)
    vm.brackets()
    marked = []
    for _ in range(4):
        balancing.task_work(vm.process)
        balancing.task_work(vm.process)
        marked.append([pte_protnone(vm.entry(offset)) for offset in offsets])
        vm.host.sched.advance(10_000_000)
    assert marked[0] == [False] * 3, "the first scan comes a period after the start"
    assert marked[1] == [True, True, False]
    assert marked[2][2]
    assert all(name == "protection-vma" for name, *_ in vm.brackets())


@pytest.mark.parametrize("seed", range(30))
def test_threads_on_two_nodes_read_what_they_wrote(seed: int) -> None:
    vm = NumaVmm()
    vm.host.sched.lockdep = {}
    pages = 6
    for page in range(pages):
        vm.guest_store(page * PAGE, 0)
    vm.drained()
    vm.host.sched.set_strategy(RandomStrategy(seed, 3))
    done: list[int] = []

    def thread(number: int) -> None:
        vm.host.sched.current.node = number
        for step in range(20):
            for page in range(pages):
                vm.host_write(page * PAGE + 8 * number, step)
                assert vm.host_read(page * PAGE + 8 * number) == step
            vm.host.sched.sleep(1000)
        done.append(number)

    def scanner() -> None:
        while len(done) < 2:
            task_numa_scan(vm.process, vm.base, vm.base + SLOT)
            vm.host.sched.sleep(2000)

    run(vm.host, lambda: thread(0), lambda: thread(1), scanner)
    vm.host.sched.set_strategy(None)
    assert vm.host.vmstat["numa_pages_migrated"]
    vm.host.sched.run_task("rest", vm.host.quiesce)
    audit(vm.host)
