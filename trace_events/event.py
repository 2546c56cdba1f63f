"""One fired tracepoint, as it is kept in memory and in trace files."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Event"]


class Event(msgspec.Struct, frozen=True, array_like=False, omit_defaults=True):
    """A fired tracepoint.

    `seq` numbers every event of a machine from 0, whether or not anybody kept it. `ts` is logical
    time in nanoseconds. `cause` is the `seq` of the enclosing operation, bracket or fault;
    `killed_by`, on a fault, the `seq` of the event that removed this gfn's last mapping.
    `args` maps field names to values in declaration order.
    """

    seq: int
    ts: int
    event: str
    task: str
    vcpu: int = -1
    cause: int | None = None
    killed_by: int | None = None
    args: dict[str, Any] = {}

    @property
    def system(self) -> str:
        """The part of `event` before the colon."""
        return self.event.partition(":")[0]

    @property
    def name(self) -> str:
        """The part of `event` after the colon."""
        return self.event.partition(":")[2]
