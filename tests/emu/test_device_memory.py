"""Guest pages in a device's memory, and guest words that are a device's alone for a while."""

from __future__ import annotations

import pytest

import refault
from host_mm.kernel.errors import KernelError

GPA = 0x300000


def machine() -> refault.VM:
    return refault.VM(memory="4M", host_ram="8M", check=True)


def test_a_page_goes_there_and_back_with_what_either_stored() -> None:
    with machine() as vm:
        for page in range(4):
            vm.host.host_write(GPA + page * 4096, page)
        assert vm.host.device_migrate(GPA, 4) == 4
        assert vm.board.vmm.present_pfn(vm.board.memory.hva(GPA)) == -1
        assert [vm.host.device_read(GPA + page * 4096) for page in range(4)] == [0, 1, 2, 3]
        vm.host.device_write(GPA, 77)
        assert vm.host.host_read(GPA) == 77
        assert vm.board.vmm.present_pfn(vm.board.memory.hva(GPA)) >= 0
        assert vm.board.vmm.present_pfn(vm.board.memory.hva(GPA + 4096)) == -1


@pytest.mark.parametrize("meanwhile", ["migrate", "swap_out", "age", "fork", "dontneed"])
def test_the_host_may_do_what_it_likes_meanwhile(meanwhile: str) -> None:
    with machine() as vm:
        vm.host.host_write(GPA, 5)
        vm.host.host_write(GPA + 4096, 6)
        vm.host.device_migrate(GPA, 1)
        assert vm.host.device_add(GPA + 4096, 1) == 6
        if meanwhile == "fork":
            vm.host.fork()
            assert vm.host.child_read(GPA) == 5
        else:
            getattr(vm.host, meanwhile)(GPA, 2)
        gone = meanwhile == "dontneed"
        assert vm.host.device_read(GPA) == vm.host.host_read(GPA) == (0 if gone else 5)
        assert vm.host.host_read(GPA + 4096) == (0 if gone else 7)


def test_the_machine_closes_with_pages_in_device_memory() -> None:
    with machine() as vm:
        vm.host.host_write(GPA, 5)
        vm.host.fork()
        assert vm.host.device_migrate(GPA - 0x100000, 300) == 256
        vm.host.device_add(GPA + 0x80000, 1)


def test_what_they_refuse() -> None:
    with machine() as vm:
        for call in (vm.host.device_migrate, vm.host.device_read, vm.host.device_add):
            with pytest.raises(KernelError, match="EFAULT"):
                call(0x1000_0000)
            with pytest.raises(KernelError, match="EINVAL"):
                call(GPA + 1)
