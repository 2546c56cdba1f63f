"""KVM's protocol switches: each leaves out one step of the notifier or MMU protocol.

A switch is tested where the step stands: `if "no-flush" not in kvm.breaks`. With a switch on, one
of the checked truths is expected to fail; the line says which. Each is shown at work by a command in
refault/switch_runs.toml.

Not modelled: switches of the host side (host_mm/breaks.py).
"""

from __future__ import annotations

__all__ = ["BREAKS"]

BREAKS: dict[str, str] = {
    "apf-no-wakeup": "a page that was read in for a vCPU that sleeps wakes nobody (no-deadlock)",
    "apic-reload-early": "the address of the APIC's page is reloaded too early (vmcs-of-freed-frame)",
    "attributes-no-bracket": "a page becomes private while a fault that took it for shared maps it "
        "(no-spte-in-bracket, spte-matches-host)",
    "drop-ad": "a page mapped writable is not marked dirty, so reclaim may drop it as clean (no-lost-write)",
    "flush-after-unlock": "range_start flushes only after it dropped mmu_lock (flush-before-unlock)",
    "gmem-no-unmap": "a hole in guest_memfd frees pages that SPTEs still map (no-spte-in-bracket)",
    "gpc-late-count": "a pfn cache's refresh looks at the count that is raised too late (gpc-in-bracket)",
    "gpc-map-before-invalidate": "a pfn cache stays valid while it is given another page (gpc-matches-host)",
    "gpc-skip-invalidate": "range_start does not tell the pfn caches (gpc-in-bracket)",
    "ignore-invalid-roots": "range_start skips roots that a memslot update invalidated (no-spte-in-bracket)",
    "ignore-invalid-slot": "a fault in the TDP MMU on a slot being deleted makes it MMIO (no-mmio-over-slot)",
    "ignore-role-wp": "shadow pages are found whatever CR0.WP was when they were made (shadow-agrees)",
    "ignore-smm-slots": "range_start does not look for slots of the SMM space (spte-of-freed-frame)",
    "link-unsynced": "a stale shadow table is linked without being synced first (shadow-flush)",
    "log-no-flush": "reading or clearing a dirty log does not flush what it protected (log-flushed)",
    "no-flush": "range_start never asks vCPUs to flush their TLBs (flush-before-unlock)",
    "no-invlpg-sync": "INVLPG does not look at the SPTE of the address (shadow-flush)",
    "no-mark-parents": "tables above an unsync page do not hear of it (shadow-flush)",
    "no-memslot-wait": "a memslot update does not wait for open brackets (bracket-balance)",
    "no-range-union": "a second bracket replaces the range of the first (no-spte-in-bracket)",
    "no-retry": "a fault never asks whether its pfn went stale (no-spte-in-bracket, spte-matches-host)",
    "no-root-sync": "a load of CR3 syncs nothing (shadow-flush)",
    "no-table-protect": "a guest table is shadowed while the guest can still write it (shadow-protected)",
    "no-track-flush": "a page whose writes are tracked is protected, but not flushed (write-tracked)",
    "no-track-write": "an emulated write to a guest table changes no shadow page (shadow-agrees)",
    "one-pt-access": "a walk has the last table's rights for all of them (shadow-agrees)",
    "plain-store": "SPTEs are stored without comparing, so a zapped one can come back (spte-matches-host)",
    "prefetch-in-bracket": "without the TDP MMU a fault maps neighbours in a bracket (no-spte-in-bracket)",
    "retry-before-gup-only": "a fault asks about staleness before GUP, not under lock (spte-matches-host)",
    "seq-before-count": "range_end drops the count before it raises the sequence (bracket-balance)",
    "skip-end": "KVM ignores range_end (bracket-balance)",
    "skip-start": "KVM ignores range_start and its range_end (no-spte-in-bracket)",
    "unsync-after-store": "a table becomes writable before its pages are unsync (shadow-protected)",
}
