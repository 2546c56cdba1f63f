"""What pagemap says of a page, and scans that protect what they find."""

from __future__ import annotations

import random

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.swapops import PTE_MARKER_UFFD_WP, pte_marker_get
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.pagemap import (
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
    pagemap_read,
)
from host_mm.pagemap_scan import (
    PAGE_IS_PFNZERO,
    PAGE_IS_PRESENT,
    PAGE_IS_SOFT_DIRTY,
    PAGE_IS_SWAPPED,
    PAGE_IS_WPALLOWED,
    PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING,
    PageRegion,
    PmScanArg,
    do_pagemap_scan,
)
from host_mm.process import Process
from host_mm.task_mmu import clear_refs_write
from host_mm.userfaultfd import (
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    userfaultfd,
    userfaultfd_api,
    userfaultfd_register,
    userfaultfd_zeropage,
)
from host_mm.userfaultfd_k import UFFD_FEATURE_WP_ASYNC
from tests.host_mm.machine import PAGE, SLOT, Vmm, run
from tests.host_mm.test_order_classes import BASE, record
from tests.host_mm.uffd_machine import UffdVmm, errno_of

M2 = 2 << 20
WP = UFFDIO_REGISTER_MODE_WP


def tracked() -> UffdVmm:
    return UffdVmm(WP, UFFD_FEATURE_WP_ASYNC)


def scan(vm: Vmm, offset: int = 0, length: int = SLOT, **args: int) -> list[tuple[int, int, int]]:
    """(first page, pages, categories) of each region."""
    arg = PmScanArg(vm.base + offset, vm.base + offset + length, **args)
    found = vm.host.sched.run_task("scan", lambda: do_pagemap_scan(vm.mm, arg))
    return [((r.start - vm.base) >> 12, (r.end - r.start) >> 12, r.categories) for r in found]


def written(vm: Vmm, *, protect: bool, **args: int) -> list[int]:
    """The pages that were written since they were protected last."""
    flags = PM_SCAN_WP_MATCHING if protect else 0
    both = PAGE_IS_WRITTEN | PAGE_IS_PRESENT
    found = scan(vm, flags=flags, vec_len=1000, category_mask=PAGE_IS_WRITTEN, return_mask=both, **args)
    return [first + n for first, pages, _ in found for n in range(pages)]


# -- reading --------------------------------------------------------------------------------------
def test_an_entry_names_the_frame_or_the_slot_and_the_history() -> None:
    vm = Vmm()
    task = vm.host.sched.run_task
    vm.guest_store(0, 1)
    vm.guest_load(PAGE)
    vm.guest_store(2 * PAGE, 1)
    task("out", lambda: (
        vm.host.lru.lru_add_drain_all(), do_madvise(vm.mm, vm.base + 2 * PAGE, PAGE, MADV_PAGEOUT),
        vm.host.swap_device.drain(),
    ))
    clear_refs_write(vm.mm, 4)
    vm.guest_store(0, 2)
    mine, zero, swapped, empty = pagemap_read(vm.mm, vm.base, 4)
    assert mine & ~PM_PFRAME_MASK == PM_PRESENT | PM_MMAP_EXCLUSIVE | PM_SOFT_DIRTY
    assert vm.host.ram.u64[(mine & PM_PFRAME_MASK) << 9] == 2
    assert zero == PM_PRESENT | vm.host.zero_pfn
    assert swapped & ~PM_PFRAME_MASK == PM_SWAP
    assert empty == 0


def test_a_new_mapping_is_soft_dirty_as_a_whole_and_a_hole_is_nothing() -> None:
    vm = Vmm()
    assert pagemap_read(vm.mm, vm.base + SLOT - PAGE, 2) == [PM_SOFT_DIRTY, 0]
    clear_refs_write(vm.mm, 4)
    assert pagemap_read(vm.mm, vm.base + SLOT - PAGE, 2) == [0, 0]
    assert errno_of(lambda: pagemap_read(vm.mm, vm.base + 1, 1)) == "EINVAL"


def test_a_shared_page_is_not_exclusive_and_a_protected_one_says_so() -> None:
    vm = tracked()
    vm.task(lambda: vm.guest_store(0, 1))
    child = vm.task(lambda: fork_process(vm.process))
    assert not pagemap_read(vm.mm, vm.base, 1)[0] & PM_MMAP_EXCLUSIVE
    vm.task(lambda: exit_process(child))
    written(vm, protect=True)
    assert pagemap_read(vm.mm, vm.base, 1)[0] & PM_UFFD_WP
    vm.close()


# -- arguments ------------------------------------------------------------------------------------
def test_bad_arguments_are_refused_and_nothing_is_told() -> None:
    vm = tracked()
    base = vm.base

    def refused(start: int = base, end: int = base + PAGE, **args: int) -> str:
        return errno_of(lambda: do_pagemap_scan(vm.mm, PmScanArg(start, end, **args)))

    assert refused(start=base + 1) == "EINVAL"
    assert refused(flags=4) == "EINVAL"
    assert refused(category_mask=1 << 9) == "EINVAL"
    assert refused(end=base - PAGE) == "EFAULT"
    assert refused(end=1 << 48) == "EFAULT"
    assert vm.brackets() == []
    vm.close()


def test_wp_async_is_checked_or_silently_required() -> None:
    vm = UffdVmm(WP)
    vm.task(lambda: vm.guest_store(0, 1))
    arg = PmScanArg(vm.base, vm.base + PAGE, PM_SCAN_CHECK_WPASYNC)
    assert errno_of(lambda: do_pagemap_scan(vm.mm, arg)) == "EPERM"
    assert written(vm, protect=True) == []
    assert vm.brackets() == [("protection-vma", 0, SLOT)], "the bracket opens before the walk looks"
    assert not pagemap_read(vm.mm, vm.base, 1)[0] & PM_UFFD_WP
    assert written(vm, protect=False) == [0]
    assert vm.brackets() == []
    vm.close()


# -- scanning -------------------------------------------------------------------------------------
def test_the_order_is_start_protect_flush_end() -> None:
    def prepare(process: Process) -> None:
        ctx = userfaultfd(process)
        userfaultfd_api(ctx, UFFD_FEATURE_WP_ASYNC)
        userfaultfd_register(ctx, BASE, 2 * PAGE, WP)

    arg = PmScanArg(BASE, BASE + 2 * PAGE, PM_SCAN_WP_MATCHING)
    seen = record(lambda p: do_pagemap_scan(p.mm, arg), pages=2, prepare=prepare)
    assert seen.log == ["start", "clear", "set", "clear", "set", "flush", "end"]
    assert seen.ranges == [(mn.MMU_NOTIFY_PROTECTION_VMA, BASE, BASE + 2 * PAGE, mn.ORDER_UNDER_PTL)]


def test_only_what_was_written_since_the_last_protection_is_found() -> None:
    vm = tracked()
    for page in (1, 2, 5):
        vm.task(lambda at=page: vm.guest_store(at * PAGE, 1))
    assert written(vm, protect=False) == [1, 2, 5]
    assert written(vm, protect=True) == [1, 2, 5]
    assert written(vm, protect=True) == []
    vm.task(lambda: vm.guest_load(PAGE))
    vm.task(lambda: vm.guest_store(2 * PAGE, 2))
    vm.task(lambda: vm.guest_store(7 * PAGE, 2))
    assert written(vm, protect=True) == [2, 7]
    assert vm.log == [], "no message is ever sent"
    vm.close()


def test_protection_holds_in_swap_and_across_migration() -> None:
    vm = tracked()
    vm.task(lambda: vm.guest_store(0, 1))
    vm.task(lambda: vm.guest_store(PAGE, 1))
    written(vm, protect=True)
    vm.task(lambda: (
        vm.host.lru.lru_add_drain_all(), do_madvise(vm.mm, vm.base, PAGE, MADV_PAGEOUT),
        vm.host.swap_device.drain(),
    ))
    vm.task(lambda: move_pages(vm.process, [vm.base + PAGE], [1]))
    assert written(vm, protect=True) == []
    assert scan(vm, vec_len=9, category_mask=PAGE_IS_SWAPPED, return_mask=PAGE_IS_SWAPPED) == [
        (0, 1, PAGE_IS_SWAPPED)
    ]
    vm.task(lambda: vm.guest_store(0, 2))
    assert written(vm, protect=True) == [0]
    vm.close()


def test_categories_and_their_inversion() -> None:
    vm = tracked()
    vm.task(lambda: vm.guest_store(0, 1))
    vm.task(lambda: vm.guest_load(PAGE))
    every = PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_PFNZERO | PAGE_IS_SOFT_DIRTY
    found = scan(vm, 0, 3 * PAGE, vec_len=9, category_mask=PAGE_IS_PRESENT, return_mask=every)
    common = PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SOFT_DIRTY
    assert found == [(0, 1, common), (1, 1, common | PAGE_IS_PFNZERO)]
    absent = scan(
        vm, 0, 3 * PAGE, vec_len=9, category_inverted=PAGE_IS_PRESENT, category_mask=PAGE_IS_PRESENT,
        return_mask=PAGE_IS_PRESENT,
    )
    assert absent == [(2, 1, 0)]
    anyof = scan(vm, 0, 3 * PAGE, vec_len=9, category_anyof_mask=PAGE_IS_PFNZERO | PAGE_IS_SWAPPED)
    assert anyof == [(1, 1, 0)]
    vm.close()


def test_who_asks_for_written_pages_alone_is_told_of_empty_entries_too() -> None:
    vm = tracked()
    vm.task(lambda: vm.guest_store(0, 1))
    args = {"vec_len": 9, "category_mask": PAGE_IS_WRITTEN}
    assert scan(vm, 0, 4 * PAGE, return_mask=PAGE_IS_WRITTEN, **args) == [(0, 4, PAGE_IS_WRITTEN)]
    assert scan(vm, 0, 4 * PAGE, return_mask=PAGE_IS_WRITTEN | PAGE_IS_PRESENT, **args) == [
        (0, 1, PAGE_IS_WRITTEN | PAGE_IS_PRESENT)
    ]
    vm.close()


def test_a_scan_that_wants_no_answer_protects_everything_also_what_is_not_there() -> None:
    vm = tracked()
    vm.task(lambda: vm.guest_store(0, 1))
    assert scan(vm, 0, SLOT, flags=PM_SCAN_WP_MATCHING) == []
    assert pte_marker_get(vm.entry(PAGE)) == PTE_MARKER_UFFD_WP
    assert pte_marker_get(vm.entry(SLOT - PAGE)) == PTE_MARKER_UFFD_WP
    brackets = vm.brackets()
    assert brackets[0] == ("protection-vma", 0, SLOT)
    assert set(brackets[1:]) == {("protection-vma", at, at + M2) for at in (M2, 2 * M2, 3 * M2)}
    assert written(vm, protect=False) == []
    vm.task(lambda: vm.guest_store(SLOT - PAGE, 1))
    assert written(vm, protect=False) == [(SLOT >> 12) - 1]
    vm.close()


def test_limits_stop_the_scan_where_they_are_reached() -> None:
    vm = tracked()
    for page in range(0, 8, 2):
        vm.task(lambda at=page: vm.guest_store(at * PAGE, 1))
    args = {"category_mask": PAGE_IS_PRESENT, "return_mask": PAGE_IS_PRESENT}
    arg = PmScanArg(vm.base, vm.base + SLOT, vec_len=2, **args)
    assert do_pagemap_scan(vm.mm, arg) == [
        PageRegion(vm.base + at * PAGE, vm.base + (at + 1) * PAGE, PAGE_IS_PRESENT) for at in (0, 2)
    ]
    assert arg.walk_end == vm.base + 4 * PAGE
    arg = PmScanArg(vm.base, vm.base + SLOT, vec_len=9, max_pages=3, **args)
    assert len(do_pagemap_scan(vm.mm, arg)) == 3
    assert arg.walk_end == vm.base + 6 * PAGE
    arg = PmScanArg(vm.base, vm.base + SLOT, vec_len=9, **args)
    assert len(do_pagemap_scan(vm.mm, arg)) == 4
    assert arg.walk_end == vm.base + SLOT
    vm.close()


def test_more_regions_than_the_kernel_buffers_are_found_in_several_brackets() -> None:
    vm = tracked()
    pages = range(0, 1200, 2)
    for page in pages:
        vm.task(lambda at=page: vm.guest_store(at * PAGE, 1))
    vm.brackets()
    assert written(vm, protect=True) == list(pages)
    assert vm.brackets() == [("protection-vma", 0, SLOT), ("protection-vma", 1024 * PAGE, SLOT)]
    vm.close()


@pytest.mark.parametrize("seed", range(30))
def test_no_write_gets_lost_between_scans(seed: int) -> None:
    vm = tracked()
    vm.host.sched.lockdep = {}
    pages = 6
    for page in range(pages):
        vm.task(lambda at=page: vm.guest_store(at * PAGE, 0))
    written(vm, protect=True)
    vm.host.sched.set_strategy(RandomStrategy(seed, 3))
    copy = dict.fromkeys(range(pages), (0, 0))
    done: list[int] = []

    def writer(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        for _ in range(15):
            vm.host_write(rng.randrange(pages) * PAGE + 8 * number, rng.randrange(1 << 30))
        done.append(number)

    def words(page: int) -> tuple[int, int]:
        return vm.host_read(page * PAGE), vm.host_read(page * PAGE + 8)

    def scanner() -> None:
        last = False
        while not last:
            last = len(done) == 2
            for page in written(vm, protect=True):
                copy[page] = words(page)

    run(vm.host, lambda: writer(0), lambda: writer(1), scanner)
    vm.host.sched.set_strategy(None)
    assert copy == {page: words(page) for page in range(pages)}
    vm.close()


@pytest.mark.parametrize("mode", [UFFDIO_REGISTER_MODE_MISSING | WP])
def test_missing_pages_stay_missing_under_a_marker(mode: int) -> None:
    vm = UffdVmm(mode, UFFD_FEATURE_WP_ASYNC)
    scan(vm, 0, PAGE, flags=PM_SCAN_WP_MATCHING)
    vm.serve(vm.copy)
    vm.task(lambda: vm.guest_load(0))
    assert vm.log == [(0, 0)]
    vm.task(lambda: do_madvise(vm.mm, vm.base, PAGE, MADV_DONTNEED))
    scan(vm, 0, PAGE, flags=PM_SCAN_WP_MATCHING)
    assert errno_of(lambda: vm.task(lambda: userfaultfd_zeropage(vm.ctx, vm.base, PAGE))) == "EEXIST", (
        "only COPY may replace a marker"
    )
    vm.close()
