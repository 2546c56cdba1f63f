"""lapic.py, vmx/apic_access.py, truths_apic.py: the APIC's page, its address in the VMCS, its registers."""

from __future__ import annotations

from collections.abc import Callable
from errno import EEXIST
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from kvm_model.lapic import APIC_DEFAULT_PHYS_BASE, apic_access_page_slot
from kvm_model.mmu.spte import spte_to_pfn
from kvm_model.requests import KVM_REQ_APIC_PAGE_RELOAD, kvm_test_request
from kvm_model.vmx import exits
from kvm_model.vmx.apic_access import handle_apic_write
from tests.kvm_model.machine import PAGE, Machine

APIC = APIC_DEFAULT_PHYS_BASE
CASES = [
    pytest.param("linux-6.18", "Y", id="6.18-tdp"), pytest.param("linux-6.18", "N", id="6.18-direct"),
    pytest.param("linux-5.10", "Y", id="5.10-tdp"), pytest.param("linux-5.10", "N", id="5.10-direct"),
]


def apic_machine(profile: str = "linux-6.18", tdp: str = "Y", **options: Any) -> Machine:
    params = {"kvm_intel.enable_apicv": "Y", "kvm.tdp_mmu": tdp}
    return Machine(profile=profile, params=params, **options)


def hva(m: Machine) -> int:
    return int(m.kvm.slots().id_hash[apic_access_page_slot(m.kvm)].userspace_addr)


def host_pfn(m: Machine) -> int:
    return pte_pfn(lookup_address_in_mm(m.mm, hva(m))[0])


def pageout(m: Machine) -> None:
    m.do(lambda: do_madvise(m.mm, hva(m), PAGE, MADV_PAGEOUT))


def access_addr(m: Machine, vcpu: int = 0) -> int:
    apic = m.vcpus[vcpu].apic
    assert apic is not None
    return apic.apic_access_addr


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_before_the_first_entry_the_vmcs_gets_the_frame_that_the_host_has(profile: str, tdp: str) -> None:
    m = apic_machine(profile, tdp)
    assert access_addr(m) == -1
    m.run(("r", 0))
    assert access_addr(m) == host_pfn(m) << 12
    assert m.cpu.apic[0] == (access_addr(m), m.vcpus[0].apic.regs << 12)
    m.run(("r", APIC))
    assert spte_to_pfn(m.leaf(APIC >> 12)) == access_addr(m) >> 12


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_when_the_host_takes_the_page_every_vcpu_reloads_before_it_enters(profile: str, tdp: str) -> None:
    m = apic_machine(profile, tdp, vcpus=2)
    for n in (0, 1):
        m.run(("r", APIC), vcpu=n)
    pageout(m)
    assert all(kvm_test_request(KVM_REQ_APIC_PAGE_RELOAD, v) for v in m.vcpus)
    for n in (0, 1):
        m.run(("r", APIC), vcpu=n)
        assert access_addr(m, n) == host_pfn(m) << 12
    m.truths.sweep()


def events_until_asked(profile: str) -> list[str]:
    """What happens, while the host takes the page, until the vCPU is asked to reload."""
    m = apic_machine(profile)
    m.run(("r", APIC))
    mark = len(m.events)
    asked: list[int] = []

    def on_point(kind: str) -> None:
        if not asked and kvm_test_request(KVM_REQ_APIC_PAGE_RELOAD, m.vcpus[0]):
            asked.append(len(m.events))

    m.sched.set_on_point(on_point)
    pageout(m)
    return [e.name for e in m.events[mark : asked[0]]]


def test_6_18_asks_when_it_unmaps() -> None:
    names = events_until_asked("linux-6.18")
    assert "mmu_invalidate_begin" in names
    assert "mmu_invalidate_end" not in names


def test_5_10_asks_when_the_notifier_says_that_the_entry_is_clear() -> None:
    names = events_until_asked("linux-5.10")
    assert "mmu_notifier_invalidate_range" in names
    assert names.index("mmu_invalidate_begin") < names.index("mmu_notifier_invalidate_range")


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
def test_other_brackets_ask_nobody(profile: str) -> None:
    m = apic_machine(profile)
    m.run(("r", APIC), ("w", 0, 1))
    m.do(lambda: do_madvise(m.mm, 0x7F0000000000, PAGE, MADV_PAGEOUT))
    assert not kvm_test_request(KVM_REQ_APIC_PAGE_RELOAD, m.vcpus[0])


def test_inside_a_bracket_6_18_asks_itself_again_until_it_ends() -> None:
    m = apic_machine()
    m.run(("r", APIC))
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, hva(m), hva(m) + PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    task = m.spawn(("r", 0))
    m.finish(m.sched.spawn("clock", lambda: [m.sched.yield_() for _ in range(10)]))
    assert not task.done
    assert m.last("apic_access_page").args["stale"]
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.finish(task)
    assert not m.last("apic_access_page").args["stale"]


class SwitchIn:
    """A strategy that lets everybody else run once, at the first point where `fn` says so."""

    def __init__(self, fn: Callable[[], bool]) -> None:
        self.fn = fn
        self.done = False

    def switch_here(self, kind: str) -> bool:
        if self.done or not self.fn():
            return False
        self.done = True
        return True

    def pick(self, runnable: Any) -> Any:
        return runnable.popleft()


def reload_inside_a_bracket(base: Machine, profile: str = "linux-6.18") -> None:
    """A vCPU enters while the page goes: after start has asked, before the host's entry is gone."""
    tdp = "Y" if base.kvm.tdp_mmu_enabled else "N"
    m = apic_machine(profile, tdp, breaks=tuple(base.kvm.breaks))
    m.run(("r", APIC))
    vcpu = m.vcpus[0]
    m.sched.set_strategy(SwitchIn(
        lambda: m.kvm.mmu_invalidate_in_progress > 0 and kvm_test_request(KVM_REQ_APIC_PAGE_RELOAD, vcpu)
        and m.kvm.mmu_lock.owner is None
    ))
    out = m.sched.spawn("vmm", lambda: do_madvise(m.mm, hva(m), PAGE, MADV_PAGEOUT))
    run = m.spawn(("r", 0))
    m.finish(out, run)
    m.sched.set_strategy(None)
    m.run(("r", APIC))
    m.truths.sweep()


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
def test_reloading_too_early_leaves_a_freed_frame_in_the_vmcs(profile: str) -> None:
    reload_inside_a_bracket(Machine(), profile)
    with pytest.raises(BrokenTruth, match="vmcs-of-freed-frame"):
        reload_inside_a_bracket(Machine(breaks=("apic-reload-early",)), profile)


def test_an_address_that_ept_does_not_share_breaks_a_truth() -> None:
    m = apic_machine()
    m.run(("r", APIC))
    m.vcpus[0].apic.apic_access_addr += PAGE
    with pytest.raises(BrokenTruth, match="apic-page-matches"):
        m.run(("r", 0))


def test_user_space_can_neither_name_nor_overlap_the_slot() -> None:
    m = apic_machine()
    for slot, errno in ((apic_access_page_slot(m.kvm), 22), (5, EEXIST)):
        with pytest.raises(KernelError) as refused:
            m.do(lambda slot=slot: m.kvm.set_user_memory_region(slot, APIC, PAGE, 0x7F0000000000))
        assert refused.value.errno == errno


def test_an_eoi_is_not_emulated_but_skipped() -> None:
    m = apic_machine()
    m.run(("exit", exits.REASON_APIC_ACCESS, {"qualification": 0xB0 | 1 << 12, "insn_len": 4}))
    assert m.vcpus[0].stat["insn_emulation"] == 0
    assert m.last("kvm_apic").args == {"rw": 1, "reg": 0xB0, "val": 0}


def test_what_the_cpu_has_stored_kvm_takes_note_of() -> None:
    m = apic_machine()
    apic = m.vcpus[0].apic
    assert apic is not None
    apic.set_reg(0xF0, 0xFFFF_FFFF)
    m.do(lambda: handle_apic_write(m.vcpus[0], exits.VmExit(exits.REASON_APIC_WRITE, 0, 0xF0)))
    assert apic.reg(0xF0) == 0x3FF


def test_registers_keep_their_bits_and_priorities_follow_the_task() -> None:
    m = apic_machine(vcpus=2)
    apic = m.vcpus[1].apic
    assert apic is not None
    assert apic.mmio_read(0x20, 4) == 1 << 24
    apic.mmio_write(0x80, 4, 0x1234)
    assert (apic.mmio_read(0x80, 4), apic.mmio_read(0xA0, 4)) == (0x34, 0x34)
    apic.mmio_write(0x30, 4, 0)
    assert apic.mmio_read(0x30, 4) == 0x50014
    assert apic.mmio_read(0x24, 4) == 0
    assert apic.mmio_read(0x80, 8) == 0
    apic.mmio_write(0x80, 2, 0)
    assert apic.mmio_read(0x80, 2) == 0x34
