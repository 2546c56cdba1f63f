"""`--host SCRIPT.py`: host operations beside a running guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth, OutOfMemory
from refault.errors import UsageError

if TYPE_CHECKING:
    from refault.vm import VM

__all__ = ["start_host_script"]


def start_host_script(vm: VM, text: str) -> None:
    """Run a host script beside the guest: its function `main(vm, host)` in a task of its own.

    `host` has the host operations and `host.sleep(ns)`, which waits in logical time.
    """
    scope: dict[str, Any] = {"__name__": "host_script"}
    try:
        exec(compile(text, "--host script", "exec"), scope)
    except Exception as exc:
        raise UsageError(f"--host script: {type(exc).__name__}: {exc}") from None
    entry = scope.get("main")
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
        except Exception as exc:
            raise UsageError(f"--host script: {type(exc).__name__}: {exc}") from None

    sched.spawn("host script", body)
