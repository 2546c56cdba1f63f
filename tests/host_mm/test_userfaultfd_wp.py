"""Write-protection by userfaultfd: its brackets and flush, and what swap, fork and moves make of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import _PAGE_UFFD_WP, pte_present, pte_write
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_UFFD_WP,
    PTE_MARKER_UFFD_WP,
    pte_marker_get,
    pte_swp_uffd_wp_any,
)
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_LONGTERM, FOLL_NOWAIT, FOLL_WRITE, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.process import Process
from host_mm.uaccess import copy_from_user, copy_to_user
from host_mm.userfaultfd import (
    UFFDIO_COPY_MODE_WP,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT_MODE_WP,
    userfaultfd,
    userfaultfd_api,
    userfaultfd_copy,
    userfaultfd_register,
    userfaultfd_unregister,
    userfaultfd_writeprotect,
)
from host_mm.userfaultfd_k import (
    UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_UNPOPULATED,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    UffdMsg,
    UserfaultfdCtx,
)
from tests.host_mm.machine import PAGE, SLOT, run
from tests.host_mm.test_order_classes import BASE, record
from tests.host_mm.uffd_machine import UffdVmm

MISSING, WP = UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
WRITE_WP = UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP


def protect(vm: UffdVmm, offset: int, pages: int = 1) -> None:
    at, mode = vm.base + offset, UFFDIO_WRITEPROTECT_MODE_WP
    vm.task(lambda: userfaultfd_writeprotect(vm.ctx, at, pages * PAGE, mode))


def resolve(vm: UffdVmm, msg: UffdMsg) -> None:
    userfaultfd_writeprotect(vm.ctx, msg.address, PAGE, 0)


def test_the_order_is_start_protect_end_flush() -> None:
    def operation(process: Process) -> None:
        ctx = process_ctx[process]
        userfaultfd_writeprotect(ctx, BASE, 2 * PAGE, UFFDIO_WRITEPROTECT_MODE_WP)

    process_ctx: dict[Process, UserfaultfdCtx] = {}

    def prepare(process: Process) -> None:
        ctx = process_ctx[process] = userfaultfd(process)
        userfaultfd_api(ctx)
        userfaultfd_register(ctx, BASE, 2 * PAGE, WP)

    seen = record(operation, pages=2, prepare=prepare)
    assert seen.log == ["start", "clear", "set", "clear", "set", "end", "flush"]
    (only,) = seen.ranges
    assert (only[0], only[3]) == (mn.MMU_NOTIFY_PROTECTION_VMA, mn.ORDER_AFTER_END)


def test_lifting_it_is_bracketed_too_but_needs_no_flush() -> None:
    process_ctx: dict[Process, Any] = {}

    def prepare(process: Process) -> None:
        ctx = process_ctx[process] = userfaultfd(process)
        userfaultfd_api(ctx)
        userfaultfd_register(ctx, BASE, PAGE, WP)
        userfaultfd_writeprotect(ctx, BASE, PAGE, UFFDIO_WRITEPROTECT_MODE_WP)

    seen = record(lambda p: userfaultfd_writeprotect(process_ctx[p], BASE, PAGE, 0), prepare=prepare)
    assert seen.log[:4] == ["start", "clear", "set", "end"]


def test_a_protected_page_reads_on_and_a_write_waits_for_the_handler() -> None:
    vm = UffdVmm(WP)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    protect(vm, 0x3000)
    assert vm.brackets() == [("protection-vma", 0x3000, 0x4000)]
    saved: list[int] = []

    def answer(msg: UffdMsg) -> None:
        saved.append(vm.host_read(0x3000))
        resolve(vm, msg)

    vm.serve(answer)
    assert vm.task(lambda: vm.guest_load(0x3000)) == 1
    assert vm.log == []
    vm.task(lambda: vm.guest_store(0x3000, 2))
    assert vm.log == [(0x3000, WRITE_WP)]
    assert saved == [1]
    assert vm.brackets() == [("protection-vma", 0x3000, 0x4000)]
    vm.task(lambda: vm.guest_store(0x3000, 3))
    assert len(vm.log) == 1
    vm.close()


def test_a_write_that_may_not_wait_is_told_to_retry() -> None:
    vm = UffdVmm(WP)
    vm.task(lambda: vm.guest_store(0, 1))
    protect(vm, 0)
    assert get_user_pages_unlocked(vm.mm, vm.base, FOLL_WRITE | FOLL_NOWAIT) == -11
    assert not vm.ctx.fault_pending
    vm.close()


def test_pages_that_are_not_there_are_protected_only_by_markers() -> None:
    for features, expected in ((0, []), (UFFD_FEATURE_WP_UNPOPULATED, [(0x3000, WRITE_WP)])):
        vm = UffdVmm(WP, features)
        vm.serve(lambda msg, vm=vm: resolve(vm, msg))
        protect(vm, 0x3000)
        assert bool(pte_marker_get(vm.entry(0x3000)) & PTE_MARKER_UFFD_WP) == bool(features)
        vm.task(lambda vm=vm: vm.guest_store(0x3000, 1))
        assert vm.log == expected
        vm.close()


def test_reading_a_marked_page_maps_the_zero_page_protected() -> None:
    vm = UffdVmm(WP, UFFD_FEATURE_WP_UNPOPULATED)
    vm.serve(lambda msg: resolve(vm, msg))
    protect(vm, 0x3000)
    assert vm.task(lambda: vm.guest_load(0x3000)) == 0
    assert vm.entry(0x3000) & _PAGE_UFFD_WP
    vm.task(lambda: vm.guest_store(0x3000, 1))
    assert vm.log == [(0x3000, WRITE_WP)]
    vm.close()


def test_markers_go_where_no_table_was_and_lifting_them_leaves_nothing() -> None:
    vm = UffdVmm(WP, UFFD_FEATURE_WP_UNPOPULATED)
    protect(vm, 0, SLOT >> 12)
    assert vm.brackets() == [("protection-vma", 0, SLOT)]
    assert pte_marker_get(vm.entry(SLOT - PAGE)) == PTE_MARKER_UFFD_WP
    vm.task(lambda: userfaultfd_writeprotect(vm.ctx, vm.base, SLOT, 0))
    assert vm.entry(SLOT - PAGE) == 0
    vm.close()


def test_copy_may_bring_a_page_protected() -> None:
    vm = UffdVmm(MISSING | WP)

    def answer(msg: UffdMsg) -> None:
        if msg.flags & UFFD_PAGEFAULT_FLAG_WP:
            resolve(vm, msg)
        else:
            userfaultfd_copy(vm.ctx, msg.address, vm.source, PAGE, UFFDIO_COPY_MODE_WP)

    vm.serve(answer)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    assert vm.log == [(0x3000, UFFD_PAGEFAULT_FLAG_WRITE), (0x3000, WRITE_WP)]
    vm.close()


def test_asynchronous_protection_is_lifted_by_the_write_itself() -> None:
    vm = UffdVmm(WP, UFFD_FEATURE_WP_ASYNC)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    protect(vm, 0x3000, 2)
    vm.task(lambda: vm.guest_store(0x3000, 2))
    vm.task(lambda: vm.guest_store(0x4000, 2))
    assert not vm.entry(0x3000) & _PAGE_UFFD_WP
    assert not vm.entry(0x4000) & _PAGE_UFFD_WP
    assert not vm.ctx.fault_pending
    vm.close()


def page_out(vm: UffdVmm, offset: int) -> None:
    def out() -> None:
        vm.host.lru.lru_add_drain_all()
        do_madvise(vm.mm, vm.base + offset, PAGE, MADV_PAGEOUT)
        vm.host.swap_device.drain()

    vm.task(out)


def test_protection_goes_to_swap_and_comes_back() -> None:
    vm = UffdVmm(WP)
    vm.serve(lambda msg: resolve(vm, msg))
    vm.task(lambda: vm.guest_store(0x3000, 1))
    protect(vm, 0x3000)
    page_out(vm, 0x3000)
    assert not pte_present(vm.entry(0x3000))
    assert vm.entry(0x3000) & _PAGE_SWP_UFFD_WP
    assert vm.task(lambda: vm.guest_load(0x3000)) == 1
    assert not pte_write(vm.entry(0x3000))
    vm.task(lambda: vm.guest_store(0x3000, 2))
    assert vm.log == [(0x3000, WRITE_WP)]
    vm.close()


def test_a_page_in_swap_can_be_protected_and_a_write_asks_after_the_swap_in() -> None:
    vm = UffdVmm(WP)
    vm.serve(lambda msg: resolve(vm, msg))
    vm.task(lambda: vm.guest_store(0x3000, 1))
    page_out(vm, 0x3000)
    protect(vm, 0x3000)
    assert vm.entry(0x3000) & _PAGE_SWP_UFFD_WP
    vm.task(lambda: vm.guest_store(0x3000, 2))
    assert vm.log == [(0x3000, WRITE_WP)]
    vm.close()


def test_protection_survives_migration_and_mprotect() -> None:
    vm = UffdVmm(WP)
    vm.serve(lambda msg: resolve(vm, msg))
    vm.task(lambda: vm.guest_store(0x3000, 1))
    protect(vm, 0x3000)
    vm.task(lambda: move_pages(vm.process, [vm.base + 0x3000], [1]))
    assert vm.entry(0x3000) & _PAGE_UFFD_WP
    vm.task(lambda: do_mprotect(vm.mm, vm.base, SLOT, 1))
    vm.task(lambda: do_mprotect(vm.mm, vm.base, SLOT, 3))
    assert not pte_write(vm.entry(0x3000))
    vm.task(lambda: vm.guest_store(0x3000, 2))
    assert vm.log == [(0x3000, WRITE_WP)]
    vm.close()


def test_a_child_and_a_moved_mapping_have_no_protection_left() -> None:
    vm = UffdVmm(WP, UFFD_FEATURE_WP_UNPOPULATED)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    vm.task(lambda: vm.guest_store(0x5000, 1))
    page_out(vm, 0x5000)
    protect(vm, 0x3000, 3)
    child = vm.task(lambda: fork_process(vm.process))
    for offset in (0x3000, 0x4000, 0x5000):
        vm.task(lambda at=offset: copy_to_user(child, vm.base + at, b"c"))
    vm.task(lambda: exit_process(child))
    assert vm.entry(0x3000) & _PAGE_UFFD_WP
    assert pte_swp_uffd_wp_any(vm.entry(0x4000))
    away = 0x7FF000000000
    vm.task(lambda: do_mremap(vm.mm, vm.base, SLOT, SLOT, MREMAP_MAYMOVE | MREMAP_FIXED, away))
    for offset in (0x3000, 0x4000, 0x5000):
        vm.task(lambda at=offset: copy_to_user(vm.process, away + at, b"m"))
    assert vm.task(lambda: copy_from_user(vm.process, away + 0x5001, 1)) == b"\0"
    vm.close()


def test_dropping_a_protected_page_drops_its_protection() -> None:
    vm = UffdVmm(WP, UFFD_FEATURE_WP_UNPOPULATED)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    protect(vm, 0x3000, 2)
    vm.task(lambda: do_madvise(vm.mm, vm.base + 0x3000, 2 * PAGE, MADV_DONTNEED))
    assert (vm.entry(0x3000), vm.entry(0x4000)) == (0, 0)
    vm.close()


def test_unregistering_lifts_every_protection_in_a_bracket() -> None:
    vm = UffdVmm(WP, UFFD_FEATURE_WP_UNPOPULATED)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    protect(vm, 0x3000, 2)
    vm.brackets()
    vm.task(lambda: userfaultfd_unregister(vm.ctx, vm.base, SLOT))
    assert vm.brackets() == [("protection-vma", 0, SLOT)]
    assert pte_write(vm.entry(0x3000)), "an exclusive page is writable at once"
    assert vm.entry(0x4000) == 0
    vm.close()


def test_a_pinned_page_can_be_written_by_dma_in_spite_of_protection() -> None:
    vm = UffdVmm(WP)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    pfn = pin_user_page(vm.mm, vm.base + 0x3000, FOLL_WRITE | FOLL_LONGTERM)
    protect(vm, 0x3000)
    vm.host.ram.write(pfn << 12, b"\x09")
    assert vm.task(lambda: vm.guest_load(0x3000)) == 9
    unpin_user_page(vm.host, pfn, dirty=True)
    vm.close()


@pytest.mark.parametrize("seed", range(40))
def test_beside_writers_forks_and_reclaim_a_snapshot_has_the_bytes_of_its_moment(seed: int) -> None:
    """The handler saves each page before it lets the first write through."""
    pages = 8
    vm = UffdVmm(WP, ram=1 << 20)
    vm.host.sched.lockdep = {}
    for page in range(pages):
        vm.task(lambda at=page: vm.guest_store(at * PAGE, at))
    vm.host.lru.lru_add_drain_all()
    vm.host.sched.set_strategy(RandomStrategy(seed, 3))
    saved: dict[int, int] = {}
    protected: list[bool] = []

    def answer(msg: UffdMsg) -> None:
        offset = msg.address - vm.base
        saved[offset // PAGE] = vm.host_read(offset)
        resolve(vm, msg)

    def snapshot() -> None:
        userfaultfd_writeprotect(vm.ctx, vm.base, pages * PAGE, UFFDIO_WRITEPROTECT_MODE_WP)
        at_that_moment.extend(vm.host_read(page * PAGE) for page in range(pages))
        protected.append(True)

    at_that_moment: list[int] = []
    rng = random.Random(seed)
    written: dict[int, int] = {}

    def writer() -> None:
        while not protected:
            vm.host.sched.sleep(1000)
        for _ in range(20):
            page = rng.randrange(pages)
            value = rng.randrange(1 << 32)
            if rng.random() < 0.5:
                vm.guest_store(page * PAGE, value)
            else:
                vm.host_write(page * PAGE, value)
            written[page] = value

    def disturb() -> None:
        other = random.Random(seed + 1)
        for _ in range(6):
            what = other.randrange(3)
            if what == 0:
                do_madvise(vm.mm, vm.base + other.randrange(pages) * PAGE, PAGE, MADV_PAGEOUT)
            elif what == 1:
                exit_process(fork_process(vm.process))
            else:
                move_pages(vm.process, [vm.base + other.randrange(pages) * PAGE], [other.randrange(2)])

    vm.serve(answer)
    run(vm.host, snapshot, writer, disturb)
    for page, value in written.items():
        assert saved[page] == at_that_moment[page]
        assert vm.task(lambda at=page: vm.host_read(at * PAGE)) == value
    assert set(saved) == set(written)
    vm.host.sched.set_strategy(None)
    vm.close()
