"""Every payload passes on the checked machine, vmcalls answered, and leaves nothing behind; a broken
step of the protocol shows."""

from __future__ import annotations

from typing import Any

import pytest

import refault
from guest_payloads.builder import payload_names
from kvm_model.instrument import leaf_spte


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


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize("name", ["aging", "dirty-log", "race", "slots"])
def test_payload_passes_without_the_tdp_mmu(name: str, profile: str) -> None:
    vcpus = 3 if name in ("smp", "race") else 1
    text = run(name, vcpus=vcpus, profile=profile, params={"kvm.tdp_mmu": "N"})
    assert "FAIL" not in text, text
    assert " 0 unexpected failures" in text, text


CROWDS = {
    "EPT": {}, "random": {"params": {"sched.strategy": "random", "sched.period": "6"}},
    "5.10": {"profile": "linux-5.10"}, "no A/D bits": {"params": {"kvm_intel.eptad": "0"}},
    "no TDP MMU, no A/D bits": {"params": {"kvm.tdp_mmu": "N", "kvm_intel.eptad": "0"}},
    "memfd": {"memory_backend": "memfd", "host_ram": "32M"},
    "hugetlb": {"memory_backend": "hugetlb", "host_ram": "32M"},
    "asynchronous faults": {"params": {"kvm.async_pf": "Y"}},
    "shadow": {"mmu": "shadow"}, "shadow, 5.10": {"mmu": "shadow", "profile": "linux-5.10"},
}


@pytest.mark.parametrize("machine", CROWDS)
def test_sixteen_vcpus_stand_a_storm_of_notifiers(machine: str) -> None:
    options: dict[str, Any] = {"memory": "8M", "host_ram": "12M", **CROWDS[machine]}
    with refault.VM(vcpus=16, seed=1, check=True, **options) as vm:
        vm.load("crowd", "weather=50000")
        vm.run(timeout=120)
    assert "crowd: 16 CPUs" in vm.serial, vm.serial
    assert " 0 unexpected failures" in vm.serial, vm.serial


def test_two_vms_of_eight_vcpus_on_one_host_share_frames_and_nothing_else() -> None:
    host = refault.Host("24M", "32M", seed=3, check=True)
    vms = [host.vm(memory="8M", vcpus=8) for _ in range(2)]
    for vm in vms:
        vm.load("crowd", "passes=30", "weather=100000")
    first, second = (vm.board.kvm for vm in vms)
    stops = [vm.run() for vm in vms]
    assert [(stop.kind, stop.status) for stop in stops] == [("exit", 0)] * 2, [vm.serial for vm in vms]
    assert first.sps
    assert not set(first.sps) & set(second.sps)
    page = 0x300000
    for vm in vms:
        vm.host.host_write(page, 7)
        assert vm.host.prefault(page, 1) == 1
    assert vms[0].host.ksm_merge(page, 1) + vms[1].host.ksm_merge(page, 1)
    assert len({vm.board.vmm.present_pfn(vm.board.memory.hva(page)) for vm in vms}) == 1
    for vm in vms:
        assert vm.host.prefault(page, 1) == 1
    mapped = leaf_spte(second, page >> 12)
    assert mapped != (0, 0)
    # The copy that one of them gets, and its end, leave the other's SPTE alone.
    vms[0].host.host_write(page, 8)
    assert leaf_spte(first, page >> 12) == (0, 0)
    assert leaf_spte(second, page >> 12) == mapped
    vms[0].close()
    assert leaf_spte(second, page >> 12) == mapped
    assert vms[1].host.host_read(page) == 7
    host.close()


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize(("mmu", "strategy"), [("ept", "block"), ("ept", "random"), ("shadow", "block")])
def test_a_guest_works_while_its_pages_come_in(mmu: str, strategy: str, profile: str) -> None:
    params = {"kvm.async_pf": "Y", "sched.strategy": strategy}
    text = run("apf", params=params, profile=profile, mmu=mmu)
    assert "PASS: meanwhile it worked" in text, text
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize("payload", ["swap-storm", "timer", "race", "smp"])
def test_payloads_that_know_nothing_of_it_pass_with_asynchronous_page_faults(payload: str) -> None:
    text = run(payload, vcpus=3 if payload in ("race", "smp") else 1, params={"kvm.async_pf": "Y"})
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize(("profile", "tdp_mmu"), [
    ("linux-6.18", "Y"), ("linux-6.18", "N"), ("linux-5.10", "Y"), ("linux-5.10", "N"),
])
def test_the_apics_registers_stay_wherever_their_page_goes(profile: str, tdp_mmu: str, vcpus: int) -> None:
    params = {"kvm_intel.enable_apicv": "Y", "kvm.tdp_mmu": tdp_mmu}
    text = run("apic", profile=profile, params=params, vcpus=vcpus)
    assert "PASS: wherever the page is, the registers are there" in text, text
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize(("profile", "tdp_mmu"), [
    ("linux-6.18", "Y"), ("linux-6.18", "N"), ("linux-5.10", "Y"), ("linux-5.10", "N"),
])
def test_smm_has_memory_of_its_own(profile: str, tdp_mmu: str) -> None:
    text = run("smm", profile=profile, params={"kvm.tdp_mmu": tdp_mmu}, vcpus=3)
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize(("profile", "tdp_mmu"), [
    ("linux-6.18", "Y"), ("linux-6.18", "N"), ("linux-5.10", "Y"), ("linux-5.10", "N"),
])
def test_a_gpu_follows_every_write_to_its_tables(profile: str, tdp_mmu: str) -> None:
    text = run("gvt", profile=profile, params={"kvm.tdp_mmu": tdp_mmu}, vcpus=3)
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize(("profile", "params"), [
    ("linux-6.18", {"vmm.quirk_slot_zap_all": "N"}), ("linux-5.10", {"kvm.tdp_mmu": "Y"}),
])
def test_flash_is_memory_to_read_and_a_device_to_write(profile: str, params: dict[str, str]) -> None:
    text = run("flash", profile=profile, params=params)
    assert "PASS: nothing is lost, wherever the pages are" in text, text
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize("vcpus", [1, 3])
def test_kvmclock_is_written_wherever_its_page_goes(profile: str, vcpus: int) -> None:
    text = run("kvmclock", profile=profile, vcpus=vcpus)
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize("tdp_mmu", ["Y", "N"])
def test_guest_memfd_is_shared_memory_with_either_mmu(tdp_mmu: str) -> None:
    text = run("guest-memfd", params={"kvm.tdp_mmu": tdp_mmu})
    assert " 0 unexpected failures" in text, text


@pytest.mark.parametrize("vcpus", [1, 2])
def test_private_memory_is_the_guests_alone_on_a_protected_machine(vcpus: int) -> None:
    params = {"vmm.vm_type": "sw-protected", "sched.strategy": "random", "sched.period": "8"}
    text = run("guest-memfd", vcpus=vcpus, params=params)
    assert "PASS: conversions lose nothing and keep nothing" in text, text
    assert " 0 unexpected failures" in text, text


def test_a_refault_without_the_tdp_mmu_is_explained_back_to_the_host_operation() -> None:
    with refault.VM(memory="64M", seed=1, check=True, params={"kvm.tdp_mmu": "N"}) as vm:
        vm.load("migrate")
        with vm.trace("*") as recording:
            vm.run(timeout=120)
        events = {event.seq: event for event in recording}
    refaults = [e for e in events.values() if e.event == "refault:spte_install" and e.killed_by in events]
    assert refaults
    told = 0
    for refault_ in refaults:
        zap = events[refault_.killed_by]
        assert zap.event == "refault:spte_zap"
        cause = zap.cause
        while cause is not None and events[cause].event != "refault:host_op":
            cause = events[cause].cause
        told += cause is not None
    assert told > len(refaults) // 2, f"{told} of {len(refaults)}"
    assert "kvmmmu:kvm_tdp_mmu_spte_changed" not in {event.event for event in events.values()}


def test_a_storm_larger_than_the_host_loses_nothing() -> None:
    text = run("swap-storm", "mib=6", "weather=0", host_ram="6M")
    assert " 0 unexpected failures\n" in text, text


@pytest.mark.parametrize(("name", "switch", "line"), [
    ("migrate", "no-flush", "FAIL: data after migration"),
    ("fork-cow", "skip-start", "FAIL: the child keeps the bytes of the fork"),
])
def test_the_guest_itself_sees_a_broken_protocol(name: str, switch: str, line: str) -> None:
    assert line in run(name, breaks={switch}, check=False)
