"""Scenarios on the emulator.

A guest access sets the registers, enters, and reads what came out. EPT accessed/dirty flags are off,
so that the walk reads guest tables as shadow paging does, which the recordings were made with.

    slot 0, 2 MiB at gpa 0: what guest.py says
    slot 1, 8 MiB at gpa 0x10000000: D, whose hva is 0xa00000 below slot 0's
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any

from emu.hostops import OPERATIONS, perform
from emu.loaders.image import BOOT_GDT, Image
from host_mm.kernel.errors import KernelError
from refault.scenarios.api import DATA_GPA, DATA_SIZE, PAGE, Scenario
from refault.scenarios.emulator_dirty import DirtySteps
from refault.scenarios.emulator_files import FileSteps
from refault.scenarios.emulator_hugetlb import SLOT0_OFFSET_HUGETLB, HugetlbSteps
from refault.scenarios.emulator_migrate import MigrateSteps
from refault.scenarios.emulator_reclaim import ReclaimSteps
from refault.scenarios.emulator_uffd import UffdSteps
from refault.scenarios.guest import ENTRY, RFLAGS_IOPL3, USER_STACK, guest_memory
from refault.scenarios.normal import HOST_EVENTS, SLOT0_OFFSET, SLOT0_SIZE, format_range
from refault.vm import VM
from trace_events.stream import Listener

if TYPE_CHECKING:
    from collections.abc import Callable

    from emu.vmm import Vmm
    from trace_events.event import Event

__all__ = ["EmulatorBackend", "run_on_emulator"]

IRET_FRAME = 0x7000
USER_CS, USER_SS = 0x1B, 0x13


def _image() -> Image:
    gdt = struct.pack("<4Q", 0, 0x00AF9B000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
    frame = struct.pack("<5Q", ENTRY["nop"], USER_CS, RFLAGS_IOPL3, USER_STACK, USER_SS)
    return Image(
        kind="scenario", mode="long", entry=ENTRY["to_user"], end=SLOT0_SIZE,
        segments=[(BOOT_GDT, gdt), (IRET_FRAME, frame), *guest_memory()], registers={"rsp": IRET_FRAME},
    )


class EmulatorBackend(DirtySteps, FileSteps, HugetlbSteps, MigrateSteps, ReclaimSteps, UffdSteps):
    """One machine for one scenario. `lines` is the normalised sequence, `events` the trace."""

    def __init__(self, **options: Any) -> None:
        hugetlb, file = options.pop("hugetlb", ""), options.pop("file", "")
        ring = options.pop("dirty_ring", 0)
        params = {"kvm_intel.eptad": "0", **options.pop("params", {})}
        if ring:
            params["vmm.dirty_ring_size"] = str(ring)
        self.vm = VM("2M", params=params, **{"host_ram": "64M", "swap": "64M", **options})
        board = self.board = self.vm.board
        slot0 = board.memory.regions[0]
        self.slot0_offset = SLOT0_OFFSET_HUGETLB if hugetlb else SLOT0_OFFSET
        self.data_hva = slot0.hva - self.slot0_offset
        self.vm.host._board.host.sched.run_task("vmm", lambda: self._create_data(hugetlb, file))
        if ring:
            self.log_dirty(True)
        board.load(_image())
        self.vm.run()
        self._run("nop")
        self.lines: list[str] = []
        self.events: list[Event] = []
        self.child: Vmm | None = None
        self.pinned: list[int] = []
        board.host.stream.listen(Listener(("*",), self._note))

    def _create_data(self, hugetlb: str, file: str) -> None:
        if hugetlb:
            self.create_hugetlb(hugetlb)
        elif file:
            self.create_file(file)
        else:
            self.board.memory.create(DATA_GPA, DATA_SIZE, self.data_hva)

    def close(self) -> None:
        """Destroy the machine."""
        self.vm.finish()
        self.close_hugetlb()
        self.unpin()
        self.uffd_close()
        if self.child is not None:
            self._host(self.child.exit)
        self.vm.close()

    def _note(self, event: Event) -> None:
        self.events.append(event)
        if event.system != "kvm" or event.name not in HOST_EVENTS:
            return
        start = event.args["hva"] if "hva" in event.args else event.args["start"]
        end = event.args.get("end", start)
        first, last = start - self.data_hva, end - self.data_hva
        if (start, end) != (0, (1 << 64) - 1) and not (
            (last > 0 and first < DATA_SIZE)
            or (last > self.slot0_offset and first < self.slot0_offset + SLOT0_SIZE)
        ):
            return
        absolute = (start, end) == (0, (1 << 64) - 1)
        self.lines.append(format_range(event.name, start if absolute else first, end if absolute else last))

    # -- guest --------------------------------------------------------------------------------

    def _run(self, snippet: str, **registers: int) -> str:
        board = self.board
        cpu, vcpu = board.cpu, board.vcpus[0]
        for name, value in {"rip": ENTRY[snippet], "rsp": USER_STACK, **registers}.items():
            cpu.set_reg(vcpu, name, value)
        board.stop = None
        stop = board.run(lambda: False)
        if stop.kind == "exit":
            return "ok"
        return "EFAULT" if "EFAULT" in stop.why else stop.kind

    def load(self, offset: int) -> Any:
        """A guest load."""
        result = self._run("load", rsi=DATA_GPA + offset)
        return self.board.cpu.get_reg(self.board.vcpus[0], "rax") if result == "ok" else result

    def store(self, offset: int, value: int) -> Any:
        """A guest store."""
        return self._run("store", rdi=DATA_GPA + offset, rax=value)

    def read_modify_write(self, offset: int) -> Any:
        """A guest inc."""
        return "IO" if self._run("read_modify_write", rdi=DATA_GPA + offset) == "ok" else "EFAULT"

    # -- host ---------------------------------------------------------------------------------

    def mark(self, text: str) -> None:
        """A step's mark."""
        self.lines.append(text.rstrip())

    def _host(self, call: Callable[[], Any]) -> Any:
        try:
            return self.board.host.sched.run_task("vmm", call)
        except KernelError as exc:
            return f"errno {exc.name}"

    def host_write(self, offset: int, value: int) -> Any:
        """The VMM stores."""
        vmm = self.board.vmm
        return self._host(lambda: vmm.write(self.data_hva + offset, struct.pack("<Q", value)))

    def host_read(self, offset: int) -> Any:
        """The VMM loads."""
        vmm = self.board.vmm
        return self._host(lambda: struct.unpack("<Q", vmm.read(self.data_hva + offset, 8))[0])

    def madvise(self, offset: int, length: int, advice: str) -> Any:
        """madvise(2): the recordings show "ok", and 0 for the fork advices."""
        from host_mm import madvise

        number = getattr(madvise, f"MADV_{advice}")
        result = self._host(lambda: self.board.vmm.madvise(self.data_hva + offset, length, number))
        if isinstance(result, str):
            return result
        self._host(self.board.vmm.wait_for_writeback)
        return 0 if advice in ("DONTFORK", "DOFORK") else "ok"

    def mprotect(self, offset: int, length: int, prot: int) -> Any:
        """mprotect(2): 0 or -1."""
        result = self._host(lambda: self.board.vmm.mprotect(self.data_hva + offset, length, prot))
        return -1 if result else 0

    def munmap(self, offset: int, length: int) -> Any:
        """munmap(2)."""
        return self._host(lambda: self.board.vmm.munmap(self.data_hva + offset, length)) or 0

    def mmap_fixed(self, offset: int, length: int) -> Any:
        """mmap(MAP_FIXED): the offset it is at."""
        at = self._host(lambda: self.board.vmm.mmap(length, 3, self.data_hva + offset))
        return at if isinstance(at, str) else hex(at - self.data_hva)

    def mlock(self, offset: int, length: int) -> Any:
        """mlock(2)."""
        return self._host(lambda: self.board.vmm.mlock(self.data_hva + offset, length)) or 0

    def munlock(self, offset: int, length: int) -> Any:
        """munlock(2)."""
        return self._host(lambda: self.board.vmm.munlock(self.data_hva + offset, length)) or 0

    def fork(self) -> Any:
        """fork(2)."""
        self.child = self._host(self.board.vmm.fork)
        return "child"

    def child_exit(self) -> Any:
        """The child's exit."""
        assert self.child is not None
        self._host(self.child.exit)
        self.child = None
        return 0

    def clear_refs(self, kind: int) -> Any:
        """clear_refs."""
        return self._host(lambda: self.board.vmm.clear_refs(kind))

    def pin(self, offset: int) -> Any:
        """A long-term pin."""
        pfn = self._host(lambda: self.board.vmm.pin(self.data_hva + offset))
        if isinstance(pfn, str):
            return pfn
        self.pinned.append(pfn)
        return 0

    def unpin(self) -> Any:
        """Pins back."""
        pinned, self.pinned = self.pinned, []
        for pfn in pinned:
            self._host(functools.partial(self.board.vmm.unpin, pfn))
        return 0

    def fill(self, offset: int, byte: int) -> Any:
        """The VMM fills a page."""
        vmm = self.board.vmm
        return self._host(lambda: vmm.write(self.data_hva + offset, bytes([byte]) * PAGE))

    def mergeable(self, offset: int, length: int) -> Any:
        """MADV_MERGEABLE."""
        result = self.madvise(offset, length, "MERGEABLE")
        return 0 if result == "ok" else result

    def ksmd(self, use_zero_pages: bool) -> Any:
        """ksmd runs."""
        self._host(lambda: self.board.vmm.ksm_scan(use_zero_pages=use_zero_pages))
        return "done" if use_zero_pages else "pages_sharing"

    def operation(self, name: str, *args: int) -> Any:
        """A host operation of the registry."""
        op = OPERATIONS.get(name)
        if op is not None and args and op.args[:1] and op.args[0].startswith("gpa"):
            args = (DATA_GPA + args[0], *args[1:])
        return self._host(lambda: perform(self.board, name, *args))

    def begin(self) -> None:
        """Forget the lines so far."""
        self.lines.clear()


def run_on_emulator(scenario: Callable[[Scenario], None], **options: Any) -> EmulatorBackend:
    """Run a scenario to its end; `lines` of the result is its normalised sequence."""
    backend = EmulatorBackend(**options)
    try:
        scenario(Scenario(backend))
    except BaseException:
        # A machine that broke in the middle may never come to rest.
        backend.vm.abandon()
        raise
    backend.close()
    return backend
