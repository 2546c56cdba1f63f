"""What is told about collapses, and the words for how one ended.

Source of truth: mm/khugepaged.c: enum scan_result, include/trace/events/huge_memory.h; Linux 6.18.
"""

from __future__ import annotations

from trace_events.tracepoint import Tracepoint

__all__ = [
    "SCAN_ADDRESS_RANGE", "SCAN_ALLOC_HUGE_PAGE_FAIL", "SCAN_ANY_PROCESS", "SCAN_CGROUP_CHARGE_FAIL",
    "SCAN_DEL_PAGE_LRU", "SCAN_EXCEED_NONE_PTE", "SCAN_EXCEED_SHARED_PTE", "SCAN_EXCEED_SWAP_PTE",
    "SCAN_FAIL", "SCAN_LACK_REFERENCED_PAGE", "SCAN_PAGE_ANON", "SCAN_PAGE_COMPOUND", "SCAN_PAGE_COUNT",
    "SCAN_PAGE_FILLED",
    "SCAN_PAGE_LOCK", "SCAN_PAGE_LRU", "SCAN_PAGE_NULL", "SCAN_PMD_MAPPED", "SCAN_PMD_NONE",
    "SCAN_PMD_NULL", "SCAN_PTE_MAPPED_HUGEPAGE", "SCAN_PTE_NON_PRESENT", "SCAN_PTE_UFFD_WP", "SCAN_SUCCEED",
    "SCAN_TRUNCATED", "SCAN_VMA_CHECK", "SCAN_VMA_NULL", "TRACEPOINTS",
]

SCAN_FAIL = "failed"
SCAN_SUCCEED = "succeeded"
SCAN_PMD_NULL = "pmd_null"
SCAN_PMD_NONE = "pmd_none"
SCAN_PMD_MAPPED = "page_pmd_mapped"
SCAN_EXCEED_NONE_PTE = "exceed_none_pte"
SCAN_EXCEED_SWAP_PTE = "exceed_swap_pte"
SCAN_EXCEED_SHARED_PTE = "exceed_shared_pte"
SCAN_PTE_NON_PRESENT = "pte_non_present"
SCAN_PTE_UFFD_WP = "pte_uffd_wp"
SCAN_PTE_MAPPED_HUGEPAGE = "pte_mapped_hugepage"
SCAN_LACK_REFERENCED_PAGE = "lack_referenced_page"
SCAN_PAGE_NULL = "page_null"
SCAN_PAGE_COUNT = "not_suitable_page_count"
SCAN_PAGE_LRU = "page_not_in_lru"
SCAN_PAGE_LOCK = "page_locked"
SCAN_PAGE_ANON = "page_not_anon"
SCAN_PAGE_COMPOUND = "page_compound"
SCAN_ANY_PROCESS = "no_process_for_page"
SCAN_VMA_NULL = "vma_null"
SCAN_VMA_CHECK = "vma_check_failed"
SCAN_ADDRESS_RANGE = "not_suitable_address_range"
SCAN_DEL_PAGE_LRU = "could_not_delete_page_from_lru"
SCAN_ALLOC_HUGE_PAGE_FAIL = "alloc_huge_page_failed"
SCAN_CGROUP_CHARGE_FAIL = "ccgroup_charge_failed"
SCAN_TRUNCATED = "truncated"
SCAN_PAGE_FILLED = "page_filled"
_NUMBERS = {SCAN_FAIL: 0, SCAN_SUCCEED: 1, SCAN_PMD_NULL: 2, SCAN_PAGE_LOCK: 16}
"""Those that mm_collapse_huge_page_swapin prints by number."""

_FOLIO = (1 << 64) - 1
_MM_DOC = "`mm` is the address of the page table's root."

SCAN_PMD = Tracepoint(
    "huge_memory", "mm_khugepaged_scan_pmd",
    ("mm", "pfn", "referenced", "none_or_zero", "status", "unmapped"),
    lambda mm, pfn, referenced, none_or_zero, status, unmapped: (
        f"mm={mm:016x}, scan_pfn=0x{pfn & _FOLIO:x}, referenced={referenced}, none_or_zero={none_or_zero}, "
        f"status={status}, unmapped={unmapped}"
    ),
    doc=_MM_DOC,
)
COLLAPSE = Tracepoint(
    "huge_memory", "mm_collapse_huge_page", ("mm", "isolated", "status"),
    lambda mm, isolated, status: f"mm={mm:016x}, isolated={isolated}, status={status}", doc=_MM_DOC,
)
ISOLATE = Tracepoint(
    "huge_memory", "mm_collapse_huge_page_isolate", ("pfn", "none_or_zero", "referenced", "status"),
    lambda pfn, none_or_zero, referenced, status: (
        f"scan_pfn=0x{pfn & _FOLIO:x}, none_or_zero={none_or_zero}, referenced={referenced}, status={status}"
    ),
)
SWAPIN = Tracepoint(
    "huge_memory", "mm_collapse_huge_page_swapin", ("mm", "swapped_in", "referenced", "status"),
    lambda mm, swapped_in, referenced, status: (
        f"mm={mm:016x}, swapped_in={swapped_in}, referenced={referenced}, ret={_NUMBERS[status]}"
    ),
    doc=_MM_DOC,
)
SCAN_FILE = Tracepoint(
    "huge_memory", "mm_khugepaged_scan_file", ("mm", "pfn", "file", "present", "swap", "status"),
    lambda mm, pfn, file, present, swap, status: (
        f"mm={mm:016x}, scan_pfn=0x{pfn & _FOLIO:x}, filename={file}, present={present}, swap={swap}, "
        f"result={status}"
    ),
    doc=_MM_DOC,
)
COLLAPSE_FILE = Tracepoint(
    "huge_memory", "mm_khugepaged_collapse_file",
    ("mm", "pfn", "index", "address", "is_shmem", "file", "nr", "status"),
    lambda mm, pfn, index, address, is_shmem, file, nr, status: (
        f"mm={mm:016x}, hpage_pfn=0x{pfn & _FOLIO:x}, index={index}, addr={address:x}, "
        f"is_shmem={is_shmem:d}, filename={file}, nr={nr}, result={status}"
    ),
    doc=_MM_DOC,
)
TRACEPOINTS = (SCAN_PMD, COLLAPSE, ISOLATE, SWAPIN, SCAN_FILE, COLLAPSE_FILE)
