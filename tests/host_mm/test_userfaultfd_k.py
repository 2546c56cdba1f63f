"""Faults that wait for a user task, and what every kind of fault is told when it may not wait."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_NOWAIT, FOLL_WRITE, get_user_page_fast_only, get_user_pages_unlocked
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_POPULATE_READ, do_madvise
from host_mm.memory import handle_mm_fault
from host_mm.mm_types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_RETRY_NOWAIT,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_UFFD_FLAGS,
)
from host_mm.mmu_notifier_register import mmu_notifier_unregister
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.page import put_page
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user
from host_mm.userfaultfd import (
    MODE_DONTWAKE,
    userfaultfd_copy,
    userfaultfd_release,
    userfaultfd_unregister,
    userfaultfd_wake,
    userfaultfd_zeropage,
)
from host_mm.userfaultfd_k import (
    UFFD_FEATURE_EXACT_ADDRESS,
    UFFD_FEATURE_SIGBUS,
    UFFD_PAGEFAULT_FLAG_WRITE,
    userfaultfd_ctx_read,
)
from tests.host_mm.machine import PAGE, SLOT
from tests.host_mm.uffd_machine import UffdVmm, errno_of

AB = int.from_bytes(b"\xab" * 8, "little")


def test_a_fault_sleeps_until_its_page_is_copied_in_and_is_tried_again() -> None:
    vm = UffdVmm()
    vm.serve(vm.copy)
    assert vm.task(lambda: vm.guest_load(0x3000)) == AB
    vm.task(lambda: vm.guest_store(0x4000, 2))
    assert vm.log == [(0x3000, 0), (0x4000, UFFD_PAGEFAULT_FLAG_WRITE)]
    assert vm.task(lambda: vm.host_read(0x4000)) == 2
    assert vm.brackets() == [], "nothing was mapped, so nobody is told"
    vm.close()


def test_the_waiting_task_holds_no_lock_and_others_fault_meanwhile() -> None:
    vm = UffdVmm()
    sched = vm.host.sched
    waiter = sched.spawn("waiter", lambda: vm.guest_load(0x3000))
    sched.run_until(lambda: bool(vm.ctx.fault_pending))
    assert waiter.blocked_on == "userfault"
    assert not vm.mm.mmap_lock.readers
    vm.task(lambda: userfaultfd_zeropage(vm.ctx, vm.base + 0x5000, PAGE))
    assert vm.task(lambda: vm.guest_load(0x5000)) == 0
    assert not waiter.done
    vm.task(lambda: vm.copy(userfaultfd_ctx_read(vm.ctx)))
    sched.run_until(lambda: waiter.done)
    assert waiter.result == AB
    vm.close()


def test_who_must_not_wait_is_told_to_retry_and_nobody_hears_of_it() -> None:
    vm = UffdVmm()
    at = vm.base + 0x3000
    assert get_user_page_fast_only(vm.mm, at, FOLL_WRITE) == -1
    assert get_user_pages_unlocked(vm.mm, at, FOLL_WRITE | FOLL_NOWAIT) == -11
    assert not vm.ctx.fault_pending
    vm.mm.mmap_lock.read_lock()
    vma = vm.mm.vma_lookup(at)
    assert vma is not None
    nowait = FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_RETRY_NOWAIT
    assert handle_mm_fault(vma, at, nowait) == VM_FAULT_RETRY
    assert vm.mm.mmap_lock.readers, "the lock stays held"
    assert handle_mm_fault(vma, at, 0) == VM_FAULT_SIGBUS
    vm.mm.mmap_lock.read_unlock()
    vm.close()


def test_sigbus_mode_queues_nothing() -> None:
    vm = UffdVmm(features=UFFD_FEATURE_SIGBUS)
    assert errno_of(lambda: copy_from_user(vm.process, vm.base, 1)) == "EFAULT"
    assert get_user_pages_unlocked(vm.mm, vm.base, 0) == -14
    assert not vm.ctx.fault_pending
    vm.close()


def test_messages_come_oldest_first_and_each_once() -> None:
    vm = UffdVmm()
    sched = vm.host.sched
    tasks = [sched.spawn(f"w{n}", lambda n=n: vm.guest_load(n * PAGE)) for n in (3, 1, 2)]
    sched.run_until(lambda: len(vm.ctx.fault_pending) == 3)
    assert [userfaultfd_ctx_read(vm.ctx).address - vm.base for _ in range(3)] == [3 * PAGE, PAGE, 2 * PAGE]
    with pytest.raises(KernelError, match="EAGAIN"):
        userfaultfd_ctx_read(vm.ctx)
    vm.task(lambda: userfaultfd_zeropage(vm.ctx, vm.base, 4 * PAGE))
    sched.run_until(lambda: all(task.done for task in tasks))
    vm.close()


def test_the_exact_address_is_told_only_when_asked_for() -> None:
    for features, expected in ((0, 0x3000), (UFFD_FEATURE_EXACT_ADDRESS, 0x3018)):
        vm = UffdVmm(features=features)
        vm.serve(vm.copy)
        vm.task(lambda vm=vm: copy_from_user(vm.process, vm.base + 0x3018, 1))
        assert vm.log == [(expected, 0)]
        vm.close()


def test_wake_without_a_page_makes_the_fault_ask_again() -> None:
    vm = UffdVmm()
    sched = vm.host.sched
    waiter = sched.spawn("waiter", lambda: vm.guest_load(0x3000))
    for _ in range(3):
        sched.run_until(lambda: bool(vm.ctx.fault_pending))
        userfaultfd_ctx_read(vm.ctx)
        vm.task(lambda: userfaultfd_wake(vm.ctx, vm.base + 0x3000, PAGE))
    sched.run_until(lambda: bool(vm.ctx.fault_pending))
    vm.task(lambda: userfaultfd_copy(vm.ctx, vm.base + 0x3000, vm.source, PAGE, MODE_DONTWAKE))
    assert not waiter.done, "told not to wake"
    vm.task(lambda: userfaultfd_wake(vm.ctx, vm.base, SLOT))
    sched.run_until(lambda: waiter.done)
    vm.close()


def test_a_page_that_came_before_the_fault_sleeps_is_not_waited_for() -> None:
    for seed in range(40):
        vm = UffdVmm()
        vm.host.sched.set_strategy(RandomStrategy(seed, 2))
        sched = vm.host.sched
        done = [
            sched.spawn("guest", lambda vm=vm: vm.guest_load(0x3000)),
            sched.spawn("push", lambda vm=vm: userfaultfd_copy(vm.ctx, vm.base + 0x3000, vm.source, PAGE)),
        ]
        sched.run_until(lambda done=done: all(task.done for task in done))
        assert done[0].result == AB
        vm.host.sched.set_strategy(None)
        vm.close()


def test_closing_wakes_everybody_and_faults_go_the_usual_way() -> None:
    vm = UffdVmm()
    sched = vm.host.sched
    tasks = [sched.spawn(f"w{n}", lambda n=n: vm.guest_load(n * PAGE)) for n in range(3)]
    sched.run_until(lambda: len(vm.ctx.fault_pending) == 3)
    userfaultfd_ctx_read(vm.ctx)
    vm.close()
    sched.run_until(lambda: all(task.done for task in tasks))
    assert [task.result for task in tasks] == [0, 0, 0]
    assert not any(vma.flags & VM_UFFD_FLAGS for vma in vm.mm.vmas)
    assert len(vm.mm.vmas_in(vm.base, vm.base + SLOT)) == 1


def test_unregistering_wakes_the_waiters_of_its_range() -> None:
    vm = UffdVmm()
    sched = vm.host.sched
    waiter = sched.spawn("waiter", lambda: vm.guest_load(0x3000))
    sched.run_until(lambda: bool(vm.ctx.fault_pending))
    vm.task(lambda: userfaultfd_unregister(vm.ctx, vm.base, 16 * PAGE))
    sched.run_until(lambda: waiter.done)
    assert waiter.result == 0
    vm.close()


def test_a_child_is_not_registered() -> None:
    vm = UffdVmm()
    vm.serve(vm.copy)
    vm.task(lambda: vm.guest_load(0x3000))
    child = vm.task(lambda: fork_process(vm.process))
    assert vm.task(lambda: copy_from_user(child, vm.base + 0x3000, 1)) == b"\xab"
    assert vm.task(lambda: copy_from_user(child, vm.base + 0x4000, 1)) == b"\0"
    assert vm.log == [(0x3000, 0)]
    vm.task(lambda: exit_process(child))
    vm.close()


def test_a_mapping_that_moves_loses_its_registration() -> None:
    vm = UffdVmm()
    vm.serve(vm.copy)
    vm.task(lambda: vm.guest_load(0x3000))
    away = 0x7FF000000000
    vm.task(lambda: do_mremap(vm.mm, vm.base, SLOT, SLOT, MREMAP_MAYMOVE | MREMAP_FIXED, away))
    assert vm.task(lambda: copy_from_user(vm.process, away + 0x3000, 1)) == b"\xab"
    assert vm.task(lambda: copy_from_user(vm.process, away + 0x4000, 1)) == b"\0"
    assert vm.log == [(0x3000, 0)]
    vm.close()


def test_dropped_pages_are_missing_again() -> None:
    vm = UffdVmm()
    vm.serve(vm.copy)
    vm.task(lambda: vm.guest_store(0x3000, 7))
    vm.task(lambda: do_madvise(vm.mm, vm.base + 0x3000, PAGE, MADV_DONTNEED))
    assert vm.brackets() == [("clear", 0x3000, 0x4000)]
    assert vm.task(lambda: vm.guest_load(0x3000)) == AB
    assert len(vm.log) == 2
    vm.close()


def test_populating_a_registered_range_asks_for_each_page() -> None:
    vm = UffdVmm()
    vm.serve(vm.copy)
    vm.task(lambda: do_madvise(vm.mm, vm.base, 3 * PAGE, MADV_POPULATE_READ))
    assert vm.log == [(n * PAGE, 0) for n in range(3)]
    vm.close()


def test_a_process_may_end_before_its_userfaultfd_is_closed() -> None:
    vm = UffdVmm()
    vm.serve(vm.copy)
    vm.task(lambda: vm.guest_load(0x3000))
    vm.task(lambda: exit_process(vm.process))
    assert errno_of(lambda: userfaultfd_copy(vm.ctx, vm.base, vm.source, PAGE)) == "ESRCH"
    mmu_notifier_unregister(vm.notifier, vm.mm)
    assert vm.mm in vm.host.mms
    vm.task(lambda: userfaultfd_release(vm.ctx))
    vm.stop()
    vm.task(vm.host.quiesce)
    audit(vm.host)
    assert vm.mm not in vm.host.mms


def test_a_read_reference_of_a_page_being_resolved_is_the_resolved_page() -> None:
    vm = UffdVmm()
    vm.serve(vm.copy)
    pfn = vm.task(lambda: get_user_pages_unlocked(vm.mm, vm.base, FOLL_WRITE))
    assert vm.host.ram.read(pfn << 12, 4) == b"\xab" * 4
    put_page(vm.host, pfn)
    vm.close()
