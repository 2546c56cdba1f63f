"""The payload that reads its own dirty log passes whichever way the log is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import refault
from refault.cli import main

FORMS = {
    "pml": ["kvm_intel.pml=Y"],
    "ring": ["vmm.dirty_ring_size=1024"],
    "ring-without-ad": ["vmm.dirty_ring_size=256", "kvm_intel.eptad=N"],
    "ring-pml": ["vmm.dirty_ring_size=1024", "kvm_intel.pml=Y"],
    "lazy-split": ["kvm.eager_page_split=N", "kvm_intel.pml=Y"],
}


def options(form: str) -> list[str]:
    return ["--memory", "8M", "--check", "-q", *(word for p in FORMS[form] for word in ("--param", p))]


@pytest.mark.parametrize("form", FORMS)
def test_the_log_names_what_the_guest_wrote(form: str) -> None:
    assert main(["run", "dirty-log", *options(form), "--vcpus", "2"]) == 0


def test_the_cpus_log_is_there_in_5_10_and_rings_are_not() -> None:
    assert main(["run", "dirty-log", *options("pml"), "--profile", "linux-5.10"]) == 0
    with pytest.raises(refault.KernelError, match="EINVAL: no capability 192"):
        refault.VM("8M", profile="linux-5.10", params={"vmm.dirty_ring_size": "1024"})


def test_the_compiled_walk_logs_what_the_interpreted_one_does(tmp_path: Path) -> None:
    traces = []
    for name, how in (("compiled", []), ("interpreted", ["--interpreted"])):
        path = tmp_path / name
        how += ["--trace", str(path), "--events", "kvm*:*"]
        assert main(["run", "dirty-log", *options("ring-pml"), *how]) == 0
        traces.append(path.read_text().splitlines()[1:])
    assert any('"kvm:kvm_dirty_ring_push"' in line for line in traces[0])
    assert traces[0] == traces[1]
