"""A folio becomes small pages: in which order, what prevents it, and what memory pressure splits."""

from __future__ import annotations

from errno import EBUSY

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.huge_memory_split import deferred_split_scan, split_huge_pages
from host_mm.kernel.errors import EHWPOISON, KernelError
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.memory_failure import memory_failure, soft_offline_page
from host_mm.migrate import move_pages
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.page import PG_head, put_page
from host_mm.shrinker import shrink_slab
from tests.host_mm.machine import PAGE
from tests.host_mm.thp_machine import HUGE, Order, ThpVmm

AWAY = 0x600000000000


def filled(pages: int = 512) -> tuple[ThpVmm, Order]:
    vm = ThpVmm()
    vm.fill(0, pages)
    return vm, Order(vm)


def split(vm: ThpVmm, end: int = HUGE) -> tuple[int, int]:
    result: tuple[int, int] = vm.task(lambda: split_huge_pages(vm.mm, vm.base, vm.base + end))
    return result


def test_one_bracket_of_2m_makes_migration_entries_and_the_pages_come_back_without_one() -> None:
    vm, order = filled()
    first = pte_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])
    assert split(vm) == (1, 1)
    assert order.take() == [
        "start clear 0x0 0x200000", "pmd-invalid", "flush", "swap-entry*512", "pmd-table", "end",
        "set*512",
    ]
    assert vm.level(0) == 1
    assert [vm.pfn(n * PAGE) for n in range(512)] == list(range(first, first + 512))
    assert vm.words(0, 512) == list(range(1, 513))
    vm.audit()


def test_pages_of_zeros_come_back_as_the_zero_page() -> None:
    vm, _ = filled(3)
    free = vm.host.allocator.nr_free_pages()
    assert split(vm) == (1, 1)
    assert vm.host.allocator.nr_free_pages() == free + 509
    assert vm.pfn(5 * PAGE) == vm.host.zero_pfn
    vm.fill(5 * PAGE, 1, first=6)
    assert vm.words(0, 7) == [1, 2, 3, 0, 0, 6, 0]
    vm.audit()


@pytest.mark.parametrize("pinned", [False, True])
def test_who_holds_one_page_holds_the_folio_together(pinned: bool) -> None:
    vm, order = filled()
    get = pin_user_page if pinned else get_user_pages_unlocked
    pfn = vm.task(lambda: get(vm.mm, vm.base + 7 * PAGE, FOLL_WRITE))
    assert split(vm) == (512, 0), "it is tried again for each address"
    assert order.take() == []
    assert vm.task(lambda: move_pages(vm.process, [vm.base], [0])) in ([0], [-16], [-11])
    order.take()
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_PAGEOUT))
    assert vm.level(0) == 2
    assert pte_pfn(lookup_address_in_mm(vm.mm, vm.base + 7 * PAGE)[0]) + 7 == pfn
    vm.task(lambda: unpin_user_page(vm.host, pfn) if pinned else put_page(vm.host, pfn))
    assert split(vm) == (1, 1)
    vm.audit()


def test_a_split_for_two_processes_has_a_bracket_in_each() -> None:
    vm, order = filled()
    child = vm.task(lambda: fork_process(vm.process))
    order.take()
    assert split(vm) == (1, 1)
    assert order.take() == [
        "start clear 0x0 0x200000", "pmd-invalid", "flush", "swap-entry*512", "pmd-table", "end",
        "flush", "set*512",
    ]
    vm.task(lambda: exit_process(child))
    assert vm.words(0, 512) == list(range(1, 513))
    vm.audit()


def test_a_folio_that_is_mapped_by_small_entries_in_two_places_is_found_in_both() -> None:
    vm, order = filled()
    vm.task(lambda: do_mremap(
        vm.mm, vm.base + 4 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, AWAY,
    ))
    order.take()
    assert split(vm) == (1, 1)
    words = order.take()
    assert words.count("end") == 3, "the VMA was cut into two, and the page that moved has its own"
    assert vm.task(lambda: vm.host_read(AWAY - vm.base)) == 5
    vm.audit()


def test_pageout_splits_first_and_then_writes_page_by_page() -> None:
    vm, order = filled(2)
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_PAGEOUT))
    words = order.take()
    assert words[:6] == [
        "start clear 0x0 0x200000", "pmd-invalid", "flush", "swap-entry*512", "pmd-table", "end",
    ]
    assert words[6] == "set*512"
    starts = [word for word in words[6:] if word.startswith("start")]
    assert starts == ["start clear 0x0 0x1000", "start clear 0x1000 0x1000"]
    assert words.index("swap-entry") < words.index("flush", 7) < words.index("io")
    assert vm.words(0, 3) == [1, 2, 0]
    vm.audit()


def test_what_was_unmapped_in_part_is_split_under_pressure() -> None:
    vm, _ = filled()
    vm.task(lambda: do_madvise(vm.mm, vm.base, 4 * PAGE, MADV_DONTNEED))
    free = vm.host.allocator.nr_free_pages()
    assert vm.task(lambda: deferred_split_scan(vm.host, 0, 32)) == 1
    assert vm.host.allocator.nr_free_pages() == free + 4
    assert not vm.host.thp.partially_mapped
    assert vm.words(0, 6) == [0, 0, 0, 0, 5, 6]
    vm.audit()


def test_what_is_mostly_zeros_is_split_under_pressure_if_khugepaged_would_not_fill_it() -> None:
    vm = ThpVmm(params={"khugepaged.max_ptes_none": "500"})
    vm.fill(0, 12)
    vm.fill(HUGE, 11)
    assert vm.task(lambda: deferred_split_scan(vm.host, 0, 32)) == 1
    assert (vm.level(0), vm.level(HUGE)) == (2, 1)
    assert vm.host.vmstat["thp_underused_split_page"] == 1
    vm.audit()


def test_reclaim_that_tries_hard_splits_and_frees_and_one_that_does_not_leaves_all() -> None:
    vm, _ = filled()
    vm.task(lambda: do_madvise(vm.mm, vm.base, 4 * PAGE, MADV_DONTNEED))
    vm.task(lambda: shrink_slab(vm.host, 0, 12))
    assert vm.host.thp.partially_mapped
    vm.task(lambda: shrink_slab(vm.host, 0, 0))
    assert not vm.host.thp.partially_mapped
    assert vm.host.vmstat["thp_split_page"] == 1
    vm.audit()


def test_migration_moves_a_huge_page_as_a_whole() -> None:
    vm = ThpVmm(nodes=2)
    vm.fill(0, 512)
    order = Order(vm)
    old = pte_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])
    assert vm.task(lambda: move_pages(vm.process, [vm.base], [1])) == [1]
    assert order.take() == [
        "start clear 0x0 0x200000", "pmd-invalid", "flush", "pmd-migration", "end", "pmd-set", "free9",
    ]
    assert vm.level(0) == 2
    assert pte_pfn(lookup_address_in_mm(vm.mm, vm.base)[0]) != old
    assert vm.words(0, 512) == list(range(1, 513))
    vm.audit()


def test_a_target_without_room_for_a_huge_page_gets_small_ones() -> None:
    vm = ThpVmm(nodes=2)
    vm.fill(0, 4)
    node = vm.host.allocator.nodes[1]
    held = []
    while (pfn := vm.host.allocator.alloc_pages(1 << 21, 0, 1)) >= 0 and vm.host.allocator.nid_of(pfn) == 1:
        held.append(pfn)
        if len(held) > node.zone.nr_free + len(held):
            break
    for pfn in held[::2][:64]:
        put_page(vm.host, pfn)
    vm.task(lambda: move_pages(vm.process, [vm.base], [1]))
    assert vm.words(0, 4) == [1, 2, 3, 4]
    for pfn in [pfn for pfn in held if pfn not in held[::2][:64]]:
        put_page(vm.host, pfn)
    vm.audit()


def test_one_page_of_it_whose_memory_fails_costs_that_page_only() -> None:
    vm, _ = filled()
    first = pte_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])
    assert vm.task(lambda: memory_failure(vm.host, first + 7)) == 0
    assert vm.level(0) == 1
    assert vm.words(0, 7) == list(range(1, 8))
    with pytest.raises(KernelError, match=r"EFAULT|EHWPOISON"):
        vm.words(7 * PAGE, 1)
    assert vm.task(lambda: soft_offline_page(vm.host, first + 9)) == 0
    assert vm.words(9 * PAGE, 1) == [10]
    assert vm.pfn(9 * PAGE) != first + 9
    vm.audit()


def test_memory_that_fails_under_who_holds_the_page_stays_whole() -> None:
    vm, _ = filled()
    pfn = vm.task(lambda: pin_user_page(vm.mm, vm.base + 3 * PAGE, FOLL_WRITE))
    assert vm.task(lambda: soft_offline_page(vm.host, pfn + 1)) == -EBUSY
    assert vm.task(lambda: memory_failure(vm.host, pfn + 1)) == -EHWPOISON
    assert vm.level(0) == 2
    vm.task(lambda: unpin_user_page(vm.host, pfn))
    vm.audit()


def test_a_range_that_is_not_of_pages_is_refused() -> None:
    vm = ThpVmm()
    with pytest.raises(KernelError, match="EINVAL"):
        vm.task(lambda: split_huge_pages(vm.mm, vm.base + 1, vm.base + PAGE))
    assert not vm.host.pages.flags[vm.host.zero_pfn] & PG_head
