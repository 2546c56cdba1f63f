"""emu/cpu/shadow_walk.py, cr_exits.py: a CPU whose guest runs on tables of KVM's."""

from __future__ import annotations

import random

import pytest

from emu.cpu import paging as paging_bits
from emu.cpu.compile import native
from emu.cpu.shadow_walk import walk_shadow
from emu.cpu.walk import (
    ACCESS_AC,
    ACCESS_FETCH,
    ACCESS_READ,
    ACCESS_USER,
    ACCESS_WRITE,
    NON_CANONICAL,
    OK,
    OUTSIDE_RAM,
    PAGE_FAULT,
    RIGHT_R,
    RIGHT_W,
    RIGHT_X,
)
from host_mm.ram import Ram
from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, IDT, NX, PT, STACK, USER, P, W
from tests.emu.shadow_machine import ShadowMachine

FRAMES = 64
FULL = 0x67
PG, WP = paging_bits.CR0_PG, paging_bits.CR0_WP
LONG = paging_bits.EFER_LME | paging_bits.EFER_LMA


def shadow(ram: Ram, access: int, *, cr0: int = PG, cr4: int = 0, efer: int = LONG, gva: int = 0x123,
           root: int = 0x1000, pdpte: int = 0) -> tuple[int, ...]:
    """The walk's result, after its compiled form agreed on it and on memory."""
    copy = Ram(FRAMES)
    copy.b[:] = ram.b
    result = walk_shadow(ram.i64, FRAMES, cr0, cr4, efer, root, pdpte, gva, access)
    code = native()
    memory = code.memory(copy.i64)
    assert code.walk_shadow(memory, FRAMES, cr0, cr4, efer, root, pdpte, gva, access) == result
    assert copy.b == ram.b
    return result


@pytest.fixture
def ram() -> Ram:
    """Address 0 mapped to frame 5 by 4 levels, from frame 1 on."""
    ram = Ram(FRAMES)
    for table in (1, 2, 3, 4):
        ram.i64[table * 512] = (table + 1) << 12 | FULL
    return ram


def test_four_levels_of_the_root_translate(ram: Ram) -> None:
    assert shadow(ram, ACCESS_READ) == (OK, 0x5123, RIGHT_R | RIGHT_W | RIGHT_X, 0, 1, 0)


def test_below_a_guest_with_la57_the_root_has_five(ram: Ram) -> None:
    ram.i64[10 * 512 + 1] = 1 << 12 | FULL
    la57 = paging_bits.CR4_LA57
    assert shadow(ram, ACCESS_READ, cr4=la57, root=0xA000, gva=1 << 48 | 0x123)[:2] == (OK, 0x5123)
    assert shadow(ram, ACCESS_READ, cr4=la57, root=0xA000, gva=0x123)[0::5] == (PAGE_FAULT, 5)
    assert shadow(ram, ACCESS_READ, cr4=la57, root=0xA000, gva=1 << 56)[0] == NON_CANONICAL
    assert shadow(ram, ACCESS_READ, cr4=la57, efer=0, pdpte=0x3001)[:2] == (OK, 0x5123), "only in IA-32e mode"


def test_a_guest_without_write_protection_cannot_write_what_the_root_protects(ram: Ram) -> None:
    ram.i64[4 * 512] &= ~2
    for cr0 in (PG, PG | WP):
        assert shadow(ram, ACCESS_WRITE, cr0=cr0)[:4] == (PAGE_FAULT, 0, 0, 3)


def test_execute_disable_holds_for_a_guest_that_has_it_off(ram: Ram) -> None:
    ram.i64[4 * 512] |= -1 << 63
    assert shadow(ram, ACCESS_FETCH)[:4] == (PAGE_FAULT, 0, 0, 0x11)


def test_smep_and_smap_are_off_below_a_guest_without_paging(ram: Ram) -> None:
    cr4 = paging_bits.CR4_SMEP | paging_bits.CR4_SMAP
    assert shadow(ram, ACCESS_READ, cr4=cr4)[0] == PAGE_FAULT
    assert shadow(ram, ACCESS_READ | ACCESS_AC, cr4=cr4)[0] == OK
    assert shadow(ram, ACCESS_FETCH, cr4=cr4)[0] == PAGE_FAULT
    for access in (ACCESS_READ, ACCESS_FETCH):
        assert shadow(ram, access, cr4=cr4, cr0=0)[0] == OK


def test_an_mmio_entry_is_a_reserved_fault(ram: Ram) -> None:
    ram.i64[4 * 512] = 1 << 51 | 7
    assert shadow(ram, ACCESS_WRITE | ACCESS_USER)[:4] == (PAGE_FAULT, 0, 0, 0xF)


def test_pae_has_four_registers_and_two_tables(ram: Ram) -> None:
    gva = 0xC0000000 | 5 << 12
    ram.i64[6 * 512] = 7 << 12 | FULL
    ram.i64[7 * 512 + 5] = 9 << 12 | FULL
    result = shadow(ram, ACCESS_WRITE, efer=0, gva=gva, pdpte=6 << 12 | 1)
    assert result == (OK, 0x9000, RIGHT_R | RIGHT_W | RIGHT_X, 0, 1, 0)
    assert shadow(ram, ACCESS_READ, efer=0, gva=gva)[:6] == (PAGE_FAULT, 0, 0, 0, 0x1018, 3)
    ram.i64[7 * 512 + 5] |= 1 << 55
    assert shadow(ram, ACCESS_READ, efer=0, gva=gva, pdpte=6 << 12 | 1)[3] == 9


def test_only_four_levels_know_canonical_addresses(ram: Ram) -> None:
    assert shadow(ram, ACCESS_READ, gva=1 << 50)[0] == NON_CANONICAL
    assert shadow(ram, ACCESS_READ, gva=1 << 50, efer=0, pdpte=3 << 12 | 1)[0] == OK


def test_a_leaf_beyond_ram_is_told(ram: Ram) -> None:
    ram.i64[4 * 512] = FRAMES << 12 | FULL
    assert shadow(ram, ACCESS_READ)[:3] == (OUTSIDE_RAM, FRAMES << 12 | 0x123, 0)


def test_random_tables_have_equal_results_in_both_forms(ram: Ram) -> None:
    rng = random.Random(7)
    seen = set()
    for _ in range(3000):
        for table in (1, 2, 3, 4):
            entry = (table + 1) << 12 | FULL
            if rng.random() < 0.3:
                entry ^= 1 << rng.choice((0, 1, 2, 5, 6, 7, 11, 46, 51, 52))
            ram.i64[table * 512] = entry | (-1 << 63 if rng.random() < 0.2 else 0)
        access = rng.choice((0, ACCESS_WRITE, ACCESS_FETCH)) | rng.choice((0, ACCESS_USER, ACCESS_AC))
        result = shadow(
            ram, access, cr0=rng.choice((0, PG, PG | WP)), efer=rng.choice((LONG, 0)),
            cr4=rng.choice((0, paging_bits.CR4_SMEP, paging_bits.CR4_SMAP)),
            pdpte=rng.choice((0, 3 << 12 | 1)),
        )
        seen.add((result[0], result[3]))
    assert len(seen) > 8


# -- a guest on shadow tables -------------------------------------------------------------------


@pytest.fixture(params=(False, True), ids=("compiled", "interpreted"))
def m(request):
    machine = ShadowMachine(interpreted=request.param)
    yield machine
    machine.cpu.close()


def test_a_guest_runs_on_what_its_faults_brought(m):
    m.put(CODE, "mov rcx, 0x300000; mov rax, [rcx]; mov [rcx], rcx; mov [rcx + 8], rcx; hlt")
    m.hlt()
    assert m.q(0x300008) == 0x300000
    assert m.faults == [(CODE, 0x10), (0x300000, 0), (0x300000, 3)]


def test_a_read_modify_write_faults_as_a_write(m):
    m.put(CODE, "mov rcx, 0x300008; lock inc qword ptr [rcx]; hlt")
    m.hlt()
    assert m.faults[1:] == [(0x300008, 2)]


def test_the_guests_own_fault_is_injected_with_its_cr2(m):
    m.gate(14, 0x11000)
    m.put(0x11000, "mov r15, cr2; mov r14, [rsp]; hlt")
    m.pte(0x44000, 0)
    m.put(CODE, "mov rcx, 0x44123; mov [rcx], eax; hlt")
    m.hlt()
    assert (m.reg("r15"), m.reg("r14")) == (0x44123, 2)
    assert m.injected == [(0x44123, 2)]


def test_delivery_through_unmapped_tables_comes_back_with_the_event(m):
    m.gate(3, 0x11000)
    m.put(0x11000, "mov r15, [rsp]; hlt")
    m.put(CODE, "nop; int3; hlt")
    m.hlt()
    assert m.reg("r15") == CODE + 2
    assert [gva & ~0xFFF for gva, _ in m.faults] == [CODE, IDT, 0x5000, STACK - 0x1000, 0x11000]


def test_a_fault_during_delivery_leaves_before_it_is_a_double_fault(m):
    m.gate(14, 0x11000)
    m.put(CODE, "mov rcx, 0x44000; mov eax, [rcx]; hlt")
    m.pte(0x44000, 0)
    m.put(0x11000, "hlt")
    m.hlt()
    assert [gva for gva, _ in m.injected] == [0x44000]
    assert IDT + 14 * 16 in [gva for gva, _ in m.faults]


def test_a_user_access_of_a_supervisor_page_is_the_cpus_own_where_it_loads_a_selector(m):
    m.put(USER, "mov eax, 0x23; mov ds, eax; mov ecx, 0x21000; mov [rcx], eax; hlt")
    m.gate(13, 0x11000)
    m.put(0x11000, "hlt")
    m.enter_user()
    m.hlt()
    assert (0x21000, 6) in m.faults
    assert [code for gva, code in m.faults if gva >> 12 == 5] == [0]
    assert m.injected == []


def test_cr3_is_the_guests_to_see_and_kvms_to_set(m):
    m.put(CODE, "mov rdx, cr3; mov r9, cr3; mov cr3, r9; mov rax, cr3; hlt")
    m.hlt()
    assert m.reg("rax") == m.reg("rdx") == 0x1000
    accesses = [e for e in m.exits if e.reason == exits.REASON_CR_ACCESS]
    assert [e.qualification for e in accesses] == [0x213, 0x913, 0x903, 0x013]


@pytest.mark.parametrize(("code", "number"), [
    ("mov rax, cr0; bts rax, 3; mov cr0, rax", None), ("clts", None),
    ("mov rax, cr0; btr rax, 16; mov cr0, rax", 0), ("mov rax, cr4; btr rax, 9; mov cr4, rax", None),
    ("mov rax, cr4; bts rax, 7; mov cr4, rax", 4), ("mov eax, 0x39; lmsw ax", None),
    ("mov eax, 0x37; lmsw ax", 0x70030), ("mov rax, cr0; mov cr0, rax", None),
])
def test_a_control_register_exits_for_kvms_bits_only(m, code, number):
    m.put(CODE, code + "; hlt")
    m.hlt()
    accesses = [e.qualification for e in m.exits if e.reason == exits.REASON_CR_ACCESS]
    assert accesses == ([] if number is None else [number])


def test_invlpg_exits_with_its_address(m):
    m.put(CODE, "mov ecx, 0x300000; mov eax, [rcx]; invlpg [rcx + 0x10]; mov eax, [rcx]; hlt")
    m.hlt()
    assert m.invalidated == [0x300010]
    assert [gva for gva, _ in m.faults].count(0x300000) == 2


def test_an_old_translation_lives_until_the_guest_gives_it_up(m):
    m.q(0x301000, 0x1111)
    m.q(0x302000, 0x2222)
    frame = 0x48000
    m.pte(frame, P | W, 0x301000)
    m.put(CODE, f"mov ecx, {frame}; mov rax, [rcx]; mov edx, {PT + 8 * (frame >> 12)};"
          "mov ebx, 0x302003; mov [rdx], rbx; mov r8, [rcx]; invlpg [rcx]; mov r9, [rcx]; hlt")
    m.hlt()
    assert (m.reg("r8"), m.reg("r9")) == (0x1111, 0x2222)


def test_a_page_that_is_not_for_execution_faults_at_the_jump(m):
    m.gate(14, 0x11000)
    m.put(0x11000, "mov r15, cr2; mov r14, [rsp]; hlt")
    m.pte(0x50000, P | W | NX)
    m.put(CODE, "mov ecx, 0x50000; jmp rcx")
    m.hlt()
    assert (m.reg("r15"), m.reg("r14")) == (0x50000, 0x11)


def test_a_guest_without_paging_runs_on_a_pae_root(m):
    v = m.cpu.vcpu(m.vcpus[0])
    v.start_protected(CODE, 0x5000, 0x3F, 0x18, 0x10)
    m.q(0x5018, 0x00CF9B000000FFFF)
    m.new_root()
    m.put(CODE, "mov ecx, 0x300000; mov eax, 0x1234; mov [ecx], eax; hlt", bits=32)
    m.hlt()
    assert m.q(0x300000) == 0x1234
    assert m.faults == [(CODE, 0x10), (0x300000, 2)]


def test_a_string_from_a_port_waits_for_the_page_it_goes_to(m):
    m.put(CODE, "mov dx, 0x3f8; mov edi, 0x300000; mov ecx, 2; rep insb; hlt")
    m.inputs = [0x41, 0x42]
    m.hlt()
    assert m.ram.read(0x300000, 2) == b"AB"
    assert (0x300000, 2) in m.faults


def test_a_string_from_a_port_whose_target_goes_meanwhile_starts_anew_after_the_handler(m, monkeypatch):
    m.gate(14, 0x11000)
    m.put(0x11000, "mov dword ptr [rbx], 0x44003; add rsp, 8; iretq")
    m.put(CODE, f"mov ebx, {PT + 8 * 0x44}; mov dx, 0x3f8; mov edi, 0x44000; mov ecx, 1; rep insb; hlt")
    m.inputs = [0x41, 0x42]
    serve, served = m._io, []

    def io(e, vcpu):
        if not served:
            m.pte(0x44000, 0)
            m.zap(0x44000)
        served.append(e.rip)
        serve(e, vcpu)

    monkeypatch.setattr(m, "_io", io)
    m.hlt()
    assert m.ram.read(0x44000, 1) == b"B"
    assert m.injected == [(0x44000, 2)]
    assert len(served) == 2
