"""Each count of huge pages that is wrong is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.kernel.errors import BrokenTruth
from host_mm.pgtable_generic import pmd_offset
from tests.host_mm.thp_machine import HUGE, ThpVmm


def _count(name: str) -> Callable[[ThpVmm, int], None]:
    def spoil(vm: ThpVmm, folio: int) -> None:
        getattr(vm.host.pages, name)[folio + (3 if name == "mapcount" else 0)] += 1

    return spoil


def _mm_count(vm: ThpVmm, folio: int) -> None:
    vm.host.pages.mm_mapcount[folio][vm.mm] += 1


def _deposit(vm: ThpVmm, folio: int) -> None:
    tables = vm.host.thp.deposited[pmd_offset(vm.mm, vm.base) >> 12]
    tables.append(tables[0])


def _queue(vm: ThpVmm, folio: int) -> None:
    vm.host.thp.partially_mapped.add(folio)
    vm.host.thp.unqueue_deferred_split(folio)
    vm.host.thp.partially_mapped.add(folio)


def _rss(vm: ThpVmm, folio: int) -> None:
    vm.mm.rss[1] -= 511


@pytest.mark.parametrize(("spoil", "truth"), [
    (_count("entire_mapcount"), "thp-mapcount"), (_count("large_mapcount"), "thp-mapcount"),
    (_count("nr_pages_mapped"), "thp-mapcount"), (_count("mapcount"), "thp-mapcount"),
    (_count("refcount"), "frame-refcount"), (_mm_count, "thp-mapcount"), (_deposit, "thp-deposit"),
    (_queue, "thp-deferred"), (_rss, "rss"),
])
def test_a_wrong_count_is_noticed(spoil: Callable[[ThpVmm, int], None], truth: str) -> None:
    vm = ThpVmm()
    vm.fill(0, 2)
    vm.fill(HUGE, 2)
    vm.audit()
    spoil(vm, pte_pfn(lookup_address_in_mm(vm.mm, vm.base)[0]))
    with pytest.raises(BrokenTruth) as caught:
        vm.audit()
    assert caught.value.truth == truth
