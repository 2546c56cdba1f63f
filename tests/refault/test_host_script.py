"""A host script runs beside the guest, from before its first instruction."""

from __future__ import annotations

import pytest

import refault
from refault.errors import UsageError
from refault.host_script import start_host_script

ENDLESS = bytes.fromhex("ebfe")


def run(text: str) -> tuple[refault.VM, list[str]]:
    vm = refault.VM("4M")
    vm.load(ENDLESS)
    start_host_script(vm, text)
    with vm.trace("kvm:kvm_entry", "refault:host_op") as recording:
        vm.run(max_insns=5_000_000)
    return vm, [event.name for event in recording.trace().events]


def test_the_script_begins_before_the_guest_does() -> None:
    vm, names = run("def main(vm, host):\n    host.host_write(gpa=0x200000, value=7)\n")
    assert names[:2] == ["host_op", "kvm_entry"]
    assert vm.host.host_read(0x200000) == 7
    vm.close()


def test_it_sleeps_in_logical_time() -> None:
    text = "def main(vm, host):\n    host.sleep(2_000_000)\n    host.cold(gpa=0x100000)\n"
    vm, names = run(text)
    assert names.index("host_op") > 0
    vm.close()


def test_a_script_without_main_is_refused() -> None:
    with refault.VM("4M") as vm, pytest.raises(UsageError, match="no function main"):
        start_host_script(vm, "x = 1\n")
