"""What the audit says when the counts of huge pages are wrong: each one is broken and found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_mm.arch.x86.pgtable import PFN_MASK, pmd_pfn
from host_mm.hugetlb import HPG_restore_reserve
from host_mm.kernel.errors import BrokenTruth
from host_mm.pgtable_generic import pmd_offset
from host_mm.process import Process
from host_mm.truths import audit
from tests.host_mm.hugetlb_machine import BASE, GIB, HUGE, Machine

OTHER = BASE + 4 * GIB


def ready() -> tuple[Machine, Process, int]:
    """A private page, a file's page, and a table that two processes share."""
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(GIB // HUGE)
    m.shared(p, file, GIB // HUGE)
    m.shared(q, file, GIB // HUGE)
    m.private(p, 2, OTHER)
    m.write(p, BASE, b"x")
    m.read(q, BASE)
    m.write(p, OTHER, b"x")
    return m, p, pmd_pfn(m.entry(p, OTHER))


def a_reference_too_many(m: Machine, p: Process, pfn: int) -> None:
    m.host.pages.refcount[pfn] += 1


def a_reference_to_a_free_page(m: Machine, p: Process, pfn: int) -> None:
    m.host.pages.refcount[next(iter(m.host.hstate.freelists[0]))] += 1


def an_entry_too_few(m: Machine, p: Process, pfn: int) -> None:
    m.host.pages.large_mapcount[pfn] += 1


def a_migration_entry_left(m: Machine, p: Process, pfn: int) -> None:
    pmd = pmd_offset(p.mm, OTHER)
    m.host.ram.u64[pmd >> 3] = 27 << 59 | 0x200


def a_page_that_is_none_of_the_pool(m: Machine, p: Process, pfn: int) -> None:
    pmd = pmd_offset(p.mm, OTHER)
    m.host.ram.u64[pmd >> 3] = m.host.ram.u64[pmd >> 3] & ~PFN_MASK


def a_user_of_the_table_too_many(m: Machine, p: Process, pfn: int) -> None:
    m.host.pages.private[pmd_offset(p.mm, BASE) >> 12] += 1


def a_promise_too_many(m: Machine, p: Process, pfn: int) -> None:
    m.host.hstate.resv += 1


def a_page_beside_its_map(m: Machine, p: Process, pfn: int) -> None:
    m.files[0].private_data.resv_map.regions = []


def a_change_that_did_not_end(m: Machine, p: Process, pfn: int) -> None:
    m.files[0].private_data.resv_map.adds_in_progress += 1


def a_page_of_a_file_that_would_restore_a_promise(m: Machine, p: Process, pfn: int) -> None:
    m.host.pages.private[pmd_pfn(m.entry(p, BASE))] |= HPG_restore_reserve


def a_count_by_node(m: Machine, p: Process, pfn: int) -> None:
    m.host.hstate.nr_node[0] += 1


def a_page_on_no_list(m: Machine, p: Process, pfn: int) -> None:
    del m.host.hstate.active[pfn]


@pytest.mark.parametrize(("wrong", "truth"), [
    (a_reference_too_many, "frame-refcount"),
    (a_reference_to_a_free_page, "frame-refcount"),
    (an_entry_too_few, "frame-mapcount"),
    (a_migration_entry_left, "frame-mapcount"),
    (a_page_that_is_none_of_the_pool, "frame-mapcount"),
    (a_user_of_the_table_too_many, "shared-table"),
    (a_promise_too_many, "hugetlb-reserve"),
    (a_page_beside_its_map, "hugetlb-reserve"),
    (a_change_that_did_not_end, "hugetlb-reserve"),
    (a_page_of_a_file_that_would_restore_a_promise, "hugetlb-reserve"),
    (a_count_by_node, "hugetlb-pool"),
    (a_page_on_no_list, "hugetlb-pool"),
])
def test_what_is_wrong_is_found(wrong: Callable[[Machine, Process, int], None], truth: str) -> None:
    m, p, pfn = ready()
    audit(m.host)
    p.mm.tlb.clear()
    wrong(m, p, pfn)
    with pytest.raises(BrokenTruth, match=truth):
        audit(m.host)
