"""What differs between kernel generations in mm, as data named by behaviour.

Source of truth: mm/*.c, fs/proc/task_mmu.c and include/trace/events/*.h of Linux 6.18 and 5.10 (5.10.13).

Not modelled: generations other than these two. Of 5.10: that clear_refs flushes nothing if it was alone;
mlock without counts, and munlock by a walk of the reverse map; that a COW drops the old page under the
page-table lock; KSM's zero pages without a mark and its merged pages that an mremap parts; limits of
MREMAP_DONTUNMAP; a fork that gives its locks up every 32 entries; clear_refs under mmap_lock for reading
only; a NUMA hint that remembers the right to write; that userfaultfd has neither minor faults nor poison
and write-protects anonymous memory only; the print formats where a tracepoint's text differs.
"""

from __future__ import annotations

import msgspec

__all__ = ["LINUX_5_10", "LINUX_6_18", "PROFILES", "MmProfile"]


class MmProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel's mm. The defaults are those of 6.18.

    Notifiers. `change_pte`: set_pte_at_notify tells them the new entry, before it is set.
    `invalidate_range`: *_clear_flush_notify and the unmapping of a page call invalidate_range under the
    page-table lock, brackets call it once more as they end, but those that end by
    mmu_notifier_invalidate_range_only_end. `refused_start_ends_others`: when one notifier refuses a start,
    the others are told the end. `absent_events`: tracepoints this kernel has not.

    Orders. `mprotect_bracket_level`: the table level whose walker opens change_protection's bracket, 3 (PUD)
    or 2 (PMD). `mprotect_gathers`: its flush is a gather's, else one over the whole range of the VMA.
    `mprotect_unaccounts`: anonymous memory never touched loses VM_ACCOUNT with the right to write.
    `madvise_gathers_once`: DONTNEED and FREE flush once for all VMAs, else VMA by VMA. `migrate_batches`:
    migration unmaps many folios, their flush deferred, before it moves the first; else one at a time.
    `hugetlb_unmap_brackets`: unmapping huge pages opens a bracket of its own, an UNMAP, inside the caller's.

    Copies. `anon_exclusive`: who owns an anonymous page goes by PG_anon_exclusive, which COW reuse, pins,
    migration, swap entries and mprotect look at; without it COW reuses a page that nobody else refers to.
    `cow_frees_swap_cache`: a COW gives the old page's slot back if it was the last that used it.
    `reclaim_asks_for_pins_twice`: reclaim looks whether a page may be pinned once more when it is unmapped.
    `lazyfree_checks_references`: reclaim drops a MADV_FREE page only if nobody but its mappings refers to it.
    `migration_keeps_ad`: migration entries carry the accessed and dirty bits over.

    Features. `mremap_moves_level`: the highest level whose whole tables mremap moves. `mremap_realigns`: it
    extends the range down to 2 MiB for that. `madv_populate`: MADV_POPULATE_* exist. `madv_collapse`: so does
    MADV_COLLAPSE. `ksm_smart_scan`: ksmd skips pages that it tried to merge in vain. `device_exclusive`:
    make_device_exclusive exists (the EXCLUSIVE event). `device_inserts_name_owner`: the bracket in which
    holes become device memory is MIGRATE with its owner, else CLEAR. `pagemap_scan`: that ioctl exists.
    `userfaultfd_features`: the UFFD_FEATURE_* that UFFDIO_API offers, with their ioctls.
    `refuses_longterm_file_pins`: no long-term pin for writing of a page whose file must know of writes.
    """

    name: str
    change_pte: bool = False
    invalidate_range: bool = False
    refused_start_ends_others: bool = True
    absent_events: frozenset[str] = frozenset()
    mprotect_bracket_level: int = 3
    mprotect_gathers: bool = True
    mprotect_unaccounts: bool = True
    madvise_gathers_once: bool = True
    migrate_batches: bool = True
    hugetlb_unmap_brackets: bool = False
    anon_exclusive: bool = True
    cow_frees_swap_cache: bool = True
    reclaim_asks_for_pins_twice: bool = True
    lazyfree_checks_references: bool = True
    migration_keeps_ad: bool = True
    mremap_moves_level: int = 3
    mremap_realigns: bool = True
    madv_populate: bool = True
    madv_collapse: bool = True
    ksm_smart_scan: bool = True
    device_exclusive: bool = True
    pagemap_scan: bool = True
    refuses_longterm_file_pins: bool = True
    device_inserts_name_owner: bool = True
    userfaultfd_features: int = 0x1FCA1


LINUX_6_18 = MmProfile(name="linux-6.18")
LINUX_5_10 = MmProfile(
    name="linux-5.10",
    change_pte=True,
    invalidate_range=True,
    refused_start_ends_others=False,
    absent_events=frozenset({
        "migrate:mm_migrate_pages_start", "migrate:remove_migration_pte", "migrate:set_migration_pte",
        "ksm:ksm_merge_one_page", "ksm:ksm_merge_with_ksm_page", "ksm:ksm_remove_ksm_page",
        "ksm:ksm_remove_rmap_item", "ksm:ksm_start_scan", "ksm:ksm_stop_scan", "ksm:ksm_enter",
        "ksm:ksm_exit", "vmscan:mm_vmscan_reclaim_pages", "vmscan:mm_vmscan_throttled",
        "vmscan:mm_vmscan_write_folio",
    }),
    mprotect_bracket_level=2,
    mprotect_gathers=False,
    mprotect_unaccounts=False,
    madvise_gathers_once=False,
    migrate_batches=False,
    hugetlb_unmap_brackets=True,
    anon_exclusive=False,
    cow_frees_swap_cache=False,
    reclaim_asks_for_pins_twice=False,
    lazyfree_checks_references=False,
    migration_keeps_ad=False,
    mremap_moves_level=2,
    mremap_realigns=False,
    madv_populate=False,
    madv_collapse=False,
    ksm_smart_scan=False,
    device_exclusive=False,
    pagemap_scan=False,
    refuses_longterm_file_pins=False,
    device_inserts_name_owner=False,
    userfaultfd_features=0xA1,
)
PROFILES = {profile.name: profile for profile in (LINUX_6_18, LINUX_5_10)}
