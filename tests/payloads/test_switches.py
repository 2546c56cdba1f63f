"""Every protocol switch breaks its truth in the run that `refault list switches` gives for it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from host_mm.breaks import BREAKS as HOST_BREAKS
from kvm_model.breaks import BREAKS as KVM_BREAKS
from refault.cli import main
from refault.registry import switches
from refault.switch_runs import MAX_INSNS, switch_runs
from trace_events.ndjson import read_trace

RUNS = switch_runs()
MESSAGE = re.compile(r"refault: a truth of the model is broken: ([\w-]+): .+ \(event (\d+): (\w+:\w+) .+\)\n")


def command(switch: str) -> list[str]:
    """`refault run` of the switch's run without the switch and without --check."""
    return ["run", *shlex.split(RUNS[switch].run), "--max-insns", str(MAX_INSNS)]


def test_every_switch_has_its_run_and_a_name_of_its_own() -> None:
    assert set(RUNS) == set(switches()) == {*HOST_BREAKS, *KVM_BREAKS}
    assert not HOST_BREAKS.keys() & KVM_BREAKS.keys()


@pytest.mark.parametrize("switch", sorted(RUNS))
def test_a_switch_breaks_its_truth_and_the_event_is_named(
    switch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = shlex.split(RUNS[switch].command(switch))
    assert given == ["refault", *command(switch), "--check", "--break", switch]
    assert main(given[1:]) == 4
    err = capsys.readouterr().err
    found = MESSAGE.fullmatch(err)
    assert found, err
    assert found[1] == RUNS[switch].truth


@pytest.mark.parametrize("run", sorted({run.run for run in RUNS.values()}))
def test_without_the_switch_the_same_run_is_sound(run: str) -> None:
    assert main(["run", *shlex.split(run), "--max-insns", str(MAX_INSNS), "--check", "-q"]) == 0


@pytest.mark.parametrize("switch", sorted(name for name, run in RUNS.items() if run.guest))
def test_the_guest_itself_reads_a_wrong_byte(switch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(switch), "--break", switch]) == 1
    out, err = capsys.readouterr()
    assert "FAIL: the CPUs' own words: got 0x" in out
    assert "the guest failed" in err


def test_the_guest_sees_a_missing_flush_a_missing_start_and_a_missing_retry() -> None:
    assert {"no-flush", "skip-start", "no-retry"} <= {name for name, run in RUNS.items() if run.guest}


@pytest.mark.parametrize("switch", ["no-flush", "no-retry", "no-fault-recheck", "start-after-clear"])
def test_the_trace_of_a_broken_run_ends_interrupted_and_explains_the_named_event(
    switch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.ndjson"
    assert main([*command(switch), "--check", "--break", switch, "--trace", str(path)]) == 4
    found = MESSAGE.fullmatch(capsys.readouterr().err)
    assert found
    trace = read_trace(path)
    assert trace.end == "interrupted"
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.ndjson"]
    named = next(event for event in trace.events if event.seq == int(found[2]))
    assert named.event == found[3]
    assert main(["explain", str(path), found[2]]) == 0
    assert capsys.readouterr().out.startswith(f"#{found[2]} {found[3]} at ")


def test_two_switches_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command("skip-end"), "--check", "--break", "skip-end", "--break", "no-flush"]) == 4
    found = MESSAGE.fullmatch(capsys.readouterr().err)
    assert found
    assert found[1] == "flush-before-unlock", "range_start comes before range_end"


def test_an_unknown_switch_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command("no-flush"), "--break", "no-flsh"]) == 2
    assert main([*command("no-flush"), "--break", "everything"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no protocol switch 'no-flsh'; did you mean 'no-flush'?" in first
    assert "no protocol switch 'everything'; see refault list switches" in second


def test_the_list_gives_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "switches"]) == 0
    out = capsys.readouterr().out
    assert [run.command(name) in out for name, run in RUNS.items()] == [True] * len(RUNS)
