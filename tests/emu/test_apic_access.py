"""emu/cpu/apic_access.py: what the virtual-APIC page answers, and how other accesses leave the guest."""

import pytest

from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, Machine

APIC, ACCESS, VIRTUAL = 0x700000, 0x500000, 0x600000
READ, WRITE, FETCH = 0, 1 << 12, 2 << 12


def apic_machine(code, **regs):
    """EPT shows the APIC-access page at APIC; the registers lie at VIRTUAL."""
    m = Machine(ept=True)
    m.ept_set(APIC, hpa=ACCESS)
    m.cpu.set_apic_pages(m.vcpus[0], ACCESS, VIRTUAL)
    m.ram.write(VIRTUAL + 0x80, (0x21).to_bytes(4, "little"))
    m.ram.write(VIRTUAL + 0x30, (0x50014).to_bytes(4, "little"))
    m.put(CODE, code + "; hlt")
    m.set(rbx=APIC, rax=0x55, **regs)
    return m


@pytest.mark.parametrize(
    ("code", "rax"),
    [
        ("mov eax, [rbx + 0x80]", 0x21), ("mov eax, [rbx + 0x30]", 0x50014),
        ("add eax, [rbx + 0x80]", 0x76),
    ],
)
def test_reads_of_registers_stay_in_the_guest(code, rax):
    m = apic_machine(code)
    assert m.step().reason == exits.REASON_HLT
    assert m.reg("rax") == rax


def test_a_store_to_the_task_priority_stays_in_the_guest_and_never_reaches_the_access_page():
    m = apic_machine("mov [rbx + 0x80], eax; inc dword ptr [rbx + 0x80]; mov ecx, [rbx + 0x80]")
    assert m.step().reason == exits.REASON_HLT
    assert m.reg("rcx") == 0x56
    assert m.ram.read(VIRTUAL + 0x80, 4) == (0x56).to_bytes(4, "little")
    assert m.ram.read(ACCESS, 4096) == bytes(4096)


@pytest.mark.parametrize(("code", "offset"), [
    ("mov [rbx + 0xf0], eax", 0xF0), ("or dword ptr [rbx + 0x380], eax", 0x380),
    ("mov dword ptr [rbx + 0x320], 7", 0x320),
])
def test_other_stores_leave_after_the_instruction(code, offset):
    m = apic_machine(code)
    e = m.step()
    assert (e.reason, e.qualification) == (exits.REASON_APIC_WRITE, offset)
    assert m.ram.read(VIRTUAL + offset, 4) != bytes(4)
    assert m.step().reason == exits.REASON_HLT


@pytest.mark.parametrize(
    ("code", "qualification"),
    [
        ("mov rax, [rbx + 0x80]", 0x80 | READ), ("mov al, [rbx + 0x80]", 0x80 | READ),
        ("mov eax, [rbx + 0x84]", 0x84 | READ), ("mov eax, [rbx + 0x40]", 0x40 | READ),
        ("mov [rbx + 0xb0], eax", 0xB0 | WRITE), ("mov [rbx + 0x30], eax", 0x30 | WRITE),
        ("mov [rbx + 0x82], eax", 0x82 | WRITE), ("inc dword ptr [rbx + 0x30]", 0x30 | WRITE),
        ("movups xmm0, [rbx + 0x80]", 0x80 | READ),
    ],
)
def test_the_rest_leaves_before_the_instruction(code, qualification):
    m = apic_machine("nop; " + code)
    e = m.step()
    assert (e.reason, e.qualification, e.rip) == (exits.REASON_APIC_ACCESS, qualification, CODE + 1)
    assert m.reg("rax") == 0x55
    assert m.ram.read(VIRTUAL + 0x80, 1) == b"\x21"


def test_a_fetch_leaves_as_one():
    m = apic_machine("jmp rbx")
    e = m.step()
    assert (e.reason, e.qualification, e.rip) == (exits.REASON_APIC_ACCESS, FETCH, APIC)


def test_another_frame_at_the_same_address_is_memory():
    m = apic_machine("mov [rbx + 0x80], eax; mov ecx, [rbx + 0x80]")
    m.ept_set(APIC, hpa=0x520000)
    assert m.step().reason == exits.REASON_HLT
    assert m.reg("rcx") == 0x55
    assert m.ram.read(0x520080, 1) == b"\x55"


def test_the_compiled_and_the_interpreted_fill_agree():
    for interpreted in (False, True):
        m = Machine(ept=True, interpreted=interpreted)
        m.cpu.set_apic_pages(m.vcpus[0], APIC, VIRTUAL)
        m.put(CODE, "mov eax, [rbx + 0x40]; hlt")
        m.set(rbx=APIC)
        assert m.step().reason == exits.REASON_APIC_ACCESS
