"""A process that runs on an EPT of its own, filled by faults: a user of mmu notifiers that is not KVM.

Source: Dune (kern/ept.c: vmx_do_ept_fault, ept_set_epte, ept_clear_epte, ept_mmu_notifier_*), a kernel
module that puts a process into VMX non-root mode. The retry protocol that it lacks is KVM's, and is as
virt/kvm/kvm_main.c of Linux 5.10 has it (mmu_notifier_count, mmu_notifier_seq).

The EPT is a shadow of the process's own page tables: an access that misses asks get_user_pages for the page
and enters it; a bracket's start takes the entries of its range out. GUP for a write may break COW, whose
bracket's start then hits the very entry that is being filled: the count has moved, so the answer of this
GUP is thrown away and the next one, which breaks nothing, is entered.

An entry holds a reference to its page, as Dune's do. That keeps the frame from being freed and nothing
else: without the retry, what a bracket should have taken out is entered behind its back, and the process
and its own system calls see two memories.

    break dune-no-retry     enter what GUP answered without asking whether a bracket came in between

Not modelled: instructions in non-root mode (`load` and `store` are the accesses), the module's map of
three windows of the address space onto guest-physical addresses (they are equal here), huge entries,
INVEPT and a TLB (every access walks the EPT), PFNMAP areas, change_pte's refill under Linux 5.10.
"""

from __future__ import annotations

from errno import EFAULT, ENOMEM
from typing import TYPE_CHECKING

from emu.cpu.walk import OK, ept_translate
from host_mm.gup import FOLL_WRITE, get_user_page_fast_only, get_user_pages_unlocked
from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import Spinlock
from host_mm.mmu_notifier import MmuNotifier
from host_mm.mmu_notifier_register import mmu_notifier_register, mmu_notifier_unregister
from host_mm.page import page_folio, put_page, set_page_dirty
from host_mm.page_alloc import GFP_KERNEL, GFP_ZERO
from host_mm.tlb import HostTlb
from kvm_model.vmx.ept import (
    EPT_ACCESSED,
    EPT_ADDR_MASK,
    EPT_DIRTY,
    EPT_EXECUTABLE,
    EPT_IPAT,
    EPT_MEMTYPE_SHIFT,
    EPT_MT_WB,
    EPT_READABLE,
    EPT_RWX_MASK,
    EPT_WRITABLE,
    ept_index,
    make_eptp,
)
from kvm_model.vmx.exits import EPT_ACC_READ, EPT_ACC_WRITE
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from host_mm.mmu_notifier import MmuNotifierRange
    from host_mm.process import Process

__all__ = ["TRACEPOINTS", "Dune"]

DUNE_EPT_FAULT = Tracepoint(
    "refault", "dune_ept_fault", ("address", "write"),
    lambda address, write: f"{address:#x} {'write' if write else 'read'}",
    scope=True, doc="A process on an EPT of its own misses an entry of it.",
)
DUNE_MAP = Tracepoint(
    "refault", "dune_map", ("address", "pfn", "writable", "seq"),
    lambda address, pfn, writable, seq: f"{address:#x} pfn {pfn:#x} {'rw' if writable else 'r-'} seq {seq}",
    doc="... and gets it.",
)
DUNE_RETRY = Tracepoint(
    "refault", "dune_retry", ("address", "seq", "now", "count"),
    lambda address, seq, now, count: f"{address:#x} seq {seq} now {now} count {count}",
    doc="... or not: a bracket came in between, and what get_user_pages said is thrown away.",
)
DUNE_DROP = Tracepoint(
    "refault", "dune_drop", ("start", "end", "pages"),
    lambda start, end, pages: f"{start:#x} -- {end:#x} {pages} entries",
    doc="A bracket or an aging takes entries out of a process's own EPT.",
)
TRACEPOINTS = (DUNE_EPT_FAULT, DUNE_MAP, DUNE_RETRY, DUNE_DROP)

_TABLE = EPT_RWX_MASK
_LEAF = EPT_READABLE | EPT_EXECUTABLE | EPT_MT_WB << EPT_MEMTYPE_SHIFT | EPT_IPAT | EPT_ACCESSED


class Dune(MmuNotifier):
    """One process in Dune mode, until its exit. `mapped` repeats the leaves by address, for the truths."""

    def __init__(self, process: Process) -> None:
        """vmx_create_ept. KernelError(ENOMEM)."""
        host = process.host
        self.process = process
        self.host = host
        self.owning_mm = process.mm
        self.trace = host.stream.bind(TRACEPOINTS)
        self.ept_lock = Spinlock(host.sched, "ept_lock")
        self.mmu_notifier_count = 0
        self.mmu_notifier_seq = 0
        self.mapped = HostTlb()
        self.tables: dict[int, int] = {}
        self.root = self._table()
        self.eptp = make_eptp(self.root << 12, True)
        host.frame_holders.append(self._tables)
        host.secondary_tables.add("a process's own EPT", self.owning_mm, self.mapped)
        mmu_notifier_register(self, self.owning_mm)

    def close(self) -> None:
        """vmx_destroy_ept."""
        mmu_notifier_unregister(self, self.owning_mm)
        self._drop(0, 1 << 48)
        host = self.host
        host.secondary_tables.remove(self.mapped)
        host.frame_holders.remove(self._tables)
        for pfn in self.tables:
            put_page(host, pfn)
        self.tables.clear()

    # -- the EPT ------------------------------------------------------------------------------

    def _tables(self) -> dict[int, int]:
        return self.tables

    def _table(self) -> int:
        pfn = self.host.allocator.alloc_pages(GFP_KERNEL | GFP_ZERO)
        if pfn < 0:
            raise KernelError(ENOMEM, "no frame for an EPT table")
        self.tables[pfn] = 1
        return pfn

    def _lookup_gpa(self, gpa: int, *, create: bool) -> int:
        """ept_lookup_gpa: index in RAM of the leaf entry, -1 where a table is missing. `create` may sleep."""
        u64 = self.host.ram.u64
        table = self.root
        for level in (4, 3, 2):
            at = (table << 9) + ept_index(gpa, level)
            if not u64[at] & EPT_RWX_MASK:
                if not create:
                    return -1
                new = self._table()
                if not u64[at] & EPT_RWX_MASK:
                    u64[at] = new << 12 | _TABLE
                else:
                    del self.tables[new]
                    put_page(self.host, new)
            table = (u64[at] & EPT_ADDR_MASK) >> 12
        return (table << 9) + ept_index(gpa, 1)

    def _clear_epte(self, address: int, at: int) -> None:
        """ept_clear_epte: the entry goes, and its reference with it; ept_lock is held."""
        host = self.host
        entry = host.ram.u64[at]
        pfn = (entry & EPT_ADDR_MASK) >> 12
        host.ram.u64[at] = 0
        self.mapped.drop(address >> 12)
        host.held[page_folio(host.pages, pfn)] -= 1
        if entry & EPT_WRITABLE:
            set_page_dirty(host, pfn)
        put_page(host, pfn)

    def _drop(self, start: int, end: int) -> int:
        """Clear the entries of [start, end), under ept_lock; how many."""
        gone = self.mapped.known_in(start, end)
        for vpn in gone:
            self._clear_epte(vpn << 12, self._lookup_gpa(vpn << 12, create=False))
        if gone and (t := self.trace.dune_drop) is not None:
            t(start, end, len(gone))
        return len(gone)

    # -- notifier -----------------------------------------------------------------------------

    def invalidate_range_start(self, range_: MmuNotifierRange) -> int:
        """ept_mmu_notifier_invalidate_range_start, with the count that Dune lacks."""
        with self.ept_lock:
            self.mmu_notifier_count += 1
            self._drop(range_.start, range_.end)
        return 0

    def invalidate_range_end(self, range_: MmuNotifierRange) -> None:
        """The sequence moves before the count: whoever reads them in the other order misses neither."""
        with self.ept_lock:
            self.mmu_notifier_seq += 1
            self.mmu_notifier_count -= 1

    def release(self, mm: MmStruct) -> None:
        """The address space goes away, and no bracket will tell of it."""
        with self.ept_lock:
            self._drop(0, 1 << 48)

    def clear_flush_young(self, mm: MmStruct, start: int, end: int) -> int:
        """ept_mmu_notifier_clear_flush_young: what is in the EPT was used; out with it."""
        with self.ept_lock:
            return int(self._drop(start, end) > 0)

    def test_young(self, mm: MmStruct, address: int) -> int:
        """Whether it is in the EPT."""
        return int(address >> 12 in self.mapped.entries)

    # -- faults -------------------------------------------------------------------------------

    def _ept_fault(self, address: int, *, write: bool) -> None:
        """vmx_do_ept_fault: enter the page, or nothing if a bracket came in between. KernelError(EFAULT)."""
        host = self.host
        ctx = host.stream.ctx
        saved = ctx.cause
        if (t := self.trace.dune_ept_fault) is not None:
            ctx.cause = t(address & ~0xFFF, write)
        try:
            at = self._lookup_gpa(address, create=True)
            seq = self.mmu_notifier_seq
            if host.sched.preempt:
                host.sched.point("seq")
            pfn = self._get_user_pages_fast(address, FOLL_WRITE if write else 0)
            with self.ept_lock:
                self._set_epte(address & ~0xFFF, at, pfn, write, seq)
        finally:
            ctx.cause = saved

    def _get_user_pages_fast(self, address: int, flags: int) -> int:
        mm = self.owning_mm
        pfn = get_user_page_fast_only(mm, address, flags)
        if pfn < 0:
            pfn = get_user_pages_unlocked(mm, address, flags)
        if pfn < 0:
            raise KernelError(EFAULT, f"{address:#x}: get_user_pages says {pfn}")
        return pfn

    def _set_epte(self, address: int, at: int, pfn: int, write: bool, seq: int) -> None:
        """ept_set_epte's second half, under ept_lock; the reference is the entry's from here on."""
        host = self.host
        stale = bool(self.mmu_notifier_count) or self.mmu_notifier_seq != seq
        if stale and "dune-no-retry" not in host.breaks:
            if (t := self.trace.dune_retry) is not None:
                t(address, seq, self.mmu_notifier_seq, self.mmu_notifier_count)
            put_page(host, pfn)
            return
        if host.checks is not None:
            host.checks.translation_published("a process's own EPT", self.owning_mm, address, pfn, write)
        if host.ram.u64[at] & EPT_RWX_MASK:
            self._clear_epte(address, at)
        rights = EPT_WRITABLE | EPT_DIRTY if write else 0
        host.ram.u64[at] = pfn << 12 | _LEAF | rights
        host.held[page_folio(host.pages, pfn)] += 1
        self.mapped.fill(address, pfn, write)
        if (t := self.trace.dune_map) is not None:
            t(address, pfn, write, seq)

    # -- the process --------------------------------------------------------------------------

    def _translate(self, address: int, access: int) -> int:
        ram = self.host.ram
        while True:
            status, hpa, _, _ = ept_translate(ram.i64, ram.nr_frames, self.eptp, 0, address, access)
            if status == OK:
                return hpa
            self._ept_fault(address, write=access == EPT_ACC_WRITE)
            self.host.sched.yield_()

    def load(self, address: int, length: int) -> bytes:
        """What the process reads in Dune mode, within one page. KernelError(EFAULT)."""
        return self.host.ram.read(self._translate(address, EPT_ACC_READ), length)

    def store(self, address: int, data: bytes) -> None:
        """What it writes. KernelError(EFAULT)."""
        self.host.ram.write(self._translate(address, EPT_ACC_WRITE), data)
