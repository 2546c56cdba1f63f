"""Asynchronous page faults: work items that bring pages in while their vCPU does something else.

Source of truth: virt/kvm/async_pf.c (Linux 6.18): kvm_setup_async_pf, async_pf_execute,
kvm_async_pf_wakeup_all, kvm_clear_async_pf_completion_queue.

A work item is a task of the host. It pins nothing: it only makes get_user_pages fault the page in, for
writing, in the VMM's address space. The page may be gone again before the vCPU maps it, and then the vCPU
faults anew.

`queue` has a vCPU's items that are not yet handled, `done` those of them whose work is over, first come
first. The vCPU takes them from `done` before it enters the guest (pv_async_pf.py:
kvm_check_async_pf_completion).

Not modelled: allocations that fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.gup import FOLL_WRITE, get_user_page_remote
from host_mm.kernel.locks import Spinlock
from host_mm.kernel.sched import WaitQueue
from host_mm.page import put_page
from kvm_model.requests import kvm_vcpu_wake_up
from kvm_model.x86_async_pf import kvm_arch_async_page_not_present, kvm_arch_async_page_present_queued
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.vcpu import Vcpu

__all__ = [
    "ASYNC_PF_PER_VCPU", "TRACEPOINTS", "AsyncPfQueues", "KvmAsyncPf", "flush_async_pf_work",
    "kvm_async_pf_wakeup_all", "kvm_clear_async_pf_completion_queue", "kvm_setup_async_pf",
]

ASYNC_PF_PER_VCPU = 64

KVM_ASYNC_PF_COMPLETED = Tracepoint(
    "kvm", "kvm_async_pf_completed", ("address", "gva"),
    lambda address, gva: f"gva {gva:#x} address {address:#x}",
)
TRACEPOINTS = (KVM_ASYNC_PF_COMPLETED,)


class KvmAsyncPf:
    """struct kvm_async_pf with its arch part. `over`: the work item has ended, or there never was one."""

    __slots__ = (
        "addr", "cr2_or_gpa", "cr3", "direct_map", "ended", "error_code", "gfn", "notpresent_injected",
        "over", "token", "vcpu", "wakeup_all",
    )

    def __init__(self, vcpu: Vcpu, cr2_or_gpa: int = 0, addr: int = 0) -> None:
        self.vcpu = vcpu
        self.cr2_or_gpa = cr2_or_gpa
        self.addr = addr
        self.token = self.gfn = self.error_code = self.cr3 = 0
        self.direct_map = True
        self.notpresent_injected = False
        self.wakeup_all = False
        self.over = True
        self.ended = WaitQueue(vcpu.kvm.sched, "apf work")


class AsyncPfQueues:
    """vcpu->async_pf. `queued` counts the items of `queue` and the wake-ups for everybody."""

    __slots__ = ("done", "lock", "queue", "queued")

    def __init__(self, vcpu: Vcpu) -> None:
        self.lock = Spinlock(vcpu.kvm.sched, "async_pf_lock")
        self.queue: list[KvmAsyncPf] = []
        self.done: list[KvmAsyncPf] = []
        self.queued = 0


def _async_pf_execute(apf: KvmAsyncPf) -> None:
    vcpu = apf.vcpu
    kvm = vcpu.kvm
    mm, addr, gva = kvm.mm, apf.addr, apf.cr2_or_gpa
    if kvm.process.alive:
        mm.mmap_lock.read_lock()
        pfn = get_user_page_remote(mm, addr, FOLL_WRITE)
        mm.mmap_lock.read_unlock()
        if pfn >= 0:
            put_page(kvm.host, pfn)
    queues = vcpu.async_pf
    with queues.lock:
        first = not queues.done
        queues.done.append(apf)
    wake = "apf-no-wakeup" not in kvm.breaks
    # From here on the vCPU may be through with the item.
    if first and wake:
        kvm_arch_async_page_present_queued(vcpu)
    if (t := kvm.trace.kvm_async_pf_completed) is not None:
        t(addr, gva)
    if wake:
        kvm_vcpu_wake_up(vcpu)
    apf.over = True
    apf.ended.wake_all()


def flush_async_pf_work(apf: KvmAsyncPf) -> None:
    """flush_work: wait until the item has run to its end. Sleeps."""
    apf.ended.wait_event(lambda: apf.over)


def kvm_clear_async_pf_completion_queue(vcpu: Vcpu) -> None:
    """Forget every item of the vCPU; those under way are waited for. Sleeps."""
    queues = vcpu.async_pf
    while queues.queue:
        flush_async_pf_work(queues.queue.pop(0))
    with queues.lock:
        done, queues.done = queues.done, []
    for apf in done:
        flush_async_pf_work(apf)
    queues.queued = 0


def kvm_setup_async_pf(vcpu: Vcpu, work: KvmAsyncPf) -> bool:
    """Start bringing the page in, and tell the guest; False: there are too many already."""
    queues = vcpu.async_pf
    if queues.queued >= ASYNC_PF_PER_VCPU:
        return False
    queues.queue.append(work)
    queues.queued += 1
    work.notpresent_injected = kvm_arch_async_page_not_present(vcpu, work)
    work.over = False
    vcpu.kvm.sched.spawn(f"kworker/apf{vcpu.vcpu_id}", lambda: _async_pf_execute(work))
    return True


def kvm_async_pf_wakeup_all(vcpu: Vcpu) -> None:
    """A token that wakes whoever waits in the guest, which may have lost some."""
    queues = vcpu.async_pf
    if queues.done:
        return
    work = KvmAsyncPf(vcpu)
    work.wakeup_all = True
    with queues.lock:
        first = not queues.done
        queues.done.append(work)
    if first:
        kvm_arch_async_page_present_queued(vcpu)
    queues.queued += 1
