"""Making, copying and ending address spaces.

Source of truth: kernel/fork.c (mm_init, dup_mmap, mmput, __mmdrop), mm/mmap.c: exit_mmap; Linux 6.18.

Exit tells the notifiers first (release), before anything is unmapped. Fork write-protects the parent's
private pages VMA by VMA, each in its bracket, and flushes once at the end.

Not modelled: exec, threads as separate users of an mm, vfork, uprobes, oom_adj inheritance rules.
"""

from __future__ import annotations

from errno import ENOMEM, ESRCH
from typing import TYPE_CHECKING

from host_mm import tlb as _tlb
from host_mm.address_space import flush_delayed_fput
from host_mm.huge_mm import mm_put_huge_zero_folio
from host_mm.hugetlb_resv import hugetlb_dup_vma_private
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.khugepaged_types import khugepaged_exit, khugepaged_fork
from host_mm.ksm import ksm_exit, ksm_fork
from host_mm.memory_copy import copy_page_range
from host_mm.memory_zap import free_pgtables, unmap_vmas
from host_mm.mm_types import MMF_OOM_SKIP, VM_DONTCOPY, VM_HUGETLB, VM_LOCKED_MASK, VM_WIPEONFORK, MmStruct
from host_mm.mmu_gather import MmuGather
from host_mm.mmu_notifier_register import mmu_notifier_release, mmu_notifier_subscriptions_destroy
from host_mm.pgtable_generic import pgd_alloc, pgd_free
from host_mm.process import Process
from host_mm.rmap_anon_vma import anon_vma_fork
from host_mm.userfaultfd_k import dup_userfaultfd
from host_mm.vma import insert_vma, vm_area_dup, vma_close, vma_open

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["exit_mmap", "exit_process", "fork_process", "free_mm", "mm_init", "mmput"]

_ULONG_MAX = (1 << 64) - 1


def mm_init(host: HostMm, process: Process) -> MmStruct:
    """An empty address space for `process`, with its level-4 table. KernelError(ENOMEM)."""
    mm = MmStruct(host, process)
    mm.tlb = _tlb.HostTlb()
    process.mm = mm
    if not pgd_alloc(mm):
        raise KernelError(ENOMEM, "no frame for a page directory")
    host.mms.append(mm)
    return mm


def free_mm(mm: MmStruct) -> None:
    """__mmdrop: the last holder of the struct is gone."""
    mmu_notifier_subscriptions_destroy(mm)
    pgd_free(mm)
    if any(mm.rss) or mm.pgtables_bytes:
        raise BrokenTruth("mm-accounting", f"an mm ends with rss {mm.rss}, {mm.pgtables_bytes} table bytes")


def mmput(mm: MmStruct) -> None:
    """Stop using the address space; the last user tears it down."""
    mm.mm_users -= 1
    if mm.mm_users == 0:
        ksm_exit(mm)
        khugepaged_exit(mm)
        exit_mmap(mm)
        mm_put_huge_zero_folio(mm)
        flush_delayed_fput(mm.host)
        mm.mmdrop()


def exit_mmap(mm: MmStruct) -> None:
    """Unmap everything; the notifiers hear of it first."""
    mmu_notifier_release(mm)
    mm.mmap_lock.read_lock()
    vmas = list(mm.vmas)
    if not vmas:
        mm.mmap_lock.read_unlock()
        mm.flags |= MMF_OOM_SKIP
        return
    tlb = MmuGather(mm, fullmm=True)
    unmap_vmas(tlb, vmas, 0, _ULONG_MAX)
    mm.mmap_lock.read_unlock()
    mm.flags |= MMF_OOM_SKIP
    mm.mmap_lock.lock()
    mm.vmas.clear()
    mm.starts.clear()
    mm.total_vm = 0
    free_pgtables(tlb, vmas, 0, 0)
    tlb.finish()
    for vma in vmas:
        vma_close(vma)
    mm.mmap_lock.unlock()


def exit_process(process: Process) -> None:
    """The process ends; its address space with it, unless somebody else still uses that."""
    if not process.alive:
        raise KernelError(ESRCH, f"process {process.pid} has ended")
    process.alive = False
    if process.parent is not None and process in process.parent.children:
        process.parent.children.remove(process)
    for child in process.children:
        child.parent = None
    process.host.processes.remove(process)
    if process.memcg is not None:
        process.host.memcg.attach(process, None)
    mmput(process.mm)


def fork_process(process: Process) -> Process:
    """A child with a copy-on-write copy of the address space. KernelError(ENOMEM)."""
    host = process.host
    host.sched.advance(COST_SYSCALL)
    child = host.new_process(process.name, process)
    mm = mm_init(host, child)
    mm.def_flags = process.mm.def_flags & ~VM_LOCKED_MASK
    ret = _dup_mmap(mm, process.mm)
    if ret:
        exit_process(child)
        raise KernelError(-ret, "no memory for the child's page tables")
    process.children.append(child)
    return child


def _dup_mmap(mm: MmStruct, oldmm: MmStruct) -> int:
    oldmm.mmap_lock.lock()
    mm.mmap_lock.lock(nested=True)
    ret = 0
    for old in list(oldmm.vmas):
        if old.flags & VM_DONTCOPY:
            continue
        new = vm_area_dup(old, mm)
        dup_userfaultfd(new)
        if old.flags & VM_HUGETLB:
            hugetlb_dup_vma_private(new)
        if old.flags & VM_WIPEONFORK:
            new.anon_vma = None
        else:
            anon_vma_fork(new, old)
        new.flags &= ~VM_LOCKED_MASK
        vma_open(new)
        insert_vma(new, old)
        if not old.flags & VM_WIPEONFORK:
            ret = copy_page_range(new, old)
            if ret:
                break
    if not ret:
        ksm_fork(mm, oldmm)
        khugepaged_fork(mm, oldmm)
    mm.mmap_lock.unlock()
    _tlb.flush_tlb_mm(oldmm)
    oldmm.mmap_lock.unlock()
    return ret
