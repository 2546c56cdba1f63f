"""The form in which a scenario's event sequences are compared.

Host-side lines: steps with their results, notifier events with ranges as offsets from `D`. Times,
durations and absolute addresses are dropped. Ranges that touch neither slot are dropped, as the
recordings dropped them; a range is always the whole one, never clamped.
"""

from __future__ import annotations

import re

__all__ = ["HOST_EVENTS", "NOISE", "SLOT0_OFFSET", "SLOT0_SIZE", "format_range", "normal_recorded"]

HOST_EVENTS = ("kvm_unmap_hva_range", "kvm_age_hva", "kvm_test_age_hva")
NOISE = ("kvm_fpu", "kvm_emulate_insn", "kvm_pio", "kvm_update_master_clock", "kvm_mmu_paging_element")
"""Events of the real kernel that say nothing about memory, or the same thing again."""
SLOT0_OFFSET = 0xA00000
SLOT0_SIZE = 0x200000

_LINE = re.compile(r"\s*\d+us (.*)$")
_RANGE = re.compile(r"0x([0-9a-f]+)(?: -- 0x([0-9a-f]+))?.*\[D\+?(-?0x[0-9a-f]+)")


def format_range(event: str, start: int, end: int) -> str:
    """One notifier line; `start` and `end` are offsets from D, or the absolute 0 and 2**64 - 1."""
    if (start, end) == (0, (1 << 64) - 1):
        return f"{event} [whole mm]"
    return f"{event} [D{start:+#x}..D{end:+#x}]"


def _notifier_line(event: str, rest: str) -> str:
    found = _RANGE.search(rest)
    if found is None:
        raise ValueError(f"not a notifier line of a recording: {event}: {rest}")
    first, last = int(found[1], 16), int(found[2] or found[1], 16)
    if (first, last) == (0, (1 << 64) - 1):
        return format_range(event, first, last)
    offset = int(found[3], 16)
    return format_range(event, offset, offset + last - first)


def normal_recorded(text: str) -> list[str]:
    """The host-side lines of a recording."""
    lines: list[str] = []
    for raw in text.splitlines():
        found = _LINE.match(raw)
        if found is None:
            continue
        # A mark of another thread than the VMM's first one ends with its name.
        line = re.sub(r" \(\S+-\d+\)$", "", found[1].rstrip())
        if line.startswith(">> "):
            lines.append(line)
        elif line.startswith("<< "):
            lines.append(_result(re.sub(r" \d+us$", "", line)))
        else:
            event, _, rest = line.partition(": ")
            if event in HOST_EVENTS:
                lines.append(_notifier_line(event, rest))
    return lines


def _result(line: str) -> str:
    # "OSError 14 EFAULT; exit=('UNKNOWN',)": what the exit record held is the ioctl's, not mm's.
    line = re.sub(r"OSError \d+ (E\w+);.*", r"\1", line).rstrip()
    # What errno an earlier call left is no part of an answer of 0.
    line = re.sub(r": rc 0 errno \d+", ": rc 0", line)
    # pages_sharing counts the pages of every process of the recording machine.
    return re.sub(r": pages_sharing \d+$", ": pages_sharing", line)
