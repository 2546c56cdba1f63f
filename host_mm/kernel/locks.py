"""The kernel's locks, under the scheduler, with an order check like lockdep's.

Each lock has a class name (`mmap_lock`, `mmu_lock`, ...). With `sched.lockdep` set, taking B while
holding A records A -> B; taking them the other way round later is a broken truth. Lock and unlock
are scheduling points. A spinlock's holder may not block.

Not modelled: fairness beyond first come first served, trylock spinning, lock stealing, nesting
annotations other than `nested=True` (spin_lock_nested).
"""

from __future__ import annotations

from types import TracebackType

from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import Scheduler, Task, WaitQueue

__all__ = ["Mutex", "RwLock", "RwSem", "Spinlock", "Srcu"]


def _check_order(sched: Scheduler, task: Task, cls: str, nested: bool) -> None:
    edges = sched.lockdep
    if edges is None:
        return
    for held in task.held:
        if held == cls:
            if not nested:
                raise BrokenTruth("lock-order", f"{task.name} takes {cls} while holding {cls}")
        elif (held, cls) not in edges:
            if (cls, held) in edges:
                other = edges[cls, held]
                raise BrokenTruth(
                    "lock-order",
                    f"{task.name} takes {cls} while holding {held}; {other} took them the other way",
                )
            edges[held, cls] = task.name


class _Sleeping:
    """A lock whose waiters sleep and whose holder may sleep: shared owners or one exclusive."""

    __slots__ = ("cls", "owner", "readers", "sched", "waiters_write", "wq")
    SPIN = False

    def __init__(self, sched: Scheduler, cls: str) -> None:
        self.sched = sched
        self.cls = cls
        self.owner: Task | None = None
        self.readers: list[Task] = []
        self.waiters_write = 0
        self.wq = WaitQueue(sched, cls)

    def lock(self, *, nested: bool = False) -> None:
        """Take it exclusively."""
        sched = self.sched
        if sched.preempt:
            sched.point("lock")
        task = sched.current
        if sched.lockdep is not None:
            _check_order(sched, task, self.cls, nested)
        if self.owner is not None or self.readers:
            if self.owner is task:
                raise BrokenTruth("lock-order", f"{task.name} takes {self.cls} twice")
            self.waiters_write += 1
            while self.owner is not None or self.readers:
                self.wq.wait(spin=self.SPIN)
            self.waiters_write -= 1
        self.owner = task
        task.held.append(self.cls)
        if self.SPIN:
            task.no_preempt += 1

    def trylock(self) -> bool:
        """Take it exclusively if nobody has it."""
        if self.owner is not None or self.readers:
            return False
        task = self.sched.current
        self.owner = task
        task.held.append(self.cls)
        if self.SPIN:
            task.no_preempt += 1
        return True

    def unlock(self) -> None:
        """Release an exclusive hold."""
        task = self.owner
        if task is None:
            raise BrokenTruth("lock-order", f"{self.cls} unlocked while free")
        self.owner = None
        _forget(task, self.cls)
        if self.SPIN:
            task.no_preempt -= 1
        if self.wq.waiters:
            self.wq.wake_all()
        if self.sched.preempt:
            self.sched.point("unlock")

    def read_lock(self) -> None:
        """Take it shared. Waiting writers go first."""
        sched = self.sched
        if sched.preempt:
            sched.point("lock")
        task = sched.current
        if sched.lockdep is not None:
            _check_order(sched, task, self.cls, False)
        while self.owner is not None or (self.waiters_write and not self.readers):
            self.wq.wait(spin=self.SPIN)
        self.readers.append(task)
        task.held.append(self.cls)
        if self.SPIN:
            task.no_preempt += 1

    def read_trylock(self) -> bool:
        """Take it shared unless a writer has it."""
        if self.owner is not None:
            return False
        task = self.sched.current
        self.readers.append(task)
        task.held.append(self.cls)
        if self.SPIN:
            task.no_preempt += 1
        return True

    def read_unlock(self) -> None:
        """Release a shared hold of the current task."""
        task = self.sched.current
        self.readers.remove(task)
        _forget(task, self.cls)
        if self.SPIN:
            task.no_preempt -= 1
        if self.wq.waiters and not self.readers:
            self.wq.wake_all()
        if self.sched.preempt:
            self.sched.point("unlock")

    def __enter__(self) -> None:
        self.lock()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.unlock()


def _forget(task: Task, cls: str) -> None:
    held = task.held
    if held and held[-1] == cls:
        held.pop()
        return
    for index in range(len(held) - 1, -1, -1):
        if held[index] == cls:
            del held[index]
            return


class Mutex(_Sleeping):
    """struct mutex."""

    __slots__ = ()


class RwSem(_Sleeping):
    """struct rw_semaphore: `lock`/`unlock` is down_write/up_write, `read_*` the shared side."""

    __slots__ = ()

    def downgrade(self) -> None:
        """downgrade_write: from exclusive to shared without letting go."""
        task = self.owner
        if task is None:
            raise BrokenTruth("lock-order", f"{self.cls} downgraded while not write-held")
        self.owner = None
        self.readers.append(task)
        if self.wq.waiters:
            self.wq.wake_all()


class Spinlock(_Sleeping):
    """spinlock_t: the holder may not block and is not preempted."""

    __slots__ = ()
    SPIN = True


class RwLock(_Sleeping):
    """rwlock_t: `lock` for write, `read_lock` for read; the holder may not block."""

    __slots__ = ()
    SPIN = True


class Srcu:
    """struct srcu_struct, and RCU where sleeping readers do no harm.

    `synchronize` waits for the readers that were inside when it began.
    """

    __slots__ = ("epoch", "name", "readers", "sched", "wq")

    def __init__(self, sched: Scheduler, name: str) -> None:
        self.sched = sched
        self.name = name
        self.epoch = 0
        self.readers: dict[int, int] = {}
        self.wq = WaitQueue(sched, name)

    def read_lock(self) -> int:
        """Enter; returns the index that `read_unlock` wants."""
        idx = self.epoch
        self.readers[idx] = self.readers.get(idx, 0) + 1
        return idx

    def read_unlock(self, idx: int) -> None:
        """Leave."""
        left = self.readers[idx] - 1
        if left:
            self.readers[idx] = left
        else:
            del self.readers[idx]
            if self.wq.waiters:
                self.wq.wake_all()
        if self.sched.preempt:
            self.sched.point("srcu")

    def synchronize(self) -> None:
        """Wait until every reader that is inside now has left."""
        mine = self.epoch
        self.epoch += 1
        self.wq.wait_event(lambda: all(idx > mine for idx in self.readers))
