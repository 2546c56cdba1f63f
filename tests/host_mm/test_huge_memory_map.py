"""The order of bracket, huge entry, flush and free, per system call; whole pages and parts of them."""

from __future__ import annotations

import pytest

from host_mm.arch.x86.pgtable import _PAGE_ACCESSED, _PAGE_SOFT_DIRTY, lookup_address_in_mm, pmd_pfn
from host_mm.fork import fork_process
from host_mm.madvise import MADV_COLD, MADV_DONTNEED, MADV_FREE, do_madvise
from host_mm.mlock import do_mlock, do_munlock
from host_mm.mmap import PROT_READ, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.page import PG_mlocked, PG_swapbacked, PG_unevictable
from host_mm.task_mmu import clear_refs_write
from tests.host_mm.machine import PAGE, RW
from tests.host_mm.thp_machine import HUGE, Order, ThpVmm

AWAY = 0x600000000000


def filled(pages: int = 512) -> tuple[ThpVmm, Order]:
    vm = ThpVmm()
    vm.fill(0, pages)
    order = Order(vm)
    return vm, order


def test_dontneed_of_a_whole_huge_page_flushes_and_frees_after_its_bracket() -> None:
    vm, order = filled()
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_DONTNEED))
    assert order.take() == ["start clear 0x0 0x200000", "pmd-clear", "free", "end", "flush", "free9"]
    vm.audit()


def test_dontneed_of_4k_splits_inside_its_bracket() -> None:
    vm, order = filled()
    vm.task(lambda: do_madvise(vm.mm, vm.base + 3 * PAGE, PAGE, MADV_DONTNEED))
    assert order.take() == [
        "start clear 0x3000 0x1000", "start clear 0x0 0x200000", "pmd-invalid", "flush", "set*512",
        "pmd-table", "end", "clear", "end", "flush",
    ]
    assert vm.words(2 * PAGE, 3) == [3, 0, 5]
    assert len(vm.host.thp.partially_mapped) == 1, "the page that nobody maps is freed with the others"
    vm.audit()


def test_munmap_cuts_the_vma_first_which_splits() -> None:
    vm, order = filled()
    vm.task(lambda: do_munmap(vm.mm, vm.base + HUGE // 2, HUGE))
    words = order.take()
    assert words[:6] == ["start clear 0x0 0x200000", "pmd-invalid", "flush", "set*512", "pmd-table", "end"]
    assert "start unmap 0x100000 0x200000" in words
    assert words.index("flush", 6) < words.index("free") if "free" in words else True
    assert vm.words(0, 256) == list(range(1, 257))
    vm.audit()


@pytest.mark.parametrize("pages", [1, 511])
def test_mprotect_of_a_part_splits_by_cutting_the_vma(pages: int) -> None:
    vm, order = filled()
    vm.task(lambda: do_mprotect(vm.mm, vm.base, pages * PAGE, PROT_READ))
    words = order.take()
    assert words[:6] == ["start clear 0x0 0x200000", "pmd-invalid", "flush", "set*512", "pmd-table", "end"]
    assert words[6] == f"start protection-vma 0x0 {pages * PAGE:#x}"
    assert words[-2:] == ["end", "flush"]
    vm.audit()


def test_mprotect_of_a_whole_huge_page_changes_one_entry_and_flushes_once_more_after_its_bracket() -> None:
    vm, order = filled()
    vm.task(lambda: do_mprotect(vm.mm, vm.base, HUGE, PROT_READ))
    assert order.take() == [
        "start protection-vma 0x0 0x200000", "pmd-invalid", "flush", "pmd-protect", "end", "flush",
    ]
    assert vm.level(0) == 2
    vm.task(lambda: do_mprotect(vm.mm, vm.base, HUGE, RW))
    order.take()
    vm.task(lambda: vm.host_write(0, 9))
    assert order.take() == [], "an exclusive page got the right to write back at once"
    vm.audit()


def test_mremap_of_a_whole_huge_page_moves_its_entry_and_flushes_under_the_lock() -> None:
    vm, order = filled()
    vm.task(lambda: do_mremap(vm.mm, vm.base, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, AWAY))
    words = order.take()
    assert words[:5] == ["start unmap 0x0 0x200000", "pmd-clear", "pmd-set", "flush", "end"]
    assert lookup_address_in_mm(vm.mm, AWAY)[1] == 2
    vm.task(lambda: do_mremap(vm.mm, AWAY, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, vm.base))
    assert vm.words(0, 512) == list(range(1, 513))
    vm.audit()


def test_mremap_to_a_place_that_is_not_aligned_splits_and_moves_page_by_page() -> None:
    vm, order = filled()
    vm.task(lambda: do_mremap(vm.mm, vm.base, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, AWAY + PAGE))
    words = order.take()
    assert words[0] == "start unmap 0x0 0x200000"
    assert words[1:7] == ["start clear 0x0 0x200000", "pmd-invalid", "flush", "set*512", "pmd-table", "end"]
    vm.audit()
    vm.task(lambda: do_mremap(vm.mm, AWAY + PAGE, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, vm.base))
    assert vm.words(0, 512) == list(range(1, 513))


def test_fork_shares_the_page_by_one_entry_and_flushes_after_its_bracket() -> None:
    vm, order = filled()
    child = vm.task(lambda: fork_process(vm.process))
    words = [word for word in order.take() if not word.startswith("protect")]
    start = words.index("pmd-protect")
    assert words[start - 1].startswith("start protection-page")
    assert words[start + 1] == "end"
    assert words[-1] == "flush"
    assert lookup_address_in_mm(child.mm, vm.base)[1] == 2
    vm.audit()


def test_free_of_a_whole_huge_page_cleans_its_entry_in_the_bracket_and_flushes_after() -> None:
    vm, order = filled()
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_FREE))
    assert order.take() == [
        "start clear 0x0 0x200000", "pmd-invalid", "flush", "pmd-set", "end", "flush",
    ]
    folio = pmd_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])
    assert not vm.host.pages.flags[folio] & PG_swapbacked
    vm.task(lambda: vm.host.reclaim_pages([folio]) if vm.host.lru.folio_isolate_lru(folio) else None)
    assert vm.words(0, 2) == [0, 0], "reclaim dropped it as a whole"
    vm.audit()


def test_free_of_a_part_splits_the_folio() -> None:
    vm, order = filled()
    vm.task(lambda: do_madvise(vm.mm, vm.base, PAGE, MADV_FREE))
    words = order.take()
    assert words[:2] == ["start clear 0x0 0x1000", "start clear 0x0 0x200000"]
    assert vm.host.vmstat["thp_split_page"] == 1
    assert vm.words(0, 512) == list(range(1, 513))
    vm.audit()


def test_cold_of_a_whole_huge_page_clears_one_accessed_bit_without_a_bracket() -> None:
    vm, order = filled()
    vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_COLD))
    assert order.take() == ["pmd-invalid", "flush", "pmd-set", "flush"]
    assert not lookup_address_in_mm(vm.mm, vm.base)[0] & _PAGE_ACCESSED
    vm.audit()


def test_clear_refs_4_write_protects_the_huge_entry_within_the_bracket_of_the_whole_mm() -> None:
    vm, order = filled()
    vm.task(lambda: clear_refs_write(vm.mm, 4))
    words = order.take()
    assert words[0].startswith("start soft-dirty")
    assert "pmd-invalid" in words
    assert words[-2:] == ["end", "flush"]
    assert not lookup_address_in_mm(vm.mm, vm.base)[0] & _PAGE_SOFT_DIRTY
    vm.task(lambda: vm.host_write(0, 3))
    assert lookup_address_in_mm(vm.mm, vm.base)[0] & _PAGE_SOFT_DIRTY
    vm.audit()


def test_mlock_of_a_huge_page_puts_the_folio_on_the_unevictable_list_as_one() -> None:
    vm, _ = filled()
    folio = pmd_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])
    vm.task(lambda: do_mlock(vm.mm, vm.base, HUGE))
    assert vm.host.pages.flags[folio] & (PG_mlocked | PG_unevictable) == PG_mlocked | PG_unevictable
    assert vm.host.vmstat["nr_mlock"] == 512
    vm.task(lambda: do_munlock(vm.mm, vm.base, HUGE))
    assert vm.host.vmstat["nr_mlock"] == 0
    vm.audit()
