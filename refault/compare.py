"""The first place where two traces part, and what led there.

Not modelled: alignment after the first difference. Traces are numbered by everything that happened
before, so that what follows the first difference says little.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

import msgspec

from trace_events.event import Event

__all__ = ["IGNORABLE", "Difference", "first_difference", "header_differences"]

IGNORABLE = ("seq", "ts", "task", "vcpu", "cause", "killed_by")


class Difference(msgspec.Struct, frozen=True):
    """Where two traces part: the index in both, the first field that differs, both records.

    A record is None where that trace has ended.
    """

    index: int
    field: str
    left: Event | None
    right: Event | None


def first_difference(
    left: Sequence[Event], right: Sequence[Event], ignore: Collection[str] = ()
) -> Difference | None:
    """The first pair of events that differ in a field not in `ignore`, or None.

    `ignore` names fields of the event (`ts`, `task`, ...) or of its arguments (`hpa`, ...).
    """
    for index, (one, other) in enumerate(zip_longest(left, right)):
        if one == other:
            continue
        if one is None or other is None:
            return Difference(index, "end of trace", one, other)
        field = _first_field(one, other, ignore)
        if field is not None:
            return Difference(index, field, one, other)
    return None


def _first_field(one: Event, other: Event, ignore: Collection[str]) -> str | None:
    if one.event != other.event:
        return "event"
    # In declaration order: what a field depends on usually stands before it.
    for name in [*one.args, *(name for name in other.args if name not in one.args)]:
        if name not in ignore and _arg(one, name) != _arg(other, name):
            return name
    for name in ("task", "vcpu", "cause", "killed_by", "ts", "seq"):
        if name not in ignore and getattr(one, name) != getattr(other, name):
            return name
    return None


_MISSING = object()


def _arg(event: Event, name: str) -> Any:
    return event.args.get(name, _MISSING)


def header_differences(left: Any, right: Any, path: str = "") -> list[str]:
    """The settings in which two machine configurations differ, as `path: left != right`."""
    if isinstance(left, dict) and isinstance(right, dict):
        found: list[str] = []
        for key in sorted(left.keys() | right.keys()):
            found += header_differences(left.get(key), right.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if left == right else [f"{path}: {left!r} != {right!r}"]
