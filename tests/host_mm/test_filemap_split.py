"""Large folios of the page cache: how they are mapped, cleaned, and split (host_mm/filemap_split.py)."""

from __future__ import annotations

from errno import EAGAIN, EBUSY

import pytest

from host_mm import mmu_notifier as mn
from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_write
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.filemap_rw import POSIX_FADV_DONTNEED, file_read, file_write, generic_fadvise
from host_mm.filemap_split import folio_split
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mm_types import MM_FILEPAGES
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_writeback, folio_mapcount, get_page, put_page
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, Recorder
from tests.host_mm.test_order_classes import Recorder as Order

HOLE = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def large(pages: int = 16) -> tuple[Shared, int]:
    """Pages 0 to 15 of the file are one clean folio, page n full of bytes n + 1."""
    s = Shared(disk=b"", pages=pages)
    s.do(lambda: file_write(s.file, 0, b"".join(bytes([n + 1]) * PAGE for n in range(16))))
    s.do(lambda: s.file.a_ops.fsync(s.file))
    s.quiet()
    return s, s.file.i_pages[0]


def pieces(s: Shared) -> list[tuple[int, int]]:
    """(first page, number of pages) of each folio of the file."""
    heads = dict.fromkeys(s.file.i_pages[index] for index in sorted(s.file.i_pages))
    return [(s.host.pages.index[head], 1 << s.host.pages.order[head]) for head in heads]


def test_one_fault_maps_all_of_a_large_folio() -> None:
    s, folio = large()
    copy_to_user(s.a, s.at + 5 * PAGE, b"x")
    assert folio_mapcount(s.host.pages, folio) == s.a.mm.rss[MM_FILEPAGES] == 16
    assert s.host.pages.refcount[folio] == 32
    audit(s.host)
    s.end()


def test_cleaning_takes_every_writable_entry_in_one_bracket_over_the_folio() -> None:
    s, _ = large()
    copy_to_user(s.a, s.at + 5 * PAGE, b"x")
    order = Order(s.host, s.a.mm)
    mmu_notifier_register(order, s.a.mm)
    s.do(lambda: s.file.a_ops.fsync(s.file))
    assert order.ranges == [(mn.MMU_NOTIFY_PROTECTION_PAGE, s.at, s.at + 16 * PAGE, mn.ORDER_UNDER_PTL)]
    assert order.log == ["start", *["clear", "flush", "set"] * 16, "end", "io"], "one fault made all writable"
    assert not any(pte_write(lookup_address_in_mm(s.a.mm, s.at + n * PAGE)[0]) for n in range(16))
    assert s.on_disk(5 * PAGE, 2) == b"x\6"
    s.end()


@pytest.mark.parametrize(("split_at", "expected"), [
    (0, [(0, 1), (1, 1), (2, 2), (4, 4), (8, 8)]), (15, [(0, 8), (8, 4), (12, 2), (14, 1), (15, 1)]),
    (6, [(0, 4), (4, 2), (6, 1), (7, 1), (8, 8)]),
])
def test_the_pieces_are_as_large_as_they_can_be(split_at: int, expected: list[tuple[int, int]]) -> None:
    s, folio = large()
    copy_from_user(s.a, s.at, 1)
    copy_from_user(s.b, s.bt + PAGE, 1)
    notifier = Recorder(s.at)
    mmu_notifier_register(notifier, s.a.mm)
    get_page(s.host, folio)
    folio_lock(s.host, folio)
    assert folio_split(s.file, folio, folio + split_at) == 0
    folio_unlock(s.host, folio)
    put_page(s.host, folio)
    assert notifier.take() == [("clear", 0, 16 * PAGE)]
    assert pieces(s) == expected
    assert s.a.mm.rss == [0, 0, 0, 0]
    audit(s.host)
    assert copy_from_user(s.a, s.at + PAGE, 2) == b"\2\2"
    s.end()


def test_a_dirty_folio_of_a_file_system_with_buffers_stays_whole_and_a_hole_in_it_is_zeros() -> None:
    s, _ = large()
    copy_to_user(s.a, s.at + PAGE, b"y")
    notifier = Recorder(s.at)
    mmu_notifier_register(notifier, s.a.mm)
    s.do(lambda: s.file.a_ops.fallocate(s.file, HOLE, 3 * PAGE, PAGE))
    assert notifier.take() == [("clear", 3 * PAGE, 4 * PAGE), ("clear", 0, 16 * PAGE)]
    assert pieces(s) == [(0, 16)]
    assert copy_from_user(s.a, s.at + PAGE, 1) == b"y"
    assert copy_from_user(s.a, s.at + 3 * PAGE, PAGE) == bytes(PAGE)
    assert copy_from_user(s.a, s.at + 4 * PAGE, 1) == b"\5"
    s.end()


@pytest.mark.parametrize(("written", "whole"), [(3, False), (4, False), (2, True), (5, True)])
def test_what_write_made_dirty_within_a_hole_does_not_keep_the_folio(written: int, whole: bool) -> None:
    s, _ = large()
    s.do(lambda: file_write(s.file, written * PAGE + 8, b"w"))
    s.do(lambda: s.file.a_ops.fallocate(s.file, HOLE, 3 * PAGE, 2 * PAGE))
    assert (pieces(s) == [(0, 16)]) == whole
    s.do(lambda: s.file.a_ops.fsync(s.file))
    assert not s.file.dirty_blocks
    s.end()


def test_a_folio_that_somebody_holds_or_that_is_being_written_stays_whole() -> None:
    s, folio = large()
    get_page(s.host, folio, 2)
    folio_lock(s.host, folio)
    assert folio_split(s.file, folio, folio + 3) == -EAGAIN
    put_page(s.host, folio)
    s.host.pages.flags[folio] |= PG_writeback
    assert folio_split(s.file, folio, folio + 3) == -EBUSY
    s.host.pages.flags[folio] &= ~PG_writeback
    folio_unlock(s.host, folio)
    put_page(s.host, folio)
    assert pieces(s) == [(0, 16)]
    s.end()


def test_a_hole_in_a_large_folio_frees_its_pages_and_keeps_the_rest() -> None:
    s, _ = large()
    copy_from_user(s.a, s.at, 1)
    notifier = Recorder(s.at)
    mmu_notifier_register(notifier, s.a.mm)
    s.do(lambda: s.file.a_ops.fallocate(s.file, HOLE, 3 * PAGE, 3 * PAGE))
    assert notifier.take() == [
        ("clear", 3 * PAGE, 6 * PAGE), ("clear", 0, 16 * PAGE), ("clear", 4 * PAGE, 8 * PAGE),
    ]
    assert pieces(s) == [(0, 2), (2, 1), (6, 1), (7, 1), (8, 8)]
    got: list[bytes] = []
    s.do(lambda: got.append(file_read(s.file, 0, 16 * PAGE)))
    assert got[0][::PAGE] == bytes([1, 2, 3, 0, 0, 0, *range(7, 17)])
    s.end()


def test_a_file_cut_within_a_large_folio_loses_what_lies_beyond() -> None:
    s, _ = large()
    copy_from_user(s.a, s.at, 1)
    s.do(lambda: s.file.a_ops.set_size(s.file, 5 * PAGE + 100))
    assert pieces(s) == [(0, 4), (4, 1), (5, 1)]
    assert s.file.nrpages == 6
    s.do(lambda: s.file.a_ops.set_size(s.file, 16 * PAGE))
    got: list[bytes] = []
    s.do(lambda: got.append(file_read(s.file, 5 * PAGE, 2 * PAGE)))
    assert got[0] == b"\6" * 100 + bytes(2 * PAGE - 100)
    s.end()


def test_reclaim_drops_a_large_folio_as_a_whole() -> None:
    s, _ = large()
    copy_from_user(s.a, s.at, 1)
    s.host.lru.lru_add_drain_all()
    order = Order(s.host, s.a.mm)
    mmu_notifier_register(order, s.a.mm)
    s.do(lambda: do_madvise(s.a.mm, s.at, 16 * PAGE, MADV_PAGEOUT))
    assert order.log[0] == "start"
    assert order.log[-1] == "free"
    assert order.ranges == [(mn.MMU_NOTIFY_CLEAR, s.at, s.at + 16 * PAGE, mn.ORDER_BATCHED)]
    assert not s.file.i_pages
    s.end()


@pytest.mark.parametrize("seed", range(16))
def test_stores_holes_writeback_and_reclaim_race_over_large_folios(seed: int) -> None:
    s = Shared(disk=b"", pages=32, ram=8 << 20)
    s.host.sched.set_strategy(RandomStrategy(seed, 3))
    s.host.sched.lockdep = {}
    wrong: list[tuple[int, int]] = []

    def writer() -> None:
        for turn in range(1, 24):
            page = turn * 7 % 8
            copy_to_user(s.a, s.at + page * PAGE + 9, bytes([turn]))
            if copy_from_user(s.b, s.bt + page * PAGE + 9, 1) != bytes([turn]):
                wrong.append((page, turn))

    def system() -> None:
        for turn in range(5):
            file_write(s.file, 16 * PAGE, bytes([turn + 1]) * 16 * PAGE)
            s.file.a_ops.fsync(s.file)
            s.file.a_ops.fallocate(s.file, HOLE, (17 + turn) * PAGE + 5, 3 * PAGE)

    def reclaimer() -> None:
        for _ in range(5):
            do_madvise(s.a.mm, s.at, 32 * PAGE, MADV_PAGEOUT)
            generic_fadvise(s.file, 0, 0, POSIX_FADV_DONTNEED)
            copy_from_user(s.b, s.bt + 18 * PAGE, 1)

    s.do(lambda: file_write(s.file, 0, b"\xee" * 16 * PAGE))
    s.do(writer, system, reclaimer)
    s.host.sched.set_strategy(None)
    assert not wrong
    got: list[bytes] = []
    s.do(lambda: got.append(copy_from_user(s.a, s.at, 32 * PAGE)))
    s.do(lambda: s.file.a_ops.fsync(s.file))
    assert got == [s.on_disk(0, 32 * PAGE)]
    s.end()
