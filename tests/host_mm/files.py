"""A memfd that two processes map."""

from __future__ import annotations

from typing import Any

from host_mm.address_space import fput
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.fork import exit_process
from host_mm.mmap import MAP_SHARED, do_mmap
from host_mm.process import Process
from host_mm.shmem import memfd_create
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, RW, make_host

HERE = 0x7FFF_0040_0000
THERE = 0x7FFE_0040_0000


class Shared:
    """A memfd of some pages, mapped in two processes: shared in `a`, and in `b` as asked."""

    def __init__(self, pages: int = 16, kind: int = MAP_SHARED, **kw: Any) -> None:
        self.host = make_host(**kw)
        self.a, self.b = self.host.create_process("a"), self.host.create_process("b")
        self.file = memfd_create(self.host, "x", pages * PAGE)
        self.at = do_mmap(self.a.mm, HERE, pages * PAGE, RW, MAP_SHARED, file=self.file)
        self.bt = do_mmap(self.b.mm, THERE, pages * PAGE, RW, kind, file=self.file)

    def end(self) -> None:
        """Everybody goes: nothing may be left."""
        fput(self.file)
        audit(self.host)
        for process in list(self.host.processes):
            exit_process(process)
        audit(self.host)
        assert not self.host.mappings


def frame(process: Process, address: int) -> int:
    entry, level = lookup_address_in_mm(process.mm, address)
    assert level == 1
    return pte_pfn(entry)
