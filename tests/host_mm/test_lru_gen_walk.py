"""Aging: the walk of the page tables, its callbacks, and the sequence numbers."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.sched import RandomStrategy
from host_mm.lru_gen import MAX_NR_GENS, MIN_NR_GENS
from host_mm.lru_gen_walk import evictable_types, try_to_inc_max_seq, try_to_inc_min_seq
from host_mm.madvise import MADV_DONTNEED, MADV_RANDOM, do_madvise
from host_mm.mlock import do_mlock
from host_mm.page import PG_referenced, PG_workingset
from host_mm.truths import audit
from tests.host_mm.gens import machine, seq_of, vec_of
from tests.host_mm.machine import PAGE, Vmm, run
from tests.host_mm.young import YoungMmu


def age(vmm: Vmm, page: int = 0) -> bool:
    vec = vec_of(vmm, page)
    answer: list[bool] = []
    run(vmm.host, lambda: answer.append(try_to_inc_max_seq(vec, vec.max_seq, 60)))
    return answer[0]


def test_the_walk_asks_clear_young_of_every_mapped_page_in_order_and_opens_no_bracket() -> None:
    vmm, mmu = machine(6)
    assert isinstance(mmu, YoungMmu)
    assert age(vmm)
    inside = [entry for entry in mmu.take() if 0 <= entry[1] < 6]
    assert inside == [("clear_young", page, 1) for page in range(6)]
    assert mmu.brackets == 0


def test_what_only_the_guest_used_is_promoted_at_the_second_walk() -> None:
    vmm, mmu = machine(6)
    assert isinstance(mmu, YoungMmu)
    vec = vec_of(vmm)
    first = vec.max_seq
    mmu.young.update((1, 4))
    age(vmm)
    flags = vmm.host.pages.flags
    assert flags[vmm.pfn(PAGE)] & PG_referenced
    assert not flags[vmm.pfn(0)] & PG_referenced
    mmu.young.update((1, 4))
    assert (age(vmm), vec.max_seq) == (True, first + 2)
    # They got the generation that was the youngest while the walk ran.
    assert [seq_of(vmm, page) for page in (1, 4)] == [first + 1] * 2
    assert [seq_of(vmm, page) for page in (0, 2, 3, 5)] == [first - 1] * 4
    assert flags[vmm.pfn(PAGE)] & PG_workingset
    audit(vmm.host)


def test_a_promoted_folio_stays_on_its_old_list_until_eviction_meets_it() -> None:
    vmm, mmu = machine(2)
    assert isinstance(mmu, YoungMmu)
    for _ in range(2):
        mmu.young.add(0)
        age(vmm)
    vec, pfn = vec_of(vmm), vmm.pfn(0)
    place = vmm.host.gens.place[pfn] - 1
    assert place // 2 != vmm.host.gens.gen[pfn] - 1
    assert pfn in vec.folios[place // 2][0]


def test_locked_inaccessible_and_randomly_read_areas_are_not_walked() -> None:
    vmm, mmu = machine(6)
    assert isinstance(mmu, YoungMmu)

    def prepare() -> None:
        do_mlock(vmm.mm, vmm.base, PAGE, 0)
        do_madvise(vmm.mm, vmm.base + 2 * PAGE, PAGE, MADV_RANDOM)
        from host_mm.mprotect import do_mprotect

        do_mprotect(vmm.mm, vmm.base + 4 * PAGE, PAGE, 0)
        vmm.host.lru.lru_add_drain_all()

    run(vmm.host, prepare)
    mmu.take()
    age(vmm)
    assert [first for _, first, _ in mmu.take() if 0 <= first < 6] == [1, 3, 5]


def test_a_table_whose_lock_is_taken_is_left_out() -> None:
    vmm, mmu = machine(4)
    assert isinstance(mmu, YoungMmu)
    lock = vmm.mm.pte_locks[vmm.pte(0) >> 12]
    vec = vec_of(vmm)

    def body() -> None:
        lock.lock()
        assert try_to_inc_max_seq(vec, vec.max_seq, 60)
        lock.unlock()

    run(vmm.host, body)
    assert not [entry for entry in mmu.take() if 0 <= entry[1] < 4]


def test_an_address_space_that_is_being_changed_is_left_out() -> None:
    vmm, mmu = machine(4)
    assert isinstance(mmu, YoungMmu)
    vec = vec_of(vmm)

    def body() -> None:
        vmm.mm.mmap_lock.lock()
        assert try_to_inc_max_seq(vec, vec.max_seq, 60)
        vmm.mm.mmap_lock.unlock()

    run(vmm.host, body)
    assert mmu.take() == []


def test_a_group_is_aged_by_the_tables_of_its_own_processes() -> None:
    vmm, mmu = machine(0)
    assert isinstance(mmu, YoungMmu)
    host = vmm.host
    memcg = host.memcg.create("g")
    host.memcg.attach(vmm.process, memcg)
    from tests.host_mm.gens import fill

    run(host, lambda: fill(vmm, 4))
    other = Vmm(host=host)
    run(host, lambda: fill(other, 4))
    other_mmu = YoungMmu(other.mm, other.base)
    mmu.take()
    vec = vec_of(vmm)
    assert vec.memcg is memcg
    assert age(vmm)
    assert [first for _, first, _ in mmu.take() if 0 <= first < 4] == [0, 1, 2, 3]
    assert other_mmu.take() == []
    audit(host)


def test_there_are_never_more_generations_than_four_and_the_oldest_joins_the_next() -> None:
    vmm, _ = machine(10)
    vec = vec_of(vmm)
    for _ in range(12):
        assert age(vmm)
        assert MIN_NR_GENS <= vec.nr_gens(0) <= MAX_NR_GENS
        audit(vmm.host)
    assert vec.min_seq == [vec.max_seq - 3] * 2
    assert sum(len(vec.folios[vec.min_seq[0] % 4][0]) for _ in (0,)) >= 10


def test_empty_old_generations_are_given_up_but_two_stay() -> None:
    vmm, _ = machine(4)
    vec = vec_of(vmm)
    run(vmm.host, lambda: (do_madvise(vmm.mm, vmm.base, 4 * PAGE, MADV_DONTNEED), vmm.host.quiesce()))
    low = vmm.host.allocator.nid_of(0)
    assert vec.nid == low
    while try_to_inc_min_seq(vec, 60):
        pass
    assert all(vec.nr_gens(kind) >= MIN_NR_GENS for kind in range(2))
    audit(vmm.host)


def test_without_swappiness_only_file_folios_are_evictable() -> None:
    assert list(evictable_types(0)) == [1]
    assert list(evictable_types(60)) == [0, 1]


def test_two_who_age_the_same_generation_open_one() -> None:
    vmm, _ = machine(64)
    vec, host = vec_of(vmm), vmm.host
    host.sched.set_strategy(RandomStrategy(3, 2))
    answers: list[bool] = []
    seq = vec.max_seq

    def body() -> None:
        answers.append(try_to_inc_max_seq(vec, seq, 60))

    run(host, body, body, body)
    host.sched.set_strategy(None)
    assert sorted(answers) == [False, False, True]
    assert vec.max_seq == seq + 1
    audit(host)


@pytest.mark.parametrize("seed", range(8))
def test_aging_beside_faults_exits_and_forks_keeps_every_count(seed: int) -> None:
    vmm, mmu = machine(32)
    assert isinstance(mmu, YoungMmu)
    host = vmm.host
    vec = vec_of(vmm)
    host.sched.set_strategy(RandomStrategy(seed, 3))

    def user() -> None:
        for n in range(120):
            page = n * 5 % 40
            vmm.host_write(page * PAGE, n)
            mmu.young.add(page)
            if n % 9 == 0:
                do_madvise(vmm.mm, vmm.base + page * PAGE, 2 * PAGE, MADV_DONTNEED)
            if n % 30 == 7:
                exit_process(fork_process(vmm.process))
        exit_process(vmm.process)

    def aging() -> None:
        for _ in range(25):
            try_to_inc_max_seq(vec, vec.max_seq, 60)
            host.sched.sleep(3000)

    run(host, user, aging, aging)
    host.sched.set_strategy(None)
    run(host, host.quiesce)
    audit(host)
