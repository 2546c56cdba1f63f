"""A device that mirrors part of an address space: what interval notifiers are for.

Source of truth: Documentation/mm/hmm.rst (the driver's loop), lib/test_hmm.c: dmirror_range_fault,
dmirror_interval_invalidate (Linux 6.18).

The device holds no page references. It may keep a translation only while no bracket covers it: it
reads the tables without their locks, takes its own lock, and publishes unless read_retry says that a
bracket came in between.

    break no-interval-retry     the device publishes without asking

Not modelled: huge translations, prefetch; a translation carries no accessed or dirty state back.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, ETIMEDOUT
from typing import TYPE_CHECKING, Any

from host_mm.hmm import (
    HMM_PFN_FLAGS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_WRITE,
    HMM_RANGE_DEFAULT_TIMEOUT,
    HmmRange,
    hmm_range_fault,
)
from host_mm.interval_notifier import (
    MmuIntervalNotifier,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import Mutex
from host_mm.mmu_notifier import mmu_notifier_range_blockable
from host_mm.tlb import HostTlb
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mmu_notifier import MmuNotifierRange
    from host_mm.process import Process

__all__ = ["TRACEPOINTS", "HmmMirror"]

MIRROR_MAP = Tracepoint(
    "refault", "mirror_map", ("address", "pfn", "writable", "seq"),
    lambda address, pfn, writable, seq: (
        f"{address:#x} pfn {pfn:#x} {'rw' if writable else 'r-'} seq {seq}"
    ),
    doc="A mirroring device publishes a translation.",
)
MIRROR_UNMAP = Tracepoint(
    "refault", "mirror_unmap", ("start", "end", "count"),
    lambda start, end, count: f"{start:#x} -- {end:#x} {count} translations",
    doc="A mirroring device drops what a bracket covers.",
)
TRACEPOINTS = (MIRROR_MAP, MIRROR_UNMAP)


class HmmMirror(MmuIntervalNotifier):
    """A device's translations of [start, start + length) of a process, in `table`.

    `dev_private_owner`: whose device-private pages it can reach. A device that leaves brackets of its own
    out of `invalidate` must move `own_seq`, under the lock, where it drops what they cover.
    """

    who = "a mirroring device"

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.host = process.host
        self.lock = Mutex(process.host.sched, "hmm_mirror")
        self.table = HostTlb()
        self.dev_private_owner: Any = None
        self.own_seq = 0

    def open(self, start: int, length: int) -> None:
        """Begin to watch. KernelError for a bad range."""
        ret = mmu_interval_notifier_insert(self, self.process.mm, start, length)
        if ret:
            raise KernelError(-ret, f"cannot watch {start:#x}+{length:#x}")
        self.host.secondary_tables.add(self.who, self.process.mm, self.table)

    def close(self) -> None:
        """Drop everything and stop watching."""
        with self.lock:
            self.table.clear()
        mmu_interval_notifier_remove(self)
        self.host.secondary_tables.remove(self.table)

    def invalidate(self, range_: MmuNotifierRange, cur_seq: int) -> bool:
        """Drop what the bracket covers, whatever its event."""
        if mmu_notifier_range_blockable(range_):
            self.lock.lock()
        elif not self.lock.trylock():
            return False
        mmu_interval_set_seq(self, cur_seq)
        self.drop(range_.start, range_.end)
        self.lock.unlock()
        return True

    def drop(self, start: int, end: int) -> None:
        """Forget what lies in [start, end); the lock is held."""
        gone = self.table.drop_range(start, end)
        if gone and (t := self.host.trace.mirror_unmap) is not None:
            t(start, end, gone)

    def access(self, address: int, *, write: bool) -> int:
        """The device's translation of `address`, made if missing. KernelError(EFAULT or EPERM)."""
        timeout = self.host.sched.now + HMM_RANGE_DEFAULT_TIMEOUT
        while (pfn := self.table.lookup(address, write)) < 0:
            if self.host.sched.now > timeout:
                raise KernelError(ETIMEDOUT, f"{address:#x} is invalidated all the time")
            self._fault(address & ~0xFFF, write)
        return pfn

    def make_writable(self, address: int) -> None:
        """hmm_range_fault faults no page that its caller owns: one in its own memory may come read-only."""
        raise KernelError(EFAULT, f"the device may only read {address:#x}")

    def _fault(self, address: int, write: bool) -> None:
        """The driver's loop, once: the translation is published, or it is to begin again."""
        host, mm = self.host, self.process.mm
        range_ = HmmRange(
            self, address, address + 4096, default_flags=HMM_PFN_REQ_FAULT,
            dev_private_owner=self.dev_private_owner,
        )
        if write:
            range_.default_flags |= HMM_PFN_REQ_WRITE
        own_seq = self.own_seq
        seq = range_.notifier_seq = mmu_interval_read_begin(self)
        mm.mmap_lock.read_lock()
        ret = hmm_range_fault(range_)
        mm.mmap_lock.read_unlock()
        if ret == -EBUSY:
            return
        if ret:
            raise KernelError(-ret, f"the device cannot reach {address:#x}")
        if write and not range_.hmm_pfns[0] & HMM_PFN_WRITE:
            self.make_writable(address)
            return
        with self.lock:
            if "no-interval-retry" not in host.breaks and mmu_interval_read_retry(self, seq):
                return
            if self.own_seq != own_seq:
                return
            if host.checks is not None:
                host.checks.interval_published(self, seq)
            word = range_.hmm_pfns[0]
            pfn, writable = word & ~HMM_PFN_FLAGS, bool(word & HMM_PFN_WRITE)
            if host.checks is not None:
                host.checks.translation_published(self.who, mm, address, pfn, writable)
            self.table.fill(address, pfn, writable)
            if (t := host.trace.mirror_map) is not None:
                t(address, pfn, writable, seq)
