"""guest_memfd slots and private memory, asked for by operations."""

from __future__ import annotations

import pytest

import refault
from host_mm.kernel.errors import KernelError
from kvm_model.instrument import leaf_spte

GPA = 0xE000_0000
PROTECTED = {"vmm.vm_type": "sw-protected"}
PRIVATE, ENCRYPTED = 8, 16


def test_a_hole_takes_the_page_from_vmm_and_guest() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        vm.host.gmem_create(GPA, 4)
        vm.host.host_write(GPA, 7)
        vm.host.gmem_punch(GPA, 1)
        assert vm.host.host_read(GPA) == 0


def test_slots_of_guest_memfd_come_and_go_with_their_bytes_but_do_not_move() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        slot = vm.host.gmem_create(GPA, 4)
        vm.host.host_write(GPA, 7)
        vm.host.slot_delete(slot)
        vm.host.slot_restore(slot)
        assert vm.host.host_read(GPA) == 7
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.slot_move(slot, GPA + 0x100000)
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.dirty_log(GPA, 1)


def test_what_the_vmm_sees_of_private_memory_is_the_shared_page() -> None:
    with refault.VM("4M", host_ram="16M", check=True, params=PROTECTED) as vm:
        vm.host.host_write(0x200000, 7)
        vm.host.memory_attributes(0x200000, 1, PRIVATE)
        assert vm.host.host_read(0x200000) == 7
        vm.host.map_gpa_range(0x200000, 1, 0)
        vm.host.map_gpa_range(0x200000, 1, ENCRYPTED)
        assert vm.host.host_read(0x200000) == 0


def test_what_the_operations_refuse() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        for call in (
            lambda: vm.host.gmem_create(GPA, 4, 4), lambda: vm.host.gmem_punch(0x200000, 1),
            lambda: vm.host.memory_attributes(0x200000, 1, PRIVATE),
            lambda: vm.host.map_gpa_range(0x200000, 1, ENCRYPTED),
            lambda: vm.host.map_gpa_range(0x200000, 1, 1), lambda: vm.host.gmem_create(GPA + 1, 1),
        ):
            with pytest.raises(KernelError, match="EINVAL"):
                call()
        with pytest.raises(KernelError, match="EEXIST"):
            vm.host.gmem_create(0x200000, 1)
    with (
        refault.VM("4M", host_ram="16M", params=PROTECTED) as vm,
        pytest.raises(KernelError, match="EINVAL"),
    ):
        vm.host.gmem_create(GPA, 4, 3)


def test_older_kernels_have_neither_the_file_nor_the_protected_machine() -> None:
    with (
        refault.VM("4M", host_ram="16M", profile="linux-5.10") as vm,
        pytest.raises(KernelError, match="ENOSYS"),
    ):
        vm.host.gmem_create(GPA, 4)
    with pytest.raises(KernelError, match="EINVAL"):
        refault.VM("4M", host_ram="16M", profile="linux-5.10", params=PROTECTED)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_protected_guest_storms_under_weather_and_loses_nothing(seed: int) -> None:
    params = {**PROTECTED, "sched.strategy": "random", "sched.period": "20"}
    with refault.VM("16M", host_ram="32M", seed=seed, check=True, params=params) as vm:
        vm.load("guest-memfd", "rounds=2")
        vm.host.weather(200_000)
        stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0), vm.serial
        vm.finish()


def test_memory_is_mapped_ahead_of_a_guest_that_runs_and_of_one_that_does_not() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        assert vm.host.prefault(0x200000, 16) == 16
        assert leaf_spte(vm.board.kvm, 0x20F) != (0, 0)
        with pytest.raises(KernelError, match="EFAULT"):
            vm.host.prefault(GPA, 1)
        vm.load("first-touch", "mib=1")
        done = vm.board.host.sched.spawn("vmm", lambda: vm.host.prefault(0x300000, 16))
        assert vm.run().status == 0
        vm.board.host.sched.run_until(lambda: done.done)
        assert done.result == 16
