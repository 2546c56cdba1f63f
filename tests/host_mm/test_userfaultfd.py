"""The errnos of the userfaultfd ioctls, and what registration does to mappings."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_mm.mm_types import VM_MAYWRITE, VM_UFFD_MISSING, VM_UFFD_WP
from host_mm.mmap import do_mmap, do_munmap
from host_mm.pagemap_scan import PmScanArg, do_pagemap_scan
from host_mm.profile import LINUX_5_10
from host_mm.userfaultfd import (
    UFFDIO_COPY_MODE_WP,
    UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
    UFFDIO_WRITEPROTECT_MODE_WP,
    userfaultfd,
    userfaultfd_api,
    userfaultfd_continue,
    userfaultfd_copy,
    userfaultfd_move,
    userfaultfd_poison,
    userfaultfd_register,
    userfaultfd_release,
    userfaultfd_unregister,
    userfaultfd_wake,
    userfaultfd_writeprotect,
    userfaultfd_zeropage,
)
from host_mm.userfaultfd_k import UFFD_FEATURE_WP_ASYNC
from tests.host_mm.machine import ANON, PAGE, RW, SLOT
from tests.host_mm.uffd_machine import UffdVmm, errno_of

MISSING, WP = UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
TOP = 1 << 47

BAD_RANGES = [(1, PAGE), (0, 0), (0, 1), (-0x7FFFF0400000, PAGE), (TOP, PAGE), (0, TOP)]


@pytest.mark.parametrize(("offset", "length"), BAD_RANGES)
@pytest.mark.parametrize("ioctl", [
    lambda vm, at, n: userfaultfd_register(vm.ctx, at, n, MISSING),
    lambda vm, at, n: userfaultfd_unregister(vm.ctx, at, n),
    lambda vm, at, n: userfaultfd_wake(vm.ctx, at, n),
    lambda vm, at, n: userfaultfd_copy(vm.ctx, at, vm.source, n),
    lambda vm, at, n: userfaultfd_zeropage(vm.ctx, at, n),
    lambda vm, at, n: userfaultfd_poison(vm.ctx, at, n),
    lambda vm, at, n: userfaultfd_writeprotect(vm.ctx, at, n, UFFDIO_WRITEPROTECT_MODE_WP),
])
def test_a_range_that_is_no_pages_of_user_space_is_einval(
    ioctl: Callable[[UffdVmm, int, int], None], offset: int, length: int
) -> None:
    vm = UffdVmm(MISSING | WP)
    assert errno_of(lambda: ioctl(vm, vm.base + offset, length)) == "EINVAL"
    assert vm.brackets() == []
    vm.close()


def test_nothing_works_before_api_and_api_only_once_and_with_known_features() -> None:
    vm = UffdVmm(0)
    ctx = userfaultfd(vm.process)
    assert errno_of(lambda: userfaultfd_register(ctx, vm.base, PAGE, MISSING)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_api(ctx, 1 << 1)) == "EINVAL", "events are not offered"
    userfaultfd_api(ctx)
    assert errno_of(lambda: userfaultfd_api(ctx)) == "EINVAL"
    userfaultfd_release(ctx)
    vm.close()


def test_register_refuses_by_mode_hole_owner_and_right() -> None:
    vm = UffdVmm(0)
    other = userfaultfd(vm.process)
    userfaultfd_api(other)
    at = vm.base
    for mode in (0, 8, UFFDIO_REGISTER_MODE_MINOR):
        assert errno_of(lambda mode=mode: userfaultfd_register(vm.ctx, at, PAGE, mode)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_register(vm.ctx, at - PAGE, PAGE, MISSING)) == "EINVAL"
    userfaultfd_register(vm.ctx, at, 2 * PAGE, MISSING)
    assert errno_of(lambda: userfaultfd_register(other, at + PAGE, 2 * PAGE, MISSING)) == "EBUSY"
    assert errno_of(lambda: userfaultfd_unregister(other, at, PAGE)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_register(vm.ctx, at, 4 * PAGE, MISSING)) == "ok"
    vma = vm.mm.vma_lookup(at + 4 * PAGE)
    assert vma is not None
    vma.flags &= ~VM_MAYWRITE
    assert errno_of(lambda: userfaultfd_register(vm.ctx, vma.start, PAGE, MISSING)) == "EPERM"
    vma.flags |= VM_MAYWRITE
    userfaultfd_release(other)
    vm.close()


def test_registration_splits_mappings_and_taking_it_back_merges_them() -> None:
    vm = UffdVmm(0)
    count = len(vm.mm.vmas)
    userfaultfd_register(vm.ctx, vm.base + 4 * PAGE, 4 * PAGE, MISSING)
    userfaultfd_register(vm.ctx, vm.base + 6 * PAGE, 4 * PAGE, WP)
    flags = [vma.flags & (VM_UFFD_MISSING | VM_UFFD_WP) for vma in vm.mm.vmas_in(vm.base, vm.base + SLOT)]
    assert flags == [0, VM_UFFD_MISSING, VM_UFFD_WP, 0], "the modes of the last call count"
    userfaultfd_register(vm.ctx, vm.base + 4 * PAGE, 6 * PAGE, MISSING | WP)
    assert len(vm.mm.vmas_in(vm.base, vm.base + SLOT)) == 3
    userfaultfd_unregister(vm.ctx, vm.base, SLOT)
    assert len(vm.mm.vmas) == count
    # The first cut of these 2 MiB is a split; protections are lifted where there could be any.
    assert vm.brackets() == [("clear", 0, 2 << 20), ("protection-vma", 4 * PAGE, 10 * PAGE)]
    vm.close()


def test_registered_mappings_of_two_userfaultfds_do_not_merge() -> None:
    vm = UffdVmm(0)
    other = userfaultfd(vm.process)
    userfaultfd_api(other)
    userfaultfd_register(vm.ctx, vm.base, PAGE, MISSING)
    userfaultfd_register(other, vm.base + PAGE, PAGE, MISSING)
    assert len(vm.mm.vmas_in(vm.base, vm.base + SLOT)) == 3
    userfaultfd_release(other)
    assert len(vm.mm.vmas_in(vm.base, vm.base + SLOT)) == 2
    vm.close()


def test_copy_and_zeropage_refuse_what_is_there_or_not_registered() -> None:
    vm = UffdVmm(0)
    userfaultfd_register(vm.ctx, vm.base, 8 * PAGE, MISSING)
    at = vm.base
    assert userfaultfd_copy(vm.ctx, at, vm.source, PAGE) == PAGE
    for ioctl in (
        lambda: userfaultfd_copy(vm.ctx, at, vm.source, PAGE),
        lambda: userfaultfd_zeropage(vm.ctx, at, PAGE),
        lambda: userfaultfd_poison(vm.ctx, at, PAGE),
    ):
        assert errno_of(ioctl) == "EEXIST"
    assert errno_of(lambda: userfaultfd_copy(vm.ctx, at + 7 * PAGE, vm.source, 2 * PAGE)) == "ENOENT"
    assert errno_of(lambda: userfaultfd_zeropage(vm.ctx, at + 8 * PAGE, PAGE)) == "ENOENT"
    assert errno_of(lambda: userfaultfd_zeropage(vm.ctx, at - PAGE, PAGE)) == "ENOENT"
    assert errno_of(lambda: userfaultfd_copy(vm.ctx, at + PAGE, 0x20000, PAGE)) == "EFAULT"
    assert errno_of(lambda: userfaultfd_copy(vm.ctx, at + PAGE, vm.source, PAGE, 4)) == "EINVAL"
    wp = UFFDIO_COPY_MODE_WP
    assert errno_of(lambda: userfaultfd_copy(vm.ctx, at + PAGE, vm.source, PAGE, wp)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_zeropage(vm.ctx, at + PAGE, PAGE, 2)) == "EINVAL"
    vm.close()


def test_an_ioctl_that_meets_a_page_answers_how_far_it_came() -> None:
    vm = UffdVmm()
    userfaultfd_zeropage(vm.ctx, vm.base + 2 * PAGE, PAGE)
    source = do_mmap(vm.mm, 0, 4 * PAGE, RW, ANON)
    assert userfaultfd_copy(vm.ctx, vm.base, source, 4 * PAGE) == 2 * PAGE
    vm.close()


def test_writeprotect_refuses_modes_and_what_is_not_registered_for_it() -> None:
    vm = UffdVmm(0)
    protect, dontwake = UFFDIO_WRITEPROTECT_MODE_WP, UFFDIO_WRITEPROTECT_MODE_DONTWAKE
    userfaultfd_register(vm.ctx, vm.base, 4 * PAGE, WP)
    userfaultfd_register(vm.ctx, vm.base + 4 * PAGE, 4 * PAGE, MISSING)
    assert errno_of(lambda: userfaultfd_writeprotect(vm.ctx, vm.base, PAGE, 4)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_writeprotect(vm.ctx, vm.base, PAGE, protect | dontwake)) == "EINVAL"
    assert errno_of(lambda: userfaultfd_writeprotect(vm.ctx, vm.base, 5 * PAGE, protect)) == "ENOENT"
    assert errno_of(lambda: userfaultfd_writeprotect(vm.ctx, vm.base + 4 * PAGE, PAGE, protect)) == "ENOENT"
    do_munmap(vm.mm, vm.base + PAGE, PAGE)
    assert errno_of(lambda: userfaultfd_writeprotect(vm.ctx, vm.base, 4 * PAGE, protect)) == "ok"
    assert errno_of(lambda: userfaultfd_writeprotect(vm.ctx, vm.base + PAGE, PAGE, protect)) == "ENOENT"
    vm.close()


def test_a_poisoned_page_gives_efault_for_good() -> None:
    vm = UffdVmm()
    assert userfaultfd_poison(vm.ctx, vm.base, PAGE) == PAGE
    assert errno_of(lambda: vm.host_read(0)) == "EFAULT"
    assert errno_of(lambda: userfaultfd_poison(vm.ctx, vm.base, PAGE)) == "ok", "a marker may be replaced"
    vm.close()


def test_linux_5_10_offers_less() -> None:
    vm = UffdVmm(0, profile=LINUX_5_10)
    other = userfaultfd(vm.process)
    assert errno_of(lambda: userfaultfd_api(other, UFFD_FEATURE_WP_ASYNC)) == "EINVAL"
    userfaultfd_api(other)
    userfaultfd_register(other, vm.base, 4 * PAGE, MISSING | WP)
    for ioctl in (
        lambda: userfaultfd_move(other, vm.base, vm.source, PAGE),
        lambda: userfaultfd_poison(other, vm.base, PAGE),
        lambda: userfaultfd_continue(other, vm.base, PAGE),
    ):
        assert errno_of(ioctl) == "EINVAL"
    assert errno_of(lambda: do_pagemap_scan(vm.mm, PmScanArg(vm.base, vm.base + PAGE))) == "ENOTTY"
    assert userfaultfd_copy(other, vm.base, vm.source, PAGE) == PAGE
    userfaultfd_release(other)
    vm.close()
