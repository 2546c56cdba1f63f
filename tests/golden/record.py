"""Record every payload's golden trace anew: `make golden`, or this file with the names of some.

    python tests/golden/record.py [NAME ...]

Nothing else writes these files. Look at `git diff --stat tests/golden` and `refault diff` with the
old file before you commit: what changed in a trace is what changed in the model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from guest_payloads.builder import payload_names
from refault.cli import main

__all__ = ["HERE", "MACHINES", "names", "record"]

HERE = Path(__file__).resolve().parent

# What the host did, what KVM took away and what it mapped again: no exits, no ports, no clockwork.
EVENTS = (
    "refault:host_op*", "refault:mmu_notifier_*", "refault:spte_zap", "refault:spte_install",
    "refault:memslot_update", "kvm:kvm_page_fault", "kvm:kvm_unmap_hva_range", "kvm:kvm_age_hva",
    "kvmmmu:fast_page_fault", "kvm:kvm_inj_*",
)
FEW = ("refault:host_op*", "refault:mmu_notifier_start", "refault:spte_zap", "kvm:kvm_page_fault")

MACHINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "aging": (("pages=8", "rounds=2"), EVENTS),
    "apf": (("pages=2", "rounds=1"), (*EVENTS, "kvm:kvm_*async*", "kvm:kvm_vcpu_wakeup")),
    "apic": (("rounds=2",), EVENTS),
    "crowd": (("pages=2", "passes=4"), (*FEW, "refault:kvm_flush_remote_tlbs")),
    "dirty-log": (("pages=8",), EVENTS),
    # Without its 3,000 calls of the instrument.
    "ept-access": ((), tuple(glob for glob in EVENTS if "host_op" not in glob)),
    "everything": (("ops=15", "pages=16"), FEW),
    "first-touch": (("mib=1",), FEW),
    "flash": (("pages=2", "rounds=2"), (*EVENTS, "kvm:kvm_mmio")),
    "fork-cow": (("pages=4", "rounds=1"), EVENTS),
    "gvt": (("rounds=2",), (*EVENTS, "refault:write_track", "refault:page_track_write")),
    "guest-paging": (("pages=4",), EVENTS),
    "guest-memfd": (("pages=4", "rounds=1"), (*EVENTS, "kvm:kvm_vm_set_mem_attributes")),
    "huge-tables": ((), EVENTS),
    "idt-swapped": (("rounds=1",), FEW),
    "kvmclock": (("rounds=2",), EVENTS),
    "migrate": (("pages=4", "rounds=1"), EVENTS),
    "mmio": ((), (*EVENTS, "kvm:kvm_mmio", "kvmmmu:mark_mmio_spte", "kvmmmu:handle_mmio_page_fault")),
    "pfnmap": (("rounds=2",), EVENTS),
    "prefault": (("pages=4",), EVENTS),
    "protect": (("pages=4",), EVENTS),
    "rdma": (("pages=1", "rounds=1", "weather=0"), (*EVENTS, "refault:odp_*", "refault:rdma_*")),
    "selfmod": (("rounds=2",), EVENTS),
    "shadow-bugs": ((), FEW),
    "shadow-pt": (("pages=4", "rounds=1", "spaces=2"), FEW),
    "slots": (("pages=4",), ("refault:host_op*", "refault:memslot_update", "refault:spte_zap")),
    "smm": (("rounds=2",), EVENTS),
    "smp": (("count=100", "rounds=1"), EVENTS),
    "swap-storm": (("mib=1", "passes=1", "weather=300000"), FEW),
    "syscalls": (("calls=2",), EVENTS),
    "timer": (("hz=500", "ticks=2"), (*EVENTS, "kvm:kvm_vcpu_wakeup")),
}
"""Payload -> its words and the events kept. A payload without an entry is recorded as it stands."""

OPTIONS = {
    "apf": ("--param", "kvm.async_pf=Y"),
    "apic": ("--param", "kvm_intel.enable_apicv=Y"),
    "crowd": ("--vcpus", "16"),
    "guest-memfd": ("--param", "vmm.vm_type=sw-protected"),
    "smp": ("--vcpus", "2"),
    "swap-storm": ("--host-ram", "2M", "--memory", "4M"),
}


SHADOW = ("first-touch", "migrate", "mmio", "shadow-bugs", "shadow-pt")
"""Recorded without EPT as well, as NAME.shadow."""
SHADOW_EVENTS = (
    "kvm:kvm_page_fault", "kvm:kvm_inj_exception", "kvm:kvm_emulate_insn", "kvmmmu:kvm_mmu_get_page",
    "kvmmmu:kvm_mmu_prepare_zap_page", "kvmmmu:kvm_mmu_sync_page", "kvmmmu:kvm_mmu_unsync_page",
)
SHADOW_MACHINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shadow-pt": (("pages=4", "rounds=1", "spaces=4"), SHADOW_EVENTS[-3:]),
}


def names() -> list[str]:
    """All golden traces."""
    return sorted([*payload_names(), *(f"{name}.shadow" for name in SHADOW)])


def record(name: str, path: Path) -> int:
    """Run one payload, checked, and keep its trace."""
    payload, _, mmu = name.partition(".")
    words, events = MACHINES.get(payload, ((), FEW))
    options = OPTIONS.get(payload, ())
    if mmu:
        words, events = SHADOW_MACHINES.get(payload, (words, SHADOW_EVENTS))
        options = (*options, "--mmu", mmu)
    args = ["run", payload, *words, "--memory", "8M", "--check", "-q", "--trace", str(path), *options]
    return main([*args, *(f"--events={glob}" for glob in events)])


if __name__ == "__main__":
    failed = [name for name in sys.argv[1:] or names() if record(name, HERE / f"{name}.ndjson")]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
