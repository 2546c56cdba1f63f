"""KVM's protocol switches: each leaves out one step of the notifier or MMU protocol.

A switch is tested where the step stands: `if "no-flush" not in kvm.breaks`. With a switch on, one
of the checked truths fails: which, and in what run, is in refault/switch_runs.toml.

Not modelled: switches of the host side (host_mm/breaks.py). Syncing an unsync page in the wrong role has
none: pages are found by their whole role and synced under a root of that role, also in SMM, so that the
check (mmu/shadow_sync.py) refuses nothing without nested guests.
"""

from __future__ import annotations

__all__ = ["BREAKS"]

BREAKS: dict[str, str] = {
    "apf-no-wakeup": "a page that was read in for a vCPU that sleeps wakes nobody",
    "apic-reload-early": "the address of the APIC's page is reloaded too early",
    "attributes-no-bracket": "a page becomes private while a fault that took it for shared maps it",
    "drop-ad": "a page mapped writable is not marked dirty, so reclaim may drop it as clean",
    "flush-after-unlock": "range_start flushes only after it dropped mmu_lock",
    "gmem-no-unmap": "a hole in guest_memfd frees pages that SPTEs still map",
    "gpc-late-count": "a pfn cache's refresh looks at the count that is raised too late",
    "gpc-map-before-invalidate": "a pfn cache stays valid while it is given another page",
    "gpc-skip-invalidate": "range_start does not tell the pfn caches",
    "huge-in-log": "a page whose slot logs dirty pages is mapped huge all the same",
    "ignore-invalid-roots": "range_start skips roots that a memslot update invalidated",
    "ignore-invalid-slot": "a fault in the TDP MMU on a slot being deleted makes it MMIO",
    "ignore-role-access": "shadow pages are found whatever rights led to them when they were made",
    "ignore-role-wp": "shadow pages are found whatever CR0.WP was when they were made",
    "ignore-smm-slots": "range_start does not look for slots of the SMM space",
    "link-unsynced": "a stale shadow table is linked without being synced first",
    "log-no-flush": "reading or clearing a dirty log does not flush what it protected",
    "mmio-over-leaf": "an MMIO SPTE is stored over a leaf without dropping that from its rmap",
    "no-dirty-on-sync": "a sync that makes an SPTE read-only does not mark the page dirty",
    "no-flush": "range_start never asks vCPUs to flush their TLBs",
    "no-gpte-recheck": "a fault does not read again, under mmu_lock, the entries it walked",
    "no-invlpg-sync": "INVLPG does not look at the SPTE of the address",
    "no-mark-parents": "tables above an unsync page do not hear of it",
    "no-memslot-wait": "a memslot update does not wait for open brackets",
    "no-range-union": "a second bracket replaces the range of the first",
    "no-retry": "a fault never asks whether its pfn went stale",
    "no-root-sync": "a load of CR3 syncs nothing",
    "no-table-protect": "a guest table is shadowed while the guest can still write it",
    "no-track-flush": "a page whose writes are tracked is protected, but not flushed",
    "no-track-write": "an emulated write to a guest table changes no shadow page",
    "one-pt-access": "a walk has the last table's rights for all of them",
    "pfnmap-take-ref": "KVM takes a reference to a frame that is mapped raw, whose owner counts none",
    "plain-store": "SPTEs are stored without comparing, so a zapped one can come back",
    "prefetch-in-bracket": "without the TDP MMU a fault maps neighbours in a bracket",
    "retry-before-gup-only": "a fault asks about staleness before GUP, not under lock",
    "seq-before-count": "range_end drops the count before it raises the sequence",
    "skip-end": "KVM ignores range_end",
    "skip-start": "KVM ignores range_start and its range_end",
    "unsync-after-store": "a table becomes writable before its pages are unsync",
}
