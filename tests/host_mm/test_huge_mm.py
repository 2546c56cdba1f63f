"""Who may have huge pages, the one of zeros, and the tables that are put by."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process
from host_mm.huge_mm import (
    GFP_TRANSHUGE,
    GFP_TRANSHUGE_LIGHT,
    TVA_PAGEFAULT,
    shrink_huge_zero_folio,
    thp_vma_allowable_order,
    thp_vma_suitable_order,
    vma_thp_gfp_mask,
)
from host_mm.mm_types import VM_HUGEPAGE, VM_NOHUGEPAGE
from host_mm.page_alloc import GFP_DIRECT_RECLAIM, GFP_KSWAPD_RECLAIM
from host_mm.pgtable_generic import pmd_offset
from host_mm.pgtable_huge import pgtable_trans_huge_withdraw
from tests.host_mm.thp_machine import HUGE, ThpVmm


def test_a_huge_page_has_to_lie_within_the_vma() -> None:
    vm = ThpVmm()
    vma = vm.mm.vma_lookup(vm.base)
    assert vma is not None
    assert thp_vma_suitable_order(vma, vm.base + 0x3000)
    assert thp_vma_suitable_order(vma, vma.end - 1)
    vma.end -= 0x1000
    assert not thp_vma_suitable_order(vma, vma.end - 1)
    vma.end += 0x1000
    assert thp_vma_allowable_order(vma, vma.flags, TVA_PAGEFAULT)
    assert not thp_vma_allowable_order(vma, (vma.flags & ~VM_HUGEPAGE) | VM_NOHUGEPAGE, TVA_PAGEFAULT)


@pytest.mark.parametrize(("defrag", "advised", "plain"), [
    ("always", GFP_TRANSHUGE, GFP_TRANSHUGE),
    ("madvise", GFP_TRANSHUGE_LIGHT | GFP_DIRECT_RECLAIM, GFP_TRANSHUGE_LIGHT),
    ("defer", GFP_TRANSHUGE_LIGHT | GFP_KSWAPD_RECLAIM, GFP_TRANSHUGE_LIGHT | GFP_KSWAPD_RECLAIM),
    ("never", GFP_TRANSHUGE_LIGHT, GFP_TRANSHUGE_LIGHT),
])
def test_how_hard_a_fault_tries_depends_on_the_advice(defrag: str, advised: int, plain: int) -> None:
    vm = ThpVmm(params={"thp.defrag": defrag})
    vma = vm.mm.vma_lookup(vm.base)
    assert vma is not None
    wanted = GFP_DIRECT_RECLAIM | GFP_KSWAPD_RECLAIM
    assert vma_thp_gfp_mask(vma) & wanted == advised & wanted
    vma.flags &= ~VM_HUGEPAGE
    assert vma_thp_gfp_mask(vma) & wanted == plain & wanted


def test_the_huge_zero_page_is_held_by_its_users_and_given_up_by_the_shrinker() -> None:
    vm = ThpVmm()
    free = vm.host.allocator.nr_free_pages()
    vm.task(lambda: vm.guest_load(0))
    assert vm.task(lambda: shrink_huge_zero_folio(vm.host)) == 0, "the process may have it mapped"
    assert vm.words(HUGE, 1) == [0]
    vm.task(lambda: exit_process(vm.process))
    assert vm.host.thp.huge_zero_pfn >= 0
    assert vm.task(lambda: shrink_huge_zero_folio(vm.host)) == 512
    assert vm.host.thp.huge_zero_pfn < 0
    assert vm.host.allocator.nr_free_pages() > free
    vm.audit()


def test_each_huge_entry_puts_a_table_by_and_takes_the_oldest_back() -> None:
    vm = ThpVmm()
    vm.fill(0, 1)
    vm.fill(HUGE, 1)
    pmd = pmd_offset(vm.mm, vm.base)
    tables = list(vm.host.thp.deposited[pmd >> 12])
    assert len(tables) == 2
    assert pgtable_trans_huge_withdraw(vm.mm, pmd) in tables
