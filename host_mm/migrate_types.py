"""What all who migrate pages share: modes, reasons, targets, tracepoints.

Source of truth: include/linux/migrate_mode.h, include/linux/migrate.h, include/trace/events/migrate.h,
mm/internal.h: struct migration_target_control; Linux 6.18.
"""

from __future__ import annotations

from collections.abc import Callable

from trace_events.tracepoint import Tracepoint

__all__ = [
    "MIGRATE_ASYNC",
    "MIGRATE_FOLIO",
    "MIGRATE_SYNC",
    "MIGRATE_SYNC_LIGHT",
    "MM_MIGRATE_PAGES",
    "MM_MIGRATE_PAGES_START",
    "MR_COMPACTION",
    "MR_CONTIG_RANGE",
    "MR_LONGTERM_PIN",
    "MR_MEMORY_FAILURE",
    "MR_MEMORY_HOTPLUG",
    "MR_MEMPOLICY_MBIND",
    "MR_NUMA_MISPLACED",
    "MR_SYSCALL",
    "TRACEPOINTS",
    "MigrationTarget",
    "NewFolio",
    "PutFolio",
]

MIGRATE_ASYNC = 0
MIGRATE_SYNC_LIGHT = 1
MIGRATE_SYNC = 2
_MODES = ("MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC")

MR_COMPACTION = 0
MR_MEMORY_FAILURE = 1
MR_MEMORY_HOTPLUG = 2
MR_SYSCALL = 3
MR_MEMPOLICY_MBIND = 4
MR_NUMA_MISPLACED = 5
MR_CONTIG_RANGE = 6
MR_LONGTERM_PIN = 7
_REASONS = (
    "compaction", "memory_failure", "memory_hotplug", "syscall_or_cpuset", "mempolicy_mbind",
    "numa_misplaced", "contig_range", "longterm_pin", "demotion", "damon",
)


MM_MIGRATE_PAGES = Tracepoint(
    "migrate", "mm_migrate_pages",
    (
        "succeeded", "failed", "thp_succeeded", "thp_failed", "thp_split", "large_folio_split", "mode",
        "reason",
    ),
    lambda ok, bad, thp_ok, thp_bad, thp_split, split, mode, reason: (
        f"nr_succeeded={ok} nr_failed={bad} nr_thp_succeeded={thp_ok} nr_thp_failed={thp_bad} "
        f"nr_thp_split={thp_split} nr_split={split} mode={_MODES[mode]} reason={_REASONS[reason]}"
    ),
)
MM_MIGRATE_PAGES_START = Tracepoint(
    "migrate", "mm_migrate_pages_start", ("mode", "reason"),
    lambda mode, reason: f"mode={_MODES[mode]} reason={_REASONS[reason]}", scope=True,
)
MIGRATE_FOLIO = Tracepoint(
    "refault", "migrate_folio", ("src", "dst", "result"),
    lambda src, dst, result: f"pfn {src:#x} to {dst:#x} {result}",
    doc="One attempt to move one folio, after it was unmapped: moved, again (extra references), undone.",
)
TRACEPOINTS = (MM_MIGRATE_PAGES, MM_MIGRATE_PAGES_START, MIGRATE_FOLIO)


class MigrationTarget:
    """struct migration_target_control: a node (-1: the page's own), request flags, the nodes allowed."""

    __slots__ = ("gfp", "nid", "nodes")

    def __init__(self, nid: int, gfp: int, nodes: frozenset[int] | None = None) -> None:
        self.nid = nid
        self.gfp = gfp
        self.nodes = nodes


NewFolio = Callable[[int], int]
"""From the source pfn to a new frame with one reference, or -1."""
PutFolio = Callable[[int], None]
"""Takes a new frame back that was not used."""
