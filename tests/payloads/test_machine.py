"""Every payload passes on the checked machine, vmcalls answered, and leaves nothing behind; a broken
step of the protocol shows."""

from __future__ import annotations

from typing import Any

import pytest

import refault
from guest_payloads.builder import payload_names


def run(name: str, *words: str, check: bool = True, **config: Any) -> str:
    with refault.VM(memory="64M", seed=1, check=check, **config) as vm:
        vm.load(name, *words)
        vm.run(timeout=120)
    return vm.serial


@pytest.mark.parametrize("name", [n for n in payload_names() if n != "swap-storm"])
def test_payload_passes_in_full(name: str) -> None:
    text = run(name, vcpus=3 if name in ("smp", "race") else 1)
    assert "FAIL" not in text, text
    assert " 0 unexpected failures" in text, text
    assert "SKIP" not in text, text


def test_a_storm_larger_than_the_host_loses_nothing() -> None:
    text = run("swap-storm", "mib=6", "weather=0", host_ram="6M")
    assert " 0 unexpected failures\n" in text, text


@pytest.mark.parametrize(("name", "switch", "line"), [
    ("migrate", "no-flush", "FAIL: data after migration"),
    ("fork-cow", "skip-start", "FAIL: the child keeps the bytes of the fork"),
])
def test_the_guest_itself_sees_a_broken_protocol(name: str, switch: str, line: str) -> None:
    assert line in run(name, breaks={switch}, check=False)
