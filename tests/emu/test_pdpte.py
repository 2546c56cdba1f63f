"""PAE, 32-bit and 5-level guests on the CPU: when PDPTEs are loaded, what control registers refuse."""

from __future__ import annotations

import pytest

from emu.cpu.env import GDT as ENV_GDT
from emu.cpu.env import IDT as ENV_IDT
from emu.cpu.intercept import STOP_WRITE_CR3
from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, GDT, KDATA, PS, STACK, Machine, P, W

DIRECTORY, POINTERS = 0x3000, 0x100020
OTHER = 0x101000
PAE, PSE, PGE, LA57 = 1 << 5, 1 << 4, 1 << 7, 1 << 12
CODE32 = 0x38


def protected(*, ept: bool = True, vcpus: int = 1) -> Machine:
    """32-bit protected mode at CODE, paging off; PDPTEs at POINTERS for the bare machine's own directory."""
    m = Machine(ept=ept, vcpus=vcpus)
    m.q(GDT + CODE32, 0x00CF9B000000FFFF)
    v = m.cpu.vcpu(m.vcpus[0])
    v.start_protected(CODE, GDT, 0x3F, CODE32, KDATA)
    v.env.set_table(ENV_GDT, 0, GDT, 0x3F, 0)
    v.env.set_table(ENV_IDT, 0, 0, 0, 0)
    v.env.set_reg(4, STACK)
    m.q(POINTERS, DIRECTORY | P)
    for n in (1, 2, 3):
        m.q(POINTERS + 8 * n, 0)
    return m


def to_hlt(m: Machine) -> None:
    """Run until the next HLT, and step over it."""
    e = m.run()
    assert e.reason == exits.REASON_HLT, e
    m.cpu.skip_emulated_instruction(m.vcpus[0], e.insn_len)


ON = f"mov eax, {PAE}; mov cr4, eax; mov eax, {POINTERS:#x}; mov cr3, eax; mov eax, 0x80000031; mov cr0, eax;"


@pytest.mark.parametrize("ept", [False, True])
def test_pdptes_are_read_when_paging_is_turned_on_and_at_mov_to_cr3_and_not_in_between(ept: bool) -> None:
    m = protected(ept=ept)
    m.put(CODE, f"""{ON}
        mov dword ptr [{POINTERS + 8:#x}], {DIRECTORY | P}
        hlt
        mov eax, {POINTERS:#x}
        mov cr3, eax
        mov edx, [0x40001000]
        hlt""", 32)
    m.q(0x1000, 0x5EED)
    to_hlt(m)
    assert [m.reg(f"pdptr{n}") for n in range(4)] == [DIRECTORY | P, 0, 0, 0]
    to_hlt(m)
    assert (m.reg("pdptr1"), m.reg("rdx")) == (DIRECTORY | P, 0x5EED)


@pytest.mark.parametrize("bit", [1, 5, 46, 63])
def test_a_reserved_bit_in_a_present_pdpte_is_a_general_protection_and_loads_nothing(bit: int) -> None:
    m = protected()
    m.q(POINTERS + 16, 1 << bit)
    m.put(CODE, f"""{ON}
        hlt
        mov eax, {POINTERS:#x}
        mov cr3, eax
        hlt""", 32)
    to_hlt(m)
    m.q(POINTERS + 16, 1 << bit | P)
    e = m.run()
    assert e.reason == exits.REASON_TRIPLE_FAULT, "there is no IDT for the #GP"
    assert [m.reg(f"pdptr{n}") for n in (0, 2)] == [DIRECTORY | P, 1 << bit]


def test_an_ept_violation_of_the_load_has_no_linear_address_and_the_load_is_made_again() -> None:
    m = protected()
    m.put(CODE, f"{ON} hlt", 32)
    m.ept_set(POINTERS, rwx=0)
    e = m.step()
    assert (e.reason, e.qualification, e.guest_physical) == (exits.REASON_EPT_VIOLATION, 1, POINTERS)
    assert m.reg("cr0") >> 31 == 0
    m.ept_set(POINTERS, rwx=7)
    to_hlt(m)
    assert m.reg("pdptr0") == DIRECTORY | P


@pytest.mark.parametrize(("bits", "loads"), [(PGE, True), (PSE, True), (1 << 20, True), (1 << 9, False)])
def test_mov_to_cr4_loads_them_again_if_it_changes_how_pages_are_found(bits: int, loads: bool) -> None:
    m = protected()
    m.put(CODE, f"""{ON}
        mov dword ptr [{POINTERS + 8:#x}], {DIRECTORY | P}
        mov eax, {PAE | bits}
        mov cr4, eax
        hlt""", 32)
    to_hlt(m)
    assert m.reg("pdptr1") == (DIRECTORY | P if loads else 0)


def test_32_bit_paging_with_4m_pages_runs_and_flags_them() -> None:
    m = protected()
    m.put(CODE, f"""mov eax, {PSE}; mov cr4, eax; mov eax, {OTHER:#x}; mov cr3, eax
        mov eax, 0x80000031; mov cr0, eax
        mov edx, [0x401000]
        mov [0x401008], edx
        hlt""", 32)
    m.q(OTHER, (0 | P | W | PS) | (0 | P | W | PS) << 32)
    m.q(0x1000, 0x5EED)
    to_hlt(m)
    assert m.q(0x1008) & 0xFFFFFFFF == 0x5EED
    assert m.q(OTHER) >> 32 & 0x60 == 0x60


def test_a_vcpu_started_like_one_in_pae_paging_has_its_registers_and_loads_its_own() -> None:
    m = protected(vcpus=2)
    m.put(CODE, f"{ON} hlt", 32)
    to_hlt(m)
    m.q(POINTERS, 0)
    first, second = (m.cpu.vcpu(vcpu) for vcpu in m.vcpus)
    second.start_like(first, CODE + 0x100)
    m.q(OTHER, DIRECTORY | P)
    m.put(CODE + 0x100, f"mov edx, [0x1000]; mov eax, {OTHER:#x}; mov cr3, eax; mov edx, [0x1000]; hlt", 32)
    m.q(0x1000, 0x5EED)
    assert m.run(1).reason == exits.REASON_HLT
    assert (m.reg("rdx", 1), m.reg("cr3", 1), m.reg("cr3")) == (0x5EED, OTHER, POINTERS)


def test_mov_to_cr3_is_unicorns_own_outside_pae_paging() -> None:
    m = Machine(ept=True)
    m.put(CODE, "mov rax, cr3; mov cr3, rax; hlt")
    seen = []
    handle = m.cpu.stops.handle
    m.cpu.stops.handle = lambda v, reason: (seen.append(reason), handle(v, reason))[1]
    to_hlt(m)
    assert STOP_WRITE_CR3 not in seen


@pytest.mark.parametrize("change", ["bts rax, 12", "btr rax, 5"])
def test_the_paging_mode_of_long_mode_cannot_be_changed_in_it(change: str) -> None:
    m = Machine(ept=True)
    m.put(CODE, f"mov rax, cr4; {change}; mov cr4, rax; hlt")
    m.cpu.vcpu(m.vcpus[0]).env.set_table(ENV_IDT, 0, 0, 0, 0)
    cr4 = m.reg("cr4")
    assert m.run().reason == exits.REASON_TRIPLE_FAULT
    assert m.reg("cr4") == cr4


def test_a_guest_turns_5_level_paging_on_before_long_mode_and_reaches_57_bits() -> None:
    m = protected()
    pml5, high = 0x102000, 0x7F << 48
    m.q(pml5, 0x1000 | P | W)
    m.q(pml5 + 8 * 0x7F, 0x1000 | P | W)
    at = CODE + 0x80
    end = m.put(CODE, f"""mov eax, {PAE | LA57}; mov cr4, eax; mov eax, {pml5:#x}; mov cr3, eax
        mov ecx, 0xC0000080; mov eax, 0x100; xor edx, edx; wrmsr
        mov eax, 0x80000031; mov cr0, eax""", 32)
    m.ram.write(end, b"\xea" + at.to_bytes(4, "little") + b"\x08\x00")  # jmp far into 64-bit code
    m.put(at, f"mov rbx, {high + 0x1000:#x}; mov rdx, [rbx]; hlt; mov rbx, {1 << 56:#x}; mov rdx, [rbx]; hlt")
    to_hlt(m)
    assert m.reg("cr4") & LA57
    assert m.reg("rdx") == m.q(0x1000)
    assert m.run().reason == exits.REASON_TRIPLE_FAULT, "not canonical in 57 bits"
