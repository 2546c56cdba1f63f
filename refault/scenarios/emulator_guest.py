"""What the guest of a scenario does on the emulator: one instruction a KVM_RUN, by any of its vCPUs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emu.cpu.env import R_CS, R_DS, R_ES, R_FS, R_GS, R_SS
from emu.cpu.registers import GENERAL_REGISTERS
from emu.cpu.segments import load_seg_cache
from emu.loaders.image import Image
from refault.scenarios.guest import (
    CR4,
    CUSTOM,
    ENTRY,
    INSTRUCTIONS,
    OUT,
    RFLAGS_IOPL3,
    USER_STACK,
    guest_memory,
    pte_gpa,
)
from refault.scenarios.layout import DATA_GPA, SLOT0_SIZE

if TYPE_CHECKING:
    from emu.board import Board, Stop
    from host_mm.kernel.sched import Task
    from kvm_model.vcpu import UserExit, Vcpu

__all__ = ["GuestSteps"]

_USER_CS, _USER_DS = 0x0B, 0x13
_CODE, _DATA = 0x00AFFB00, 0x00CFF300
"""Descriptor words: 64-bit code and flat data of DPL 3."""
_PIO_OFFSET = 0x1000
"""kvm_run's io.data_offset, which lies where mmio.data does."""


class GuestSteps:
    """The steps, for a back end that has `board` and can enter the host."""

    board: Board
    data_hva: int
    slot0_offset: int
    vcpu: Vcpu
    pending: dict[int, UserExit]
    """MMIO exits that are not completed, by vCPU."""
    run_data: dict[int, int]
    """What is where kvm_run has the data of an MMIO exit, by vCPU."""

    def _host(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    # -- starting -----------------------------------------------------------------------------

    def start_guest(self, pages: str) -> None:
        """Load the guest and bring every vCPU to CPL 3; the first one runs twice, as the recordings' did."""
        board = self.board
        board.load(Image(
            kind="scenario", mode="long", entry=ENTRY["nop"], end=SLOT0_SIZE, segments=guest_memory(pages),
            registers={},
        ))
        # Nobody enters before a step says so.
        board.threads[0].halted = True
        board.stops_at_mmio = self._stop_at_mmio
        self.vcpu = board.vcpus[0]
        self.pending, self.run_data = {}, dict.fromkeys(range(len(board.vcpus)), 0)
        for vcpu in board.vcpus:
            self._to_user(vcpu)
        self._run("nop")
        self._run("nop")

    def _to_user(self, vcpu: Vcpu) -> None:
        v = self.board.cpu.vcpu(vcpu)
        self.board.cpu.set_reg(vcpu, "cr4", CR4)
        if vcpu.vcpu_id:
            v.start_like(self.board.cpu.vcpu(self.board.vcpus[0]), ENTRY["nop"])
        for index in (R_ES, R_SS, R_DS, R_FS, R_GS):
            load_seg_cache(v.env, index, _USER_DS, 0, 0xFFFF_FFFF, _DATA)
        load_seg_cache(v.env, R_CS, _USER_CS, 0, 0xFFFF_FFFF, _CODE)
        self._host(lambda: self.board.kvm.set_sregs(vcpu))

    def use_vcpu(self, number: int) -> None:
        """Whose turn it is."""
        self.vcpu = self.board.vcpus[number]

    # -- one KVM_RUN --------------------------------------------------------------------------

    def _run(self, snippet: str, **registers: int) -> str:
        return self._run_at(ENTRY[snippet], **registers)

    def _run_at(self, rip: int, **registers: int) -> str:
        values = {"rip": rip, "rsp": USER_STACK, "rflags": RFLAGS_IOPL3, **registers}
        out = self.pending.pop(self.vcpu.vcpu_id, None)
        if out is not None and not out.write:
            return self._end_unanswered(out, values)
        # A KVM_RUN with immediate_exit: the last snippet's `out` is over before the registers change.
        ended, self.vcpu.complete_userspace_io = self.vcpu.complete_userspace_io, None
        if ended is not None:
            ended()
        self._set_regs(values)
        return self._enter()

    def _set_regs(self, values: Mapping[str, int]) -> None:
        for name in (*GENERAL_REGISTERS, "rip", "rflags"):
            self.board.cpu.set_reg(self.vcpu, name, values.get(name, 0))

    def _end_unanswered(self, out: UserExit, values: dict[str, int]) -> str:
        """KVM ends the load that it began with what is in kvm_run, and the guest goes on behind it.

        KVM_SET_REGS made it forget (emulator_invalidate_register_cache) which registers the load writes.
        """
        vcpu, cpu = self.vcpu, self.board.cpu
        load = vcpu.complete_userspace_io
        assert load is not None

        def complete() -> int:
            result = load()
            self._set_regs({**values, "rip": cpu.get_reg(vcpu, "rip")})
            return result

        vcpu.complete_mmio(self.run_data[vcpu.vcpu_id] & (1 << 8 * out.size) - 1)
        vcpu.complete_userspace_io = complete
        return self._enter()

    def _enter(self) -> str:
        board = self.board
        thread = board.threads[self.vcpu.vcpu_id]
        board.stop = None
        board.start_thread(thread)
        stop = board.run(lambda: False)
        thread.halted = True
        return self._shown(stop)

    def _shown(self, stop: Stop) -> str:
        if stop.kind == "exit":
            self.run_data[self.vcpu.vcpu_id] = _PIO_OFFSET
            return "ok"
        if stop.kind == "mmio":
            return stop.why
        return "EFAULT" if "EFAULT" in stop.why else stop.kind.upper()

    def _stop_at_mmio(self, vcpu: Vcpu, out: UserExit) -> str:
        self.pending[vcpu.vcpu_id] = out
        if out.write:
            mask = (1 << 8 * out.size) - 1
            self.run_data[vcpu.vcpu_id] = self.run_data[vcpu.vcpu_id] & ~mask | out.data & mask
            return f"MMIO write of {out.size} bytes at {out.gpa:#x} of {out.data:#x}"
        return f"MMIO read of {out.size} bytes at {out.gpa:#x}"

    def complete(self, value: int) -> Any:
        """KVM_RUN after an MMIO exit."""
        number = self.vcpu.vcpu_id
        out = self.pending.pop(number, None)
        self.run_data[number] = value
        if out is not None and not out.write:
            self.vcpu.complete_mmio(value & (1 << 8 * out.size) - 1)
        return self._enter()

    # -- accesses -----------------------------------------------------------------------------

    def load(self, offset: int) -> Any:
        """A guest load."""
        result = self._run("load", rsi=DATA_GPA + offset)
        return self.board.cpu.get_reg(self.vcpu, "rax") if result == "ok" else result

    def store(self, offset: int, value: int) -> Any:
        """A guest store."""
        return self._run("store", rdi=DATA_GPA + offset, rax=value)

    def read_modify_write(self, offset: int) -> Any:
        """A guest inc."""
        return self._run("read_modify_write", rdi=DATA_GPA + offset)

    def instruction(self, code: str, offset: int, **registers: int) -> Any:
        """Any instruction."""
        rip = ENTRY[code] if code in INSTRUCTIONS else self._custom(code)
        return self._run_at(rip, rdi=DATA_GPA + offset, rsi=DATA_GPA + offset, **registers)

    def _custom(self, code: str) -> int:
        self._poke_slot0(CUSTOM, bytes.fromhex(code) + OUT)
        return CUSTOM

    def fetch(self, offset: int) -> Any:
        """Execute what is there."""
        return self._run_at(DATA_GPA + offset)

    def loop(self, offset: int, count: int, beside: Sequence[tuple[int, str, tuple[Any, ...]]]) -> Any:
        """A guest loop, and another thread beside it."""
        thread = self._beside(beside)
        result = self._run("loop", rdi=DATA_GPA + offset, rax=7, rcx=count)
        self.board.host.sched.run_until(lambda: thread.done)
        if thread.error is not None:
            raise thread.error
        return result

    def _beside(self, calls: Sequence[tuple[int, str, tuple[Any, ...]]]) -> Task:
        sched = self.board.host.sched

        def body() -> None:
            for ns, method, args in calls:
                sched.sleep(ns)
                getattr(self, method)(*args)

        return sched.spawn("vmm-beside", body)

    # -- the guest's tables -------------------------------------------------------------------

    def _poke_slot0(self, gpa: int, data: bytes) -> None:
        at = self.data_hva + self.slot0_offset + gpa
        self._host(lambda: self.board.vmm.write(at, data))

    def poke(self, offset: int, data: bytes) -> Any:
        """The VMM stores bytes."""
        return self._host(lambda: self.board.vmm.write(self.data_hva + offset, data))

    def poke_pte(self, offset: int, entry: int) -> Any:
        """The VMM stores a guest PTE."""
        self._poke_slot0(pte_gpa(offset), struct.pack("<Q", entry))

    def store_pte(self, offset: int, entry: int) -> Any:
        """The guest stores its PTE."""
        return self._run("store", rdi=pte_gpa(offset), rax=entry)

    def load_cr3(self, root: int) -> Any:
        """KVM_SET_SREGS."""

        def ioctl() -> None:
            # __set_sregs asks for a new context, and for a flush, only where a register changes.
            if self.board.cpu.get_reg(self.vcpu, "cr3") != root:
                self.board.cpu.set_reg(self.vcpu, "cr3", root)
                self.board.kvm.set_sregs(self.vcpu)

        self._host(ioctl)
