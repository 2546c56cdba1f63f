"""What a bracket is made of: events, order classes, the range, the notifier and its subscriptions.

Source of truth: include/linux/mmu_notifier.h, mm/mmu_notifier.c: struct mmu_notifier_subscriptions
(Linux 6.18). How they are dispatched is in mmu_notifier.py, which gives all of this on.

Not modelled: the lock-free publication of the list (it is replaced as a whole).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from host_mm.kernel.locks import Spinlock
from host_mm.kernel.sched import WaitQueue
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = [
    "EVENT_NAMES", "MMU_NOTIFIER_RANGE_BLOCKABLE", "MMU_NOTIFY_CLEAR", "MMU_NOTIFY_EXCLUSIVE",
    "MMU_NOTIFY_MIGRATE", "MMU_NOTIFY_PROTECTION_PAGE", "MMU_NOTIFY_PROTECTION_VMA",
    "MMU_NOTIFY_RELEASE", "MMU_NOTIFY_SOFT_DIRTY", "MMU_NOTIFY_UNMAP", "ORDER_AFTER_END",
    "ORDER_BATCHED", "ORDER_GATHER", "ORDER_UNDER_PTL", "TRACEPOINTS", "IntervalTree", "MmuNotifier",
    "MmuNotifierRange", "MmuNotifierSubscriptions",
]

# enum mmu_notifier_event
MMU_NOTIFY_UNMAP = 0
MMU_NOTIFY_CLEAR = 1
MMU_NOTIFY_PROTECTION_VMA = 2
MMU_NOTIFY_PROTECTION_PAGE = 3
MMU_NOTIFY_SOFT_DIRTY = 4
MMU_NOTIFY_RELEASE = 5
MMU_NOTIFY_MIGRATE = 6
MMU_NOTIFY_EXCLUSIVE = 7

EVENT_NAMES = (
    "unmap", "clear", "protection-vma", "protection-page", "soft-dirty", "release", "migrate", "exclusive",
)
"""Names of the events by value, as traces print them."""

MMU_NOTIFIER_RANGE_BLOCKABLE = 1

ORDER_UNDER_PTL = 1
"""The primary TLB is flushed inside the bracket, under the page-table lock."""
ORDER_BATCHED = 2
"""Flush deferred: one batched flush after the bracket, before the page is freed or written."""
ORDER_GATHER = 3
"""mmu_gather: batches may be flushed and freed inside the bracket, the rest after it."""
ORDER_AFTER_END = 4
"""Entries lose rights inside the bracket, the flush follows its end."""


def _fmt_bracket(pid: int, event: str, start: int, end: int, order: int, blockable: bool) -> str:
    tail = "" if blockable else " nonblock"
    return f"pid {pid} {event} {start:#x} -- {end:#x} order {order}{tail}"


MMU_NOTIFIER_START = Tracepoint(
    "refault", "mmu_notifier_start", ("pid", "event", "start", "end", "order", "blockable"), _fmt_bracket,
    scope=True, doc="A bracket opens: secondary MMUs drop the range and may not map it until the end.",
)
MMU_NOTIFIER_END = Tracepoint(
    "refault", "mmu_notifier_end", ("pid", "event", "start", "end", "order", "blockable"), _fmt_bracket,
    doc="A bracket closes; its cause is the start.",
)
MMU_NOTIFIER_AGAIN = Tracepoint(
    "refault", "mmu_notifier_again", ("pid", "event", "start", "end"),
    lambda pid, event, start, end: f"pid {pid} {event} {start:#x} -- {end:#x}",
    doc="A non-blockable start was refused; there will be no end.",
)
MMU_NOTIFIER_CHANGE_PTE = Tracepoint(
    "refault", "mmu_notifier_change_pte", ("pid", "address", "pte"),
    lambda pid, address, pte: f"pid {pid} {address:#x} pte {pte:#x}",
    doc="Linux 5.10: notifiers are told the entry that is about to be set.",
)
MMU_NOTIFIER_INVALIDATE_RANGE = Tracepoint(
    "refault", "mmu_notifier_invalidate_range", ("pid", "start", "end"),
    lambda pid, start, end: f"pid {pid} {start:#x} -- {end:#x}",
    doc="Linux 5.10: who shares the CPU's page tables drops a range; a bracket's end does it again.",
)

TRACEPOINTS = (
    MMU_NOTIFIER_START, MMU_NOTIFIER_END, MMU_NOTIFIER_AGAIN, MMU_NOTIFIER_CHANGE_PTE,
    MMU_NOTIFIER_INVALIDATE_RANGE,
)


class MmuNotifierRange:
    """struct mmu_notifier_range. `order` is the class of ordering between PTEs, flush and bracket."""

    __slots__ = ("end", "event", "flags", "mm", "order", "owner", "saved_cause", "start", "traced")

    def __init__(
        self, event: int, mm: MmStruct, start: int, end: int, order: int, flags: int, owner: Any
    ) -> None:
        self.event = event
        self.mm = mm
        self.start = start
        self.end = end
        self.order = order
        self.flags = flags
        self.owner = owner
        self.saved_cause: int | None = None
        self.traced = False

    def __repr__(self) -> str:
        return f"<MmuNotifierRange {EVENT_NAMES[self.event]} {self.start:#x} -- {self.end:#x}>"


class MmuNotifier:
    """struct mmu_notifier with its ops: a subclass defines the callbacks it has, the rest stay None.

    The ops of a get/put notifier are its class, which then must have alloc_notifier (a class
    method taking the mm) and may have free_notifier.
    """

    release: Callable[[MmStruct], None] | None = None
    clear_flush_young: Callable[[MmStruct, int, int], int] | None = None
    clear_young: Callable[[MmStruct, int, int], int] | None = None
    test_young: Callable[[MmStruct, int], int] | None = None
    change_pte: Callable[[MmStruct, int, int], None] | None = None
    invalidate_range_start: Callable[[MmuNotifierRange], int] | None = None
    invalidate_range_end: Callable[[MmuNotifierRange], None] | None = None
    invalidate_range: Callable[[MmStruct, int, int], None] | None = None
    arch_invalidate_secondary_tlbs: Callable[[MmStruct, int, int], None] | None = None
    alloc_notifier: Callable[[MmStruct], MmuNotifier] | None = None
    free_notifier: Callable[[], None] | None = None

    mm: MmStruct | None = None
    users = 0
    hashed = False


class IntervalTree(Protocol):
    """What dispatch asks of interval_notifier.py; made by the first mmu_interval_notifier_insert."""

    def invalidate(self, range_: MmuNotifierRange) -> int:
        """mn_itree_invalidate."""

    def end(self) -> None:
        """mn_itree_inv_end."""

    def release(self, mm: MmStruct) -> None:
        """mn_itree_release."""


class MmuNotifierSubscriptions:
    """struct mmu_notifier_subscriptions: what is registered with one mm.

    `list` is replaced, never changed in place, so that a walk under SRCU sees one state of it.
    """

    __slots__ = ("active_invalidate_ranges", "invalidate_seq", "itree", "list", "lock", "wq")

    def __init__(self, mm: MmStruct) -> None:
        sched = mm.host.sched
        self.list: tuple[MmuNotifier, ...] = ()
        self.lock = Spinlock(sched, "notifier_subscriptions_lock")
        self.itree: IntervalTree | None = None
        self.invalidate_seq = 2
        self.active_invalidate_ranges = 0
        self.wq = WaitQueue(sched, "mmu_interval")
