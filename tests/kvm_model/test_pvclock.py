"""pvclock.py, x86_msr.py: the page that KVM keeps the time in, and the MSRs that are KVM's own."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.pvclock import (
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    PVCLOCK_GUEST_STOPPED,
    kvm_set_guest_paused,
    kvm_vm_ioctl_set_clock,
)
from kvm_model.vmx import exits
from tests.kvm_model.machine import BASE, PAGE, Machine

GPA = 0x3040
PROFILES = ["linux-6.18", "linux-5.10"]


def msr(m: Machine, index: int, value: int | None, vcpu: int = 0) -> int:
    """WRMSR, without a value RDMSR."""
    cpu = m.cpu
    v = m.vcpus[vcpu]
    cpu.set_reg(v, "rcx", index)
    if value is not None:
        cpu.set_reg(v, "rax", value & 0xFFFFFFFF)
        cpu.set_reg(v, "rdx", value >> 32)
    reason = exits.REASON_MSR_READ if value is None else exits.REASON_MSR_WRITE
    m.run(("exit", reason, {"insn_len": 2}), vcpu=vcpu)
    return cpu.get_reg(v, "rdx") << 32 | cpu.get_reg(v, "rax")


def page(m: Machine, gpa: int = GPA) -> dict[str, int]:
    data = m.do(lambda: copy_from_user(m.process, BASE + gpa, 32))
    names = ("version", "tsc", "time", "mul", "shift", "flags")
    return dict(zip(names, struct.unpack("<I4xQQIbBxx", data), strict=True))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("index", [MSR_KVM_SYSTEM_TIME, MSR_KVM_SYSTEM_TIME_NEW])
def test_writing_the_msr_makes_kvm_write_the_page_before_the_next_entry(profile: str, index: int) -> None:
    m = Machine(profile=profile)
    msr(m, index, GPA | 1)
    got = page(m)
    assert got["version"] % 2 == 0
    assert got["version"] > 0
    assert (got["mul"], got["shift"]) == (1 << 31, 1)
    assert 0 < got["time"] <= m.sched.now
    assert msr(m, index, None) == GPA | 1
    names = m.names()
    assert names.index("kvm_msr") < names.index("kvm_pvclock_update")


@pytest.mark.parametrize("profile", PROFILES)
def test_each_update_raises_the_version_by_two_and_finds_the_page_where_it_is_now(profile: str) -> None:
    m = Machine(profile=profile)
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, GPA | 1)
    before = page(m)
    m.do(lambda: do_madvise(m.mm, BASE + 3 * PAGE, PAGE, MADV_PAGEOUT))
    m.do(lambda: kvm_vm_ioctl_set_clock(m.kvm, 10**12))
    m.run(("r", 0))
    after = page(m)
    assert after["version"] == before["version"] + 2
    assert 10**12 <= after["time"] < 10**12 + 10**9
    m.truths.sweep()


def test_the_order_of_a_refresh_after_a_bracket() -> None:
    m = Machine()
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, GPA | 1)
    mark = len(m.events)
    m.do(lambda: do_madvise(m.mm, BASE + 3 * PAGE, PAGE, MADV_PAGEOUT))
    m.do(lambda: kvm_vm_ioctl_set_clock(m.kvm, 0))
    m.run(("r", 0))
    order = ["gpc_invalidate", "host_fault", "gpc_refresh", "kvm_pvclock_update", "kvm_entry"]
    places = [m.names(since=mark).index(name) for name in order]
    assert places == sorted(places)


def test_every_vcpus_page_is_written_when_one_asks() -> None:
    m = Machine(vcpus=2)
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, GPA | 1, vcpu=1)
    version = page(m)["version"]
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, 0x5041)
    m.run(("r", 0), vcpu=1)
    assert page(m)["version"] == version + 2
    assert page(m, 0x5040)["version"] == 2


@pytest.mark.parametrize("profile", PROFILES)
def test_a_pause_is_flagged_until_the_guest_clears_it(profile: str) -> None:
    m = Machine(profile=profile)
    vcpu = m.vcpus[0]
    assert not kvm_set_guest_paused(vcpu)
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, GPA | 1)
    assert kvm_set_guest_paused(vcpu)
    for _ in range(2):
        m.do(lambda: kvm_vm_ioctl_set_clock(m.kvm, 0))
        m.run(("r", 0))
        assert page(m)["flags"] == PVCLOCK_GUEST_STOPPED
    m.do(lambda: copy_to_user(m.process, BASE + GPA + 29, b"\0"))
    m.do(lambda: kvm_vm_ioctl_set_clock(m.kvm, 0))
    m.run(("r", 0))
    assert page(m)["flags"] == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_updates_are_logged_and_an_address_without_memory_is_let_be(profile: str) -> None:
    m = Machine(slot=False, profile=profile)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, 1))
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, GPA | 1)
    log: Any = m.do(lambda: m.kvm.get_dirty_log(0))
    assert log[0] == 0b1000
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, 1 << 40 | 1)
    log = m.do(lambda: m.kvm.get_dirty_log(0))
    assert not any(log)
    msr(m, MSR_KVM_SYSTEM_TIME_NEW, 0)
    assert not m.kvm.gpc_list
