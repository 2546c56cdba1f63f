"""userfaultfd on shared memory: pages in the file that are not mapped; protections that outlive entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fput
from host_mm.arch.x86.pgtable import _PAGE_UFFD_WP, pte_pfn, pte_present, pte_write, walk_lockless
from host_mm.arch.x86.swapops import PTE_MARKER_UFFD_WP, pte_marker_get
from host_mm.fork import exit_process
from host_mm.gup import FOLL_NOWAIT, get_user_pages_unlocked
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.memfd import memfd_create
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED, do_mmap
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from host_mm.userfaultfd import (
    UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT_MODE_WP,
    userfaultfd,
    userfaultfd_api,
    userfaultfd_continue,
    userfaultfd_copy,
    userfaultfd_register,
    userfaultfd_release,
    userfaultfd_unregister,
    userfaultfd_writeprotect,
    userfaultfd_zeropage,
)
from host_mm.userfaultfd_k import (
    UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    UffdMsg,
    userfaultfd_ctx_read,
    userfaultfd_poll,
)
from tests.host_mm.machine import ANON, PAGE, RW, make_host, run
from tests.host_mm.uffd_machine import errno_of

MINOR, MISSING, WP = UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
PAGES = 8


class File:
    """A memfd with two views in one process: `view` plain, `at` registered in `mode`."""

    def __init__(self, mode: int, kind: int = MAP_SHARED) -> None:
        self.host = make_host()
        self.process = self.host.create_process("vmm")
        self.mm = self.process.mm
        self.file = memfd_create(self.host, "guest", PAGES * PAGE)
        self.view = do_mmap(self.mm, 0, PAGES * PAGE, RW, MAP_SHARED, file=self.file)
        self.at = do_mmap(self.mm, 0, PAGES * PAGE, RW, kind, file=self.file)
        self.ctx = userfaultfd(self.process)
        userfaultfd_api(self.ctx)
        userfaultfd_register(self.ctx, self.at, PAGES * PAGE, mode)
        self.log: list[tuple[int, int]] = []
        self.stopped = False

    def task(self, body: Callable[[], Any]) -> Any:
        return self.host.sched.run_task("t", body)

    def serve(self, answer: Callable[[UffdMsg], Any]) -> None:
        def body() -> None:
            while True:
                self.ctx.fd_wqh.wait_event(lambda: self.stopped or userfaultfd_poll(self.ctx))
                if self.stopped:
                    return
                try:
                    msg = userfaultfd_ctx_read(self.ctx)
                except KernelError:
                    continue
                self.log.append(((msg.address - self.at) // PAGE, msg.flags))
                answer(msg)

        self.host.sched.spawn("handler", body)

    def continue_(self, msg: UffdMsg) -> None:
        userfaultfd_continue(self.ctx, msg.address, PAGE)

    def entry(self, page: int) -> int:
        return walk_lockless(self.host.ram, self.mm.pgd, self.at + page * PAGE)[0]

    def close(self) -> None:
        self.stopped = True
        self.ctx.fd_wqh.wake_all()

        def leave() -> None:
            userfaultfd_release(self.ctx)
            audit_later()
            exit_process(self.process)
            fput(self.file)

        def audit_later() -> None:
            self.host.quiesce()
            audit(self.host)

        self.task(leave)
        self.task(self.host.quiesce)
        audit(self.host)
        assert not self.host.mappings


def test_a_page_that_is_in_the_file_makes_a_minor_fault_and_continue_maps_it() -> None:
    f = File(MINOR)
    f.serve(f.continue_)
    f.task(lambda: copy_to_user(f.process, f.view, b"new"))
    assert f.task(lambda: copy_from_user(f.process, f.at, 3)) == b"new"
    f.task(lambda: copy_to_user(f.process, f.at, b"NEW"))
    assert f.log == [(0, UFFD_PAGEFAULT_FLAG_MINOR)]
    assert f.task(lambda: copy_from_user(f.process, f.view, 3)) == b"NEW"
    assert pte_write(f.entry(0))
    f.close()


def test_a_hole_of_the_file_makes_no_minor_fault() -> None:
    f = File(MINOR)
    f.serve(f.continue_)
    assert f.task(lambda: copy_from_user(f.process, f.at + PAGE, 1)) == b"\0"
    assert f.log == []
    f.close()


def test_who_must_not_wait_for_a_minor_fault_is_told_to_retry() -> None:
    f = File(MINOR)
    f.task(lambda: copy_to_user(f.process, f.view, b"new"))
    assert get_user_pages_unlocked(f.mm, f.at, FOLL_NOWAIT) == -11
    assert not f.ctx.fault_pending
    f.close()


def test_a_page_in_swap_makes_a_minor_fault_and_continue_reads_it_back() -> None:
    f = File(MINOR)
    f.serve(f.continue_)
    f.task(lambda: copy_to_user(f.process, f.view, b"swapped"))

    def out() -> None:
        f.host.lru.lru_add_drain_all()
        do_madvise(f.mm, f.view, PAGE, MADV_PAGEOUT)
        f.host.swap_device.drain()

    f.task(out)
    assert f.file.i_pages[0] < 0, "the file holds a swap entry"
    assert f.task(lambda: copy_from_user(f.process, f.at, 7)) == b"swapped"
    assert f.log == [(0, UFFD_PAGEFAULT_FLAG_MINOR)]
    f.close()


def test_a_private_mapping_is_continued_read_only_and_copies_on_write() -> None:
    f = File(MINOR, MAP_PRIVATE)
    f.serve(f.continue_)
    f.task(lambda: copy_to_user(f.process, f.view, b"file"))
    assert f.task(lambda: copy_from_user(f.process, f.at, 4)) == b"file"
    assert not pte_write(f.entry(0))
    f.task(lambda: copy_to_user(f.process, f.at, b"mine"))
    assert f.task(lambda: copy_from_user(f.process, f.view, 4)) == b"file"
    f.close()


def test_what_continue_refuses() -> None:
    f = File(MINOR)
    f.task(lambda: copy_to_user(f.process, f.view, b"x"))
    ctx = f.ctx
    assert errno_of(lambda: userfaultfd_continue(ctx, f.at + PAGE, PAGE)) == "EFAULT", "a hole"
    assert errno_of(lambda: userfaultfd_continue(ctx, f.at + 1, PAGE)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_continue(ctx, f.at, PAGE, 4)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_continue(ctx, f.at, PAGE, 2)) == "EINVAL", "not registered for WP"
    assert errno_of(lambda: userfaultfd_continue(ctx, f.view, PAGE)) == "ENOENT"
    assert userfaultfd_continue(ctx, f.at, PAGE) == PAGE
    assert errno_of(lambda: userfaultfd_continue(ctx, f.at, PAGE)) == "EEXIST"
    f.close()


def test_a_missing_page_of_shared_memory_is_copied_into_the_file() -> None:
    f = File(MISSING)
    source = do_mmap(f.mm, 0, PAGE, RW, MAP_PRIVATE | 0x20)
    f.task(lambda: copy_to_user(f.process, source, b"source"))
    f.serve(lambda msg: userfaultfd_copy(f.ctx, msg.address, source, PAGE))
    assert f.task(lambda: copy_from_user(f.process, f.at, 6)) == b"source"
    assert f.task(lambda: copy_from_user(f.process, f.view, 6)) == b"source"
    assert f.log == [(0, 0)]
    f.task(lambda: userfaultfd_zeropage(f.ctx, f.at + PAGE, PAGE))
    assert 1 in f.file.i_pages
    f.task(lambda: copy_to_user(f.process, f.view + 2 * PAGE, b"there"))
    assert f.task(lambda: copy_from_user(f.process, f.at + 2 * PAGE, 5)) == b"there"
    assert len(f.log) == 1, "it was not missing"
    assert errno_of(lambda: userfaultfd_copy(f.ctx, f.at + 2 * PAGE, source, PAGE)) == "EEXIST"
    f.task(lambda: copy_to_user(f.process, f.view + 3 * PAGE, b"there"))
    assert errno_of(lambda: userfaultfd_copy(f.ctx, f.at + 3 * PAGE, source, PAGE)) == "EEXIST", "in the file"
    f.close()


def test_beyond_the_end_of_the_file_nothing_is_filled() -> None:
    f = File(MISSING)
    f.task(lambda: f.file.a_ops.set_size(f.file, PAGE))
    assert errno_of(lambda: userfaultfd_zeropage(f.ctx, f.at + PAGE, PAGE)) == "EFAULT"
    f.close()


def resolve(f: File, msg: UffdMsg) -> None:
    userfaultfd_writeprotect(f.ctx, msg.address, PAGE, 0)


@pytest.mark.parametrize("drop", ["dontneed", "pageout"])
def test_protection_of_a_files_page_outlives_its_entry_as_a_marker(drop: str) -> None:
    f = File(WP)
    f.serve(lambda msg: resolve(f, msg))
    f.task(lambda: copy_to_user(f.process, f.at, b"one"))
    f.task(lambda: userfaultfd_writeprotect(f.ctx, f.at, PAGES * PAGE, UFFDIO_WRITEPROTECT_MODE_WP))
    assert f.entry(0) & _PAGE_UFFD_WP
    assert pte_marker_get(f.entry(3)) == PTE_MARKER_UFFD_WP

    def out() -> None:
        f.host.lru.lru_add_drain_all()
        do_madvise(f.mm, f.at, PAGE, MADV_DONTNEED if drop == "dontneed" else MADV_PAGEOUT)
        f.host.swap_device.drain()

    f.task(out)
    assert pte_marker_get(f.entry(0)) == PTE_MARKER_UFFD_WP
    assert f.task(lambda: copy_from_user(f.process, f.at, 3)) == b"one"
    assert pte_present(f.entry(0))
    assert f.entry(0) & _PAGE_UFFD_WP
    assert f.log == []
    f.task(lambda: copy_to_user(f.process, f.at, b"two"))
    assert f.log == [(0, UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_WRITE)]
    f.close()


def test_a_hole_punched_into_the_file_drops_pages_but_not_the_protection() -> None:
    f = File(WP)
    f.task(lambda: copy_to_user(f.process, f.at, b"one"))
    f.task(lambda: userfaultfd_writeprotect(f.ctx, f.at, PAGE, UFFDIO_WRITEPROTECT_MODE_WP))
    f.task(lambda: f.file.a_ops.fallocate(f.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE))
    assert pte_marker_get(f.entry(0)) == PTE_MARKER_UFFD_WP
    assert f.task(lambda: copy_from_user(f.process, f.at, 3)) == b"\0\0\0"
    assert f.entry(0) & _PAGE_UFFD_WP
    f.task(lambda: userfaultfd_unregister(f.ctx, f.at, PAGES * PAGE))
    assert not f.entry(0) & _PAGE_UFFD_WP
    f.close()


def test_registering_for_write_protection_makes_new_entries_of_a_shared_mapping_read_only() -> None:
    f = File(WP)
    vma = f.mm.vma_lookup(f.at)
    assert vma is not None
    assert not pte_write(vma.page_prot)
    f.task(lambda: userfaultfd_unregister(f.ctx, f.at, PAGES * PAGE))
    vma = f.mm.vma_lookup(f.at)
    assert vma is not None
    assert pte_write(vma.page_prot)
    f.close()


@pytest.mark.parametrize("seed", range(30))
def test_minor_faults_beside_writers_through_the_other_view(seed: int) -> None:
    f = File(MINOR)
    f.host.sched.lockdep = {}
    for page in range(PAGES):
        f.task(lambda at=page: copy_to_user(f.process, f.view + at * PAGE, bytes([at + 1])))
    f.host.sched.set_strategy(RandomStrategy(seed, 3))
    f.serve(f.continue_)

    def reader() -> None:
        for page in range(PAGES):
            assert copy_from_user(f.process, f.at + page * PAGE, 1) == bytes([page + 1])

    def dropper() -> None:
        for page in range(PAGES):
            do_madvise(f.mm, f.at + page * PAGE, PAGE, MADV_DONTNEED)
            do_madvise(f.mm, f.view + page * PAGE, PAGE, MADV_PAGEOUT)

    run(f.host, reader, reader, dropper)
    f.host.sched.set_strategy(None)
    mapped = {pte_pfn(f.entry(page)) for page in range(PAGES) if pte_present(f.entry(page))}
    assert mapped <= set(f.file.i_pages.values())
    f.close()


def test_a_page_that_userfaultfd_brings_into_a_file_is_charged_once() -> None:
    f = File(MISSING)
    memcg = f.host.memcg.create("vm")
    f.host.memcg.attach(f.process, memcg)
    source = do_mmap(f.mm, 0, PAGE, RW, ANON)
    f.task(lambda: copy_to_user(f.process, source, b"\xab" * PAGE))
    f.host.memcg.drain_all_stock(memcg)
    before = memcg.usage
    f.task(lambda: [userfaultfd_copy(f.ctx, f.at + page * PAGE, source, PAGE) for page in range(4)])
    f.task(lambda: userfaultfd_zeropage(f.ctx, f.at + 4 * PAGE, PAGE))
    f.host.memcg.drain_all_stock(memcg)
    assert memcg.usage - before == 5
    f.close()
