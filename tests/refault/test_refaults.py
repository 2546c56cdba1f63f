"""What a trace says of a refault: who took the mapping and how it came back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refault.analysis import Analysis
from refault.cli import main
from refault.refaults import ToldRefault, tell_all
from refault.scenarios.api import PAGE, Scenario
from refault.scenarios.emulator import run_on_emulator
from trace_events.event import Event

ZAP = Event(0, 0, "refault:spte_zap", "vmm", args={"gfn": 1, "level": 1, "old_spte": 7, "why": "unmap"})
VIOLATION = {"fault_address": 0x1000, "error_code": 0x181}
INSTALLED = {"gfn": 1, "level": 1, "pfn": 9, "spte": 0x9007}


def taken_and_back(s: Scenario) -> None:
    s.st(0x3000, 1)
    s.op("dontneed", 0x3000, 1)
    s.ld(0x3000)
    s.st(0x3000, 2)


@pytest.fixture(scope="module")
def refaults() -> list[ToldRefault]:
    return list(tell_all(Analysis(run_on_emulator(taken_and_back, check=True).events)))


def test_the_operation_the_bracket_and_the_task_that_took_it(refaults: list[ToldRefault]) -> None:
    first = refaults[0]
    assert (first.gfn, first.operation, first.bracket, first.task) == (0x10003, "dontneed", "clear", "vmm")
    assert first.end is not None
    assert first.start is not None
    assert first.end - first.start == PAGE


def test_the_spte_before_and_after_and_what_gup_said(refaults: list[ToldRefault]) -> None:
    first = refaults[0]
    assert first.new_spte is not None
    assert first.old_spte & 2
    assert not first.new_spte & 2
    assert (first.gup, first.writable, first.retries) == ("slow", False, [])
    assert first.pfn == first.new_spte >> 12 & 0xFFFFFFFFF


def test_a_fault_whose_own_cow_overtook_it_says_so(refaults: list[ToldRefault]) -> None:
    second = refaults[1]
    assert (second.task, second.operation, second.bracket) == ("vcpu0", "", "clear")
    assert second.fault_task == "vcpu0"


def test_retries_are_told_with_their_reason() -> None:
    events = [
        ZAP,
        Event(1, 0, "kvm:kvm_page_fault", "vcpu0", 0, killed_by=0, args=VIOLATION),
        Event(2, 0, "refault:fault_retry", "vcpu0", 0, cause=1, args={"gfn": 1, "reason": "stale-after-gup"}),
        Event(3, 0, "refault:fault_retry", "vcpu1", 1, args={"gfn": 1, "reason": "of another vCPU"}),
        Event(4, 0, "kvm:kvm_page_fault", "vcpu0", 0, killed_by=0, args=VIOLATION),
        Event(5, 0, "refault:spte_install", "vcpu0", 0, 4, 0, INSTALLED),
    ]
    (told,) = tell_all(Analysis(events))
    assert told.retries == ["stale-after-gup"]
    assert told.lines()[1] == "  0x7 -> 0x9007, after 1 retry (stale-after-gup), event 1"


def test_where_the_fault_does_not_know_its_gfn_the_install_tells() -> None:
    events = [
        ZAP,
        Event(1, 0, "kvm:kvm_page_fault", "vcpu0", 0, args={"fault_address": 0x7000}),
        Event(2, 0, "refault:spte_install", "vcpu0", 0, 1, 0, INSTALLED),
    ]
    (told,) = tell_all(Analysis(events))
    assert (told.gfn, told.fault, told.new_spte) == (1, 1, 0x9007)


def test_the_command_prints_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.ndjson"
    assert main(["run", "swap-storm", "--memory", "8M", "--host-ram", "4M", "-q", "--trace", str(trace)]) == 0
    capsys.readouterr()
    assert main(["explain", str(trace), "--refaults", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told
    assert all(one["bracket"] and one["task"] and one["old_spte"] for one in told)
    assert main(["explain", str(trace), "--refaults", "--gfn", str(told[0]["gfn"])]) == 0
    assert capsys.readouterr().out.startswith(f"gfn {told[0]['gfn']:#x}: ")
