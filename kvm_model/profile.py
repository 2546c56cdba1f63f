"""What differs between kernels in KVM, as data named by behaviour.

Source of truth: virt/kvm/kvm_main.c and arch/x86/kvm/mmu/* of the kernel that gives the profile its
name.

Not modelled of 5.10: the role's bit for the guest's entry size, which says the opposite there; SPTE bits at
other places; that a TDP MMU's root goes with the last vCPU that has it; what it does wrong in shadow paging
and was mended (one pt_access for all levels, CVE-2021-38198, and tables that are linked before their children
are synced: the switches one-pt-access and link-unsynced); that an emulated write to a table makes the new
SPTE at once, and that a new upper table syncs unsync pages of its gfn instead of zapping them.
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
    Of asynchronous page faults: `apf_token_never_zero`; `apf_needs_paging`: no token while CR0.PG is clear;
    `apf_ready_keeps_error_code`: the page is mapped for the access that faulted, not for a read;
    `block_traces_wakeup`: their wait is traced as HLT's is.
    `dirty_ring`: there are dirty rings. `guest_memfd`: there are guest_memfd and memory attributes.
    `pre_fault_memory`: there is KVM_PRE_FAULT_MEMORY.

    `tdp_mmu`: the default of the module parameter. The rest is of VMs without the TDP MMU:
    `obsolete_root_check`: a fault whose root is obsolete is retried. `unmap_breaks_lock`: an unmap gives
    mmu_lock to others between rmaps. `obsolete_zap_breaks_lock`: so does the zap of obsolete pages.
    `flush_on_lost_bits`: a leaf that loses W, A or D is flushed, not only one that loses the right to W.
    `fast_fault_of_any_nonpresent`: the fast path looks at every fault on what is not present, and at no
    fetch from what is; `fast_fault_fixes_huge`: it may make huge leaves of slots without log writable.
    `prefetches_last_run`: the neighbours behind the last present one are mapped, too.
    `prefetch_leaves_same_pfn`: a prefetch never touches a leaf of the same frame. `noslot_drops_leaf`: an
    MMIO SPTE takes the leaf that stood there out of its rmap, and is traced as one set.
    `large_spte_dropped_first`: a huge leaf goes before the table for its place is found.
    `recycles_newest_pages`: with too many tables the newest go first. `log_flush_if_changed`: turning a log
    on flushes only if an SPTE changed. `init_set_protects_huge`: with a log that starts full huge leaves are
    protected when it starts, not when it is cleared. `collapses_any_compound_page`: when a log ends every 4K
    leaf of a compound page goes.

    `user_mem_slots`: memory slots that user space may have, KVM's own come behind. `max_vcpu_ids`: vCPUs are
    numbered below it; `max_vcpus`: how many there may be.

    Of the walk of guest tables: `cmpxchg_gpte_by_gup`: it sets A and D in a frame that GUP gave, not through
    the VMM's mapping. `smap_implicit_by_cpl`: any supervisor access at CPL 3 counts as implicit, not only
    what KVM says is. `shadow_role_forces_nx`: shadow pages have NX whatever the guest's EFER says, and no
    bits of the control registers while the guest's paging is off.

    `slot_zap_invalidates_roots`: a slot's deletion makes a TDP MMU's roots invalid and zaps them later,
    else it zaps below them at once, and who is asked to drop obsolete roots drops all.
    `invalid_slot_is_noslot`: a fault on a slot that is being deleted makes an MMIO SPTE, over a leaf as well,
    instead of being retried.

    `mmu_is_page_track_node`: the MMU itself is a node of the page-track head, hears so of emulated writes,
    and zaps a slot when the head is told to flush it.

    `pfn_caches`: KVM reaches guest pages that it writes often by gfn_to_pfn caches that the notifier knows.
    `apic_reload_retries`: reloading the APIC page's address looks whether it is being invalidated, and is
    asked for where SPTEs are zapped; else by the notifier's invalidate_range.
    `quirks`: those that can be disabled, of which slot-zap-all alone is looked at. `mmu_shrinker`: reclaim
    takes table pages back.

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
    guest_memfd: bool = True
    pre_fault_memory: bool = True
    apf_token_never_zero: bool = True
    apf_needs_paging: bool = True
    apf_ready_keeps_error_code: bool = True
    block_traces_wakeup: bool = False
    tdp_mmu: bool = True
    obsolete_root_check: bool = True
    unmap_breaks_lock: bool = True
    obsolete_zap_breaks_lock: bool = True
    flush_on_lost_bits: bool = False
    fast_fault_of_any_nonpresent: bool = False
    fast_fault_fixes_huge: bool = True
    prefetches_last_run: bool = True
    prefetch_leaves_same_pfn: bool = True
    noslot_drops_leaf: bool = False
    large_spte_dropped_first: bool = False
    recycles_newest_pages: bool = False
    log_flush_if_changed: bool = False
    init_set_protects_huge: bool = False
    collapses_any_compound_page: bool = False
    cmpxchg_gpte_by_gup: bool = False
    smap_implicit_by_cpl: bool = False
    shadow_role_forces_nx: bool = True
    slot_zap_invalidates_roots: bool = True
    invalid_slot_is_noslot: bool = False
    mmu_is_page_track_node: bool = False
    pfn_caches: bool = True
    apic_reload_retries: bool = True
    quirks: int = 0x3FF
    mmu_shrinker: bool = False
    absent_events: frozenset[str] = frozenset({"kvm:kvm_age_page", "kvm:kvm_async_pf_doublefault"})
    user_mem_slots: int = 32764
    max_vcpu_ids: int = 4096
    max_vcpus: int = 1024
    nr_memslot_as_ids: int = 2
    mmu_cache_objects: int = 40
    mmu_cache_min: int = 5

    @property
    def version_code(self) -> int:
        """LINUX_VERSION_CODE, without the sublevel."""
        major, minor = self.name.removeprefix("linux-").split(".")
        return int(major) << 16 | int(minor) << 8


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
    guest_memfd=False,
    pre_fault_memory=False,
    apf_token_never_zero=False,
    apf_needs_paging=False,
    apf_ready_keeps_error_code=False,
    block_traces_wakeup=True,
    tdp_mmu=False,
    obsolete_root_check=False,
    unmap_breaks_lock=False,
    obsolete_zap_breaks_lock=False,
    flush_on_lost_bits=True,
    fast_fault_of_any_nonpresent=True,
    fast_fault_fixes_huge=False,
    prefetches_last_run=False,
    prefetch_leaves_same_pfn=False,
    noslot_drops_leaf=True,
    large_spte_dropped_first=True,
    recycles_newest_pages=True,
    log_flush_if_changed=True,
    init_set_protects_huge=True,
    collapses_any_compound_page=True,
    user_mem_slots=509,
    max_vcpu_ids=1023,
    max_vcpus=288,
    cmpxchg_gpte_by_gup=True,
    smap_implicit_by_cpl=True,
    shadow_role_forces_nx=False,
    slot_zap_invalidates_roots=False,
    invalid_slot_is_noslot=True,
    mmu_is_page_track_node=True,
    pfn_caches=False,
    apic_reload_retries=False,
    quirks=0,
    mmu_shrinker=True,
    absent_events=frozenset({
        "kvm:kvm_age_hva", "kvm:kvm_async_pf_repeated_fault", "kvm:kvm_dirty_ring_exit",
        "kvm:kvm_dirty_ring_push", "kvm:kvm_dirty_ring_reset", "kvm:kvm_test_age_hva",
        "kvm:kvm_unmap_hva_range", "kvm:kvm_vm_set_mem_attributes",
        "kvmmmu:kvm_mmu_split_huge_page", "kvmmmu:kvm_tdp_mmu_spte_changed",
    }),
)
PROFILES = {profile.name: profile for profile in (LINUX_6_18, LINUX_5_10)}
