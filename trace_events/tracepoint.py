"""A tracepoint's declaration: the constant half of tracing.

Source of truth for the `kvm`, `kvmmmu`, `migrate`, `vmscan` and `ksm` systems: the kernel's TRACE_EVENT
headers (arch/x86/kvm/trace.h, arch/x86/kvm/mmu/mmutrace.h, include/trace/events/*; Linux 6.18).
Events of system `refault` are what Linux does not trace.

A declaration stands beside the code that fires it:

    KVM_UNMAP_HVA_RANGE = Tracepoint(
        "kvm", "kvm_unmap_hva_range", ("start", "end"),
        lambda start, end: f"mmu notifier unmap range: {start:#016x} -- {end:#016x}",
    )

and is bound per machine by `TraceStream.bind`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Tracepoint"]


class Tracepoint:
    """One event's system, name, field names in firing order, and print format.

    `fields` may hold ints, strings, bools and None only: they must survive a JSON round trip.
    `fmt` takes the fields by position and returns the text after `name: ` in a report line.
    `scope` marks an event that other events may name as their cause; a filtered trace keeps it
    when it keeps one of its descendants.
    """

    __slots__ = ("doc", "fields", "fmt", "full_name", "name", "scope", "system")

    def __init__(
        self,
        system: str,
        name: str,
        fields: tuple[str, ...],
        fmt: Callable[..., str],
        *,
        scope: bool = False,
        doc: str = "",
    ) -> None:
        self.system = system
        self.name = name
        self.fields = fields
        self.fmt = fmt
        self.scope = scope
        self.doc = doc
        self.full_name = f"{system}:{name}"

    def format(self, args: tuple[Any, ...]) -> str:
        """The text after `name: `, as the kernel's `print fmt` gives it."""
        return self.fmt(*args)

    def __repr__(self) -> str:
        return f"<Tracepoint {self.full_name}>"
