"""Guest pages that follow the vCPU that uses them."""

from __future__ import annotations

import pytest

import refault
from host_mm.kernel.errors import KernelError

GPA = 0x200000


def live(**kw: object) -> refault.VM:
    vm = refault.VM("8M", host_ram="32M", seed=1, check=True, **kw)
    vm.load("swap-storm", "mib=4", "weather=0")
    vm.run(max_insns=3_000_000)
    return vm


def test_after_a_scan_pages_move_to_the_node_of_the_vcpu_that_touches_them() -> None:
    with live() as vm:
        before = vm.host.pages_on_node(GPA, 512, 0)
        assert before > 400
        vm.host.vcpu_node(0, 1)
        assert vm.host.numa_balance(GPA, 512) > 400
        with vm.trace("refault:host_fault_done") as recording:
            stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0)
        kinds = {event.args.get("kind") for event in recording.trace().events}
        assert "numa-migrate" in kinds
        assert vm.host.pages_on_node(GPA, 512, 1) > 300
        assert "FAIL" not in vm.serial
        vm.finish()


def test_a_vcpu_at_home_just_gets_its_rights_back() -> None:
    with live() as vm:
        frames = vm.host.pages_on_node(GPA, 512, 0)
        vm.host.numa_balance(GPA, 512)
        stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0)
        assert vm.vmstat["numa_hint_faults_local"] > 100
        assert "numa_pages_migrated" not in vm.vmstat
        assert vm.host.pages_on_node(GPA, 512, 1) == 0
        assert frames
        vm.finish()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_guest_under_balancing_and_weather_never_knows(seed: int) -> None:
    params = {
        "kernel.numa_balancing": "Y", "kernel.numa_balancing_scan_period_min_ms": "1",
        "sched.strategy": "random", "sched.period": "6",
    }
    with refault.VM("8M", host_ram="24M", vcpus=2, seed=seed, check=True, params=params) as vm:
        vm.host.vcpu_node(0, 1)
        vm.load("swap-storm", "mib=2")
        stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0), stop
        assert vm.vmstat["numa_pte_updates"]
        assert vm.vmstat["numa_hint_faults"]
        assert "FAIL" not in vm.serial
        vm.finish()


def test_nodes_and_cpus_that_are_not_there_are_refused() -> None:
    with refault.VM("4M", host_ram="16M") as vm:
        for call in (
            lambda: vm.host.vcpu_node(1, 0), lambda: vm.host.vcpu_node(0, 2),
            lambda: vm.host.vcpu_node(-1, 0),
            lambda: vm.host.pages_on_node(GPA, 1, 2), lambda: vm.host.numa_balance(GPA + 1, 1),
        ):
            with pytest.raises(KernelError, match="EINVAL"):
                call()
        with pytest.raises(KernelError, match="EFAULT"):
            vm.host.numa_balance(0x1000_0000, 1)
