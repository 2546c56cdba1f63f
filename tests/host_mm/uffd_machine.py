"""A process with a registered range and, where a test wants one, a task that serves its faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host_mm.arch.x86.pgtable import walk_lockless
from host_mm.kernel.errors import KernelError
from host_mm.mmap import do_mmap
from host_mm.truths import audit
from host_mm.uaccess import copy_to_user
from host_mm.userfaultfd import (
    UFFDIO_REGISTER_MODE_MISSING,
    userfaultfd,
    userfaultfd_api,
    userfaultfd_copy,
    userfaultfd_register,
    userfaultfd_release,
)
from host_mm.userfaultfd_k import UffdMsg, UserfaultfdCtx, userfaultfd_ctx_read, userfaultfd_poll
from tests.host_mm.machine import ANON, PAGE, RW, SLOT, Vmm

Answer = Callable[[UffdMsg], Any]


class UffdVmm(Vmm):
    """The slot registered in `mode`; `source` is a page of 0xab bytes, `log` what was read."""

    def __init__(self, mode: int = UFFDIO_REGISTER_MODE_MISSING, features: int = 0, **kw: Any) -> None:
        super().__init__(**kw)
        self.source = do_mmap(self.mm, 0, PAGE, RW, ANON)
        copy_to_user(self.process, self.source, b"\xab" * PAGE)
        self.ctx: UserfaultfdCtx = userfaultfd(self.process)
        userfaultfd_api(self.ctx, features)
        if mode:
            userfaultfd_register(self.ctx, self.base, SLOT, mode)
        self.log: list[tuple[int, int]] = []
        self.stopped = False
        self.brackets()

    def serve(self, answer: Answer) -> None:
        """Start the task that answers each message."""

        ctx = self.ctx

        def body() -> None:
            while True:
                ctx.fd_wqh.wait_event(lambda: userfaultfd_poll(ctx) or self.stopped or ctx.released)
                if not userfaultfd_poll(ctx):
                    return
                try:
                    msg = userfaultfd_ctx_read(ctx)
                except KernelError:
                    continue
                self.log.append((msg.address - self.base, msg.flags))
                answer(msg)

        self.host.sched.spawn("handler", body)

    def stop(self) -> None:
        """Let the handler's task end."""
        self.stopped = True
        self.ctx.fd_wqh.wake_all()

    def copy(self, msg: UffdMsg) -> None:
        """The usual answer: the source's page."""
        userfaultfd_copy(self.ctx, msg.address & -PAGE, self.source, PAGE)

    def task(self, body: Callable[[], Any]) -> Any:
        """Run `body` as a task to its end."""
        return self.host.sched.run_task("t", body)

    def entry(self, offset: int) -> int:
        """The level-1 entry of an offset."""
        entry, level = walk_lockless(self.host.ram, self.mm.pgd, self.base + offset)
        return entry if level == 1 else 0

    def close(self) -> None:
        """Release the userfaultfd and audit."""
        self.task(lambda: userfaultfd_release(self.ctx))
        self.stop()
        self.task(self.host.quiesce)
        audit(self.host)


def errno_of(call: Callable[[], Any]) -> str:
    """The errno's name of a refused call."""
    try:
        call()
    except KernelError as exc:
        return exc.name
    return "ok"
