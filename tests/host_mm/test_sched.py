"""Tasks, the clock and wait queues (host_mm/kernel/sched.py)."""

from __future__ import annotations

from itertools import pairwise

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Spinlock
from host_mm.kernel.sched import RandomStrategy, Scheduler, WaitQueue
from trace_events.stream import TraceStream


@pytest.fixture
def sched() -> Scheduler:
    return Scheduler(TraceStream())


def test_a_task_runs_to_its_block_and_others_go_on(sched: Scheduler) -> None:
    log: list[str] = []
    queue = WaitQueue(sched, "q")

    def waits() -> None:
        log.append("waits")
        queue.wait()
        log.append("woken")

    def wakes() -> None:
        log.append("wakes")
        queue.wake_all()
        log.append("wakes on")

    sched.spawn("a", waits)
    sched.spawn("b", wakes)
    sched.run_until(lambda: len(log) == 4)
    assert log == ["waits", "wakes", "wakes on", "woken"]


def test_wait_event_looks_again_after_a_wake_up_for_nothing(sched: Scheduler) -> None:
    queue, ready, log = WaitQueue(sched, "q"), [], []

    def waiter() -> None:
        queue.wait_event(lambda: bool(ready))
        log.append("done")

    sched.spawn("waiter", waiter)
    sched.run_task("early", queue.wake_all)
    assert not log
    ready.append(1)
    sched.run_task("late", queue.wake_all)
    sched.run_until(lambda: bool(log))


def test_time_jumps_to_the_next_timer_only_when_nobody_can_run(sched: Scheduler) -> None:
    times: list[int] = []

    def sleeper(ns: int) -> None:
        sched.sleep(ns)
        times.append(sched.now)

    sched.spawn("long", lambda: sleeper(1000))
    sched.spawn("short", lambda: sleeper(10))
    sched.spawn("busy", lambda: sched.advance(300))
    sched.run_until(lambda: len(times) == 2)
    assert times == [300, 1000]


def test_timers_of_the_same_moment_fire_in_the_order_they_were_set(sched: Scheduler) -> None:
    log: list[int] = []
    for n in range(4):
        sched.after(5, lambda n=n: log.append(n))
    sched.advance(5)
    assert log == [0, 1, 2, 3]
    assert sched.next_timer() is None


def test_a_deadlock_names_who_waits_for_what(sched: Scheduler) -> None:
    sched.spawn("stuck", WaitQueue(sched, "the_queue").wait)
    with pytest.raises(BrokenTruth, match="stuck on the_queue"):
        sched.run_until(lambda: False)


def test_sleeping_in_atomic_context_is_a_broken_truth(sched: Scheduler) -> None:
    def body() -> None:
        with Spinlock(sched, "ptl"):
            sched.sleep(1)

    with pytest.raises(BrokenTruth, match="atomic"):
        sched.run_task("t", body)


def test_what_a_task_raises_reaches_who_ran_it(sched: Scheduler) -> None:
    with pytest.raises(ZeroDivisionError):
        sched.run_task("t", lambda: 1 // 0)
    assert sched.run_task("t", lambda: 7) == 7


def test_a_task_inherits_the_cause_of_who_spawned_it(sched: Scheduler) -> None:
    seen: list[int | None] = []
    sched.stream.ctx.cause = 42
    sched.run_task("t", lambda: seen.append(sched.stream.ctx.cause))
    assert seen == [42]


def interleaving(seed: int, kind: str, *, locked: bool = False) -> str:
    sched = Scheduler(TraceStream())
    sched.set_strategy(RandomStrategy(seed, period=2))
    log: list[str] = []

    def body(name: str) -> None:
        lock = Spinlock(sched, name)
        for _ in range(6):
            if locked:
                lock.lock()
            getattr(sched, kind)("here")
            log.append(name)
            if locked:
                sched.preempt = False
                lock.unlock()
                sched.preempt = True

    tasks = [sched.spawn(name, lambda name=name: body(name)) for name in "ab"]
    sched.run_until(lambda: all(task.done for task in tasks))
    return "".join(log)


def test_a_seed_decides_the_interleaving() -> None:
    runs = [interleaving(seed, "point") for seed in range(6)]
    assert runs == [interleaving(seed, "point") for seed in range(6)]
    assert len(set(runs)) > 2


def test_run_to_block_switches_at_no_point(sched: Scheduler) -> None:
    log: list[str] = []

    def body(name: str) -> None:
        for _ in range(3):
            sched.point("here")
            log.append(name)

    tasks = [sched.spawn(name, lambda name=name: body(name)) for name in "ab"]
    sched.run_until(lambda: all(task.done for task in tasks))
    assert "".join(log) == "aaabbb"


def test_a_race_may_switch_where_a_point_may_not() -> None:
    def switches(kind: str) -> set[int]:
        runs = [interleaving(seed, kind, locked=True) for seed in range(6)]
        return {sum(a != b for a, b in pairwise(run)) for run in runs}

    assert max(switches("race")) > max(switches("point"))


def test_close_ends_tasks_where_they_stand(sched: Scheduler) -> None:
    log: list[str] = []

    def body() -> None:
        try:
            WaitQueue(sched, "never").wait()
        finally:
            log.append("unwound")

    sched.spawn("t", body)
    sched.run_task("other", lambda: None)
    sched.close()
    assert log == ["unwound"]
    assert not sched.tasks
