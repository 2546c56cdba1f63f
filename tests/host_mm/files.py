"""A file that two processes map: a memfd, or a real one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from host_mm.address_space import fput
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.backing_file import open_file
from host_mm.fork import exit_process
from host_mm.memfd import memfd_create
from host_mm.mmap import MAP_SHARED, do_mmap
from host_mm.process import Process
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, RW, make_host, run

HERE = 0x7FFF_0040_0000
THERE = 0x7FFE_0040_0000


class Shared:
    """A file of some pages, mapped in two processes: shared in `a`, and in `b` as asked.

    A memfd, or with `disk` a real file that holds these bytes at first.
    """

    def __init__(self, pages: int = 16, kind: int = MAP_SHARED, disk: bytes | None = None, **kw: Any) -> None:
        self.host = make_host(**kw)
        self.a, self.b = self.host.create_process("a"), self.host.create_process("b")
        if disk is None:
            self.file = memfd_create(self.host, "x", pages * PAGE)
        else:
            self.file = open_file(self.host, pages * PAGE)
            os.pwrite(self.file.private_data, disk, 0)
        self.at = do_mmap(self.a.mm, HERE, pages * PAGE, RW, MAP_SHARED, file=self.file)
        self.bt = do_mmap(self.b.mm, THERE, pages * PAGE, RW, kind, file=self.file)

    def do(self, *bodies: Callable[[], object]) -> None:
        """Each body as a task of its own."""
        run(self.host, *bodies)

    def quiet(self) -> None:
        """No I/O is under way any more and no batch holds a page."""
        self.do(self.host.swap_device.drain)
        self.do(self.host.file_device.drain)
        self.host.lru.lru_add_drain_all()

    def on_disk(self, offset: int, length: int) -> bytes:
        """What the real file has there."""
        return os.pread(self.file.private_data, length, offset)

    def end(self) -> None:
        """Everybody goes: nothing may be left."""
        self.quiet()
        audit(self.host)

        def leave() -> None:
            fput(self.file)
            for process in list(self.host.processes):
                exit_process(process)

        self.do(leave)
        self.quiet()
        audit(self.host)
        assert not self.host.mappings


def frame(process: Process, address: int) -> int:
    entry, level = lookup_address_in_mm(process.mm, address)
    assert level == 1
    return pte_pfn(entry)
