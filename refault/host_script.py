"""`--host SCRIPT.py`: host operations beside a running guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth, OutOfMemory
from refault.errors import UsageError
from refault.user_code import execute, user_error

if TYPE_CHECKING:
    from refault.vm import VM

__all__ = ["start_host_script"]


_NAME = "--host script"


def start_host_script(vm: VM, text: str) -> None:
    """Run a host script beside the guest: its function `main(vm, host)` in a task of its own.

    `host` has the host operations and `host.sleep(ns)`, which waits in logical time.
    """
    entry = execute(_NAME, text, "host_script").get("main")
    if not callable(entry):
        raise UsageError("--host script: it defines no function main(vm, host)")
    sched = vm.board.host.sched

    class _Host:
        sleep = staticmethod(sched.sleep)

        def __getattr__(self, name: str) -> Callable[..., int]:
            return getattr(vm.host, name)

    def body() -> None:
        try:
            entry(vm, _Host())
        except (BrokenTruth, OutOfMemory):
            raise
        except (Exception, SystemExit) as exc:
            raise user_error(_NAME, exc) from None

    sched.spawn("host script", body)
    # First in line: a short guest would have ended before the script began.
    sched.runnable.rotate(1)
