"""The part of struct task_struct that mm looks at: one process, its address space, its family.

Source of truth: include/linux/sched.h; Linux 6.18. A process here is a thread group; the scheduler's
tasks (host_mm/kernel/sched.py) are the threads that act in its name.

Not modelled: signals, credentials, namespaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.memcontrol import MemCgroup
    from host_mm.mm_types import MmStruct
    from host_mm.tlb import HostTlb

__all__ = ["Process"]


class Process:
    """A process. `alive` ends with exit_process; `home_node` is where its `threads` threads run, unless the
    scheduler's task has a node of its own. `memcg` is its memory cgroup, None for the root."""

    __slots__ = (
        "alive", "children", "home_node", "host", "memcg", "mm", "name", "oom_score_adj", "parent", "pid",
        "threads",
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
        self.memcg: MemCgroup | None = None
        if parent is not None and parent.memcg is not None:
            host.memcg.attach(self, parent.memcg)
        self.mm: MmStruct

    @property
    def tlb(self) -> HostTlb:
        """The software TLB its threads translate by."""
        return self.mm.tlb

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.name}>"
