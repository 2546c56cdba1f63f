"""Bare Unicorn, without KVM and mm: with its own page walker, with the machine's fill, with a trivial fill.

`BareCpu` has guest page tables; with `fill=False` Unicorn walks them itself (UC_TLB_CPU), else the
machine's fill does, through EPT too where `ept` is an EPT pointer. `TrivialCpu` maps every address to
itself, which is the least that UC_TLB_VIRTUAL can cost.
"""

from __future__ import annotations

import functools
from typing import Any

from unicorn import UC_ARCH_X86, UC_HOOK_TLB_FILL, UC_MODE_64, UC_PROT_ALL, Uc, UcError
from unicorn import x86_const as x86
from unicorn.unicorn_const import UC_CTL_IO_WRITE, UC_CTL_TLB_FLUSH, UC_MEM_FETCH, UC_TLB_CPU, UC_TLB_VIRTUAL

from emu.cpu import paging as P
from emu.cpu.block import BlockCounter
from emu.cpu.env import Env
from emu.cpu.fill import Fill, add_hook
from emu.cpu.fill_body import NEW_CODE
from host_mm.ram import Ram

__all__ = ["CODE", "DATA", "EPT_ROOT", "FLAGS", "FRAMES", "BareCpu", "TrivialCpu"]

FRAMES = 8192
CODE, DATA = 0x100_0000, 0x40_0000
EPT_ROOT = 2048
FLAGS = P.PTE_PRESENT | P.PTE_RW | P.PTE_USER
_LONG = P.EFER_LME | P.EFER_LMA | P.EFER_NXE


def _new_uc(ram: Ram, mode: int) -> Any:
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.ctl_set_cpu_model(x86.UC_CPU_X86_BROADWELL)
    uc.mem_map_ptr(0, ram.size, UC_PROT_ALL, ram.ptr)
    uc.ctl_set_tlb_mode(mode)
    uc.ctl_exits_enabled(True)
    uc.ctl_set_exits([])
    return uc


class BareCpu:
    """One vCPU on `FRAMES` frames: identity guest tables of 4K pages below 32 MiB, code at CODE."""

    def __init__(self, *, interpreted: bool = False, ept: int = 0, fill: bool = True) -> None:
        self.ram = Ram(FRAMES)
        uc = self.uc = _new_uc(self.ram, UC_TLB_VIRTUAL if fill else UC_TLB_CPU)
        self.env = Env(uc)
        self._guest_tables()
        if ept:
            self._ept()
        uc.reg_write(x86.UC_X86_REG_CR4, P.CR4_PAE | 0x600)
        uc.reg_write(x86.UC_X86_REG_CR3, 0x1000)
        uc.reg_write(x86.UC_X86_REG_CR0, P.CR0_PG | P.CR0_PE | P.CR0_WP | 0x10)
        self.env.efer = _LONG
        self.fill: Fill | None = None
        if fill:
            self.fill = Fill(self.ram, self.env, interpreted=interpreted)
            self.fill.eptp = ept
            self.fill.install()

    def _guest_tables(self) -> None:
        q = self.ram.u64
        q[0x1000 >> 3] = 0x2000 | FLAGS
        q[0x2000 >> 3] = 0x3000 | FLAGS
        for table in range(16):
            q[(0x3000 >> 3) + table] = (0x10_0000 + (table << 12)) | FLAGS
            for i in range(512):
                q[(0x10_0000 >> 3) + table * 512 + i] = table << 21 | i << 12 | FLAGS

    def _ept(self) -> None:
        """Identity, 4K leaves with A and D set, tables from frame EPT_ROOT."""
        q = self.ram.u64
        q[EPT_ROOT * 512] = (EPT_ROOT + 1) << 12 | 0x107
        q[(EPT_ROOT + 1) * 512] = (EPT_ROOT + 2) << 12 | 0x107
        for table in range(FRAMES // 512):
            frame = EPT_ROOT + 3 + table
            q[(EPT_ROOT + 2) * 512 + table] = frame << 12 | 0x107
            for i in range(512):
                q[frame * 512 + i] = table << 21 | i << 12 | 0x337

    def pte(self, gva: int) -> int:
        """Word index of the page's guest entry."""
        return (0x10_0000 >> 3) + (gva >> 12)

    def code(self, data: bytes, gva: int = CODE) -> None:
        """Put code into memory."""
        self.ram.b[gva : gva + len(data)] = data

    def start(self, gva: int = CODE, *, rax: int = 0, rbx: int = DATA, rcx: int = 0) -> bool:
        """Run to HLT; False where a fill was refused. New code is marked as known on the way."""
        for register, value in ((0, rax), (3, rbx), (1, rcx)):
            self.env.set_reg(register, value)
        while True:
            try:
                self.uc.emu_start(gva, 0)
                return True
            except UcError:
                assert self.fill is not None
                last = self.fill.last()
                if last.status != NEW_CODE:
                    return False
                pfn = last.hpa >> 12
                if self.fill.may_write(pfn):
                    self.fill.flush()
                self.fill.mark_code(last.page, pfn)
                gva = self.env.eip

    def status(self) -> int:
        """What the last fill came to."""
        assert self.fill is not None
        return self.fill.last().status

    def flush(self) -> None:
        """Empty Unicorn's TLB, whoever fills it."""
        self.uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)


@functools.cache
def _identity() -> Any:
    """A native fill that maps every address to itself.

    R and W, but R and X for a fetch: Unicorn takes its slow path for every store to a page that it could run.
    """
    import numba
    from numba import carray, types

    words = types.CPointer(types.int64)

    @numba.cfunc(types.boolean(types.voidptr, types.int64, types.int32, words, types.voidptr))
    def fill(uc, gva, kind, result, user_data):  # type: ignore[no-untyped-def]
        entry = carray(result, (2,))
        entry[0] = gva & ~0xFFF
        entry[1] = 5 if kind == UC_MEM_FETCH else 3
        return True

    return fill


class TrivialCpu:
    """One vCPU whose every address is physical; `counted` with the machine's block counter."""

    def __init__(self, *, counted: bool) -> None:
        self.ram = Ram(FRAMES)
        self.uc = _new_uc(self.ram, UC_TLB_VIRTUAL)
        self.env = Env(self.uc)
        add_hook(self.uc, UC_HOOK_TLB_FILL, int(_identity().address), 0)
        self.counter = BlockCounter(self.uc) if counted else None

    def run(self, gva: int, registers: dict[int, int]) -> None:
        """Run from `gva` to HLT; registers by their number in encodings."""
        for index, value in registers.items():
            self.env.set_reg(index, value)
        self.uc.emu_start(gva, 0)
