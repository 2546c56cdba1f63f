"""The order of bracket, entry change, primary flush and free, per order class of the mm's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.fork import exit_process, fork_process
from host_mm.host import HostMm
from host_mm.kernel.sched import Scheduler
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mm_types import MmStruct
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.process import Process
from host_mm.profile import LINUX_6_18, MmProfile
from host_mm.task_mmu import clear_refs_write
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import store_word
from trace_events.stream import Listener, TraceStream

PAGE = 4096
BASE = 0x10000000
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


class Recorder(mn.MmuNotifier):
    """Writes down brackets, stores to entries, primary flushes and frees in the order they happen."""

    def __init__(self, host: HostMm, mm: MmStruct) -> None:
        self.log: list[str] = []
        self.ranges: list[tuple[int, int, int, int]] = []
        host.pte_hooks.append(
            lambda where, _, old, new: self.log.append(store_word(old, new)) if where is mm else None
        )
        names = {
            "primary_flush": "flush", "frame_free": "free", "swap_write_start": "io",
            "file_write_start": "io",
        }
        host.stream.listen(Listener(
            [f"refault:{name}" for name in names], lambda event: self.log.append(names[event.name]),
            ancestors=False,
        ))

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        self.log.append("start")
        self.ranges.append((range_.event, range_.start, range_.end, range_.order))
        return 0

    def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
        self.log.append("end")


def record(
    operation: Callable[[Process], Any], pages: int = 1, prepare: Callable[[Process], Any] | None = None, *,
    profile: MmProfile = LINUX_6_18, recorder_class: type[Recorder] = Recorder,
) -> Recorder:
    stream = TraceStream()
    host = HostMm(
        Scheduler(stream), stream, ram_bytes=512 * PAGE, swap_bytes=64 * PAGE, profile=profile, checks=True
    )
    process = host.create_process("p")
    do_mmap(process.mm, BASE, pages * PAGE, RW, ANON)

    def ready() -> None:
        for page in range(pages):
            copy_to_user(process, BASE + page * PAGE, b"x")
        if prepare is not None:
            prepare(process)
        host.lru.lru_add_drain_all()

    host.sched.run_task("ready", ready)
    recorder = recorder_class(host, process.mm)
    mmu_notifier_register(recorder, process.mm)
    host.sched.run_task("operation", lambda: operation(process))
    return recorder


def test_class_1_cow_clears_and_flushes_inside_the_bracket_before_it_sets() -> None:
    seen = record(lambda p: copy_to_user(p, BASE, b"y"), prepare=fork_process)
    assert seen.log == ["start", "clear", "flush", "set", "end"]
    assert seen.ranges == [(mn.MMU_NOTIFY_CLEAR, BASE, BASE + PAGE, mn.ORDER_UNDER_PTL)]


def test_class_1_a_write_over_the_zero_page_is_bracketed_the_same_way() -> None:
    def prepare(process: Process) -> None:
        do_madvise(process.mm, BASE, PAGE, MADV_DONTNEED)
        copy_from_user(process, BASE, 1)

    seen = record(lambda p: copy_to_user(p, BASE, b"y"), prepare=prepare)
    assert seen.log == ["start", "clear", "flush", "set", "end"]


def test_class_2_pageout_ends_its_bracket_then_flushes_then_starts_io() -> None:
    seen = record(lambda p: do_madvise(p.mm, BASE, PAGE, MADV_PAGEOUT))
    assert seen.log == ["start", "clear", "swap-entry", "end", "flush", "io"]
    assert seen.ranges == [(mn.MMU_NOTIFY_CLEAR, BASE, BASE + PAGE, mn.ORDER_BATCHED)]


def test_class_2_clean_pages_are_freed_after_one_flush_for_all() -> None:
    def prepare(process: Process) -> None:
        host = process.host
        host.lru.lru_add_drain()
        do_madvise(process.mm, BASE, 3 * PAGE, MADV_PAGEOUT)
        host.swap_device.drain()
        for page in range(3):
            copy_from_user(process, BASE + page * PAGE, 1)
        process.mm.tlb_flush_batched = 0

    seen = record(lambda p: do_madvise(p.mm, BASE, 3 * PAGE, MADV_PAGEOUT), pages=3, prepare=prepare)
    assert seen.log == [*(["start", "clear", "swap-entry", "end"] * 3), "flush", "free", "free", "free"]


def test_class_2_migration_flushes_between_its_brackets_and_the_new_entries() -> None:
    seen = record(lambda p: move_pages(p, [BASE, BASE + PAGE], [1, 1]), pages=2)
    assert seen.log == [*(["start", "clear", "swap-entry", "end"] * 2), "flush", *(["set", "free"] * 2)]


def test_class_3_dontneed_flushes_and_frees_after_its_bracket() -> None:
    seen = record(lambda p: do_madvise(p.mm, BASE, 2 * PAGE, MADV_DONTNEED), pages=2)
    assert seen.log == ["start", "clear", "clear", "end", "flush", "free", "free"]
    assert seen.ranges == [(mn.MMU_NOTIFY_CLEAR, BASE, BASE + 2 * PAGE, mn.ORDER_GATHER)]


def test_class_3_munmap_frees_pages_and_tables_after_its_bracket() -> None:
    seen = record(lambda p: do_munmap(p.mm, BASE, 2 * PAGE), pages=2)
    assert seen.log[:4] == ["start", "clear", "clear", "end"]
    assert seen.log.index("flush") < seen.log.index("free")
    assert seen.ranges == [(mn.MMU_NOTIFY_UNMAP, BASE, BASE + 2 * PAGE, mn.ORDER_GATHER)]


def test_class_4_fork_flushes_once_after_the_bracket() -> None:
    seen = record(fork_process, pages=2)
    assert seen.log == ["start", "protect", "protect", "end", "flush"]
    assert seen.ranges == [(mn.MMU_NOTIFY_PROTECTION_PAGE, BASE, BASE + 2 * PAGE, mn.ORDER_AFTER_END)]


def test_class_4_mprotect_flushes_after_the_bracket() -> None:
    seen = record(lambda p: do_mprotect(p.mm, BASE, 2 * PAGE, PROT_READ), pages=2)
    assert seen.log == ["start", "clear", "set", "clear", "set", "end", "flush"]
    (only,) = seen.ranges
    assert (only[0], only[3]) == (mn.MMU_NOTIFY_PROTECTION_VMA, mn.ORDER_AFTER_END)


def test_class_4_clearing_soft_dirty_brackets_the_whole_mm() -> None:
    seen = record(lambda p: clear_refs_write(p.mm, 4), pages=2)
    assert seen.log[0] == "start"
    assert seen.log[-2:] == ["end", "flush"]
    assert seen.ranges[0][:3] == (mn.MMU_NOTIFY_SOFT_DIRTY, 0, (1 << 64) - 1)


def test_exit_tells_release_before_it_opens_its_bracket() -> None:
    released: list[int] = []

    class Releasing(mn.MmuNotifier):
        def __init__(self, recorder: Recorder) -> None:
            self.recorder = recorder

        def release(self, mm: MmStruct) -> None:
            released.append(len(self.recorder.log))

    def operation(process: Process) -> None:
        recorder = process.mm.notifier_subscriptions.list[0]
        mmu_notifier_register(Releasing(recorder), process.mm)
        exit_process(process)

    seen = record(operation)
    assert released == [0]
    assert "start" not in seen.log, "nobody is registered any more when the unmapping begins"


@pytest.mark.parametrize("pages", [1, 5])
def test_nothing_is_freed_before_its_translation_is_flushed(pages: int) -> None:
    for operation in (
        lambda p: do_madvise(p.mm, BASE, pages * PAGE, MADV_DONTNEED),
        lambda p: do_munmap(p.mm, BASE, pages * PAGE),
        lambda p: move_pages(p, [BASE + n * PAGE for n in range(pages)], [1] * pages),
    ):
        log = record(operation, pages=pages).log
        assert log.index("flush") < log.index("free")
        assert log.index("start") < min(log.index(what) for what in ("clear", "flush"))
