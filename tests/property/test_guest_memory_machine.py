"""Whatever the host does, the guest reads what the oracle's bytes say it must.

Hypothesis chooses guest accesses and host operations (guest_machine.py), with every truth checked, on
four machines: one that switches tasks only when they block and one that switches at random points;
with and without EPT accessed and dirty flags; with enough host RAM and with too little. More are of
Linux 5.10 and without the TDP MMU, which is the same by default; two keep the dirty log in the
CPU, and in rings.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
from hypothesis import seed as with_seed
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.guest_machine import GuestMachine

STEPS = int(os.environ.get("REFAULT_STEPS", "5000"))
SEEDS = [int(s) for s in os.environ.get("REFAULT_SEEDS", "1").split(",")]
STEPS_AN_EXAMPLE = 60
PROGRESS = "REFAULT_PROGRESS" in os.environ
RANDOM = {"sched.strategy": "random", "sched.period": "6"}

VARIANTS = {
    "run-to-block, little RAM": ({"kvm_intel.eptad": "1"}, "768K"),
    "run-to-block, no A/D": ({"kvm_intel.eptad": "0"}, "4M"),
    "random, little RAM, no A/D": ({"kvm_intel.eptad": "0", **RANDOM}, "768K"),
    "random": ({"kvm_intel.eptad": "1", **RANDOM}, "4M"),
    "random, PML": ({"kvm_intel.pml": "1", **RANDOM}, "4M"),
    "PML into rings, little RAM": ({"kvm_intel.pml": "1", "vmm.dirty_ring_size": "1024"}, "1M"),
    "5.10, little RAM": ({"kvm_intel.eptad": "1"}, "768K"),
    "5.10, random, no A/D": ({"kvm_intel.eptad": "0", **RANDOM}, "4M"),
    "5.10, TDP MMU": ({"kvm_intel.eptad": "1", "kvm.tdp_mmu": "Y"}, "4M"),
    "direct pages, random, little RAM": ({"kvm_intel.eptad": "1", "kvm.tdp_mmu": "N", **RANDOM}, "768K"),
}
FEW = {name for name in VARIANTS if "5.10" in name or "direct" in name or "PML" in name}
"""Variants that get a third of the others' steps."""


@pytest.mark.timeout(0)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_guest_reads_what_the_oracle_says(seed: int, variant: str) -> None:
    params, ram = VARIANTS[variant]
    seen: Counter[str] = Counter()
    examples = max(1, -(-STEPS // (len(VARIANTS) * STEPS_AN_EXAMPLE * (3 if variant in FEW else 1))))

    @with_seed(seed)
    class Machine(GuestMachine):
        PARAMS = params
        HOST_RAM = ram
        PROFILE = "linux-5.10" if variant.startswith("5.10") else "linux-6.18"

        def teardown(self) -> None:
            super().teardown()
            seen["examples"] += 1
            if PROGRESS and seen["examples"] % 20 == 0:
                print(f"seed {seed}, {variant}: {seen['examples']} of {examples} examples", file=sys.stderr)

    Machine.seen = seen
    profile = settings.get_profile("machine")
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(profile, max_examples=examples, stateful_step_count=STEPS_AN_EXAMPLE),
        )
    except BaseException as exc:
        exc.add_note(
            f"repeat: REFAULT_SEEDS={seed} REFAULT_STEPS={STEPS} "
            f"python -m pytest {os.path.relpath(__file__)} -k '{variant}'"
        )
        raise
    if examples >= 5 and ram == "768K":
        # The claim of the variant: the host was really short.
        assert seen["pgsteal_kswapd"] + seen["pgsteal_direct"] > 0, seen
