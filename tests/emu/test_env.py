"""Offsets into Unicorn's CPU state are the right ones, and pokes reach the CPU."""

from __future__ import annotations

import pytest
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn import x86_const as x86

from emu.cpu import env as E


@pytest.fixture
def uc() -> Uc:
    return Uc(UC_ARCH_X86, UC_MODE_64)


def test_general_registers_are_in_encoding_order(uc: Uc) -> None:
    env = E.Env(uc)
    names = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16))]
    for i, name in enumerate(names):
        env.set_reg(i, 0x1000 + i)
        assert uc.reg_read(getattr(x86, f"UC_X86_REG_{name}")) == 0x1000 + i


def test_finding_the_state_leaves_the_registers_alone(uc: Uc) -> None:
    uc.reg_write(x86.UC_X86_REG_RAX, 77)
    E.Env(uc)
    assert uc.reg_read(x86.UC_X86_REG_RAX) == 77


@pytest.mark.parametrize(("name", "offset"), [("TR", E.TR), ("LDTR", E.LDT)])
def test_system_segments(uc: Uc, name: str, offset: int) -> None:
    env = E.Env(uc)
    uc.reg_write(getattr(x86, f"UC_X86_REG_{name}"), (0x28, 0x112233445566, 0x67, 0x8B00))
    assert env.table(offset) == (0x28, 0x112233445566, 0x67, 0x8B00)


@pytest.mark.parametrize(("name", "offset"), [("GDTR", E.GDT), ("IDTR", E.IDT)])
def test_descriptor_tables(uc: Uc, name: str, offset: int) -> None:
    env = E.Env(uc)
    env.set_table(offset, 0, 0x112233445566, 0x67, 0)
    assert uc.reg_read(getattr(x86, f"UC_X86_REG_{name}"))[1:3] == (0x112233445566, 0x67)


@pytest.mark.parametrize(("msr", "offset"), [
    (0xC0000081, E.STAR), (0xC0000082, E.LSTAR), (0xC0000083, E.CSTAR), (0xC0000084, E.FMASK),
    (0xC0000102, E.KERNEL_GS_BASE), (0xC0000103, E.TSC_AUX), (0x174, E.SYSENTER_CS),
    (0x175, E.SYSENTER_ESP), (0x176, E.SYSENTER_EIP),
])
def test_msrs(uc: Uc, msr: int, offset: int) -> None:
    env = E.Env(uc)
    uc.msr_write(msr, 0x1234)
    assert env.q[offset // 8] == 0x1234


def test_control_registers_and_efer(uc: Uc) -> None:
    env = E.Env(uc)
    uc.reg_write(x86.UC_X86_REG_CR3, 0x5000)
    assert env.cr(3) == 0x5000
    assert env.cr(0) == uc.reg_read(x86.UC_X86_REG_CR0)
    assert env.efer == uc.msr_read(0xC0000080)
    assert env.efer & 0x400  # a 64-bit Uc starts with EFER.LMA


def test_segment_flags_are_the_high_descriptor_word(uc: Uc) -> None:
    env = E.Env(uc)
    env.set_seg(E.R_FS, 0x33, 0x7F0000000000, 0xFFFFFFFF, 0xCFF300)
    assert uc.reg_read(x86.UC_X86_REG_FS_BASE) == 0x7F0000000000
    assert uc.reg_read(x86.UC_X86_REG_FS) == 0x33
    assert env.seg(E.R_FS) == (0x33, 0x7F0000000000, 0xFFFFFFFF, 0xCFF300)


def test_many_instances_one_after_another_each_find_their_own_state() -> None:
    for n in range(40):
        uc = Uc(UC_ARCH_X86, UC_MODE_64)
        env = E.Env(uc)
        uc.reg_write(x86.UC_X86_REG_R12, n)
        assert env.reg(12) == n
        del uc, env
