"""Dropping any SPTEs at any scheduling point changes only refaults.

The same guest runs twice, the second time beside a Zapper. What the guest says, what is in its memory
and what the host did are the same; only faults, zaps, flushes, entries and exits are more.

Left out are payloads that claim to the page what is young or dirty (a zap takes the accessed flag along,
a refault dirties), that arm EPT entries, and that print times; and the scenario that shows the dirty
ring, into which a page goes again when its mapping comes back.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

import refault
import refault.scenarios.linux_mm
from refault.scenarios import MACHINES, SCENARIOS
from refault.scenarios.api import PAGE, Scenario
from refault.scenarios.emulator import EmulatorBackend
from tests.property.zapper import Zapper
from trace_events.event import Event
from trace_events.stream import Listener

SEEDS = [int(s) for s in os.environ.get("REFAULT_SEEDS", "1").split(",")]
SLICE = 2000
REFAULT_EVENTS = {
    "kvm_exit", "kvm_entry", "kvm_page_fault", "kvm_flush_remote_tlbs", "fast_page_fault", "fault_retry",
    "spte_zap", "spte_install", "gup", "gup_answer",
}
"""What a zap and the refault after it fire themselves; of kvmmmu everything, and events that are delivered
once more because a refault interrupted their delivery."""


def told(events: list[Event]) -> list[str]:
    """The events that must be the same, without numbers and times."""
    return [
        f"{event.task} {event.system}:{event.name} {event.args}" for event in events
        if event.system != "kvmmmu" and event.name not in REFAULT_EVENTS and not event.args.get("reinjected")
    ]


def run(name: str, *words: str, zap: int, seed: int, **config: Any) -> tuple[str, bytes, list[str], int]:
    """(serial output, guest memory, told events, zaps) of a payload's run."""
    events: list[Event] = []
    zapper = None
    with refault.VM("8M", swap="16M", seed=seed, check=True, **config) as vm:
        vm.load(name, *words)
        vm.board.cpu.slice_insns = SLICE
        if zap:
            zapper = Zapper(vm.board, seed, zap)
        listener = Listener(("*",), events.append)
        vm.board.host.stream.listen(listener)
        vm.run()
        vm.board.host.stream.unlisten(listener)
        serial, memory = vm.serial, vm.read(0, vm.config.memory)
    return serial, memory, told(events), zapper.zaps if zapper else 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [
    "first-touch", "fork-cow", "guest-paging", "idt-swapped", "migrate", "mmio", "paging-32bit",
    "paging-5level", "paging-pae", "protect", "selfmod", "slots", "syscalls",
])
def test_only_refaults_change(name: str, seed: int) -> None:
    serial, memory, events, _ = run(name, zap=0, seed=seed, host_ram="32M")
    zapped_serial, zapped_memory, zapped_events, zaps = run(name, zap=6, seed=seed, host_ram="32M")
    assert zaps > 10
    assert zapped_serial == serial
    assert zapped_events == events
    different = [
        hex(n) for n in range(0, len(memory), PAGE) if memory[n : n + PAGE] != zapped_memory[n : n + PAGE]
    ]
    assert not different


@pytest.mark.parametrize("name", ["migrate", "slots"])
def test_nor_do_zaps_through_rmaps_change_more(name: str) -> None:
    direct = {"host_ram": "32M", "params": {"kvm.tdp_mmu": "N"}}
    serial, memory, events, _ = run(name, zap=0, seed=1, **direct)
    zapped_serial, zapped_memory, zapped_events, zaps = run(name, zap=6, seed=1, **direct)
    assert zaps > 10
    assert (zapped_serial, zapped_events) == (serial, events)
    assert zapped_memory == memory


@pytest.mark.parametrize("name", ["guest-paging", "paging-32bit", "paging-5level", "paging-pae"])
def test_what_a_guest_sees_of_its_own_tables_is_the_same_under_shadow_paging(name: str) -> None:
    serial, *_ = run(name, zap=0, seed=1, host_ram="32M", mmu="shadow")
    zapped_serial, _, _, zaps = run(name, zap=6, seed=1, host_ram="32M", mmu="shadow")
    assert zaps > 10
    assert zapped_serial == serial
    assert "FAIL" not in serial


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strategy", ["run-to-block", "random"])
def test_a_guest_short_of_memory_loses_nothing(seed: int, strategy: str) -> None:
    params = {"sched.strategy": "random"} if strategy == "random" else {}
    words = ("mib=1", "weather=100000")
    options = {"params": params, "host_ram": "1M"}
    serial, memory, _, _ = run("swap-storm", *words, zap=0, seed=seed, **options)
    zapped_serial, zapped_memory, _, zaps = run("swap-storm", *words, zap=100, seed=seed, **options)
    assert zaps > 20
    assert zapped_serial == serial
    assert zapped_memory == memory


@pytest.mark.parametrize(("mmu", "eptad"), [("ept", "0"), ("ept", "1"), ("shadow", "0")])
@pytest.mark.parametrize("name", sorted({*SCENARIOS} - {"dirty_ring"}))
def test_a_scenario_is_the_same(name: str, mmu: str, eptad: str) -> None:
    if name == "guest_pt_write":
        pytest.skip("its guest goes by a translation that it has not flushed")
    lines = []
    for one_in in (0, 3):
        machine = dict(MACHINES[name])
        params = {**machine.pop("params", {}), "kvm_intel.eptad": eptad}
        backend = EmulatorBackend(check=True, params=params, mmu=mmu, **machine)
        if one_in:
            Zapper(backend.board, 1, one_in)
        SCENARIOS[name](Scenario(backend))
        lines.append(list(backend.lines))
        backend.close()
    assert lines[0] == lines[1]


def dirty_log(eptad: str, one_in: int) -> int:
    """Every bit that KVM_GET_DIRTY_LOG gave while the guest stored to pages 7n mod 64, n a multiple of 3."""
    backend = EmulatorBackend(check=True, params={"kvm_intel.eptad": eptad}, mmu="ept")
    board = backend.board
    if one_in:
        Zapper(board, 3, one_in)

    def get() -> int:
        return int.from_bytes(backend._host(lambda: board.kvm.get_dirty_log(1)), "little")

    for page in range(64):
        backend.store(page * PAGE, 1)
    backend._host(lambda: board.memory.set_logging(board.memory.regions[1], True))
    log = 0
    for page in range(0, 64, 3):
        backend.load(page * PAGE)
        backend.store((page * 7 % 64) * PAGE, 2)
        if page % 9 == 0:
            log |= get()
    log |= get()
    backend.close()
    return log


@pytest.mark.parametrize("eptad", ["0", "1"])
def test_the_dirty_log_loses_no_page(eptad: str) -> None:
    """It may have more: a refault by a load maps a page writable, and then it counts as dirty."""
    plain, zapped = dirty_log(eptad, 0), dirty_log(eptad, 2)
    assert plain == sum(1 << page for page in {page * 7 % 64 for page in range(0, 64, 3)})
    assert not plain & ~zapped
