"""The part of struct task_struct that mm looks at: one process, its address space, its family.

Source of truth: include/linux/sched.h; Linux 6.18. A process here is a thread group; the scheduler's
tasks (host_mm/kernel/sched.py) are the threads that act in its name.

Of signals there is SIGBUS for bad memory (kernel/signal.c: force_sig_mceerr, send_sig_mceerr): it is noted in
`signals`, for the process's owner to handle.

Not modelled: other signals, credentials, namespaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.memcontrol import MemCgroup
    from host_mm.mm_types import MmStruct
    from host_mm.tlb import HostTlb

__all__ = ["BUS_MCEERR_AO", "BUS_MCEERR_AR", "TRACEPOINTS", "MceSignal", "Process"]

SIGBUS = 7
BUS_MCEERR_AR = 4
"""The process was about to use the bytes."""
BUS_MCEERR_AO = 5
"""They are gone, but nobody asked for them yet."""

SIGNAL_GENERATE = Tracepoint(
    "signal", "signal_generate", ("sig", "errno", "code", "comm", "pid", "group", "result"),
    lambda sig, errno, code, comm, pid, group, result: (
        f"sig={sig} errno={errno} code={code} comm={comm} pid={pid} grp={group} res={result}"
    ),
)
TRACEPOINTS = (SIGNAL_GENERATE,)


class MceSignal(msgspec.Struct, frozen=True):
    """A SIGBUS for bad memory: BUS_MCEERR_*, and the address in the process."""

    code: int
    address: int


class Process:
    """A process. `alive` ends with exit_process; `home_node` is where its `threads` threads run, unless the
    scheduler's task has a node of its own. `memcg` is its memory cgroup, None for the root. With
    `mce_kill_early` (prctl PR_MCE_KILL) it wants to know of bad memory before it uses it."""

    __slots__ = (
        "alive", "children", "home_node", "host", "mce_kill_early", "memcg", "mm", "name", "oom_score_adj",
        "parent", "pid", "signals", "threads",
    )

    def __init__(self, host: HostMm, pid: int, name: str, parent: Process | None = None) -> None:
        self.host = host
        self.pid = pid
        self.name = name
        self.parent = parent
        self.children: list[Process] = []
        self.home_node: int = parent.home_node if parent is not None else 0
        self.oom_score_adj = 0
        self.threads = 1
        self.alive = True
        self.mce_kill_early = False
        self.signals: list[MceSignal] = []
        self.memcg: MemCgroup | None = None
        if parent is not None and parent.memcg is not None:
            host.memcg.attach(self, parent.memcg)
        self.mm: MmStruct

    def send_sig_mceerr(self, code: int, address: int) -> None:
        """SIGBUS: the memory behind `address` has failed."""
        self.signals.append(MceSignal(code, address & ~0xFFF))
        if (t := self.host.trace.signal_generate) is not None:
            t(SIGBUS, 0, code, self.name, self.pid, 0, 0)

    @property
    def tlb(self) -> HostTlb:
        """The software TLB its threads translate by."""
        return self.mm.tlb

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.name}>"
