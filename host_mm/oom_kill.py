"""The out-of-memory killer: who dies when nothing can be reclaimed.

Source of truth: mm/oom_kill.c: oom_badness, select_bad_process, __oom_kill_process,
__oom_reap_task_mm; Linux 6.18.

The process with the most memory dies. A process that is nobody's child is what the machine is for (a
VM's, most often), so its death is the end of the run: OutOfMemory with the kernel's line. A forked
child is reaped on the spot: its private memory is unmapped in brackets that may not sleep, and
whoever touches it later gets SIGBUS.

Not modelled: cpuset constraints, the victim's own exit and its signal, the delayed reaper
thread (reaping is done by who ran out), process_mrelease, panic_on_oom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import OutOfMemory
from host_mm.memory_zap import unmap_page_range
from host_mm.mm_types import (
    MM_ANONPAGES,
    MM_FILEPAGES,
    MM_SHMEMPAGES,
    MM_SWAPENTS,
    MMF_OOM_SKIP,
    MMF_UNSTABLE,
    VM_HUGETLB,
    VM_PFNMAP,
    VM_SHARED,
)
from host_mm.mmu_gather import MmuGather
from host_mm.mmu_notifier import (
    MMU_NOTIFY_UNMAP,
    ORDER_GATHER,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start_nonblock,
    mmu_notifier_range_init,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.memcontrol import MemCgroup
    from host_mm.process import Process

__all__ = ["OOM_SCORE_ADJ_MIN", "TRACEPOINTS", "oom_badness", "out_of_memory"]

OOM_SCORE_ADJ_MIN = -1000

OOM_KILL = Tracepoint(
    "refault", "oom_kill", ("pid", "comm", "score", "order"),
    lambda pid, comm, score, order: f"pid {pid} {comm} score {score} order {order}",
    scope=True, doc="Nothing could be reclaimed; this process dies for it.",
)
TRACEPOINTS = (OOM_KILL,)


def oom_badness(process: Process, totalpages: int) -> int | None:
    """How much would be won by killing the process, in pages; None: it must not be killed."""
    mm = process.mm
    if not process.alive or process.oom_score_adj == OOM_SCORE_ADJ_MIN or mm.flags & MMF_OOM_SKIP:
        return None
    rss = mm.rss
    points = rss[MM_FILEPAGES] + rss[MM_ANONPAGES] + rss[MM_SHMEMPAGES] + rss[MM_SWAPENTS]
    points += mm.pgtables_bytes >> 12
    return points + process.oom_score_adj * (totalpages // 1000)


def _select_bad_process(host: HostMm, memcg: MemCgroup | None) -> tuple[Process, int] | None:
    totalpages = host.device_frames.start + (host.swap.pages if host.swap is not None else 0)
    if memcg is not None:
        totalpages = min(memcg.max, totalpages)
    chosen: tuple[Process, int] | None = None
    for process in host.processes if memcg is None else memcg.processes:
        points = oom_badness(process, totalpages)
        if points is not None and (chosen is None or points > chosen[1]):
            chosen = process, points
    return chosen


def _kill_line(process: Process, memcg: MemCgroup | None) -> str:
    mm = process.mm
    kb = [count << 2 for count in mm.rss]
    message = "Out of memory" if memcg is None else "Memory cgroup out of memory"
    return (
        f"{message}: Killed process {process.pid} ({process.name}) total-vm:{mm.total_vm << 2}kB, "
        f"anon-rss:{kb[MM_ANONPAGES]}kB, file-rss:{kb[MM_FILEPAGES]}kB, "
        f"shmem-rss:{kb[MM_SHMEMPAGES]}kB, pgtables:{mm.pgtables_bytes >> 10}kB "
        f"oom_score_adj:{process.oom_score_adj}"
    )


def _oom_reap_task_mm(process: Process) -> bool:
    """Unmap what is private to the victim; False when a lock or a notifier stood in the way."""
    mm = process.mm
    mm.flags |= MMF_UNSTABLE
    if not mm.mmap_lock.read_trylock():
        return False
    reaped = True
    for vma in reversed(mm.vmas):
        if vma.flags & (VM_HUGETLB | VM_PFNMAP) or (vma.file is not None and vma.flags & VM_SHARED):
            continue
        range_ = mmu_notifier_range_init(MMU_NOTIFY_UNMAP, mm, vma.start, vma.end, order=ORDER_GATHER)
        tlb = MmuGather(mm)
        if mmu_notifier_invalidate_range_start_nonblock(range_):
            tlb.finish()
            reaped = False
            continue
        unmap_page_range(tlb, vma, vma.start, vma.end)
        mmu_notifier_invalidate_range_end(range_)
        tlb.finish()
    mm.mmap_lock.read_unlock()
    return reaped


def out_of_memory(host: HostMm, order: int, memcg: MemCgroup | None = None) -> bool:
    """Kill something, in `memcg` if given. True: memory came free. False: nobody is left to kill.

    Raises OutOfMemory when the victim is not a forked child.
    """
    while True:
        victim = _select_bad_process(host, memcg)
        if victim is None:
            return False
        process, points = victim
        host.vmstat["oom_kill"] += 1
        if memcg is not None:
            memcg.events["oom_kill"] += 1
        ctx = host.stream.ctx
        saved = ctx.cause
        if (t := host.trace.oom_kill) is not None:
            ctx.cause = t(process.pid, process.name, points, order)
        if process.parent is None or process.mm.notifier_subscriptions is not None:
            raise OutOfMemory(_kill_line(process, memcg))
        free = host.allocator.nr_free_pages()
        _oom_reap_task_mm(process)
        process.mm.flags |= MMF_OOM_SKIP
        ctx.cause = saved
        if host.allocator.nr_free_pages() > free:
            return True
