"""emu/cpu/mmio.py, alu.py: instructions on device memory, compared with the same on RAM."""

import random

import pytest

from emu.cpu.env import CR
from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, Machine

DEVICE, RAM = 0x700000, 0x500000
REGS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rflags", "rip")
STATUS = 0x8D5
VALUE = 0x8899AABBCCDDEEFF


def device_machine():
    """EPT whose DEVICE page is misconfigured as KVM's MMIO SPTEs are; a bytearray stands behind it."""
    m = Machine(ept=True)
    m.ept_set(DEVICE, 6)
    return m, bytearray(VALUE.to_bytes(8, "little") * 512)


def serve(m, device, limit=100):
    """Emulate until HLT; the list of device accesses (write, offset, size, data)."""
    kvm, log = m.vcpus[0], []
    for _ in range(limit):
        e = m.step()
        if e.reason == exits.REASON_HLT:
            return log
        assert e.reason == exits.REASON_EPT_MISCONFIG, e
        access = m.cpu.emulate(kvm, e.guest_physical)
        assert access is not None
        while access is not None:
            at = e.guest_physical & 0xFFF
            if access.write:
                data = access.data & (1 << 8 * access.length) - 1
                device[at : at + access.length] = data.to_bytes(access.length, "little")
                log.append((True, at, access.length, data))
                access = m.cpu.complete_mmio(kvm, access, 0)
            else:
                data = int.from_bytes(device[at : at + access.length], "little")
                log.append((False, at, access.length, data))
                access = m.cpu.complete_mmio(kvm, access, data)
    raise AssertionError("no HLT")


SIZES = {
    1: ("byte", "al", "cl"), 2: ("word", "ax", "cx"), 4: ("dword", "eax", "ecx"), 8: ("qword", "rax", "rcx"),
}
ALU = ("add", "adc", "sub", "sbb", "and", "or", "xor", "cmp")
POINTERS = ("byte", "word", "dword", "qword")
FORMS = [
    f"{op} {ptr} ptr [rbx + 16], {c}"
    for op in ("mov", *ALU, "test", "xchg", "xadd", "cmpxchg")
    for ptr, _, c in SIZES.values()
] + [
    f"{op} {c}, {ptr} ptr [rbx + rdx*2 + 8]"
    for op in ("mov", "add", "adc", "sub", "sbb", "and", "or", "xor", "cmp", "xchg")
    for ptr, _, c in SIZES.values()
] + [
    f"{op} {ptr} ptr [rbx + 24], {imm}"
    for op in ("mov", "add", "adc", "sub", "sbb", "and", "or", "xor", "cmp", "test")
    for ptr in ("byte", "word", "dword", "qword")
    for imm in (1, 0x7F)
] + [
    f"{op} {ptr} ptr [rbx]" for op in ("inc", "dec", "neg", "not") for ptr in POINTERS
] + [
    "movzx eax, byte ptr [rbx]", "movzx rax, word ptr [rbx]", "movzx ax, byte ptr [rbx]",
    "movsx eax, byte ptr [rbx]",
    "movsx rax, byte ptr [rbx + 1]", "movsx rax, word ptr [rbx]", "movsxd rax, dword ptr [rbx]",
    "mov ah, [rbx]",
    "mov [rbx], ah", "add [rbx], ch", "mov r8, [rbx]; mov rax, r8", "lock add qword ptr [rbx], rcx",
    "mov dword ptr [rbx], 0x80000000; mov qword ptr [rbx], -2", "mov rdi, rbx; stosb", "mov rdi, rbx; stosw",
    "mov rdi, rbx; stosd", "mov rdi, rbx; stosq", "mov rdi, rbx; mov ecx, 5; rep stosd",
    "std; lea rdi, [rbx + 64]; mov ecx, 3; rep stosq; cld", "mov rsi, rbx; lodsb", "mov rsi, rbx; lodsd; "
        "lodsw",
    "mov rsi, rbx; mov rdi, 0x300000; movsb; movsw; .byte 0xa5; movsq", "mov rsi, 0x300000; mov rdi, rbx; "
        "mov ecx, 7; rep movsb",
    "mov rsi, rbx; mov rdi, 0x300000; mov ecx, 4; rep movsq; mov rax, [0x300008]",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_device_behaves_as_memory_does(form):
    rng = random.Random(form)
    regs = {"rax": rng.getrandbits(64), "rcx": rng.getrandbits(64), "rdx": rng.randrange(16)}
    if rng.random() < 0.5:
        regs["rax"] = VALUE
    flags = 2 | rng.getrandbits(12) & STATUS
    results = []
    for base in (RAM, DEVICE):
        m, device = device_machine()
        m.put(CODE, f"{form}; hlt")
        m.ram.write(RAM, bytes(device))
        m.ram.write(0x300000, bytes(range(64)))
        m.set(rbx=base, rflags=flags, **regs)
        log = serve(m, device)
        content = m.ram.read(RAM, 4096) if base == RAM else bytes(device)
        state = [m.reg(r) for r in REGS]
        state = [value - base if base <= value < base + 4096 else value for value in state]
        if base == DEVICE:
            assert log
        if form.startswith("cmpxchg dword"):
            state[0] &= 0xFFFFFFFF  # Unicorn clears the upper half of RAX also where nothing is loaded
        if "and" in form or "or " in form or "xor" in form or "test" in form:
            state[6] &= ~0x10
        results.append((state, content, m.ram.read(0x300000, 64)))
    assert results[0] == results[1]


def test_a_read_modify_write_is_a_load_and_a_store():
    m, device = device_machine()
    m.put(CODE, "add dword ptr [rbx + 4], 1; hlt")
    m.set(rbx=DEVICE)
    assert serve(m, device) == [(False, 4, 4, 0x8899AABB), (True, 4, 4, 0x8899AABC)]
    assert [e.reason for e in m.exits] == [exits.REASON_EPT_MISCONFIG, exits.REASON_HLT]



def test_a_move_from_a_device_to_absent_memory_faults_and_then_completes():
    m, device = device_machine()
    m.gate(14, 0x11000)
    m.put(0x11000, "push rax; mov rax, 0x300003; mov [0x4180], rax; pop rax; add rsp, 8; iretq")
    m.pte(0x30000, 0, 0)
    m.put(CODE, "mov rsi, rbx; mov rdi, 0x30000; movsq; hlt")
    m.set(rbx=DEVICE)
    serve(m, device)
    assert m.q(0x300000) == VALUE
    assert m.cpu.vcpu(m.vcpus[0]).env.q[CR // 8 + 2] == 0x30000


def test_what_is_not_known_is_refused():
    m, _ = device_machine()
    m.put(CODE, "movups xmm0, [rbx]; hlt")
    m.set(rbx=DEVICE)
    e = m.step()
    assert e.reason == exits.REASON_EPT_MISCONFIG
    assert m.cpu.emulate(m.vcpus[0], e.guest_physical) is None


@pytest.mark.parametrize(
    ("code", "rwx", "access", "gpa"),
    [
        ("mov rax, [rbx + 0x18]", 0, 1, DEVICE + 0x18),
        ("mov [rbx + 0x18], rax", 0, 2, DEVICE + 0x18),
        ("mov [rbx + 0x18], rax", 1, 2, DEVICE + 0x18),
        ("inc qword ptr [rbx + 0x18]", 0, 2, DEVICE + 0x18),
        ("inc qword ptr [rbx + 0x18]", 1, 2, DEVICE + 0x18),
        ("lock xadd [rbx + 0x18], rax", 0, 2, DEVICE + 0x18),
        ("mov rax, [rbx + 0xffc]", 0, 1, DEVICE + 0xFFC),
        ("mov rax, [rbx - 4]", 0, 1, DEVICE),
        ("jmp rbx", 0, 4, DEVICE),
        ("jmp rbx", 3, 4, DEVICE),
        ("mov rax, [rbx]", 4, 1, DEVICE),
    ],
)
def test_ept_violations_report_the_access_and_the_exact_address(code, rwx, access, gpa):
    m = Machine(ept=True)
    m.ept_set(DEVICE, rwx=rwx)
    m.put(CODE, "nop; " + code)
    m.set(rbx=DEVICE)
    e = m.step()
    assert e.reason == exits.REASON_EPT_VIOLATION
    assert e.qualification == access | rwx << 3 | 0x180
    assert (e.guest_physical, e.guest_linear) == (gpa, gpa)
    assert e.rip == (DEVICE if "jmp" in code else CODE + 1)
    assert e.idt_vectoring_info == 0


def test_a_guest_table_that_ept_refuses_is_reported_as_such():
    m = Machine(ept=True)
    m.put(CODE, "mov rax, [rbx]; hlt")
    m.set(rbx=0x7FF)
    m.ept_set(0x4000, rwx=0)
    e = m.step()
    assert e.qualification & 0x187 == 0x083 or e.qualification & 0x187 == 0x081
    assert e.guest_physical == 0x4000 + 8 * (e.guest_linear >> 12)


def first_access(code, **regs):
    """The access and its successor of an instruction whose operand crosses from RAM into DEVICE."""
    m, _ = device_machine()
    m.put(CODE, code + "; hlt")
    m.set(rbx=DEVICE - 4, rax=3, rcx=5, **regs)
    e = m.step()
    access = m.cpu.emulate(m.vcpus[0], e.guest_physical)
    assert access is not None
    return m, access


CROSSING = ((DEVICE - 4, 4), (DEVICE, 4))


@pytest.mark.parametrize(
    ("code", "writes"),
    [
        ("mov [rbx], rax", [True]), ("mov rax, [rbx]", [False]), ("add [rbx], rax", [False, True]),
        ("mov rdi, rbx; stosq", [True]), ("mov rsi, rbx; lodsq", [False]),
        ("mov rdi, rbx; mov rsi, 0x300000; movsq", [True]),
    ],
)
def test_an_operand_that_crosses_a_page_is_told_in_two_parts(code, writes):
    m, access = first_access(code)
    while access is not None:
        assert (access.write, access.parts) == (writes.pop(0), CROSSING)
        access = m.cpu.complete_mmio(m.vcpus[0], access, 0)
    assert not writes


@pytest.mark.parametrize(
    ("code", "locked"),
    [
        ("add dword ptr [rbx + 8], eax", False), ("lock add dword ptr [rbx + 8], eax", True),
        ("xchg dword ptr [rbx + 8], eax", True), ("lock cmpxchg dword ptr [rbx + 8], ecx", True),
        ("cmpxchg dword ptr [rbx + 8], ecx", False), ("lock inc dword ptr [rbx + 8]", True),
        ("lock xadd dword ptr [rbx + 8], ecx", True), ("mov dword ptr [rbx + 8], eax", False),
    ],
)
def test_a_locked_store_says_what_its_load_found(code, locked):
    m, access = first_access(code)
    if not access.write:
        access = m.cpu.complete_mmio(m.vcpus[0], access, 0x55)
    assert access.lock == locked
    if locked:
        assert access.old == 0x55
