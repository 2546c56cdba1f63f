"""emu/cpu/intercept.py: every intercepted instruction stops before it did anything."""

import pytest

from emu.cpu import intercept
from emu.cpu.vcpu import EMU_EXCEPTION
from tests.emu.bare_machine import CODE, Machine

CASES = [
    ("cpuid", intercept.STOP_CPUID), ("hlt", intercept.STOP_HLT), ("rdtsc", intercept.STOP_RDTSC),
    ("rdtscp", intercept.STOP_RDTSC), ("rdpmc", intercept.STOP_RDPMC),
    ("invlpg [rax]", intercept.STOP_INVLPG), ("rdmsr", intercept.STOP_MSR), ("wrmsr", intercept.STOP_MSR),
    ("mov cr0, rax", intercept.STOP_WRITE_CR0), ("clts", intercept.STOP_WRITE_CR0),
    ("lmsw ax", intercept.STOP_WRITE_CR0),
    ("mov cr4, rax", intercept.STOP_WRITE_CR4), ("in al, dx", intercept.STOP_IN),
    ("in eax, 0x80", intercept.STOP_IN),
    ("out dx, al", intercept.STOP_OUT), ("out 0x80, eax", intercept.STOP_OUT), ("insb", intercept.STOP_IN),
    ("rep outsw", intercept.STOP_OUT), ("syscall", intercept.STOP_SYSCALL),
    ("sysenter", intercept.STOP_SYSENTER),
    ("int 0x42", 0x42), ("int3", 3),
]


@pytest.mark.parametrize(("code", "stop"), CASES)
def test_stops_before_the_instruction(code, stop):
    m = Machine()
    v = m.cpu.vcpu(m.vcpus[0])
    at = m.put(CODE, "mov rsi, 0x300000; mov rdi, 0x300000; mov rcx, 3; nop; cmp rcx, 3")
    m.put(at, code)
    v.fill.mark_code(CODE, CODE >> 12)
    regs = {"rax": 0x1234, "rbx": 0x5678, "rdx": 0x80}
    m.set(**regs)
    assert v.emu_start() == EMU_EXCEPTION
    assert v.intercepts.stop_reason() == stop
    if stop >= intercept.EXCEPTION_LIMIT:
        assert v.env.eip == at
    assert {name: m.reg(name) for name in regs} == regs
    assert v.env.eflags & 0x40


def test_cr3_stops_only_when_asked():
    m = Machine()
    v = m.cpu.vcpu(m.vcpus[0])
    m.put(CODE, "mov rax, cr3; mov cr3, rax; mov cr3, rax; hlt")
    m.cpu.stops.ept = False
    v.intercepts.intercept_cr3(True)
    e = m.run()
    assert (e.reason, e.qualification, e.insn_len, e.rip) == (28, 0x13, 3, CODE)
    m.set(rip=CODE + 3, rax=m.reg("cr3"))
    e = m.run()
    assert (e.reason, e.qualification, e.insn_len, e.rip) == (28, 3, 3, CODE + 3)
    v.intercepts.intercept_cr3(False)
    assert m.run().reason == 12


def test_ports_carry_their_operands():
    m = Machine()
    v = m.cpu.vcpu(m.vcpus[0])
    m.put(CODE, "mov dx, 0x3f8; mov eax, 0x11223344; out dx, ax")
    v.fill.mark_code(CODE, CODE >> 12)
    v.emu_start()
    assert list(v.intercepts.io[intercept.STOP_OUT])[4:7] == [0x3F8, 2, 0x3344]
