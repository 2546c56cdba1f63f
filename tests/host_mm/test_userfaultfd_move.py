"""Pages that change their place: brackets, what may move, and who meets them on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import _PAGE_SOFT_DIRTY, pte_pfn, pte_present, pte_write, walk_lockless
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mlock import do_mlock
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, do_mmap
from host_mm.mprotect import do_mprotect
from host_mm.page_alloc import GFP_KERNEL
from host_mm.process import Process
from host_mm.rmap import folio_referenced
from host_mm.uaccess import copy_from_user, copy_to_user
from host_mm.userfaultfd import (
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
    UFFDIO_REGISTER_MODE_MISSING,
    userfaultfd,
    userfaultfd_api,
    userfaultfd_move,
    userfaultfd_register,
    userfaultfd_wake,
    userfaultfd_zeropage,
)
from tests.host_mm.machine import ANON, PAGE, RW, run
from tests.host_mm.test_order_classes import BASE, record
from tests.host_mm.uffd_machine import UffdVmm, errno_of

HOLES = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
AWAY = 0x7FE000000000


def lender(pages: int = 16, **kw: Any) -> UffdVmm:
    """The slot is not registered; `AWAY` is, and takes its pages."""
    vm = UffdVmm(0, **kw)
    do_mmap(vm.mm, AWAY, pages * PAGE, RW, ANON | MAP_FIXED)
    userfaultfd_register(vm.ctx, AWAY, pages * PAGE, UFFDIO_REGISTER_MODE_MISSING)
    return vm


def move(vm: UffdVmm, pages: int = 1, offset: int = 0, mode: int = 0) -> int:
    at = vm.base + offset
    return int(vm.task(lambda: userfaultfd_move(vm.ctx, AWAY + offset, at, pages * PAGE, mode)))


def away(vm: UffdVmm, offset: int = 0) -> int:
    return walk_lockless(vm.host.ram, vm.mm.pgd, AWAY + offset)[0]


def test_the_order_is_start_move_flush_end() -> None:
    ctx: dict[Process, Any] = {}
    target = BASE + 0x400000

    def prepare(process: Process) -> None:
        do_mmap(process.mm, target, 2 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
        ctx[process] = userfaultfd(process)
        userfaultfd_api(ctx[process])
        userfaultfd_register(ctx[process], target, 2 * PAGE, UFFDIO_REGISTER_MODE_MISSING)

    seen = record(lambda p: userfaultfd_move(ctx[p], target, BASE, 2 * PAGE), pages=2, prepare=prepare)
    assert seen.log == ["start", "clear", "set", "clear", "set", "flush", "end"]
    assert seen.ranges == [(mn.MMU_NOTIFY_CLEAR, BASE, BASE + 2 * PAGE, mn.ORDER_UNDER_PTL)]


def test_the_frame_itself_moves_soft_dirty_and_writable_and_the_source_is_a_hole() -> None:
    vm = lender()
    vm.task(lambda: vm.guest_store(0, 7))
    pfn = pte_pfn(vm.entry(0))
    vm.brackets()
    assert move(vm) == PAGE
    assert vm.entry(0) == 0
    assert pte_pfn(away(vm)) == pfn
    assert away(vm) & _PAGE_SOFT_DIRTY
    assert pte_write(away(vm))
    assert vm.brackets() == [("clear", 0, PAGE)], "the destination is told to nobody"
    assert vm.task(lambda: copy_from_user(vm.process, AWAY, 1)) == b"\x07"
    assert vm.task(lambda: vm.guest_load(0)) == 0
    vm.close()


def test_the_reverse_map_finds_the_page_at_its_new_place() -> None:
    vm = lender()
    vm.task(lambda: vm.guest_store(0, 7))
    move(vm)
    pfn = pte_pfn(away(vm))
    vm.task(lambda: copy_from_user(vm.process, AWAY, 1))
    assert folio_referenced(vm.host, pfn)[0] == 1
    vm.task(lambda: move_pages(vm.process, [AWAY], [1]))
    assert pte_pfn(away(vm)) != pfn
    vm.task(lambda: (
        vm.host.lru.lru_add_drain_all(), do_madvise(vm.mm, AWAY, PAGE, MADV_PAGEOUT),
        vm.host.swap_device.drain(),
    ))
    assert not pte_present(away(vm))
    assert vm.task(lambda: copy_from_user(vm.process, AWAY, 1)) == b"\x07"
    vm.close()


def test_one_bracket_covers_what_is_left_at_each_step() -> None:
    vm = lender()
    for page in range(4):
        vm.task(lambda at=page: vm.guest_store(at * PAGE, 7))
    vm.task(lambda: do_madvise(vm.mm, vm.base + 2 * PAGE, PAGE, MADV_DONTNEED))
    vm.brackets()
    assert move(vm, 4, mode=HOLES) == 4 * PAGE
    assert vm.brackets() == [("clear", at * PAGE, 4 * PAGE) for at in (0, 2, 3)]
    vm.close()


def test_holes_zero_pages_and_swap_slots() -> None:
    vm = lender()
    vm.task(lambda: vm.guest_store(0, 1))
    vm.task(lambda: vm.guest_load(PAGE))
    vm.task(lambda: vm.guest_store(2 * PAGE, 3))
    vm.task(lambda: (
        vm.host.lru.lru_add_drain_all(), do_madvise(vm.mm, vm.base + 2 * PAGE, PAGE, MADV_PAGEOUT),
        vm.host.swap_device.drain(),
    ))
    slot = vm.entry(2 * PAGE)
    assert not pte_present(slot)
    assert move(vm, 4) == 3 * PAGE, "the hole ends it"
    assert pte_pfn(away(vm, PAGE)) == vm.host.zero_pfn
    assert away(vm, 2 * PAGE) >> 12 == slot >> 12
    assert errno_of(lambda: move(vm, 1, 3 * PAGE)) == "ENOENT"
    assert move(vm, 1, 3 * PAGE, HOLES) == PAGE
    assert vm.task(lambda: copy_from_user(vm.process, AWAY + 2 * PAGE, 1)) == b"\x03"
    vm.close()


def test_a_page_that_others_know_stays() -> None:
    vm = lender()
    vm.task(lambda: vm.guest_store(0, 1))
    child = vm.task(lambda: fork_process(vm.process))
    assert errno_of(lambda: move(vm)) == "EBUSY"
    vm.task(lambda: exit_process(child))
    vm.task(lambda: vm.guest_store(0, 1))
    pfn = pin_user_page(vm.mm, vm.base, FOLL_WRITE | FOLL_LONGTERM)
    assert errno_of(lambda: move(vm)) == "EBUSY"
    unpin_user_page(vm.host, pfn, dirty=True)
    assert move(vm) == PAGE
    vm.close()


@pytest.mark.parametrize(("change", "errno"), [
    (lambda vm: userfaultfd_zeropage(vm.ctx, AWAY, PAGE), "EEXIST"),
    (lambda vm: do_mprotect(vm.mm, AWAY, PAGE, 1), "EINVAL"),
    (lambda vm: (do_mprotect(vm.mm, AWAY, PAGE, 1), do_mprotect(vm.mm, vm.base, PAGE, 1)), "EINVAL"),
    (lambda vm: do_mlock(vm.mm, vm.base, PAGE, 0), "EINVAL"),
])
def test_destinations_that_do_not_fit(change: Callable[[UffdVmm], Any], errno: str) -> None:
    vm = lender()
    vm.task(lambda: vm.guest_store(0, 1))
    vm.task(lambda: change(vm))
    assert errno_of(lambda: move(vm)) == errno
    vm.close()


def test_bad_arguments() -> None:
    vm = lender(4)
    vm.task(lambda: vm.guest_store(0, 1))
    ctx, base = vm.ctx, vm.base
    for dst, src, length, mode, errno in (
        (AWAY + 1, base, PAGE, 0, "EINVAL"), (AWAY, base + 1, PAGE, 0, "EINVAL"),
        (AWAY, base, 0, 0, "EINVAL"),
        (AWAY, base, 100, 0, "EINVAL"), (AWAY, base, PAGE, 4, "EINVAL"), (AWAY, base, 5 * PAGE, 0, "EINVAL"),
        (base + PAGE, base, PAGE, 0, "EINVAL"), (AWAY, 0x20000, PAGE, 0, "ENOENT"),
        (0x20000, base, PAGE, 0, "ENOENT"),
    ):
        assert errno_of(
            lambda d=dst, s=src, n=length, m=mode: userfaultfd_move(ctx, d, s, n, m)
        ) == errno, (dst, src, length, mode)
    vm.close()


@pytest.mark.parametrize("seed", range(60))
def test_beside_writers_reclaim_and_migration_pages_go_and_come_back_whole(seed: int) -> None:
    """The slot is registered too: who meets a page that is away waits, and the handler moves it back."""
    pages = 6
    vm = UffdVmm(ram=1 << 20)
    vm.host.sched.lockdep = {}
    do_mmap(vm.mm, AWAY, pages * PAGE, RW, ANON | MAP_FIXED)
    userfaultfd_register(vm.ctx, AWAY, pages * PAGE, UFFDIO_REGISTER_MODE_MISSING)
    for page in range(pages):
        vm.task(lambda at=page: userfaultfd_zeropage(vm.ctx, vm.base + at * PAGE, PAGE))
        vm.task(lambda at=page: vm.host_write(at * PAGE, 0))
    vm.host.sched.set_strategy(RandomStrategy(seed, 3))

    seen: set[str] = set()

    def take_back(address: int) -> int:
        return userfaultfd_move(vm.ctx, address, address - vm.base + AWAY, PAGE)

    def answer(msg: Any) -> None:
        while True:
            errno = errno_of(lambda: take_back(msg.address))
            seen.add(errno)
            if errno in ("ok", "EEXIST"):
                # EEXIST: it was here already, or a repeated step hid that it came.
                userfaultfd_wake(vm.ctx, msg.address, PAGE)
                return
            vm.host.sched.sleep(1000)

    def writer(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        expected = [0] * pages
        for step in range(20):
            page = rng.randrange(pages)
            offset = page * PAGE + 8 * number
            if rng.random() < 0.5:
                assert vm.host_read(offset) == expected[page]
            else:
                expected[page] = step + 1
                vm.host_write(offset, step + 1)

    def mover() -> None:
        rng = random.Random(f"{seed} mover")
        for _ in range(12):
            offset = rng.randrange(pages) * PAGE
            seen.add(errno_of(lambda at=offset: userfaultfd_move(vm.ctx, AWAY + at, vm.base + at, PAGE)))

    def reclaimer() -> None:
        rng = random.Random(f"{seed} reclaimer")
        for _ in range(8):
            what = rng.randrange(3)
            address = rng.choice((AWAY, vm.base)) + rng.randrange(pages) * PAGE
            if what == 0:
                do_madvise(vm.mm, address, PAGE, MADV_PAGEOUT)
            elif what == 1:
                move_pages(vm.process, [address], [rng.randrange(2)])
            else:
                vm.host.reclaim(0, 0, GFP_KERNEL)

    vm.serve(answer)
    run(vm.host, lambda: writer(0), lambda: writer(1), mover, reclaimer)
    assert seen <= {"ok", "ENOENT", "EBUSY", "EEXIST"}
    vm.host.sched.set_strategy(None)
    vm.close()


def test_a_process_that_writes_through_a_stale_translation_is_stopped() -> None:
    """The source is flushed before its lock is dropped: nobody can write to the page at its old place."""
    vm = lender()
    vm.task(lambda: vm.host_write(0, 1))
    vm.task(lambda: copy_to_user(vm.process, vm.base, b"y"))
    assert vm.base >> 12 in vm.mm.tlb.entries
    move(vm)
    assert vm.base >> 12 not in vm.mm.tlb.entries
    vm.close()
