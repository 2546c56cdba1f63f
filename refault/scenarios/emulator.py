"""Scenarios on the emulator.

A guest access sets the registers, enters, and reads what came out. The recordings were made with shadow
paging; with EPT its accessed/dirty flags are off, so that the walk reads guest tables as shadow paging does.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any

from emu.hostops import OPERATIONS, perform
from host_mm.kernel.errors import KernelError
from host_mm.page import PG_anon, PG_swapcache, folio_mapcount, page_folio
from refault.registry import find_tracepoint
from refault.scenarios.api import Scenario
from refault.scenarios.emulator_dirty import DirtySteps
from refault.scenarios.emulator_files import FileSteps
from refault.scenarios.emulator_gmem import GmemSteps
from refault.scenarios.emulator_guest import GuestSteps
from refault.scenarios.emulator_migrate import MigrateSteps
from refault.scenarios.emulator_reclaim import ReclaimSteps
from refault.scenarios.emulator_slots import SlotSteps
from refault.scenarios.emulator_uffd import UffdSteps
from refault.scenarios.layout import (
    DATA_GPA,
    DATA_SIZE,
    PAGE,
    SLOT0_OFFSET,
    SLOT0_OFFSET_HUGETLB,
    SLOT0_SIZE,
)
from refault.scenarios.normal import Normalizer, Recording, host_side
from refault.vm import VM
from trace_events.stream import Listener
from trace_events.text import format_args

if TYPE_CHECKING:
    from collections.abc import Callable

    from emu.vmm import Vmm
    from trace_events.event import Event

__all__ = ["EmulatorBackend", "run_on_emulator"]

_LIKE_THE_RECORDINGS = {
    "kvm_intel.eptad": "0", "kvm.mmio_caching": "N", "mm.nr_cpus": "1", "mm.soft_dirty": "N",
}
"""What the kernel of the recordings was built with, and what takes the place of its shadow paging."""


class EmulatorBackend(
    GuestSteps, SlotSteps, GmemSteps, DirtySteps, FileSteps, MigrateSteps, ReclaimSteps, UffdSteps
):
    """One machine for one scenario. `recording()` is the normalised sequence, `events` the trace."""

    def __init__(
        self, *, hugetlb: str = "", file: str = "", dirty_ring: int = 0, guest_pages: str = "4K",
        slot_flags: int = 0, file_bytes: int = 0, thp: bool = False, mmu: str = "shadow", **options: Any,
    ) -> None:
        params = {**_LIKE_THE_RECORDINGS, **options.pop("params", {})}
        if dirty_ring:
            params["vmm.dirty_ring_size"] = str(dirty_ring)
        self.vm = VM("2M", params=params, mmu=mmu, **{"host_ram": "64M", "swap": "64M", **options})
        board = self.board = self.vm.board
        self.slot0_offset = SLOT0_OFFSET_HUGETLB if hugetlb else SLOT0_OFFSET
        self.data_hva = board.memory.regions[0].hva - self.slot0_offset
        slot0 = (self.slot0_offset, self.slot0_offset + SLOT0_SIZE)
        self.normal = Normalizer(self.data_hva, ((0, DATA_SIZE), slot0))
        self.normal.generation = board.host.mm.pages.generation.__getitem__
        self.normal.given_up = self._given_up
        self.events: list[Event] = []
        self._recording: Recording | None = None
        self.children: list[Vmm] = []
        self.pinned: list[int] = []
        board.host.sched.run_task("vmm", lambda: self._create_data(hugetlb, file, file_bytes, slot_flags))
        if not thp:
            self.madvise(0, DATA_SIZE, "NOHUGEPAGE")
        if dirty_ring:
            self.log_dirty(True)
        self.start_guest(guest_pages)
        self.stats_before = self._stats()
        board.host.stream.listen(Listener(("*",), self._note))

    def _create_data(self, hugetlb: str, file: str, file_bytes: int, flags: int) -> None:
        if hugetlb:
            self.create_hugetlb(hugetlb)
        elif file:
            self.create_file(file, file_bytes)
        else:
            self.board.memory.create(DATA_GPA, DATA_SIZE, self.data_hva, flags)

    def close(self) -> None:
        """Destroy the machine."""
        self._recording = self.recording()
        self.vm.finish()
        self.close_hugetlb()
        self.unpin()
        self.uffd_close()
        while self.children:
            self.child_exit()
        self.vm.close()

    def _note(self, event: Event) -> None:
        self.events.append(event)
        if event.system in ("kvm", "kvmmmu"):
            self.normal.event(event.name, format_args(event, find_tracepoint(event.event)))
        elif event.event == "refault:frame_free":
            for pfn in range(event.args["pfn"], event.args["pfn"] + (1 << event.args["order"])):
                self.normal.frame_freed(pfn)

    def _given_up(self, pfn: int) -> bool:
        pages = self.board.host.mm.pages
        head = page_folio(pages, pfn)
        flags = pages.flags[head]
        kept = flags & PG_swapcache or (pages.mapping.get(head) is not None and not flags & PG_anon)
        return not kept and pages.refcount[head] <= 1 and not folio_mapcount(pages, head)

    @property
    def lines(self) -> list[str]:
        """The host's side of the sequence: steps and notifier events."""
        return host_side(self.normal.lines)

    def recording(self) -> Recording:
        """The whole sequence, and what KVM counted since the machine stood."""
        if self._recording is not None:
            return self._recording
        now = self._stats()
        moved = {name: now[name] - before for name, before in self.stats_before.items()}
        moved = {name: n for name, n in moved.items() if n}
        return Recording(list(self.normal.lines), moved, dict(self.normal.freed))

    def _stats(self) -> dict[str, int]:
        kvm = self.board.kvm
        total = dict(kvm.stat)
        for vcpu in kvm.vcpus:
            for name, value in vcpu.stat.items():
                total[name] = total.get(name, 0) + value
        return total

    # -- host ---------------------------------------------------------------------------------

    def mark(self, text: str) -> None:
        """A step's mark."""
        self.normal.mark(text)

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
        self._host(self.board.host.admin.wait_for_writeback)
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

    def mremap(self, offset: int, length: int, to: int) -> Any:
        """mremap(2) to a fixed place."""
        at, new = self.data_hva + offset, self.data_hva + to
        result = self._host(lambda: self.board.vmm.mremap(at, length, length, 3, new))
        return result if isinstance(result, str) else hex(result - self.data_hva)

    def mlock(self, offset: int, length: int) -> Any:
        """mlock(2)."""
        return self._host(lambda: self.board.vmm.mlock(self.data_hva + offset, length)) or 0

    def munlock(self, offset: int, length: int) -> Any:
        """munlock(2)."""
        return self._host(lambda: self.board.vmm.munlock(self.data_hva + offset, length)) or 0

    def fork(self) -> Any:
        """fork(2)."""
        self.children.append(self._host(self.board.vmm.fork))
        return "child"

    def child_exit(self) -> Any:
        """The last child's exit."""
        self._host(self.children.pop().exit)
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
        self._host(lambda: self.board.host.admin.ksm_scan(use_zero_pages=use_zero_pages))
        return "done" if use_zero_pages else "pages_sharing"

    def operation(self, name: str, *args: int) -> Any:
        """A host operation of the registry."""
        op = OPERATIONS.get(name)
        if op is not None and args and op.args[:1] and op.args[0].startswith("gpa"):
            args = (DATA_GPA + args[0], *args[1:])
        return self._host(lambda: perform(self.board, name, *args))

    def settle(self) -> None:
        """Empty every CPU's LRU batches."""
        self._host(self.board.host.mm.lru.lru_add_drain_all)

    def begin(self) -> None:
        """Forget the lines so far."""
        self.normal.clear()


def run_on_emulator(scenario: Callable[[Scenario], None], **options: Any) -> EmulatorBackend:
    """Run a scenario to its end; `recording()` of the result is what it did."""
    backend = EmulatorBackend(**options)
    try:
        scenario(Scenario(backend))
    except BaseException:
        # A machine that broke in the middle may never come to rest.
        backend.vm.abandon()
        raise
    backend.close()
    return backend
