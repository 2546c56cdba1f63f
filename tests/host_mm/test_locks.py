"""The kernel's locks (host_mm/kernel/locks.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Mutex, RwLock, RwSem, Spinlock, Srcu
from host_mm.kernel.sched import Scheduler
from trace_events.stream import TraceStream


@pytest.fixture
def sched() -> Scheduler:
    sched = Scheduler(TraceStream())
    sched.lockdep = {}
    return sched


def together(sched: Scheduler, *bodies: Callable[[], None]) -> None:
    tasks = [sched.spawn(f"t{n}", body) for n, body in enumerate(bodies)]
    sched.run_until(lambda: all(task.done for task in tasks))


def test_an_exclusive_hold_keeps_the_next_out_until_it_ends(sched: Scheduler) -> None:
    lock, log = Mutex(sched, "m"), []

    def first() -> None:
        with lock:
            sched.sleep(10)
            log.append("first")

    def second() -> None:
        with lock:
            log.append("second")

    together(sched, first, second)
    assert log == ["first", "second"]
    assert lock.owner is None


def test_readers_share_and_a_waiting_writer_goes_before_later_readers(sched: Scheduler) -> None:
    lock, log = RwSem(sched, "s"), []

    def reader(name: str, ns: int) -> Callable[[], None]:
        def body() -> None:
            lock.read_lock()
            log.append(name)
            sched.sleep(ns)
            lock.read_unlock()

        return body

    def writer() -> None:
        with lock:
            log.append("w")

    together(sched, reader("r1", 5), reader("r2", 20), writer)
    assert log == ["r1", "r2", "w"]
    assert not lock.readers


def test_downgrade_lets_readers_in_and_keeps_writers_out(sched: Scheduler) -> None:
    lock, log = RwSem(sched, "s"), []

    def owner() -> None:
        lock.lock()
        sched.sleep(5)
        lock.downgrade()
        sched.sleep(5)
        log.append("owner")
        lock.read_unlock()

    def reader() -> None:
        lock.read_lock()
        log.append("reader")
        lock.read_unlock()

    def writer() -> None:
        sched.sleep(7)
        with lock:
            log.append("writer")

    together(sched, owner, reader, writer)
    assert log == ["reader", "owner", "writer"]


def test_trylock_answers_and_never_waits(sched: Scheduler) -> None:
    lock = RwLock(sched, "l")

    def body() -> None:
        assert lock.read_trylock()
        assert lock.read_trylock()
        assert not lock.trylock()
        lock.read_unlock()
        lock.read_unlock()
        assert lock.trylock()
        assert not lock.read_trylock()
        lock.unlock()

    sched.run_task("t", body)


def test_a_free_lock_cannot_be_unlocked(sched: Scheduler) -> None:
    with pytest.raises(BrokenTruth, match="unlocked while free"):
        Mutex(sched, "m").unlock()


def test_taking_a_lock_twice_is_said_and_not_a_deadlock(sched: Scheduler) -> None:
    sched.lockdep = None
    lock = Mutex(sched, "m")

    def body() -> None:
        with lock:
            lock.lock()

    with pytest.raises(BrokenTruth, match="takes m twice"):
        sched.run_task("t", body)


def test_two_orders_of_two_locks_are_a_broken_truth_though_nobody_deadlocked(sched: Scheduler) -> None:
    a, b = Mutex(sched, "a"), Spinlock(sched, "b")

    def one() -> None:
        with a, b:
            pass

    def other() -> None:
        with b, a:
            pass

    sched.run_task("one", one)
    with pytest.raises(BrokenTruth, match="takes a while holding b; one took them"):
        sched.run_task("other", other)


def test_two_locks_of_a_class_need_to_be_called_nested(sched: Scheduler) -> None:
    first, second = Spinlock(sched, "ptl"), Spinlock(sched, "ptl")

    def nested() -> None:
        with first:
            second.lock(nested=True)
            second.unlock()

    def plain() -> None:
        with first, second:
            pass

    sched.run_task("nested", nested)
    with pytest.raises(BrokenTruth, match="takes ptl while holding ptl"):
        sched.run_task("plain", plain)


def test_synchronize_waits_for_the_readers_inside_and_for_no_later_one(sched: Scheduler) -> None:
    srcu, log = Srcu(sched, "srcu"), []

    def early() -> None:
        idx = srcu.read_lock()
        sched.sleep(10)
        log.append("early out")
        srcu.read_unlock(idx)

    def sync() -> None:
        srcu.synchronize()
        log.append("synchronized")

    def late() -> None:
        sched.sleep(5)
        idx = srcu.read_lock()
        sched.sleep(100)
        log.append("late out")
        srcu.read_unlock(idx)

    together(sched, early, sync, late)
    assert log == ["early out", "synchronized", "late out"]
