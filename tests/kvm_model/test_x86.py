"""KVM_RUN: exits to user space, event injection, halting, requests."""

from __future__ import annotations

import pytest

from host_mm.kernel.errors import KernelError
from kvm_model.kvm_main import Kvm
from kvm_model.requests import IN_GUEST_MODE, OUTSIDE_GUEST_MODE, kvm_make_request
from kvm_model.vmx import exits
from tests.kvm_model.machine import Machine

VALID = exits.INTR_INFO_VALID


class Pic:
    """One interrupt line."""

    def __init__(self) -> None:
        self.vectors: list[int] = []

    def has_interrupt(self) -> bool:
        return bool(self.vectors)

    def ack(self) -> int:
        return self.vectors.pop(0)


def exit_op(reason: int, **fields: int) -> tuple[object, ...]:
    return ("exit", reason, {"insn_len": 2, **fields})


def io(port: int, size: int, *, in_: bool) -> tuple[object, ...]:
    return exit_op(exits.REASON_IO_INSTRUCTION, qualification=port << 16 | (8 if in_ else 0) | size - 1)


def test_out_leaves_rip_at_the_instruction_until_user_space_comes_back() -> None:
    m = Machine()
    m.cpu.set_reg(m.vcpus[0], "rax", 0x1234)
    exit_ = m.run_raw(io(0x3F8, 1, in_=False))
    assert (exit_.kind, exit_.port, exit_.size, exit_.write, exit_.data) == ("io", 0x3F8, 1, True, 0x34)
    assert m.cpu.get_reg(m.vcpus[0], "rip") == 0x1000
    m.run()
    assert m.cpu.get_reg(m.vcpus[0], "rip") == 0x1002 + 1
    assert m.last("kvm_pio").args == {"rw": 1, "port": 0x3F8, "size": 1, "count": 1, "val": 0x34}


@pytest.mark.parametrize(
    ("size", "want"), [(1, 0x1111_1111_1111_11EF), (2, 0x1111_1111_1111_BEEF), (4, 0xDEADBEEF)]
)
def test_in_fills_the_low_part_of_rax(size: int, want: int) -> None:
    m = Machine()
    m.cpu.set_reg(m.vcpus[0], "rax", 0x1111_1111_1111_1111)
    exit_ = m.run_raw(io(0x60, size, in_=True))
    assert not exit_.write
    m.vcpus[0].complete_io(0xDEADBEEF)
    m.run()
    assert m.cpu.get_reg(m.vcpus[0], "rax") == want


def test_vmcall_goes_to_user_space_with_rip_stepped() -> None:
    m = Machine()
    for name, value in (("rax", 7), ("rbx", 1), ("rcx", 2), ("rdx", 3), ("rsi", 4)):
        m.cpu.set_reg(m.vcpus[0], name, value)
    exit_ = m.run_raw(exit_op(exits.REASON_VMCALL))
    assert (exit_.kind, exit_.nr, exit_.args) == ("hypercall", 7, (1, 2, 3, 4))
    assert m.cpu.get_reg(m.vcpus[0], "rip") == 0x1002
    m.vcpus[0].complete_hypercall(-22)
    m.run()
    assert m.cpu.get_reg(m.vcpus[0], "rax") == (1 << 64) - 22


def test_cpuid_and_msrs_stay_in_the_kernel_and_a_bad_msr_is_gp() -> None:
    m = Machine()
    cpu, vcpu = m.cpu, m.vcpus[0]
    cpu.set_reg(vcpu, "rax", 0x40)
    m.run(exit_op(exits.REASON_CPUID))
    assert [cpu.get_reg(vcpu, r) for r in ("rax", "rbx", "rcx", "rdx")] == [0x41, 2, 3, 4]
    for name, value in (("rcx", 0x10), ("rax", 5), ("rdx", 6)):
        cpu.set_reg(vcpu, name, value)
    m.run(exit_op(exits.REASON_MSR_WRITE), exit_op(exits.REASON_MSR_READ))
    assert cpu.msrs[0x10] == 6 << 32 | 5
    cpu.set_reg(vcpu, "rcx", 0x999)
    m.cpu.ops[0] = [exit_op(exits.REASON_MSR_READ)]

    def drop_op(*args: object) -> int | None:
        cpu.ops[0].clear()
        return None

    cpu.get_msr = drop_op  # type: ignore[method-assign,assignment]
    m.run()
    assert cpu.injected == [13 | exits.INTR_TYPE_HARD_EXCEPTION | exits.INTR_INFO_DELIVER_CODE | VALID]
    assert m.last("kvm_inj_exception").args["exception"] == 13


def test_a_triple_fault_is_a_shutdown() -> None:
    m = Machine()
    assert m.run_raw(exit_op(exits.REASON_TRIPLE_FAULT)).kind == "shutdown"


def test_an_unknown_exit_is_an_internal_error() -> None:
    m = Machine()
    exit_ = m.run_raw(exit_op(exits.REASON_INVALID_STATE))
    assert exit_.kind == "internal-error"
    assert "INVALID_STATE" in exit_.why


def test_an_instruction_that_cannot_be_emulated_is_an_internal_error() -> None:
    m = Machine()
    assert m.run_raw(("x", 0x1000_0000)).kind == "internal-error"
    assert m.last("kvm_emulate_insn").args["failed"]


def test_an_interrupt_is_injected_when_the_guest_can_take_it() -> None:
    m = Machine()
    pic = m.vcpus[0].irq_source = Pic()
    pic.vectors.append(0x20)
    m.cpu.allowed = False

    def allow() -> None:
        assert m.vcpus[0].irq_window
        m.cpu.allowed = True

    def done() -> None:
        m.cpu.allowed = True
        m.vcpus[0].irq_source = None

    m.run(("call", allow), ("call", done))
    assert m.cpu.injected == [0x20 | VALID]
    assert m.vcpus[0].stat["irq_window_exits"] == 1
    assert m.last("kvm_inj_virq").args == {"vector": 0x20, "soft": False, "reinjected": False}


def test_an_interrupt_whose_delivery_was_cut_off_is_injected_again_first() -> None:
    m = Machine()
    pic = m.vcpus[0].irq_source = Pic()
    m.cpu.regs[0] = {"rip": 0x1000}
    pushes = []

    def cut() -> None:
        pushes.append(1)
        pic.vectors.append(0x30)

    violation = {
        "qualification": 2 | exits.EPT_GVA_VALID, "guest_physical": 0x3000, "guest_linear": 0x3000,
        "idt_vectoring_info": 0x20 | VALID,
    }
    vcpu = m.vcpus[0]
    m.cpu.ops[0] = [("call", cut), ("exit", exits.REASON_EPT_VIOLATION, violation)]
    original = m.cpu.vcpu_run

    def vcpu_run(v: object) -> exits.VmExit:
        if len(m.cpu.injected) >= 1 and m.cpu.ops[0][:1] and m.cpu.ops[0][0][0] == "exit":
            m.cpu.ops[0].pop(0)
        out = original(vcpu)
        if len(m.cpu.injected) >= 2:
            vcpu.irq_source = None
        return out

    m.cpu.vcpu_run = vcpu_run  # type: ignore[method-assign,assignment]
    m.run()
    assert [i & 0xFF for i in m.cpu.injected] == [0x20, 0x30]
    assert [e.args["reinjected"] for e in m.events if e.name == "kvm_inj_virq"] == [True, False]


def test_hlt_blocks_until_an_interrupt_and_traces_the_wakeup() -> None:
    m = Machine()
    pic = m.vcpus[0].irq_source = Pic()
    task = m.spawn(("call", lambda: None))
    m.sched.run_until(lambda: bool(m.vcpus[0].wait.waiters))
    assert not task.done
    pic.vectors.append(0x20)
    m.kvm.kick_for_interrupt(m.vcpus[0])
    m.sched.run_until(lambda: bool(m.cpu.injected))
    m.kvm.request_exit(m.vcpus[0])
    m.finish(task)
    assert task.result.kind == "intr"
    assert m.last("kvm_vcpu_wakeup").args["waited"]


def test_hlt_with_interrupts_off_goes_to_user_space() -> None:
    m = Machine()
    m.vcpus[0].irq_source = Pic()
    m.cpu.set_reg(m.vcpus[0], "rflags", 2)
    assert m.run_raw().kind == "hlt"


def test_an_nmi_wakes_and_is_injected() -> None:
    m = Machine()
    m.vcpus[0].queue_nmi()
    m.run(("r", 0))
    assert m.cpu.injected[0] == 2 | exits.INTR_TYPE_NMI | VALID


def test_user_space_gets_its_thread_back() -> None:
    m = Machine()
    assert m.run_raw(("call", lambda: m.kvm.request_exit(m.vcpus[0])), ("r", 0)).kind == "intr"
    assert m.run() == [0]
    assert m.last("kvm_userspace_exit").args["reason"] == 5


def test_a_request_made_while_outside_is_served_without_a_kick() -> None:
    m = Machine()
    m.run(("r", 0))
    assert m.vcpus[0].mode == OUTSIDE_GUEST_MODE
    flushes = m.cpu.flushes[0]
    m.kvm.kvm_flush_remote_tlbs()
    assert not m.vcpus[0].kicked
    assert m.kvm.stat["remote_tlb_flush"] == 0
    m.run(("r", 0))
    assert m.cpu.flushes[0] == flushes + 1


def test_a_request_that_comes_between_mode_and_entry_stops_the_entry() -> None:
    m = Machine()
    m.run(("r", 0))
    vcpu = m.vcpus[0]
    entered: list[int] = []

    def race(kind: str) -> None:
        if kind == "srcu" and vcpu.mode == IN_GUEST_MODE and not entered:
            entered.append(len(m.names()))
            kvm_make_request(0, vcpu)

    m.sched.set_on_point(race)
    flushes = m.cpu.flushes[0]
    m.run(("r", 0))
    assert m.cpu.flushes[0] == flushes + 1
    assert m.names()[entered[0]] == "kvm_entry"


def test_bad_parameters_are_refused() -> None:
    m = Machine()
    for params in ({"kvm.tdp_mmu": "perhaps"}, {"kvm_intel.eptad": "maybe"}):
        with pytest.raises(KernelError):
            Kvm(m.host, m.process, m.cpu, params=params)


def test_vcpu_numbers_are_unique() -> None:
    m = Machine()
    with pytest.raises(KernelError):
        m.kvm.create_vcpu(0)


def test_loading_a_root_flushes_without_counting_and_a_requested_flush_counts() -> None:
    m = Machine()
    m.run(("w", 0x3000, 1))
    assert m.cpu.flushes[0] == 1
    assert m.vcpus[0].stat["tlb_flush"] == 0
    m.do(m.kvm.kvm_flush_remote_tlbs)
    m.run(("r", 0x3000))
    assert m.cpu.flushes[0] == 2
    assert m.vcpus[0].stat["tlb_flush"] == 1


def test_a_wakeup_is_always_valid_on_x86() -> None:
    m = Machine()
    m.vcpus[0].irq_source = Pic()
    m.sched.after(1_000_000, lambda: m.kvm.request_exit(m.vcpus[0]))
    assert m.run_raw().kind == "intr"
    assert m.last("kvm_vcpu_wakeup").args["valid"]


def test_an_event_delivered_through_mmio_is_an_internal_error() -> None:
    m = Machine()
    info = VALID | exits.INTR_TYPE_EXT_INTR | 0x20
    exit_ = m.run_raw(exit_op(
        exits.REASON_EPT_VIOLATION, qualification=exits.EPT_ACC_READ, guest_physical=0x1000_0000,
        idt_vectoring_info=info,
    ))
    assert exit_.kind == "internal-error"
    assert "delivered" in exit_.why
    assert m.vcpus[0].stat["insn_emulation"] == 0


def test_a_failed_emulation_is_traced_and_counted_as_begun_and_as_failed() -> None:
    m = Machine()
    m.run_raw(("x", 0x1000_0000))
    assert [e.args["failed"] for e in m.events if e.name == "kvm_emulate_insn"] == [False, True]
    stat = m.vcpus[0].stat
    assert (stat["insn_emulation"], stat["insn_emulation_fail"]) == (1, 1)
