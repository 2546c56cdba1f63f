"""What differs between kernels in KVM, as data named by behaviour.

Source of truth: virt/kvm/kvm_main.c and arch/x86/kvm/mmu/* of the kernel that gives the profile its
name.

Not modelled: of 5.10, whose default MMU under EPT is the shadow MMU's direct pages, that MMU: both profiles
have the TDP MMU (5.10's `tdp_mmu=Y`). That a fault on a slot that is being deleted makes an MMIO SPTE; that
a slot's deletion zaps all under one hold of mmu_lock and reloads roots, so that none stands there invalid;
SPTE bits at other places; the APIC page's reload from invalidate_range; gfn_to_pfn caches without notifier.
"""

from __future__ import annotations

import msgspec

__all__ = ["LINUX_5_10", "LINUX_6_18", "PROFILES", "KvmProfile"]


class KvmProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel's behaviour. The defaults are those of 6.18.

    `retry_scope`: which invalidations make a fault retry, `gfn-range` (those whose union of ranges
    holds the gfn) or `any`, and then a fault without a memslot, too. `lock_on_every_start`: the notifier's
    callbacks take mmu_lock, and range_start raises the count, even if no memslot is hit.
    `memslot_update_waits`: a new set of memslots waits for open brackets. `unlocked_retry_check`: the fault
    path asks before and after GUP, too. `mmu_lock_is_rwlock`: faults hold it shared, else it is a spinlock.
    `fast_page_fault`: faults may give rights back in a TDP MMU without it.

    `lockless_aging`: aging takes no mmu_lock. `flush_on_young`: clear_flush_young flushes.
    `age_clears_dirty`: aging clears an SPTE's dirty bit as well. `marks_page_at_drop`: what an SPTE's
    accessed and dirty bits say goes to struct page when they are cleared, and nothing when it is made.
    `dirty_ring`: there are dirty rings.

    `absent_events`: tracepoints this kernel has not.
    `nr_memslot_as_ids`: normal memory and SMM. `mmu_cache_objects`: capacity of a vCPU's cache of
    page-table pages, `mmu_cache_min` what a fault tops it up to at least.
    """

    name: str
    retry_scope: str = "gfn-range"
    lock_on_every_start: bool = False
    memslot_update_waits: bool = True
    unlocked_retry_check: bool = True
    mmu_lock_is_rwlock: bool = True
    fast_page_fault: bool = True
    lockless_aging: bool = True
    flush_on_young: bool = False
    age_clears_dirty: bool = False
    marks_page_at_drop: bool = False
    dirty_ring: bool = True
    absent_events: frozenset[str] = frozenset({"kvm:kvm_age_page"})
    nr_memslot_as_ids: int = 2
    mmu_cache_objects: int = 40
    mmu_cache_min: int = 5


LINUX_6_18 = KvmProfile(name="linux-6.18")
LINUX_5_10 = KvmProfile(
    name="linux-5.10",
    retry_scope="any",
    lock_on_every_start=True,
    memslot_update_waits=False,
    unlocked_retry_check=False,
    mmu_lock_is_rwlock=False,
    fast_page_fault=False,
    lockless_aging=False,
    flush_on_young=True,
    age_clears_dirty=True,
    marks_page_at_drop=True,
    dirty_ring=False,
    absent_events=frozenset({
        "kvm:kvm_age_hva", "kvm:kvm_dirty_ring_exit", "kvm:kvm_dirty_ring_push", "kvm:kvm_dirty_ring_reset",
        "kvm:kvm_test_age_hva", "kvm:kvm_unmap_hva_range",
        "kvmmmu:kvm_mmu_split_huge_page", "kvmmmu:kvm_tdp_mmu_spte_changed",
    }),
)
PROFILES = {profile.name: profile for profile in (LINUX_6_18, LINUX_5_10)}
