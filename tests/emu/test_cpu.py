"""emu/cpu/cpu.py: what exits, what does not, and that RIP is exact."""

import pytest

from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, Machine


@pytest.fixture
def m():
    machine = Machine()
    yield machine
    machine.cpu.close()


def test_guest_code_runs_to_hlt(m):
    m.put(CODE, "mov rax, 0x1122334455667788; mov rcx, 0x300000; mov [rcx], rax; hlt")
    e = m.run()
    assert (e.reason, e.rip, e.insn_len) == (exits.REASON_HLT, CODE + 20, 1)
    assert m.q(0x300000) == 0x1122334455667788


def test_cpuid_exits_and_shows_the_signature(m):
    m.put(CODE, "mov eax, 0x40000000; cpuid; hlt")
    m.hlt()
    assert (m.exits[0].reason, m.exits[0].rip, m.exits[0].insn_len) == (exits.REASON_CPUID, CODE + 5, 2)
    assert m.reg("rbx").to_bytes(4, "little") == b"refa"


def test_cpuid_tells_the_kernel_of_the_host(m):
    m.put(CODE, "mov eax, 0x40000001; cpuid; hlt")
    m.hlt()
    assert m.reg("rax") == 6 << 16 | 18 << 8


def test_vmcall_exits_before_it(m):
    m.put(CODE, "mov eax, 7; vmcall; hlt")
    e = m.run()
    assert (e.reason, e.rip, e.insn_len) == (exits.REASON_VMCALL, CODE + 5, 3)


def test_ports_exit_with_size_direction_and_port(m):
    m.put(CODE, "mov dx, 0x3f8; mov al, 0x41; out dx, al; out 0x80, eax; in al, 0x21; mov bl, al; "
        "in eax, dx; hlt")
    m.inputs = [0x5A, 0xDEADBEEF]
    m.hlt()
    assert m.out == [(0x3F8, 1, 0x41), (0x80, 4, 0x41)]
    assert m.reg("rbx") == 0x5A
    assert m.reg("rax") == 0xDEADBEEF
    assert m.exits[1].qualification == 3 | 1 << 6 | 0x80 << 16
    assert m.exits[2].qualification == 0 | 1 << 3 | 1 << 6 | 0x21 << 16


def test_rep_outs_and_ins_exit_per_element(m):
    m.ram.write(0x300000, b"hello")
    m.put(CODE, "mov dx, 0x3f8; mov esi, 0x300000; mov ecx, 5; mov eax, 0x1234; rep outsb; mov edi, 0x301000;"
                "mov ecx, 3; rep insw; hlt")
    m.inputs = [0x1111, 0x2222, 0x3333]
    m.hlt()
    assert bytes(v for _, _, v in m.out) == b"hello"
    assert m.ram.read(0x301000, 8) == bytes.fromhex("1111222233330000")
    assert (m.reg("rcx"), m.reg("rsi"), m.reg("rdi"), m.reg("rax")) == (0, 0x300005, 0x301006, 0x1234)


def test_known_msrs_read_and_write_unknown_ones_fault(m):
    m.gate(13, 0x11000)
    m.put(0x11000, "mov r15, [rsp]; mov r14, [rsp + 8]; hlt")
    end = m.put(CODE, "mov ecx, 0xc0000082; mov eax, 0x5678; mov edx, 0xffff8000; wrmsr; rdmsr; "
        "mov r8, rdx; mov ecx, 0x9999")
    m.put(end, "rdmsr")
    m.hlt()
    assert m.cpu.get_msr(m.vcpus[0], 0xC0000082) == 0xFFFF800000005678
    assert m.reg("r8") == 0xFFFF8000
    assert (m.reg("r15"), m.reg("r14")) == (0, end)


def test_fs_and_gs_base_do_not_exit(m):
    m.put(CODE, "mov ecx, 0xc0000101; mov eax, 0x300000; xor edx, edx; wrmsr; mov eax, 77; "
        "mov gs:[8], eax; hlt")
    m.hlt()
    assert [e.reason for e in m.exits] == [exits.REASON_HLT]
    assert m.q(0x300008) & 0xFFFFFFFF == 77


def test_non_canonical_gs_base_is_gp(m):
    m.gate(13, 0x11000)
    m.put(0x11000, "hlt")
    m.put(CODE, "mov ecx, 0xc0000101; xor eax, eax; mov edx, 0x00800000; wrmsr")
    e = m.run()
    assert e.rip == 0x11000


def test_rdtsc_is_logical_time(m):
    m.put(CODE, "rdtsc; mov r8, rax; rdtscp; mov r9, rax; hlt")
    m.sched.now = 1_000_000
    m.hlt()
    assert 1_000_000 < m.reg("r8") < m.reg("r9") <= m.sched.now
    assert [e.reason for e in m.exits] == [exits.REASON_HLT]


def test_time_is_the_guests_instructions(m):
    m.put(CODE, "mov ecx, 100000; l: dec ecx; jnz l; hlt")
    m.hlt()
    assert 200_000 <= m.sched.now <= 200_010


def test_a_kick_ends_the_run_at_a_slice_edge(m):
    m.put(CODE, "jmp .")
    m.sched.after(250_000, lambda: setattr(m.vcpus[0], "kicked", True))
    e = m.step()
    assert (e.reason, e.rip) == (exits.REASON_EXTERNAL_INTERRUPT, CODE)
    assert 250_000 <= m.sched.now < 260_000


def test_interrupt_window_opens_behind_the_sti_shadow(m):
    m.put(CODE, "nop; nop; sti; nop; inc eax; hlt")
    m.vcpus[0].irq_window = True
    e = m.run()
    assert (e.reason, e.rip) == (exits.REASON_INTERRUPT_WINDOW, CODE + 4)
    assert m.cpu.interrupt_allowed(m.vcpus[0])
    m.vcpus[0].irq_window = False
    m.hlt()


def test_interrupt_window_opens_at_popf_and_iret(m):
    for code, offset in (("push 0x202; popfq; nop; hlt", 6), ("push 0x10; push 0x80000; push 0x202; "
        "push 8; lea rax, [rip + 3]; push rax; iretq; nop; hlt", 24)):
        machine = Machine()
        machine.put(CODE, code)
        machine.vcpus[0].irq_window = True
        e = machine.run()
        assert e.reason == exits.REASON_INTERRUPT_WINDOW
        assert e.rip == CODE + offset, hex(e.rip)


def test_sti_hlt_keeps_the_shadow_until_stepped(m):
    m.put(CODE, "sti; hlt")
    e = m.run()
    assert e.reason == exits.REASON_HLT
    assert not m.cpu.interrupt_allowed(m.vcpus[0])
    m.cpu.skip_emulated_instruction(m.vcpus[0], 1)
    assert m.cpu.interrupt_allowed(m.vcpus[0])


def test_reserved_control_register_bits_are_gp(m):
    m.gate(13, 0x11000)
    m.put(0x11000, "hlt")
    for code in ("mov rax, cr4; bts rax, 17; mov cr4, rax", "mov rax, cr4; btr rax, 5; mov cr4, rax",
                 "mov rax, cr0; btr rax, 31; mov cr0, rax", "mov rax, cr0; btr rax, 0; mov cr0, rax"):
        machine = Machine()
        machine.gate(13, 0x11000)
        machine.put(0x11000, "hlt")
        machine.put(CODE, code)
        assert machine.run().rip == 0x11000, code


def test_control_registers_can_be_written(m):
    m.put(CODE, "mov rax, cr0; btr rax, 16; mov cr0, rax; mov rbx, cr0; clts; mov rax, cr4; bts rax, 7; "
        "mov cr4, rax; mov rcx, cr4; hlt")
    m.hlt()
    assert not m.reg("rbx") >> 16 & 1
    assert m.reg("rcx") >> 7 & 1


def test_the_filter_keeps_exits_from_kvm(m):
    m.put(CODE, "cpuid; hlt")
    seen = []

    def keep(vcpu, e):
        seen.append(e.reason)
        if e.reason == exits.REASON_CPUID:
            m.cpu.skip_emulated_instruction(vcpu, 2)
            return True
        return False

    m.cpu.exit_filter = keep
    assert m.step().reason == exits.REASON_HLT
    assert seen == [exits.REASON_CPUID, exits.REASON_HLT]
