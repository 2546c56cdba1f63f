"""`--host SCRIPT.py`: host operations beside a running guest."""

from __future__ import annotations

from collections.abc import Callable
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth, OutOfMemory
from refault.errors import UsageError

if TYPE_CHECKING:
    from refault.vm import VM

__all__ = ["start_host_script"]


_NAME = "--host script"


def _error(error: BaseException) -> UsageError:
    """The error with the last line of the script that led to it."""
    # A SyntaxError names its line itself.
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == _NAME]
    place = f"{_NAME}, line {lines[-1]}" if lines else _NAME
    return UsageError(f"{place}: {type(error).__name__}: {error}")


def start_host_script(vm: VM, text: str) -> None:
    """Run a host script beside the guest: its function `main(vm, host)` in a task of its own.

    `host` has the host operations and `host.sleep(ns)`, which waits in logical time.
    """
    scope: dict[str, Any] = {"__name__": "host_script"}
    try:
        exec(compile(text, _NAME, "exec"), scope)
    except (Exception, SystemExit) as exc:
        raise _error(exc) from None
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
        except (Exception, SystemExit) as exc:
            raise _error(exc) from None

    sched.spawn("host script", body)
    # First in line: a short guest would have ended before the script began.
    sched.runnable.rotate(1)
