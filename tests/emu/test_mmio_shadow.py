"""emu/cpu/mmio_shadow.py, mmio.py: what KVM emulates by linear addresses, against Unicorn's own execution."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
from unicorn import x86_const as x86

from emu.cpu import mmio
from emu.cpu.insn import Decoder
from tests.emu.bare_machine import CODE, M64, STACK, Machine, asm

DATA = 0x300000
TARGET = 0x12000
_CF, _PF, _AF, _ZF, _SF, _OF = 1, 4, 0x10, 0x40, 0x80, 0x800
_STATUS = _CF | _PF | _AF | _ZF | _SF | _OF
_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_UNDEFINED = {"shl": _AF | _OF, "shr": _AF | _OF, "sar": _AF | _OF, "rol": _OF, "ror": _OF,
              "bts": _OF | _SF | _AF | _PF, "btr": _OF | _SF | _AF | _PF, "btc": _OF | _SF | _AF | _PF,
              "and": _AF, "or": _AF, "xor": _AF}
CASES = (
    "push rax", "push r12", "push 0x1234", "push -2", "push qword ptr [rbx]", "pushfq",
    "pop qword ptr [rbx]", "pop qword ptr [rsp + 0x20]", "call rcx", "call qword ptr [rbx + 0x40]",
    "bts qword ptr [rbx], 5", "btr dword ptr [rbx], 9", "btc word ptr [rbx], 3",
    "lock bts qword ptr [rbx], rdx",
    "btr dword ptr [rbx + 0x40], esi", "btc word ptr [rbx + 0x40], si",
    "shl qword ptr [rbx], 3", "shl dword ptr [rbx], cl", "shr byte ptr [rbx], 1", "shr qword ptr [rbx], cl",
    "sar word ptr [rbx], 2", "sar qword ptr [rbx], cl", "rol dword ptr [rbx], 5", "ror qword ptr [rbx], cl",
    "ror byte ptr [rbx], 1",
    *(f"set{c} byte ptr [rbx]" for c in
      ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")),
    "cmpxchg8b qword ptr [rbx]", "lock cmpxchg16b xmmword ptr [rbx]",
    "movups [rbx + 1], xmm3", "movaps [rbx], xmm2", "movdqu [rbx + 5], xmm9", "movntdq [rbx], xmm1",
    "movq qword ptr [rbx], xmm4", "movd dword ptr [rbx], xmm5", "movnti [rbx], rdx", "movnti [rbx], esi",
    "mov [rbx], rdx", "mov byte ptr [rbx + 3], ah", "mov dword ptr [rbx], 0x12345678", "xchg [rbx], rdx",
    "lock xadd [rbx], esi", "lock cmpxchg [rbx], rdx", "lock and [rbx], rdx", "or dword ptr [rbx], 0x81",
    "neg qword ptr [rbx]", "not word ptr [rbx]", "inc byte ptr [rbx]", "stosq", "stosb", "movsq", "movsw",
)


def prepare(machine: Machine, rng: random.Random, source: str) -> None:
    """Random registers, flags and memory, the same for the same generator."""
    v = machine.cpu.vcpu(machine.vcpus[0])
    machine.put(CODE, source + "; hlt")
    machine.put(TARGET, "hlt")
    values = {name: rng.choice((rng.getrandbits(64), rng.getrandbits(7), M64)) for name in _NAMES}
    values.update({"rbx": DATA, "rsp": STACK - 0x100, "rdi": DATA + 0x80})
    values["rsi"] = DATA + rng.choice((8, 19, 0x33))
    if source == "call rcx":
        values["rcx"] = TARGET
    if "bt" in source and "rdx" in source:
        values["rdx"] = rng.choice((3, 64 * 5 + 7, -64 & M64))
    machine.set(rip=CODE, rflags=rng.getrandbits(12) & _STATUS | 2, **values)
    for register in range(16):
        v.uc.reg_write(x86.UC_X86_REG_XMM0 + register, rng.getrandbits(128))
    machine.ram.write(DATA - 0x100, rng.randbytes(0x300))
    machine.ram.write(STACK - 0x200, rng.randbytes(0x200))
    if "[rbx + 0x40]" in source and "call" in source:
        machine.q(DATA + 0x40, TARGET)
    if "cmpxchg" in source and rng.random() < 0.5:
        low = values["rax"]
        if "8b" in source:
            low = low & 0xFFFFFFFF | (values["rdx"] & 0xFFFFFFFF) << 32
        machine.q(DATA, low)
        machine.q(DATA + 8, values["rdx"])


def state(machine: Machine, ignore: int) -> tuple[Any, ...]:
    regs = tuple(machine.reg(name) for name in (*_NAMES, "rip"))
    memory = machine.ram.read(DATA - 0x100, 0x300), machine.ram.read(STACK - 0x200, 0x200)
    return regs, machine.reg("rflags") & _STATUS & ~ignore, memory


def emulate(machine: Machine, code: bytes) -> int:
    """Make the accesses that the emulator asks for, as KVM does; how many there were."""
    v = machine.cpu.vcpu(machine.vcpus[0])
    insn = Decoder().decode(code, 64)
    access = mmio.emulate(v, insn, -1)
    count = 0
    while access is not None:
        count += 1
        assert access.gva >= 0
        data = 0
        if access.write:
            raw = access.data & (1 << 8 * access.length) - 1
            machine.ram.write(access.gva, raw.to_bytes(access.length, "little"))
        else:
            data = int.from_bytes(machine.ram.read(access.gva, access.length), "little")
        after = cast("mmio.Finish", access.priv)(data)
        if after is not None and after.gva < 0:
            after.gva = access.gva
        access = after
    return count


@pytest.fixture(scope="module")
def machines() -> Any:
    native, emulated = Machine(), Machine(shadow=True)
    yield native, emulated
    native.cpu.close()
    emulated.cpu.close()


@pytest.mark.parametrize("source", CASES)
def test_it_does_what_the_cpu_does(machines: tuple[Machine, Machine], source: str) -> None:
    native, emulated = machines
    code = asm(source, CODE)
    ignore = _UNDEFINED.get(source.removeprefix("lock ").split()[0], 0)
    for seed in range(12):
        for machine in machines:
            prepare(machine, random.Random(f"{source} {seed}"), source)
        native.cpu.flush_tlb(native.vcpus[0])
        native.cpu.vcpu(native.vcpus[0]).drop_code(CODE >> 12)
        native.run()
        assert emulate(emulated, code.ljust(15, b"\x90")) in (1, 2)
        assert state(emulated, ignore) == state(native, ignore), f"seed {seed}"


def test_page_tables_are_written_by_some_kinds_and_stacks_by_others(
    machines: tuple[Machine, Machine]
) -> None:
    _, emulated = machines
    v = emulated.cpu.vcpu(emulated.vcpus[0])
    kinds = {}
    for source in ("mov [rbx], rdx", "lock or [rbx], rdx", "lock bts qword ptr [rbx], 1", "xchg [rbx], rdx",
                   "lock cmpxchg8b qword ptr [rbx]", "push rax", "stosq", "lock xadd [rbx], rdx",
                   "movups [rbx], xmm0"):
        insn = Decoder().decode(asm(source, CODE).ljust(15, b"\x90"), 64)
        access = mmio.emulate(v, insn, -1)
        assert access is not None
        kinds[source.removeprefix("lock ").split()[0]] = access.page_table
    assert kinds == {"mov": True, "or": True, "bts": True, "xchg": True, "cmpxchg8b": True, "push": False,
                     "stosq": False, "xadd": False, "movups": False}
