"""Random operations on huge pages of several processes against a model of bytes, audited after each."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from host_mm.address_space import FALLOC_FL_KEEP_SIZE
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.hugetlb_pool import set_max_huge_pages
from host_mm.hugetlb_share import hugetlb_unshare_all_pmds
from host_mm.madvise import MADV_DONTNEED, MADV_POPULATE_WRITE, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import MAP_NORESERVE, MAP_PRIVATE, PROT_READ, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.uaccess import copy_from_user
from tests.host_mm.hugetlb_machine import BASE, GIB, HUGE, PUNCH_HOLE, Machine, fallocate
from tests.host_mm.machine import RW

SHARED = BASE
"""1 GiB of the file, so that tables are shared."""
PRIVATE = BASE + 8 * GIB
COPIED = BASE + 16 * GIB
"""The file's first pages, privately."""
AWAY = BASE + 24 * GIB
FILE_PAGES, PRIVATE_PAGES, COPIED_PAGES = 5, 3, 2
CELL = 8
"""Each page's first bytes, and those of its second half, are what the model remembers."""
OFFSETS = (0, HUGE // 2 + 0x5000)
ZEROS = (bytes(CELL), bytes(CELL))
Cells = tuple[bytes, bytes]


class Memory:
    """What one process should see: its private pages, and its copies of the file's (None: none yet)."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.private: list[Cells] = [ZEROS] * PRIVATE_PAGES
        self.copied: list[Cells | None] = [None] * COPIED_PAGES

    def forked(self, process: Process) -> Memory:
        """The child's."""
        child = Memory(process)
        child.private = list(self.private)
        child.copied = list(self.copied)
        return child


class Oracle:
    """The host, and what it should hold."""

    def __init__(self, seed: int, profile: MmProfile) -> None:
        self.rng = random.Random(seed)
        self.m = Machine(24, ram=112 << 20, profile=profile)
        self.file = self.m.file(GIB // HUGE)
        self.cells: list[Cells] = [ZEROS] * FILE_PAGES
        self.holes = set(range(FILE_PAGES))
        self.pinned: list[int] = []
        process = self.m.process()
        self.m.shared(process, self.file, GIB // HUGE, SHARED)
        self.m.private(process, PRIVATE_PAGES, PRIVATE)
        self.m.shared(process, self.file, COPIED_PAGES, COPIED, kind=MAP_PRIVATE, flags=MAP_NORESERVE)
        self.memories = [Memory(process)]

    def step(self) -> None:
        """One operation, then one look at a random page."""
        operations: list[Callable[[Memory], None]] = [
            self.store_shared, self.store_private, self.store_copied, self.fork, self.exit, self.drop,
            self.punch, self.punch_small, self.protect, self.migrate, self.move, self.resize, self.unshare,
            self.remap, self.pin, self.preallocate, self.populate,
        ]
        self.rng.choice(operations)(self.rng.choice(self.memories))
        self.look(self.rng.choice(self.memories))

    # -- operations ---------------------------------------------------------------------------

    def _store(self, memory: Memory, address: int, old: Cells) -> Cells:
        which = self.rng.randrange(2)
        data = self.rng.randbytes(CELL)
        self.m.write(memory.process, address + OFFSETS[which], data)
        return (data, old[1]) if which == 0 else (old[0], data)

    def store_shared(self, memory: Memory) -> None:
        page = self.rng.randrange(FILE_PAGES)
        self.cells[page] = self._store(memory, SHARED + page * HUGE, self.cells[page])
        self.holes.discard(page)

    def store_private(self, memory: Memory) -> None:
        page = self.rng.randrange(PRIVATE_PAGES)
        memory.private[page] = self._store(memory, PRIVATE + page * HUGE, memory.private[page])

    def store_copied(self, memory: Memory) -> None:
        page = self.rng.randrange(COPIED_PAGES)
        seen = memory.copied[page] or self.cells[page]
        memory.copied[page] = self._store(memory, COPIED + page * HUGE, seen)

    def fork(self, memory: Memory) -> None:
        if len(self.memories) < 3:
            child = self.m.do(lambda: fork_process(memory.process))
            self.memories.append(memory.forked(child))

    def exit(self, memory: Memory) -> None:
        if len(self.memories) > 1:
            self.m.do(lambda: exit_process(memory.process))
            self.memories.remove(memory)

    def drop(self, memory: Memory) -> None:
        kind = self.rng.randrange(3)
        if kind == 0:
            address = SHARED + self.rng.randrange(FILE_PAGES) * HUGE
        elif kind == 1:
            page = self.rng.randrange(PRIVATE_PAGES)
            address = PRIVATE + page * HUGE
            memory.private[page] = ZEROS
        else:
            page = self.rng.randrange(COPIED_PAGES)
            address = COPIED + page * HUGE
            memory.copied[page] = None
        self.m.do(lambda: do_madvise(memory.process.mm, address, HUGE, MADV_DONTNEED))

    def punch(self, memory: Memory) -> None:
        page = self.rng.randrange(FILE_PAGES)
        self.m.do(lambda: fallocate(self.file, PUNCH_HOLE, page * HUGE, HUGE))
        self.cells[page] = ZEROS
        self.holes.add(page)
        for each in self.memories:
            # Private copies go with the page of the file.
            if page < COPIED_PAGES:
                each.copied[page] = None

    def punch_small(self, memory: Memory) -> None:
        page = self.rng.randrange(FILE_PAGES)
        self.m.do(lambda: fallocate(self.file, PUNCH_HOLE, page * HUGE, 0x1000))
        self.cells[page] = (bytes(CELL), self.cells[page][1])

    def protect(self, memory: Memory) -> None:
        start, pages = self.rng.choice([(SHARED, 512), (PRIVATE, PRIVATE_PAGES), (COPIED, COPIED_PAGES)])
        mm = memory.process.mm
        self.m.do(lambda: do_mprotect(mm, start, pages * HUGE, PROT_READ))
        self.look(memory)
        self.m.do(lambda: do_mprotect(mm, start, pages * HUGE, RW))

    def migrate(self, memory: Memory) -> None:
        nid = self.rng.randrange(2)
        addresses = [SHARED + page * HUGE for page in range(FILE_PAGES)]
        addresses += [PRIVATE + page * HUGE for page in range(PRIVATE_PAGES)]
        self.m.do(lambda: move_pages(memory.process, addresses, [nid] * len(addresses), move_all=True))

    def move(self, memory: Memory) -> None:
        mm = memory.process.mm
        start, size = self.rng.choice([(SHARED, GIB), (PRIVATE, PRIVATE_PAGES * HUGE)])
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        self.m.do(lambda: do_mremap(mm, start, size, size, flags, AWAY))
        self.m.do(lambda: do_mremap(mm, AWAY, size, size, flags, start))

    def resize(self, memory: Memory) -> None:
        self.m.do(lambda: set_max_huge_pages(self.m.host, self.rng.randrange(20, 28)))

    def unshare(self, memory: Memory) -> None:
        self.m.do(lambda: hugetlb_unshare_all_pmds(self.m.vma(memory.process, SHARED)))

    def remap(self, memory: Memory) -> None:
        self.m.do(lambda: do_munmap(memory.process.mm, PRIVATE, PRIVATE_PAGES * HUGE))
        self.m.private(memory.process, PRIVATE_PAGES, PRIVATE, flags=MAP_NORESERVE)
        memory.private = [ZEROS] * PRIVATE_PAGES

    def pin(self, memory: Memory) -> None:
        if self.pinned:
            unpin_user_page(self.m.host, self.pinned.pop(), dirty=True)
            return
        address = PRIVATE + self.rng.randrange(PRIVATE_PAGES) * HUGE + 0x3000
        mm = memory.process.mm
        pfn = self.m.do(lambda: pin_user_page(mm, address, FOLL_WRITE))
        assert pfn >= 0
        self.pinned.append(pfn)

    def preallocate(self, memory: Memory) -> None:
        page = self.rng.randrange(FILE_PAGES)
        self.m.do(lambda: fallocate(self.file, FALLOC_FL_KEEP_SIZE, page * HUGE, HUGE))
        self.holes.discard(page)

    def populate(self, memory: Memory) -> None:
        mm = memory.process.mm
        if mm.host.profile.madv_populate:
            self.m.do(lambda: do_madvise(mm, PRIVATE, PRIVATE_PAGES * HUGE, MADV_POPULATE_WRITE))

    # -- looking ------------------------------------------------------------------------------

    def _same(self, process: Process, address: int, cells: Cells) -> None:
        for offset, cell in zip(OFFSETS, cells, strict=True):
            at = address + offset
            found = self.m.host.sched.run_task("look", lambda at=at: copy_from_user(process, at, CELL))
            assert found == cell, hex(address + offset)

    def look(self, memory: Memory) -> None:
        """Compare one page of each mapping."""
        p = memory.process
        page = self.rng.randrange(FILE_PAGES)
        self._same(p, SHARED + page * HUGE, self.cells[page])
        self.holes.discard(page)
        page = self.rng.randrange(PRIVATE_PAGES)
        self._same(p, PRIVATE + page * HUGE, memory.private[page])
        page = self.rng.randrange(COPIED_PAGES)
        self._same(p, COPIED + page * HUGE, memory.copied[page] or self.cells[page])
        if memory.copied[page] is None and page in self.holes:
            # A read of a hole gets a page of its own, too, which is not the file's.
            memory.copied[page] = ZEROS

    def close(self) -> None:
        """Everything is given back."""
        while self.pinned:
            unpin_user_page(self.m.host, self.pinned.pop())
        self.m.close()


@pytest.mark.parametrize("profile", [LINUX_6_18, LINUX_5_10], ids=lambda profile: profile.name)
@pytest.mark.parametrize("seed", range(2))
def test_every_byte_is_what_the_model_says_and_nothing_is_left(seed: int, profile: MmProfile) -> None:
    oracle = Oracle(seed, profile)
    for _ in range(120):
        oracle.step()
    oracle.close()
