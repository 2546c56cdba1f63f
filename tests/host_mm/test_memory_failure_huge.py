"""Bad memory in a huge page, which is split: only what failed is lost (host_mm/memory_failure.py)."""

from __future__ import annotations

from collections.abc import Callable
from errno import EBUSY, EFAULT

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.host import HostMm
from host_mm.kernel.errors import EHWPOISON, KernelError
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.memory_failure import memory_failure, soft_offline_page
from host_mm.page import PG_hwpoison
from tests.host_mm.machine import PAGE
from tests.host_mm.thp_machine import HUGE, Order, ThpVmm

PAGES = 512
Fail = Callable[[HostMm, int], int]


def huge() -> tuple[ThpVmm, int]:
    vm = ThpVmm(ram=16 << 20)
    vm.fill(0, PAGES)
    assert vm.level(0) == 2
    return vm, pte_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])


@pytest.mark.parametrize("at", [0, 7, 511])
def test_one_page_of_a_huge_page_fails_and_the_others_stay_where_they_are(at: int) -> None:
    vm, first = huge()
    order = Order(vm)
    assert vm.task(lambda: memory_failure(vm.host, first + at)) == 0
    assert order.take()[:2] == ["start clear 0x0 0x200000", "pmd-invalid"], "the split comes first"
    vm.audit()
    for page in range(PAGES):
        if page == at:
            with pytest.raises(KernelError) as caught:
                vm.task(lambda: vm.host_read(at * PAGE))
            assert caught.value.errno == EFAULT
        else:
            assert vm.host_read(page * PAGE) == page + 1
            assert pte_pfn(lookup_address_in_mm(vm.mm, vm.base + page * PAGE)[0]) == first + page
    assert vm.host.allocator.hwpoisoned == {first + at: 1}


@pytest.mark.parametrize("at", [0, 7, 511])
def test_soft_offline_moves_one_page_of_a_huge_page(at: int) -> None:
    vm, first = huge()
    assert vm.task(lambda: soft_offline_page(vm.host, first + at)) == 0
    assert vm.words(0, PAGES) == list(range(1, PAGES + 1))
    assert pte_pfn(lookup_address_in_mm(vm.mm, vm.base + at * PAGE)[0]) != first + at
    vm.audit()


@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize("fail", [memory_failure, soft_offline_page])
def test_what_cannot_be_split_is_refused_and_a_failed_frame_is_kept_when_it_comes_free(
    fail: Fail, at: int
) -> None:
    vm, first = huge()
    pin = vm.task(lambda: pin_user_page(vm.mm, vm.base + 9 * PAGE, FOLL_WRITE))
    answer = -EHWPOISON if fail is memory_failure else -EBUSY
    assert vm.task(lambda: fail(vm.host, first + at)) == answer
    vm.task(lambda: unpin_user_page(vm.host, pin, dirty=True))
    assert vm.words(0, PAGES) == list(range(1, PAGES + 1))
    vm.audit()
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_DONTNEED))
    vm.audit()
    kept = [pfn for pfn in range(first, first + PAGES) if vm.host.pages.flags[pfn] & PG_hwpoison]
    assert kept == ([first + at] if fail is memory_failure else [])
