"""Batches, lists, activation and isolation (host_mm/lru.py)."""

from __future__ import annotations

import pytest

from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import Scheduler
from host_mm.lru import (
    LRU_ACTIVE_ANON,
    LRU_INACTIVE_ANON,
    LRU_INACTIVE_FILE,
    LRU_UNEVICTABLE,
)
from host_mm.mm_types import VM_LOCKED, MmStruct, VmArea
from host_mm.page import FOLIO_BATCH_SIZE, PG_active, PG_anon, PG_lru, PG_referenced, PG_swapbacked, put_page
from host_mm.page_alloc import GFP_KERNEL
from tests.host_mm.machine import make_host
from trace_events.stream import TraceStream

PAGE = 4096


@pytest.fixture
def host() -> HostMm:
    stream = TraceStream()
    return HostMm(Scheduler(stream), stream, ram_bytes=1024 * PAGE, swap_bytes=None)


def page(host: HostMm) -> int:
    pfn = host.allocator.alloc_pages(GFP_KERNEL)
    host.pages.flags[pfn] |= PG_anon | PG_swapbacked
    return int(pfn)


def listed(host: HostMm, lru: int) -> list[int]:
    """From tail to head."""
    return [pfn for vec in host.lru.vecs for pfn in vec.lists[lru]]


def test_a_new_folio_waits_in_a_batch_that_holds_a_reference(host: HostMm) -> None:
    pfn = page(host)
    host.lru.folio_add_lru(pfn)
    assert not host.pages.flags[pfn] & PG_lru
    assert host.pages.refcount[pfn] == 2
    assert host.lru.batched() == [pfn]
    host.lru.lru_add_drain()
    assert host.pages.refcount[pfn] == 1
    assert listed(host, LRU_INACTIVE_ANON) == [pfn]


def test_a_full_batch_drains_itself(host: HostMm) -> None:
    pfns = [page(host) for _ in range(FOLIO_BATCH_SIZE)]
    for pfn in pfns[:-1]:
        host.lru.folio_add_lru(pfn)
    assert listed(host, LRU_INACTIVE_ANON) == []
    host.lru.folio_add_lru(pfns[-1])
    assert listed(host, LRU_INACTIVE_ANON) == pfns


def test_a_second_vcpu_thread_has_batches_of_its_own(host: HostMm) -> None:
    pfn = page(host)
    task = host.sched.spawn("vcpu", lambda: host.lru.folio_add_lru(pfn), vcpu=1)
    host.sched.run_until(lambda: task.done)
    host.lru.lru_add_drain()
    assert listed(host, LRU_INACTIVE_ANON) == []
    host.lru.lru_add_drain_all()
    assert listed(host, LRU_INACTIVE_ANON) == [pfn]


def test_a_page_freed_while_its_batch_holds_it_goes_when_the_batch_drains(host: HostMm) -> None:
    free = host.allocator.nr_free_pages()
    pfn = page(host)
    host.lru.folio_add_lru(pfn)
    put_page(host, pfn)
    assert host.allocator.nr_free_pages() == free - 1
    host.lru.lru_add_drain()
    assert host.allocator.nr_free_pages() == free
    assert listed(host, LRU_INACTIVE_ANON) == []


def test_marking_accessed_climbs_step_by_step(host: HostMm) -> None:
    pfn = page(host)
    host.lru.folio_add_lru(pfn)
    host.lru.lru_add_drain()
    flags = host.pages.flags
    steps = []
    for _ in range(3):
        host.lru.folio_mark_accessed(pfn)
        host.lru.lru_add_drain()
        steps.append(flags[pfn] & (PG_active | PG_referenced))
    assert steps == [PG_referenced, PG_active, PG_active | PG_referenced]
    assert listed(host, LRU_ACTIVE_ANON) == [pfn]


def test_a_folio_activated_in_its_add_batch_starts_out_active(host: HostMm) -> None:
    pfn = page(host)
    host.lru.folio_add_lru(pfn)
    host.lru.folio_mark_accessed(pfn)
    host.lru.folio_mark_accessed(pfn)
    host.lru.lru_add_drain()
    assert listed(host, LRU_ACTIVE_ANON) == [pfn]


def test_deactivation_lazyfree_and_rotation_move_between_lists(host: HostMm) -> None:
    first, second = page(host), page(host)
    for pfn in (first, second):
        host.lru.folio_add_lru(pfn)
    host.lru.lru_add_drain()
    host.lru.folio_activate(first)
    host.lru.lru_add_drain()
    host.lru.folio_deactivate(first)
    host.lru.lru_add_drain()
    assert listed(host, LRU_INACTIVE_ANON) == [second, first]
    host.lru.folio_rotate_reclaimable(first)
    host.lru.lru_add_drain()
    assert listed(host, LRU_INACTIVE_ANON) == [first, second]
    host.lru.folio_mark_lazyfree(first)
    host.lru.lru_add_drain()
    assert listed(host, LRU_INACTIVE_FILE) == [first]


def test_an_isolated_folio_is_on_no_list_and_comes_back(host: HostMm) -> None:
    pfn = page(host)
    host.lru.folio_add_lru(pfn)
    assert not host.lru.folio_isolate_lru(pfn), "still in a batch"
    host.lru.lru_add_drain()
    assert host.lru.folio_isolate_lru(pfn)
    assert not host.lru.folio_isolate_lru(pfn)
    assert host.pages.refcount[pfn] == 2
    host.lru.folio_putback_lru(pfn)
    host.lru.lru_add_drain()
    assert listed(host, LRU_INACTIVE_ANON) == [pfn]
    assert host.pages.refcount[pfn] == 1


def test_pages_of_a_locked_vma_are_unevictable_until_munlocked(host: HostMm) -> None:
    pfn = page(host)
    vma = VmArea(MmStruct(host, None), 0, PAGE, VM_LOCKED, 0)
    host.lru.folio_add_lru_vma(pfn, vma)
    host.lru.lru_add_drain()
    assert listed(host, LRU_UNEVICTABLE) == [pfn]
    host.lru.mlock.munlock_folio(pfn)
    host.lru.lru_add_drain()
    assert listed(host, LRU_INACTIVE_ANON) == [pfn]


def test_adding_a_listed_folio_again_breaks_a_truth(host: HostMm) -> None:
    pfn = page(host)
    host.lru.folio_add_lru(pfn)
    host.lru.lru_add_drain()
    host.lru.folio_add_lru(pfn)
    with pytest.raises(BrokenTruth, match="lru"):
        host.lru.lru_add_drain()


def test_while_batches_are_disabled_nothing_lingers_in_one(host: HostMm) -> None:
    pfn = page(host)
    host.lru.lru_cache_disable()
    host.lru.folio_add_lru(pfn)
    assert host.lru.batched() == []
    host.lru.lru_cache_enable()


def test_on_a_host_with_one_cpu_every_vcpus_thread_has_the_same_batches() -> None:
    one, many = make_host(params={"mm.nr_cpus": "1"}), make_host()
    for host, same in ((one, True), (many, False)):
        first = host.lru.batches()
        host.sched.current.ctx.vcpu = 1
        assert (host.lru.batches() is first) == same
        host.sched.current.ctx.vcpu = -1
