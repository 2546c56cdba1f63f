"""What differs between kernels in KVM, as data named by behaviour.

Source of truth: virt/kvm/kvm_main.c and arch/x86/kvm/mmu/* of the kernel that gives the profile its
name.

Not modelled: linux-5.10 (its A/D transfer on zap, change_pte, APIC reload from invalidate_range).
"""

from __future__ import annotations

import msgspec

__all__ = ["LINUX_6_18", "KvmProfile"]


class KvmProfile(msgspec.Struct, frozen=True):
    """One kernel's behaviour.

    `retry_scope`: which invalidations make a fault retry, `gfn-range` (those whose union of ranges
    holds the gfn) or `any`. `lock_on_every_start`: range_start takes mmu_lock and raises the count
    even if no memslot is hit. `unlocked_retry_check`: the fault path asks before and after GUP, too.
    `lockless_aging`: aging takes no mmu_lock. `flush_on_young`: clear_flush_young flushes.
    `nr_memslot_as_ids`: normal memory and SMM. `mmu_cache_objects`: capacity of a vCPU's cache of
    page-table pages, `mmu_cache_min` what a fault tops it up to at least.
    """

    name: str
    retry_scope: str = "gfn-range"
    lock_on_every_start: bool = False
    unlocked_retry_check: bool = True
    lockless_aging: bool = True
    flush_on_young: bool = False
    nr_memslot_as_ids: int = 2
    mmu_cache_objects: int = 40
    mmu_cache_min: int = 5


LINUX_6_18 = KvmProfile(name="linux-6.18")
