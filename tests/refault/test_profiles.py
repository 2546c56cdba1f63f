"""A machine of another kernel: asked for by name, told in the header, run again by `refault check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import refault
from refault.cli import main
from refault.registry import profiles
from trace_events.ndjson import read_trace

RUN = ["run", "migrate", "--memory", "8M", "--profile", "linux-5.10", "-q"]


def test_the_profile_is_in_the_header_and_check_honours_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.ndjson"
    assert main([*RUN, "--check", "--trace", str(path)]) == 0
    trace = read_trace(path)
    assert trace.header["machine"]["profile"] == "linux-5.10"
    assert {"mmu_notifier_invalidate_range"} <= {event.name for event in trace.events}
    assert main(["check", str(path)]) == 0
    text = path.read_text().replace('"profile":"linux-5.10"', '"profile":"linux-6.18"', 1)
    path.write_text(text)
    capsys.readouterr()
    assert main(["check", str(path)]) == 1, "another kernel, another trace"


@pytest.mark.parametrize("profile", profiles())
@pytest.mark.parametrize("payload", ["swap-storm", "fork-cow", "protect", "dirty-log", "slots", "aging"])
def test_a_payload_passes_under_every_kernel(payload: str, profile: str) -> None:
    options = ["--memory", "8M", "--vcpus", "2", "--profile", profile, "--check", "-q"]
    assert main(["run", payload, *options]) == 0


def test_a_kernel_that_is_not_there_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "migrate", "--profile", "linux-2.6"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no kernel 'linux-2.6'; there is linux-6.18, linux-5.10" in line
    with pytest.raises(refault.UsageError, match=r"no kernel 'linux-2\.6'"):
        refault.Host(profile="linux-2.6")


def test_vms_are_of_their_hosts_kernel() -> None:
    host = refault.Host("16M", "8M", profile="linux-5.10")
    try:
        vm = host.vm(memory="2M")
        assert vm.config.profile == "linux-5.10"
        assert vm.board.kvm.profile.retry_scope == "any"
        assert vm.board.host.mm.profile.change_pte
        with pytest.raises(refault.UsageError, match=r"the host is a linux-5\.10"):
            host.vm(memory="2M", profile="linux-6.18")
    finally:
        host.close()


def test_the_list_of_kernels_says_in_what_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "profiles"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("linux-6.18\n    the default\nlinux-5.10\n    differs in mm.change_pte=True,")
    assert main(["list", "profiles", "--json"]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["name"] for entry in entries] == profiles()
    assert [entry["kvm"]["retry_scope"] for entry in entries] == ["gfn-range", "any"]


def test_events_that_a_kernel_has_not_are_never_fired() -> None:
    names = {}
    for profile in profiles():
        with refault.VM("8M", profile=profile) as vm:
            vm.load("aging")
            with vm.trace("*") as recording:
                vm.run()
            names[profile] = {event.event for event in recording}
    old, new = names["linux-5.10"], names["linux-6.18"]
    assert "kvm:kvm_age_page" in old - new
    assert {"kvm:kvm_age_hva", "kvmmmu:kvm_tdp_mmu_spte_changed"} <= new - old
