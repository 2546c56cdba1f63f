"""Every payload passes, checked, in every way that KVM may map its memory, on both kernels, with more CPUs.

`make test` runs a few of each row and column of the matrix, `make matrix` (REFAULT_MATRIX=1) all of it and
prints it as a table (conftest.py).
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any, NamedTuple

import pytest

import refault
from guest_payloads.builder import payload_info, payload_names
from refault.registry import profiles

MMUS: dict[str, dict[str, Any]] = {
    "tdp": {"params": {"kvm.tdp_mmu": "Y"}},
    "direct": {"params": {"kvm.tdp_mmu": "N"}},
    "shadow": {"mmu": "shadow"},
}
"""EPT by the TDP MMU; EPT by direct pages with reverse maps; no EPT, the guest's tables shadowed."""
SKIPS = {
    ("ept-access", "shadow"): ["SKIP: arm an EPT entry: not served by this machine"],
    ("prefault", "shadow"): ["SKIP: map the range: not served by this machine"],
    ("prefault", "linux-5.10"): ["SKIP: map the range: not served by this machine"],
    ("guest-memfd", "linux-5.10"): ["SKIP: create: not served by this machine"],
}
"""What a payload leaves out with an MMU or on a kernel."""
VCPUS = (1, 2, 4)
WHOLE = "REFAULT_MATRIX" in os.environ
MORE_CPUS = [name for name in payload_names() if "start_cpu" in payload_info(name).vmcalls]
"""Payloads that start other CPUs, where there are some; the others run on the first of them."""
WORDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "swap-storm": (("mib=6", "weather=0"), {"host_ram": "6M"}),
}


def params_of(cell: Cell) -> dict[str, str]:
    """The MMU's, and what a payload needs that a machine has not by itself."""
    params = dict(MMUS[cell.mmu].get("params", {}))
    if cell.payload == "apic":
        params["kvm_intel.enable_apicv"] = "Y"
    if cell.payload == "guest-memfd" and (cell.mmu, cell.profile) == ("tdp", "linux-6.18"):
        params["vmm.vm_type"] = "sw-protected"
    return params


class Cell(NamedTuple):
    """One run."""

    payload: str
    mmu: str
    profile: str
    vcpus: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


MACHINES = [*product(MMUS, profiles(), VCPUS)]
CELLS = [Cell(name, *machine) for name in payload_names() for machine in MACHINES]


def few() -> list[Cell]:
    """Each payload on two machines that differ in all three, each machine with some payloads; those that
    start other CPUs with the most of them on every MMU and kernel."""
    chosen = {
        Cell(name, *MACHINES[(index * 5 + offset) % len(MACHINES)])
        for index, name in enumerate(payload_names()) for offset in (0, len(MACHINES) // 2 + 1)
    }
    chosen |= {cell for cell in CELLS if cell.payload in MORE_CPUS and cell.vcpus == max(VCPUS)}
    return sorted(chosen)


@pytest.mark.parametrize("cell", CELLS if WHOLE else few(), ids=str)
def test_the_payload_passes(cell: Cell) -> None:
    words, config = WORDS.get(cell.payload, ((), {}))
    config = {"memory": "64M", "seed": 1, "check": True, **config, **MMUS[cell.mmu]}
    config["params"] = params_of(cell)
    with refault.VM(vcpus=cell.vcpus, profile=cell.profile, **config) as vm:
        vm.load(cell.payload, *words)
        stop = vm.run(timeout=300)
        text = vm.serial
        started = sum(thread.task is not None for thread in vm.board.threads)
    assert stop.kind == "exit", f"{stop}\n{text}"
    assert " 0 unexpected failures" in text, text
    skipped = [line for line in text.splitlines() if line.startswith("SKIP")]
    wanted = SKIPS.get((cell.payload, cell.mmu), SKIPS.get((cell.payload, cell.profile), []))
    assert skipped == wanted, text
    most = cell.vcpus if cell.payload in MORE_CPUS else 1
    # Without private memory there is nothing for a second CPU to read.
    idle = cell.payload == "guest-memfd" and "vmm.vm_type" not in config["params"]
    assert min(most, 1 if idle else 2) <= started <= most


def test_few_leave_out_no_payload_and_no_machine() -> None:
    chosen = few()
    assert {cell.payload for cell in chosen} == {*payload_names()}
    assert {cell[1:] for cell in chosen} == {*MACHINES}
    assert len(chosen) < len(CELLS) // 3
