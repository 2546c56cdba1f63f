"""A host with a pool of huge pages, processes that map them, and a witness of the order of things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host_mm import mmu_notifier as mn
from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, AddressSpace, fput
from host_mm.arch.x86.pgtable import pte_present, pte_write, walk_lockless
from host_mm.host import HostMm
from host_mm.hugetlb_pool import set_max_huge_pages
from host_mm.hugetlbfs import hugetlb_file_setup
from host_mm.kernel.sched import RandomStrategy
from host_mm.mm_types import MmStruct, VmArea
from host_mm.mmap import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    do_mmap,
)
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import RW, make_host
from trace_events.stream import Listener

HUGE = 2 << 20
GIB = 1 << 30
BASE = 0x40000000
"""A multiple of 1 GiB, so that a mapping there can share its table."""
PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_FIXED


PUNCH_HOLE = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def fallocate(file: AddressSpace, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    file.a_ops.fallocate(file, mode, offset, length)


def truncate(file: AddressSpace, size: int) -> None:
    """ftruncate(2)."""
    file.a_ops.set_size(file, size)


class Witness(mn.MmuNotifier):
    """Writes down brackets, changes of huge-page entries, primary flushes and frees, as they come."""

    def __init__(self, host: HostMm, mm: MmStruct) -> None:
        self.log: list[str] = []
        self.ranges: list[tuple[str, int, int, int]] = []
        host.pmd_hooks.append(
            lambda where, _, old, new: self.log.append(self.kind(old, new)) if where is mm else None
        )
        names = {"primary_flush": "flush", "frame_free": "free"}
        host.stream.listen(Listener(
            [f"refault:{name}" for name in names],
            lambda event: self.log.append(names[event.name])
            if event.args.get("pid", mm.process.pid) == mm.process.pid else None,
            ancestors=False,
        ))
        assert mmu_notifier_register(self, mm) == 0

    @staticmethod
    def kind(old: int, new: int) -> str:
        if not new:
            return "clear"
        if not pte_present(new):
            return "swap-entry"
        if pte_present(old) and pte_write(old) and not pte_write(new):
            return "protect"
        return "set"

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        self.log.append("start")
        self.ranges.append((mn.EVENT_NAMES[range_.event], range_.start, range_.end, range_.order))
        return 0

    def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
        self.log.append("end")

    def take(self) -> tuple[list[str], list[tuple[str, int, int, int]]]:
        """What was seen since the last call: the order, and the brackets."""
        seen = self.log, self.ranges
        self.log, self.ranges = [], []
        return seen


class Machine:
    """One host. Every step runs in a task of its own and is followed by an audit."""

    def __init__(self, pages: int = 8, *, ram: int = 48 << 20, seed: int | None = None, **kw: Any) -> None:
        self.host = make_host(ram=ram, swap=None, **kw)
        self.host.sched.lockdep = {}
        if seed is not None:
            self.host.sched.set_strategy(RandomStrategy(seed, 2))
        assert set_max_huge_pages(self.host, pages) == pages
        self.files: list[AddressSpace] = []

    def do(self, call: Callable[[], Any]) -> Any:
        """Run a step to its end and audit the host."""
        result = self.host.sched.run_task("step", call)
        self.host.lru.lru_add_drain_all()
        audit(self.host)
        return result

    @property
    def pool(self) -> tuple[int, int, int]:
        """Free, reserved, surplus."""
        h = self.host.hstate
        return h.free, h.resv, h.surplus

    def file(self, pages: int) -> AddressSpace:
        """A file of so many huge pages, open until close()."""
        mapping = hugetlb_file_setup(self.host, "f", pages * HUGE)
        self.files.append(mapping)
        return mapping

    def process(self) -> Process:
        """An empty process."""
        return self.host.create_process("p")

    def private(self, process: Process, pages: int, at: int = BASE, flags: int = 0, prot: int = RW) -> int:
        """Private anonymous huge pages."""
        return int(self.do(lambda: do_mmap(process.mm, at, pages * HUGE, prot, PRIVATE | flags)))

    def shared(
        self, process: Process, file: AddressSpace, pages: int, at: int = BASE, *, first: int = 0,
        flags: int = MAP_NORESERVE, prot: int = RW, kind: int = MAP_SHARED,
    ) -> int:
        """A mapping of the file from huge page `first` on."""
        return int(self.do(lambda: do_mmap(
            process.mm, at, pages * HUGE, prot, kind | MAP_FIXED | flags, file=file, pgoff=first << 9
        )))

    def write(self, process: Process, address: int, data: bytes) -> None:
        """The process stores."""
        self.do(lambda: copy_to_user(process, address, data))

    def read(self, process: Process, address: int, length: int = 1) -> bytes:
        """The process loads."""
        return bytes(self.do(lambda: copy_from_user(process, address, length)))

    def vma(self, process: Process, address: int = BASE) -> VmArea:
        """The VMA there."""
        vma = process.mm.vma_lookup(address)
        assert vma is not None
        return vma

    def entry(self, process: Process, address: int) -> int:
        """The leaf entry there, which is of level 2, or 0."""
        entry, level = walk_lockless(self.host.ram, process.mm.pgd, address)
        assert not entry or level == 2
        return entry

    def close(self) -> None:
        """Everybody goes; nothing may be left but the pool, and that is whole."""
        from host_mm.fork import exit_process

        for process in list(self.host.processes):
            self.do(lambda process=process: exit_process(process))
        for file in self.files:
            self.do(lambda file=file: fput(file))
        assert not self.host.mappings
        h = self.host.hstate
        assert (h.free, h.resv, h.surplus, len(h.active)) == (h.nr, 0, 0, 0)
        whole = self.host.allocator.nr_free_pages() + 512 * h.nr
        self.do(lambda: set_max_huge_pages(self.host, 0))
        assert self.host.allocator.nr_free_pages() == whole
