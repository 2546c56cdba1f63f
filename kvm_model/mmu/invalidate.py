"""The invalidation protocol between notifiers and faults: count, sequence, range, and the retry check.

Source of truth: virt/kvm/kvm_main.c: kvm_mmu_invalidate_begin, kvm_mmu_invalidate_range_add,
kvm_mmu_invalidate_end; include/linux/kvm_host.h: mmu_invalidate_retry_gfn(_unsafe); Linux 6.18.

A fault reads the sequence, asks GUP, takes mmu_lock and asks here whether its answer may be stale: yes
while a bracket is open whose range holds the gfn, and yes if any bracket closed since.

Not modelled: memory barriers (each statement here is atomic and in order).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = [
    "INVALID_GPA", "TRACEPOINTS", "kvm_mmu_invalidate_begin", "kvm_mmu_invalidate_end",
    "kvm_mmu_invalidate_range_add", "mmu_invalidate_retry_gfn", "mmu_invalidate_retry_gfn_unsafe",
]

INVALID_GPA = (1 << 64) - 1


def _fmt(in_progress: int, seq: int, start: int, end: int) -> str:
    span = "-" if start == INVALID_GPA else f"{start:x} -- {end:x}"
    return f"in_progress {in_progress} seq {seq} range {span}"


_FIELDS = ("in_progress", "seq", "range_start", "range_end")
MMU_INVALIDATE_BEGIN = Tracepoint(
    "refault", "mmu_invalidate_begin", _FIELDS, _fmt,
    doc="A range (of gfns) joined the invalidations in progress; the numbers are those after it.",
)
MMU_INVALIDATE_END = Tracepoint(
    "refault", "mmu_invalidate_end", _FIELDS, _fmt,
    doc="An invalidation ended; the numbers are those after it.",
)
TRACEPOINTS = (MMU_INVALIDATE_BEGIN, MMU_INVALIDATE_END)


def kvm_mmu_invalidate_begin(kvm: Kvm) -> None:
    """One more invalidation in progress, mmu_lock held for write. Its range must be added before unlock."""
    kvm.mmu_invalidate_in_progress += 1
    if kvm.truths is not None:
        kvm.truths.note_begin()
    if kvm.mmu_invalidate_in_progress == 1:
        kvm.mmu_invalidate_range_start = INVALID_GPA
        kvm.mmu_invalidate_range_end = INVALID_GPA


def kvm_mmu_invalidate_range_add(
    kvm: Kvm, start: int, end: int, *, unmapped: bool = True, as_id: int = 0
) -> None:
    """Widen the range of the invalidations in progress to hold [start, end), of whatever address space.

    Without `unmapped` what is mapped there stays; only nothing new may be mapped.
    """
    if kvm.mmu_invalidate_range_start == INVALID_GPA or "no-range-union" in kvm.breaks:
        kvm.mmu_invalidate_range_start = start
        kvm.mmu_invalidate_range_end = end
    else:
        kvm.mmu_invalidate_range_start = min(kvm.mmu_invalidate_range_start, start)
        kvm.mmu_invalidate_range_end = max(kvm.mmu_invalidate_range_end, end)
    if unmapped and kvm.truths is not None:
        kvm.truths.note_range(as_id, start, end)
    if (t := kvm.trace.mmu_invalidate_begin) is not None:
        t(
            kvm.mmu_invalidate_in_progress, kvm.mmu_invalidate_seq, kvm.mmu_invalidate_range_start,
            kvm.mmu_invalidate_range_end,
        )


def kvm_mmu_invalidate_end(kvm: Kvm) -> None:
    """One invalidation less, mmu_lock held for write: first the sequence moves, then the count."""
    sched = kvm.sched
    if "seq-before-count" in kvm.breaks:
        kvm.mmu_invalidate_in_progress -= 1
        if sched.preempt:
            sched.race("invalidate-end")
        kvm.mmu_invalidate_seq += 1
    else:
        kvm.mmu_invalidate_seq += 1
        if sched.preempt:
            sched.race("invalidate-end")
        kvm.mmu_invalidate_in_progress -= 1
    if kvm.mmu_invalidate_in_progress < 0:
        raise BrokenTruth(
            "bracket-balance", "mmu_invalidate_in_progress went below zero", kvm.stream.here()
        )
    if (t := kvm.trace.mmu_invalidate_end) is not None:
        t(
            kvm.mmu_invalidate_in_progress, kvm.mmu_invalidate_seq, kvm.mmu_invalidate_range_start,
            kvm.mmu_invalidate_range_end,
        )


def mmu_invalidate_retry_gfn(kvm: Kvm, mmu_seq: int, gfn: int) -> bool:
    """Whether what GUP said of `gfn` since `mmu_seq` may be stale; mmu_lock must be held."""
    if kvm.mmu_invalidate_in_progress and (
        kvm.profile.retry_scope == "any"
        or kvm.mmu_invalidate_range_start <= gfn < kvm.mmu_invalidate_range_end
    ):
        return True
    return kvm.mmu_invalidate_seq != mmu_seq


def mmu_invalidate_retry_gfn_unsafe(kvm: Kvm, mmu_seq: int, gfn: int) -> bool:
    """The same without mmu_lock: wrong answers both ways are possible and harmless.

    The count is read before the sequence, which range_end writes in the other order.
    """
    in_progress = kvm.mmu_invalidate_in_progress
    if kvm.sched.preempt:
        kvm.sched.point("seq")
    if in_progress and kvm.mmu_invalidate_range_start <= gfn < kvm.mmu_invalidate_range_end:
        return True
    return kvm.mmu_invalidate_seq != mmu_seq
