"""The pool of huge pages: its size, its lists by node, surplus, and what is left for others."""

from __future__ import annotations

from errno import ENOMEM

import pytest

from host_mm.host import HostMm
from host_mm.hugetlb import (
    HPG_migratable,
    HPG_temporary,
    alloc_hugetlb_folio_nodemask,
    folio_isolate_hugetlb,
    folio_putback_hugetlb,
    move_hugetlb_state,
)
from host_mm.hugetlb_pool import alloc_surplus_hugetlb_folio, hugetlb_acct_memory, set_max_huge_pages
from host_mm.kernel.errors import BrokenTruth
from host_mm.page import PG_hugetlb, put_page
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_NORETRY, GFP_THISNODE, alloc_pages
from host_mm.ram import POISON
from host_mm.truths import audit
from tests.host_mm.machine import make_host, run

HUGE = 512


def counts(host: HostMm) -> tuple[int, int, int, int]:
    """nr, free, reserved, surplus; they must add up with the lists and by node."""
    h = host.hstate
    assert h.nr == sum(h.nr_node)
    assert h.free == sum(h.free_node) == sum(len(free) for free in h.freelists)
    assert h.surplus == sum(h.surplus_node)
    assert [len(free) for free in h.freelists] == h.free_node
    return h.nr, h.free, h.resv, h.surplus


def take(host: HostMm, nid: int = 0) -> int:
    """A free page with a reference, as a fault takes it."""
    host.hstate.lock.lock()
    pfn = host.hstate.dequeue_nodemask(nid)
    host.hstate.lock.unlock()
    return pfn


def test_the_pool_takes_whole_blocks_from_both_nodes_in_turn_and_gives_them_back() -> None:
    host = make_host(ram=32 << 20)
    free = host.allocator.nr_free_pages()
    assert set_max_huge_pages(host, 4) == 4
    assert counts(host) == (4, 4, 0, 0)
    assert host.hstate.nr_node == [2, 2]
    assert host.allocator.nr_free_pages() == free - 4 * HUGE
    for nid, pfns in enumerate(host.hstate.freelists):
        for pfn in pfns:
            assert pfn % HUGE == 0
            assert host.allocator.nid_of(pfn) == nid
            assert host.pages.refcount[pfn] == 0
    audit(host)
    assert set_max_huge_pages(host, 0) == 0
    assert counts(host) == (0, 0, 0, 0)
    assert host.allocator.nr_free_pages() == free
    audit(host)


def test_asking_for_more_than_there_is_gives_what_there_is() -> None:
    host = make_host(ram=16 << 20, swap=None)
    got = set_max_huge_pages(host, 100)
    assert 0 < got < 8
    assert counts(host) == (got, got, 0, 0)
    audit(host)


def test_a_node_that_has_no_block_left_is_passed_over() -> None:
    host = make_host(ram=32 << 20, swap=None)
    while alloc_pages(host, GFP_HIGHUSER_MOVABLE | GFP_COMP | GFP_THISNODE | GFP_NORETRY, 9, 0) >= 0:
        pass
    assert set_max_huge_pages(host, 3) == 3
    assert host.hstate.nr_node == [0, 3]


def test_a_free_page_has_no_reference_to_take_and_holds_nothing_of_its_past() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 1)
    (pfn,) = host.hstate.freelists[0]
    assert take(host) == pfn
    assert host.pages.refcount[pfn] == 1
    host.ram.write(pfn << 12, b"secret")
    generation = host.pages.generation[pfn + 7]
    freed: list[tuple[int, int]] = []
    host.free_hooks.append(lambda frame, order: freed.append((frame, order)))
    put_page(host, pfn)
    assert freed == [(pfn, 9)]
    assert host.pages.generation[pfn + 7] == generation + 1
    assert host.ram.read(pfn << 12, 6) == bytes([POISON] * 6)
    assert counts(host) == (1, 1, 0, 0)
    audit(host)


def test_shrinking_below_what_is_in_use_leaves_surplus_that_goes_when_it_is_freed() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 3)
    pfn = take(host)
    free = host.allocator.nr_free_pages()
    assert set_max_huge_pages(host, 0) == 0
    assert counts(host) == (1, 0, 0, 1)
    put_page(host, pfn)
    assert counts(host) == (0, 0, 0, 0)
    assert not host.pages.flags[pfn] & PG_hugetlb
    assert host.allocator.nr_free_pages() == free + 3 * HUGE


def test_growing_takes_pages_out_of_surplus_before_it_allocates() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 1)
    pfn = take(host)
    set_max_huge_pages(host, 0)
    free = host.allocator.nr_free_pages()
    assert set_max_huge_pages(host, 1) == 1
    assert host.allocator.nr_free_pages() == free
    assert counts(host) == (1, 0, 0, 0)
    put_page(host, pfn)
    assert counts(host) == (1, 1, 0, 0)


def test_reserved_pages_stay_when_the_pool_shrinks() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 3)
    assert hugetlb_acct_memory(host, 2) == 0
    assert set_max_huge_pages(host, 0) == 0
    assert counts(host) == (2, 2, 2, 2)
    hugetlb_acct_memory(host, -2)
    assert counts(host) == (0, 0, 0, 0)


def test_what_is_promised_cannot_be_promised_twice() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 2)
    assert hugetlb_acct_memory(host, 2) == 0
    assert hugetlb_acct_memory(host, 1) == -ENOMEM
    assert counts(host) == (2, 2, 2, 0)
    hugetlb_acct_memory(host, -2)
    assert counts(host) == (2, 2, 0, 0)


def test_overcommit_makes_surplus_for_a_promise_and_returns_it() -> None:
    host = make_host(ram=32 << 20)
    host.hstate.nr_overcommit = 2
    free = host.allocator.nr_free_pages()
    assert hugetlb_acct_memory(host, 3) == -ENOMEM
    assert counts(host) == (0, 0, 0, 0)
    assert hugetlb_acct_memory(host, 2) == 0
    assert counts(host) == (2, 2, 2, 2)
    hugetlb_acct_memory(host, -2)
    assert counts(host) == (0, 0, 0, 0)
    assert host.allocator.nr_free_pages() == free


def test_two_who_overcommit_at_once_stay_within_the_limit() -> None:
    for seed in range(8):
        from host_mm.kernel.sched import RandomStrategy

        host = make_host(ram=32 << 20)
        host.sched.set_strategy(RandomStrategy(seed, 2))
        host.hstate.nr_overcommit = 1
        got: list[int] = []
        run(host, *[lambda host=host, got=got: got.append(alloc_surplus_hugetlb_folio(host, 0))] * 2)
        assert sorted(pfn >= 0 for pfn in got) == [False, True]
        assert counts(host) == (1, 0, 0, 1)


def test_a_page_to_migrate_to_is_a_free_one_or_a_temporary_one_that_leaves_again() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 1)
    first = alloc_hugetlb_folio_nodemask(host, 0)
    assert not host.pages.private[first] & HPG_temporary
    second = alloc_hugetlb_folio_nodemask(host, 1)
    assert host.allocator.nid_of(second) == 1
    assert host.pages.private[second] & HPG_temporary
    assert counts(host) == (2, 0, 0, 0)
    move_hugetlb_state(host, first, second)
    put_page(host, first)
    assert counts(host) == (1, 0, 0, 0)
    put_page(host, second)
    assert counts(host) == (1, 1, 0, 0)
    assert host.hstate.nr_node == [0, 1]


def test_isolation_wants_a_page_that_is_in_use_and_not_isolated() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 2)
    (free, *_), _ = host.hstate.freelists
    assert not folio_isolate_hugetlb(host, free)
    assert not folio_isolate_hugetlb(host, alloc_pages(host, 0))
    pfn = take(host, 1)
    assert not folio_isolate_hugetlb(host, pfn), "nobody has mapped it yet"
    host.pages.private[pfn] |= HPG_migratable
    assert folio_isolate_hugetlb(host, pfn)
    assert not folio_isolate_hugetlb(host, pfn)
    folio_putback_hugetlb(host, pfn)
    assert host.pages.refcount[pfn] == 1
    assert folio_isolate_hugetlb(host, pfn)


def test_a_mapped_huge_page_must_not_be_freed() -> None:
    host = make_host(ram=32 << 20)
    set_max_huge_pages(host, 1)
    pfn = take(host)
    host.pages.entire_mapcount[pfn] = 1
    with pytest.raises(BrokenTruth, match="freed in use"):
        put_page(host, pfn)
