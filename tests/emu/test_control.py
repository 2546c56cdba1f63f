"""emu/cpu/control.py, segments.py, portio.py: what changes mode and privilege, and what privilege forbids."""

import struct

from tests.emu.bare_machine import (
    CODE,
    GDT,
    IDT,
    KCODE,
    KDATA,
    RSP0,
    STACK,
    TSS,
    TSS_SEL,
    UCODE,
    UDATA,
    USER,
    USER_STACK,
)
from tests.emu.handlers import H, fault, frame, machine

RF = 1 << 16


def test_segment_load_faults_name_the_selector():
    m = machine()
    assert fault(m, "mov eax, 0x58; mov ds, ax")[0] == 0x58


def test_user_code_may_load_segments_from_a_supervisor_gdt():
    m = machine()
    at = m.put(USER, "mov eax, 0x23; mov ds, ax; mov es, ax; mov rcx, 0x5000")
    m.put(at, "mov rax, [rcx]")
    m.enter_user()
    e = m.run()
    assert e.rip == H
    assert frame(m)[:2] == (5, at)
    assert m.reg("cr2") == GDT


def test_syscall_and_sysret():
    m = machine()
    v = m.vcpus[0]
    m.cpu.set_msr(v, 0xC0000081, KCODE << 32 | (UDATA - 8) << 48)
    m.cpu.set_msr(v, 0xC0000082, H + 0x100)
    m.cpu.set_msr(v, 0xC0000084, 0x47700 | 0x8D5)
    end = m.put(H + 0x100, "mov r15, rcx; mov r14, r11; pushfq; pop r13; mov r12, cs; mov r10, ss")
    m.ram.write(end, b"\x48\x0f\x07")
    m.put(USER, "mov eax, 1; cmp eax, 1; syscall; mov r9, cs; mov r8, ss; pushfq; pop rbx; ud2")
    m.enter_user(rflags=0x202)
    m.run()
    assert m.reg("r15") == USER + 10
    assert m.reg("r14") == 0x246
    assert m.reg("r13") == 2
    assert (m.reg("r12"), m.reg("r10")) == (KCODE, KDATA)
    assert (m.reg("r9"), m.reg("r8")) == (UCODE, UDATA)
    assert m.reg("rbx") == 0x246


def test_syscall_without_sce_is_undefined():
    m = machine()
    m.cpu.set_msr(m.vcpus[0], 0xC0000080, 0x500)
    assert fault(m, "syscall", error=False)[1] == CODE


def test_sysenter_enters_the_kernel():
    m = machine()
    for index, value in ((0x174, KCODE), (0x175, 0x70000), (0x176, H)):
        m.cpu.set_msr(m.vcpus[0], index, value)
    m.put(USER, "sysenter")
    m.enter_user(rflags=0x202)
    e = m.run()
    assert (e.rip, m.reg("rsp"), m.reg("cpl"), m.reg("rflags") & 0x200) == (H, 0x70000, 0, 0)


def test_iopl_and_the_io_bitmap_guard_ports():
    m = machine()
    m.put(USER, "nop; out 0x80, al")
    m.enter_user()
    m.run()
    assert frame(m)[:2] == (0, USER + 1)
    m = machine()
    m.put(USER, "out 0x80, al; ud2")
    m.enter_user(rflags=0x3002)
    m.run()
    assert m.out == [(0x80, 1, 0)]
    m = machine()
    m.cpu.vcpu(m.vcpus[0]).env.set_table(352, TSS_SEL, TSS, 0x88, 0x8B00)
    m.ram.write(TSS + 0x66, struct.pack("<H", 0x68))
    m.ram.write(TSS + 0x68, b"\xff" * 16 + b"\xfe" + b"\xff" * 8)
    m.put(USER, "out 0x80, al; out 0x81, al")
    m.enter_user()
    m.run()
    assert m.out == [(0x80, 1, 0)]
    assert frame(m)[:2] == (0, USER + 2)


def test_privileged_instructions_at_cpl3_are_gp_not_exits():
    codes = ("hlt", "rdmsr", "wrmsr", "invlpg [rax]", "mov rax, cr0", "mov cr4, rax", "clts",
             "lgdt [rax]", "cli")
    for code in codes:
        m = machine()
        m.put(USER, code)
        m.enter_user()
        e = m.run()
        assert e.rip == H, code
        assert frame(m)[:2] == (0, USER), code


def protected_machine():
    """32-bit code without paging: GDT, 8-byte gates, a TSS with SS0:ESP0."""
    m = machine()
    v = m.cpu.vcpu(m.vcpus[0])
    m.q(GDT + 0x18, 0x00CF9B000000FFFF)
    m.q(GDT + 0x38, 0x00CFFB000000FFFF)
    v.start_protected(CODE, GDT, 0x3F, 0x18, KDATA)
    v.env.set_table(400, 0, IDT, 0x7FF, 0)
    v.env.set_table(352, TSS_SEL, TSS, 0x67, 0x8B00)
    m.ram.write(TSS + 4, struct.pack("<II", RSP0, KDATA))
    m.ram.write(IDT, bytes(0x800))
    for vector in (6, 13, 0x80):
        kind = 0xEE if vector == 0x80 else 0x8E
        m.q(IDT + 8 * vector, H & 0xFFFF | 0x18 << 16 | kind << 40 | (H >> 16) << 48)
    m.set(rsp=STACK)
    return m


def test_protected_mode_gates_at_the_same_privilege():
    m = protected_machine()
    m.put(CODE, "nop; ud2", bits=32)
    assert m.run().rip == H
    assert struct.unpack("<3I", m.ram.read(m.reg("rsp"), 12)) == (CODE + 1, 0x18, 2 | RF)
    m = protected_machine()
    m.put(CODE, "mov eax, 0x58; mov ds, ax", bits=32)
    m.run()
    assert struct.unpack("<4I", m.ram.read(m.reg("rsp"), 16)) == (0x58, CODE + 5, 0x18, 2 | RF)


def test_protected_mode_gates_to_an_inner_privilege():
    m = protected_machine()
    m.put(CODE, "push 0x23; push 0x38000; push 2; push 0x3b; push 0x20000; iretd", bits=32)
    m.put(USER, "int 0x80", bits=32)
    assert m.run().rip == H
    assert m.reg("rsp") == RSP0 - 20
    assert struct.unpack("<5I", m.ram.read(RSP0 - 20, 20)) == (USER + 2, 0x3B, 2, USER_STACK, 0x23)
    assert (m.reg("cpl"), m.reg("ss")) == (0, KDATA)
