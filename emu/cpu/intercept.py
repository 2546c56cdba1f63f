"""Instructions that leave the guest: stopped before they run, with an exact RIP, at no cost to the rest.

Unicorn keeps QEMU's SVM emulation. With HF_GUEST set and intercept bits poked into CPUX86State, each
intercepted instruction ends emu_start before it changes anything, and CPUState.exception_index tells
which; no page is scanned and no hook runs. The same mechanism reports the interrupt window: with an
interrupt request pending and INTR intercepted, emu_start ends at the first boundary where RFLAGS.IF is
set and no shadow holds. Unicorn left out two places, for which a few native instructions stand in as an
instruction hook (compiled by LLVM; Python could not leave from inside one): IN, OUT and their string
forms (it allows all I/O), and SYSCALL and SYSENTER (it has no code for them).

Offsets are those of Unicorn 2.1.4; each structure is checked by neighbours whose values are known.

Source: qemu/target/i386/svm_helper.c (cpu_svm_check_intercept_param, cpu_vmexit), misc_helper.c,
seg_helper.c (x86_cpu_exec_interrupt), include/hw/core/cpu.h, qemu/accel/tcg/cpu-exec.c; AMD APM
vol. 2, appendix C (exit codes) and 15.9 (intercepts).

Not modelled: a guest that uses SVM itself (CPUID says it has none; EFER.SVME cannot be set).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from emu.cpu.env import HFLAGS, Env

__all__ = [
    "EXCEPTION_LIMIT", "STOP_CPUID", "STOP_HLT", "STOP_IN", "STOP_INTR", "STOP_INVLPG", "STOP_MSR",
    "STOP_NONE", "STOP_OUT", "STOP_RDPMC", "STOP_RDTSC", "STOP_READ_CR3", "STOP_SYSCALL", "STOP_SYSENTER",
    "STOP_WRITE_CR0", "STOP_WRITE_CR3", "STOP_WRITE_CR4", "Intercepts",
]

STOP_NONE = -1
EXCEPTION_LIMIT = 0x100
"""Stops below this are exceptions and INT n, by vector."""
_VMEXIT = 0x100
STOP_READ_CR3 = _VMEXIT + 0x03
STOP_WRITE_CR0 = _VMEXIT + 0x10
STOP_WRITE_CR3 = _VMEXIT + 0x13
STOP_WRITE_CR4 = _VMEXIT + 0x14
STOP_INTR = _VMEXIT + 0x60
STOP_RDTSC = _VMEXIT + 0x6E
STOP_RDPMC = _VMEXIT + 0x6F
STOP_CPUID = _VMEXIT + 0x72
STOP_HLT = _VMEXIT + 0x78
STOP_INVLPG = _VMEXIT + 0x79
STOP_MSR = _VMEXIT + 0x7C
STOP_IN = 0x300
STOP_OUT = 0x301
STOP_SYSCALL = 0x302
STOP_SYSENTER = 0x303

_INTERCEPT_FIRST = STOP_INTR
_INTERCEPTED = (
    STOP_INTR, STOP_RDTSC, STOP_RDPMC, STOP_CPUID, STOP_HLT, STOP_INVLPG, STOP_MSR,
)

HF_GUEST = 1 << 21
_HF2_GIF = 1 << 0
_ENV_HFLAGS2 = 180
_ENV_VM_VMCB = 0x1580
_ENV_INTERCEPT = 0x1590
_ENV_INTERCEPT_CR_READ = 0x1598
_ENV_INTERCEPT_CR_WRITE = 0x159A
_UC_CPU = 0x1B8
_CPU_ENV = 0x8A50
_CPU_CFLAGS_NEXT_TB = 0x18
_CPU_INTERRUPT_REQUEST = 0x1C
_CPU_EXCEPTION_INDEX = 0x81A0
_CPU_INTERRUPT_HARD = 2

_VMCB_AT = 1 << 46
_VMCB_SIZE = 0x4000
_VMCB_MSRPM_BASE = 0x48
_MSRPM = _VMCB_AT + 0x2000

_HOOKS = (
    (x86.UC_X86_INS_IN, "leave_in", STOP_IN),
    (x86.UC_X86_INS_OUT, "leave_out", STOP_OUT),
    (x86.UC_X86_INS_SYSCALL, "leave_plain", STOP_SYSCALL),
    (x86.UC_X86_INS_SYSENTER, "leave_plain", STOP_SYSENTER),
)
# {cpu, &cpu->exception_index, cpu_loop_exit, stop, port, size, value}: what a hook's user data points at
_HOOK_WORDS = 7


def _hook_ir() -> str:
    """LLVM IR of the instruction hooks: note the operands, set the exception index, cpu_loop_exit."""
    from llvmlite import ir

    i32, i64, ptr = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    void = ir.VoidType()
    module = ir.Module("refault_intercept")

    def hook(name: str, operands: int, returns: Any) -> None:
        kind = ir.FunctionType(returns, [ptr, *[i32] * operands, ptr])
        function = ir.Function(module, kind, name)
        b = ir.IRBuilder(function.append_basic_block())
        words = b.bitcast(function.args[-1], i64.as_pointer())

        def word(n: int) -> Any:
            return b.gep(words, [ir.Constant(i32, n)])

        for n in range(operands):
            b.store(b.zext(function.args[1 + n], i64), word(4 + n))
        index = b.inttoptr(b.load(word(1)), i32.as_pointer())
        b.store(b.trunc(b.load(word(3)), i32), index)
        leave = b.inttoptr(b.load(word(2)), ir.FunctionType(void, [i64]).as_pointer())
        b.call(leave, [b.load(word(0))])
        b.ret_void() if returns is void else b.ret(ir.Constant(i32, 0))

    hook("leave_in", 2, i32)
    hook("leave_out", 3, void)
    hook("leave_plain", 0, void)
    return str(module)


@functools.cache
def _native() -> Any:
    """The LLVM engine that holds the hooks. Compiled code without state: one per process."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(_hook_ir()), machine)
    engine.finalize_object()
    return engine


def _symbol(name: str) -> int:
    try:
        return int(ctypes.cast(getattr(uclib, name), ctypes.c_void_p).value or 0)
    except AttributeError:
        raise RuntimeError(f"this build of Unicorn does not export {name}; the 2.1.4 wheel does") from None


class Intercepts:
    """The intercepts of one `Uc`, and what it takes to read why emu_start ended.

    Also the native calls that have no Python binding: flushing the TLB or one page of it, dropping
    the translation blocks of a physical page, loading CR0 and CR4 with their consequences.
    """

    def __init__(self, uc: Any, env: Env) -> None:
        self.env = env
        self.cpu = env.addr - _CPU_ENV
        self._verify()
        self._index = ctypes.c_int32.from_address(self.cpu + _CPU_EXCEPTION_INDEX)
        self._next_cflags = ctypes.c_int32.from_address(self.cpu + _CPU_CFLAGS_NEXT_TB)
        self._request = ctypes.c_uint32.from_address(self.cpu + _CPU_INTERRUPT_REQUEST)
        self._vmcb = mmap.mmap(-1, _VMCB_SIZE)
        self._map_vmcb(uc)
        self.io: dict[int, Any] = {}
        self._add_hooks(uc)
        self._poke()
        call = ctypes.CFUNCTYPE
        ptr, u32, u64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
        self._tlb_flush = call(None, ptr)(_symbol("tlb_flush_x86_64"))
        self._tlb_flush_page = call(None, ptr, u64)(_symbol("tlb_flush_page_x86_64"))
        self._update_cr0 = call(None, ptr, u32)(_symbol("cpu_x86_update_cr0_x86_64"))
        self._update_cr4 = call(None, ptr, u32)(_symbol("cpu_x86_update_cr4_x86_64"))
        self._update_cr3 = call(None, ptr, u64)(_symbol("cpu_x86_update_cr3_x86_64"))
        self._drop_code = call(None, ptr, u64, u64)(_symbol("tb_invalidate_phys_range_x86_64"))

    def _verify(self) -> None:
        """Look at fields beside those used: uc_struct.cpu, CPUState.uc, cflags_next_tb, old_exception."""
        cpu, u64, i32 = self.cpu, ctypes.c_uint64.from_address, ctypes.c_int32.from_address
        known = (
            u64(self.env.uc_struct + _UC_CPU).value == cpu
            and u64(cpu + _CPU_EXCEPTION_INDEX + 8).value == self.env.uc_struct
            and i32(cpu + _CPU_CFLAGS_NEXT_TB).value == -1
            and i32(self.env.addr + _ENV_VM_VMCB - 8).value == -1
            and u64(self.env.addr + _ENV_VM_VMCB).value == 0
            and u64(self.env.addr + _ENV_INTERCEPT).value == 0
        )
        if not known:
            raise RuntimeError("CPUState is not laid out as in the build of Unicorn that is known (2.1.4)")

    def _map_vmcb(self, uc: Any) -> None:
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._vmcb))
        uc.mem_map_ptr(_VMCB_AT, _VMCB_SIZE, uc_const.UC_PROT_READ | uc_const.UC_PROT_WRITE, at)
        self._vmcb[:] = b"\xff" * _VMCB_SIZE  # every MSR intercepted
        self._vmcb[_VMCB_MSRPM_BASE : _VMCB_MSRPM_BASE + 8] = _MSRPM.to_bytes(8, "little")

    def _add_hooks(self, uc: Any) -> None:
        engine, leave = _native(), _symbol("cpu_loop_exit_x86_64")
        for instruction, name, stop in _HOOKS:
            words = (ctypes.c_int64 * _HOOK_WORDS)(
                self.cpu, self.cpu + _CPU_EXCEPTION_INDEX, leave, stop, 0, 0, 0
            )
            self.io[stop] = words
            handle = ctypes.c_size_t()
            error = uclib.uc_hook_add(
                uc._uch, ctypes.byref(handle), uc_const.UC_HOOK_INSN,
                ctypes.c_void_p(engine.get_function_address(name)), ctypes.cast(words, ctypes.c_void_p),
                ctypes.c_uint64(1), ctypes.c_uint64(0), ctypes.c_int(instruction),
            )
            if error:
                raise RuntimeError(f"uc_hook_add failed with {error}")

    def _poke(self) -> None:
        at = self.env.addr
        ctypes.c_uint64.from_address(at + _ENV_VM_VMCB).value = _VMCB_AT
        bits = sum(1 << (stop - _INTERCEPT_FIRST) for stop in _INTERCEPTED)
        ctypes.c_uint64.from_address(at + _ENV_INTERCEPT).value = bits
        ctypes.c_uint16.from_address(at + _ENV_INTERCEPT_CR_WRITE).value = 1 << 0 | 1 << 4
        ctypes.c_uint32.from_address(at + _ENV_HFLAGS2).value |= _HF2_GIF
        self.env.d[HFLAGS // 4] |= HF_GUEST

    def intercept_cr3(self, on: bool) -> None:
        """Whether MOV to and from CR3 stop: shadow paging needs to see them, EPT does not."""
        at = self.env.addr
        ctypes.c_uint16.from_address(at + _ENV_INTERCEPT_CR_READ).value = on << 3
        ctypes.c_uint16.from_address(at + _ENV_INTERCEPT_CR_WRITE).value = 1 << 0 | 1 << 4 | on << 3

    def intercept_cr3_writes(self, on: bool) -> None:
        """Whether MOV to CR3 stops: in PAE paging it loads registers that Unicorn has not."""
        at = self.env.addr + _ENV_INTERCEPT_CR_WRITE
        ctypes.c_uint16.from_address(at).value = 1 << 0 | 1 << 4 | on << 3

    def stop_reason(self) -> int:
        """After emu_start said UC_ERR_EXCEPTION without a refused fill: a vector or a STOP_*."""
        return self._index.value

    def step_once(self) -> None:
        """Let the next translation block be one instruction long."""
        self._next_cflags.value = 1

    def request_interrupt_window(self, on: bool) -> None:
        """Whether emu_start ends with STOP_INTR as soon as an interrupt could be taken."""
        self._request.value = _CPU_INTERRUPT_HARD if on else 0

    def flush_tlb(self) -> None:
        """Empty Unicorn's TLB."""
        self._tlb_flush(self.cpu)

    def flush_tlb_page(self, gva: int) -> None:
        """Drop one 4K page from Unicorn's TLB."""
        self._tlb_flush_page(self.cpu, gva)

    def drop_code(self, pfn: int) -> None:
        """Forget the translation blocks made from a frame."""
        self._drop_code(self.env.uc_struct, pfn << 12, (pfn + 1) << 12)

    def load_cr0(self, value: int) -> None:
        """MOV to CR0 without checks: mode switches, flushes."""
        self._update_cr0(self.env.addr, value & 0xFFFFFFFF)

    def load_cr3(self, value: int) -> None:
        """MOV to CR3: flushes."""
        self._update_cr3(self.env.addr, value)

    def load_cr4(self, value: int) -> None:
        """MOV to CR4 without checks."""
        self._update_cr4(self.env.addr, value & 0xFFFFFFFF)
