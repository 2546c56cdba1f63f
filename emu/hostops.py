"""What can be asked of the host, in one registry.

The same entry serves `vm.host.NAME(...)`, a guest's `vmcall`, a `--host` script, a scenario and
`refault list operations`. An operation is what the kernel offers under a system call, an ioctl or
a debug file; its name says which. It runs in a task of its own (or in the vCPU's thread, for a
vmcall), fires `refault:host_op` as the cause of all it does, and answers an int: at least 0, or a
negative errno for the guest. In Python a refusal is a KernelError.

Addresses are guest physical; `pages` counts 4 KiB pages.
"""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from host_mm.kernel.errors import KernelError
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from emu.board import Board

__all__ = [
    "HOST_OP", "LEAVES_EITHER", "LEAVES_GIVEN", "LEAVES_SAME", "LEAVES_ZEROS", "OPERATIONS", "TRACEPOINTS",
    "HostOperation", "bind_arguments", "operation", "perform",
]

HOST_OP = Tracepoint(
    "refault", "host_op", ("op", "args"),
    lambda op, args: f"{op}({args})",
    scope=True, doc="a host operation asked for by the guest, a script or a caller",
)
HOST_OP_DONE = Tracepoint(
    "refault", "host_op_done", ("op", "result"),
    lambda op, result: f"{op} = {result}",
    doc="its answer: at least 0, or a negative errno",
)
TRACEPOINTS = (HOST_OP, HOST_OP_DONE)


class HostOperation(msgspec.Struct, frozen=True):
    """One operation. `example` is a call that works on a running guest, as text for `vm.host.`;
    `events` are the mmu notifier events that it fires until it returns, in order, the same event in
    a row named once. `leaves` says what the pages of its range hold afterwards: LEAVES_*."""

    name: str
    summary: str
    args: tuple[str, ...]
    events: tuple[str, ...]
    example: str
    run: Callable[..., int]
    leaves: str

    @property
    def takes_a_range(self) -> bool:
        """Whether it can be called with a guest range, `gpa` and `pages`, and nothing else."""
        parameters = list(inspect.signature(self.run).parameters.values())[1:]
        names, rest = [p.name for p in parameters[:2]], parameters[2:]
        return names == ["gpa", "pages"] and all(p.default is not p.empty for p in rest)


OPERATIONS: dict[str, HostOperation] = {}

LEAVES_SAME = "same"
"""What the guest stored: the operation is transparent."""
LEAVES_ZEROS = "zeros"
LEAVES_EITHER = "either"
"""Each page holds what the guest stored or zeros, until it is written again."""
LEAVES_GIVEN = "given"
"""What the arguments say."""


def operation(
    *events: str, example: str, leaves: str = LEAVES_SAME
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function of (board, arguments...) under its own name; its docstring's first
    line is the summary."""

    def register(fn: Callable[..., int]) -> Callable[..., int]:
        name = fn.__name__.removesuffix("_")
        args = tuple(str(p) for p in list(inspect.signature(fn).parameters.values())[1:])
        summary = (fn.__doc__ or "").strip().splitlines()[0]
        OPERATIONS[name] = HostOperation(name, summary, args, events, example, fn, leaves)
        return fn

    return register


def bind_arguments(op: HostOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments of a call, defaults filled in; KernelError(EINVAL) if they don't fit."""
    try:
        bound = inspect.signature(op.run).bind(None, *args, **kwargs)
    except TypeError as exc:
        raise KernelError(errno.EINVAL, f"{op.name}({', '.join(op.args)}): {exc}") from None
    bound.apply_defaults()
    values = bound.args[1:]
    for name, value in zip(op.args, values, strict=False):
        if not isinstance(value, int):
            raise KernelError(errno.EINVAL, f"{op.name}: {name.partition(':')[0]}={value!r} is not a number")
    return values


def perform(board: Board, name: str, *args: Any, **kwargs: Any) -> int:
    """Run operation `name` in the current task and return its answer; KernelError on refusal."""
    op = OPERATIONS.get(name)
    if op is None:
        raise KernelError(errno.ENOSYS, f"no host operation named {name!r}; see `refault list operations`")
    values = bind_arguments(op, args, kwargs)
    if board.closing:
        raise KernelError(errno.ESRCH, "the VM is being destroyed")
    ctx = board.host.stream.ctx
    saved = ctx.cause
    if (t := board.trace.host_op) is not None:
        ctx.cause = t(name, ", ".join(f"{v:#x}" if isinstance(v, int) and v > 9 else str(v) for v in values))
    result = -errno.EIO
    board.operations_inside += 1
    try:
        result = op.run(board, *values)
        return result
    except KernelError as exc:
        result = -(exc.errno or errno.EIO)
        raise
    finally:
        board.operations_inside -= 1
        if (t := board.trace.host_op_done) is not None:
            t(name, result)
        ctx.cause = saved
