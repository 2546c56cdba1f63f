"""Memory cgroups and DAMON of a real machine, for scenarios of reclaim.

The group is cgroup v1's, `/sys/fs/cgroup/memory/refault-PID`, made when a scenario enters it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from refault.errors import UsageError
from refault.scenarios.layout import PAGE
from refault.scenarios.live import libc
from refault.scenarios.live.tracefs import TraceInstance

__all__ = ["ReclaimSteps"]

_MEMORY = Path("/sys/fs/cgroup/memory")
_KDAMONDS = Path("/sys/kernel/mm/damon/admin/kdamonds")
_UNLIMITED = "-1"


class ReclaimSteps:
    """The steps, for a back end that has `data`, the address of D, and what it undoes at the end."""

    data: int
    trace: TraceInstance
    _undo: contextlib.ExitStack
    _group: Path | None = None
    _old_group: Path

    def memcg_enter(self) -> Any:
        """Into a memory cgroup of its own."""
        if not (_MEMORY / "memory.limit_in_bytes").exists() and not (_MEMORY / "cgroup.procs").exists():
            raise UsageError(f"this machine has no memory cgroups at {_MEMORY}")
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        mine = next(line.split(":", 2)[2] for line in lines if ":memory:" in line)
        self._old_group = _MEMORY / mine.lstrip("/")
        self._group = _MEMORY / f"refault-{os.getpid()}"
        self._group.mkdir()
        self._undo.callback(self._remove_group)
        self._attach(self._group)
        return 0

    def _attach(self, group: Path) -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    def _remove_group(self) -> None:
        assert self._group is not None
        self._limit(_UNLIMITED)
        self._attach(self._old_group)
        (self._group / "memory.force_empty").write_text("0")
        self._group.rmdir()

    def memcg_leave(self) -> Any:
        """Back to where it was."""
        self._attach(self._old_group)
        return 0

    def _usage(self) -> int:
        assert self._group is not None
        return int((self._group / "memory.usage_in_bytes").read_text())

    def _limit(self, value: object) -> None:
        assert self._group is not None
        (self._group / "memory.limit_in_bytes").write_text(str(value))

    def memcg_limit(self, pages: int) -> Any:
        """The limit, below the usage."""
        self._limit(self._usage() - pages * PAGE)

    def memcg_squeeze(self, pages: int) -> Any:
        """The limit, below the usage, and none again."""
        self._limit(self._usage() - pages * PAGE)
        self._limit(_UNLIMITED)

    def own_pages(self, pages: int) -> Any:
        """Fresh pages of this process, of no slot."""
        place = libc.mmap(0, pages * PAGE, 3, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        self._undo.callback(libc.munmap, place, pages * PAGE)
        for page in range(pages):
            libc.poke(place + page * PAGE, b"own")

    # -- DAMON --------------------------------------------------------------------------------

    def frames(self, offsets: list[int]) -> list[int]:
        """Which frame each page is in."""
        raise NotImplementedError

    def damon_on(self, offset: int) -> Any:
        """kdamond watches the frame of one page, a sample every 5 ms."""
        if not _KDAMONDS.is_dir() or (_KDAMONDS / "nr_kdamonds").read_text().strip() != "0":
            raise UsageError("this machine has no DAMON, or has a kdamond of its own at work")
        frame = self.frames([offset])[0] * PAGE
        self.trace.watch_kernel_thread("kdamond")
        self._damon("nr_kdamonds", 1)
        self._undo.callback(self._damon, "nr_kdamonds", 0)
        context = "0/contexts/0"
        region = f"{context}/targets/0/regions/0"
        for name, value in (
            ("0/contexts/nr_contexts", 1), (f"{context}/operations", "paddr"),
            (f"{context}/targets/nr_targets", 1), (f"{context}/targets/0/regions/nr_regions", 1),
            (f"{region}/start", frame), (f"{region}/end", frame + PAGE),
            (f"{context}/monitoring_attrs/intervals/sample_us", 5000),
            (f"{context}/monitoring_attrs/intervals/aggr_us", 20000),
            (f"{context}/monitoring_attrs/nr_regions/min", 3),
        ):
            self._damon(name, value)
        return self._damon("0/state", "on")

    def damon_off(self) -> Any:
        """kdamond ends; the bytes that the write took."""
        return self._damon("0/state", "off")

    def _damon(self, name: str, value: object) -> int:
        return (_KDAMONDS / name).write_text(str(value))
