"""Every recorded scenario does here what it did on the real kernel."""

from __future__ import annotations

from typing import Any

import pytest

import refault.scenarios.linux_mm  # noqa: F401
from refault.scenarios import MACHINES, REPEATS, SCENARIOS
from refault.scenarios.comparison import Comparison, compare
from refault.scenarios.emulator import run_on_emulator
from refault.scenarios.recordings import recorded_names, recording

HARDWARE_WALKS = {"guest_pt_write"}
"""Under EPT the guest's own TLB decides what it sees."""
EXPLAINED = {"fetch_exec", "guest_rmw_faults"}
CHANCE = {"race", "memcg_age", "memcg_reclaim"}
"""What shadow paging maps beside a fault is in these."""


def compared(name: str, **machine: Any) -> Comparison:
    backend = run_on_emulator(SCENARIOS[name], check=True, **{**MACHINES[name], **machine})
    whole = backend.vm.config.mmu == "shadow"
    return compare(name, backend.recording(), recording(name), repeats=REPEATS[name], whole=whole)


@pytest.mark.parametrize("name", recorded_names())
def test_on_shadow_tables_every_event_equals_the_real_kernels(name: str) -> None:
    comparison = compared(name, mmu="shadow")
    assert comparison.broken == []
    assert comparison.unexplained == []
    assert comparison.unneeded == []
    assert (comparison.verdict == "explained") == (name in EXPLAINED)


@pytest.mark.parametrize("name", sorted(set(recorded_names()) - HARDWARE_WALKS - CHANCE))
def test_under_ept_the_hosts_side_equals_the_real_kernels(name: str) -> None:
    comparison = compared(name, mmu="ept")
    assert comparison.verdict == "equal"
    assert comparison.ours == comparison.theirs


@pytest.mark.parametrize("name", ["clear_refs", "dirty_ring", "ksm", "migrate_real", "thp", "manual_dirty"])
def test_they_are_the_same_without_the_tdp_mmu(name: str) -> None:
    params = {**MACHINES[name].get("params", {}), "kvm.tdp_mmu": "N"}
    assert compared(name, mmu="ept", params=params).verdict == "equal"


def test_every_recording_has_its_scenario() -> None:
    assert set(recorded_names()) == set(SCENARIOS)


def test_every_recording_is_in_the_normal_form() -> None:
    for name in recorded_names():
        found = recording(name)
        assert found.lines, name
        assert found.lines[0].startswith(">> "), name
