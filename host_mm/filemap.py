"""The folio lock and writeback bits, and waiting for them.

Source of truth: mm/filemap.c: folio_wait_bit_common, folio_unlock, __folio_lock_or_retry,
folio_end_writeback; include/linux/pagemap.h: folio_trylock, folio_lock (Linux 6.18).

Whoever holds PG_locked may change what the folio is (swap cache membership, mapping, uptodate).
PG_writeback says that the bytes are on their way to the swap file. The lock belongs to nobody:
reads of the swap file unlock it from their completion. Waiters hang on `host.folio_waitqueues`, by
pfn; the queue exists only while somebody waits.

Not modelled: killable waits (no signals), per-VMA locks, lock stealing limits of folio_wait_bit_common. The
page cache is in filemap_cache.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import WaitQueue
from host_mm.mm_types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_RETRY_NOWAIT,
    FAULT_FLAG_TRIED,
    VM_FAULT_RETRY,
)
from host_mm.page import PG_locked, PG_reclaim, PG_writeback, get_page, put_page

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmFault

__all__ = [
    "folio_end_writeback",
    "folio_lock",
    "folio_lock_or_retry",
    "folio_start_writeback",
    "folio_trylock",
    "folio_unlock",
    "folio_wait_locked",
    "folio_wait_unlock",
    "folio_wait_writeback",
]


def _wait(host: HostMm, pfn: int, name: str) -> None:
    queue = host.folio_waitqueues.get(pfn)
    if queue is None:
        queue = host.folio_waitqueues[pfn] = WaitQueue(host.sched, name)
    queue.wait()


def _wake(host: HostMm, pfn: int) -> None:
    queue = host.folio_waitqueues.pop(pfn, None)
    if queue is not None:
        queue.wake_all()


def folio_trylock(host: HostMm, pfn: int) -> bool:
    """Take PG_locked if it is free."""
    flags = host.pages.flags
    if flags[pfn] & PG_locked:
        return False
    flags[pfn] |= PG_locked
    return True


def folio_lock(host: HostMm, pfn: int) -> None:
    """Take PG_locked; the caller holds a reference and may sleep."""
    sched = host.sched
    if sched.preempt:
        sched.point("lock")
    flags = host.pages.flags
    while flags[pfn] & PG_locked:
        _wait(host, pfn, "folio_lock")
    flags[pfn] |= PG_locked


def folio_unlock(host: HostMm, pfn: int) -> None:
    """Give PG_locked back and wake who waits. Also from I/O completion."""
    flags = host.pages.flags
    if not flags[pfn] & PG_locked:
        raise BrokenTruth(
            "folio-lock", f"folio_unlock of pfn {pfn:#x}, which is not locked", host.stream.here()
        )
    flags[pfn] &= ~PG_locked
    if pfn in host.folio_waitqueues:
        _wake(host, pfn)
    sched = host.sched
    if sched.preempt:
        sched.point("unlock")


def folio_wait_locked(host: HostMm, pfn: int) -> None:
    """Sleep until the folio is unlocked; the caller holds a reference."""
    flags = host.pages.flags
    while flags[pfn] & PG_locked:
        _wait(host, pfn, "folio_lock")


def folio_wait_unlock(host: HostMm, pfn: int) -> None:
    """migration_entry_wait_on_locked: sleep until the next unlock. No reference is held or needed."""
    if host.pages.flags[pfn] & PG_locked:
        _wait(host, pfn, "migration_entry")


def folio_lock_or_retry(host: HostMm, pfn: int, vmf: VmFault) -> int:
    """Lock the folio in a fault. 0: locked. VM_FAULT_RETRY: not locked.

    On a first try that may be retried, mmap_lock is dropped and the folio waited for; with
    FAULT_FLAG_RETRY_NOWAIT nothing is waited for and mmap_lock stays held.
    """
    if folio_trylock(host, pfn):
        return 0
    flags = vmf.flags
    if flags & FAULT_FLAG_ALLOW_RETRY and not flags & FAULT_FLAG_TRIED:
        if flags & FAULT_FLAG_RETRY_NOWAIT:
            return VM_FAULT_RETRY
        vmf.mm.mmap_lock.read_unlock()
        folio_wait_locked(host, pfn)
        return VM_FAULT_RETRY
    folio_lock(host, pfn)
    return 0


def folio_start_writeback(host: HostMm, pfn: int) -> None:
    """The bytes go out from now on; the folio is locked."""
    flags = host.pages.flags
    if flags[pfn] & PG_writeback:
        raise BrokenTruth("folio-writeback", f"pfn {pfn:#x} is under writeback already", host.stream.here())
    flags[pfn] |= PG_writeback


def folio_end_writeback(host: HostMm, pfn: int) -> None:
    """The bytes are out. A folio marked for reclaim goes to the tail of its list."""
    flags = host.pages.flags
    if not flags[pfn] & PG_writeback:
        raise BrokenTruth(
            "folio-writeback", f"pfn {pfn:#x} ends a writeback that did not start", host.stream.here()
        )
    get_page(host, pfn)
    if flags[pfn] & PG_reclaim:
        flags[pfn] &= ~PG_reclaim
        host.lru.folio_rotate_reclaimable(pfn)
    flags[pfn] &= ~PG_writeback
    if pfn in host.folio_waitqueues:
        _wake(host, pfn)
    put_page(host, pfn)


def folio_wait_writeback(host: HostMm, pfn: int) -> None:
    """Sleep until the folio is not under writeback; the caller holds a reference."""
    flags = host.pages.flags
    while flags[pfn] & PG_writeback:
        _wait(host, pfn, "folio_writeback")
