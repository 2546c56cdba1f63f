"""Pages that a user task fills in: where the bytes come from, and who wins a race for the entry."""

from __future__ import annotations

import pytest

from host_mm.arch.x86.pgtable import pte_dirty, pte_write
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmap import do_mmap
from host_mm.mprotect import do_mprotect
from host_mm.uaccess import copy_to_user
from host_mm.userfaultfd import userfaultfd_copy, userfaultfd_zeropage
from tests.host_mm.machine import ANON, PAGE, RW, run
from tests.host_mm.uffd_machine import UffdVmm, errno_of


def test_a_copied_page_is_exclusive_dirty_and_writable_and_nobody_is_told() -> None:
    vm = UffdVmm()
    vm.task(lambda: userfaultfd_copy(vm.ctx, vm.base, vm.source, PAGE))
    entry = vm.entry(0)
    assert pte_write(entry)
    assert pte_dirty(entry)
    vm.task(lambda: vm.guest_store(0, 5))
    assert vm.brackets() == []
    assert vm.log == []
    vm.close()


def test_writing_a_zeropage_is_an_ordinary_cow() -> None:
    vm = UffdVmm()
    vm.task(lambda: userfaultfd_zeropage(vm.ctx, vm.base, PAGE))
    vm.task(lambda: vm.guest_store(0, 5))
    assert vm.brackets() == [("clear", 0, PAGE)]
    vm.close()


def test_a_read_only_mapping_is_filled_read_only() -> None:
    vm = UffdVmm()
    do_mprotect(vm.mm, vm.base, PAGE, 1)
    vm.task(lambda: userfaultfd_copy(vm.ctx, vm.base, vm.source, PAGE))
    assert not pte_write(vm.entry(0))
    assert errno_of(lambda: vm.host_write(0, 1)) == "EFAULT"
    vm.close()


def test_a_source_that_is_in_swap_is_faulted_in_without_mmap_lock() -> None:
    vm = UffdVmm()
    source = do_mmap(vm.mm, 0, 2 * PAGE, RW, ANON)
    copy_to_user(vm.process, source, b"\x11" * PAGE + b"\x22" * PAGE)

    def out() -> None:
        vm.host.lru.lru_add_drain_all()
        do_madvise(vm.mm, source, 2 * PAGE, MADV_PAGEOUT)
        vm.host.swap_device.drain()

    vm.task(out)
    assert vm.task(lambda: userfaultfd_copy(vm.ctx, vm.base, source, 2 * PAGE)) == 2 * PAGE
    assert vm.task(lambda: vm.host_read(PAGE)) == int.from_bytes(b"\x22" * 8, "little")
    vm.close()


def test_an_unaligned_source_crosses_pages() -> None:
    vm = UffdVmm()
    source = do_mmap(vm.mm, 0, 2 * PAGE, RW, ANON)
    copy_to_user(vm.process, source, b"\x11" * PAGE + b"\x22" * PAGE)
    vm.task(lambda: userfaultfd_copy(vm.ctx, vm.base, source + 100, PAGE))
    assert vm.task(lambda: vm.host_read(PAGE - 8)) == int.from_bytes(b"\x22" * 8, "little")
    vm.close()


@pytest.mark.parametrize("seed", range(30))
def test_of_two_that_fill_one_page_one_is_told_eexist(seed: int) -> None:
    vm = UffdVmm()
    other = do_mmap(vm.mm, 0, PAGE, RW, ANON)
    copy_to_user(vm.process, other, b"\x55" * PAGE)
    vm.host.sched.set_strategy(RandomStrategy(seed, 2))
    answers: dict[int, str] = {}

    def fill(source: int) -> None:
        answers[source] = errno_of(lambda: userfaultfd_copy(vm.ctx, vm.base, source, PAGE))

    loads: list[int] = []
    run(
        vm.host, lambda: fill(vm.source), lambda: fill(other), lambda: loads.append(vm.guest_load(0)),
        lambda: loads.append(vm.guest_load(0)),
    )
    assert sorted(answers.values()) == ["EEXIST", "ok"]
    won = 0xAB if answers[vm.source] == "ok" else 0x55
    assert loads == [int.from_bytes(bytes([won]) * 8, "little")] * 2
    vm.host.sched.set_strategy(None)
    vm.close()
