"""Faults on huge pages, and the order in which a write to what is shared is resolved."""

from __future__ import annotations

from errno import EINVAL

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pmd_pfn
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_DONTNEED, MADV_NOHUGEPAGE, do_madvise
from host_mm.mm_types import VM_HUGEPAGE
from host_mm.page import PG_anon_exclusive
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE
from tests.host_mm.thp_machine import HUGE, Order, ThpVmm


def test_a_write_to_empty_memory_maps_a_zeroed_folio_of_2m_without_a_bracket() -> None:
    vm = ThpVmm()
    order = Order(vm)
    vm.task(lambda: vm.guest_store(0x3000, 1))
    assert order.take() == ["pmd-set"]
    assert vm.level(0) == vm.level(HUGE - PAGE) == 2
    assert vm.words(0, 5) == [0, 0, 0, 1, 0]
    vm.audit()


def test_a_read_maps_the_huge_zero_page_once_for_all_and_a_write_replaces_it_in_a_bracket_of_2m() -> None:
    vm = ThpVmm()
    vm.task(lambda: (vm.guest_load(0), vm.guest_load(HUGE)))
    zero = vm.host.thp.huge_zero_pfn
    assert [pmd_pfn(lookup_address_in_mm(vm.mm, vm.base + at)[0]) for at in (0, HUGE)] == [zero, zero]
    order = Order(vm)
    vm.task(lambda: vm.host_write(HUGE + 0x5000, 7))
    assert order.take() == ["start clear 0x200000 0x200000", "pmd-clear", "flush", "pmd-set", "end"]
    assert vm.words(HUGE + 0x4000, 3) == [0, 7, 0]
    vm.audit()


def test_without_the_zero_page_a_read_gets_memory_of_its_own() -> None:
    vm = ThpVmm(params={"thp.use_zero_page": "N"})
    vm.task(lambda: vm.guest_load(0))
    assert vm.level(0) == 2
    assert vm.host.thp.huge_zero_pfn < 0


@pytest.mark.parametrize(("enabled", "advised", "level"), [
    ("madvise", True, 2), ("madvise", False, 1), ("always", False, 2), ("always", True, 2),
    ("never", True, 1),
])
def test_the_policy_and_the_advice_decide_together(enabled: str, advised: bool, level: int) -> None:
    vm = ThpVmm(params={"thp.enabled": enabled})
    if not advised:
        vma = vm.mm.vma_lookup(vm.base)
        assert vma is not None
        vma.flags &= ~VM_HUGEPAGE
    vm.task(lambda: vm.host_write(0, 1))
    assert vm.level(0) == level


def test_memory_that_is_refused_huge_pages_has_none_whatever_the_policy() -> None:
    vm = ThpVmm(params={"thp.enabled": "always"})
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_NOHUGEPAGE))
    vm.task(lambda: (vm.host_write(0, 1), vm.host_write(HUGE, 1)))
    assert (vm.level(0), vm.level(HUGE)) == (1, 2)


def test_where_no_2m_block_is_free_the_fault_falls_back_to_4k() -> None:
    vm = ThpVmm(ram=4 << 20, params={"thp.defrag": "never"})
    vm.task(lambda: [vm.host.allocator.alloc_pages(0, 8, nid) for nid in (0, 1)])
    vm.task(lambda: vm.host_write(0, 1))
    assert vm.level(0) == 1
    assert vm.host.vmstat["thp_fault_fallback"]


def test_a_write_to_a_page_shared_by_fork_splits_and_copies_4k_of_it() -> None:
    vm = ThpVmm()
    vm.fill(0, 4)
    child = vm.task(lambda: fork_process(vm.process))
    order = Order(vm)
    vm.task(lambda: vm.host_write(PAGE, 99))
    assert order.take() == [
        "start clear 0x0 0x200000", "pmd-invalid", "flush", "set*512", "pmd-table", "end",
        "start clear 0x1000 0x1000", "clear", "flush", "set", "end",
    ]
    assert vm.words(0, 4) == [1, 99, 3, 4]
    theirs = vm.task(lambda: [copy_from_user(child, vm.base + n * PAGE, 1)[0] for n in range(4)])
    assert theirs == [1, 2, 3, 4]
    vm.audit()


def test_the_last_owner_of_a_shared_huge_page_writes_to_it_without_a_copy() -> None:
    vm = ThpVmm()
    vm.fill(0, 4)
    child = vm.task(lambda: fork_process(vm.process))
    before = lookup_address_in_mm(vm.mm, vm.base)
    vm.task(lambda: exit_process(child))
    order = Order(vm)
    vm.task(lambda: vm.host_write(PAGE, 99))
    assert order.take() == ["pmd-set"]
    assert pmd_pfn(lookup_address_in_mm(vm.mm, vm.base)[0]) == pmd_pfn(before[0])
    assert vm.host.pages.flags[pmd_pfn(before[0])] & PG_anon_exclusive
    vm.audit()


def test_entries_of_a_split_page_that_nobody_shares_any_more_are_reused() -> None:
    vm = ThpVmm()
    vm.fill(0, 4)
    child = vm.task(lambda: fork_process(vm.process))
    vm.task(lambda: copy_to_user(vm.process, vm.base, b"x"))
    vm.task(lambda: exit_process(child))
    order = Order(vm)
    vm.task(lambda: vm.host_write(2 * PAGE, 99))
    assert order.take() == ["set"], "all references are entries of this process"
    vm.audit()


def test_a_pin_of_a_part_pins_the_folio_and_fork_copies_its_pages() -> None:
    vm = ThpVmm()
    vm.fill(0, 4)
    pfn = vm.task(lambda: pin_user_page(vm.mm, vm.base + 2 * PAGE, FOLL_WRITE | FOLL_LONGTERM))
    order = Order(vm)
    child = vm.task(lambda: fork_process(vm.process))
    words = order.take()
    assert words[0].startswith("start protection-page")
    assert "start clear 0x0 0x200000" in words, "the pinned page is split inside fork's bracket"
    vm.task(lambda: vm.host_write(2 * PAGE, 50))
    assert vm.host.ram.u64[pfn << 9] == 50, "the pin and the parent have the same page"
    assert vm.task(lambda: copy_from_user(child, vm.base + 2 * PAGE, 1)) == b"\x03"
    vm.task(lambda: unpin_user_page(vm.host, pfn, dirty=True))
    vm.audit()


def test_dropping_a_huge_page_and_touching_it_again_gives_zeros_and_a_huge_page() -> None:
    vm = ThpVmm()
    vm.fill(0, 512)
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_DONTNEED))
    assert vm.level(0) == 0
    vm.task(lambda: vm.guest_store(0, 5))
    assert vm.level(0) == 2
    assert vm.words(0, 3) == [5, 0, 0]


def test_everything_is_given_back_when_the_process_ends() -> None:
    vm = ThpVmm()
    free = vm.host.allocator.nr_free_pages()
    vm.fill(0, 600)
    vm.task(lambda: vm.guest_load(2 * HUGE))
    child = vm.task(lambda: fork_process(vm.process))
    vm.task(lambda: vm.host_write(PAGE, 3))
    vm.task(lambda: exit_process(child))
    vm.task(lambda: do_madvise(vm.mm, vm.base, 8 << 20, MADV_DONTNEED))
    vm.audit()
    tables = vm.mm.pgtables_bytes >> 12
    vm.task(lambda: exit_process(vm.process))
    vm.audit()
    left = free - vm.host.allocator.nr_free_pages() + tables
    assert left >= 512, "the huge zero page waits for memory pressure"
    assert not vm.host.thp.deposited
    assert vm.host.vmstat["nr_anon_pages"] == vm.host.vmstat["nr_anon_transparent_hugepages"] == 0


def test_bad_ranges_of_the_advice_have_madvise_s_errnos() -> None:
    vm = ThpVmm()
    with pytest.raises(KernelError) as caught:
        vm.task(lambda: do_madvise(vm.mm, vm.base + 1, HUGE, MADV_NOHUGEPAGE))
    assert caught.value.errno == EINVAL
