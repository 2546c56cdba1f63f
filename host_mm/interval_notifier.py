"""Interval notifiers: a collision-retry scheme for users that mirror part of an address space.

Source of truth: mm/mmu_notifier.c: mn_itree_*, mmu_interval_* (Linux 6.18).

A subscription watches [start, last]. Its user maps pages by

    seq = mmu_interval_read_begin(sub)
    ...fault the pages in, may sleep...
    take the user's lock
    if mmu_interval_read_retry(sub, seq): drop the lock and begin again
    publish; drop the lock

and its `invalidate(range_, seq)` callback takes the same lock, calls mmu_interval_set_seq(sub, seq)
whatever else it does, and drops what the range covers. It returns False only when the range is not
blockable and it would have to sleep. A driver may leave out the brackets that it opens itself, by their
owner; what they cover it then has to take back by means of its own.

`invalidate_seq` of the subscriptions is odd while the tree is being walked by some bracket: the
tree must not change then, so that adds and removes wait on the deferred list for the end of the
last bracket. It stays even while only brackets run that overlap nothing. All brackets of an mm are
counted together.

Not modelled: wrap-around of the sequence number, the red-black tree (a list ordered by start,
which gives the same order of callbacks).
"""

from __future__ import annotations

from bisect import insort
from errno import EAGAIN, EINVAL, EOVERFLOW
from functools import partial
from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth
from host_mm.mmu_notifier import (
    MMU_NOTIFIER_RANGE_BLOCKABLE,
    MMU_NOTIFY_RELEASE,
    MmuNotifierRange,
    MmuNotifierSubscriptions,
    mmu_notifier_range_blockable,
    mmu_notifier_range_init,
)
from host_mm.mmu_notifier_register import mmu_notifier_register_locked
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = [
    "TRACEPOINTS",
    "Itree",
    "MmuIntervalNotifier",
    "mmu_interval_check_retry",
    "mmu_interval_notifier_insert",
    "mmu_interval_notifier_remove",
    "mmu_interval_read_begin",
    "mmu_interval_read_retry",
    "mmu_interval_set_seq",
]

_ULONG_MAX = (1 << 64) - 1

MMU_INTERVAL_INVALIDATE = Tracepoint(
    "refault", "mmu_interval_invalidate", ("start", "last", "seq", "kept"),
    lambda start, last, seq, kept: f"{start:#x} -- {last:#x} seq {seq}" + (" would block" if kept else ""),
    doc="An interval notifier is told of a bracket that overlaps it.",
)
MMU_INTERVAL_READ = Tracepoint(
    "refault", "mmu_interval_read", ("start", "last", "seq", "waited"),
    lambda start, last, seq, waited: f"{start:#x} -- {last:#x} seq {seq}" + (" waited" if waited else ""),
    doc="A reader begins; it waited if a bracket that overlaps was open.",
)
MMU_INTERVAL_RETRY = Tracepoint(
    "refault", "mmu_interval_retry", ("start", "last", "seq", "now"),
    lambda start, last, seq, now: f"{start:#x} -- {last:#x} seq {seq} now {now}",
    doc="A reader collided and must begin again.",
)

MMU_INTERVAL_SEQ = Tracepoint(
    "refault", "mmu_interval_seq", ("pid", "seq", "active", "why"),
    lambda pid, seq, active, why: f"pid {pid} seq {seq} active {active} {why}",
    doc="An mm's interval sequence moved: odd while its tree is under invalidation, even when it is idle.",
)
MMU_INTERVAL_INSERT = Tracepoint(
    "refault", "mmu_interval_insert", ("start", "last", "seq", "deferred"),
    lambda start, last, seq, deferred:
        f"{start:#x} -- {last:#x} seq {seq}" + (" deferred" if deferred else ""),
    doc="An interval is watched from now on, or from the end of the open brackets.",
)
MMU_INTERVAL_REMOVE = Tracepoint(
    "refault", "mmu_interval_remove", ("start", "last", "deferred"),
    lambda start, last, deferred: f"{start:#x} -- {last:#x}" + (" deferred" if deferred else ""),
    doc="An interval is no longer watched, or will not be once the open brackets have ended.",
)

TRACEPOINTS = (
    MMU_INTERVAL_INVALIDATE, MMU_INTERVAL_READ, MMU_INTERVAL_RETRY, MMU_INTERVAL_SEQ, MMU_INTERVAL_INSERT,
    MMU_INTERVAL_REMOVE,
)


class MmuIntervalNotifier:
    """struct mmu_interval_notifier with its one op: a subclass defines `invalidate`.

    `owner`: whose brackets it may leave out.
    """

    owner: Any = None

    def __init__(self) -> None:
        self.mm: MmStruct | None = None
        self.start = 0
        self.last = 0
        self.invalidate_seq = 0
        self.in_tree = False

    def invalidate(self, range_: MmuNotifierRange, cur_seq: int) -> bool:
        """Drop what `range_` covers, under the user's lock, after mmu_interval_set_seq."""
        raise NotImplementedError


class Itree:
    """The interval tree of one mm and the deferred list, on its subscriptions."""

    __slots__ = ("deferred", "mm", "nodes", "subs")

    def __init__(self, mm: MmStruct, subs: MmuNotifierSubscriptions) -> None:
        self.mm = mm
        self.subs = subs
        self.nodes: list[tuple[int, int, MmuIntervalNotifier]] = []
        self.deferred: list[MmuIntervalNotifier] = []

    def move_seq(self, seq: int, why: str) -> None:
        """The sequence number is `seq` from now on; under the subscriptions' lock."""
        subs = self.subs
        if subs.invalidate_seq == seq:
            return
        subs.invalidate_seq = seq
        mm = self.mm
        if (t := mm.host.trace.mmu_interval_seq) is not None:
            t(mm.process.pid, seq, subs.active_invalidate_ranges, why)

    def insert(self, sub: MmuIntervalNotifier) -> None:
        """Into the tree, which must not be under invalidation."""
        insort(self.nodes, (sub.start, id(sub), sub), key=lambda node: node[0])
        sub.in_tree = True

    def remove(self, sub: MmuIntervalNotifier) -> None:
        """Out of the tree, which must not be under invalidation."""
        self.nodes = [node for node in self.nodes if node[2] is not sub]
        sub.in_tree = False

    def overlaps(self, start: int, last: int) -> list[MmuIntervalNotifier]:
        """The subscriptions that meet [start, last], by start."""
        return [sub for first, _, sub in self.nodes if first <= last and sub.last >= start]

    def start(self, start: int, end: int) -> tuple[list[MmuIntervalNotifier], int]:
        """mn_itree_inv_start_range: count the bracket, find its overlaps and the sequence number."""
        subs = self.subs
        with subs.lock:
            subs.active_invalidate_ranges += 1
            found = self.overlaps(start, end - 1)
            if found:
                self.move_seq(subs.invalidate_seq | 1, "invalidate")
            return found, subs.invalidate_seq

    def end(self) -> None:
        """mn_itree_inv_end: the last bracket makes the tree idle, changes it and wakes readers."""
        subs = self.subs
        with subs.lock:
            subs.active_invalidate_ranges -= 1
            if subs.active_invalidate_ranges < 0:
                raise BrokenTruth("interval-balance", "a bracket ended that did not start")
            if subs.active_invalidate_ranges or not subs.invalidate_seq & 1:
                return
            self.move_seq(subs.invalidate_seq + 1, "idle")
            for sub in self.deferred:
                if sub.in_tree:
                    self.remove(sub)
                else:
                    self.insert(sub)
            self.deferred.clear()
        subs.wq.wake_all()

    def invalidate(self, range_: MmuNotifierRange) -> int:
        """mn_itree_invalidate: 0, or -EAGAIN when a callback would have to sleep and may not."""
        found, seq = self.start(range_.start, range_.end)
        if not found:
            return 0
        host = range_.mm.host
        task = host.sched.current
        atomic = 0 if mmu_notifier_range_blockable(range_) else 1
        for sub in found:
            task.no_preempt += atomic
            done = sub.invalidate(range_, seq)
            task.no_preempt -= atomic
            if (t := host.trace.mmu_interval_invalidate) is not None:
                t(sub.start, sub.last, seq, not done)
            if done:
                ours = range_.owner is not None and range_.owner is sub.owner
                if sub.invalidate_seq != seq and not ours:
                    raise BrokenTruth("interval-set-seq", f"{type(sub).__name__} did not set seq {seq}")
                continue
            if not atomic:
                raise BrokenTruth("interval-refused", f"{type(sub).__name__} refused {range_!r}")
            self.end()
            return -EAGAIN
        return 0

    def release(self, mm: MmStruct) -> None:
        """mn_itree_release: the mm goes away; every subscription hears of the whole of it."""
        range_ = mmu_notifier_range_init(
            MMU_NOTIFY_RELEASE, mm, 0, _ULONG_MAX, flags=MMU_NOTIFIER_RANGE_BLOCKABLE
        )
        self.invalidate(range_)
        self.end()


def _itree(sub: MmuIntervalNotifier) -> Itree:
    mm = sub.mm
    if mm is None or mm.notifier_subscriptions is None:
        raise BrokenTruth("interval-insert", "an interval notifier is used that was never inserted")
    tree = mm.notifier_subscriptions.itree
    if not isinstance(tree, Itree):
        raise BrokenTruth("interval-insert", "the mm has no interval tree")
    return tree


def mmu_interval_set_seq(sub: MmuIntervalNotifier, cur_seq: int) -> None:
    """What an invalidate callback must do first, under the user's lock."""
    sub.invalidate_seq = cur_seq


def mmu_interval_read_begin(sub: MmuIntervalNotifier) -> int:
    """The sequence number for mmu_interval_read_retry; waits once while a bracket overlaps."""
    subs = _itree(sub).subs
    mm = sub.mm
    assert mm is not None
    with subs.lock:
        seq = sub.invalidate_seq
        colliding = seq == subs.invalidate_seq
    if mm.host.sched.preempt:
        mm.host.sched.point("seq")
    if colliding:
        subs.wq.wait_event(lambda: subs.invalidate_seq != seq)
    if (t := mm.host.trace.mmu_interval_read) is not None:
        t(sub.start, sub.last, seq, colliding)
    return seq


def mmu_interval_read_retry(sub: MmuIntervalNotifier, seq: int) -> bool:
    """Whether the reader collided; under the user's lock. True: nothing read may be published."""
    collided = sub.invalidate_seq != seq
    if collided:
        mm = sub.mm
        if mm is not None and (t := mm.host.trace.mmu_interval_retry) is not None:
            t(sub.start, sub.last, seq, sub.invalidate_seq)
    return collided


def mmu_interval_check_retry(sub: MmuIntervalNotifier, seq: int) -> bool:
    """As read_retry but without the lock: True is reliable, False is not."""
    mm = sub.mm
    if mm is not None and mm.host.sched.preempt:
        mm.host.sched.point("seq")
    return sub.invalidate_seq != seq


def mmu_interval_notifier_insert(sub: MmuIntervalNotifier, mm: MmStruct, start: int, length: int) -> int:
    """Watch `length` bytes from `start`. 0, -EOVERFLOW or -EINVAL. It may not be in the tree yet."""
    subs = mm.notifier_subscriptions
    if subs is None or subs.itree is None:
        mm.mmap_lock.lock()
        ret = mmu_notifier_register_locked(None, mm, partial(Itree, mm))
        mm.mmap_lock.unlock()
        if ret:
            return ret
    return _insert(sub, mm, start, length)


def _insert(sub: MmuIntervalNotifier, mm: MmStruct, start: int, length: int) -> int:
    if length == 0 or start + length - 1 > _ULONG_MAX:
        return -EOVERFLOW
    if mm.mm_users <= 0:
        return -EINVAL
    sub.mm = mm
    sub.start = start
    sub.last = start + length - 1
    sub.in_tree = False
    mm.mm_count += 1
    tree = _itree(sub)
    subs = tree.subs
    with subs.lock:
        if subs.active_invalidate_ranges:
            # Which ranges the open brackets cover is not known, so this one counts as hit.
            if subs.invalidate_seq & 1:
                tree.deferred.insert(0, sub)
            else:
                tree.move_seq(subs.invalidate_seq | 1, "insert")
                tree.insert(sub)
            sub.invalidate_seq = subs.invalidate_seq
        else:
            if subs.invalidate_seq & 1:
                raise BrokenTruth("interval-sequence", "no bracket is open but the sequence is odd")
            sub.invalidate_seq = subs.invalidate_seq - 1
            tree.insert(sub)
        if (t := mm.host.trace.mmu_interval_insert) is not None:
            t(sub.start, sub.last, sub.invalidate_seq, not sub.in_tree)
    return 0


def mmu_interval_notifier_remove(sub: MmuIntervalNotifier) -> None:
    """Stop watching; when it returns no callback runs or will run. Never from a callback."""
    tree = _itree(sub)
    subs = tree.subs
    mm = sub.mm
    assert mm is not None
    seq = 0
    with subs.lock:
        if subs.invalidate_seq & 1:
            if sub.in_tree:
                tree.deferred.insert(0, sub)
                seq = subs.invalidate_seq
            else:
                tree.deferred.remove(sub)
        else:
            if not sub.in_tree:
                raise BrokenTruth("interval-remove", "an interval notifier is removed twice")
            tree.remove(sub)
        if (t := mm.host.trace.mmu_interval_remove) is not None:
            t(sub.start, sub.last, seq != 0)
    if seq:
        subs.wq.wait_event(lambda: subs.invalidate_seq != seq)
    mm.mmdrop()
