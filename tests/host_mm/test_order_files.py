"""The order of bracket, entry change, primary flush, I/O and free in what is done to files."""

from __future__ import annotations

from host_mm import mmu_notifier as mn
from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from host_mm.fork import fork_process
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED, do_mmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.uaccess import copy_from_user, copy_to_user
from host_mm.vmscan import reclaim_pages
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, RW
from tests.host_mm.test_order_classes import Recorder as Order

HOLE = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def watched(s: Shared, process: object = None) -> Order:
    s.quiet()
    mm = (process or s.a).mm  # type: ignore[attr-defined]
    order = Order(s.host, mm)
    mmu_notifier_register(order, mm)
    return order


def test_class_1_cow_of_a_files_page_clears_flushes_and_sets_inside() -> None:
    s = Shared(disk=b"disk", kind=MAP_PRIVATE)
    s.do(lambda: copy_from_user(s.b, s.bt, 1))
    order = watched(s, s.b)
    s.do(lambda: copy_to_user(s.b, s.bt, b"mine"))
    assert order.log == ["start", "clear", "flush", "set", "end"]
    assert order.ranges == [(mn.MMU_NOTIFY_CLEAR, s.bt, s.bt + PAGE, mn.ORDER_UNDER_PTL)]
    s.end()


def test_a_write_to_a_page_that_was_not_mapped_fires_nothing() -> None:
    s = Shared(disk=b"disk", kind=MAP_PRIVATE)
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    order = watched(s, s.b)
    s.do(lambda: copy_to_user(s.b, s.bt, b"mine"))
    assert order.log == ["set"]
    s.end()


def test_page_mkwrite_fires_nothing_and_needs_no_flush() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    order = watched(s)
    s.do(lambda: copy_to_user(s.a, s.at, b"new!"))
    assert order.log == ["set"]
    s.end()


def test_class_2_shmem_leaves_no_entry_ends_its_bracket_flushes_and_then_writes() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"bytes")
    order = watched(s)
    s.do(lambda: do_madvise(s.a.mm, s.at, PAGE, MADV_PAGEOUT))
    assert order.log == ["start", "clear", "end", "flush", "io"]
    assert order.ranges == [(mn.MMU_NOTIFY_CLEAR, s.at, s.at + PAGE, mn.ORDER_BATCHED)]
    s.end()


def test_class_2_reclaim_of_a_clean_page_brackets_every_mapping_and_flushes_once() -> None:
    s = Shared(disk=b"disk")
    again = do_mmap(s.a.mm, 0, PAGE, RW, MAP_SHARED, file=s.file)
    for at in (s.at, again):
        s.do(lambda at=at: copy_from_user(s.a, at, 1))
    order = watched(s)
    pfn = s.file.i_pages[0]
    assert s.host.lru.folio_isolate_lru(pfn)
    s.do(lambda: reclaim_pages(s.host, [pfn]))
    assert order.log == [*["start", "clear", "end"] * 2, "flush", "free"]
    s.end()


def test_class_2_migration_of_a_files_page_flushes_before_the_new_entries() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_to_user(s.a, s.at, b"new!"))
    order = watched(s)
    s.do(lambda: move_pages(s.a, [s.at], [1]))
    assert order.log == ["start", "clear", "swap-entry", "end", "flush", "set", "free"]
    s.end()


def test_class_3_a_hole_is_cleared_and_flushed_after_the_bracket_and_then_freed() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"x" * 4 * PAGE)
    order = watched(s)
    s.do(lambda: s.file.a_ops.fallocate(s.file, HOLE, PAGE, 2 * PAGE))
    assert order.log == ["start", "clear", "clear", "end", "flush", "free", "free"]
    assert order.ranges == [(mn.MMU_NOTIFY_CLEAR, s.at + PAGE, s.at + 3 * PAGE, mn.ORDER_GATHER)]
    s.end()


def test_class_3_a_cut_does_it_twice() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"x" * 4 * PAGE)
    order = watched(s)
    s.do(lambda: s.file.a_ops.set_size(s.file, 2 * PAGE))
    assert order.log == ["start", "clear", "clear", "end", "flush", "free", "free", "start", "end"]
    (first, second) = order.ranges
    assert first == second == (mn.MMU_NOTIFY_CLEAR, s.at + 2 * PAGE, s.at + 16 * PAGE, mn.ORDER_GATHER)
    s.end()


def test_fork_of_shared_mappings_fires_nothing() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"x")
    order = watched(s)
    fork_process(s.a)
    assert order.log == ["flush"], "only the one at the end of dup_mmap"
    s.end()
