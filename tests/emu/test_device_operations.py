"""Devices beside the guest reach its memory, and neither they nor the host lose a byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import refault
from host_mm.kernel.errors import BrokenTruth, KernelError

GPA = 0x300000


def machine(*breaks: str, check: bool = True) -> refault.VM:
    return refault.VM(memory="4M", host_ram="8M", check=check, breaks=frozenset(breaks))


def beside(vm: refault.VM, first: Callable[[], int], then: Callable[[], int]) -> None:
    """`then` runs while `first` sleeps."""
    sched = vm.board.host.sched
    tasks = [sched.spawn("first", first), sched.spawn("then", then)]
    sched.run_until(lambda: all(task.done for task in tasks))
    for task in tasks:
        if task.error is not None:
            raise task.error


def test_a_mirror_reads_what_is_there_now() -> None:
    with machine() as vm:
        for value in (1, 2):
            vm.host.host_write(GPA, value)
            assert vm.host.mirror_read(GPA) == value
            vm.host.migrate(GPA, 1)
            assert vm.host.mirror_read(GPA) == value
            vm.host.swap_out(GPA, 1)
            assert vm.host.mirror_read(GPA) == value
        vm.host.dontneed(GPA, 1)
        assert vm.host.mirror_read(GPA) == 0


@pytest.mark.parametrize("name", ["dma_write", "kvm_map_write"])
@pytest.mark.parametrize("meanwhile", ["migrate", "swap_out", "cold", "age", "fork"])
def test_a_store_from_outside_survives_what_the_host_does_meanwhile(name: str, meanwhile: str) -> None:
    with machine() as vm:
        vm.host.host_write(GPA, 1)
        args = () if meanwhile == "fork" else (GPA, 1)
        beside(
            vm, lambda: getattr(vm.host, name)(GPA, 2, ns=200_000), lambda: getattr(vm.host, meanwhile)(*args)
        )
        if name == "dma_write" or meanwhile != "fork":
            assert vm.host.host_read(GPA) == 2


def test_what_the_devices_refuse() -> None:
    with machine() as vm:
        for call in (vm.host.mirror_read, lambda gpa: vm.host.dma_write(gpa, 1),
                     lambda gpa: vm.host.kvm_map_write(gpa, 1)):
            with pytest.raises(KernelError, match="EFAULT"):
                call(0x1000_0000)
            with pytest.raises(KernelError, match="EINVAL"):
                call(GPA + 1)
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.dma_write(GPA, 1, ns=-1)


def test_moving_a_frame_in_use_loses_its_users_store() -> None:
    def go(vm: refault.VM) -> None:
        vm.host.host_write(GPA, 1)
        beside(vm, lambda: vm.host.kvm_map_write(GPA, 2, ns=200_000), lambda: vm.host.migrate(GPA, 1))

    vm = machine("migrate-ignore-refs", check=False)
    go(vm)
    assert vm.host.host_read(GPA) == 1
    vm.abandon()
    vm = machine("migrate-ignore-refs")
    with pytest.raises(BrokenTruth, match="held-frame-moved"):
        go(vm)
    vm.abandon()
