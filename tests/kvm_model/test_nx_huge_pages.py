"""Code in huge pages: split, listed, and given back by the recovery thread."""

from __future__ import annotations

import random

import pytest

from host_mm.madvise import MADV_DONTNEED, MADV_HUGEPAGE, MADV_PAGEOUT, do_madvise
from kvm_model.instrument import leaf_spte
from tests.kvm_model.machine import BASE, PAGE, Machine

HUGE = 512
MS = 1_000_000


def machine(pages: int = 4 * HUGE, **params: str) -> Machine:
    names = {f"kvm.nx_huge_pages_recovery_{name}": value for name, value in params.items()}
    m = Machine(pages=pages, ram=64 << 20, params={"kvm.nx_huge_pages": "Y", **names})
    m.do(lambda: do_madvise(m.mm, BASE, pages * PAGE, MADV_HUGEPAGE))
    m.run(*(("w", n * PAGE, 1) for n in range(0, pages, HUGE)))
    return m


def split(m: Machine, *pages: int) -> None:
    m.run(*(("x", page * PAGE) for page in pages))


def listed(m: Machine) -> list[int]:
    return [sp.gfn for sp in m.kvm.nx_recovery.pages.values()]


def test_a_fetch_from_a_huge_page_splits_it_and_the_table_is_listed() -> None:
    m = machine()
    assert m.kvm.stat["pages_2m"] == 4
    assert not m.leaf(0) & 4
    split(m, 5)
    assert listed(m) == [0]
    assert m.kvm.stat == m.kvm.stat | {"pages_2m": 3, "nx_lpage_splits": 1}
    assert m.leaf(5) & 4
    split(m, 6, HUGE + 1)
    assert listed(m) == [0, HUGE]
    m.truths.sweep()


def test_recovery_zaps_the_table_with_a_flush_and_the_next_read_maps_it_huge() -> None:
    m = machine()
    split(m, 5)
    flushes = m.kvm.stat["remote_tlb_flush_requests"]
    m.do(m.kvm.nx_recovery.recover)
    assert listed(m) == []
    assert m.kvm.stat["nx_lpage_splits"] == 0
    assert m.kvm.stat["remote_tlb_flush_requests"] == flushes + 1
    assert m.last("spte_zap").args["why"] == "nx-recovery"
    assert m.run(("r", 0)) == [1]
    assert m.kvm.stat["pages_2m"] == 4


def test_each_time_one_in_ratio_is_zapped_rounded_up_and_the_oldest_first() -> None:
    m = machine(ratio="2", period_ms="1000000")
    split(m, 2 * HUGE, 0, HUGE)
    m.do(m.kvm.nx_recovery.recover)
    assert listed(m) == [HUGE]


def test_the_thread_wakes_every_period_until_nothing_is_left() -> None:
    m = machine(ratio="4", period_ms="10")
    split(m, 0, HUGE)
    left = []
    for _ in range(3):
        m.do(lambda: m.sched.sleep(10 * MS))
        left.append(len(listed(m)))
    assert left == [1, 0, 0]
    assert m.sched.next_timer() is None


@pytest.mark.parametrize(("ratio", "ms"), [("60", 60_000), ("1", 3_600_000), ("7200", 1000)])
def test_without_a_period_it_is_an_hour_by_the_ratio_but_a_second_at_least(ratio: str, ms: int) -> None:
    assert machine(HUGE, ratio=ratio).kvm.nx_recovery.period_ns == ms * MS


def test_with_ratio_0_nothing_comes_back() -> None:
    m = machine(ratio="0", period_ms="10")
    split(m, 0)
    assert m.sched.next_timer() is None
    m.do(m.kvm.nx_recovery.recover)
    assert listed(m) == [0]


def test_a_logged_slots_tables_leave_the_list_and_stay() -> None:
    m = machine()
    split(m, 5)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    m.do(m.kvm.nx_recovery.recover)
    assert listed(m) == []
    assert leaf_spte(m.kvm, 5)[1] == 1


@pytest.mark.parametrize("how", ["slot", "log-ends", "destroy"])
def test_a_table_that_goes_leaves_the_list(how: str) -> None:
    m = machine(period_ms="10")
    split(m, 5)
    if how == "slot":
        m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, 0))
    elif how == "log-ends":
        for flags in (1, 0):
            m.do(lambda flags=flags: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, flags))
        assert leaf_spte(m.kvm, 5)[1] == 2
    else:
        m.do(m.kvm.destroy)
    assert listed(m) == []
    assert m.kvm.stat["nx_lpage_splits"] == 0
    m.do(lambda: m.sched.sleep(20 * MS))


@pytest.mark.parametrize("seed", range(6))
def test_recovery_beside_guests_and_the_host_keeps_every_truth_and_every_byte(seed: int) -> None:
    rng = random.Random(seed)
    m = machine(ratio="2", period_ms="1")
    words: dict[int, int] = {}
    for _ in range(25):
        page = rng.randrange(m.pages)
        ops: list[tuple[object, ...]] = []
        for _ in range(6):
            at = rng.randrange(m.pages)
            if rng.random() < 0.5:
                ops.append(("x", at * PAGE))
            else:
                words[at] = rng.getrandbits(50)
                ops.append(("w", at * PAGE, words[at]))
        tasks = [m.spawn(*ops), m.sched.spawn("recovery", m.kvm.nx_recovery.recover)]
        if rng.random() < 0.5:
            hva = BASE + page * PAGE
            tasks.append(m.sched.spawn("host", lambda hva=hva: do_madvise(m.mm, hva, PAGE, MADV_PAGEOUT)))
        if rng.random() < 0.2:
            first = page // HUGE * HUGE
            m.finish(*tasks)
            tasks = []
            m.do(lambda first=first: do_madvise(m.mm, BASE + first * PAGE, HUGE * PAGE, MADV_DONTNEED))
            words = {at: value for at, value in words.items() if not first <= at < first + HUGE}
        m.finish(*tasks)
        m.truths.sweep()
    assert m.run(*(("r", at * PAGE) for at in words)) == list(words.values())
    assert m.kvm.stat["nx_lpage_splits"] == len(listed(m))
    m.truths.quiescent()
