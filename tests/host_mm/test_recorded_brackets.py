"""Which brackets host operations open, in range and order, as the recorded Linux 6.18 traces show them.

The recordings name ranges only (kvm_unmap_hva_range); the events are those of the kernel's call sites.
"""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_LONGTERM
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import KernelError
from host_mm.madvise import (
    MADV_COLD,
    MADV_DOFORK,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_PAGEOUT,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    do_madvise,
)
from host_mm.mmap import MAP_FIXED, do_mmap, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.profile import LINUX_5_10
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from tests.host_mm.machine import ANON, PAGE, RW, SLOT, Vmm

M2 = 2 << 20
R = 1


@pytest.fixture
def vm() -> Vmm:
    return Vmm()


def advise(vm: Vmm, offset: int, length: int, advice: int) -> None:
    do_madvise(vm.mm, vm.base + offset, length, advice)


def protect(vm: Vmm, offset: int, length: int, prot: int) -> None:
    do_mprotect(vm.mm, vm.base + offset, length, prot)


def test_only_the_cow_of_a_mapped_page_fires_on_first_touch(vm: Vmm) -> None:
    assert vm.guest_load(0x3000) == 0
    assert vm.brackets() == []
    vm.guest_store(0x3000, 1)
    assert vm.brackets() == [("clear", 0x3000, 0x4000)]
    vm.guest_store(0x3000, 2)
    vm.guest_store(0x4000, 3)
    assert vm.guest_load(0x4000) == 3
    vm.host_write(0x5000, 7)
    assert vm.guest_load(0x5000) == 7
    vm.guest_store(0x5000, 8)
    assert vm.host_read(0x5000) == 8
    assert vm.brackets() == []


def test_dontneed_brackets_the_requested_range_populated_or_not(vm: Vmm) -> None:
    for i in range(4):
        vm.guest_store(0x3000 + i * PAGE, i)
    advise(vm, 0x3000, PAGE, MADV_DONTNEED)
    assert vm.brackets() == [("clear", 0x3000, 0x4000)]
    assert vm.guest_load(0x3000) == 0
    vm.guest_store(0x3000, 5)
    assert vm.brackets() == [("clear", 0x3000, 0x4000)]
    advise(vm, 0x4000, 3 * PAGE, MADV_DONTNEED)
    assert vm.brackets() == [("clear", 0x4000, 0x7000)]
    vm.guest_store(0x4000, 5)
    vm.guest_store(0x5000, 6)
    advise(vm, 0x100000, PAGE, MADV_DONTNEED)
    advise(vm, 0x200000, 0x200000, MADV_DONTNEED)
    assert vm.brackets() == [("clear", 0x100000, 0x101000), ("clear", 0x200000, 0x400000)]


def test_fork_brackets_the_whole_vma_and_each_side_copies_on_write(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    vm.guest_store(0x4000, 1)
    vm.guest_load(0x5000)
    child = fork_process(vm.process)
    assert ("protection-page", 0, SLOT) in vm.brackets()
    assert vm.guest_load(0x3000) == 1
    assert vm.brackets() == []
    vm.guest_store(0x3000, 2)
    assert vm.brackets() == [("clear", 0x3000, 0x4000)]
    vm.guest_load(0x4000)
    vm.host_write(0x4000, 3)
    assert vm.brackets() == [("clear", 0x4000, 0x5000)]
    assert vm.guest_load(0x4000) == 3
    vm.guest_store(0x4000, 4)
    exit_process(child)
    assert vm.brackets() == []
    vm.guest_store(0x5000, 1)
    assert vm.brackets() == [("clear", 0x5000, 0x6000)]
    audit(vm.host)


def test_fork_copies_a_pinned_page_for_the_child_and_keeps_it_writable(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    vm.guest_store(0x4000, 1)
    vm.guest_load(0x5000)
    pin = pin_user_page(vm.mm, vm.base + 0x3000, FOLL_LONGTERM | 1)
    vm.guest_store(0x3000, 2)
    vm.brackets()
    child = fork_process(vm.process)
    vm.brackets()
    assert vm.guest_load(0x3000) == 2
    vm.guest_store(0x3000, 3)
    assert vm.brackets() == []
    vm.guest_store(0x4000, 3)
    assert vm.brackets() == [("clear", 0x4000, 0x5000)]
    exit_process(child)
    unpin_user_page(vm.host, pin)
    pin = pin_user_page(vm.mm, vm.base + 0x5000, FOLL_LONGTERM)
    assert vm.brackets() == [("clear", 0x5000, 0x6000)]
    vm.guest_store(0x5000, 4)
    advise(vm, 0x5000, PAGE, MADV_DONTNEED)
    assert vm.brackets() == [("clear", 0x5000, 0x6000)]
    vm.guest_store(0x5000, 5)
    assert vm.host.ram.u64[(pin << 12) // 8] == 4
    unpin_user_page(vm.host, pin)
    audit(vm.host)


def test_mprotect_of_a_page_splits_the_2m_around_it_first_and_only_once(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    vm.guest_store(0x4000, 1)
    protect(vm, 0x3000, PAGE, R)
    assert vm.brackets() == [("clear", 0, M2), ("protection-vma", 0x3000, 0x4000)]
    assert vm.guest_load(0x3000) == 1
    with pytest.raises(KernelError):
        vm.host_write(0x3000, 2)
    protect(vm, 0x3000, PAGE, RW)
    assert vm.brackets() == [("protection-vma", 0x3000, 0x4000)]
    assert len(vm.mm.vmas_in(vm.base, vm.base + SLOT)) == 1
    vm.guest_store(0x3000, 3)
    protect(vm, 0x4000, PAGE, 0)
    assert vm.brackets() == [("clear", 0, M2), ("protection-vma", 0x4000, 0x5000)]
    with pytest.raises(KernelError):
        vm.host_read(0x4000)
    protect(vm, 0x4000, PAGE, RW)
    assert vm.brackets() == [("protection-vma", 0x4000, 0x5000)]
    assert vm.guest_load(0x4000) == 1
    audit(vm.host)


def test_a_split_fires_for_each_aligned_2m_that_lies_wholly_in_the_vma(vm: Vmm) -> None:
    protect(vm, 0x101000, PAGE, R)
    assert vm.brackets() == [("clear", 0, M2), ("protection-vma", 0x101000, 0x102000)]
    protect(vm, 0x181000, PAGE, R)
    assert vm.brackets() == [("protection-vma", 0x181000, 0x182000)]
    protect(vm, 0x3FF000, 2 * PAGE, R)
    assert vm.brackets() == [
        ("clear", M2, 2 * M2), ("clear", 2 * M2, 3 * M2), ("protection-vma", 0x3FF000, 0x401000),
    ]
    protect(vm, 0x600000, 0x100000, R)
    assert vm.brackets() == [("clear", 3 * M2, 4 * M2), ("protection-vma", 0x600000, 0x700000)]
    protect(vm, 0x601000, PAGE, 0)
    assert vm.brackets() == [("protection-vma", 0x601000, 0x602000)]
    advise(vm, 0x4C0000, PAGE, MADV_DONTFORK)
    assert len(vm.mm.vmas_in(vm.base + 0x4BF000, vm.base + 0x4C2000)) == 3
    vm.guest_store(0x4C0000, 1)
    advise(vm, 0x4C0000, PAGE, MADV_DOFORK)
    assert len(vm.mm.vmas_in(vm.base + 0x4BF000, vm.base + 0x4C2000)) == 1
    vm.guest_store(0x4C0000, 2)
    assert vm.brackets() == []


def test_munmap_of_the_middle_brackets_the_split_and_then_the_range(vm: Vmm) -> None:
    for offset in (0x300000, 0x310000, 0x31F000, 0x320000):
        vm.guest_store(offset, 1)
    do_munmap(vm.mm, vm.base + 0x310000, 0x10000)
    assert vm.brackets() == [("clear", M2, 2 * M2), ("unmap", 0x310000, 0x320000)]
    assert vm.guest_load(0x300000) == 1
    assert vm.guest_load(0x320000) == 1
    with pytest.raises(KernelError):
        vm.host_read(0x310000)
    assert do_mmap(vm.mm, vm.base + 0x310000, 0x10000, RW, ANON | MAP_FIXED) == vm.base + 0x310000
    assert vm.guest_load(0x310000) == 0
    vm.guest_store(0x31F000, 2)
    assert vm.brackets() == []
    do_munmap(vm.mm, vm.base + 0x200000, M2)
    assert vm.brackets() == [("unmap", M2, 2 * M2)]
    with pytest.raises(KernelError):
        vm.host_read(0x300000)
    audit(vm.host)


def test_pageout_unmaps_page_by_page_and_skips_the_zero_page(vm: Vmm) -> None:
    for offset, value in ((0x3000, 0x11), (0x4000, 0x22), (0x5000, 0x33)):
        vm.guest_store(offset, value)
    vm.guest_load(0x6000)
    run = vm.host.sched.run_task
    run("pageout", lambda: advise(vm, 0x3000, PAGE, MADV_PAGEOUT))
    assert vm.brackets() == [("clear", 0x3000, 0x4000)]
    assert run("guest", lambda: vm.guest_load(0x3000)) == 0x11
    run("guest", lambda: vm.guest_store(0x3000, 0x12))
    assert vm.brackets() == []
    run("pageout", lambda: advise(vm, 0x4000, 3 * PAGE, MADV_PAGEOUT))
    assert vm.brackets() == [("clear", 0x4000, 0x5000), ("clear", 0x5000, 0x6000)]
    run("guest", lambda: vm.guest_store(0x4000, 0x23))
    assert run("vmm", lambda: vm.host_read(0x5000)) == 0x33
    assert run("guest", lambda: vm.guest_load(0x5000)) == 0x33
    assert vm.brackets() == []


def test_pageout_without_swap_fires_nothing() -> None:
    vm = Vmm(swap=None)
    vm.guest_store(0x3000, 1)
    advise(vm, 0x3000, PAGE, MADV_PAGEOUT)
    assert vm.guest_load(0x3000) == 1
    assert vm.brackets() == []


def test_cold_fires_nothing_and_free_brackets_its_range(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    vm.guest_store(0x4000, 2)
    advise(vm, 0x3000, PAGE, MADV_COLD)
    vm.guest_store(0x3000, 3)
    assert vm.brackets() == []
    advise(vm, 0x4000, PAGE, MADV_FREE)
    assert vm.brackets() == [("clear", 0x4000, 0x5000)]
    assert vm.guest_load(0x4000) == 2
    vm.guest_store(0x4000, 4)
    assert vm.brackets() == []


def test_soft_dirty_drops_everything_and_young_bits_nothing(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    vm.guest_load(0x4000)
    clear_refs_write(vm.mm, 1)
    assert vm.brackets() == []
    vm.notifier.base = 0
    clear_refs_write(vm.mm, 4)
    assert vm.brackets() == [("soft-dirty", 0, (1 << 64) - 1)]
    vm.guest_store(0x3000, 2)
    assert vm.brackets() == []


def test_populating_fires_nothing_but_populated_zero_pages_copy(vm: Vmm) -> None:
    advise(vm, 0, 0x10000, MADV_POPULATE_READ)
    vm.guest_load(0x3000)
    assert vm.brackets() == []
    vm.guest_store(0x3000, 1)
    assert vm.brackets() == [("clear", 0x3000, 0x4000)]
    advise(vm, 0x100000, 0x10000, MADV_POPULATE_WRITE)
    vm.guest_store(0x104000, 1)
    assert vm.brackets() == []
    advise(vm, 0x203000, PAGE, MADV_DONTNEED)
    assert vm.brackets() == [("clear", 0x203000, 0x204000)]


def test_mprotect_where_no_table_is_fires_nothing() -> None:
    vm = Vmm()
    far = do_mmap(vm.mm, 0x100000000000, SLOT, RW, ANON)
    do_mprotect(vm.mm, far + PAGE, PAGE, R)
    assert vm.brackets() == []


def test_mprotect_over_many_gibibytes_is_one_bracket_from_the_first_populated_one() -> None:
    vm = Vmm()
    far = do_mmap(vm.mm, 0x100000000000, 4 << 30, RW, ANON)
    vm.notifier.base = far
    for gib in (1, 3):
        vm.base = far
        vm.guest_store(gib << 30, 1)
    do_mprotect(vm.mm, far, 4 << 30, R)
    assert vm.brackets() == [("protection-vma", 1 << 30, 4 << 30)]


def test_linux_5_10_opens_a_bracket_for_each_populated_gibibyte() -> None:
    vm = Vmm(profile=LINUX_5_10)
    far = do_mmap(vm.mm, 0x100000000000, 4 << 30, RW, ANON)
    vm.notifier.base = vm.base = far
    vm.guest_store((1 << 30) + 0x5000, 1)
    vm.guest_store(3 << 30, 1)
    vm.brackets()
    do_mprotect(vm.mm, far, 4 << 30, R)
    assert vm.brackets() == [("protection-vma", 1 << 30, 2 << 30), ("protection-vma", 3 << 30, 4 << 30)]


def test_exit_releases_before_anything_is_unmapped(vm: Vmm) -> None:
    vm.guest_store(0x3000, 1)
    seen: list[int] = []
    vm.host.free_hooks.append(lambda pfn, order: seen.append(len(vm.notifier.log)))
    exit_process(vm.process)
    assert vm.notifier.take() == [("release", 0, 0)]
    assert set(seen) == {1}
