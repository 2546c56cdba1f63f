"""A device that mirrors part of an address space: what interval notifiers are for.

Source of truth: mm/hmm.c: hmm_range_fault, hmm_vma_walk_pmd; Documentation/mm/hmm.rst (the driver's
loop); drivers/infiniband/core/umem_odp.c as a user of it (Linux 6.18).

The device holds no page references. It may keep a translation only while no bracket covers it: it
reads the tables without their locks, takes its own lock, and publishes unless read_retry says that a
bracket came in between.

    break no-interval-retry     the device publishes without asking

Not modelled: device memory and migration to it, huge leaves, prefetch of ranges, device-private
entries; a translation carries no accessed or dirty state back.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import pte_pfn, pte_present, pte_write, walk_lockless
from host_mm.interval_notifier import (
    MmuIntervalNotifier,
    mmu_interval_check_retry,
    mmu_interval_notifier_insert,
    mmu_interval_notifier_remove,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import Mutex
from host_mm.memory import handle_mm_fault
from host_mm.mm_types import FAULT_FLAG_REMOTE, FAULT_FLAG_WRITE, VM_FAULT_ERROR, VM_READ, VM_WRITE
from host_mm.mmu_notifier import mmu_notifier_range_blockable
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from host_mm.mmu_notifier import MmuNotifierRange
    from host_mm.process import Process

__all__ = ["TRACEPOINTS", "HmmMirror", "hmm_range_fault"]

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


def hmm_range_fault(
    sub: MmuIntervalNotifier, seq: int, address: int, *, write: bool
) -> tuple[int, bool] | int:
    """One page for the device: (frame, writable), faulted in as needed; or a negative errno.

    -EBUSY: a bracket came in between, begin again. mmap_lock is held for reading.
    """
    mm = sub.mm
    assert mm is not None
    vma = mm.vma_lookup(address)
    if vma is None or not vma.flags & (VM_WRITE if write else VM_READ):
        return -EFAULT
    while True:
        if mmu_interval_check_retry(sub, seq):
            return -EBUSY
        entry, level = walk_lockless(mm.host.ram, mm.pgd, address)
        if level == 1 and pte_present(entry) and (pte_write(entry) or not write):
            return pte_pfn(entry), pte_write(entry)
        ret = handle_mm_fault(vma, address, FAULT_FLAG_REMOTE | (FAULT_FLAG_WRITE if write else 0))
        if ret & VM_FAULT_ERROR:
            return -EFAULT


class HmmMirror(MmuIntervalNotifier):
    """A device's translations of [start, start + length) of a process: vpn -> pfn << 1 | writable."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process
        self.host = process.host
        self.lock = Mutex(process.host.sched, "hmm_mirror")
        self.sptes: dict[int, int] = {}

    def open(self, start: int, length: int) -> None:
        """Begin to watch. KernelError for a bad range."""
        ret = mmu_interval_notifier_insert(self, self.process.mm, start, length)
        if ret:
            raise KernelError(-ret, f"cannot watch {start:#x}+{length:#x}")

    def close(self) -> None:
        """Drop everything and stop watching."""
        with self.lock:
            self.sptes.clear()
        mmu_interval_notifier_remove(self)

    def invalidate(self, range_: MmuNotifierRange, cur_seq: int) -> bool:
        """Drop what the bracket covers, whatever its event."""
        if mmu_notifier_range_blockable(range_):
            self.lock.lock()
        elif not self.lock.trylock():
            return False
        mmu_interval_set_seq(self, cur_seq)
        first, last = range_.start >> 12, (range_.end - 1) >> 12
        gone = [vpn for vpn in self.sptes if first <= vpn <= last]
        for vpn in gone:
            del self.sptes[vpn]
        if gone and (t := self.host.trace.mirror_unmap) is not None:
            t(range_.start, range_.end, len(gone))
        self.lock.unlock()
        return True

    def access(self, address: int, *, write: bool) -> int:
        """The device's translation of `address`, made if missing. KernelError(EFAULT)."""
        spte = self.sptes.get(address >> 12)
        while spte is None or (write and not spte & 1):
            spte = self._fault(self.process.mm, address, write)
        return spte >> 1

    def _fault(self, mm: MmStruct, address: int, write: bool) -> int | None:
        """The driver's loop, once: the published translation, or None to begin again."""
        host = self.host
        seq = mmu_interval_read_begin(self)
        mm.mmap_lock.read_lock()
        found = hmm_range_fault(self, seq, address, write=write)
        mm.mmap_lock.read_unlock()
        if isinstance(found, int):
            if found == -EBUSY:
                return None
            raise KernelError(-found, f"the device cannot reach {address:#x}")
        with self.lock:
            if "no-interval-retry" not in host.breaks and mmu_interval_read_retry(self, seq):
                return None
            if host.checks is not None:
                host.checks.interval_published(self, seq)
            pfn, writable = found
            spte = pfn << 1 | writable
            self.sptes[address >> 12] = spte
            if (t := host.trace.mirror_map) is not None:
                t(address & ~0xFFF, pfn, writable, seq)
            return spte
