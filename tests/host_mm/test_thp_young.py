"""Who asks whether a huge page was used asks the CPU's one bit and the secondary MMUs of 2 MiB at once."""

from __future__ import annotations

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import _PAGE_ACCESSED, lookup_address_in_mm, pte_pfn
from host_mm.damon.core import DamonRegion
from host_mm.damon.ops_common import damon_folio_mkold, damon_folio_young
from host_mm.damon.vaddr import VaddrOperations
from host_mm.huge_memory_split import split_huge_pages
from host_mm.mm_types import MmStruct
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page_idle import page_is_idle, page_set_idle
from host_mm.rmap import folio_referenced
from tests.host_mm.machine import PAGE
from tests.host_mm.thp_machine import HUGE, ThpVmm


class Asked(mn.MmuNotifier):
    """Notes what it was asked; answers `young`."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.log: list[tuple[str, int, int]] = []
        self.young = 0

    def _note(self, name: str, start: int, end: int) -> int:
        self.log.append((name, start - self.base, end - self.base))
        return self.young

    def clear_flush_young(self, mm: MmStruct, start: int, end: int) -> int:
        return self._note("flush", start, end)

    def clear_young(self, mm: MmStruct, start: int, end: int) -> int:
        return self._note("clear", start, end)

    def test_young(self, mm: MmStruct, address: int) -> int:
        return self._note("test", address, address)

    def take(self) -> list[tuple[str, int, int]]:
        log, self.log = self.log, []
        return log


def machine() -> tuple[ThpVmm, Asked, int]:
    vm = ThpVmm()
    vm.fill(0, 1)
    asked = Asked(vm.base)
    assert mmu_notifier_register(asked, vm.mm) == 0
    return vm, asked, pte_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])


def accessed(vm: ThpVmm) -> bool:
    return bool(lookup_address_in_mm(vm.mm, vm.base)[0] & _PAGE_ACCESSED)


def test_reclaim_asks_once_for_the_whole_page_and_page_by_page_after_a_split_of_its_entry() -> None:
    vm, asked, folio = machine()
    assert vm.task(lambda: folio_referenced(vm.host, folio)[0]) == 1
    assert asked.take() == [("flush", 0, HUGE)]
    assert not accessed(vm)
    assert vm.task(lambda: folio_referenced(vm.host, folio)[0]) == 0
    asked.young = 1
    assert vm.task(lambda: folio_referenced(vm.host, folio)[0]) == 1
    asked.take()
    vm.task(lambda: split_huge_pages(vm.mm, vm.base, vm.base + HUGE))
    assert vm.task(lambda: folio_referenced(vm.host, folio)[0]) == 1
    assert asked.take() == [("flush", 0, PAGE)]


def test_the_idle_bit_of_the_first_frame_stands_for_all() -> None:
    vm, asked, folio = machine()
    assert vm.task(lambda: page_set_idle(vm.host, folio))
    assert not vm.task(lambda: page_set_idle(vm.host, folio + 1))
    assert asked.take() == [("clear", 0, HUGE)]
    assert vm.task(lambda: page_is_idle(vm.host, folio))
    vm.task(lambda: vm.host_write(100 * PAGE, 1))
    assert not vm.task(lambda: page_is_idle(vm.host, folio))


def test_damon_makes_a_huge_page_old_by_frame_and_by_address() -> None:
    vm, asked, folio = machine()
    vm.task(lambda: damon_folio_mkold(vm.host, folio))
    assert asked.take() == [("clear", 0, HUGE)]
    assert not vm.task(lambda: damon_folio_young(vm.host, folio))
    asked.young = 1
    assert vm.task(lambda: damon_folio_young(vm.host, folio))
    asked.young = 0
    asked.take()
    ops = VaddrOperations(vm.mm)
    region = DamonRegion(vm.base, vm.base + HUGE)
    region.sampling_addr = vm.base + 5 * PAGE
    vm.task(lambda: ops.mkold(region))
    assert asked.take() == [("clear", 5 * PAGE, 5 * PAGE + HUGE)], "Linux asks from the sampled address on"
    assert not vm.task(lambda: ops.check_access(region, first=True))
    region.sampling_addr = vm.base + 400 * PAGE
    asked.young = 1
    assert not vm.task(lambda: ops.check_access(region, first=False)), "the same folio has the same answer"
    assert vm.task(lambda: ops.check_access(region, first=True))
