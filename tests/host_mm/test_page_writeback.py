"""Dirty pages of files and their way to the file (host_mm/page_writeback.py)."""

from __future__ import annotations

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_dirty, pte_write
from host_mm.kernel.costs import COST_SWAP_WRITE
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import RandomStrategy
from host_mm.mmap import MAP_PRIVATE
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_dirty, PG_writeback
from host_mm.page_writeback import file_write_and_wait_range
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared, frame
from tests.host_mm.machine import PAGE, Recorder
from tests.host_mm.test_order_classes import Recorder as Order


def test_only_a_page_that_is_known_to_be_dirty_is_mapped_writable() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    entry = lookup_address_in_mm(s.a.mm, s.at)[0]
    pfn = frame(s.a, s.at)
    assert not pte_write(entry)
    assert not s.host.pages.flags[pfn] & PG_dirty
    copy_to_user(s.a, s.at, b"new!")
    entry = lookup_address_in_mm(s.a.mm, s.at)[0]
    assert pte_write(entry)
    assert pte_dirty(entry)
    assert s.host.pages.flags[pfn] & PG_dirty
    assert list(s.file.dirty) == [0]
    assert s.on_disk(0, 4) == b"disk"
    s.end()


def test_cleaning_clears_flushes_and_protects_in_one_bracket_a_mapping_and_then_the_io_begins() -> None:
    s = Shared(disk=b"")
    s.do(lambda: copy_to_user(s.a, s.at, b"a"))
    s.do(lambda: copy_to_user(s.b, s.bt, b"b"))
    order = Order(s.host, s.a.mm)
    mmu_notifier_register(order, s.a.mm)
    s.do(lambda: file_write_and_wait_range(s.file))
    assert order.log == ["start", "clear", "flush", "set", "end", "flush", "io"], "the second flush is b's"
    assert order.ranges == [(mn.MMU_NOTIFY_PROTECTION_PAGE, s.at, s.at + PAGE, mn.ORDER_UNDER_PTL)]
    for process, at in ((s.a, s.at), (s.b, s.bt)):
        entry = lookup_address_in_mm(process.mm, at)[0]
        assert not pte_write(entry)
        assert not pte_dirty(entry)
    assert s.on_disk(0, 1) == b"b"
    assert not s.file.dirty
    s.end()


def test_a_private_copy_is_no_business_of_writeback() -> None:
    s = Shared(disk=b"disk", kind=MAP_PRIVATE)
    s.do(lambda: copy_to_user(s.b, s.bt, b"mine"))
    notifier = Recorder(s.bt)
    mmu_notifier_register(notifier, s.b.mm)
    s.do(lambda: copy_to_user(s.a, s.at, b"file"))
    s.do(lambda: file_write_and_wait_range(s.file))
    assert notifier.take() == []
    assert s.on_disk(0, 4) == b"file"
    assert copy_from_user(s.b, s.bt, 4) == b"mine"
    s.end()


def test_fsync_returns_when_the_last_byte_is_out_and_not_before() -> None:
    s = Shared(disk=b"")
    s.do(lambda: copy_to_user(s.a, s.at, b"x" * PAGE))
    pfn = frame(s.a, s.at)
    seen: list[tuple[bool, bytes]] = []

    def watcher() -> None:
        s.host.sched.sleep(COST_SWAP_WRITE // 2)
        seen.append((bool(s.host.pages.flags[pfn] & PG_writeback), s.on_disk(PAGE - 1, 1)))

    s.do(lambda: file_write_and_wait_range(s.file), watcher)
    assert seen == [(True, b"\0")], "under way, the second half is not there yet"
    assert s.on_disk(0, PAGE) == b"x" * PAGE
    s.end()


def test_a_store_during_the_io_is_written_once_more() -> None:
    s = Shared(disk=b"")
    s.do(lambda: copy_to_user(s.a, s.at, b"old" * 1000))

    def writer() -> None:
        s.host.sched.sleep(COST_SWAP_WRITE // 2)
        copy_to_user(s.a, s.at, b"new" * 1000)

    s.do(lambda: file_write_and_wait_range(s.file), writer)
    assert list(s.file.dirty) == [0]
    s.do(lambda: file_write_and_wait_range(s.file))
    assert s.on_disk(0, 3000) == b"new" * 1000
    s.end()


def test_a_clean_that_forgets_the_flush_is_caught_when_the_io_begins() -> None:
    s = Shared(disk=b"", breaks=frozenset({"mkclean-no-flush"}))
    s.do(lambda: copy_to_user(s.a, s.at, b"x"))
    with pytest.raises(BrokenTruth, match="io-while-writable"):
        s.do(lambda: file_write_and_wait_range(s.file))


def test_the_flusher_writes_what_reclaim_found_dirty() -> None:
    s = Shared(disk=b"", pages=64)
    for page in range(64):
        s.do(lambda page=page: copy_to_user(s.a, s.at + page * PAGE, bytes([page + 1])))
    s.host.lru.lru_add_drain_all()
    s.do(lambda: s.host.reclaim(0, 0))
    s.do(lambda: s.host.sched.sleep(10_000_000))
    assert not s.host.flusher.running
    assert not s.file.dirty
    assert s.host.vmstat["nr_vmscan_immediate_reclaim"] > 0
    assert bytes(s.on_disk(page * PAGE, 1)[0] for page in range(64)) == bytes(range(1, 65))
    assert s.host.vmstat["nr_vmscan_write"] == 0, "reclaim itself writes no page of a file"
    s.end()


@pytest.mark.parametrize("seed", range(24))
def test_writeback_beside_stores_loses_no_byte(seed: int) -> None:
    s = Shared(disk=b"", pages=4)
    s.host.sched.set_strategy(RandomStrategy(seed, 2))
    s.host.sched.lockdep = {}
    last: dict[tuple[int, int], int] = {}

    def writer(process: object, at: int, offset: int) -> None:
        for turn in range(1, 30):
            page = turn * 3 % 4
            copy_to_user(process, at + page * PAGE + offset, bytes([turn]))  # type: ignore[arg-type]
            last[page, offset] = turn

    def syncer() -> None:
        for _ in range(6):
            file_write_and_wait_range(s.file)

    s.do(lambda: writer(s.a, s.at, 7), lambda: writer(s.b, s.bt, PAGE - 7), syncer)
    s.do(lambda: file_write_and_wait_range(s.file))
    for (page, offset), turn in last.items():
        assert s.on_disk(page * PAGE + offset, 1) == bytes([turn])
    s.host.sched.set_strategy(None)
    audit(s.host)
    s.end()
