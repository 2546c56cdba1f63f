"""The VMM on its own EPT and a device on its page tables see what the guest's memory is now."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import refault
from host_mm.kernel.errors import KernelError

GPA = 0x300000


def machine() -> refault.VM:
    return refault.VM(memory="4M", host_ram="8M", check=True)


@pytest.mark.parametrize("who", ["dune", "sva"])
@pytest.mark.parametrize("meanwhile", ["migrate", "swap_out", "fork", "age"])
def test_they_read_what_is_there_and_the_vmm_reads_what_they_wrote(who: str, meanwhile: str) -> None:
    with machine() as vm:
        for value in (1, 2):
            vm.host.host_write(GPA, value)
            assert getattr(vm.host, f"{who}_read")(GPA) == value
            if meanwhile != "fork":
                getattr(vm.host, meanwhile)(GPA, 1)
            elif value == 1:
                vm.host.fork()
            assert getattr(vm.host, f"{who}_read")(GPA) == value
            getattr(vm.host, f"{who}_write")(GPA, 7 + value)
            assert vm.host.host_read(GPA) == 7 + value
        if meanwhile == "fork":
            assert vm.host.child_read(GPA) == 1


def test_what_they_refuse() -> None:
    with machine() as vm:
        calls: list[Callable[[int], int]] = [
            vm.host.dune_read, vm.host.sva_read, lambda gpa: vm.host.dune_write(gpa, 1),
            lambda gpa: vm.host.sva_write(gpa, 1),
        ]
        for call in calls:
            with pytest.raises(KernelError, match="EFAULT"):
                call(0x1000_0000)
            with pytest.raises(KernelError, match="EINVAL"):
                call(GPA + 1)


def test_both_at_once_beside_a_mirror_and_an_rdma_region() -> None:
    with machine() as vm:
        key = vm.host.rdma_register(GPA, 1)
        for round_ in range(3):
            vm.host.host_write(GPA, 100 * round_)
            vm.host.swap_out(GPA)
            vm.host.dune_write(GPA, 100 * round_ + 1)
            assert vm.host.rdma_peer_add(key, GPA, 1) == 100 * round_ + 1
            assert vm.host.sva_read(GPA) == vm.host.mirror_read(GPA) == 100 * round_ + 2
            vm.host.sva_write(GPA, 100 * round_ + 3)
            assert vm.host.dune_read(GPA) == vm.host.host_read(GPA) == 100 * round_ + 3
