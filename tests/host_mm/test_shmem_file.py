"""Size, holes and allocation of shmem files (host_mm/shmem_file.py, host_mm/truncate.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from errno import EFBIG, EINVAL, ENOMEM, EOPNOTSUPP
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm import shmem
from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, AddressSpace
from host_mm.filemap_rw import file_read
from host_mm.fork import exit_process
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page_alloc import alloc_pages
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, Recorder, run

HOLE = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def filled(kind: int = MAP_SHARED, pages: int = 8, **kw: Any) -> tuple[Shared, Recorder, Recorder]:
    """Every page has its number in each byte; in `b` page 2 is a private copy if the mapping is private."""
    s = Shared(pages=pages, kind=kind, **kw)
    for page in range(pages):
        copy_to_user(s.a, s.at + page * PAGE, bytes([page]) * PAGE)
        copy_from_user(s.b, s.bt + page * PAGE, 1)
    if kind == MAP_PRIVATE:
        copy_to_user(s.b, s.bt + 2 * PAGE, b"mine")
    a, b = Recorder(s.at), Recorder(s.bt)
    mmu_notifier_register(a, s.a.mm)
    mmu_notifier_register(b, s.b.mm)
    return s, a, b


def punch(file: AddressSpace, offset: int, length: int) -> None:
    file.a_ops.fallocate(file, HOLE, offset, length)


def test_a_hole_is_unmapped_once_and_keeps_private_copies() -> None:
    s, a, b = filled(MAP_PRIVATE)
    punch(s.file, PAGE, 3 * PAGE)
    assert a.take() == b.take() == [("clear", PAGE, 4 * PAGE)]
    assert s.file.nrpages == 5
    assert copy_from_user(s.a, s.at + 2 * PAGE, 4) == bytes(4)
    assert copy_from_user(s.b, s.bt + 2 * PAGE, 4) == b"mine"
    assert copy_from_user(s.b, s.bt + 3 * PAGE, 4) == bytes(4)
    assert copy_from_user(s.a, s.at + 4 * PAGE, 2) == bytes([4, 4])
    s.end()


def test_the_partial_pages_of_a_hole_are_zeroed_in_place_and_stay_mapped() -> None:
    s, a, _ = filled()
    punch(s.file, PAGE + 100, 2 * PAGE)
    assert a.take() == [("clear", 2 * PAGE, 3 * PAGE)]
    assert copy_from_user(s.a, s.at + PAGE + 99, 2) == b"\1\0"
    assert copy_from_user(s.a, s.at + 3 * PAGE + 99, 2) == b"\0\3"
    punch(s.file, 5 * PAGE + 8, 8)
    assert a.take() == []
    assert copy_from_user(s.a, s.at + 5 * PAGE + 7, 10) == b"\5" + bytes(8) + b"\5"
    s.end()


def test_a_shorter_file_is_unmapped_twice_and_takes_private_copies() -> None:
    s, a, b = filled(MAP_PRIVATE)
    s.file.a_ops.set_size(s.file, PAGE + 10)
    assert a.take() == b.take() == [("clear", 2 * PAGE, 8 * PAGE)] * 2
    assert s.file.nrpages == 2
    for process, at in ((s.a, s.at), (s.b, s.bt)):
        with pytest.raises(KernelError, match="bus error"):
            copy_from_user(process, at + 2 * PAGE, 1)
    s.file.a_ops.set_size(s.file, 8 * PAGE)
    assert a.take() == [], "a longer file tells nobody"
    assert copy_from_user(s.b, s.bt + 2 * PAGE, 4) == bytes(4)
    assert copy_from_user(s.a, s.at + PAGE + 9, 2) == b"\1\0", "what was beyond the end is gone"
    s.end()


def test_holes_and_ends_free_swap_slots_and_read_partial_pages_back() -> None:
    s, _, _ = filled()
    assert s.host.swap is not None
    exit_process(s.b)
    s.host.lru.lru_add_drain_all()
    s.host.sched.run_task("pageout", lambda: do_madvise(s.a.mm, s.at, 8 * PAGE, MADV_PAGEOUT))
    s.host.sched.run_task("drain", s.host.swap_device.drain)
    assert s.host.swap.inuse_pages == 8, "the page of zeros has one too, if no bytes there"
    run(s.host, lambda: punch(s.file, 2 * PAGE, PAGE))
    assert s.host.swap.inuse_pages == 7
    run(s.host, lambda: s.file.a_ops.set_size(s.file, 5 * PAGE + 1))
    assert s.host.swap.inuse_pages == 4, "the last page is half gone, so it was read back"
    audit(s.host)
    assert copy_from_user(s.a, s.at + 5 * PAGE, 2) == b"\5\0"
    s.end()


def test_allocation_makes_pages_and_grows_the_file_unless_told_not_to() -> None:
    s = Shared(pages=2)
    s.file.a_ops.fallocate(s.file, FALLOC_FL_KEEP_SIZE, 0, 3 * PAGE)
    assert (s.file.nrpages, s.file.i_size) == (3, 2 * PAGE)
    s.file.a_ops.fallocate(s.file, 0, 3 * PAGE, PAGE)
    assert (s.file.nrpages, s.file.i_size) == (4, 4 * PAGE)
    assert file_read(s.file, 3 * PAGE, 3) == bytes(3), "allocated pages read as zeros"
    assert copy_from_user(s.a, s.at, 3) == bytes(3)
    s.end()


def test_an_allocation_that_does_not_fit_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Shared(pages=1)
    copy_to_user(s.a, s.at, b"kept")
    answers = iter([*[None] * 5, -1])

    def sometimes(*args: Any) -> int:
        return alloc_pages(*args) if next(answers) is None else -1

    monkeypatch.setattr(shmem, "alloc_pages", sometimes)
    with pytest.raises(KernelError) as refused:
        s.file.a_ops.fallocate(s.file, 0, 0, 8 * PAGE)
    assert refused.value.errno == ENOMEM
    assert (s.file.nrpages, s.file.i_size) == (1, PAGE)
    assert copy_from_user(s.a, s.at, 4) == b"kept"
    s.end()


@pytest.mark.parametrize(("call", "errno"), [
    (lambda f: f.a_ops.fallocate(f, HOLE, -1, PAGE), EINVAL),
    (lambda f: f.a_ops.fallocate(f, HOLE, 0, 0), EINVAL),
    (lambda f: f.a_ops.fallocate(f, FALLOC_FL_PUNCH_HOLE, 0, PAGE), EOPNOTSUPP),
    (lambda f: f.a_ops.fallocate(f, 0x10, 0, PAGE), EOPNOTSUPP),
    (lambda f: f.a_ops.fallocate(f, HOLE, 1 << 62, 1 << 62), EFBIG),
    (lambda f: f.a_ops.set_size(f, -1), EINVAL),
    (lambda f: f.a_ops.set_size(f, 1 << 63), EFBIG),
])
def test_bad_arguments_are_refused_by_name(call: Callable[[AddressSpace], None], errno: int) -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"kept")
    with pytest.raises(KernelError) as refused:
        call(s.file)
    assert refused.value.errno == errno
    assert copy_from_user(s.a, s.at, 4) == b"kept"
    s.end()


def test_a_write_fault_in_a_hole_that_is_being_punched_waits_for_its_end() -> None:
    s, _, _ = filled()
    order: list[str] = []

    class Slow(mn.MmuNotifier):
        """Somebody who takes his time while the hole is unmapped."""

        def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
            s.host.sched.sleep(10_000)

    mmu_notifier_register(Slow(), s.b.mm)

    def puncher() -> None:
        punch(s.file, 0, 4 * PAGE)
        order.append("punched")

    def writer() -> None:
        s.host.sched.sleep(2000)
        copy_to_user(s.a, s.at + PAGE, b"new")
        order.append("written")

    run(s.host, puncher, writer)
    assert order == ["punched", "written"]
    assert copy_from_user(s.b, s.bt + PAGE, 4) == b"new\0"
    s.end()


@pytest.mark.parametrize("seed", range(24))
def test_truncation_holes_faults_and_swap_race_and_no_old_byte_comes_back(seed: int) -> None:
    s = Shared(pages=8)
    s.host.sched.set_strategy(RandomStrategy(seed, 2))
    s.host.sched.lockdep = {}
    wrong: list[int] = []

    def writer() -> None:
        for turn in range(1, 40):
            page = turn * 3 % 8
            with suppress(KernelError):
                copy_to_user(s.a, s.at + page * PAGE, bytes([turn]))

    def reader() -> None:
        for turn in range(40):
            page = turn * 5 % 8
            with suppress(KernelError):
                (seen,) = copy_from_user(s.b, s.bt + page * PAGE, 1)
                if seen and seen * 3 % 8 != page:
                    wrong.append(page)

    def shrinker() -> None:
        for turn in range(6):
            punch(s.file, turn * PAGE, 2 * PAGE)
            s.file.a_ops.set_size(s.file, 4 * PAGE)
            s.file.a_ops.set_size(s.file, 8 * PAGE)

    def reclaimer() -> None:
        for _ in range(6):
            do_madvise(s.a.mm, s.at, 8 * PAGE, MADV_PAGEOUT)
            s.host.sched.sleep(30_000)

    run(s.host, writer, reader, shrinker, reclaimer)
    s.host.sched.set_strategy(None)
    s.host.sched.run_task("drain", s.host.swap_device.drain)
    assert not wrong, "a page shows bytes that were written to another"
    audit(s.host)
    run(s.host, lambda: s.file.a_ops.set_size(s.file, 0))
    assert not s.file.i_pages
    s.end()
