"""Brackets, dispatch, registration and release of mmu notifiers (host_mm/mmu_notifier.py)."""

from __future__ import annotations

from errno import EAGAIN, EINVAL
from types import SimpleNamespace
from typing import Any

import pytest

from host_mm import interval_notifier
from host_mm import mmu_notifier as mn
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Srcu
from host_mm.kernel.sched import Scheduler
from host_mm.mm_types import MmStruct, VmArea
from host_mm.mmu_notifier_register import (
    mmu_notifier_get,
    mmu_notifier_put,
    mmu_notifier_register,
    mmu_notifier_release,
    mmu_notifier_subscriptions_destroy,
    mmu_notifier_unregister,
)
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from trace_events.stream import Listener, TraceStream


def make_mm(breaks: frozenset[str] = frozenset(), profile: MmProfile = LINUX_6_18) -> MmStruct:
    stream = TraceStream()
    sched = Scheduler(stream)
    host = SimpleNamespace(
        sched=sched, stream=stream, breaks=breaks, profile=profile, mmu_notifier_srcu=Srcu(sched, "srcu"),
        trace=stream.bind((*mn.TRACEPOINTS, *interval_notifier.TRACEPOINTS)), freed=[],
    )
    host.free_mm = host.freed.append
    return MmStruct(host, SimpleNamespace(pid=7))  # type: ignore[arg-type]


class Recorder(mn.MmuNotifier):
    def __init__(self, log: list[Any], name: str = "") -> None:
        self.log = log
        self.name = name

    def release(self, mm: MmStruct) -> None:
        self.log.append(f"{self.name}release")

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        self.log.append(f"{self.name}start")
        return 0

    def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
        self.log.append(f"{self.name}end")

    def clear_flush_young(self, mm: MmStruct, start: int, end: int) -> int:
        self.log.append(f"{self.name}clear_flush_young")
        return 1

    def test_young(self, mm: MmStruct, address: int) -> int:
        self.log.append(f"{self.name}test_young")
        return int(self.name == "b")


class Refuser(mn.MmuNotifier):
    """Has a start that cannot run without sleeping, and so has no end."""

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        return 0 if mn.mmu_notifier_range_blockable(range_) else -EAGAIN


def bracket(mm: MmStruct, start: int = 0x1000, end: int = 0x2000) -> mn.MmuNotifierRange:
    return mn.mmu_notifier_range_init(mn.MMU_NOTIFY_CLEAR, mm, start, end)


def test_nobody_registered_means_no_event_and_no_call() -> None:
    mm = make_mm()
    seen: list[Any] = []
    mm.host.stream.listen(Listener(["*"], seen.append))
    range_ = bracket(mm)
    mn.mmu_notifier_invalidate_range_start(range_)
    mn.mmu_notifier_invalidate_range_end(range_)
    assert mn.mmu_notifier_invalidate_range_start_nonblock(range_) == 0
    assert seen == []


def test_the_newest_notifier_is_called_first() -> None:
    mm, log = make_mm(), []
    for name in "ab":
        assert mmu_notifier_register(Recorder(log, name), mm) == 0
    range_ = bracket(mm)
    mn.mmu_notifier_invalidate_range_start(range_)
    mn.mmu_notifier_invalidate_range_end(range_)
    assert log == ["bstart", "astart", "bend", "aend"]


def test_the_start_event_is_the_cause_of_what_happens_inside_the_bracket() -> None:
    mm = make_mm()
    mmu_notifier_register(Recorder([]), mm)
    seen: list[Any] = []
    mm.host.stream.listen(Listener(["*"], seen.append))
    ctx = mm.host.stream.ctx
    ctx.cause = None
    outer, inner = bracket(mm, 0, 0x9000), bracket(mm)
    mn.mmu_notifier_invalidate_range_start(outer)
    mn.mmu_notifier_invalidate_range_start(inner)
    assert ctx.cause == 1
    mn.mmu_notifier_invalidate_range_end(inner)
    assert ctx.cause == 0
    mn.mmu_notifier_invalidate_range_end(outer)
    assert ctx.cause is None
    assert [(e.name, e.cause) for e in seen] == [
        ("mmu_notifier_start", None), ("mmu_notifier_start", 0),
        ("mmu_notifier_end", 1), ("mmu_notifier_end", 0),
    ]
    assert seen[0].args == {
        "pid": 7, "event": "clear", "start": 0, "end": 0x9000, "order": 1, "blockable": True,
    }


def test_a_refused_start_still_calls_the_others_and_ends_those_that_have_an_end() -> None:
    mm, log = make_mm(), []
    mmu_notifier_register(Recorder(log, "a"), mm)
    mmu_notifier_register(Refuser(), mm)
    mmu_notifier_register(Recorder(log, "b"), mm)
    assert mn.mmu_notifier_invalidate_range_start_nonblock(bracket(mm)) == -EAGAIN
    assert log == ["bstart", "astart", "bend", "aend"]
    mn.mmu_notifier_invalidate_range_start(bracket(mm))


def test_in_5_10_a_refused_start_calls_the_others_and_ends_nobody() -> None:
    class Both(Refuser):
        def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
            raise AssertionError("told an end")

    mm, log = make_mm(profile=LINUX_5_10), []
    mmu_notifier_register(Recorder(log, "a"), mm)
    mmu_notifier_register(Both(), mm)
    mmu_notifier_register(Recorder(log, "b"), mm)
    assert mn.mmu_notifier_invalidate_range_start_nonblock(bracket(mm)) == -EAGAIN
    assert log == ["bstart", "astart"]


def test_a_notifier_that_refuses_may_not_have_an_end() -> None:
    class Both(Refuser):
        def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
            pass

    mm = make_mm()
    mmu_notifier_register(Both(), mm)
    with pytest.raises(BrokenTruth, match="notifier-start-refused"):
        mn.mmu_notifier_invalidate_range_start_nonblock(bracket(mm))


def test_a_callback_of_a_non_blockable_bracket_may_not_sleep() -> None:
    class Sleeper(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            range_.mm.host.sched.sleep(10)
            return 0

    mm = make_mm()
    mmu_notifier_register(Sleeper(), mm)
    mm.host.sched.run_task("t", lambda: mn.mmu_notifier_invalidate_range_start(bracket(mm)))
    with pytest.raises(BrokenTruth, match="no-sleep-in-atomic"):
        mm.host.sched.run_task("t", lambda: mn.mmu_notifier_invalidate_range_start_nonblock(bracket(mm)))


def test_young_answers_are_ored_but_the_first_yes_ends_a_test() -> None:
    mm, log = make_mm(), []
    for name in "abc":
        mmu_notifier_register(Recorder(log, name), mm)
    assert mn.mmu_notifier_clear_flush_young(mm, 0, 0x1000) == 1
    assert mn.mmu_notifier_test_young(mm, 0) == 1
    assert log == [*(f"{n}clear_flush_young" for n in "cba"), "ctest_young", "btest_young"]
    assert mn.mmu_notifier_clear_young(mm, 0, 0x1000) == 0


def test_secondary_tlb_and_bracket_callbacks_exclude_each_other() -> None:
    class Both(Recorder):
        def arch_invalidate_secondary_tlbs(self, mm: MmStruct, start: int, end: int) -> None:
            pass

    mm = make_mm()
    assert mmu_notifier_register(Both([]), mm) == -EINVAL
    assert mm.mm_count == 1


def test_registering_takes_every_anon_vma_lock() -> None:
    mm = make_mm()
    sched = mm.host.sched
    vma = VmArea(mm, 0, 0x1000, 3, 0)
    mm.vmas.append(vma)
    from host_mm.rmap_anon_vma import anon_vma_prepare

    anon_vma_prepare(vma)
    rwsem = vma.anon_vma.root.rwsem
    log: list[str] = []

    def walker() -> None:
        rwsem.read_lock()
        sched.sleep(100)
        log.append("walk done")
        rwsem.read_unlock()

    task = sched.spawn("walker", walker)
    sched.run_until(lambda: bool(rwsem.readers))
    sched.run_task("register", lambda: mmu_notifier_register(Recorder(log), mm))
    log.append("registered")
    assert task.done
    assert log == ["walk done", "registered"]


def test_unregister_releases_once_and_waits_for_running_callbacks() -> None:
    mm, log = make_mm(), []
    sched = mm.host.sched

    class Slow(Recorder):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            sched.sleep(100)
            self.log.append("slow start done")
            return 0

    sub = Slow(log)
    mmu_notifier_register(sub, mm)
    sched.spawn("bracket", lambda: mn.mmu_notifier_invalidate_range_start(bracket(mm)))
    sched.run_task("unregister", lambda: (mmu_notifier_unregister(sub, mm), log.append("unregistered")))
    assert log == ["release", "slow start done", "unregistered"]
    assert mm.mm_count == 1


def test_exit_releases_every_notifier_and_unregister_later_does_not() -> None:
    mm, log = make_mm(), []
    subs = [Recorder(log, name) for name in "ab"]
    for sub in subs:
        mmu_notifier_register(sub, mm)
    mmu_notifier_release(mm)
    assert log == ["brelease", "arelease"]
    for sub in subs:
        mmu_notifier_unregister(sub, mm)
    assert log == ["brelease", "arelease"]
    assert mm.mm_count == 1
    mmu_notifier_subscriptions_destroy(mm)
    assert mm.notifier_subscriptions is None


def test_get_shares_one_notifier_per_class_and_put_frees_it_after_srcu() -> None:
    mm, log = make_mm(), []
    sched = mm.host.sched

    class Shared(mn.MmuNotifier):
        @classmethod
        def alloc_notifier(cls, mm: MmStruct) -> mn.MmuNotifier:
            log.append("alloc")
            return cls()

        def free_notifier(self) -> None:
            log.append("free")

    first = mmu_notifier_get(Shared, mm)
    assert isinstance(first, Shared)
    assert mmu_notifier_get(Shared, mm) is first
    mmu_notifier_put(first)
    idx = mm.host.mmu_notifier_srcu.read_lock()
    mmu_notifier_put(first)
    sched.spawn("later", lambda: (sched.sleep(50), log.append("reader leaves"),
                                  mm.host.mmu_notifier_srcu.read_unlock(idx)))
    sched.run_until(lambda: "free" in log)
    assert log == ["alloc", "reader leaves", "free"]
    assert mm.mm_count == 1


def test_the_5_10_end_calls_invalidate_range_unless_it_was_called_before() -> None:
    class Old(Recorder):
        def invalidate_range(self, mm: MmStruct, start: int, end: int) -> None:
            self.log.append(f"range {start:#x}")

        def change_pte(self, mm: MmStruct, address: int, pte: int) -> None:
            self.log.append(f"change {pte:#x}")

    calls = ["range 0x1000", "end", "range 0x1000", "change 0x25", "end"]
    for profile, expected in ((LINUX_5_10, calls), (LINUX_6_18, ["end", "end"])):
        mm, log = make_mm(profile=profile), []
        mmu_notifier_register(Old(log), mm)
        mn.mmu_notifier_invalidate_range_end(bracket(mm))
        mn.mmu_notifier_invalidate_range(mm, 0x1000, 0x2000)
        mn.mmu_notifier_change_pte(mm, 0x1000, 0x25)
        mn.mmu_notifier_invalidate_range_only_end(bracket(mm))
        assert log == expected
