"""Counts of huge pages, their entries, and their places in the page cache."""

from __future__ import annotations

import pytest

from host_mm.arch.x86.pgtable import HPAGE_PMD_NR, pmd_trans_huge, pte_dirty, pte_write
from host_mm.filemap import folio_unlock
from host_mm.hugetlb import HPG_restore_reserve
from host_mm.hugetlb_rmap import (
    copy_huge_folio,
    hugetlb_add_file_rmap,
    hugetlb_add_new_anon_rmap,
    hugetlb_add_to_page_cache,
    hugetlb_delete_from_page_cache,
    hugetlb_remove_rmap,
    hugetlb_try_dup_anon_rmap,
    hugetlb_try_share_anon_rmap,
    make_huge_pte,
    zero_huge_folio,
)
from host_mm.kernel.errors import BrokenTruth
from host_mm.mmap import PROT_READ
from host_mm.page import PG_anon_exclusive, PG_dirty, PG_hugetlb
from host_mm.rmap_anon_vma import anon_vma_prepare
from tests.host_mm.hugetlb_machine import BASE, Machine


def machine() -> tuple[Machine, int, int]:
    """Two pages of the pool, taken as a fault takes them."""
    m = Machine(4)
    first, second = (m.host.hstate.dequeue_nodemask(0) for _ in range(2))
    m.host.held.update((first, second))
    return m, first, second


def test_bytes_are_zeroed_and_copied_to_the_last_small_page() -> None:
    m, first, second = machine()
    zero_huge_folio(m.host, first)
    assert m.host.ram.page_is_zero(first + HPAGE_PMD_NR - 1)
    m.host.ram.write(((first + HPAGE_PMD_NR) << 12) - 3, b"end")
    copy_huge_folio(m.host, second, first)
    assert m.host.ram.read(((second + HPAGE_PMD_NR) << 12) - 3, 3) == b"end"


def test_a_private_page_begins_exclusive_and_stops_being_it_when_it_is_shared() -> None:
    m, pfn, _ = machine()
    p = m.process()
    m.private(p, 1)
    vma = m.vma(p)
    pages = m.host.pages
    with pytest.raises(BrokenTruth, match="anon-vma"):
        hugetlb_add_new_anon_rmap(m.host, pfn, vma, BASE)
    anon_vma_prepare(vma)
    pages.private[pfn] |= HPG_restore_reserve
    hugetlb_add_new_anon_rmap(m.host, pfn, vma, BASE)
    assert not pages.private[pfn] & HPG_restore_reserve
    assert pages.flags[pfn] & PG_anon_exclusive
    assert hugetlb_try_dup_anon_rmap(m.host, pfn, vma)
    assert (pages.entire_mapcount[pfn], pages.large_mapcount[pfn]) == (2, 2)
    assert not pages.flags[pfn] & PG_anon_exclusive
    hugetlb_remove_rmap(m.host, pfn)
    pages.flags[pfn] |= PG_anon_exclusive
    assert hugetlb_try_share_anon_rmap(m.host, pfn)
    assert not pages.flags[pfn] & PG_anon_exclusive


def test_a_page_cannot_lose_an_entry_that_it_has_not() -> None:
    m, pfn, _ = machine()
    hugetlb_add_file_rmap(m.host, pfn)
    hugetlb_remove_rmap(m.host, pfn)
    with pytest.raises(BrokenTruth, match="page-mapcount"):
        hugetlb_remove_rmap(m.host, pfn)


def test_an_entry_is_a_leaf_with_the_rights_of_its_vma() -> None:
    m, pfn, _ = machine()
    p = m.process()
    m.private(p, 1)
    entry = make_huge_pte(m.vma(p), pfn, try_mkwrite=True)
    assert pmd_trans_huge(entry)
    assert pte_write(entry)
    assert pte_dirty(entry)
    assert not pte_write(make_huge_pte(m.vma(p), pfn, try_mkwrite=False))
    m.private(p, 1, BASE + (1 << 30), prot=PROT_READ)
    assert not pte_write(make_huge_pte(m.vma(p, BASE + (1 << 30)), pfn, try_mkwrite=True))


def test_the_page_cache_holds_each_small_page_once_and_no_statistics_count_it() -> None:
    m, pfn, other = machine()
    file = m.file(2)
    assert hugetlb_add_to_page_cache(file, pfn, 1)
    assert m.host.pages.refcount[pfn] == 1 + HPAGE_PMD_NR
    assert file.nrpages == HPAGE_PMD_NR
    assert file.i_pages[HPAGE_PMD_NR] == file.i_pages[2 * HPAGE_PMD_NR - 1] == pfn
    assert m.host.vmstat["nr_file_pages"] == 0
    assert m.host.pages.flags[pfn] & (PG_dirty | PG_hugetlb) == PG_dirty | PG_hugetlb
    assert not hugetlb_add_to_page_cache(file, other, 1)
    hugetlb_delete_from_page_cache(file, pfn)
    folio_unlock(m.host, pfn)
    assert not file.i_pages
    assert m.host.pages.refcount[pfn] == 1
