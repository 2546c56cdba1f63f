"""A scenario's guest and its VMM on this machine's KVM.

The guest is emulator.py's: the same code and tables at the same addresses, entered at CPL 3 with
IOPL 3. The VMM is this process; its memory lies as the emulator's, so that offsets from D agree.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from collections.abc import Callable
from typing import Any

from refault.errors import UsageError
from refault.scenarios.api import DATA_GPA, DATA_SIZE, PAGE, Scenario
from refault.scenarios.guest import ENTRY, GUEST_SLOT_SIZE, PML4, RFLAGS_IOPL3, USER_STACK, guest_memory
from refault.scenarios.live import libc, machine
from refault.scenarios.live.dirty import DirtySteps
from refault.scenarios.live.kvm import (
    EXIT_IO,
    EXIT_MMIO,
    EXIT_NAMES,
    KVM_CAP_DIRTY_LOG_RING,
    KVM_MEM_LOG_DIRTY_PAGES,
    Vm,
)
from refault.scenarios.live.tracefs import TraceInstance, TraceLine
from refault.scenarios.normal import NOISE, SLOT0_OFFSET, SLOT0_SIZE

__all__ = ["KvmBackend", "run_on_kvm", "runs_natively"]

EXIT_PORT = 0xF4
_U64 = struct.Struct("<Q")


class KvmBackend(DirtySteps):
    """One VM for one scenario; `text()` is its recording."""

    def __init__(self, *, swap: str | None = "64M", dirty_ring: int = 0, **options: Any) -> None:
        if options:
            raise UsageError(f"a machine with {', '.join(options)} is the emulator's, not this one")
        self._undo = contextlib.ExitStack()
        if swap is not None:
            self._undo.enter_context(machine.swap_file(swap))
        self.data = self._reserve()
        self.vm = Vm()
        self._undo.callback(self.vm.close)
        if dirty_ring:
            self.vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, 16 * dirty_ring)
        self._make_slots(KVM_MEM_LOG_DIRTY_PAGES if dirty_ring else 0)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.start_in_long_mode(PML4)
        self.child = 0
        self._run("nop")
        self._run("nop")
        self.stats = self.vm.stats()

    def record(self) -> None:
        """The event sequence begins here."""
        self.trace = TraceInstance()
        self._undo.callback(self.trace.close)
        self.trace.on()

    def _make_slots(self, flags: int) -> None:
        low = self._map(SLOT0_OFFSET, SLOT0_SIZE)
        libc.madvise(low, SLOT0_SIZE, "NOHUGEPAGE")
        self._map(0, DATA_SIZE)
        libc.madvise(self.data, DATA_SIZE, "NOHUGEPAGE")
        for gpa, content in guest_memory():
            libc.poke(low + gpa, content)
        self.vm.set_slot(0, 0, GUEST_SLOT_SIZE, low)
        self.vm.set_slot(1, DATA_GPA, DATA_SIZE, self.data, flags)

    # -- the VMM's memory ---------------------------------------------------------------------

    def _reserve(self) -> int:
        """Address space for D and slot 0, 2 MiB-aligned; the address of D."""
        size, align = 16 << 20, 2 << 20
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
        place = libc.mmap(0, size + align, 0, flags)
        self._undo.callback(libc.munmap, place, size + align)
        return (place + align - 1) & ~(align - 1)

    def _map(self, offset: int, size: int, flags: int = 0, fd: int = -1) -> int:
        flags = flags or libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
        return libc.mmap(self.data + offset, size, 3, flags | libc.MAP_FIXED, fd)

    def close(self) -> None:
        """Give everything back, whatever happened."""
        self._undo.close()

    def finish(self) -> str:
        """The recording: what tracefs has, and how the statistics moved."""
        self.trace.off()
        after = self.vm.stats()
        moved = {name: after[name] - before for name, before in self.stats.items() if after[name] != before}
        lines = self._lines(self.trace.lines())
        return "\n".join([*lines, f"# stats delta: {moved}".replace("'", '"')]) + "\n"

    def _lines(self, trace: list[TraceLine]) -> list[str]:
        found: list[str] = []
        begin = trace[0][2] if trace else 0.0
        for event, text, seconds in trace:
            if event in NOISE:
                continue
            if event in ("kvm_unmap_hva_range", "kvm_age_hva", "kvm_test_age_hva"):
                where = self._offsets(text)
                if where is None:
                    continue
                text += where
            shown = text if event == "mark" else f"{event}: {text}"
            found.append(f"{(seconds - begin) * 1e6:9.0f}us {shown}")
        return found

    def _offsets(self, text: str) -> str | None:
        """The range as offsets from D; None if it is about neither slot."""
        words = [int(word, 16) for word in text.replace("--", " ").split() if word.startswith("0x")]
        start, end = words[0] - self.data, words[-1] - self.data + (len(words) == 1)
        slots = ((0, DATA_SIZE), (SLOT0_OFFSET, SLOT0_OFFSET + SLOT0_SIZE))
        if not any(start < last and end > first for first, last in slots):
            return None
        return f"   [D{start:+#x}..D{end:+#x}]"

    # -- the guest ----------------------------------------------------------------------------

    def _run(self, snippet: str, **registers: int) -> str:
        regs = {"rip": ENTRY[snippet], "rsp": USER_STACK, "rflags": RFLAGS_IOPL3, **registers}
        self.vcpu.set_regs(**regs)
        return self._enter()

    def _enter(self) -> str:
        try:
            reason = self.vcpu.run()
        except OSError as exc:
            return errno.errorcode.get(exc.errno or 0, str(exc.errno))
        if reason == EXIT_IO and self.vcpu.io_exit()[1] == EXIT_PORT:
            return "ok"
        if reason == EXIT_MMIO:
            write, gpa, length, data = self.vcpu.mmio_exit()
            return str(("MMIO", hex(gpa), data.hex(), length, "w" if write else "r"))
        return EXIT_NAMES.get(reason, str(reason))

    def load(self, offset: int) -> Any:
        """A guest load."""
        result = self._run("load", rsi=DATA_GPA + offset)
        return self.vcpu.get_regs()["rax"] if result == "ok" else result

    def store(self, offset: int, value: int) -> Any:
        """A guest store."""
        return self._run("store", rdi=DATA_GPA + offset, rax=value)

    def read_modify_write(self, offset: int) -> Any:
        """A guest inc."""
        result = self._run("read_modify_write", rdi=DATA_GPA + offset)
        return "IO" if result == "ok" else result

    # -- the VMM ------------------------------------------------------------------------------

    def mark(self, text: str) -> None:
        """A step's mark."""
        self.trace.mark(text)

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as exc:
            return f"errno {errno.errorcode.get(exc.errno or 0, str(exc.errno))}"

    def host_write(self, offset: int, value: int) -> Any:
        """The VMM stores."""
        libc.poke(self.data + offset, _U64.pack(value))

    def host_read(self, offset: int) -> Any:
        """The VMM loads."""
        return _U64.unpack(libc.peek(self.data + offset, 8))[0]

    def fill(self, offset: int, byte: int) -> Any:
        """The VMM fills a page."""
        libc.poke(self.data + offset, bytes([byte]) * PAGE)

    def madvise(self, offset: int, length: int, advice: str) -> Any:
        """madvise(2); the fork advices answer 0, as the recordings do."""
        result = self._call(lambda: libc.madvise(self.data + offset, length, advice))
        return result or (0 if advice in ("DONTFORK", "DOFORK") else "ok")

    def mprotect(self, offset: int, length: int, prot: int) -> Any:
        """mprotect(2)."""
        return self._call(lambda: libc.mprotect(self.data + offset, length, prot)) or 0

    def munmap(self, offset: int, length: int) -> Any:
        """munmap(2)."""
        return self._call(lambda: libc.munmap(self.data + offset, length)) or 0

    def mmap_fixed(self, offset: int, length: int) -> Any:
        """mmap(MAP_FIXED)."""
        at = self._call(lambda: self._map(offset, length))
        return at if isinstance(at, str) else hex(at - self.data)

    def mlock(self, offset: int, length: int) -> Any:
        """mlock(2)."""
        return self._call(lambda: libc.mlock(self.data + offset, length)) or 0

    def munlock(self, offset: int, length: int) -> Any:
        """munlock(2)."""
        return self._call(lambda: libc.munlock(self.data + offset, length)) or 0

    def fork(self) -> Any:
        """fork(2); the child waits for the other end of a pipe."""
        read, self._wake_child = os.pipe()
        self.child = os.fork()
        if not self.child:
            os.close(self._wake_child)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        return "child"

    def child_exit(self) -> Any:
        """The child's exit."""
        os.close(self._wake_child)
        status = os.waitpid(self.child, 0)[1]
        self.child = 0
        return status

    def clear_refs(self, kind: int) -> Any:
        """clear_refs."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write(str(kind))

    def mergeable(self, offset: int, length: int) -> Any:
        """MADV_MERGEABLE."""
        result = self.madvise(offset, length, "MERGEABLE")
        return 0 if result == "ok" else result

    def ksmd(self, use_zero_pages: bool) -> Any:
        """ksmd runs until nothing more is merged."""
        with machine.ksm(use_zero_pages=use_zero_pages):
            time.sleep(1)
        return "done" if use_zero_pages else "pages_sharing"

    def begin(self) -> None:
        """Forget the events so far."""
        self.trace.on()


def runs_natively() -> bool:
    """Whether a guest store at CPL 3 faults into KVM's MMU and lands in memory."""
    backend = KvmBackend(swap=None)
    try:
        before = backend.stats["pf_taken"]
        stored = backend.store(0x3000, 7) == "ok" and backend.host_read(0x3000) == 7
        return stored and backend.vm.stats()["pf_taken"] > before
    finally:
        backend.close()


def run_on_kvm(scenario: Callable[[Scenario], None], **options: Any) -> str:
    """Run a scenario to its end; its recording. OSError where this machine cannot."""
    backend = KvmBackend(**options)
    try:
        backend.record()
        scenario(Scenario(backend))  # type: ignore[arg-type]
        return backend.finish()
    finally:
        backend.close()
