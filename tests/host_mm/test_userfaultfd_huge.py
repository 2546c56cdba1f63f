"""userfaultfd and PAGEMAP_SCAN where huge pages are: they are split before a part of them changes."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.mmap import MAP_FIXED, do_mmap
from host_mm.pagemap import PM_PRESENT, PM_UFFD_WP, pagemap_read
from host_mm.pagemap_scan import (
    PAGE_IS_PRESENT,
    PAGE_IS_WRITTEN,
    PM_SCAN_WP_MATCHING,
    PmScanArg,
    do_pagemap_scan,
)
from host_mm.uaccess import copy_from_user
from host_mm.userfaultfd import (
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    userfaultfd,
    userfaultfd_api,
    userfaultfd_copy,
    userfaultfd_move,
    userfaultfd_register,
    userfaultfd_release,
    userfaultfd_zeropage,
)
from host_mm.userfaultfd_k import UFFD_FEATURE_WP_ASYNC
from tests.host_mm.machine import ANON, PAGE, RW
from tests.host_mm.thp_machine import HUGE, ThpVmm
from tests.host_mm.uffd_machine import errno_of

AWAY = 0x7FE000000000


def registered(vm: ThpVmm, at: int, mode: int, features: int = 0) -> Any:
    ctx = userfaultfd(vm.process)
    userfaultfd_api(ctx, features)
    userfaultfd_register(ctx, at, HUGE, mode)
    return ctx


def huge(vm: ThpVmm) -> None:
    """The first 2 MiB are one folio, with the page's number in each page."""
    vm.task(lambda: [vm.host_write(page * PAGE, page + 1) for page in range(HUGE // PAGE)])
    assert vm.level(0) == 2


@pytest.mark.parametrize("pages", [1, 512])
def test_pages_of_a_huge_page_move_after_it_was_split(pages: int) -> None:
    vm = ThpVmm()
    huge(vm)
    do_mmap(vm.mm, AWAY, HUGE, RW, ANON | MAP_FIXED)
    ctx = registered(vm, AWAY, UFFDIO_REGISTER_MODE_MISSING)
    moved = vm.task(lambda: userfaultfd_move(ctx, AWAY, vm.base, pages * PAGE))
    assert moved == pages * PAGE
    assert vm.level(0) == 0
    for page in (0, pages - 1):
        found = vm.task(lambda at=page: copy_from_user(vm.process, AWAY + at * PAGE, 2))
        assert int.from_bytes(found, "little") == page + 1
    vm.task(lambda: userfaultfd_release(ctx))
    vm.audit()


def test_a_huge_page_that_a_child_shares_stays() -> None:
    vm = ThpVmm()
    huge(vm)
    child = vm.task(lambda: fork_process(vm.process))
    do_mmap(vm.mm, AWAY, HUGE, RW, ANON | MAP_FIXED)
    ctx = registered(vm, AWAY, UFFDIO_REGISTER_MODE_MISSING)
    assert errno_of(lambda: vm.task(lambda: userfaultfd_move(ctx, AWAY, vm.base, PAGE))) == "EBUSY"
    vm.task(lambda: exit_process(child))
    vm.task(lambda: userfaultfd_release(ctx))
    vm.audit()


def test_the_huge_zero_page_moves_as_zero_pages() -> None:
    vm = ThpVmm()
    vm.task(lambda: vm.guest_load(0))
    do_mmap(vm.mm, AWAY, HUGE, RW, ANON | MAP_FIXED)
    ctx = registered(vm, AWAY, UFFDIO_REGISTER_MODE_MISSING)
    assert vm.task(lambda: userfaultfd_move(ctx, AWAY, vm.base, 2 * PAGE)) == 2 * PAGE
    vm.task(lambda: userfaultfd_release(ctx))
    vm.audit()


def test_nothing_is_filled_or_moved_into_a_huge_page() -> None:
    vm = ThpVmm()
    huge(vm)
    source = do_mmap(vm.mm, AWAY, HUGE, RW, ANON | MAP_FIXED)
    vm.task(lambda: copy_from_user(vm.process, source, 1))
    ctx = registered(vm, vm.base, UFFDIO_REGISTER_MODE_MISSING)
    for ioctl in (
        lambda: userfaultfd_copy(ctx, vm.base, source, PAGE),
        lambda: userfaultfd_zeropage(ctx, vm.base, PAGE),
        lambda: userfaultfd_move(ctx, vm.base, source, PAGE),
    ):
        assert errno_of(lambda call=ioctl: vm.task(call)) == "EEXIST"
    vm.task(lambda: userfaultfd_release(ctx))


def test_a_scan_reads_a_huge_page_whole_and_splits_it_to_protect() -> None:
    vm = ThpVmm()
    huge(vm)
    words = pagemap_read(vm.mm, vm.base, 512)
    assert all(word & PM_PRESENT for word in words)
    assert [word - words[0] for word in words] == list(range(512))
    ctx = registered(vm, vm.base, UFFDIO_REGISTER_MODE_WP, UFFD_FEATURE_WP_ASYNC)

    def scan(flags: int) -> int:
        arg = PmScanArg(
            vm.base, vm.base + HUGE, flags=flags, vec_len=1000, category_mask=PAGE_IS_WRITTEN,
            category_anyof_mask=PAGE_IS_PRESENT, return_mask=PAGE_IS_WRITTEN,
        )
        return sum(r.end - r.start for r in vm.task(lambda: do_pagemap_scan(vm.mm, arg))) // PAGE

    assert scan(0) == 512
    assert vm.level(0) == 2
    assert scan(PM_SCAN_WP_MATCHING) == 512
    assert vm.level(0) == 1
    assert all(word & PM_UFFD_WP for word in pagemap_read(vm.mm, vm.base, 512))
    vm.task(lambda: vm.host_write(7 * PAGE, 1))
    assert scan(PM_SCAN_WP_MATCHING) == 1
    vm.task(lambda: userfaultfd_release(ctx))
    vm.audit()
