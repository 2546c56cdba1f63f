"""Linux 5.10's orders: where change_pte and invalidate_range stand among the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.fork import fork_process
from host_mm.ksm import scan_until_quiet
from host_mm.madvise import (
    MADV_COLD,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
    MADV_POPULATE_READ,
    do_madvise,
)
from host_mm.migrate import move_pages
from host_mm.mm_types import MmStruct
from host_mm.mmap import PROT_READ, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.task_mmu import clear_refs_write
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.test_order_classes import BASE, PAGE, Recorder, record

ELSEWHERE = 0x20000000
END = ["range", "end"]
"""How a bracket ends that is not the only_end kind."""


class Old(Recorder):
    """Has the callbacks of 5.10 as well."""

    def invalidate_range(self, mm: MmStruct, start: int, end: int) -> None:
        self.log.append("range")

    def change_pte(self, mm: MmStruct, address: int, pte: int) -> None:
        self.log.append("change")


def seen(
    operation: Callable[[Process], Any], pages: int = 1, prepare: Callable[[Process], Any] | None = None,
    profile: MmProfile = LINUX_5_10,
) -> Recorder:
    return record(operation, pages, prepare, profile=profile, recorder_class=Old)


def shared(process: Process) -> None:
    fork_process(process)


def clean_in_swap(process: Process) -> None:
    host = process.host
    host.lru.lru_add_drain()
    do_madvise(process.mm, BASE, PAGE, MADV_PAGEOUT)
    host.swap_device.drain()
    copy_from_user(process, BASE, 1)
    process.mm.tlb_flush_batched = 0


def lazily_freed(process: Process) -> None:
    process.host.lru.lru_add_drain_all()
    do_madvise(process.mm, BASE, PAGE, MADV_FREE)


def mergeable(process: Process) -> None:
    do_madvise(process.mm, BASE, 2 * PAGE, MADV_MERGEABLE)


def two_vmas(process: Process) -> None:
    do_mprotect(process.mm, BASE + PAGE, PAGE, PROT_READ)


def written(process: Process) -> None:
    copy_to_user(process, BASE, b"y")


ORDERS: dict[str, tuple[Callable[[Process], Any], int, Callable[[Process], Any] | None, list[str]]] = {
    "cow": (written, 1, shared, ["start", "clear", "flush", "range", "change", "set", "end"]),
    "cow of the zero page": (
        written, 1, lambda p: (do_madvise(p.mm, BASE, PAGE, MADV_DONTNEED), copy_from_user(p, BASE, 1)),
        ["start", "clear", "flush", "range", "change", "set", "end"],
    ),
    "pageout": (
        lambda p: do_madvise(p.mm, BASE, PAGE, MADV_PAGEOUT), 1, None,
        ["start", "clear", "swap-entry", "range", *END, "flush", "io"],
    ),
    "pageout of a clean page": (
        lambda p: do_madvise(p.mm, BASE, PAGE, MADV_PAGEOUT), 1, clean_in_swap,
        ["start", "clear", "swap-entry", "range", *END, "flush", "free"],
    ),
    "reclaim of a MADV_FREE page": (
        lambda p: do_madvise(p.mm, BASE, PAGE, MADV_PAGEOUT), 1, lazily_freed,
        ["start", "clear", "range", *END, "flush", "free"],
    ),
    "migrate": (
        lambda p: move_pages(p, [BASE, BASE + PAGE], [1, 1]), 2, None,
        ["start", "clear", "flush", "swap-entry", *END, "set", "free"] * 2,
    ),
    "dontneed": (
        lambda p: do_madvise(p.mm, BASE, 2 * PAGE, MADV_DONTNEED), 2, None,
        ["start", "clear", "clear", *END, "flush", "free", "free"],
    ),
    "dontneed of two VMAs": (
        lambda p: do_madvise(p.mm, BASE, 2 * PAGE, MADV_DONTNEED), 2, two_vmas,
        ["start", "clear", *END, "flush", "free"] * 2,
    ),
    "free": (
        lambda p: do_madvise(p.mm, BASE, PAGE, MADV_FREE), 1, None, ["start", "set", *END, "flush"],
    ),
    "cold": (lambda p: do_madvise(p.mm, BASE, PAGE, MADV_COLD), 1, None, ["set", "flush"]),
    "munmap": (
        lambda p: do_munmap(p.mm, BASE, 2 * PAGE), 2, None,
        ["start", "clear", "clear", *END, "flush", "free", "free"],
    ),
    "fork": (fork_process, 2, None, ["start", "protect", "protect", *END, "flush"]),
    "mprotect": (
        lambda p: do_mprotect(p.mm, BASE, 2 * PAGE, PROT_READ), 2, None,
        ["start", "clear", "set", "clear", "set", *END, "flush"],
    ),
    "soft-dirty": (
        lambda p: clear_refs_write(p.mm, 4), 2, None,
        ["start", "clear", "set", "clear", "set", *END, "flush"],
    ),
    "mremap": (
        lambda p: do_mremap(p.mm, BASE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, ELSEWHERE), 1, None,
        ["start", "clear", "set", "flush", *END, "start", *END],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_5_10(name: str) -> None:
    operation, pages, prepare, expected = ORDERS[name]
    log = seen(operation, pages, prepare).log
    # The pages of the tables that munmap and mremap leave empty go last.
    assert log[: len(expected)] == expected
    assert set(log[len(expected) :]) <= {"free", "flush"}


@pytest.mark.parametrize("name", ORDERS)
def test_the_same_without_these_calls_is_no_other_order_than_that_of_6_18(name: str) -> None:
    operation, pages, prepare, expected = ORDERS[name]
    log = seen(operation, pages, prepare, LINUX_6_18).log
    assert not {"range", "change"} & set(log)
    if name not in ("migrate", "dontneed of two VMAs"):
        bare = [what for what in expected if what not in ("range", "change")]
        assert log[: len(bare)] == bare


def test_a_ksm_merge_tells_each_new_entry_and_ends_its_brackets_in_full() -> None:
    def equal(process: Process) -> None:
        for page in range(2):
            copy_to_user(process, BASE + page * PAGE, b"the same")
        mergeable(process)

    log = [what for what in seen(lambda p: scan_until_quiet(p.host), 2, equal).log if what != "free"]
    # One bracket for the page that becomes the KSM page, two for the one that is merged into it.
    assert log.count("start") == log.count("end") == 3
    assert log.count("change") == log.count("clear") == 3
    one = ["start", "clear", "flush", "change", "set", *END]
    assert log == one * 3


def test_a_cow_that_lost_its_race_ends_its_bracket_without_another_invalidate_range() -> None:
    def operation(process: Process) -> None:
        recorder = process.mm.notifier_subscriptions.list[0]

        def late(range_: mn.MmuNotifierRange) -> int:
            recorder.log.append("start")
            # Somebody else's zap comes between the copy and the page-table lock.
            recorder.invalidate_range_start = lambda range_: recorder.log.append("start") or 0
            do_madvise(process.mm, BASE, PAGE, MADV_DONTNEED)
            recorder.log.append("zapped")
            return 0

        recorder.invalidate_range_start = late
        copy_to_user(process, BASE, b"y")

    log = seen(operation, 1, shared).log
    assert log[log.index("zapped") + 1] == "end"


def test_populate_is_no_advice_of_5_10() -> None:
    from errno import EINVAL

    from host_mm.kernel.errors import KernelError

    def operation(process: Process) -> None:
        with pytest.raises(KernelError) as refused:
            do_madvise(process.mm, BASE, PAGE, MADV_POPULATE_READ)
        assert refused.value.errno == EINVAL

    assert seen(operation).log == []


def test_what_5_10_has_not_is_refused() -> None:
    from errno import EINVAL, ENOTTY, EOPNOTSUPP

    from host_mm.kernel.errors import KernelError
    from host_mm.pagemap_scan import PmScanArg, do_pagemap_scan
    from host_mm.rmap_device import make_device_exclusive
    from host_mm.userfaultfd import userfaultfd, userfaultfd_api, userfaultfd_move, userfaultfd_release

    def operation(process: Process) -> None:
        mm = process.mm
        assert make_device_exclusive(mm, BASE, "me") == -EOPNOTSUPP
        ctx = userfaultfd(process)
        userfaultfd_api(ctx)
        with pytest.raises(KernelError) as refused:
            userfaultfd_move(ctx, ELSEWHERE, BASE, PAGE)
        assert refused.value.errno == EINVAL
        userfaultfd_release(ctx)
        with pytest.raises(KernelError) as refused:
            do_pagemap_scan(mm, PmScanArg(BASE, BASE + PAGE))
        assert refused.value.errno == ENOTTY

    assert seen(operation).log == []
