"""DAMON: a sample is clear_young, then test_young; regions are merged and split by what it finds."""

from __future__ import annotations

from itertools import pairwise

import pytest

from host_mm.damon.core import DamonCtx, DamonRegion, damon_start, damon_stop
from host_mm.damon.paddr import PaddrOperations
from host_mm.damon.vaddr import VaddrOperations
from host_mm.fork import exit_process
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.tlb import flush_tlb_mm
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm, run
from tests.host_mm.young import YoungMmu

US = 1000


def machine(pages: int = 64) -> tuple[Vmm, YoungMmu]:
    vmm = Vmm()
    secondary = YoungMmu(vmm.mm, vmm.base)

    def ready() -> None:
        for page in range(pages):
            vmm.host_write(page * PAGE, page + 1)
        vmm.host.lru.lru_add_drain_all()

    run(vmm.host, ready)
    secondary.take()
    return vmm, secondary


def context(vmm: Vmm, first: int, pages: int, **kw: int) -> DamonCtx:
    start = vmm.base + first * PAGE
    return DamonCtx(
        vmm.host, VaddrOperations(vmm.mm), [(start, start + pages * PAGE)], sample_interval=100 * US,
        aggr_interval=1000 * US, min_nr_regions=kw.get("low", 3), max_nr_regions=kw.get("high", 100),
    )


def test_a_sample_clears_young_at_its_begin_and_tests_at_its_end() -> None:
    vmm, secondary = machine()
    ctx = context(vmm, 5, 1)
    ctx.prepare_access_checks()
    assert secondary.take() == [("clear_young", 5, 1)]
    assert ctx.check_accesses() == 0
    assert secondary.take() == [("test_young", 5, 1)]
    ctx.prepare_access_checks()
    secondary.young.add(5)
    assert ctx.check_accesses() == 1
    assert secondary.take() == [("clear_young", 5, 1), ("test_young", 5, 1)]
    assert secondary.brackets == 0


def test_an_entry_that_is_young_is_not_asked_of_the_secondary_mmu() -> None:
    vmm, secondary = machine()
    ctx = context(vmm, 5, 1)
    ctx.prepare_access_checks()
    secondary.take()

    def use() -> None:
        flush_tlb_mm(vmm.mm)
        vmm.host_read(5 * PAGE)

    run(vmm.host, use)
    assert ctx.check_accesses() == 1
    assert secondary.take() == []


def test_physical_regions_reuse_the_answer_for_the_page_asked_last() -> None:
    vmm, secondary = machine()
    frame = vmm.pfn(5 * PAGE) << 12
    ctx = DamonCtx(
        vmm.host, PaddrOperations(vmm.host), [(frame, frame + PAGE)], sample_interval=1, aggr_interval=10
    )
    for _ in range(3):
        ctx.prepare_access_checks()
        secondary.young.add(5)
        ctx.check_accesses()
    asked = [name for name, _, _ in secondary.take()]
    assert asked == ["clear_young", "test_young", "clear_young", "clear_young"]


def test_a_hole_and_a_swapped_page_are_not_young_and_harm_nobody() -> None:
    vmm, secondary = machine(1)
    ctx = context(vmm, 1000, 8)
    ctx.prepare_access_checks()
    assert ctx.check_accesses() == 0
    assert secondary.take() == []


def test_merging_joins_alike_neighbours_by_weight_up_to_the_limit() -> None:
    vmm, _ = machine(1)
    ctx = context(vmm, 0, 8)
    ctx.regions = [DamonRegion(0, 2 * PAGE), DamonRegion(2 * PAGE, 3 * PAGE), DamonRegion(3 * PAGE, 9 * PAGE)]
    for region, seen in zip(ctx.regions, (6, 3, 0), strict=True):
        region.nr_accesses = region.last_nr_accesses = seen
    ctx.merge_regions(3, 4 * PAGE)
    assert [(r.start, r.end, r.nr_accesses, r.age) for r in ctx.regions] == [
        (0, 3 * PAGE, 5, 1), (3 * PAGE, 9 * PAGE, 0, 1),
    ]


def test_a_region_that_changed_is_young_again() -> None:
    vmm, _ = machine(1)
    ctx = context(vmm, 0, 8)
    (region,) = ctx.regions
    region.age, region.nr_accesses, region.last_nr_accesses = 7, 0, 1
    ctx.merge_regions(5, 1 << 30)
    assert region.age == 0


def test_splitting_keeps_the_bytes_and_respects_the_bounds() -> None:
    vmm, _ = machine(1)
    ctx = context(vmm, 0, 512, high=40)
    for _ in range(20):
        ctx.split_regions()
        edges = [(r.start, r.end) for r in ctx.regions]
        assert (edges[0][0], edges[-1][1]) == (vmm.base, vmm.base + 512 * PAGE)
        assert all(a[1] == b[0] for a, b in pairwise(edges))
        assert all(start < end and not (start | end) % PAGE for start, end in edges)
        assert len(edges) <= 40
    assert len(ctx.regions) > 20


def test_kdamond_finds_the_half_that_is_used() -> None:
    vmm, secondary = machine()
    ctx = context(vmm, 0, 64)
    found: list[tuple[int, int]] = []

    def note(regions: list[DamonRegion]) -> None:
        found[:] = [
            (sum(r.size for r in regions if r.start < middle and r.nr_accesses > 5) // PAGE,
             sum(r.size for r in regions if r.start >= middle and r.nr_accesses > 5) // PAGE)
        ]

    middle = vmm.base + 32 * PAGE
    ctx.on_aggregation = note

    def guest() -> None:
        damon_start(ctx)
        for _ in range(400):
            vmm.host.sched.sleep(50 * US)
            secondary.young.update(range(32))
        damon_stop(ctx)

    run(vmm.host, guest)
    low, high = found[0]
    assert low > 20
    assert high < 12
    assert ctx.kdamond is None


def test_starting_twice_and_stopping_twice_are_refused() -> None:
    vmm, _ = machine(1)
    ctx = context(vmm, 0, 1)

    def body() -> None:
        damon_start(ctx)
        with pytest.raises(KernelError) as refused:
            damon_start(ctx)
        assert refused.value.name == "EBUSY"
        damon_stop(ctx)
        with pytest.raises(KernelError) as refused:
            damon_stop(ctx)
        assert refused.value.name == "EPERM"

    run(vmm.host, body)


def test_bad_bounds_and_regions_are_einval() -> None:
    vmm, _ = machine(1)
    ops = VaddrOperations(vmm.mm)
    for regions, kw in (
        ([], {}), ([(0, 0)], {}), ([(1, PAGE)], {}), ([(0, PAGE)], {"min_nr_regions": 2}),
        ([(0, PAGE)], {"sample_interval": 2, "aggr_interval": 1}),
    ):
        with pytest.raises(KernelError) as refused:
            DamonCtx(vmm.host, ops, regions, **kw)
        assert refused.value.name == "EINVAL"


@pytest.mark.parametrize("seed", range(8))
def test_sampling_beside_faults_reclaim_and_the_exit_of_the_target(seed: int) -> None:
    vmm, _ = machine()
    host = vmm.host
    host.sched.set_strategy(RandomStrategy(seed, 4))
    ctx = context(vmm, 0, 64)

    def user() -> None:
        for n in range(200):
            vmm.host_write(n * 7 % 64 * PAGE, n)
            if n % 50 == 49:
                host.reclaim(0, 0)
            host.sched.sleep(20 * US)
        exit_process(vmm.process)

    def watcher() -> None:
        damon_start(ctx)
        host.sched.sleep(6000 * US)
        damon_stop(ctx)

    run(host, user, watcher)
    host.sched.set_strategy(None)
    run(host, host.quiesce)
    audit(host)
