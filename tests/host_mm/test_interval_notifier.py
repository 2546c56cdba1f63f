"""The collision-retry rules of interval notifiers (host_mm/interval_notifier.py)."""

from __future__ import annotations

from errno import EAGAIN, EOVERFLOW
from types import SimpleNamespace

import pytest

from host_mm import interval_notifier as itn
from host_mm import mmu_notifier as mn
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Srcu
from host_mm.kernel.sched import Scheduler
from host_mm.mm_types import MmStruct
from host_mm.mmu_notifier_register import mmu_notifier_register, mmu_notifier_release
from host_mm.profile import LINUX_6_18
from trace_events.stream import Listener, TraceStream


def make_mm() -> MmStruct:
    stream = TraceStream()
    sched = Scheduler(stream)
    host = SimpleNamespace(
        sched=sched, stream=stream, profile=LINUX_6_18, breaks=frozenset(),
        mmu_notifier_srcu=Srcu(sched, "srcu"),
        trace=stream.bind((*mn.TRACEPOINTS, *itn.TRACEPOINTS)), free_mm=lambda mm: None,
    )
    return MmStruct(host, SimpleNamespace(pid=7))  # type: ignore[arg-type]


class Sub(itn.MmuIntervalNotifier):
    def __init__(self, *, blocks: bool = False) -> None:
        super().__init__()
        self.blocks = blocks
        self.calls: list[tuple[int, int]] = []

    def invalidate(self, range_: mn.MmuNotifierRange, cur_seq: int) -> bool:
        if self.blocks and not mn.mmu_notifier_range_blockable(range_):
            return False
        itn.mmu_interval_set_seq(self, cur_seq)
        self.calls.append((range_.event, cur_seq))
        return True


def inserted(mm: MmStruct, start: int, length: int, **kw: bool) -> Sub:
    sub = Sub(**kw)
    assert itn.mmu_interval_notifier_insert(sub, mm, start, length) == 0
    return sub


def start(mm: MmStruct, first: int, end: int) -> mn.MmuNotifierRange:
    range_ = mn.mmu_notifier_range_init(mn.MMU_NOTIFY_CLEAR, mm, first, end)
    mn.mmu_notifier_invalidate_range_start(range_)
    return range_


def test_the_sequence_starts_at_two_and_is_odd_only_while_something_overlaps() -> None:
    mm = make_mm()
    sub = inserted(mm, 0x1000, 0x1000)
    subs = mm.notifier_subscriptions
    assert (subs.invalidate_seq, sub.invalidate_seq) == (2, 1)
    aside = start(mm, 0x8000, 0x9000)
    assert (subs.invalidate_seq, subs.active_invalidate_ranges) == (2, 1)
    over = start(mm, 0, 0x2000)
    assert (subs.invalidate_seq, sub.invalidate_seq) == (3, 3)
    mn.mmu_notifier_invalidate_range_end(over)
    assert subs.invalidate_seq == 3, "the bracket aside still delays the even state"
    mn.mmu_notifier_invalidate_range_end(aside)
    assert (subs.invalidate_seq, subs.active_invalidate_ranges) == (4, 0)
    assert sub.calls == [(mn.MMU_NOTIFY_CLEAR, 3)]


def test_the_end_of_an_interval_is_inclusive() -> None:
    mm = make_mm()
    sub = inserted(mm, 0x1000, 0x1000)
    assert sub.last == 0x1FFF
    for first, end, hit in ((0, 0x1000, 0), (0, 0x1001, 1), (0x1FFF, 0x2000, 2), (0x2000, 0x3000, 2)):
        mn.mmu_notifier_invalidate_range_end(start(mm, first, end))
        assert len(sub.calls) == hit


@pytest.mark.parametrize(("first", "length"), [(0x1000, 0), ((1 << 64) - 0x1000, 0x1001)])
def test_an_empty_or_overflowing_interval_is_refused(first: int, length: int) -> None:
    mm = make_mm()
    assert itn.mmu_interval_notifier_insert(Sub(), mm, first, length) == -EOVERFLOW
    assert mm.mm_count == 1


def test_the_last_byte_of_the_address_space_can_be_watched() -> None:
    mm = make_mm()
    assert inserted(mm, (1 << 64) - 0x1000, 0x1000).last == (1 << 64) - 1


def test_a_reader_that_collides_waits_once_and_must_retry() -> None:
    mm = make_mm()
    sched = mm.host.sched
    sub = inserted(mm, 0x1000, 0x1000)
    range_ = start(mm, 0x1000, 0x2000)
    got: list[int] = []
    sched.spawn("reader", lambda: got.append(itn.mmu_interval_read_begin(sub)))
    sched.spawn("aside", lambda: None)
    sched.run_until(lambda: not sched.runnable)
    assert got == [], "the reader waits while the bracket is open"
    mn.mmu_notifier_invalidate_range_end(range_)
    sched.run_until(lambda: bool(got))
    assert got == [3]
    assert not itn.mmu_interval_read_retry(sub, 3), "nothing happened since: it may publish"
    mn.mmu_notifier_invalidate_range_end(start(mm, 0x1000, 0x2000))
    assert itn.mmu_interval_check_retry(sub, 3)
    assert itn.mmu_interval_read_retry(sub, 3)


def test_a_bracket_during_the_read_makes_it_retry() -> None:
    mm = make_mm()
    sub = inserted(mm, 0x1000, 0x1000)
    seq = itn.mmu_interval_read_begin(sub)
    mn.mmu_notifier_invalidate_range_end(start(mm, 0x1000, 0x2000))
    assert itn.mmu_interval_read_retry(sub, seq)


def test_a_bracket_beside_the_interval_disturbs_no_reader() -> None:
    mm = make_mm()
    sub = inserted(mm, 0x1000, 0x1000)
    aside = start(mm, 0x8000, 0x9000)
    seq = itn.mmu_interval_read_begin(sub)
    mn.mmu_notifier_invalidate_range_end(aside)
    assert not itn.mmu_interval_read_retry(sub, seq)


def test_an_insert_while_the_tree_is_walked_is_deferred_to_the_last_end() -> None:
    mm = make_mm()
    inserted(mm, 0x1000, 0x1000)
    range_ = start(mm, 0x1000, 0x2000)
    late = inserted(mm, 0x1000, 0x1000)
    assert not late.in_tree
    assert late.invalidate_seq == mm.notifier_subscriptions.invalidate_seq == 3
    mn.mmu_notifier_invalidate_range_end(range_)
    assert late.in_tree


def test_an_insert_beside_an_open_bracket_counts_as_hit() -> None:
    mm = make_mm()
    inserted(mm, 0x1000, 0x1000)
    aside = start(mm, 0x8000, 0x9000)
    late = inserted(mm, 0x20000, 0x1000)
    assert late.in_tree
    assert late.invalidate_seq == mm.notifier_subscriptions.invalidate_seq == 3
    mn.mmu_notifier_invalidate_range_end(aside)
    assert mm.notifier_subscriptions.invalidate_seq == 4


def test_removing_what_is_still_deferred_just_drops_it() -> None:
    mm = make_mm()
    inserted(mm, 0x1000, 0x1000)
    range_ = start(mm, 0x1000, 0x2000)
    late = inserted(mm, 0x1000, 0x1000)
    itn.mmu_interval_notifier_remove(late)
    mn.mmu_notifier_invalidate_range_end(range_)
    assert not late.in_tree


def test_a_remove_while_the_tree_is_walked_waits_for_the_end() -> None:
    mm = make_mm()
    sched = mm.host.sched
    sub = inserted(mm, 0x1000, 0x1000)
    range_ = start(mm, 0x1000, 0x2000)
    task = sched.spawn("remove", lambda: itn.mmu_interval_notifier_remove(sub))
    sched.run_until(lambda: not sched.runnable)
    assert not task.done
    assert sub.in_tree
    mn.mmu_notifier_invalidate_range_end(range_)
    sched.run_until(lambda: task.done)
    assert not sub.in_tree
    assert mm.mm_count == 1


def test_a_refusal_closes_the_bracket_and_the_caller_must_not() -> None:
    mm = make_mm()
    sub = inserted(mm, 0x1000, 0x1000, blocks=True)
    range_ = mn.mmu_notifier_range_init(mn.MMU_NOTIFY_UNMAP, mm, 0x1000, 0x2000)
    assert mn.mmu_notifier_invalidate_range_start_nonblock(range_) == -EAGAIN
    subs = mm.notifier_subscriptions
    assert (subs.active_invalidate_ranges, subs.invalidate_seq) == (0, 4)
    assert sub.calls == []


def test_a_list_refusal_after_the_tree_was_told_leaves_the_tree_told() -> None:
    class Refuser(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            return 0 if mn.mmu_notifier_range_blockable(range_) else -EAGAIN

    mm = make_mm()
    inserted(mm, 0x1000, 0x1000)
    mmu_notifier_register(Refuser(), mm)
    range_ = mn.mmu_notifier_range_init(mn.MMU_NOTIFY_UNMAP, mm, 0x1000, 0x2000)
    assert mn.mmu_notifier_invalidate_range_start_nonblock(range_) == -EAGAIN
    assert mm.notifier_subscriptions.active_invalidate_ranges == 1, "the hole that Linux has too"


def test_a_callback_that_does_not_set_the_sequence_breaks_a_truth() -> None:
    class Forgetful(itn.MmuIntervalNotifier):
        def invalidate(self, range_: mn.MmuNotifierRange, cur_seq: int) -> bool:
            return True

    mm = make_mm()
    itn.mmu_interval_notifier_insert(Forgetful(), mm, 0x1000, 0x1000)
    with pytest.raises(BrokenTruth, match="interval-set-seq"):
        start(mm, 0x1000, 0x2000)


def test_the_tree_is_told_before_the_list_and_of_release_too() -> None:
    mm = make_mm()
    sub = inserted(mm, 0x1000, 0x1000)
    log: list[str] = []

    class Listed(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            log.append(f"list after {len(sub.calls)}")
            return 0

        def release(self, mm: MmStruct) -> None:
            log.append(f"release after {len(sub.calls)}")

    mmu_notifier_register(Listed(), mm)
    mn.mmu_notifier_invalidate_range_end(start(mm, 0x1000, 0x2000))
    mmu_notifier_release(mm)
    assert log == ["list after 1", "release after 2"]
    assert sub.calls[-1][0] == mn.MMU_NOTIFY_RELEASE



def test_every_move_of_the_sequence_is_an_event_and_so_are_inserts_and_removes() -> None:
    mm = make_mm()
    seen: list[tuple[str, tuple[object, ...]]] = []
    listener = Listener(
        ["refault:mmu_interval_*"], lambda e: seen.append((e.name, tuple(e.args.values()))), ancestors=False
    )
    mm.host.stream.listen(listener)
    first = inserted(mm, 0x1000, 0x1000)
    aside = start(mm, 0x8000, 0x9000)
    hit = start(mm, 0x1000, 0x2000)
    late = inserted(mm, 0x4000, 0x1000)
    mn.mmu_notifier_invalidate_range_end(hit)
    mn.mmu_notifier_invalidate_range_end(aside)
    assert late.in_tree
    itn.mmu_interval_notifier_remove(first)
    assert seen == [
        ("mmu_interval_insert", (0x1000, 0x1FFF, 1, False)),
        ("mmu_interval_seq", (7, 3, 2, "invalidate")),
        ("mmu_interval_invalidate", (0x1000, 0x1FFF, 3, False)),
        ("mmu_interval_insert", (0x4000, 0x4FFF, 3, True)),
        ("mmu_interval_seq", (7, 4, 0, "idle")),
        ("mmu_interval_remove", (0x1000, 0x1FFF, False)),
    ]
    beside = start(mm, 0x8000, 0x9000)
    seen.clear()
    inserted(mm, 0x6000, 0x1000)
    assert seen == [
        ("mmu_interval_seq", (7, 5, 1, "insert")), ("mmu_interval_insert", (0x6000, 0x6FFF, 5, False)),
    ]
    mn.mmu_notifier_invalidate_range_end(beside)


def test_only_brackets_of_its_own_owner_may_be_left_out() -> None:
    class Choosy(Sub):
        owner = "me"

        def invalidate(self, range_: mn.MmuNotifierRange, cur_seq: int) -> bool:
            return True

    mm = make_mm()
    sub = Choosy()
    assert itn.mmu_interval_notifier_insert(sub, mm, 0x1000, 0x1000) == 0
    seq = itn.mmu_interval_read_begin(sub)
    mine = mn.mmu_notifier_range_init(mn.MMU_NOTIFY_MIGRATE, mm, 0x1000, 0x2000, owner="me")
    mn.mmu_notifier_invalidate_range_start(mine)
    mn.mmu_notifier_invalidate_range_end(mine)
    assert not itn.mmu_interval_read_retry(sub, seq), "nothing tells a reader of what was left out"
    for owner in ("somebody else", None):
        other = mn.mmu_notifier_range_init(mn.MMU_NOTIFY_MIGRATE, mm, 0x1000, 0x2000, owner=owner)
        with pytest.raises(BrokenTruth, match="interval-set-seq"):
            mn.mmu_notifier_invalidate_range_start(other)
