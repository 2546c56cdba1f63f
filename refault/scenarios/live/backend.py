"""A scenario's machine on this machine's KVM.

The guest is guest.py's, entered at CPL 3 with IOPL 3. The VMM is this process; its memory lies as the
emulator's does, see layout.py. Whatever is changed of the machine is put back at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from refault.errors import UsageError
from refault.scenarios.api import Scenario
from refault.scenarios.guest import GUEST_SLOT_SIZE, PML4, guest_memory
from refault.scenarios.layout import (
    DATA_GPA,
    DATA_SIZE,
    MORE_OFFSET,
    MORE_SIZE,
    SLOT0_OFFSET,
    SLOT0_OFFSET_HUGETLB,
    SLOT0_SIZE,
)
from refault.scenarios.live import libc, machine
from refault.scenarios.live.dirty import DirtySteps
from refault.scenarios.live.files import FileSteps
from refault.scenarios.live.guest import GuestSteps
from refault.scenarios.live.kvm import KVM_CAP_DIRTY_LOG_RING, KVM_MEM_LOG_DIRTY_PAGES, Vm
from refault.scenarios.live.memory import MemorySteps
from refault.scenarios.live.reclaim import ReclaimSteps
from refault.scenarios.live.slots import SlotSteps
from refault.scenarios.live.tracefs import TraceInstance
from refault.scenarios.live.uffd import UffdSteps
from refault.scenarios.normal import Normalizer, Recording

__all__ = ["KvmBackend", "run_on_kvm", "runs_natively"]

_BELOW = -SLOT0_OFFSET_HUGETLB
_VCPUS = range(1, 17)


class KvmBackend(MemorySteps, GuestSteps, FileSteps, SlotSteps, DirtySteps, ReclaimSteps, UffdSteps):
    """One VM for one scenario; `finish()` gives its recording."""

    def __init__(
        self, *, swap: str | None = "64M", dirty_ring: int = 0, guest_pages: str = "4K", slot_flags: int = 0,
        thp: bool = False, file: str = "", file_bytes: int = 0, hugetlb: str = "", vcpus: int = 1,
        params: Mapping[str, str] | None = None, **options: Any,
    ) -> None:
        if options:
            raise UsageError(f"a machine with {', '.join(options)} is the emulator's, not this one")
        if vcpus not in _VCPUS:
            raise UsageError(f"{vcpus} vCPUs: want 1 to {_VCPUS[-1]}")
        self.children = []
        self._pins = []
        self._undo = contextlib.ExitStack()
        try:
            self._undo.enter_context(machine.ending_in_order())
            self._stay_on_one_cpu()
            self._set_up_machine(swap, dict(params or {}))
            self.slot0_offset = SLOT0_OFFSET_HUGETLB if hugetlb else SLOT0_OFFSET
            self.data = self._reserve()
            self.normal = Normalizer(
                self.data, ((0, DATA_SIZE), (self.slot0_offset, self.slot0_offset + SLOT0_SIZE))
            )
            self.create_data(file, file_bytes, hugetlb)
            if not thp:
                self.madvise(0, DATA_SIZE, "NOHUGEPAGE")
            self._create_vm(guest_pages, slot_flags, dirty_ring, vcpus)
        except BaseException:
            self._undo.close()
            raise

    def _set_up_machine(self, swap: str | None, params: dict[str, str]) -> None:
        """Swap and the settings of the whole machine. UsageError for a parameter that is the emulator's."""
        device = params.pop("swap.device", "file")
        if swap is not None:
            make = {"file": machine.swap_file, "zram": machine.zram}.get(device)
            if make is None:
                raise UsageError(f"swap on a {device} is the emulator's, not this machine's")
            self._undo.enter_context(make(swap))
        for name, value in params.items():
            path = machine.SETTINGS.get(name)
            if path is None:
                raise UsageError(f"a machine with {name}={value} is the emulator's, not this one")
            self._undo.enter_context(machine.setting(path, value))

    def _reserve(self) -> int:
        """Address space for D and what lies around it, 2 MiB-aligned; the address of D."""
        size, align = _BELOW + MORE_OFFSET + MORE_SIZE, 2 << 20
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
        place = libc.mmap(0, size + align, 0, flags)
        self._undo.callback(libc.munmap, place, size + align)
        return ((place + align - 1) & ~(align - 1)) + _BELOW

    def _create_vm(self, guest_pages: str, slot_flags: int, dirty_ring: int, vcpus: int) -> None:
        self.vm = Vm()
        self._undo.callback(self.vm.close)
        if dirty_ring:
            self.vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, 16 * dirty_ring)
            slot_flags |= KVM_MEM_LOG_DIRTY_PAGES
        low = self._map(self.slot0_offset, SLOT0_SIZE)
        libc.madvise(low, SLOT0_SIZE, "NOHUGEPAGE")
        for gpa, content in guest_memory(guest_pages):
            libc.poke(low + gpa, content)
        self.vm.set_slot(0, 0, GUEST_SLOT_SIZE, low)
        self.vm.set_slot(1, DATA_GPA, DATA_SIZE, self.data, slot_flags)
        for _ in range(vcpus):
            self.vm.create_vcpu().start_in_long_mode(PML4)
        self.use_vcpu(0)
        self._run("nop")
        self._run("nop")
        self.stats = self.vm.stats()

    def _stay_on_one_cpu(self) -> None:
        """Else it is chance whether a page is still in an LRU batch of the CPU that it was touched on."""
        before = os.sched_getaffinity(0)
        self._undo.callback(os.sched_setaffinity, 0, before)
        os.sched_setaffinity(0, {max(before)})

    def record(self) -> None:
        """The event sequence begins here."""
        self.trace = self._undo.enter_context(contextlib.closing(TraceInstance()))
        self.trace.on()

    def mark(self, text: str) -> None:
        """A step's mark."""
        self.trace.mark(text)

    def begin(self) -> None:
        """Forget the events so far."""
        self.trace.on()

    def finish(self) -> Recording:
        """What tracefs has, and how the statistics moved."""
        self.trace.off()
        after = self.vm.stats()
        moved = {name: after[name] - before for name, before in self.stats.items() if after[name] != before}
        for event, text in self.trace.lines():
            if event == "mark":
                self.normal.mark(text)
            else:
                self.normal.event(event, text)
        return Recording(self.normal.lines, moved)

    def close(self) -> None:
        """Give everything back, whatever happened."""
        with self._undo:
            self._undo.callback(self.unpin)
            self._undo.callback(self._end_children)

    def _end_children(self) -> None:
        while self.children:
            self.child_exit()


def runs_natively() -> bool:
    """Whether a guest store at CPL 3 faults into KVM's MMU and lands in memory."""
    backend = KvmBackend(swap=None)
    try:
        before = backend.stats["pf_taken"]
        stored = backend.store(0x3000, 7) == "ok" and backend.host_read(0x3000) == 7
        return stored and backend.vm.stats()["pf_taken"] > before
    finally:
        backend.close()


def run_on_kvm(scenario: Callable[[Scenario], None], **options: Any) -> Recording:
    """Run a scenario to its end; its recording. UsageError or OSError where this machine cannot."""
    backend = KvmBackend(**options)
    try:
        backend.record()
        scenario(Scenario(backend))  # type: ignore[arg-type]
        return backend.finish()
    finally:
        backend.close()
