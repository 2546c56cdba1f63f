"""emu/cpu/faults.py, vcpu.py: the CPU never runs instructions that are no longer there."""

import random
import time

import pytest

from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, NX, PML4, A, D, Machine, P, W, asm

FRAME = 0x50000
CALL = "mov rbx, 0x50000; call rbx"


@pytest.fixture
def m():
    return Machine()


def test_a_host_write_to_code_is_seen(m):
    m.put(FRAME, "mov eax, 1; ret")
    m.put(CODE, f"{CALL}; mov r8, rax; hlt; {CALL}; hlt")
    m.hlt()
    assert m.reg("r8") == 1
    m.ram.write(FRAME, asm("mov eax, 2; ret"))
    m.hlt()
    assert m.reg("rax") == 2


def test_the_guest_rewrites_its_code_again_and_again(m):
    m.put(FRAME, "mov eax, 0; ret")
    m.put(CODE, f"xor ecx, ecx; xor edx, edx; l: mov r9, {FRAME + 1}; mov [r9], ecx; {CALL}; "
        f"add edx, eax; inc ecx; cmp ecx, 200; jb l; hlt")
    m.hlt()
    assert m.reg("rdx") == sum(range(200))


def test_through_an_alias_too(m):
    for flags in (P | W, P | W | NX):
        m = Machine()
        m.cpu.set_msr(m.vcpus[0], 0xC0000080, 0xD01)
        m.pte(0x60000, flags, FRAME)
        m.put(FRAME, "mov eax, 0; ret")
        m.put(CODE, f"xor ecx, ecx; xor edx, edx; l: mov r9, 0x60001; mov [r9], ecx; {CALL}; "
            f"add edx, eax; inc ecx; cmp ecx, 100; jb l; hlt")
        m.hlt()
        assert m.reg("rdx") == sum(range(100))


def test_code_that_writes_its_own_page_makes_progress(m):
    m.put(CODE, "xor ecx, ecx; mov rbx, 0x10800; l: mov [rbx], rcx; add rbx, 8; inc ecx; cmp ecx, 200; "
        "jb l; mov rax, [0x10808]; hlt")
    m.hlt()
    assert m.reg("rcx") == 200
    assert m.q(0x10800 + 8 * 199) == 199


def test_code_that_writes_its_own_frame_through_a_non_executable_alias(m):
    m.cpu.set_msr(m.vcpus[0], 0xC0000080, 0xD01)
    m.pte(0x60000, P | W | NX, CODE)
    m.put(CODE, "xor ecx, ecx; mov rbx, 0x60800; l: mov [rbx], rcx; add rbx, 8; inc ecx; cmp ecx, 50; "
        "jb l; hlt")
    m.hlt()
    assert m.q(0x10800 + 8 * 49) == 49


def test_an_instruction_that_changes_the_next_one(m):
    at = m.put(CODE, "mov r9, 0x10020; mov dword ptr [r9], 0x90c0ff41; jmp r9")
    assert at <= 0x10020
    m.put(0x10020, "ud2; nop; nop; hlt")
    m.hlt()
    assert m.reg("r8") == 1


def test_random_rounds_of_writes_and_calls_by_alias_and_name(m):
    rng = random.Random(5)
    m.pte(0x60000, P | W, FRAME)
    m.pte(0x61000, P | W, FRAME)
    names = (FRAME, 0x60000, 0x61000)
    lines, expected = ["xor r15, r15"], 0
    slots = [0, 0, 0, 0]
    for n in range(4):
        m.put(FRAME + 16 * n, "mov eax, 0; ret")
    for _ in range(150):
        n = rng.randrange(4)
        if rng.random() < 0.4:
            slots[n] = rng.randrange(1000)
            lines.append(f"mov rbx, {rng.choice(names) + 16 * n + 1}; mov dword ptr [rbx], {slots[n]}")
        else:
            lines.append(f"mov rbx, {rng.choice(names) + 16 * n}; call rbx; add r15, rax")
            expected += slots[n]
    m.put(CODE, "; ".join(lines) + "; hlt")
    m.hlt()
    assert m.reg("r15") == expected


def test_the_running_page_migrates_under_the_guest():
    m = Machine(ept=True)
    m.put(CODE, "l: inc rcx; mov eax, 1; out 0x80, al; jmp l")
    for n in range(6):
        e = m.step()
        assert e.reason == exits.REASON_IO_INSTRUCTION
        old = m.ept_set(CODE) & ~0xFFF & (1 << 46) - 1
        new = 0xB00000 + 0x1000 * n
        m.ram.copy_page(new >> 12, old >> 12)
        m.ept_set(CODE, hpa=new)
        m.ram.poison_page(old >> 12)
        m.cpu.flush_tlb(m.vcpus[0])
        m.cpu.skip_emulated_instruction(m.vcpus[0], e.insn_len)
    assert m.reg("rcx") == 6


def test_without_the_flush_the_guest_runs_on_in_the_old_frame():
    m = Machine(ept=True)
    m.put(CODE, "l: inc rcx; out 0x80, al; jmp l")
    e = m.step()
    new = 0xB00000
    m.ram.write(new, asm("l: dec rcx; out 0x80, al; jmp l", CODE))
    m.ept_set(CODE, hpa=new)
    for _ in range(2):
        m.cpu.skip_emulated_instruction(m.vcpus[0], e.insn_len)
        m.step()
    assert m.reg("rcx") == 3
    m.cpu.flush_tlb(m.vcpus[0])
    m.cpu.skip_emulated_instruction(m.vcpus[0], e.insn_len)
    m.step()
    assert m.reg("rcx") == 2


def test_another_vcpu_sees_rewritten_code():
    m = Machine(vcpus=2)
    m.put(FRAME, "mov eax, 1; ret")
    m.put(CODE, f"l: {CALL}; hlt; jmp l")
    m.put(0x12000, f"mov r9, {FRAME + 1}; l: inc dword ptr [r9]; hlt; jmp l")
    m.set(1, rip=0x12000)
    for n in range(1, 12):
        m.hlt(0)
        assert m.reg("rax") == n
        m.hlt(1)


def test_two_vcpus_interleave_locked_increments():
    m = Machine(vcpus=2)
    m.cpu.slice_insns = 777
    m.put(CODE, "mov rcx, 30000; mov rbx, 0x300000; l: lock inc qword ptr [rbx]; dec rcx; jnz l; hlt")
    done = []

    def body(n):
        done.append(m.cpu.vcpu_run(m.vcpus[n]).reason)

    tasks = [m.sched.spawn(f"vcpu{n}", lambda n=n: body(n)) for n in range(2)]
    m.sched.run_until(lambda: all(t.done for t in tasks))
    assert done == [exits.REASON_HLT] * 2
    assert m.q(0x300000) == 60000


def test_a_stale_translation_is_really_used_until_invlpg(m):
    m.q(0x301000, 11)
    m.q(0x302000, 22)
    m.pte(0x70000, P | W, 0x301000)
    m.put(CODE, f"mov rbx, 0x70000; mov rax, [rbx]; mov rcx, {0x4000 + 8 * 0x70}; mov rdx, 0x302003; "
                "mov [rcx], rdx; mov r8, [rbx]; invlpg [rbx]; mov r9, [rbx]; hlt")
    m.hlt()
    assert (m.reg("rax"), m.reg("r8"), m.reg("r9")) == (11, 11, 22)


def test_invlpg_of_a_large_page_drops_all_of_it(m):
    m.q(0x600008, 1)
    m.q(0x601008, 2)
    m.q(0x800008, 3)
    m.q(0x801008, 4)
    m.put(CODE, f"mov rbx, 0x600008; mov rax, [rbx]; mov rcx, [rbx + 0x1000]; mov rdx, {0x3000 + 8 * 3}; "
                "mov qword ptr [rdx], 0x800083; invlpg [rbx]; mov r8, [rbx]; mov r9, [rbx + 0x1000]; hlt")
    m.hlt()
    assert (m.reg("rax"), m.reg("rcx"), m.reg("r8"), m.reg("r9")) == (1, 2, 3, 4)


def test_accessed_and_dirty_bits_are_the_walks(m):
    m.pte(0x70000, P | W)
    m.put(CODE, "mov rbx, 0x70000; mov rax, [rbx]; hlt; mov [rbx], rax; hlt")
    m.hlt()
    assert m.pte(0x70000) & (A | D) == A
    m.hlt()
    assert m.pte(0x70000) & (A | D) == A | D


PROGRAM = (
    "xor r15, r15; mov rbx, 0x200000; l: mov [rbx], r15; add r15, [rbx]; add rbx, 0x1000; "
        "cmp rbx, 0xb00000; jb l;"
    "rdtsc; mov r14, rax; out 0x80, al; mov rbx, 0x200000; inc r13; cmp r13, 60; jb l; hlt"
)


def run_program(sleep):
    m = Machine(ept=True)
    m.put(CODE, PROGRAM)
    seen = []
    while True:
        e = m.step()
        seen.append((e.reason, e.rip, e.qualification, m.sched.now, m.reg("r14"), m.reg("rcx")))
        if e.reason == exits.REASON_HLT:
            return seen
        if sleep and len(seen) % 6 == 0:
            time.sleep(0.06)
        m.cpu.skip_emulated_instruction(m.vcpus[0], e.insn_len)


def test_runs_are_the_same_when_the_host_stalls():
    assert run_program(False) == run_program(True) == run_program(False)


def test_interpreted_runs_are_the_same_as_compiled_ones():
    results = []
    for interpreted in (False, True):
        m = Machine(ept=True, interpreted=interpreted)
        m.put(CODE, PROGRAM.replace("60", "2"))
        m.hlt()
        results.append([(e.reason, e.rip) for e in m.exits] + [m.sched.now, m.reg("r15")])
    assert results[0] == results[1]


def test_guest_cr3_switches_are_exact(m):
    m.q(0x8000, 0x2003)
    m.put(CODE, f"mov rax, 0x8000; mov cr3, rax; mov rbx, cr3; mov rax, {PML4}; mov cr3, rax; hlt")
    m.hlt()
    assert m.reg("rbx") == 0x8000
