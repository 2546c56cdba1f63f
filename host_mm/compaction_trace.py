"""What compaction tells: the kernel's compaction:* events.

Source of truth: include/trace/events/compaction.h; Linux 6.18.

Not modelled: mm_compaction_finished, suitable, deferred, defer_reset, try_to_compact_pages and
fast_isolate_freepages.
"""

from __future__ import annotations

from host_mm.mmzone import ZONE_NAMES
from trace_events.tracepoint import Tracepoint

__all__ = ["TRACEPOINTS"]

_STATUS = (
    "not_suitable_zone", "skipped", "deferred", "no_suitable_page", "continue", "complete",
    "partial_skipped", "contended", "success",
)


def _isolate_format(start_pfn: int, end_pfn: int, nr_scanned: int, nr_taken: int) -> str:
    return f"range=({start_pfn:#x} ~ {end_pfn:#x}) nr_scanned={nr_scanned} nr_taken={nr_taken}"


def _zone_name(idx: int) -> str:
    return f"{ZONE_NAMES[idx].capitalize():<8}"


_ISOLATE_FIELDS = ("start_pfn", "end_pfn", "nr_scanned", "nr_taken")
MM_COMPACTION_ISOLATE_MIGRATEPAGES = Tracepoint(
    "compaction", "mm_compaction_isolate_migratepages", _ISOLATE_FIELDS, _isolate_format
)
MM_COMPACTION_ISOLATE_FREEPAGES = Tracepoint(
    "compaction", "mm_compaction_isolate_freepages", _ISOLATE_FIELDS, _isolate_format
)
MM_COMPACTION_MIGRATEPAGES = Tracepoint(
    "compaction", "mm_compaction_migratepages", ("nr_migrated", "nr_failed"),
    lambda nr_migrated, nr_failed: f"nr_migrated={nr_migrated} nr_failed={nr_failed}",
)
MM_COMPACTION_BEGIN = Tracepoint(
    "compaction", "mm_compaction_begin", ("zone_start", "migrate_pfn", "free_pfn", "zone_end", "sync"),
    lambda zone_start, migrate_pfn, free_pfn, zone_end, sync: (
        f"zone_start={zone_start:#x} migrate_pfn={migrate_pfn:#x} free_pfn={free_pfn:#x} "
        f"zone_end={zone_end:#x}, mode={'sync' if sync else 'async'}"
    ),
    scope=True,
)
MM_COMPACTION_END = Tracepoint(
    "compaction", "mm_compaction_end",
    ("zone_start", "migrate_pfn", "free_pfn", "zone_end", "sync", "status"),
    lambda zone_start, migrate_pfn, free_pfn, zone_end, sync, status: (
        f"zone_start={zone_start:#x} migrate_pfn={migrate_pfn:#x} free_pfn={free_pfn:#x} "
        f"zone_end={zone_end:#x}, mode={'sync' if sync else 'async'} status={_STATUS[status]}"
    ),
)
MM_COMPACTION_DEFER_COMPACTION = Tracepoint(
    "compaction", "mm_compaction_defer_compaction",
    ("nid", "idx", "order", "considered", "defer_shift", "order_failed"),
    lambda nid, idx, order, considered, defer_shift, order_failed: (
        f"node={nid} zone={_zone_name(idx)} order={order} order_failed={order_failed} "
        f"consider={considered} limit={1 << defer_shift}"
    ),
)
MM_COMPACTION_WAKEUP_KCOMPACTD = Tracepoint(
    "compaction", "mm_compaction_wakeup_kcompactd", ("nid", "order", "highest_zoneidx"),
    lambda nid, order, idx: f"nid={nid} order={order} classzone_idx={_zone_name(idx)}",
)
MM_COMPACTION_KCOMPACTD_WAKE = Tracepoint(
    "compaction", "mm_compaction_kcompactd_wake", ("nid", "order", "highest_zoneidx"),
    lambda nid, order, idx: f"nid={nid} order={order} classzone_idx={_zone_name(idx)}", scope=True,
)
MM_COMPACTION_KCOMPACTD_SLEEP = Tracepoint(
    "compaction", "mm_compaction_kcompactd_sleep", ("nid",), lambda nid: f"nid={nid}"
)
TRACEPOINTS = (
    MM_COMPACTION_ISOLATE_MIGRATEPAGES, MM_COMPACTION_ISOLATE_FREEPAGES, MM_COMPACTION_MIGRATEPAGES,
    MM_COMPACTION_BEGIN, MM_COMPACTION_END, MM_COMPACTION_DEFER_COMPACTION,
    MM_COMPACTION_WAKEUP_KCOMPACTD, MM_COMPACTION_KCOMPACTD_WAKE, MM_COMPACTION_KCOMPACTD_SLEEP,
)
