"""Tasks on greenlets under one scheduler, and the one logical clock.

The hub greenlet picks who runs. A task runs until it blocks, unless a strategy is set: then
`point()` may switch at every place where the kernel could be preempted or another CPU could get
in between. Which places those are is the models' business; they call

    if sched.preempt:
        sched.point("lock")

Time is in nanoseconds and moves only by `advance` and by jumping to the next timer when nobody can
run. Nothing here reads the machine's clock: the same choices give the same run.

Not modelled: CPUs as a limited resource (every runnable task may run next), priorities, and
interrupts that preempt a task between points.
"""

from __future__ import annotations

import contextlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import greenlet

from host_mm.kernel.errors import BrokenTruth
from trace_events.stream import TaskContext, TraceStream

__all__ = ["RandomStrategy", "Scheduler", "Task", "WaitQueue"]


class Task:
    """One thread of the host: a vCPU, the VMM, kswapd, a host operation. `node` is the NUMA node of the
    CPU it runs on, -1 where its process is at home."""

    __slots__ = ("blocked_on", "ctx", "done", "error", "glet", "held", "name", "no_preempt", "node", "result")

    def __init__(self, name: str, glet: greenlet.greenlet, vcpu: int = -1) -> None:
        self.name = name
        self.glet = glet
        self.ctx = TaskContext(name, vcpu)
        self.held: list[Any] = []
        self.no_preempt = 0
        self.node = -1
        self.blocked_on = ""
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __repr__(self) -> str:
        state = "done" if self.done else (f"blocked on {self.blocked_on}" if self.blocked_on else "runnable")
        return f"<Task {self.name} {state}>"


class RandomStrategy:
    """Switches at one point in `period` on average and picks any runnable task."""

    def __init__(self, seed: int, period: int = 8) -> None:
        self.rng = random.Random(seed)
        self.period = period

    def switch_here(self, kind: str) -> bool:
        """Whether to give way at this point."""
        return self.rng.randrange(self.period) == 0

    def pick(self, runnable: deque[Task]) -> Task:
        """Remove and return the task that runs next."""
        index = self.rng.randrange(len(runnable))
        task = runnable[index]
        del runnable[index]
        return task


class WaitQueue:
    """Tasks that wait for something. `wait` may return early: callers loop over their condition."""

    __slots__ = ("name", "sched", "waiters")

    def __init__(self, sched: Scheduler, name: str) -> None:
        self.sched = sched
        self.name = name
        self.waiters: list[Task] = []

    def wait(self, *, spin: bool = False) -> None:
        """Block the current task until a wake-up; `spin`: as a CPU that spins, so atomic context is fine."""
        self.waiters.append(self.sched.current)
        self.sched.block(self.name, spin=spin)

    def wait_event(self, condition: Callable[[], bool]) -> None:
        """Block until `condition()` is true."""
        while not condition():
            self.wait()

    def wake_all(self) -> None:
        """Make all waiters runnable, in the order they came."""
        waiters, self.waiters = self.waiters, []
        for task in waiters:
            self.sched.make_runnable(task)


class Scheduler:
    """The hub. Create tasks with `spawn`, run them with `run_until` or `run_task`."""

    def __init__(self, stream: TraceStream) -> None:
        self.stream = stream
        self.now = 0
        self.preempt = False
        self.strategy: RandomStrategy | None = None
        self.lockdep: dict[tuple[str, str], str] | None = None
        self.on_point: Callable[[str], None] | None = None
        self.hub = greenlet.getcurrent()
        self.main = Task("main", self.hub)
        self.current = self.main
        self.runnable: deque[Task] = deque()
        self.tasks: list[Task] = []
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._timer_seq = 0
        stream.now = lambda: self.now
        stream.ctx = self.main.ctx

    # -- time ---------------------------------------------------------------------------------

    def advance(self, ns: int) -> None:
        """Let `ns` nanoseconds pass for whoever is running, and fire the timers that are due."""
        self.now += ns
        if self._timers and self._timers[0][0] <= self.now:
            self.run_timers()

    def after(self, ns: int, fn: Callable[[], None]) -> None:
        """Call `fn()` `ns` from now. It runs between tasks and must not block."""
        self._timer_seq += 1
        heapq.heappush(self._timers, (self.now + ns, self._timer_seq, fn))

    def next_timer(self) -> int | None:
        """When the next timer is due, in ns, or None."""
        return self._timers[0][0] if self._timers else None

    def run_timers(self) -> None:
        """Fire the timers that are due."""
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()

    def sleep(self, ns: int) -> None:
        """Block the current task for `ns`."""
        task = self.current
        self.after(ns, lambda: self.make_runnable(task))
        self.block("sleep")

    # -- tasks --------------------------------------------------------------------------------

    def spawn(self, name: str, fn: Callable[[], Any], *, vcpu: int = -1) -> Task:
        """A new runnable task. It inherits the current cause, so that work handed to another
        thread still names what asked for it."""
        task: Task

        def body() -> None:
            try:
                task.result = fn()
            except greenlet.GreenletExit:
                raise
            except BrokenTruth as exc:
                task.error = exc.first()
            except BaseException as exc:
                task.error = exc
            task.done = True

        task = Task(name, greenlet.greenlet(body, self.hub), vcpu)
        task.ctx.cause = self.current.ctx.cause
        self.tasks.append(task)
        self.runnable.append(task)
        return task

    def make_runnable(self, task: Task) -> None:
        """End a block. A no-op for a task that is not blocked."""
        if task.blocked_on and not task.done:
            task.blocked_on = ""
            if task is not self.main:
                self.runnable.append(task)

    def block(self, what: str, *, spin: bool = False) -> None:
        """Give way until `make_runnable`. `what` says why, for deadlock reports.

        With `spin` this CPU spins meanwhile and the others run on: legal in atomic context.
        """
        task = self.current
        if task.no_preempt and not spin:
            raise BrokenTruth("no-sleep-in-atomic", f"{task.name} would block on {what} in atomic context")
        task.blocked_on = what
        if task is self.main:
            self._loop(lambda: not task.blocked_on)
        else:
            self.hub.switch()

    def yield_(self) -> None:
        """Give way to the other runnable tasks."""
        task = self.current
        if task is self.main or task.no_preempt:
            return
        self.runnable.append(task)
        self.hub.switch()

    def point(self, kind: str) -> None:
        """A place where another task may run. Costs nothing while no strategy is set."""
        if self.on_point is not None:
            self.on_point(kind)
        task = self.current
        if task.no_preempt or task is self.main:
            return
        strategy = self.strategy
        if strategy is not None and self.runnable and strategy.switch_here(kind):
            self.runnable.append(task)
            self.hub.switch()

    def race(self, kind: str) -> None:
        """A place where another CPU may get in between although this one is not preempted.

        Unlike `point` it may switch while spinlocks are held: between a read of a shared word and
        its cmpxchg, before a flush request. Tasks that want those locks spin until it goes on.
        """
        if self.on_point is not None:
            self.on_point(kind)
        task = self.current
        if task is self.main:
            return
        strategy = self.strategy
        if strategy is not None and self.runnable and strategy.switch_here(kind):
            self.runnable.append(task)
            self.hub.switch()

    def set_strategy(self, strategy: RandomStrategy | None) -> None:
        """Choose who decides at points; None is run-to-block."""
        self.strategy = strategy
        self.preempt = strategy is not None or self.on_point is not None

    def set_on_point(self, hook: Callable[[str], None] | None) -> None:
        """Call `hook(kind)` at every point: where the truths are checked."""
        self.on_point = hook
        self.preempt = hook is not None or self.strategy is not None

    def freeze(self) -> None:
        """Stop the current task where it is, for good; the hub goes on.

        For looking at a machine in mid-event.
        """
        if self.current is not self.main:
            self.hub.switch()

    # -- the hub ------------------------------------------------------------------------------

    def run_task(self, name: str, fn: Callable[[], Any]) -> Any:
        """Run `fn` as a task, and everybody else with it, until it is done; return its result.

        From inside a task, `fn` runs there and then.
        """
        if self.current is not self.main:
            return fn()
        task = self.spawn(name, fn)
        self._loop(lambda: task.done)
        if task.error is not None:
            raise task.error
        return task.result

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Run tasks until `condition()` is true. Only from the hub."""
        self._loop(condition)

    def _loop(self, condition: Callable[[], bool]) -> None:
        main = self.main
        stream = self.stream
        while not condition():
            task = self._pick(condition)
            if task is None:
                return
            self.current = task
            stream.ctx = task.ctx
            try:
                task.glet.switch()
            finally:
                self.current = main
                stream.ctx = main.ctx
            if task.done:
                self.tasks.remove(task)
                if task.error is not None and task.name != "" and not condition():
                    raise task.error

    def _pick(self, condition: Callable[[], bool]) -> Task | None:
        """Who runs next; None: a timer made `condition` true and nobody need run."""
        jumped = False
        while True:
            if self._timers and self._timers[0][0] <= self.now:
                self.run_timers()
            if jumped and condition():
                return None
            if self.runnable:
                if self.strategy is not None:
                    return self.strategy.pick(self.runnable)
                return self.runnable.popleft()
            when = self.next_timer()
            if when is None:
                stuck = ", ".join(f"{t.name} on {t.blocked_on}" for t in self.tasks if t.blocked_on)
                raise BrokenTruth("no-deadlock", f"nobody can run: {stuck or 'no tasks'}")
            self.now = max(self.now, when)
            jumped = True

    def close(self) -> None:
        """Kill every task where it stands; for the end of a machine. What a task says while it
        unwinds is nobody's business any more."""
        self.set_on_point(None)
        self.set_strategy(None)
        for task in self.tasks:
            for _ in range(8):
                # A task's cleanup may block again; after a few times it is left alone.
                if task.done or task.glet.dead:
                    break
                self.current = task
                with contextlib.suppress(BaseException):
                    task.glet.throw(greenlet.GreenletExit)
        self.current = self.main
        self.tasks.clear()
        self.runnable.clear()
        self._timers.clear()
