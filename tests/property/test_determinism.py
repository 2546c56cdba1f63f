"""One machine configuration and one seed are one trace, whatever the machine underneath does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import refault
from emu.cpu.cpu import UnicornCpu
from tests.property.recordings import CASES, record, sleepy_slices
from trace_events.filters import compile_globs
from trace_events.ndjson import read_trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    where = tmp_path_factory.mktemp("reference")
    return {name: record(name, where / f"{name}.ndjson") for name in CASES}


def same(ours: bytes, theirs: bytes) -> None:
    # Not `assert ours == theirs`: nobody wants to read megabytes.
    for number, (one, other) in enumerate(zip(ours.splitlines(), theirs.splitlines(), strict=False)):
        assert one == other, f"line {number + 1}"
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("name", CASES)
def test_a_run_repeats_although_the_machine_stalls(
    name: str, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Unicorn resizes its TLB by the wall clock: other entries are evicted, other fills happen.
    monkeypatch.setattr(UnicornCpu, "_run_slice", sleepy_slices(UnicornCpu._run_slice))
    same(record(name, tmp_path / "t"), reference[name])


@pytest.mark.parametrize("name", ["weather", "smp-random", "guest-paging", "migrate"])
def test_the_interpreted_walk_leaves_the_same_trace(
    name: str, reference: dict[str, bytes], tmp_path: Path
) -> None:
    same(record(name, tmp_path / "t", interpreted=True), reference[name])


@pytest.mark.parametrize("hash_seed", ["1", "4711"])
def test_another_process_with_other_hashes_writes_the_same_bytes(
    hash_seed: str, reference: dict[str, bytes], tmp_path: Path
) -> None:
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests/property/recordings.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=env, check=True, timeout=250)
    for name, data in reference.items():
        same((tmp_path / f"{name}.ndjson").read_bytes(), data)


@pytest.mark.parametrize("name", ["pressure", "weather", "smp-random"])
def test_checking_the_truths_changes_no_event(
    name: str, reference: dict[str, bytes], tmp_path: Path
) -> None:
    checked = record(name, tmp_path / "t", check=True)
    same(checked.partition(b"\n")[2], reference[name].partition(b"\n")[2])


@pytest.mark.parametrize("globs", [("refault:spte_zap",), ("kvm:*", "refault:mmu_notifier_*"), ("*_end",)])
@pytest.mark.parametrize("name", ["pressure", "smp"])
def test_a_filter_changes_neither_the_numbers_nor_the_events(
    name: str, globs: tuple[str, ...], reference: dict[str, bytes], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(reference[name])
    events = {event.seq: event for event in read_trace(whole).events}
    record(name, tmp_path / "some", globs)
    kept = {event.seq: event for event in read_trace(tmp_path / "some").events}
    wanted = compile_globs(globs)
    assert all(events[seq] == event for seq, event in kept.items())
    assert {seq for seq, event in events.items() if wanted(event.event)} <= set(kept)
    links = {link for event in kept.values() for link in (event.cause, event.killed_by) if link is not None}
    assert links <= set(kept)


def test_a_recording_in_memory_holds_what_a_file_does(
    reference: dict[str, bytes], tmp_path: Path
) -> None:
    case = CASES["smp"]
    with refault.VM(seed=3, **case.options) as vm, vm.trace() as recording:
        vm.load(case.payload, *case.words)
        vm.run()
    recording.save(tmp_path / "saved")
    same((tmp_path / "saved").read_bytes(), reference["smp"])


def test_another_seed_is_another_run(reference: dict[str, bytes], tmp_path: Path) -> None:
    case = CASES["smp-random"]
    with refault.VM(seed=4, **case.options) as vm, vm.trace() as recording:
        vm.load(case.payload, *case.words)
        vm.run()
    (tmp_path / "t").write_bytes(reference["smp-random"])
    assert recording.trace().events != read_trace(tmp_path / "t").events
