"""Files with their bytes in a real file (host_mm/backing_file.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from errno import EFBIG, EINVAL, EOPNOTSUPP
from pathlib import Path

import pytest

from host_mm import mmu_notifier as mn
from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, AddressSpace, fput
from host_mm.backing_file import get_block_folio, open_file
from host_mm.filemap import folio_unlock
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mm_types import MM_ANONPAGES, MM_FILEPAGES
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import put_page
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared, frame
from tests.host_mm.machine import PAGE, RW, make_host, run
from tests.host_mm.test_order_classes import Recorder as Order

HOLE = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def test_a_file_by_path_keeps_what_was_written_when_everybody_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"before")
    host = make_host()
    process = host.create_process("p")
    file = open_file(host, 2 * PAGE, str(path))
    at = do_mmap(process.mm, 0, 2 * PAGE, RW, MAP_SHARED, file=file)
    fput(file)

    def use() -> None:
        assert copy_from_user(process, at, 6) == b"before"
        copy_to_user(process, at + PAGE, b"after")
        do_munmap(process.mm, at, 2 * PAGE)

    run(host, use)
    assert not host.mappings
    assert path.read_bytes() == b"before".ljust(PAGE, b"\0") + b"after".ljust(PAGE, b"\0")
    exit_process(process)
    audit(host)


def test_a_clean_page_is_dropped_by_reclaim_and_read_again() -> None:
    s = Shared(disk=b"disk" * 4 * PAGE)
    s.do(lambda: copy_from_user(s.a, s.at, 4))
    s.host.lru.lru_add_drain_all()
    order = Order(s.host, s.a.mm)
    mmu_notifier_register(order, s.a.mm)
    s.do(lambda: do_madvise(s.a.mm, s.at, PAGE, MADV_PAGEOUT))
    assert order.log == ["start", "clear", "end", "flush", "free"], "nothing to write"
    assert 0 not in s.file.i_pages
    assert (s.a.mm.rss[MM_FILEPAGES], s.file.nrpages) == (0, 15), "what was read around it stays"
    reads = s.host.vmstat["pgpgin"]
    s.do(lambda: copy_from_user(s.a, s.at, 4))
    assert s.host.vmstat["pgpgin"] > reads
    s.end()


def test_a_dirty_page_is_unmapped_by_reclaim_and_stays() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_to_user(s.a, s.at, b"new!"))
    s.host.lru.lru_add_drain_all()
    order = Order(s.host, s.a.mm)
    mmu_notifier_register(order, s.a.mm)
    s.do(lambda: do_madvise(s.a.mm, s.at, PAGE, MADV_PAGEOUT))
    assert order.log[:3] == ["start", "clear", "end"]
    assert "free" not in order.log
    assert copy_from_user(s.b, s.bt, 4) == b"new!"
    s.end()


def test_a_shorter_file_unmaps_flushes_and_frees_and_looks_again() -> None:
    s = Shared(disk=b"\5" * (16 * PAGE))
    s.do(lambda: copy_to_user(s.a, s.at + 3 * PAGE, b"x"))
    s.host.lru.lru_add_drain_all()
    order = Order(s.host, s.a.mm)
    mmu_notifier_register(order, s.a.mm)
    s.do(lambda: s.file.a_ops.set_size(s.file, 3 * PAGE))
    assert order.log[:4] == ["start", "clear", "end", "flush"], "class 3: the gather's flush is after the end"
    assert order.log[4:-2].count("free") == 13
    assert order.log[-2:] == ["start", "end"], "the second look finds nothing"
    assert order.ranges == [(mn.MMU_NOTIFY_CLEAR, s.at + 3 * PAGE, s.at + 16 * PAGE, mn.ORDER_GATHER)] * 2
    assert os.fstat(s.file.private_data).st_size == 3 * PAGE
    with pytest.raises(KernelError, match="bus error"):
        s.do(lambda: copy_from_user(s.a, s.at + 3 * PAGE, 1))
    s.end()


def test_holes_read_as_zeros_and_are_in_the_file_too() -> None:
    s = Shared(disk=b"\5" * (16 * PAGE), kind=MAP_PRIVATE)
    s.do(lambda: copy_to_user(s.b, s.bt + 2 * PAGE, b"mine"))
    s.do(lambda: s.file.a_ops.fallocate(s.file, HOLE, PAGE + 100, 3 * PAGE))
    s.do(lambda: s.file.a_ops.fsync(s.file))
    kept = b"\5" * (PAGE + 100) + bytes(3 * PAGE) + b"\5" * (12 * PAGE - 100)
    assert s.on_disk(0, 16 * PAGE) == kept
    got: list[bytes] = []
    s.do(lambda: got.append(copy_from_user(s.a, s.at, 16 * PAGE)))
    assert got == [kept]
    assert copy_from_user(s.b, s.bt + 2 * PAGE, 4) == b"mine"
    s.end()


def test_a_punched_range_is_not_read_from_the_device_again() -> None:
    s = Shared(disk=b"\5" * (16 * PAGE))
    s.do(lambda: s.file.a_ops.fallocate(s.file, HOLE, 0, 16 * PAGE))
    got: list[bytes] = []
    s.do(lambda: got.append(copy_from_user(s.a, s.at, 16 * PAGE)))
    assert got == [bytes(16 * PAGE)]
    assert s.host.vmstat["pgpgin"] == 0
    s.do(lambda: copy_to_user(s.a, s.at + PAGE, b"new"))
    s.do(lambda: s.file.a_ops.fsync(s.file))
    assert s.on_disk(PAGE, 3) == b"new"
    s.end()


def test_a_file_that_grows_again_shows_zeros_where_it_was_cut() -> None:
    s = Shared(disk=b"\5" * (16 * PAGE))

    def cut() -> None:
        copy_to_user(s.a, s.at + PAGE, b"\6" * PAGE)
        s.file.a_ops.set_size(s.file, PAGE + 100)
        copy_to_user(s.a, s.at + PAGE + 200, b"beyond the end")
        s.file.a_ops.set_size(s.file, 3 * PAGE)
        assert copy_from_user(s.a, s.at + PAGE + 98, 200) == b"\6\6" + bytes(198)
        s.file.a_ops.fsync(s.file)

    s.do(cut)
    assert s.on_disk(PAGE, 2 * PAGE) == b"\6" * 100 + bytes(2 * PAGE - 100)
    s.end()


def test_private_pages_are_the_processs_and_dontneed_gives_the_files_bytes_back() -> None:
    s = Shared(disk=b"disk", kind=MAP_PRIVATE)

    def use() -> None:
        copy_to_user(s.b, s.bt, b"mine")
        assert s.b.mm.rss[MM_ANONPAGES] == 1
        child = fork_process(s.b)
        copy_to_user(child, s.bt, b"kid!")
        assert copy_from_user(s.b, s.bt, 4) == b"mine"
        exit_process(child)
        assert copy_from_user(s.a, s.at, 4) == b"disk"
        do_madvise(s.b.mm, s.bt, PAGE, MADV_DONTNEED)
        assert copy_from_user(s.b, s.bt, 4) == b"disk"

    s.do(use)
    s.end()


def test_migration_takes_a_page_of_the_cache_with_its_dirty_mark_along() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_to_user(s.a, s.at, b"new!"))
    s.do(lambda: copy_from_user(s.b, s.bt, 1))
    old = frame(s.a, s.at)
    s.do(lambda: move_pages(s.a, [s.at], [1], move_all=True))
    new = frame(s.a, s.at)
    assert new != old
    assert s.host.allocator.nid_of(new) == 1
    assert frame(s.b, s.bt) == new == s.file.i_pages[0]
    assert s.on_disk(0, 4) == b"disk"
    s.do(lambda: s.file.a_ops.fsync(s.file))
    assert s.on_disk(0, 4) == b"new!"
    s.end()


def test_a_new_folio_is_as_large_as_asked_and_aligned() -> None:
    s = Shared(disk=b"\5" * (16 * PAGE), pages=16)
    sizes: list[tuple[int, int]] = []

    def make() -> None:
        for index, order in ((0, 2), (5, 2), (6, 3), (8, 3)):
            head = get_block_folio(s.file, index, read=True, order=order)
            sizes.append((s.host.pages.index[head], 1 << s.host.pages.order[head]))
            folio_unlock(s.host, head)
            put_page(s.host, head)

    s.do(make)
    assert sizes == [(0, 4), (5, 1), (6, 2), (8, 8)]
    s.do(lambda: s.file.a_ops.set_size(s.file, 0))
    s.end()


@pytest.mark.parametrize(("call", "errno"), [
    (lambda f: f.a_ops.fallocate(f, HOLE, -1, PAGE), EINVAL),
    (lambda f: f.a_ops.fallocate(f, HOLE, 0, 0), EINVAL),
    (lambda f: f.a_ops.fallocate(f, FALLOC_FL_PUNCH_HOLE, 0, PAGE), EOPNOTSUPP),
    (lambda f: f.a_ops.fallocate(f, HOLE, 1 << 62, 1 << 62), EFBIG),
    (lambda f: f.a_ops.set_size(f, -1), EINVAL),
    (lambda f: f.a_ops.set_size(f, 1 << 63), EFBIG),
])
def test_bad_arguments_are_refused_by_name(call: Callable[[AddressSpace], None], errno: int) -> None:
    s = Shared(disk=b"disk")
    with pytest.raises(KernelError) as refused:
        call(s.file)
    assert refused.value.errno == errno
    s.end()


def test_a_page_that_goes_as_clean_with_other_bytes_than_the_file_is_caught() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    s.host.lru.lru_add_drain_all()
    s.host.ram.write(frame(s.a, s.at) << 12, b"lost")
    with pytest.raises(BrokenTruth, match="dirty-dropped"):
        s.do(lambda: do_madvise(s.a.mm, s.at, PAGE, MADV_PAGEOUT))


@pytest.mark.parametrize("seed", range(24))
def test_faults_writeback_reclaim_truncation_and_migration_race(seed: int) -> None:
    s = Shared(disk=b"\xee" * (8 * PAGE), pages=8, kind=MAP_PRIVATE, ram=4 << 20)
    s.host.sched.set_strategy(RandomStrategy(seed, 3))
    s.host.sched.lockdep = {}
    wrong: list[tuple[int, int]] = []

    def writer() -> None:
        for turn in range(1, 24):
            page = turn * 3 % 8
            with suppress(KernelError):
                copy_to_user(s.a, s.at + page * PAGE + 9, bytes([turn]))
                if page < 4 and copy_from_user(s.a, s.at + page * PAGE + 9, 1) != bytes([turn]):
                    wrong.append((page, turn))

    def private() -> None:
        for turn in range(16):
            page = turn * 5 % 4
            copy_to_user(s.b, s.bt + page * PAGE + 100, bytes([turn]))
            if copy_from_user(s.b, s.bt + page * PAGE + 100, 1) != bytes([turn]):
                wrong.append((page, turn))

    def syncer() -> None:
        for _ in range(4):
            s.file.a_ops.fsync(s.file)
            do_madvise(s.a.mm, s.at, 8 * PAGE, MADV_PAGEOUT)
            move_pages(s.a, [s.at + page * PAGE for page in range(4)], [1, 0, 1, 0], move_all=True)

    def cutter() -> None:
        for turn in range(4):
            s.file.a_ops.set_size(s.file, (4 + turn) * PAGE)
            s.file.a_ops.set_size(s.file, 8 * PAGE)
            s.file.a_ops.fallocate(s.file, HOLE, 5 * PAGE, 2 * PAGE)

    s.do(writer, private, syncer, cutter)
    s.host.sched.set_strategy(None)
    assert not wrong
    got: list[bytes] = []
    s.do(lambda: got.append(copy_from_user(s.a, s.at, 8 * PAGE)))
    s.do(lambda: s.file.a_ops.fsync(s.file))
    assert got == [s.on_disk(0, 8 * PAGE)]
    s.end()
