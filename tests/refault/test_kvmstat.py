"""refault stat --kvm: KVM's own statistics, where the kernel counts them."""

from __future__ import annotations

import json

import pytest

from kvm_model import kvm_main
from kvm_model.vcpu import VCPU_STATS as COUNTED
from refault.cli import main
from refault.kvmstat import VCPU_STATS, VM_STATS, KvmStat, format_kvm

SMALL = ["--memory", "8M", "--host-ram", "16M"]


def counted(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["stat", "--kvm", *words, *SMALL, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_every_statistic_bears_a_name_of_the_kernels() -> None:
    assert set(COUNTED) <= set(VCPU_STATS)
    assert set(kvm_main._VM_STATS) <= set(VM_STATS)


def test_first_touch_faults_once_a_page_and_each_leaf_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = counted(capsys, "first-touch", "mib=1")
    vcpu = found["vcpus"][0]  # type: ignore[index]
    assert vcpu["pf_fixed"] == vcpu["pf_taken"] >= 256
    assert found["vm"]["pages_4k"] >= 256  # type: ignore[index]
    assert vcpu["exits"] >= vcpu["pf_taken"] + vcpu["io_exits"]


def test_without_the_tdp_mmu_shadow_pages_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = counted(capsys, "first-touch", "mib=1", "--param", "kvm.tdp_mmu=N")
    assert found["vm"]["mmu_cache_miss"] > 0  # type: ignore[index]


def test_the_table_has_the_vm_and_a_column_for_each_vcpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stat", "--kvm", "first-touch", "mib=1", *SMALL, "--vcpus", "2"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "VM"
    assert any(line.split() == ["vCPU", "0", "vCPU", "1"] for line in lines)
    assert any(line.split()[0] == "pf_taken" and len(line.split()) == 3 for line in lines if line.strip())
    assert "PASS" in shown.err


def test_the_kernels_order_is_kept() -> None:
    stat = KvmStat({"pages_4k": 1}, [{"pf_taken": 5, "exits": 7}])
    assert [line.split()[0] for line in format_kvm(stat).splitlines() if line.strip()][1:] == [
        "pages_4k", "vCPU", "pf_taken", "exits",
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--kvm", "no-such-payload"], "no payload and no file"), (["trace.ndjson", "a=1"], "give --kvm"),
        (["--kvm", "first-touch", "--vcpu", "3"], "the machine has 1"),
    ],
)
def test_what_cannot_be_counted_is_told_in_one_line(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stat", *words]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1
