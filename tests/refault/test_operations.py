"""What `refault list operations` shows is true: each example runs, and fires what it names, in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import emu.operations  # noqa: F401  (fills the registry)
import refault
from emu.abi import VMCALLS
from emu.hostops import OPERATIONS


@pytest.fixture(scope="module")
def running() -> Iterator[refault.VM]:
    with refault.VM("8M", vcpus=2, seed=1) as vm:
        vm.load("swap-storm", "mib=4", "weather=0")
        vm.run(max_insns=3_000_000)
        yield vm


def fresh() -> refault.VM:
    vm = refault.VM("8M", vcpus=2, seed=1, check=True)
    vm.load("swap-storm", "mib=4", "weather=0")
    vm.run(max_insns=3_000_000)
    return vm


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_example_of_an_operation_runs_on_a_live_guest(name: str) -> None:
    operation = OPERATIONS[name]
    with fresh() as vm:
        with vm.trace("refault:host_op", "refault:mmu_notifier_start") as recording:
            exec(f"answer = vm.host.{operation.example}", {"vm": vm}, scope := {})
        assert scope["answer"] >= 0
        events = recording.trace().events
        number = {event.seq: event for event in events}
        asked = {seq for seq, event in number.items() if event.args.get("op") == name}
        assert asked
        fired = [
            event.args["event"].upper().replace("-", "_") for event in events
            if event.event == "refault:mmu_notifier_start" and asked & set(_causes(number, event.cause))
        ]
        assert tuple(event for event, _ in itertools.groupby(fired)) == operation.events
        vm.finish()


def _causes(number: dict[int, object], seq: int | None) -> Iterator[int]:
    while seq is not None:
        yield seq
        seq = getattr(number.get(seq), "cause", None)


def test_every_operation_has_a_vmcall_of_its_name_with_its_arguments() -> None:
    calls = {call.name: list(call.args) for call in VMCALLS}
    assert calls == {
        name: [arg.partition(":")[0] for arg in operation.args] for name, operation in OPERATIONS.items()
    }


def test_a_guest_can_ask_for_every_operation_on_a_range(tmp_path: Path) -> None:
    # The guest has no more than gpa and pages to say; what needs a setting first refuses.
    names = [name for name, op in OPERATIONS.items() if op.takes_a_range]
    # Pages that are locked in are refused by others, and those without rights by mlock.
    names.sort(key=lambda name: (name == "protect", name in LOCKING, name))
    calls = "".join(f"    HOST4 VMCALL_{name.upper()}, r12, 2, 0, 0\n" for name in names)
    (tmp_path / "asks.s").write_text(ASKS + calls + "    CHECK_EQ \"asked\", 1, 1\n    ret\n")
    with refault.VM("8M", check=True) as vm:
        vm.load(str(tmp_path / "asks.s"))
        with vm.trace("refault:host_op_done") as recording:
            stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0), vm.serial
        done = [event.args for event in recording if event.name == "host_op_done"]
        assert [args["op"] for args in done] == names
        refused = {args["op"] for args in done if args["result"] < 0}
        assert not refused & {*LOCKING, "age", "cold", "dontneed", "free", "migrate", "mremap", "swap_out"}
        vm.finish()


LOCKING = ("mlock", "munlock")

ASKS = """; asks: for everything that can be asked of a range
.include "runtime.inc"

main:
    mov r12, [heap_next]
    mov qword ptr [r12], 1
"""


def test_an_operation_that_does_not_exist_or_fit_says_so(running: refault.VM) -> None:
    with pytest.raises(AttributeError, match="no host operation named 'swap_ot'"):
        running.host.swap_ot(1)
    with pytest.raises(refault.KernelError, match=r"swap_out\(.*\)"):
        running.host.swap_out()
    with pytest.raises(refault.KernelError):
        running.host.swap_out(gpa=0x200001)
    with pytest.raises(refault.KernelError):
        running.host.swap_out(gpa=1 << 40)
