"""Every tracepoint of mm.

Source of truth: the modules named here, each of which declares its own beside the code that fires them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["all_tracepoints"]

_MODULES = (
    "backing_file", "compaction_trace", "filemap_cache", "filemap_fault", "gup", "hmm_mirror",
    "huge_memory_pmd", "huge_memory_split", "khugepaged_trace", "interval_notifier", "ksm_scan", "ksm",
    "ksm_merge", "ksm_tree", "lru_gen_walk", "memory", "memory_device", "memory_failure", "migrate_types",
    "migrate_device", "mmu_notifier", "oom_kill", "page_alloc", "page_io", "page_isolation", "process",
    "rmap_device", "rmap_unmap", "shmem", "swap_state", "swapin", "tlb", "userfaultfd_k", "vmscan_trace",
    "zswap",
)


def all_tracepoints() -> list[Any]:
    """For TraceStream.bind."""
    return [tp for name in _MODULES for tp in import_module(f"host_mm.{name}").TRACEPOINTS]
