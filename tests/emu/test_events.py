"""emu/cpu/events.py, faults.py: exceptions arrive as the SDM says, in the guest's own handlers."""


import pytest

from emu.cpu.env import R_SS
from kvm_model.vmx import exits
from tests.emu.bare_machine import (
    CODE,
    GDT,
    IDT,
    IST1,
    KCODE,
    KDATA,
    NX,
    RSP0,
    STACK,
    TSS,
    TSS_SEL,
    UCODE,
    UDATA,
    USER,
    USER_STACK,
    A,
    D,
    P,
    U,
    W,
)
from tests.emu.handlers import H, fault, frame, machine

HARD = 0x80000300
HARD_ERR = 0x80000B00
RF = 1 << 16


@pytest.mark.parametrize(
    ("code", "error", "cr2", "offset"),
    [
        ("mov rax, [rcx]", 0, 0x50123, 0),
        ("mov [rcx], rax", 2, 0x50123, 0),
        ("nop; lock inc qword ptr [rcx]", 2, 0x50123, 1),
        ("nop; xchg [rcx], rax", 2, 0x50123, 1),
        ("nop; add [rcx], al", 2, 0x50123, 1),
        ("nop; cmpxchg16b [rcx - 3]", 2, 0x50120, 1),
        ("nop; bts qword ptr [rcx], rdx", 2, 0x50123, 1),
        ("cmp [rcx], rax", 0, 0x50123, 0),
        ("push qword ptr [rcx]", 0, 0x50123, 0),
        ("jmp rcx", 0x10, 0x50123, None),
    ],
)
def test_not_present_page_gives_the_right_code_and_cr2(code, error, cr2, offset):
    m = machine()
    m.cpu.set_msr(m.vcpus[0], 0xC0000080, 0xD01)
    m.pte(0x50000, 0, 0)
    got = fault(m, code, rcx=0x50123, rdx=0)
    assert got[0] == error
    assert m.reg("cr2") == cr2
    assert got[1] == (0x50123 if offset is None else CODE + offset)
    assert got[2:] == (KCODE, 2 | RF, STACK, KDATA)


def test_write_to_read_only_page_is_a_protection_fault_with_wp():
    m = machine()
    m.pte(0x50000, P)
    assert fault(m, "mov rax, [rcx]; inc dword ptr [rcx]", rcx=0x50008)[0] == 3
    assert m.pte(0x50000) & D == 0
    assert m.pte(0x50000) & A


def test_user_access_to_supervisor_page():
    m = machine()
    m.put(USER, "mov rax, [rcx]")
    m.enter_user()
    m.set(rcx=0x50000)
    e = m.run()
    assert e.rip == H
    got = frame(m)
    assert got == (5, USER, UCODE, 2 | RF, USER_STACK, UDATA)
    assert m.reg("rsp") == RSP0 - 48
    assert m.cpu.vcpu(m.vcpus[0]).env.seg(R_SS)[0] == 0
    assert m.reg("cpl") == 0


def test_user_write_and_fetch_faults():
    cases = (("mov [rcx], al", 0x50000, 7), ("jmp rcx", 0x50000, 0x15), ("mov [rcx], al", 0x39000, 7))
    for code, rcx, error in cases:
        m = machine()
        m.cpu.set_msr(m.vcpus[0], 0xC0000080, 0xD01)
        m.pte(0x39000, P | U)
        m.put(USER, code)
        m.enter_user()
        m.set(rcx=rcx)
        m.run()
        assert frame(m)[0] == error, code


def test_smep_and_nx_stop_a_fetch():
    m = machine()
    assert fault(m, "jmp rcx", rcx=USER)[:2] == (0x11, USER)
    m = machine()
    m.cpu.set_msr(m.vcpus[0], 0xC0000080, 0xD01)
    m.pte(0x50000, P | W | NX)
    assert fault(m, "jmp rcx", rcx=0x50000)[:2] == (0x11, 0x50000)


def test_the_handler_returns_and_the_access_is_repeated():
    m = machine()
    m.pte(0x50000, 0, 0)
    m.gate(14, H + 0x100)
    m.put(H + 0x100, f"push rax; mov rax, 0x50003; mov [{0x4000 + 8 * 0x50}], rax; pop rax; add rsp, 8; "
        f"iretq")
    m.put(CODE, "mov rcx, 0x50000; add qword ptr [rcx], 5; mov rbx, [rcx]; hlt")
    m.hlt()
    assert m.reg("rbx") == 5
    assert m.reg("rsp") == STACK


def test_divide_error_and_undefined_opcode_have_no_code():
    m = machine()
    assert fault(m, "nop; xor ecx, ecx; div ecx", error=False)[1:3] == (CODE + 3, KCODE)
    m = machine()
    assert fault(m, "nop; ud2", error=False)[1] == CODE + 1
    m = machine()
    m.put(CODE, "vmmcall")
    assert m.run().rip == H


def test_the_third_general_protection_fault_still_is_one():
    m = machine()
    m.gate(13, H + 0x100)
    m.put(H + 0x100, "inc r15; add qword ptr [rsp + 8], 3; add rsp, 8; iretq")
    m.put(CODE, "mov eax, 0x58; mov ds, ax; nop; mov ds, ax; nop; mov ds, ax; nop; hlt")
    m.hlt()
    assert m.reg("r15") == 3


@pytest.mark.parametrize(
    ("code", "vector"),
    [("mov rax, [rcx]", 13), ("mov [rcx], rax", 13), ("mov rax, [rbp]", 12), ("mov rsp, rcx; push rax", 12),
     ("mov rax, ds:[rcx + rdx]", 13), ("mov rsp, rcx; push [0x300000]", 12)],
)
def test_non_canonical_addresses_are_gp_or_ss(code, vector):
    m = machine()
    m.gate(12, H + 0x200)
    m.gate(13, H + 0x100)
    if "rsp" in code:
        m.gate(12, H + 0x200, ist=1)
    m.put(H + 0x100, "mov r15, 13; hlt")
    m.put(H + 0x200, "mov r15, 12; hlt")
    m.put(CODE, code)
    m.set(rcx=(1 << 47) + 0x1000, rbp=1 << 47, rdx=0)
    m.run()
    assert m.reg("r15") == vector
    assert frame(m)[0] == 0


def test_int_n_pushes_the_next_rip_and_checks_the_gate():
    m = machine()
    m.gate(0x80, H + 0x100, dpl=3, kind=15)
    m.put(H + 0x100, "mov r14, [rsp]; mov r13, [rsp + 16]; iretq")
    m.put(USER, "int 0x80; mov r12, r14; int 0x20")
    m.gate(0x20, H)
    m.enter_user(rflags=0x202)
    e = m.run()
    assert e.rip == H
    assert m.reg("r12") == USER + 2
    assert m.reg("r13") == 0x202
    error, rip, *_ = frame(m)
    assert error == 0x20 * 8 + 2
    assert rip == USER + 5


def test_int3_is_a_trap_and_needs_dpl_3():
    m = machine()
    m.gate(3, H, dpl=3)
    m.put(USER, "nop; int3")
    m.enter_user()
    m.run()
    assert frame(m, error=False)[1:4] == (USER + 2, UCODE, 2)
    m = machine()
    m.put(USER, "nop; int3")
    m.enter_user()
    m.run()
    assert frame(m)[:2] == (3 * 8 + 2, USER + 1)


def test_trap_gates_leave_interrupts_on():
    m = machine()
    m.gate(0x80, H, kind=15)
    m.put(CODE, "sti; nop; int 0x80")
    m.run()
    assert m.reg("rflags") & 0x200
    m = machine()
    m.gate(0x80, H, kind=14)
    m.put(CODE, "sti; nop; int 0x80")
    m.run()
    assert not m.reg("rflags") & 0x200


def test_ist_switches_the_stack_at_the_same_privilege():
    m = machine()
    m.gate(14, H, ist=1)
    m.pte(0x50000, 0, 0)
    got = fault(m, "mov rax, [rcx]", rcx=0x50000)
    assert m.reg("rsp") == IST1 - 48
    assert got[4:] == (STACK, KDATA)


def test_missing_gate_bad_gates_and_double_faults():
    m = machine()
    m.gate(14, H, present=0)
    m.gate(8, H + 0x100)
    m.put(H + 0x100, "mov r15, 8; hlt")
    m.pte(0x50000, 0, 0)
    m.put(CODE, "mov rax, [rcx]")
    m.set(rcx=0x50000)
    m.run()
    assert m.reg("r15") == 8
    assert frame(m)[:2] == (0, CODE)
    m = machine()
    m.gate(6, H, present=0)
    m.gate(11, H + 0x100)
    m.put(H + 0x100, "mov r15, 11; hlt")
    m.put(CODE, "ud2")
    m.run()
    assert m.reg("r15") == 11
    assert frame(m)[0] == 6 * 8 + 2 + 1
    m = machine()
    m.gate(0x80, H, kind=5)
    m.put(CODE, "int 0x80")
    m.run()
    assert frame(m)[0] == 0x80 * 8 + 2


def test_stack_that_faults_makes_a_double_fault_on_its_ist():
    m = machine()
    m.gate(8, H + 0x100, ist=1)
    m.put(H + 0x100, "mov r15, cr2; hlt")
    m.pte(0x50000, 0, 0)
    m.put(CODE, "mov rsp, 0x51000; mov rax, [rcx]")
    m.set(rcx=0x12345000)
    m.run()
    assert m.reg("rip") == H + 0x104
    # the second page fault's address: the push below the aligned stack
    assert m.reg("r15") == 0x51000 - 48
    assert frame(m)[0] == 0


def test_triple_fault_without_an_idt():
    m = machine()
    m.put(CODE, "push 0; push 0; lidt [rsp]; ud2")
    e = m.run()
    assert (e.reason, e.rip) == (exits.REASON_TRIPLE_FAULT, CODE + 8)
    m = machine()
    m.gate(8, H, present=0)
    m.gate(14, H, present=0)
    m.pte(0x50000, 0, 0)
    m.put(CODE, "mov rax, [rcx]")
    m.set(rcx=0x50000)
    assert m.run().reason == exits.REASON_TRIPLE_FAULT


def test_invalid_tss_when_its_limit_is_short():
    m = machine()
    m.cpu.vcpu(m.vcpus[0]).env.set_table(352, TSS_SEL, TSS, 3, 0x8B00)
    m.gate(10, H + 0x100, ist=0)
    m.put(USER, "ud2")
    m.enter_user()
    # #TS needs the TSS too: it cannot be delivered, nor the double fault
    assert m.run().reason == exits.REASON_TRIPLE_FAULT


def test_single_step_traps_behind_each_instruction():
    m = machine()
    m.gate(1, H + 0x100)
    m.put(H + 0x100, "inc r15; mov r14, [rsp]; iretq")
    m.put(CODE, "push 0x102; popfq; nop; nop; pushfq; and qword ptr [rsp], 0xfffffffffffffeff; popfq; hlt")
    m.hlt()
    assert m.reg("r15") == 5
    assert m.reg("rsp") == STACK


def test_injected_interrupt_and_exception():
    m = machine()
    m.gate(0x20, H + 0x100)
    m.put(H + 0x100, "mov r15, [rsp]; hlt")
    m.set(rflags=0x202)
    m.vcpus[0].entry_intr_info = 0x80000020
    m.put(CODE, "nop")
    m.run()
    assert m.reg("r15") == CODE
    assert m.vcpus[0].entry_intr_info == 0
    assert not m.reg("rflags") & 0x200


def test_injected_software_interrupt_pushes_behind_it():
    m = machine()
    m.gate(0x80, H + 0x100)
    m.put(H + 0x100, "mov r15, [rsp]; hlt")
    v = m.vcpus[0]
    v.entry_intr_info, v.entry_insn_len = 0x80000480, 2
    m.run()
    assert m.reg("r15") == CODE + 2


@pytest.mark.parametrize("page", [IDT, GDT, 0x1000, 0x4000, STACK - 0x1000, H])
def test_delivery_that_leaves_the_guest_carries_vectoring_information(page):
    m = machine(ept=True)
    m.pte(0x50000, 0, 0)
    m.put(CODE, "mov rcx, 0x50010; mov rax, [rcx]")
    m.ept_set(page, rwx=0)
    e = m.step()
    assert e.reason == exits.REASON_EPT_VIOLATION
    assert e.guest_physical >> 12 == page >> 12
    if page in (IDT, GDT):
        assert e.idt_vectoring_info == HARD_ERR | 14
        assert e.idt_vectoring_error == 0
        assert e.qualification & 0x187 == 0x181
        assert m.reg("cr2") == 0x50010
        assert m.reg("rip") == CODE + 7
    m.ept_set(page, rwx=7)
    m.cpu.flush_tlb(m.vcpus[0])
    v = m.vcpus[0]
    v.entry_intr_info, v.entry_error_code = e.idt_vectoring_info, e.idt_vectoring_error
    e = m.step()
    assert (e.reason, e.rip) == (exits.REASON_HLT, H)


def test_stack_push_that_leaves_the_guest_changes_nothing():
    m = machine(ept=True)
    m.pte(0x50000, 0, 0)
    m.put(CODE, "mov rax, [rcx]")
    m.set(rcx=0x50010, rsp=0x60000)
    m.ept_set(0x5F000, rwx=5)
    e = m.step()
    assert e.reason == exits.REASON_EPT_VIOLATION
    assert e.qualification & 7 == 2
    assert (e.guest_physical, e.guest_linear) == (0x60000 - 48, 0x60000 - 48)
    assert e.idt_vectoring_info == HARD_ERR | 14
    assert (m.reg("rip"), m.reg("rsp"), m.reg("rflags")) == (CODE, 0x60000, 2)


def test_fetching_ahead_into_a_missing_page_runs_what_is_before_it():
    m = machine()
    m.pte(0x51000, 0, 0)
    start = 0x51000 - 12
    m.put(start, "inc r15; inc r14; inc r13; nop; nop; nop")
    m.put(CODE, "jmp rcx")
    m.set(rcx=start)
    m.run()
    assert (m.reg("r15"), m.reg("r14"), m.reg("r13")) == (1, 1, 1)
    assert frame(m)[1] == 0x51000
    assert m.reg("cr2") == 0x51000


def test_an_instruction_across_a_missing_page_faults_at_its_own_rip():
    m = machine()
    start = 0x51000 - 8
    m.put(start, "inc r15; inc r14; movabs rax, 0x1122334455667788")
    m.pte(0x51000, 0, 0)
    m.put(CODE, "jmp rcx")
    m.set(rcx=start)
    m.run()
    assert (m.reg("r15"), m.reg("r14")) == (1, 1)
    assert frame(m)[1] == 0x51000 - 2
    assert m.reg("cr2") == 0x51000


def test_a_branch_before_the_page_end_never_touches_the_next_page():
    m = machine()
    start = 0x51000 - 7
    m.put(start, "inc r15; jz 0x51020; hlt; nop")
    m.pte(0x51000, 0, 0)
    m.put(CODE, "jmp rcx")
    m.set(rcx=start)
    e = m.run()
    assert e.rip == start + 5 or e.rip == start + 3 + 2


def test_smap_stops_the_kernel_unless_ac():
    m = machine()
    m.cpu.vcpu(m.vcpus[0]).intercepts.load_cr4(0x620 | 1 << 20 | 1 << 21)
    assert fault(m, "stac; mov rax, [rcx]; clac; mov rax, [rcx]", rcx=0x30000)[:2] == (1, CODE + 9)


def test_interpreted_and_compiled_walks_agree_on_a_fault():
    for interpreted in (False, True):
        m = machine(interpreted=interpreted)
        m.pte(0x50000, P)
        assert fault(m, "mov rax, [rcx]; inc dword ptr [rcx]", rcx=0x50008)[0] == 3


def test_an_interrupt_waits_for_an_element_that_is_still_to_be_stored():
    m = machine(ept=True)
    m.gate(0x20, H)
    m.put(CODE, "sti; mov edi, 0x300000; mov dx, 0x80; insb; hlt")
    e = m.step()
    assert e.reason == exits.REASON_IO_INSTRUCTION
    m.ept_set(0x300000, rwx=0)
    m.cpu.flush_tlb(m.vcpus[0])
    m.set(rax=0x5A)
    m.cpu.skip_emulated_instruction(m.vcpus[0], e.insn_len)
    v = m.vcpus[0]
    v.entry_intr_info = 0x80000020
    e = m.step()
    assert (e.reason, e.idt_vectoring_info, e.guest_physical) == (48, 0x80000020, 0x300000)
    m.ept_set(0x300000, rwx=7)
    v.entry_intr_info = e.idt_vectoring_info
    e = m.step()
    assert e.rip == H
    assert m.ram.read(0x300000, 1) == b"\x5a"
    assert m.reg("rdi") == 0x300001


def test_an_exit_keeps_the_sti_shadow():
    m = machine(ept=True)
    m.put(CODE, "mov rbx, 0x300000; sti; mov [rbx], rax; hlt")
    m.ept_set(0x300000, rwx=0)
    assert m.step().reason == exits.REASON_EPT_VIOLATION
    assert not m.cpu.interrupt_allowed(m.vcpus[0])
    m.ept_set(0x300000, rwx=7)
    m.vcpus[0].irq_window = True
    e = m.step()
    assert (e.reason, e.rip) == (exits.REASON_INTERRUPT_WINDOW, CODE + 11)
