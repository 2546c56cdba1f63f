"""Who dies, and how the reaper takes its memory: brackets that may not sleep, -EAGAIN, retries."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError, OutOfMemory
from host_mm.mm_types import MM_ANONPAGES, MMF_OOM_SKIP, MMF_UNSTABLE
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.oom_kill import (
    MAX_OOM_REAP_RETRIES,
    OOM_REAPER_DELAY,
    OOM_SCORE_ADJ_MIN,
    oom_badness,
    oom_kill_process,
    oom_reap_task_mm,
    out_of_memory,
)
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, Vmm, do_mmap, run
from trace_events.stream import Listener


class Refusing(mn.MmuNotifier):
    """Says -EAGAIN to the first `times` starts at 0x50000000 that may not sleep; writes everything down."""

    invalidate_range_end = None

    def __init__(self, log: list[tuple[Any, ...]], times: int) -> None:
        self.log, self.times = log, times

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        blockable = mn.mmu_notifier_range_blockable(range_)
        self.log.append(("refusing", range_.start, range_.end, blockable))
        if not blockable and self.times and range_.start == 0x50000000:
            self.times -= 1
            return -11
        return 0


def child_of(vmm: Vmm, pages: int = 8) -> Process:
    """A forked child with two areas of its own."""
    child = fork_process(vmm.process)
    for base in (0x40000000, 0x50000000):
        do_mmap(child.mm, base, pages * PAGE, RW, ANON | 0x10)
        for page in range(pages):
            copy_to_user(child, base + page * PAGE, b"c")
    vmm.host.lru.lru_add_drain_all()
    return child


def machine() -> tuple[Vmm, Process]:
    vmm = Vmm()
    made: list[Process] = []
    run(vmm.host, lambda: made.append(child_of(vmm)))
    return vmm, made[0]


def test_the_reaper_unmaps_from_the_top_each_area_in_a_bracket_that_may_not_sleep() -> None:
    vmm, child = machine()
    log: list[tuple[Any, ...]] = []
    mmu_notifier_register(Refusing(log, 0), child.mm)
    run(vmm.host, lambda: oom_reap_task_mm(child))
    areas = [("refusing", vma.start, vma.end, False) for vma in reversed(child.mm.vmas)]
    assert log == areas
    assert child.mm.rss[MM_ANONPAGES] == 0
    assert child.mm.flags & MMF_UNSTABLE
    run(vmm.host, lambda: exit_process(child))
    run(vmm.host, vmm.host.quiesce)
    audit(vmm.host)


def test_inside_the_bracket_entries_go_first_then_end_then_flush_and_free() -> None:
    vmm, child = machine()
    order: list[str] = []

    class Watch(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            order.append("start")
            return 0

        def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
            order.append("end")

    mmu_notifier_register(Watch(), child.mm)
    vmm.host.pte_hooks.append(lambda mm, *_: order.append("clear") if mm is child.mm else None)
    names = {"primary_flush": "flush", "frame_free": "free"}
    vmm.host.stream.listen(Listener(
        [f"refault:{name}" for name in names], lambda event: order.append(names[event.name]), ancestors=False,
    ))
    child.mm.vmas[:] = [vma for vma in child.mm.vmas if vma.start == 0x40000000]
    run(vmm.host, lambda: oom_reap_task_mm(child))
    assert order[:10] == ["start", *["clear"] * 8, "end"]
    assert order[10] == "flush"
    assert order[11:] == ["free"] * 8


def test_an_area_whose_notifier_refuses_is_left_out_without_an_end_and_tried_again() -> None:
    vmm, child = machine()
    log: list[tuple[Any, ...]] = []
    mmu_notifier_register(Refusing(log, 1), child.mm)
    answers: list[bool] = []
    run(vmm.host, lambda: answers.append(oom_reap_task_mm(child)))
    assert answers == [False]
    assert child.mm.rss[MM_ANONPAGES] == 8, "only what was refused is left"
    log.clear()
    run(vmm.host, lambda: answers.append(oom_reap_task_mm(child)))
    assert answers == [False, True]
    assert ("refusing", 0x50000000, 0x50000000 + 8 * PAGE, False) in log
    assert child.mm.rss[MM_ANONPAGES] == 0


def test_the_killer_waits_two_seconds_and_then_for_the_reaper() -> None:
    vmm, child = machine()
    host = vmm.host
    child.oom_score_adj = 900
    begin = host.sched.now
    answers: list[bool] = []
    run(host, lambda: answers.append(out_of_memory(host, 0)))
    assert answers == [True]
    assert OOM_REAPER_DELAY <= host.sched.now - begin < OOM_REAPER_DELAY + 10_000_000
    assert child.mm.flags & MMF_OOM_SKIP
    assert host.oom_victims == set()
    with pytest.raises(KernelError):
        run(host, lambda: copy_from_user(child, 0x40000000, 1))
    assert oom_badness(child, 1000) is None, "it does not die twice"
    run(host, lambda: exit_process(child))
    run(host, host.quiesce)
    audit(host)


def test_a_victim_whose_address_space_is_being_changed_is_given_up_after_ten_tries() -> None:
    vmm, child = machine()
    host = vmm.host
    tries: list[str] = []
    host.stream.listen(Listener(["oom:*"], lambda event: tries.append(event.name), ancestors=False))

    def body() -> None:
        child.mm.mmap_lock.lock()
        oom_kill_process(child, 100, 0)
        host.oom_wait.wait_event(lambda: not host.oom_victims)
        child.mm.mmap_lock.unlock()

    run(host, body)
    assert tries == ["mark_victim", "wake_reaper", *["skip_task_reaping"] * MAX_OOM_REAP_RETRIES]
    assert child.mm.flags & MMF_OOM_SKIP
    assert child.mm.rss[MM_ANONPAGES] > 0


def test_two_who_run_out_wait_for_the_same_victim() -> None:
    vmm, child = machine()
    host = vmm.host
    child.oom_score_adj = 900
    answers: list[bool] = []
    run(host, *[lambda: answers.append(out_of_memory(host, 0))] * 2)
    assert answers == [True, True]
    assert host.vmstat["oom_kill"] == 1


def test_a_victim_that_exits_meanwhile_is_not_reaped_and_its_address_space_not_leaked() -> None:
    vmm, child = machine()
    host = vmm.host

    def body() -> None:
        oom_kill_process(child, 100, 0)
        exit_process(child)
        assert child.mm in host.mms
        host.oom_wait.wait_event(lambda: not host.oom_victims)
        assert child.mm not in host.mms

    run(host, body)
    run(host, host.quiesce)
    audit(host)


def test_who_may_not_be_killed_is_not_and_the_machines_own_process_ends_it() -> None:
    vmm, child = machine()
    child.oom_score_adj = OOM_SCORE_ADJ_MIN
    assert oom_badness(child, 1000) is None
    with pytest.raises(OutOfMemory, match="Killed process 1"):
        run(vmm.host, lambda: out_of_memory(vmm.host, 0))
    vmm.process.oom_score_adj = OOM_SCORE_ADJ_MIN
    answers: list[bool] = []
    run(vmm.host, lambda: answers.append(out_of_memory(vmm.host, 0)))
    assert answers == [False]
