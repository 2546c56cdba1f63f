"""The command on a machine without EPT: run, check, walk, explain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refault.analysis import PAGE_FAULT, SPTE_INSTALL, Analysis, gfn_of
from refault.story import sentence, story
from trace_events.event import Event
from trace_events.ndjson import read_trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A trace with refaults, and what the summary said."""
    path = tmp_path_factory.mktemp("shadow") / "t.ndjson"
    result = subprocess.run(
        [sys.executable, "-m", "refault", "run", "swap-storm", "mib=4", "weather=0", "--memory", "8M",
         "--host-ram", "4M", "--mmu", "shadow", "--check", "--trace", str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )
    assert result.returncode == 0, result
    return path, result.stderr


def test_the_summary_counts_page_faults_and_refaults(recorded: tuple[Path, str]) -> None:
    summary = dict(
        line.split(None, 1) if not line.startswith("page faults") else ("page", line[11:])
        for line in recorded[1].splitlines() if len(line.split(None, 1)) == 2
    )
    assert "no EPT" in summary["machine"]
    assert "EXCEPTION_NMI" in recorded[1]
    assert "write" in summary["page"]
    assert int(summary["refaults"].split()[0].replace(",", "")) > 50
    assert "truths" in summary


def test_a_run_without_ept_repeats(recorded: tuple[Path, str], refault: Any) -> None:
    trace = read_trace(recorded[0])
    assert trace.machine["mmu"] == "shadow"
    result = refault("check", recorded[0])
    assert (result.returncode, result.stdout[:6]) == (0, "PASS: ")


def test_a_refault_is_the_mapping_that_repairs_a_zap(recorded: tuple[Path, str]) -> None:
    trace = read_trace(recorded[0])
    analysis = Analysis(trace.events)
    refaults = analysis.refaults()
    assert len(refaults) > 50
    assert {refault.fault.event for refault in refaults} == {PAGE_FAULT}
    assert {refault.install.event for refault in refaults if refault.install} == {SPTE_INSTALL}
    told = story(analysis, refaults[0].gfn)
    assert any("KVM mapped guest page" in line and "lost" in line for line in told), told
    faults = [event for event in trace.events if event.event == "kvm:kvm_page_fault"]
    assert {gfn_of(event) for event in faults} == {None}
    assert "linear page" in sentence(faults[0])


@pytest.mark.parametrize(("code", "told"), [
    (0x2, "wrote to linear page 0x44, which KVM had not mapped"),
    (0x11, "fetched from linear page 0x44, which KVM had mapped without that right"),
    (0xD, "read linear page 0x44, which KVM knew as a device's"),
])
def test_a_fault_on_a_linear_address_is_told_by_its_error_code(code: int, told: str) -> None:
    args = {"vcpu_id": 1, "guest_rip": 0x1000, "fault_address": 0x44123, "error_code": code}
    assert sentence(Event(1, 5, "kvm:kvm_page_fault", "vcpu1", 1, args=args)) == f"vCPU 1 {told}"


def test_rights_are_read_from_either_kind_of_entry() -> None:
    def installed(spte: int) -> str:
        args = {"gfn": 1, "level": 1, "pfn": 2, "spte": spte, "prefetch": False}
        return sentence(Event(1, 5, SPTE_INSTALL, "vcpu0", 0, args=args)).rsplit(" ", 1)[1]

    assert installed(0x2E67) == "rwx"
    assert installed(0x8000000000002825) == "r--"
    assert installed(0x2000000000002373 | 0x70) == "rw-"


def test_a_walk_shows_both_kinds_of_tables(recorded: tuple[Path, str], refault: Any) -> None:
    trace = read_trace(recorded[0])
    fault = next(e for e in trace.events if e.event == "kvm:kvm_page_fault" and e.seq > 2000)
    after = refault("walk", recorded[0], hex(fault.args["fault_address"]), "--at", fault.seq + 60)
    assert after.returncode == 0, after
    assert "shadow" in after.stdout
    address = hex(fault.args["fault_address"])
    tree = json.loads(refault("walk", recorded[0], address, "--json").stdout)
    assert {step["stage"] for step in tree["steps"]} == {1, 2}


def test_interpreted_and_compiled_give_the_same_trace_without_ept(refault: Any, tmp_path: Path) -> None:
    args = ("--memory", "16M", "--host-ram", "32M", "--mmu", "shadow")
    for name, flags in (("a", []), ("b", ["--interpreted"])):
        result = refault("run", "first-touch", "mib=1", *args, "--trace", name, *flags, timeout=200)
        assert result.returncode == 0, result
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_mmu_is_one_line(refault: Any) -> None:
    result = refault("run", "first-touch", "--mmu", "npt")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
