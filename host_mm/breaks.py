"""The host side's protocol switches: each leaves out one step of the mm's protocol.

A switch is tested where the step stands: `if "no-primary-flush" not in host.breaks`. With a switch on,
one of the checked truths is expected to fail.

Each is shown at work by a command in refault/switch_runs.toml. Two more steps can be left out of a HostMm by
its `breaks` alone, for tests, as no payload brings about what they take: `dune-no-retry` (emu/dune.py enters
what GUP said although a bracket came in between) and `mkclean-no-flush` (writeback of a file makes entries
read-only and clean without a flush).

Not modelled: switches of the KVM side (kvm_model/breaks.py), and that reclaim drops a folio although it
is dirty again: all who write through a reference lock the folio to say so, but KVM when it unmaps a
page that it had mapped for itself, and no run was found in which that falls between unmap and drop.
"""

from __future__ import annotations

__all__ = ["BREAKS"]

BREAKS: dict[str, str] = {
    "cow-flush-after-unlock": "a COW flushes the old translation only after the page-table lock is dropped",
    "free-before-batched-flush": "reclaim frees its frames before the batched flush",
    "free-before-flush": "mmu_gather frees its pages before it flushes the primary TLB",
    "huge-dirty-cow": "reading a huge page makes its entry dirty, and GUP writes through dirty entries",
    "hugetlb-narrow-unshare": "unhooking a shared table of huge pages is told and flushed for the range only",
    "ksm-ignore-refs": "KSM merges a page although somebody else holds a reference to it",
    "ksm-without-bracket": "KSM changes entries without telling notifiers",
    "migrate-ignore-refs": "migration moves a folio although somebody else holds a reference to it",
    "mremap-flush-after-unlock": "mremap flushes the old range only after the page-table locks are dropped",
    "no-fault-recheck": "a COW does not compare the PTE again under the page-table lock",
    "no-flush-before-io": "reclaim starts I/O on a folio that stale writable translations still reach",
    "no-interval-retry": "a mirroring device publishes what it read without asking whether a bracket came by",
    "no-primary-flush": "flush_tlb_* do nothing: the host's own stale translations survive",
    "odp-no-dirty": "the RDMA engine gives up pages that it could write without marking them dirty",
    "odp-no-drain": "a bracket does not wait for the RDMA engine's DMA that is under way in its range",
    "retract-without-bracket": "small entries of a file's huge page go, with their table, without a bracket",
    "skip-batched-flush": "reclaim and migration never flush what their unmapping left pending",
    "start-after-clear": "a zap opens its bracket only after the PTEs are cleared",
}
