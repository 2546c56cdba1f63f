"""The host-side lines of every recorded scenario equal the real kernel's."""

from __future__ import annotations

import pytest

import refault.scenarios.linux_mm  # noqa: F401
from refault.scenarios import MACHINES, SCENARIOS
from refault.scenarios.emulator import run_on_emulator
from refault.scenarios.normal import normal_recorded
from refault.scenarios.recordings import recorded_names, recording


@pytest.mark.parametrize("name", recorded_names())
def test_host_side_lines_equal_the_real_kernels(name: str) -> None:
    backend = run_on_emulator(SCENARIOS[name], check=True, **MACHINES[name])
    assert backend.lines == normal_recorded(recording(name))


@pytest.mark.parametrize("name", ["clear_refs", "dirty_ring", "ksm", "migrate_real", "thp", "manual_dirty"])
def test_they_are_the_same_without_the_tdp_mmu(name: str) -> None:
    machine = dict(MACHINES[name])
    machine["params"] = {**machine.get("params", {}), "kvm.tdp_mmu": "N"}
    backend = run_on_emulator(SCENARIOS[name], check=True, **machine)
    assert backend.lines == normal_recorded(recording(name))


def test_every_recording_has_its_scenario() -> None:
    assert set(recorded_names()) == set(SCENARIOS)
