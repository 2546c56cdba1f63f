"""What the guest of a scenario does on a real KVM: one instruction a KVM_RUN, by any of its vCPUs."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from refault.scenarios.guest import CUSTOM, ENTRY, INSTRUCTIONS, OUT, RFLAGS_IOPL3, USER_STACK, pte_gpa
from refault.scenarios.layout import DATA_GPA
from refault.scenarios.live import libc
from refault.scenarios.live.kvm import EXIT_IO, EXIT_MMIO, EXIT_NAMES, Vcpu, Vm
from refault.scenarios.live.tracefs import TraceInstance

__all__ = ["GuestSteps"]

EXIT_PORT = 0xF4


class GuestSteps:
    """The steps, for a back end that has `vm`, `vcpu`, `trace` and `data`, the address of D."""

    vm: Vm
    vcpu: Vcpu
    trace: TraceInstance
    data: int
    slot0_offset: int

    def use_vcpu(self, number: int) -> None:
        """Whose turn it is."""
        self.vcpu = self.vm.vcpus[number]

    def _call(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    # -- one KVM_RUN --------------------------------------------------------------------------

    def _run(self, snippet: str, **registers: int) -> str:
        return self._run_at(ENTRY[snippet], **registers)

    def _run_at(self, rip: int, **registers: int) -> str:
        self.vcpu.set_regs(**{"rip": rip, "rsp": USER_STACK, "rflags": RFLAGS_IOPL3, **registers})
        return self._enter()

    def _enter(self) -> str:
        try:
            reason = self.vcpu.run()
        except InterruptedError:
            # Work that the kernel has for this thread, such as an io_uring's, ends KVM_RUN as a signal does.
            return self._enter()
        except OSError as exc:
            return errno.errorcode.get(exc.errno or 0, str(exc.errno))
        if reason == EXIT_IO and self.vcpu.io_exit()[1] == EXIT_PORT:
            return "ok"
        if reason == EXIT_MMIO:
            write, gpa, length, data = self.vcpu.mmio_exit()
            if write:
                value = int.from_bytes(data, "little")
                return f"MMIO write of {length} bytes at {gpa:#x} of {value:#x}"
            return f"MMIO read of {length} bytes at {gpa:#x}"
        return EXIT_NAMES.get(reason, str(reason))

    def complete(self, value: int) -> Any:
        """KVM_RUN after an MMIO exit."""
        self.vcpu.answer_mmio(value)
        return self._enter()

    # -- accesses -----------------------------------------------------------------------------

    def load(self, offset: int) -> Any:
        """A guest load."""
        result = self._run("load", rsi=DATA_GPA + offset)
        return self.vcpu.get_regs()["rax"] if result == "ok" else result

    def slow_load(self, offset: int, ns: int) -> Any:
        """A guest load; a real thread loses the CPU when it does."""
        value = self.load(offset)
        time.sleep(ns / 1e9)
        return value

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
        libc.poke(self.data + self.slot0_offset + CUSTOM, bytes.fromhex(code) + OUT)
        return CUSTOM

    def fetch(self, offset: int) -> Any:
        """Execute what is there."""
        return self._run_at(DATA_GPA + offset)

    def loop(self, offset: int, count: int, beside: Sequence[tuple[int, str, tuple[Any, ...]]]) -> Any:
        """A guest loop, and another thread beside it."""

        def body() -> None:
            # Beside the guest, not in turns with it: the VMM's thread stays on one CPU.
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
            self.trace.watch(threading.get_native_id())
            for ns, method, args in beside:
                time.sleep(ns / 1e9)
                getattr(self, method)(*args)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        try:
            return self._run("loop", rdi=DATA_GPA + offset, rax=7, rcx=count)
        finally:
            thread.join()

    # -- the guest's tables -------------------------------------------------------------------

    def poke(self, offset: int, data: bytes) -> Any:
        """The VMM stores bytes."""
        return self._call(lambda: libc.poke(self.data + offset, data))

    def poke_pte(self, offset: int, entry: int) -> Any:
        """The VMM stores a guest PTE."""
        libc.poke(self.data + self.slot0_offset + pte_gpa(offset), struct.pack("<Q", entry))

    def store_pte(self, offset: int, entry: int) -> Any:
        """The guest stores its PTE."""
        return self._run("store", rdi=pte_gpa(offset), rax=entry)

    def load_cr3(self, root: int) -> Any:
        """KVM_SET_SREGS."""
        self.vcpu.start_in_long_mode(root)
