"""The guest's EPT follows the host's huge pages: large entries where they are, small ones where they were."""

from __future__ import annotations

import pytest

import refault
from host_mm.kernel.errors import BrokenTruth, KernelError
from kvm_model.instrument import leaf_spte, map_for_instrument
from refault.scenarios.api import DATA_GPA
from refault.scenarios.emulator import run_on_emulator
from refault.scenarios.linux_mm_thp import collapse, thp

D = DATA_GPA >> 12


def levels(backend: object) -> list[tuple[int, int]]:
    """(frame of D, level) of each SPTE that was set for the data slot."""
    return [
        (event.args["gfn"] - D, event.args["level"]) for event in backend.events  # type: ignore[attr-defined]
        if event.name == "kvm_mmu_set_spte" and event.args["gfn"] >= D
    ]


def test_spte_levels_are_those_that_kvm_had_in_the_recordings() -> None:
    assert levels(run_on_emulator(thp, mmu="ept")) == [
        (0, 2), (0x200, 2), (0x200, 2), (4, 1), (3, 1), (3, 1), (5, 1), (0, 2), (0x200, 1),
    ]
    assert levels(run_on_emulator(collapse, mmu="ept")) == [(3, 1), (4, 1), (0, 2)]


def guest(**options: object) -> refault.VM:
    vm = refault.VM("8M", check=True, **{"host_ram": "64M", "seed": 3} | options)
    vm.load("swap-storm", "mib=4", "weather=0")
    vm.run(max_insns=2_000_000)
    return vm


def test_a_running_guest_keeps_its_bytes_while_its_memory_is_collapsed_and_split() -> None:
    with guest() as vm:
        seen = set()
        for _ in range(6):
            assert vm.host.collapse(gpa=0x200000, pages=1024) == 1024
            vm.run(max_insns=400_000)
            seen.add(vm.host.map_level(gpa=0x300000))
            assert vm.host.thp_split(gpa=0x200000, pages=512) == 1
            vm.run(max_insns=400_000)
            seen.add(vm.host.map_level(gpa=0x300000))
        assert {1, 2} <= seen
        stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0), vm.serial
        vm.finish()


def test_khugepaged_collapses_what_a_guest_uses() -> None:
    with guest() as vm:
        assert vm.host.khugepaged() == 0, "nobody allowed it yet"
        vm.host.thp_enable(gpa=0x200000, pages=1024)
        assert vm.host.khugepaged() + vm.board.host.mm.khugepaged.pages_collapsed > 0
        vm.run(max_insns=400_000)
        assert vm.host.map_level(gpa=0x300000) == 2
        vm.host.swap_out(gpa=0x200000, pages=512)
        assert (vm.run()).status == 0
        vm.finish()


def collapsed_under_a_small_leaf(*breaks: str) -> None:
    """The guest has a 4K leaf in a huge page of shared memory that the VMM maps by small entries; khugepaged
    takes those away."""
    params = {"thp.shmem_enabled": "always"}
    with refault.VM("8M", memory_backend="memfd", check=True, params=params) as vm:
        vm.board.host.mm.breaks = frozenset(breaks)
        vm.load("first-touch", "mib=2")
        vm.run()
        host, kvm = vm.host, vm.board.kvm
        host.thp_enable(gpa=0x400000, pages=512)
        host.protect(gpa=0x400000, pages=1, prot=1)  # a part of the 2 MiB, so that small entries map the rest
        host.host_read(gpa=0x401000, size=4)
        vm.board.host.sched.run_task("map", lambda: map_for_instrument(kvm, 0x401))
        kvm.instrumented.clear()
        host.protect(gpa=0x400000, pages=1, prot=3)
        assert leaf_spte(kvm, 0x401)[1] == 1
        assert host.khugepaged() > 0
        vm.board.host.checker.sweep()
        assert leaf_spte(kvm, 0x401)[1] == 0


def test_small_leaves_go_when_khugepaged_takes_the_small_entries_of_a_file_away() -> None:
    collapsed_under_a_small_leaf()
    with pytest.raises(BrokenTruth, match="spte-matches-host"):
        collapsed_under_a_small_leaf("retract-without-bracket")


def test_huge_pages_from_the_start_with_the_policy_always() -> None:
    with guest(params={"thp.enabled": "always"}) as vm:
        assert vm.host.map_level(gpa=0x300000) == 2
        assert vm.host.age(gpa=0x200000, pages=512) == 512
        assert vm.host.migrate(gpa=0x200000, pages=512) in (0, 512)
        assert (vm.run()).status == 0
        vm.finish()


@pytest.mark.parametrize(("name", "args", "error"), [
    ("collapse", (0x200001, 512), "EINVAL"), ("collapse", (0x200000, 0), "EINVAL"),
    ("thp_enable", (0x10000000, 1), "EFAULT"), ("thp_split", (0x7FF000, 2), "EFAULT"),
])
def test_bad_arguments(name: str, args: tuple[int, int], error: str) -> None:
    with guest() as vm, pytest.raises(KernelError, match=error):
        getattr(vm.host, name)(*args)
