"""mmu notifiers: how mm tells secondary MMUs that host translations go away.

Source of truth: mm/mmu_notifier.c and include/linux/mmu_notifier.h (Linux 6.18). `change_pte`,
`invalidate_range` and the end that skips it are Linux 5.10's: under a profile without them the first two
do nothing, and the third is the ordinary end.

A bracket is

    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, mm, start, end, order=ORDER_UNDER_PTL)
    mmu_notifier_invalidate_range_start(range_)
    ...
    mmu_notifier_invalidate_range_end(range_)

and costs one attribute test while nobody is registered with the mm. Its start event is the cause
of all that happens until its end. One SRCU domain serves all mms of a host: the host holds it as
`host.mmu_notifier_srcu`, and the binding of TRACEPOINTS as `host.trace`. The types are in
mmu_notifier_types.py, registration in mmu_notifier_register.py.

Dispatch: start and end go to the interval tree first, then to the list. When a list start says
-EAGAIN the others are called all the same, then (not in 5.10) the end of each notifier that has one,
and the caller must not call end. When that happens after the interval tree was told, nobody tells the tree
of the end: Linux has this hole too.

Not modelled: lockdep's map of the start section.
"""

from __future__ import annotations

from errno import EAGAIN
from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth
from host_mm.mmu_notifier_types import (
    EVENT_NAMES,
    MMU_NOTIFIER_RANGE_BLOCKABLE,
    MMU_NOTIFY_CLEAR,
    MMU_NOTIFY_EXCLUSIVE,
    MMU_NOTIFY_MIGRATE,
    MMU_NOTIFY_PROTECTION_PAGE,
    MMU_NOTIFY_PROTECTION_VMA,
    MMU_NOTIFY_RELEASE,
    MMU_NOTIFY_SOFT_DIRTY,
    MMU_NOTIFY_UNMAP,
    ORDER_AFTER_END,
    ORDER_BATCHED,
    ORDER_GATHER,
    ORDER_UNDER_PTL,
    TRACEPOINTS,
    MmuNotifier,
    MmuNotifierRange,
    MmuNotifierSubscriptions,
)

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = [
    "EVENT_NAMES", "MMU_NOTIFIER_RANGE_BLOCKABLE", "MMU_NOTIFY_CLEAR", "MMU_NOTIFY_EXCLUSIVE",
    "MMU_NOTIFY_MIGRATE", "MMU_NOTIFY_PROTECTION_PAGE", "MMU_NOTIFY_PROTECTION_VMA", "MMU_NOTIFY_RELEASE",
    "MMU_NOTIFY_SOFT_DIRTY", "MMU_NOTIFY_UNMAP", "ORDER_AFTER_END", "ORDER_BATCHED", "ORDER_GATHER",
    "ORDER_UNDER_PTL", "TRACEPOINTS", "MmuNotifier", "MmuNotifierRange", "MmuNotifierSubscriptions",
    "mmu_notifier_arch_invalidate_secondary_tlbs", "mmu_notifier_change_pte",
    "mmu_notifier_clear_flush_young", "mmu_notifier_clear_young", "mmu_notifier_invalidate_range",
    "mmu_notifier_invalidate_range_end", "mmu_notifier_invalidate_range_only_end",
    "mmu_notifier_invalidate_range_start", "mmu_notifier_invalidate_range_start_nonblock",
    "mmu_notifier_range_blockable", "mmu_notifier_range_init", "mmu_notifier_test_young",
]


def mmu_notifier_range_init(
    event: int, mm: MmStruct, start: int, end: int, *,
    order: int = ORDER_UNDER_PTL, flags: int = 0, owner: Any = None,
) -> MmuNotifierRange:
    """A range for a bracket; with `owner` it is mmu_notifier_range_init_owner."""
    return MmuNotifierRange(event, mm, start, end, order, flags, owner)


def mmu_notifier_range_blockable(range_: MmuNotifierRange) -> bool:
    """Whether callbacks for this range may sleep."""
    return bool(range_.flags & MMU_NOTIFIER_RANGE_BLOCKABLE)


# -- brackets -----------------------------------------------------------------------------------


def mmu_notifier_invalidate_range_start(range_: MmuNotifierRange) -> None:
    """Open a bracket; callbacks may sleep."""
    mm = range_.mm
    subs = mm.notifier_subscriptions
    if subs is not None:
        range_.flags |= MMU_NOTIFIER_RANGE_BLOCKABLE
        _range_start(subs, range_)


def mmu_notifier_invalidate_range_start_nonblock(range_: MmuNotifierRange) -> int:
    """Open a bracket without sleeping; -EAGAIN: it is not open and end must not be called."""
    mm = range_.mm
    subs = mm.notifier_subscriptions
    if subs is None:
        return 0
    range_.flags &= ~MMU_NOTIFIER_RANGE_BLOCKABLE
    return _range_start(subs, range_)


def mmu_notifier_invalidate_range_end(range_: MmuNotifierRange) -> None:
    """Close a bracket."""
    mm = range_.mm
    subs = mm.notifier_subscriptions
    if subs is not None:
        _range_end(subs, range_, only_end=False)


def mmu_notifier_invalidate_range_only_end(range_: MmuNotifierRange) -> None:
    """Close a bracket inside which invalidate_range, if there is such a thing, was called already."""
    mm = range_.mm
    subs = mm.notifier_subscriptions
    if subs is not None:
        _range_end(subs, range_, only_end=True)


def _pid(mm: MmStruct) -> int:
    return mm.process.pid if mm.process is not None else 0


def _trace_args(range_: MmuNotifierRange) -> tuple[int, str, int, int]:
    return _pid(range_.mm), EVENT_NAMES[range_.event], range_.start, range_.end


def _range_start(subs: MmuNotifierSubscriptions, range_: MmuNotifierRange) -> int:
    host = range_.mm.host
    if (t := host.trace.mmu_notifier_start) is not None:
        ctx = host.stream.ctx
        range_.saved_cause = ctx.cause
        range_.traced = True
        ctx.cause = t(*_trace_args(range_), range_.order, mmu_notifier_range_blockable(range_))
    ret = 0
    if subs.itree is not None:
        ret = subs.itree.invalidate(range_)
    if not ret and subs.list:
        ret = _hlist_invalidate_range_start(subs, range_)
    if ret:
        if (t := host.trace.mmu_notifier_again) is not None:
            t(*_trace_args(range_))
        _restore_cause(range_)
    return ret


def _range_end(subs: MmuNotifierSubscriptions, range_: MmuNotifierRange, only_end: bool) -> None:
    if subs.itree is not None:
        subs.itree.end()
    if subs.list:
        _hlist_invalidate_end(subs, range_, only_end)
    if (t := range_.mm.host.trace.mmu_notifier_end) is not None:
        t(*_trace_args(range_), range_.order, mmu_notifier_range_blockable(range_))
    _restore_cause(range_)


def _restore_cause(range_: MmuNotifierRange) -> None:
    if range_.traced:
        range_.traced = False
        range_.mm.host.stream.ctx.cause = range_.saved_cause


def _hlist_invalidate_range_start(subs: MmuNotifierSubscriptions, range_: MmuNotifierRange) -> int:
    host = range_.mm.host
    srcu = host.mmu_notifier_srcu
    task = host.sched.current
    blockable = range_.flags & MMU_NOTIFIER_RANGE_BLOCKABLE
    ret = 0
    idx = srcu.read_lock()
    walk = subs.list
    for sub in walk:
        if sub.invalidate_range_start is None:
            continue
        if not blockable:
            task.no_preempt += 1
        one = sub.invalidate_range_start(range_)
        if not blockable:
            task.no_preempt -= 1
        if one:
            ends_too = host.profile.refused_start_ends_others and sub.invalidate_range_end is not None
            if blockable or one != -EAGAIN or ends_too:
                raise BrokenTruth(
                    "notifier-start-refused",
                    f"{type(sub).__name__} answered {one} to {range_!r}; only a notifier without "
                    "invalidate_range_end may refuse, with -EAGAIN, what is not blockable",
                )
            ret = one
    if ret and host.profile.refused_start_ends_others:
        for sub in walk:
            if sub.invalidate_range_end is not None:
                sub.invalidate_range_end(range_)
    srcu.read_unlock(idx)
    return ret


def _hlist_invalidate_end(subs: MmuNotifierSubscriptions, range_: MmuNotifierRange, only_end: bool) -> None:
    host = range_.mm.host
    srcu = host.mmu_notifier_srcu
    task = host.sched.current
    atomic = 0 if range_.flags & MMU_NOTIFIER_RANGE_BLOCKABLE else 1
    once_more = not only_end and host.profile.invalidate_range
    if once_more and (t := host.trace.mmu_notifier_invalidate_range) is not None:
        t(_pid(range_.mm), range_.start, range_.end)
    idx = srcu.read_lock()
    for sub in subs.list:
        if once_more and sub.invalidate_range is not None:
            sub.invalidate_range(range_.mm, range_.start, range_.end)
        if sub.invalidate_range_end is not None:
            task.no_preempt += atomic
            sub.invalidate_range_end(range_)
            task.no_preempt -= atomic
    srcu.read_unlock(idx)


# -- single callbacks ---------------------------------------------------------------------------


def _each(mm: MmStruct, subs: MmuNotifierSubscriptions, callback: str, *args: int) -> int:
    """Call every notifier that has it, inside an SRCU section; their answers or-ed."""
    srcu = mm.host.mmu_notifier_srcu
    answer = 0
    idx = srcu.read_lock()
    for sub in subs.list:
        if (call := getattr(sub, callback)) is not None:
            answer |= call(mm, *args) or 0
    srcu.read_unlock(idx)
    return answer


def mmu_notifier_clear_flush_young(mm: MmStruct, start: int, end: int) -> int:
    """Test and clear accessed in all secondary MMUs, which may flush; nonzero: some was young."""
    subs = mm.notifier_subscriptions
    if subs is None or not subs.list:
        return 0
    return _each(mm, subs, "clear_flush_young", start, end)


def mmu_notifier_clear_young(mm: MmStruct, start: int, end: int) -> int:
    """Test and clear accessed in all secondary MMUs, which need not flush."""
    subs = mm.notifier_subscriptions
    if subs is None or not subs.list:
        return 0
    return _each(mm, subs, "clear_young", start, end)


def mmu_notifier_test_young(mm: MmStruct, address: int) -> int:
    """Ask whether the address is young; the first notifier that says so ends the walk."""
    subs = mm.notifier_subscriptions
    if subs is None or not subs.list:
        return 0
    srcu = mm.host.mmu_notifier_srcu
    young = 0
    idx = srcu.read_lock()
    for sub in subs.list:
        if sub.test_young is not None:
            young = sub.test_young(mm, address)
            if young:
                break
    srcu.read_unlock(idx)
    return young


def mmu_notifier_arch_invalidate_secondary_tlbs(mm: MmStruct, start: int, end: int) -> None:
    """Called with each flush of the primary TLB, for secondary TLBs that walk the CPU's tables."""
    subs = mm.notifier_subscriptions
    if subs is not None and subs.list:
        _each(mm, subs, "arch_invalidate_secondary_tlbs", start, end)


def mmu_notifier_invalidate_range(mm: MmStruct, start: int, end: int) -> None:
    """Inside a bracket, under the page-table lock, where an entry was cleared and perhaps flushed."""
    subs = mm.notifier_subscriptions
    if subs is None or not subs.list or not mm.host.profile.invalidate_range:
        return
    if (t := mm.host.trace.mmu_notifier_invalidate_range) is not None:
        t(_pid(mm), start, end)
    _each(mm, subs, "invalidate_range", start, end)


def mmu_notifier_change_pte(mm: MmStruct, address: int, pte: int) -> None:
    """set_pte_at_notify tells the new entry before it sets it."""
    subs = mm.notifier_subscriptions
    if subs is None or not subs.list or not mm.host.profile.change_pte:
        return
    if (t := mm.host.trace.mmu_notifier_change_pte) is not None:
        t(_pid(mm), address, pte)
    _each(mm, subs, "change_pte", address, pte)
