"""The out-of-memory killer and its reaper: who dies when nothing can be reclaimed.

Source of truth: mm/oom_kill.c: oom_badness, select_bad_process, oom_evaluate_task, __oom_kill_process,
queue_oom_reaper, oom_reap_task, oom_reap_task_mm, __oom_reap_task_mm; include/trace/events/oom.h;
Linux 6.18.

The process with the most memory dies. A process that is nobody's child is what the machine is for (a
VM's, most often), so its death is the end of the run: OutOfMemory with the kernel's line. The memory of
another is reaped: two seconds after the kill the reaper unmaps what is private to it, in brackets that
may not sleep, from the highest address down. A VMA whose notifier says -EAGAIN is left out, without an
end, and the whole is tried again, as it is while somebody holds mmap_lock for writing. Whoever touches
reaped memory later gets SIGBUS. Who ran out of memory waits until the victim is reaped or given up.

Not modelled: cpuset constraints, the victim's own death by the signal (it keeps its empty address space
until somebody ends it), process_mrelease, panic_on_oom.
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
    from host_mm.mm_types import MmStruct
    from host_mm.process import Process

__all__ = [
    "MAX_OOM_REAP_RETRIES", "OOM_REAPER_DELAY", "OOM_SCORE_ADJ_MIN", "TRACEPOINTS", "oom_badness",
    "oom_kill_process", "oom_reap_task_mm", "out_of_memory", "queue_oom_reaper",
]

OOM_SCORE_ADJ_MIN = -1000
OOM_REAPER_DELAY = 2_000_000_000
MAX_OOM_REAP_RETRIES = 10
_RETRY_NS = 100_000_000

OOM_KILL = Tracepoint(
    "refault", "oom_kill", ("pid", "comm", "score", "order"),
    lambda pid, comm, score, order: f"pid {pid} {comm} score {score} order {order}",
    scope=True, doc="Nothing could be reclaimed; this process dies for it.",
)
MARK_VICTIM = Tracepoint(
    "oom", "mark_victim", ("pid", "comm", "oom_score_adj"),
    lambda pid, comm, adj: f"pid={pid} comm={comm} oom_score_adj={adj}",
)
WAKE_REAPER = Tracepoint("oom", "wake_reaper", ("pid",), lambda pid: f"pid={pid}")
START_TASK_REAPING = Tracepoint("oom", "start_task_reaping", ("pid",), lambda pid: f"pid={pid}")
FINISH_TASK_REAPING = Tracepoint("oom", "finish_task_reaping", ("pid",), lambda pid: f"pid={pid}")
SKIP_TASK_REAPING = Tracepoint("oom", "skip_task_reaping", ("pid",), lambda pid: f"pid={pid}")
TRACEPOINTS = (
    OOM_KILL, MARK_VICTIM, WAKE_REAPER, START_TASK_REAPING, FINISH_TASK_REAPING, SKIP_TASK_REAPING,
)


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


# -- the reaper -----------------------------------------------------------------------------------


def _reap_vmas(mm: MmStruct) -> bool:
    """__oom_reap_task_mm: unmap what is private; false when a notifier refused a part of it."""
    mm.flags |= MMF_UNSTABLE
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
    return reaped


def oom_reap_task_mm(process: Process) -> bool:
    """One attempt to reap a victim; false: try again."""
    mm, host = process.mm, process.host
    if not mm.mmap_lock.read_trylock():
        if (t := host.trace.skip_task_reaping) is not None:
            t(process.pid)
        return False
    reaped = True
    if mm.flags & MMF_OOM_SKIP:
        if (t := host.trace.skip_task_reaping) is not None:
            t(process.pid)
    else:
        if (t := host.trace.start_task_reaping) is not None:
            t(process.pid)
        reaped = _reap_vmas(mm)
        if (t := host.trace.finish_task_reaping) is not None:
            t(process.pid)
    mm.mmap_lock.read_unlock()
    return reaped


def _oom_reap_task(process: Process) -> None:
    host, mm = process.host, process.mm
    for _ in range(MAX_OOM_REAP_RETRIES):
        if oom_reap_task_mm(process):
            break
        host.sched.sleep(_RETRY_NS)
    # Reaped, or hopeless: the killer may look for another one.
    mm.flags |= MMF_OOM_SKIP
    host.oom_victims.discard(process)
    host.oom_wait.wake_all()
    mm.mmdrop()


def queue_oom_reaper(process: Process) -> None:
    """Let the reaper have the victim when it has had OOM_REAPER_DELAY to go by itself."""
    host = process.host
    if process in host.oom_victims:
        return
    host.oom_victims.add(process)
    process.mm.mm_count += 1

    def reaper() -> None:
        host.sched.sleep(OOM_REAPER_DELAY)
        if (t := host.trace.wake_reaper) is not None:
            t(process.pid)
        _oom_reap_task(process)

    host.sched.spawn("oom_reaper", reaper)


# -- the kill -------------------------------------------------------------------------------------


def oom_kill_process(process: Process, points: int, order: int, memcg: MemCgroup | None = None) -> None:
    """Kill this one: its memory goes to the reaper. OutOfMemory if the machine lives by it."""
    host = process.host
    host.vmstat["oom_kill"] += 1
    if memcg is not None:
        memcg.events["oom_kill"] += 1
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.oom_kill) is not None:
        ctx.cause = t(process.pid, process.name, points, order)
    if (t := host.trace.mark_victim) is not None:
        t(process.pid, process.name, process.oom_score_adj)
    if process.parent is None or process.mm.notifier_subscriptions is not None:
        raise OutOfMemory(_kill_line(process, memcg))
    queue_oom_reaper(process)
    ctx.cause = saved


def out_of_memory(host: HostMm, order: int, memcg: MemCgroup | None = None) -> bool:
    """Kill something, in `memcg` if given, and wait until it is reaped. False: nobody is left to kill.

    Raises OutOfMemory when the victim is not a forked child.
    """
    dying = [process for process in host.oom_victims if memcg is None or process.memcg is memcg]
    if not dying:
        victim = _select_bad_process(host, memcg)
        if victim is None:
            return False
        oom_kill_process(*victim, order, memcg)
        dying = [victim[0]]
    host.oom_wait.wait_event(lambda: not host.oom_victims.intersection(dying))
    return True
