"""userfaultfd: contexts, faults that wait for a user task, and the messages that tell it.

Source of truth: fs/userfaultfd.c (handle_userfault, userfaultfd_must_wait, userfaultfd_ctx_read,
wake_userfault, dup_userfaultfd, mremap_userfaultfd_prep), include/linux/userfaultfd_k.h,
include/uapi/linux/userfaultfd.h; Linux 6.18. The ioctls are in userfaultfd.py.

A fault in a registered range queues a message, drops mmap_lock, sleeps until somebody resolves the page
and wakes it, and answers VM_FAULT_RETRY; it never looks at what was done, the fault is simply tried again.
Who may not wait (FAULT_FLAG_RETRY_NOWAIT) is told to retry at once and nobody is told of it; who may not
retry gets SIGBUS. Between queueing and sleeping the entry is looked at once more, so that a page that
came meanwhile is not waited for.

Not modelled: events (fork, remap, remove and unmap of a range are not told, nor can they be asked for),
FAULT_FLAG_USER only contexts, huge pages, /proc fdinfo.
"""

from __future__ import annotations

from errno import EAGAIN
from typing import TYPE_CHECKING

import msgspec

from host_mm.arch.x86.pgtable import _PAGE_UFFD_WP, pte_present, pte_write
from host_mm.arch.x86.swapops import PTE_MARKER_UFFD_WP, make_pte_marker, pte_none_mostly, pte_swp_uffd_wp_any
from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import Spinlock
from host_mm.kernel.sched import WaitQueue
from host_mm.mm_types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_RETRY_NOWAIT,
    FAULT_FLAG_WRITE,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_SHARED,
    VM_UFFD_FLAGS,
    VM_UFFD_MINOR,
    VM_UFFD_WP,
)
from host_mm.pgtable_generic import pmd_offset, pte_offset_map, set_pte
from host_mm.vma import vma_set_page_prot
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct, VmArea, VmFault

__all__ = [
    "TRACEPOINTS", "UFFD_EVENT_PAGEFAULT", "UFFD_FEATURE_EXACT_ADDRESS", "UFFD_FEATURE_SIGBUS",
    "UFFD_FEATURE_WP_ASYNC", "UFFD_FEATURE_WP_UNPOPULATED", "UFFD_PAGEFAULT_FLAG_MINOR",
    "UFFD_PAGEFAULT_FLAG_WP", "UFFD_PAGEFAULT_FLAG_WRITE", "UffdMsg", "UserfaultfdCtx", "dup_userfaultfd",
    "handle_userfault", "mremap_userfaultfd_prep", "pte_install_uffd_wp_if_needed", "userfaultfd_armed",
    "userfaultfd_ctx_read", "userfaultfd_poll", "userfaultfd_pte_wp", "userfaultfd_reset_ctx",
    "userfaultfd_set_ctx", "userfaultfd_wp_async", "userfaultfd_wp_use_markers",
    "vma_has_uffd_without_event_remap", "wake_userfault",
]

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2

UFFD_FEATURE_SIGBUS = 1 << 7
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15


def _reason(flags: int) -> str:
    what = "wp" if flags & UFFD_PAGEFAULT_FLAG_WP else "missing"
    what = "minor" if flags & UFFD_PAGEFAULT_FLAG_MINOR else what
    return f"{what} {'write' if flags & UFFD_PAGEFAULT_FLAG_WRITE else 'read'}"


USERFAULT = Tracepoint(
    "refault", "userfault", ("pid", "address", "flags"),
    lambda pid, address, flags: f"pid {pid} address {address:#x} {_reason(flags)}",
    doc="A fault is put to a userfaultfd and waits until its range is woken.",
)
USERFAULT_WAKE = Tracepoint(
    "refault", "userfault_wake", ("pid", "start", "end", "woken"),
    lambda pid, start, end, woken: f"pid {pid} {start:#x} -- {end:#x}: {woken} faults",
    doc="Faults of a range that wait for a userfaultfd are tried again.",
)
TRACEPOINTS = (USERFAULT, USERFAULT_WAKE)


class UffdMsg(msgspec.Struct, frozen=True):
    """struct uffd_msg of a page fault; `flags` are UFFD_PAGEFAULT_FLAG_*. `cause` is not Linux's: the
    trace's event that the fault is a part of."""

    event: int
    flags: int
    address: int
    cause: int | None = None


class _UserfaultWait:
    """struct userfaultfd_wait_queue: one fault that waits."""

    __slots__ = ("msg", "waken", "wq")

    def __init__(self, mm: MmStruct, msg: UffdMsg) -> None:
        self.msg = msg
        self.wq = WaitQueue(mm.host.sched, "userfault")
        self.waken = False


class UserfaultfdCtx:
    """struct userfaultfd_ctx: what an open userfaultfd of `mm` is. `features` is -1 before UFFDIO_API.

    `fault_pending` are the faults that nobody read yet, oldest first, `fault` those that were read;
    readers sleep on `fd_wqh`. The lock is that of both queues.
    """

    __slots__ = (
        "fault", "fault_pending", "fd_lock", "fd_wqh", "features", "lock", "mm", "refcount", "released",
    )

    def __init__(self, mm: MmStruct) -> None:
        sched = mm.host.sched
        self.mm = mm
        mm.mm_count += 1
        self.refcount = 1
        self.features = -1
        self.released = False
        self.fd_lock = Spinlock(sched, "fd_wqh")
        self.fd_wqh = WaitQueue(sched, "userfaultfd")
        self.lock = Spinlock(sched, "fault_pending_wqh")
        self.fault_pending: list[_UserfaultWait] = []
        self.fault: list[_UserfaultWait] = []

    def get(self) -> None:
        """userfaultfd_ctx_get."""
        self.refcount += 1

    def put(self) -> None:
        """userfaultfd_ctx_put: the last reference gives the mm back."""
        self.refcount -= 1
        if not self.refcount:
            assert not self.fault_pending
            assert not self.fault
            self.mm.mmdrop()


# -- what a VMA is registered for -----------------------------------------------------------------
def userfaultfd_armed(vma: VmArea) -> bool:
    """Whether the VMA is registered, in any mode."""
    return bool(vma.flags & VM_UFFD_FLAGS)


def userfaultfd_pte_wp(vma: VmArea, pte: int) -> bool:
    """Whether writes through this present entry are userfaultfd's business."""
    return bool(vma.flags & VM_UFFD_WP) and bool(pte & _PAGE_UFFD_WP)


def userfaultfd_wp_async(vma: VmArea) -> bool:
    """Whether a write lifts its protection by itself, without any message."""
    ctx = vma.userfaultfd_ctx
    return ctx is not None and bool(ctx.features & UFFD_FEATURE_WP_ASYNC)


def userfaultfd_wp_use_markers(vma: VmArea) -> bool:
    """Whether pages that are not there can be write-protected too."""
    if not vma.flags & VM_UFFD_WP:
        return False
    if vma.ops is not None:
        return True
    return bool(vma.userfaultfd_ctx.features & UFFD_FEATURE_WP_UNPOPULATED)


def pte_install_uffd_wp_if_needed(vma: VmArea, address: int, pte: int, old: int) -> None:
    """A file's page that leaves its entry is still to be found write-protected when it is back."""
    if vma.ops is None or not vma.flags & VM_UFFD_WP:
        return
    if old & _PAGE_UFFD_WP if pte_present(old) else pte_swp_uffd_wp_any(old):
        set_pte(vma.mm, address, pte, make_pte_marker(PTE_MARKER_UFFD_WP))


def vma_has_uffd_without_event_remap(vma: VmArea) -> bool:
    """Whether mremap takes the VMA's registration away."""
    return vma.userfaultfd_ctx is not None


def userfaultfd_set_ctx(vma: VmArea, ctx: UserfaultfdCtx | None, flags: int) -> None:
    """Register the VMA in modes VM_UFFD_*. Write-protection of a shared mapping wants write faults."""
    changed = (vma.flags ^ flags) & VM_UFFD_WP
    vma.userfaultfd_ctx = ctx
    vma.flags = (vma.flags & ~VM_UFFD_FLAGS) | flags
    if changed and vma.flags & VM_SHARED:
        vma_set_page_prot(vma)


def userfaultfd_reset_ctx(vma: VmArea) -> None:
    """The VMA is not registered any more."""
    userfaultfd_set_ctx(vma, None, 0)


def dup_userfaultfd(vma: VmArea) -> None:
    """A child's VMA is not registered: nobody asked for fork events."""
    if vma.userfaultfd_ctx is not None:
        userfaultfd_reset_ctx(vma)


def mremap_userfaultfd_prep(vma: VmArea) -> None:
    """Nor is a mapping that was moved, without remap events."""
    if vma.userfaultfd_ctx is not None:
        userfaultfd_reset_ctx(vma)


# -- a fault --------------------------------------------------------------------------------------
def handle_userfault(vmf: VmFault, reason: int) -> int:
    """Put a fault to the VMA's userfaultfd and sleep until it is woken; VM_FAULT_* bits.

    `reason` is one of VM_UFFD_*. mmap_lock is held for reading and no table is locked. VM_FAULT_RETRY:
    mmap_lock was dropped, unless the fault had FAULT_FLAG_RETRY_NOWAIT.
    """
    ctx = vmf.vma.userfaultfd_ctx
    mm = vmf.mm
    if ctx is None or ctx.features & UFFD_FEATURE_SIGBUS or not vmf.flags & FAULT_FLAG_ALLOW_RETRY:
        return VM_FAULT_SIGBUS
    if vmf.flags & FAULT_FLAG_RETRY_NOWAIT:
        return VM_FAULT_RETRY
    if ctx.released:
        # Not SIGBUS: whoever closes the userfaultfd need not unregister first. The lock goes now, or a
        # GUP that tries again and again would never let the closing task have it.
        mm.mmap_lock.read_unlock()
        return VM_FAULT_RETRY
    ctx.get()
    uwq = _UserfaultWait(mm, _message(vmf, reason, ctx.features))
    ctx.lock.lock()
    ctx.fault_pending.append(uwq)
    ctx.lock.unlock()
    must_wait = _must_wait(vmf, reason)
    mm.mmap_lock.read_unlock()
    if must_wait and not ctx.released and not uwq.waken:
        if (t := mm.host.trace.userfault) is not None:
            t(mm.process.pid, uwq.msg.address, uwq.msg.flags)
        ctx.fd_wqh.wake_all()
        uwq.wq.wait()
    if not uwq.waken:
        ctx.lock.lock()
        for queue in (ctx.fault_pending, ctx.fault):
            if uwq in queue:
                queue.remove(uwq)
        ctx.lock.unlock()
    ctx.put()
    return VM_FAULT_RETRY


def _message(vmf: VmFault, reason: int, features: int) -> UffdMsg:
    flags = UFFD_PAGEFAULT_FLAG_WRITE if vmf.flags & FAULT_FLAG_WRITE else 0
    flags |= UFFD_PAGEFAULT_FLAG_WP if reason & VM_UFFD_WP else 0
    flags |= UFFD_PAGEFAULT_FLAG_MINOR if reason & VM_UFFD_MINOR else 0
    exact = features & UFFD_FEATURE_EXACT_ADDRESS
    address = vmf.real_address if exact else vmf.address
    return UffdMsg(UFFD_EVENT_PAGEFAULT, flags, address, vmf.mm.host.stream.ctx.cause)


def _must_wait(vmf: VmFault, reason: int) -> bool:
    """userfaultfd_must_wait: whether the entry, read without its lock, still asks for somebody."""
    mm = vmf.mm
    pmd = pmd_offset(mm, vmf.address)
    pte = pte_offset_map(mm, pmd, vmf.address) if pmd else 0
    if not pte:
        return True
    entry = mm.host.ram.u64[pte >> 3]
    if pte_none_mostly(entry):
        return True
    return bool(reason & VM_UFFD_WP) and pte_present(entry) and not pte_write(entry)


# -- the user task's side -------------------------------------------------------------------------
def userfaultfd_poll(ctx: UserfaultfdCtx) -> bool:
    """Whether a message can be read. Who waits for one does so by `fd_wqh`, between two polls."""
    return bool(ctx.fault_pending)


def userfaultfd_ctx_read(ctx: UserfaultfdCtx) -> UffdMsg:
    """read(2) of one message, without waiting for one: KernelError(EAGAIN)."""
    ctx.fd_lock.lock()
    ctx.lock.lock()
    msg = None
    if ctx.fault_pending:
        uwq = ctx.fault_pending.pop(0)
        ctx.fault.append(uwq)
        msg = uwq.msg
    ctx.lock.unlock()
    ctx.fd_lock.unlock()
    if msg is None:
        raise KernelError(EAGAIN, "no fault waits to be read")
    return msg


def wake_userfault(ctx: UserfaultfdCtx, start: int, length: int) -> None:
    """Let the faults of a range be tried again; length 0 means all of them."""
    sched = ctx.mm.host.sched
    if sched.preempt:
        sched.point("cond_resched")
    if not ctx.fault_pending and not ctx.fault:
        return
    woken = 0
    ctx.lock.lock()
    for queue in (ctx.fault_pending, ctx.fault):
        for uwq in list(queue):
            if not length or start <= uwq.msg.address < start + length:
                uwq.waken = True
                queue.remove(uwq)
                uwq.wq.wake_all()
                woken += 1
    ctx.lock.unlock()
    if (t := ctx.mm.host.trace.userfault_wake) is not None:
        t(ctx.mm.process.pid, start, start + length, woken)
