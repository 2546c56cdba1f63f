"""Asynchronous page faults: a vCPU that sleeps or runs on while a page comes in from swap."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.async_pf import ASYNC_PF_PER_VCPU, KvmAsyncPf, kvm_setup_async_pf
from kvm_model.mmu.mmu import kvm_arch_async_page_ready, kvm_mmu_do_page_fault
from kvm_model.mmu.mmu_internal import ROLE_DIRECT
from kvm_model.pv_async_pf import (
    KVM_CPUID_SIGNATURE_LEAF,
    MSR_KVM_ASYNC_PF_ACK,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
    kvm_check_async_pf_completion,
    kvm_pv_cpuid,
)
from kvm_model.vcpu import Vcpu
from kvm_model.vmx import exits
from kvm_model.vmx.exits import VmExit
from kvm_model.x86 import kvm_arch_vcpu_ioctl_run
from kvm_model.x86_async_pf import (
    KVM_ASYNC_PF_DELIVERY_AS_INT,
    KVM_ASYNC_PF_ENABLED,
    KVM_ASYNC_PF_SEND_ALWAYS,
    alloc_apf_token,
    kvm_can_do_async_pf,
)
from kvm_model.x86_msr import KVM_MSRS
from tests.kvm_model.machine import BASE, PAGE, Machine

APF = {
    "kvm_try_async_get_page", "kvm_async_pf_not_present", "kvm_async_pf_completed", "kvm_async_pf_ready",
    "kvm_async_pf_repeated_fault", "kvm_async_pf_doublefault",
}
AREA = 32 * PAGE
TURNS = 20
VECTOR = 0xEC
BOTH = KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_DELIVERY_AS_INT


def machine(**kwargs: Any) -> Machine:
    return Machine(params={"kvm.async_pf": "Y", **kwargs.pop("params", {})}, **kwargs)


def pageout(m: Machine, first: int = 0, pages: int = 8) -> None:
    def run() -> None:
        do_madvise(m.mm, BASE + first * PAGE, pages * PAGE, MADV_PAGEOUT)
        while m.host.swap_device.inflight:
            m.sched.sleep(10_000)
        # The second round: what was written out is freed.
        m.host.lru.lru_add_drain_all()
        m.host.reclaim(0, 0)

    m.do(run)


def filled(m: Machine, pages: int = 8) -> Machine:
    m.run(*[("w", n * PAGE, n + 1) for n in range(pages)])
    pageout(m, pages=pages)
    return m


def enable(m: Machine, flags: int = BOTH | KVM_ASYNC_PF_SEND_ALWAYS, *, cr0: int = 1 << 31) -> None:
    """The guest turns tokens on; its area is at AREA."""
    m.run(("w", AREA, 0))
    vcpu = m.vcpus[0]
    m.cpu.set_reg(vcpu, "cr0", cr0)
    assert m.do(lambda: KVM_MSRS[MSR_KVM_ASYNC_PF_INT][1](vcpu, VECTOR))
    assert m.do(lambda: KVM_MSRS[MSR_KVM_ASYNC_PF_EN][1](vcpu, AREA | flags))
    m.run()
    # The wake-up for everybody that comes with it.
    assert area(m) == (0, 0xFFFF_FFFF)
    assert m.cpu.injected.pop() & 0xFF == VECTOR
    take_token(m)


def area(m: Machine) -> tuple[int, int]:
    data = m.do(lambda: copy_from_user(m.process, BASE + AREA, 8))
    return int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little")


def take_token(m: Machine) -> None:
    m.do(lambda: copy_to_user(m.process, BASE + AREA, bytes(8)))
    m.do(lambda: KVM_MSRS[MSR_KVM_ASYNC_PF_ACK][1](m.vcpus[0], 1))


def apf_names(m: Machine, since: int = 0) -> list[str]:
    return [e.name for e in m.events[since:] if e.name in APF]


def test_a_guest_that_knows_nothing_of_it_sleeps_until_the_page_is_mapped() -> None:
    m = filled(machine())
    since = len(m.events)
    assert m.run(("r", 3 * PAGE)) == [4]
    wanted = APF | {"kvm_page_fault", "spte_install", "kvm_vcpu_wakeup"}
    # One fault: what came in was mapped before the guest ran on. It was no HLT, so there is no wake-up event.
    assert [e.name for e in m.events[since:] if e.name in wanted] == [
        "kvm_page_fault", "kvm_try_async_get_page", "kvm_async_pf_not_present", "kvm_async_pf_completed",
        "spte_install", "kvm_async_pf_ready",
    ]
    assert m.last("spte_install").args["prefetch"]
    assert m.vcpus[0].stat["pf_taken"] == 9
    m.truths.sweep()


def test_linux_5_10_names_the_second_fault_otherwise_and_traces_the_wait() -> None:
    m = filled(machine(profile="linux-5.10"))
    since = len(m.events)
    assert m.run(("r", 3 * PAGE)) == [4]
    assert "kvm_vcpu_wakeup" in m.names(since=since)
    # For a read, in that kernel, whatever the access was; the page is mapped all the same.
    assert m.run(("w", 5 * PAGE, 9), ("r", 5 * PAGE)) == [9]


def test_without_it_the_vcpu_waits_in_its_fault() -> None:
    m = filled(Machine())
    since = len(m.events)
    assert m.run(("r", 3 * PAGE)) == [4]
    assert not apf_names(m, since)


def test_a_vcpu_that_may_not_be_interrupted_waits_in_its_fault() -> None:
    m = filled(machine())
    m.cpu.allowed = False
    since = len(m.events)
    assert m.run(("r", 3 * PAGE)) == [4]
    assert not apf_names(m, since)


@pytest.mark.parametrize("event", ["exception", "interrupt", "nmi"])
def test_a_vcpu_with_an_event_on_its_way_waits_in_its_fault(event: str) -> None:
    m = machine()
    vcpu = m.vcpus[0]
    assert kvm_can_do_async_pf(vcpu)
    if event == "exception":
        vcpu.exception.injected = True
    elif event == "interrupt":
        vcpu.interrupt_injected = True
    else:
        vcpu.nmi_injected = True
    assert not kvm_can_do_async_pf(vcpu)


def test_an_interrupt_wakes_the_sleeper_whose_page_is_still_on_its_way_and_it_sleeps_again() -> None:
    m = filled(machine())
    vcpu = m.vcpus[0]
    since = len(m.events)
    task = m.spawn(("r", 3 * PAGE))
    m.sched.run_until(lambda: bool(vcpu.wait.waiters))
    assert vcpu.apf.halted
    m.do(lambda: vcpu.apic_set_irq(0x30))
    m.finish(task)
    assert m.cpu.out[0] == [4]
    assert m.cpu.injected[-1] & 0xFF == 0x30
    assert apf_names(m, since) == [
        "kvm_try_async_get_page", "kvm_async_pf_not_present", "kvm_try_async_get_page",
        "kvm_async_pf_repeated_fault", "kvm_async_pf_completed", "kvm_async_pf_ready",
    ]


class Guest:
    """A guest that does something else: who must wait is parked until its token is said to be ready."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.vcpu = m.vcpus[0]
        self.parked: dict[int, Any] = {}
        self.tokens: list[tuple[str, int]] = []
        self._vcpu_run = m.cpu.vcpu_run
        m.cpu.vcpu_run = self.vcpu_run  # type: ignore[method-assign]

    def vcpu_run(self, vcpu: Vcpu) -> VmExit:
        vector = vcpu.entry_intr_info & 0xFF
        ops = self.m.cpu.ops[0]
        if vcpu.entry_intr_info & exits.INTR_INFO_VALID and vector == 14:
            token = self.m.cpu.get_reg(vcpu, "cr2")
            self.tokens.append(("wait", token))
            self.parked[token] = ops.pop(0)
            ops.insert(0, ("w", AREA, 0))
        elif vcpu.entry_intr_info & exits.INTR_INFO_VALID and vector == VECTOR:
            token = self.area()[1]
            self.tokens.append(("ready", token))
            ops[:0] = [
                ("w", AREA, 0), ("call", self._ack), ("exit", exits.REASON_MSR_WRITE, {"insn_len": 2}),
                self.parked.pop(token),
            ]
        return self._vcpu_run(vcpu)

    def _ack(self) -> None:
        for name, value in (("rcx", MSR_KVM_ASYNC_PF_ACK), ("rax", 1), ("rdx", 0)):
            self.m.cpu.set_reg(self.vcpu, name, value)

    def area(self) -> tuple[int, int]:
        data = copy_from_user(self.m.process, BASE + AREA, 8)
        return int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little")


def test_a_guest_that_takes_tokens_does_something_else_until_the_interrupt() -> None:
    m = filled(machine())
    enable(m)
    guest = Guest(m)
    since = len(m.events)
    # Both pages are under way at once, and the stores in between need not wait.
    assert m.run(("r", 3 * PAGE), ("w", 40 * PAGE, 1), ("r", 5 * PAGE), ("r", 40 * PAGE)) == [1, 4, 6]
    first, second = (e.args["token"] for e in m.events[since:] if e.name == "kvm_async_pf_not_present")
    assert guest.tokens == [("wait", first), ("wait", second), ("ready", first), ("ready", second)]
    assert apf_names(m, since) == [
        "kvm_try_async_get_page", "kvm_async_pf_not_present", "kvm_try_async_get_page",
        "kvm_async_pf_not_present", "kvm_async_pf_completed", "kvm_async_pf_ready",
        "kvm_async_pf_completed", "kvm_async_pf_ready",
    ]
    assert not guest.parked
    assert not m.vcpus[0].apf.gfns
    assert m.vcpus[0].async_pf.queued == 0
    m.truths.sweep()


def test_one_token_at_a_time_is_ready_the_next_comes_when_the_guest_took_it() -> None:
    m = filled(machine())
    enable(m)
    vcpu = m.vcpus[0]
    works = []
    for gfn in (3, 4):
        work = KvmAsyncPf(vcpu, gfn * PAGE, BASE + gfn * PAGE)
        work.gfn, work.token = gfn, alloc_apf_token(vcpu)
        works.append(work)
        assert m.do(lambda work=work: kvm_setup_async_pf(vcpu, work))
        vcpu.exception.pending = False
    m.sched.run_until(lambda: all(w.over for w in works))

    def check() -> None:
        idx = m.kvm.srcu.read_lock()
        kvm_check_async_pf_completion(vcpu)
        m.kvm.srcu.read_unlock(idx)

    m.do(check)
    first = area(m)[1]
    m.do(check)
    assert area(m)[1] == first
    assert len(vcpu.async_pf.done) == 1
    # The acknowledgement itself looks at what is next.
    m.do(lambda: copy_to_user(m.process, BASE + AREA, bytes(8)))
    m.do(lambda: KVM_MSRS[MSR_KVM_ASYNC_PF_ACK][1](vcpu, 1))
    assert {first, area(m)[1]} == {w.token for w in works}
    assert vcpu.async_pf.queued == 0
    assert not vcpu.apf.gfns


@pytest.mark.parametrize(
    ("flags", "cpl", "cr0", "told"),
    [
        (BOTH, 0, 1 << 31, False), (BOTH, 3, 1 << 31, True),
        (BOTH | KVM_ASYNC_PF_SEND_ALWAYS, 0, 1 << 31, True), (BOTH | KVM_ASYNC_PF_SEND_ALWAYS, 0, 0, False),
    ],
)
def test_who_is_told_ring_3_or_anybody_with_paging(flags: int, cpl: int, cr0: int, told: bool) -> None:
    m = filled(machine())
    enable(m, flags, cr0=cr0)
    m.cpu.set_reg(m.vcpus[0], "cpl", cpl)
    since = len(m.events)
    m.spawn(("r", 3 * PAGE))
    m.sched.run_until(lambda: "kvm_async_pf_not_present" in m.names(since=since))
    assert bool(area(m)[0]) is told
    m.sched.run_until(lambda: m.cpu.out.get(0, [])[-1:] == [4])


def test_a_page_that_is_dropped_again_before_it_is_mapped_faults_again() -> None:
    m = filled(machine())
    struck: list[int] = []

    def strike(kind: str) -> None:
        vcpu = m.vcpus[0]
        if vcpu.async_pf.done and not struck and m.sched.current.name.startswith("kworker"):
            struck.append(1)
            do_madvise(m.mm, BASE + 3 * PAGE, PAGE, MADV_DONTNEED)
        m.truths.on_point(kind)

    m.sched.set_on_point(strike)
    assert m.run(("r", 3 * PAGE)) == [0]
    assert struck
    m.truths.sweep()


@pytest.mark.parametrize("moved", ["cr3", "paging"])
def test_a_page_for_other_guest_tables_is_not_mapped_in_these(moved: str) -> None:
    m = filled(machine())
    m.run()
    vcpu = m.vcpus[0]
    work = KvmAsyncPf(vcpu, 3 * PAGE, BASE + 3 * PAGE)
    work.direct_map = False
    if moved == "cr3":
        # Shadow paging: the faulting address means something else under another CR3.
        vcpu.mmu.root_role &= ~ROLE_DIRECT
        work.cr3 = 0x5000
    since = len(m.events)
    m.do(lambda: kvm_arch_async_page_ready(vcpu, work))
    assert not {"gup_answer", "spte_install"} & set(m.names(since=since))


def test_too_many_are_not_started() -> None:
    m = filled(machine())
    vcpu = m.vcpus[0]
    vcpu.async_pf.queued = ASYNC_PF_PER_VCPU
    since = len(m.events)

    def forget() -> None:
        vcpu.async_pf.queued = 0

    assert m.run(("r", 3 * PAGE), ("call", forget)) == [4]
    assert apf_names(m, since) == ["kvm_try_async_get_page"]


def test_a_prefetch_never_starts_one() -> None:
    m = filled(machine())
    m.run()
    since = len(m.events)

    def prefetch() -> int:
        idx = m.kvm.srcu.read_lock()
        r = kvm_mmu_do_page_fault(m.vcpus[0], 3 * PAGE, 0, prefetch=True)
        m.kvm.srcu.read_unlock(idx)
        return r

    assert m.do(prefetch) > 0
    assert not apf_names(m, since)


def test_tokens_are_a_count_over_the_vcpus_number_and_never_0_since_6_18() -> None:
    new, old = machine(vcpus=2), machine(vcpus=2, profile="linux-5.10")
    assert [alloc_apf_token(new.vcpus[1]) for _ in range(2)] == [0x1001, 0x2001]
    assert [alloc_apf_token(old.vcpus[1]) for _ in range(2)] == [1, 0x1001]
    new.vcpus[0].apf.id = 1 << 20
    assert alloc_apf_token(new.vcpus[0]) == 0x1000


def test_the_msrs_take_what_linux_takes() -> None:
    m = machine()
    vcpu = m.vcpus[0]
    put = lambda index, value: m.do(lambda: KVM_MSRS[index][1](vcpu, value))  # noqa: E731
    assert not put(MSR_KVM_ASYNC_PF_EN, AREA | BOTH | 0x10)
    assert not put(MSR_KVM_ASYNC_PF_EN, AREA | BOTH | 4)
    assert not put(MSR_KVM_ASYNC_PF_EN, 1 << 40 | BOTH)
    assert not put(MSR_KVM_ASYNC_PF_INT, 0x100)
    assert put(MSR_KVM_ASYNC_PF_INT, 0xEC)
    assert put(MSR_KVM_ASYNC_PF_EN, AREA | BOTH)
    msrs = MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_ACK
    assert [KVM_MSRS[n][0](vcpu) for n in msrs] == [AREA | BOTH, 0xEC, 0]
    assert put(MSR_KVM_ASYNC_PF_EN, 0)
    off = Machine()
    assert not any(KVM_MSRS[n][1](off.vcpus[0], 0) for n in msrs)
    assert [KVM_MSRS[n][0](off.vcpus[0]) for n in msrs] == [None] * 3
    assert kvm_pv_cpuid(off.kvm, KVM_CPUID_SIGNATURE_LEAF) is None
    leaf = kvm_pv_cpuid(m.kvm, KVM_CPUID_SIGNATURE_LEAF)
    assert leaf is not None
    assert b"".join(word.to_bytes(4, "little") for word in leaf[1:]) == b"KVMKVMKVM\0\0\0"


def test_a_vm_that_ends_waits_for_its_work_items() -> None:
    m = filled(machine())
    task = m.spawn(("r", 3 * PAGE))
    vcpu = m.vcpus[0]
    m.sched.run_until(lambda: bool(vcpu.wait.waiters))
    assert vcpu.async_pf.queue
    work = vcpu.async_pf.queue[0]
    m.do(m.kvm.clear_async_pf)
    assert work.over
    m.finish(task)
    assert m.cpu.out[0] == [4]


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize("seed", range(8))
def test_any_interleaving_of_faults_swap_and_drops_reads_what_was_stored(seed: int, profile: str) -> None:
    m = filled(machine(vcpus=2, seed=seed, profile=profile, ram=12 << 20))

    def swapper() -> None:
        for n in range(12):
            do_madvise(m.mm, BASE + n % 3 * PAGE, 5 * PAGE, MADV_PAGEOUT)
            while m.host.swap_device.inflight:
                m.sched.sleep(20_000)
            m.host.lru.lru_add_drain_all()
            m.host.reclaim(0, 0)

    def guest(n: int) -> None:
        ops = m.cpu.ops.setdefault(n, [])
        for turn in range(TURNS):
            gfn = (turn * 3 + n) % 8
            ops += [("r", gfn * PAGE), ("w", gfn * PAGE, 1 + gfn), ("r", (gfn + 1) % 8 * PAGE)]
        while ops:
            assert kvm_arch_vcpu_ioctl_run(m.vcpus[n]).kind == "hlt"

    tasks = [m.sched.spawn(f"vcpu{n}", lambda n=n: guest(n), vcpu=n) for n in (0, 1)]
    m.finish(m.sched.spawn("host", swapper), *tasks)
    for n in (0, 1):
        want = [1 + (turn * 3 + n + more) % 8 for turn in range(TURNS) for more in (0, 1)]
        assert m.cpu.out[n][-2 * TURNS :] == want
    m.truths.sweep()
    m.truths.quiescent()
    assert "kvm_async_pf_completed" in m.names()
