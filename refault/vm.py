"""`refault.VM`: a machine as a Python object.

    vm = refault.VM(memory="64M", seed=1)
    vm.load("swap-storm")
    with vm.trace("kvm:*", "refault:*") as tr:
        vm.run(until=refault.HALT)
        vm.host.swap_out(gpa=0x200000, pages=16)
        vm.run()
    print(vm.walk(gva=0x400000))
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu.board import Board, Stop
from emu.config import MachineConfig
from emu.hostops import OPERATIONS, perform
from emu.inspector import WalkTree, walk_gpa, walk_gva
from emu.loaders import load_image
from emu.loaders.image import LoaderError
from emu.shadow_inspector import shadow_walk_gpa, shadow_walk_gva
from refault.errors import UsageError
from refault.header import check_words, make_header, read_payload
from refault.host_machine import HostMachine, as_bytes
from trace_events.ndjson import Trace, write_trace
from trace_events.stream import Listener

if TYPE_CHECKING:
    from emu.loaders.image import Image
    from refault.analysis import Analysis, Refault
    from trace_events.event import Event

__all__ = ["HALT", "VM", "HostCalls", "Recording"]

MAX_VCPUS = 64
HALT = "halt"
"""For `VM.run(until=HALT)`: stop when every started vCPU waits in HLT."""


class Recording:
    """The events of one `with vm.trace(...)` block. Equal recordings hold equal events."""

    def __init__(self, header: dict[str, Any], globs: tuple[str, ...]) -> None:
        self.header = header
        self.globs = globs
        self.events: list[Event] = []

    def trace(self) -> Trace:
        """The events as a trace, by number."""
        return Trace(self.header, sorted(self.events, key=lambda e: e.seq))

    def analysis(self) -> Analysis:
        """Questions to the events."""
        from refault.analysis import Analysis

        return Analysis(self.events)

    def refaults(self) -> list[Refault]:
        """(zap, fault) pairs, in the order of the faults."""
        return self.analysis().refaults()

    def save(self, path: str | Path) -> None:
        """Write a trace file."""
        write_trace(path, self.trace())

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recording) and self.trace().events == other.trace().events

    __hash__ = None  # type: ignore[assignment]


class HostCalls:
    """The host operations as methods: `vm.host.swap_out(gpa=0x200000, pages=16)`."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name.startswith("_") or name not in OPERATIONS:
            raise AttributeError(f"no host operation named {name!r}; see `refault list operations`")

        def call(*args: Any, **kwargs: Any) -> int:
            board = self._board
            result: int = board.host.sched.run_task(
                f"host {name}", lambda: perform(board, name, *args, **kwargs)
            )
            return result

        call.__doc__ = OPERATIONS[name].summary
        return call

    def __dir__(self) -> list[str]:
        return sorted(OPERATIONS)


BACKENDS = ("anon", "memfd", "hugetlb")
HPAGE_SIZE = 2 << 20
MMUS = ("ept", "shadow")


def _check(memory: int, vcpus: int, mmu: str, memory_backend: str) -> None:
    if memory_backend not in BACKENDS and not memory_backend.removeprefix("file:") != memory_backend:
        raise UsageError(f"memory_backend {memory_backend!r}: want {', '.join(BACKENDS)} or file:PATH")
    if memory_backend == "hugetlb" and memory % HPAGE_SIZE:
        raise UsageError(f"memory {memory}: not a multiple of 2 MiB, as huge pages are")
    if memory <= 0 or memory % 4096:
        raise UsageError(f"memory {memory}: not a positive multiple of 4 KiB")
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UsageError(f"vcpus {vcpus}: not a number from 1 to {MAX_VCPUS}")
    if mmu not in MMUS:
        raise UsageError(f"mmu {mmu!r}: want {' or '.join(MMUS)}")


class VM:
    """A VM. Without `on` it gets a private host of `host_ram` and `swap`.

    Sizes are bytes or text such as "64M". `memory_backend` is what the guest's RAM is to the host: "anon",
    "memfd" (shared memory), "hugetlb" (a memfd of huge pages; a private host's pool has enough of them) or
    "file:PATH" (a file, mapped shared). `mmu` is "ept", or "shadow" for a CPU without EPT, below whose guest
    KVM makes tables of the guest's own; `profile` names the kernel, see `refault list
    profiles` (default: the host's, linux-6.18 for a private one). `interpreted` runs the page walk in
    Python: slower, the same bytes of trace. `output` gets the guest's serial bytes.
    """

    def __init__(
        self,
        memory: int | str = "64M",
        *,
        memory_backend: str = "anon",
        host_ram: int | str | None = None,
        swap: int | str | None = "auto",
        vcpus: int = 1,
        mmu: str = "ept",
        profile: str | None = None,
        params: dict[str, str] | None = None,
        seed: int = 1,
        breaks: frozenset[str] | set[str] = frozenset(),
        check: bool = False,
        interpreted: bool = False,
        output: Callable[[bytes], None] = lambda data: None,
        on: HostMachine | None = None,
    ) -> None:
        memory_bytes = as_bytes(memory)
        assert memory_bytes is not None
        _check(memory_bytes, vcpus, mmu, memory_backend)
        private = on is None
        if on is None:
            swap = memory_bytes if swap == "auto" else swap
            if memory_backend == "hugetlb":
                params = {"hugetlb.nr_hugepages": str(memory_bytes // HPAGE_SIZE)} | (params or {})
            on = HostMachine(
                host_ram or 2 * memory_bytes, swap, seed=seed, profile=profile or "linux-6.18", params=params,
                breaks=breaks, check=check,
            )
        machine = on.machine
        if profile not in (None, machine.profile):
            raise UsageError(f"the host is a {machine.profile}, its VMs cannot be of {profile!r}")
        self._host = on
        self._private = private
        self.config = MachineConfig(
            memory=memory_bytes, memory_backend=memory_backend, host_ram=on.ram, swap=on.swap, vcpus=vcpus,
            mmu=mmu, profile=machine.profile, params=dict(machine.params), seed=machine.seed,
            breaks=tuple(sorted(machine.breaks)), checks=on.check,
        )
        self.board = Board(machine, self.config, interpreted=interpreted, output=output)
        self.host = HostCalls(self.board)
        self.payload: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}

    # -- guest --------------------------------------------------------------------------------

    def load(self, payload: str | bytes, *words: str) -> None:
        """Load a payload by name, a file by path (ELF, multiboot, flat, FILE.s), or an image's bytes.

        `words` are NAME=VALUE parameters for the payload's command line.
        """
        self.board.load(self.prepare(payload, *words))

    def prepare(self, payload: str | bytes, *words: str) -> Image:
        """The image of a payload, noted in this machine's header but not yet in guest memory."""
        name, data = ("bytes", payload) if isinstance(payload, bytes) else (payload, read_payload(payload))
        check_words(name, words)
        cmdline = " ".join((Path(name).name, *words))
        self.payload = {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "words": list(words)}
        try:
            return load_image(data, self.config.memory, cmdline)
        except LoaderError as exc:
            raise UsageError(f"{name}: {exc}") from None

    def run(
        self, until: str | Callable[[], bool] | None = None, *, max_insns: int | None = None,
        timeout: float | None = None,
    ) -> Stop:
        """Run until the guest stops, `until` holds, or a limit is met; say why.

        `until` is HALT or a function asked between the tasks' turns. `max_insns` counts this
        call's guest instructions over all vCPUs; `timeout` is seconds of real time.
        """
        board = self.board
        deadline = None if timeout is None else time.monotonic() + timeout
        budget = None if max_insns is None else board.cpu.instructions + max_insns
        limit: list[Stop] = []

        def done() -> bool:
            if until == HALT:
                if board.all_halted():
                    limit.append(Stop("halt", why="every started vCPU is in HLT"))
                    return True
            elif callable(until) and until():
                limit.append(Stop("pause", why="the caller's condition holds"))
                return True
            if budget is not None and board.cpu.instructions >= budget:
                limit.append(Stop("limit", why=f"the limit of {max_insns} instructions is reached"))
                return True
            if deadline is not None and time.monotonic() > deadline:
                limit.append(Stop("timeout", why=f"the limit of {timeout:g} s of real time is reached"))
                return True
            return False

        slice_insns = board.cpu.slice_insns
        if max_insns is not None:
            board.cpu.slice_insns = max(1, min(slice_insns, max_insns))
        try:
            stop = board.run(done)
        finally:
            board.cpu.slice_insns = slice_insns
        return stop if stop.kind != "pause" or not limit else limit[0]

    def start_cpu(self, cpu: int, entry: int, stack: int, arg: int = 0) -> None:
        """Start another vCPU in 64-bit mode with vCPU 0's control registers."""
        self.board.start_cpu(cpu, entry, stack, arg)

    def read(self, gpa: int, length: int) -> bytes:
        """Guest memory, read by the VMM: faults pages in as any access of the process does."""
        sched = self._host.machine.sched
        data: bytes = sched.run_task("host read", lambda: self.board.memory.read(gpa, length))
        return data

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory as the VMM."""
        self._host.machine.sched.run_task("host write", lambda: self.board.memory.write(gpa, data))

    @property
    def serial(self) -> str:
        """Everything the guest wrote to its serial port."""
        return self.board.serial_bytes.decode("utf-8", "replace")

    def regs(self, vcpu: int = 0) -> dict[str, int]:
        """The general registers, rip, rflags and control registers of a vCPU."""
        cpu, v = self.board.cpu, self.board.vcpus[vcpu]
        names = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
        return {name: cpu.get_reg(v, name) for name in (*names.split(), "cr0", "cr2", "cr3", "cr4", "efer")}

    # -- looking ------------------------------------------------------------------------------

    def walk(self, *, gva: int | None = None, gpa: int | None = None, vcpu: int = 0) -> WalkTree:
        """Translate an address through both stages (`gpa`: the second only) without touching anything.

        With mmu="shadow": through the guest's tables and KVM's; of a gpa every entry of KVM's that maps it.
        """
        if (gva is None) == (gpa is None):
            raise TypeError("walk() wants gva=... or gpa=...")
        if not 0 <= vcpu < len(self.board.vcpus):
            raise IndexError(f"no vCPU {vcpu}; the machine has {len(self.board.vcpus)}")
        for address in (gva, gpa):
            if address is not None and not 0 <= address < 1 << 64:
                raise ValueError(f"{address:#x} is no address: walk() wants 64 bits")
        shadow = self.config.mmu == "shadow"
        if gpa is not None:
            return shadow_walk_gpa(self.board, gpa) if shadow else walk_gpa(self.board, gpa, vcpu)
        assert gva is not None
        return (shadow_walk_gva if shadow else walk_gva)(self.board, gva, vcpu)

    @contextmanager
    def trace(self, *globs: str) -> Iterator[Recording]:
        """Record the events whose names match any of `globs` (none: all), with their causes."""
        recording = Recording(self.header(globs or ("*",)), globs or ("*",))
        listener = Listener(recording.globs, recording.events.append)
        stream = self._host.machine.stream
        stream.listen(listener)
        try:
            yield recording
        finally:
            stream.unlisten(listener)
            recording.header = self.header(recording.globs)

    def header(self, globs: tuple[str, ...] = ("*",)) -> dict[str, Any]:
        """The trace header of this machine: all that is needed to build it again."""
        return make_header(self, globs)

    @property
    def stat(self) -> dict[str, int]:
        """KVM's statistics under the kernel's names, the vCPUs' added up."""
        stat = dict(self.board.kvm.stat)
        for vcpu in self.board.vcpus:
            for name, value in vcpu.stat.items():
                stat[name] = stat.get(name, 0) + value
        return stat

    @property
    def vmstat(self) -> dict[str, int]:
        """The host's /proc/vmstat counters."""
        return dict(self._host.machine.mm.vmstat)

    def finish(self) -> None:
        """Check every truth once more, over everything; BrokenTruth if one does not hold."""
        checker = self._host.machine.checker
        if checker is not None:
            checker.sweep()

    def close(self) -> None:
        """Destroy the VM and, if it is private, its host."""
        if self._private:
            self._host.close()
        elif self.board in self._host.machine.boards:
            self.board.close()

    def abandon(self) -> None:
        """Drop everything as it stands: for a machine that is frozen or broken in the middle."""
        self._host.abandon()

    def __enter__(self) -> VM:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: object, tb: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __repr__(self) -> str:
        c = self.config
        return f"<VM {c.memory >> 20} MiB on {c.host_ram >> 20} MiB, {c.vcpus} vCPU, {c.mmu}>"
