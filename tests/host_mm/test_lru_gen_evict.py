"""Eviction: the oldest generation goes, what the guest uses stays."""

from __future__ import annotations

import random

import pytest

from host_mm.fork import exit_process
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.lru_gen_evict import run_aging, run_eviction
from host_mm.page_alloc import GFP_KERNEL
from host_mm.shrink_folio_list import ScanControl
from host_mm.truths import audit
from tests.host_mm.gens import machine, vec_of
from tests.host_mm.machine import PAGE, Vmm, run
from tests.host_mm.young import YoungMmu

ZRAM = {"swap.device": "zram"}


def gone(vmm: Vmm, pages: int) -> set[int]:
    return {page for page in range(pages) if vmm.pfn(page * PAGE) < 0}


def evict(vmm: Vmm, seq: int, nr: int, page: int = 0) -> int:
    answer: list[int] = []
    vec = vec_of(vmm, page)
    run(vmm.host, lambda: answer.append(run_eviction(vec, seq, nr, ScanControl(GFP_KERNEL))))
    run(vmm.host, vmm.host.quiesce)
    return answer[0]


def test_eviction_takes_the_oldest_generation_and_one_bracket_a_page() -> None:
    vmm, mmu = machine(100, params=ZRAM)
    assert isinstance(mmu, YoungMmu)
    vec = vec_of(vmm)
    old = vec.max_seq - 1
    run(vmm.host, lambda: [run_aging(vec, vec.max_seq) for _ in range(2)])
    vmm.notifier.take()
    freed = evict(vmm, old, 30)
    assert 30 <= freed < 100
    brackets = [entry for entry in vmm.brackets() if entry[0] == "clear" and entry[1] >= 0]
    assert brackets == [("clear", page * PAGE, (page + 1) * PAGE) for page in sorted(gone(vmm, 100))]
    audit(vmm.host)


def test_what_the_guest_uses_outlives_what_it_does_not() -> None:
    vmm, mmu = machine(200, params=ZRAM)
    assert isinstance(mmu, YoungMmu)
    vec, host = vec_of(vmm), vmm.host
    hot = set(range(0, 200, 4))

    def body() -> None:
        for _ in range(3):
            mmu.young.update(hot)
            run_aging(vec, vec.max_seq)
        run_eviction(vec, vec.max_seq - 2, 140, ScanControl(GFP_KERNEL))

    run(host, body)
    assert len(gone(vmm, 200)) >= 100
    assert not gone(vmm, 200) & hot
    audit(host)


def test_a_page_that_is_young_when_eviction_meets_it_is_kept_and_its_neighbours_are_seen() -> None:
    vmm, mmu = machine(8, params=ZRAM)
    assert isinstance(mmu, YoungMmu)
    vec = vec_of(vmm)
    run(vmm.host, lambda: [run_aging(vec, vec.max_seq) for _ in range(2)])
    mmu.take()
    mmu.young.update((0, 6))
    evict(vmm, vec.max_seq - 2, 8)
    assert 0 not in gone(vmm, 8)
    asked = [first for name, first, _ in mmu.take() if name == "clear_young" and first >= 0]
    assert asked[0] == 0
    assert 0 not in mmu.young


def test_reclaim_for_the_host_ages_when_too_few_generations_are_left() -> None:
    vmm, _ = machine(300, params=ZRAM)
    vec, host = vec_of(vmm), vmm.host
    before = vec.max_seq
    run(host, lambda: [host.reclaim(0, 0) for _ in range(20)])
    assert vec.max_seq > before
    assert len(gone(vmm, 300)) > 100
    assert [vmm.host_read(page * PAGE) for page in range(300)] == list(range(1, 301))
    run(host, host.quiesce)
    audit(host)


def test_reclaim_for_a_group_ages_and_evicts_its_own_lists_only() -> None:
    vmm, _ = machine(0, params=ZRAM)
    host = vmm.host
    memcg = host.memcg.create("g")
    host.memcg.attach(vmm.process, memcg)
    other = Vmm(host=host)
    from tests.host_mm.gens import fill

    run(host, lambda: (fill(vmm, 200), fill(other, 100)))
    run(host, lambda: host.memcg.write_max(memcg, 120))
    assert memcg.usage <= 120
    assert not gone(other, 100)
    assert [vmm.host_read(page * PAGE) for page in range(200)] == list(range(1, 201))
    audit(host)


def test_the_debug_file_refuses_generations_that_cannot_be() -> None:
    vmm, _ = machine(4)
    vec = vec_of(vmm)
    with pytest.raises(KernelError) as refused:
        run_aging(vec, vec.max_seq + 1)
    assert refused.value.name == "EINVAL"
    with pytest.raises(KernelError) as refused:
        run_eviction(vec, vec.max_seq - 1, 10, ScanControl(GFP_KERNEL))
    assert refused.value.name == "EINVAL"


def test_without_swap_no_anonymous_folio_is_scanned() -> None:
    vmm, mmu = machine(100, swap=None)
    assert isinstance(mmu, YoungMmu)
    mmu.take()
    run(vmm.host, lambda: vmm.host.reclaim(0, 0))
    assert gone(vmm, 100) == set()
    assert mmu.take() == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("device", ["file", "zram"])
def test_guests_faults_aging_and_eviction_at_random_lose_no_byte(seed: int, device: str) -> None:
    vmm, mmu = machine(64, params={"swap.device": device}, swap=8 << 20)
    assert isinstance(mmu, YoungMmu)
    host, vec = vmm.host, vec_of(vmm)
    host.sched.set_strategy(RandomStrategy(seed, 4))
    left = 2

    def user(parity: int) -> None:
        nonlocal left
        rng = random.Random(seed * 2 + parity)
        truth = {page: page + 1 for page in range(parity, 64, 2)}
        for n in range(200):
            page = rng.randrange(32) * 2 + parity
            assert vmm.host_read(page * PAGE) == truth[page]
            mmu.young.add(page)
            if rng.random() < 0.4:
                vmm.host_write(page * PAGE, n + 1000)
                truth[page] = n + 1000
        left -= 1

    def reclaimer() -> None:
        while left:
            host.reclaim(0, 0)
            if vec.max_seq % 3 and vec.mm_seq < vec.max_seq:
                run_aging(vec, vec.max_seq)
            host.sched.sleep(20_000)

    run(host, lambda: user(0), lambda: user(1), reclaimer)
    host.sched.set_strategy(None)
    run(host, host.quiesce)
    audit(host)
    run(host, lambda: exit_process(vmm.process))
    run(host, host.quiesce)
    audit(host)
    assert host.swap.inuse_pages == 0
