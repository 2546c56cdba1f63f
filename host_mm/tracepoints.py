"""Every tracepoint of mm.

Source of truth: the modules named here, each of which declares its own beside the code that fires them.
"""

from __future__ import annotations

from typing import Any

from host_mm import (
    backing_file,
    compaction_trace,
    filemap_cache,
    filemap_fault,
    fork,
    gup,
    hmm_mirror,
    huge_memory_pmd,
    huge_memory_split,
    interval_notifier,
    khugepaged,
    khugepaged_trace,
    ksm,
    ksm_merge,
    ksm_scan,
    ksm_tree,
    lru,
    lru_gen_walk,
    memory,
    memory_device,
    memory_failure,
    migrate_device,
    migrate_types,
    mmu_notifier,
    numa_balancing,
    oom_kill,
    page_alloc,
    page_io,
    page_isolation,
    process,
    rmap_device,
    rmap_unmap,
    shmem,
    swap_state,
    swapin,
    tlb,
    userfaultfd_k,
    vmscan,
    vmscan_trace,
    zswap,
)

__all__ = ["all_tracepoints"]

_MODULES = (
    backing_file,
    compaction_trace,
    filemap_cache,
    filemap_fault,
    fork,
    gup,
    hmm_mirror,
    huge_memory_pmd,
    huge_memory_split,
    khugepaged,
    khugepaged_trace,
    interval_notifier,
    ksm_scan,
    ksm,
    ksm_merge,
    ksm_tree,
    lru,
    lru_gen_walk,
    memory,
    memory_device,
    memory_failure,
    migrate_types,
    migrate_device,
    mmu_notifier,
    numa_balancing,
    oom_kill,
    page_alloc,
    page_io,
    page_isolation,
    process,
    rmap_device,
    rmap_unmap,
    shmem,
    swap_state,
    swapin,
    tlb,
    userfaultfd_k,
    vmscan,
    vmscan_trace,
    zswap,
)


def all_tracepoints() -> list[Any]:
    """In the order in which a trace's header names them."""
    return [tp for module in _MODULES for tp in getattr(module, "TRACEPOINTS", ())]
