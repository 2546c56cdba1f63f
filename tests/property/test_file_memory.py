"""A guest whose memory is a file's, under random operations, against an array of bytes.

The guest's loads must show what the oracle has: the file's bytes, and in a private mapping the copies of
pages that were written through it. In the end the real file must have the file's bytes. All truths are on.
"""

from __future__ import annotations

import random
import struct

import pytest

from emu import files
from host_mm.kernel.errors import KernelError
from refault.scenarios.api import PAGE
from refault.scenarios.emulator import EmulatorBackend

PAGES = 24
"""Pages of the file that are used: small enough that operations meet."""


class Machine:
    """The guest and the oracle. `kind` is that of the scenarios: memfd, shared or private."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.rng = random.Random(seed)
        self.backend = EmulatorBackend(
            file=kind, file_bytes=16 * PAGE if kind == "private" else 0, check=True, seed=seed,
            params={"sched.strategy": "random", "sched.period": "16"},
        )
        self.vmm = self.backend.board.vmm
        self.file = bytearray(b"\x11" * 16 * PAGE + bytes((PAGES - 16) * PAGE)) if kind == "private" else (
            bytearray(PAGES * PAGE)
        )
        self.copies: dict[int, bytearray] = {}
        self.mapping = files.file_at(self.vmm, self.backend.data_hva)[0]

    def page(self, page: int) -> bytearray | memoryview:
        if page in self.copies:
            return self.copies[page]
        return memoryview(self.file)[page * PAGE : (page + 1) * PAGE]

    def stored(self, offset: int, data: bytes) -> None:
        """A store through the mapping."""
        page = offset // PAGE
        if self.kind == "private" and page not in self.copies:
            self.copies[page] = bytearray(self.page(page))
        self.page(page)[offset % PAGE : offset % PAGE + len(data)] = data

    def op(self, name: str, *args: int) -> int | str:
        answer: int | str = self.backend.operation(name, *args)
        return answer

    def place(self) -> int:
        return self.rng.randrange(PAGES) * PAGE + self.rng.choice((0, 8, 2048, PAGE - 8))

    def span(self) -> tuple[int, int]:
        first = self.rng.randrange(PAGES)
        return first, self.rng.randint(1, min(6, PAGES - first))

    # -- steps --------------------------------------------------------------------------------

    def load(self) -> None:
        offset = self.place()
        expected = struct.unpack("<Q", self.page(offset // PAGE)[offset % PAGE : offset % PAGE + 8])[0]
        assert self.backend.load(offset) == expected, f"page {offset // PAGE:#x}"

    def store(self) -> None:
        offset, value = self.place(), self.rng.getrandbits(64)
        assert self.backend.store(offset, value) == "ok"
        self.stored(offset, struct.pack("<Q", value))

    def host_store(self) -> None:
        offset, value = self.place(), self.rng.getrandbits(64)
        self.backend.host_write(offset, value)
        self.stored(offset, struct.pack("<Q", value))

    def under_it(self) -> None:
        """A write into the file by another process, or by write(2)."""
        offset, value = self.place(), self.rng.getrandbits(32)
        how = self.rng.choice(("peer_write", "file_write"))
        assert self.op(how, offset, value, 4) == 0
        self.file[offset : offset + 4] = struct.pack("<I", value)

    def large_write(self) -> None:
        first, pages = self.span()
        data = self.rng.randbytes(pages * PAGE)
        self.backend.pwrite(first * PAGE, data)
        self.file[first * PAGE : (first + pages) * PAGE] = data

    def hole(self) -> None:
        first, pages = self.span()
        how = "punch_hole" if self.kind == "private" else self.rng.choice(("punch_hole", "remove"))
        assert self.op(how, first * PAGE, pages) == 0
        self.file[first * PAGE : (first + pages) * PAGE] = bytes(pages * PAGE)

    def cut(self) -> None:
        first = self.rng.randrange(PAGES // 2, PAGES)
        assert self.op("truncate", first * PAGE) == 0
        self.file[first * PAGE :] = bytes((PAGES - first) * PAGE)
        for page in range(first, PAGES):
            self.copies.pop(page, None)

    def drop_copies(self) -> None:
        first, pages = self.span()
        assert self.op("dontneed", first * PAGE, pages) == 0
        for page in range(first, first + pages):
            self.copies.pop(page, None)

    def transparent(self) -> None:
        first, pages = self.span()
        gpa = first * PAGE
        name, *args = self.rng.choice((
            ("fsync", gpa), ("swap_out", gpa, pages), ("migrate", gpa, pages), ("age", gpa, pages),
            ("cold", gpa, pages), ("reclaim", 16), ("fadvise_dontneed", gpa, pages), ("clear_refs", 4),
        ))
        self.op(str(name), *args)

    def end(self) -> None:
        backend = self.backend
        for page in range(PAGES):
            got = backend._host(lambda page=page: self.vmm.read(backend.data_hva + page * PAGE, PAGE))
            assert got == bytes(self.page(page)), f"page {page:#x}"
        if self.kind != "memfd":
            assert backend.fsync() is None
            with open(f"/proc/self/fd/{self.mapping.private_data}", "rb") as real:
                assert real.read(PAGES * PAGE) == bytes(self.file)
        backend.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["memfd", "shared", "private"])
def test_a_guest_on_a_file_reads_what_was_written_whatever_is_done_to_the_file(kind: str, seed: int) -> None:
    machine = Machine(kind, seed)
    steps = (
        [machine.load] * 6 + [machine.store] * 6 + [machine.host_store] * 2 + [machine.under_it] * 3
        + [machine.transparent] * 6 + [machine.hole, machine.cut, machine.drop_copies, machine.large_write]
    )
    for _ in range(250):
        machine.rng.choice(steps)()
    machine.end()


def test_the_oracle_notices_a_byte_that_differs() -> None:
    machine = Machine("memfd", 0)
    machine.backend.host_write(0, 7)
    with pytest.raises(AssertionError, match="page 0x0"):
        machine.end()
    machine.stored(0, struct.pack("<Q", 7))
    machine.end()
    with pytest.raises(KernelError):
        files.file_at(machine.vmm, machine.backend.data_hva)
