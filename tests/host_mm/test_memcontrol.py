"""Memory cgroups: what is charged, what a limit does, whose references count, and who dies."""

from __future__ import annotations

import random

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth, KernelError, OutOfMemory
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.memcontrol import MEMCG_CHARGE_BATCH, MemCgroup
from host_mm.migrate import move_pages
from host_mm.page import put_page
from host_mm.rmap import folio_referenced
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm, run
from tests.host_mm.young import YoungMmu


def machine(pages: int = 0, **kw: object) -> tuple[Vmm, MemCgroup]:
    """A VMM in a group of its own, with so many pages charged."""
    vmm = Vmm(**kw)
    memcg = vmm.host.memcg.create("vm")
    vmm.host.memcg.attach(vmm.process, memcg)
    run(vmm.host, lambda: fill(vmm, range(pages)))
    vmm.notifier.take()
    return vmm, memcg


def fill(vmm: Vmm, pages: range) -> None:
    for page in pages:
        vmm.host_write(page * PAGE, page + 1)
    vmm.host.lru.lru_add_drain_all()


def refused(call: object, *args: object) -> str:
    with pytest.raises(KernelError) as info:
        call(*args)  # type: ignore[operator]
    return str(info.value.name)


def test_a_charge_is_taken_in_batches_and_the_rest_waits_in_the_stock() -> None:
    vmm, memcg = machine(10)
    assert memcg.usage == MEMCG_CHARGE_BATCH
    assert vmm.host.memcg.stocked(memcg) == MEMCG_CHARGE_BATCH - 10
    vmm.host.memcg.drain_all_stock(memcg)
    assert memcg.usage == 10
    audit(vmm.host)


def test_what_is_freed_is_uncharged_whatever_the_path() -> None:
    vmm, memcg = machine(40)
    host = vmm.host

    def body() -> None:
        do_madvise(vmm.mm, vmm.base, 10 * PAGE, MADV_DONTNEED)
        do_madvise(vmm.mm, vmm.base + 10 * PAGE, 10 * PAGE, MADV_PAGEOUT)
        host.quiesce()
        while any(vmm.in_swap_cache(page * PAGE) for page in range(10, 20)):
            host.reclaim_memcg(memcg, 1, 0xCC0)
            host.quiesce()

    run(host, body)
    host.memcg.drain_all_stock(memcg)
    assert memcg.usage <= 20
    assert memcg.swap >= 10
    audit(host)
    run(host, lambda: exit_process(vmm.process))
    run(host, host.quiesce)
    host.memcg.drain_all_stock(memcg)
    assert (memcg.usage, memcg.swap, memcg.processes) == (0, 0, [])
    audit(host)


def test_the_root_group_counts_nothing() -> None:
    vmm = Vmm()
    run(vmm.host, lambda: fill(vmm, range(50)))
    assert not vmm.host.memcg.folios


def test_a_child_is_in_its_parents_group_and_its_copies_are_charged_there() -> None:
    vmm, memcg = machine(4)
    host = vmm.host

    def body() -> None:
        child = fork_process(vmm.process)
        assert child.memcg is memcg
        vmm.host_write(0, 99)
        host.memcg.drain_all_stock(memcg)
        assert memcg.usage == 5
        exit_process(child)

    run(host, body)
    run(host, host.quiesce)
    audit(host)


def test_a_charge_moves_with_a_migrated_page() -> None:
    vmm, memcg = machine(1)
    old = vmm.pfn(0)
    run(vmm.host, lambda: move_pages(vmm.process, [vmm.base], [1]))
    new = vmm.pfn(0)
    assert old not in vmm.host.memcg.folios
    assert vmm.host.memcg.folios[new] is memcg
    run(vmm.host, vmm.host.quiesce)
    audit(vmm.host)


def test_a_frame_that_is_charged_keeps_its_own_charge_when_contents_move_to_it() -> None:
    vmm, memcg = machine(2)
    old, new = vmm.pfn(0), vmm.pfn(PAGE)
    charged = memcg.usage
    vmm.host.memcg.migrate(old, new)
    assert vmm.host.memcg.folios[old] is vmm.host.memcg.folios[new] is memcg
    assert memcg.usage == charged
    audit(vmm.host)


def test_lowering_the_limit_reclaims_one_bracket_a_page_and_no_more_than_needed() -> None:
    vmm, memcg = machine(200, params={"swap.device": "zram"})
    host = vmm.host
    run(host, lambda: host.memcg.write_max(memcg, 150))
    assert memcg.usage <= 150
    run(host, host.quiesce)
    gone = [page for page in range(200) if vmm.pfn(page * PAGE) < 0]
    assert 50 <= len(gone) < 130
    brackets = [entry for entry in vmm.brackets() if entry[0] == "clear"]
    assert brackets == [("clear", page * PAGE, (page + 1) * PAGE) for page in gone]
    audit(host)


def test_a_charge_at_the_limit_reclaims_from_the_group_and_spares_the_others() -> None:
    vmm, memcg = machine(0)
    host = vmm.host
    other = Vmm(host=host)
    run(host, lambda: fill(other, range(100)))
    memcg.max = 64
    run(host, lambda: fill(vmm, range(200)))
    assert memcg.usage <= 64
    assert memcg.events["max"] > 0
    assert all(other.pfn(page * PAGE) >= 0 for page in range(100))
    assert [vmm.host_read(page * PAGE) for page in range(200)] == list(range(1, 201))
    run(host, host.quiesce)
    audit(host)


def test_only_references_of_the_group_count_when_it_is_reclaimed() -> None:
    vmm, memcg = machine(4)
    secondary = YoungMmu(vmm.mm, vmm.base)
    secondary.young.update(range(4))
    host = vmm.host
    pfn = vmm.pfn(0)
    host.memcg.attach(vmm.process, None)
    run(host, lambda: folio_referenced(host, pfn, memcg=memcg))
    assert secondary.take() == []
    host.memcg.attach(vmm.process, memcg)
    run(host, lambda: folio_referenced(host, pfn, memcg=memcg))
    assert secondary.take() == [("clear_flush_young", 0, 1)]


def test_a_page_that_comes_back_is_charged_to_the_group_that_swapped_it_out() -> None:
    vmm, memcg = machine(100)
    host = vmm.host
    run(host, lambda: host.memcg.write_max(memcg, 50))
    memcg.max = 1000
    gone = next(page for page in range(100) if vmm.pfn(page * PAGE) < 0)
    host.memcg.attach(vmm.process, None)
    run(host, lambda: vmm.host_read(gone * PAGE))
    assert host.memcg.folios[vmm.pfn(gone * PAGE)] is memcg
    audit(host)


def test_memory_reclaim_frees_what_is_asked_and_says_eagain_when_it_cannot() -> None:
    vmm, memcg = machine(100, params={"swap.device": "zram"})
    host = vmm.host
    freed: list[int] = []
    run(host, lambda: freed.append(host.memcg.write_reclaim(memcg, 40)))
    assert freed[0] >= 40
    errors: list[str] = []
    run(host, lambda: errors.append(refused(host.memcg.write_reclaim, memcg, 10_000)))
    assert errors == ["EAGAIN"]
    audit(host)


def test_bad_limits_and_a_busy_group_are_refused() -> None:
    vmm, memcg = machine(1)
    controller = vmm.host.memcg
    assert refused(controller.write_max, memcg, -1) == "EINVAL"
    assert refused(controller.resize_max, memcg, -1) == "EINVAL"
    assert refused(controller.write_reclaim, memcg, -1) == "EINVAL"
    assert refused(controller.remove, memcg) == "EBUSY"


def test_the_old_limit_file_refuses_what_cannot_be_reached_and_changes_nothing() -> None:
    vmm, memcg = machine(100, swap=None)
    before = memcg.max
    errors: list[str] = []
    run(vmm.host, lambda: errors.append(refused(vmm.host.memcg.resize_max, memcg, 10)))
    assert errors == ["EBUSY"]
    assert memcg.max == before


def test_a_removed_group_lives_until_its_last_page_and_is_still_reclaimed_with_the_host() -> None:
    vmm, memcg = machine(50)
    host = vmm.host
    host.memcg.attach(vmm.process, None)
    host.memcg.remove(memcg)
    assert memcg in host.memcg.groups
    run(host, lambda: [host.reclaim(0, 0) for _ in range(4)])
    run(host, host.quiesce)
    assert any(vmm.pfn(page * PAGE) < 0 for page in range(50))
    run(host, lambda: do_madvise(vmm.mm, vmm.base, 50 * PAGE, MADV_DONTNEED))
    run(host, host.quiesce)
    assert memcg not in host.memcg.groups
    audit(host)


def test_swap_beyond_its_limit_keeps_the_page() -> None:
    vmm, memcg = machine(20)
    memcg.swap_max = 5
    run(vmm.host, lambda: do_madvise(vmm.mm, vmm.base, 20 * PAGE, MADV_PAGEOUT))
    run(vmm.host, vmm.host.quiesce)
    assert memcg.swap == 5
    assert memcg.events["swap_max"] > 0
    audit(vmm.host)


def test_a_group_without_reclaimable_memory_kills_one_of_its_own() -> None:
    vmm, memcg = machine(20, swap=None)
    host = vmm.host
    outsider = Vmm(host=host)
    run(host, lambda: fill(outsider, range(300)))
    with pytest.raises(OutOfMemory, match="Memory cgroup out of memory: Killed process 1"):
        run(host, lambda: host.memcg.write_max(memcg, 10))
    assert memcg.events["oom"] == 1


def test_a_forked_child_dies_first_for_its_group() -> None:
    vmm, memcg = machine(2, swap=None)
    host = vmm.host

    def body() -> None:
        child = fork_process(vmm.process)
        from host_mm.uaccess import copy_to_user

        for page in range(80):
            copy_to_user(child, vmm.base + page * PAGE, b"c")
        host.memcg.write_max(memcg, 30)
        assert memcg.events["oom_kill"] == 1
        host.memcg.drain_all_stock(memcg)
        assert memcg.usage <= 30
        assert vmm.host_read(0) == 1
        if child.alive:
            exit_process(child)

    run(host, body)
    run(host, host.quiesce)
    audit(host)


def test_reclaim_may_charge_over_the_limit() -> None:
    vmm, memcg = machine(10)
    host = vmm.host
    memcg.max = 5

    def body() -> None:
        host.allocator.memalloc.add(host.sched.current)
        pfn = host.allocator.alloc_pages(0, 0, 0)
        assert host.memcg.charge(pfn, vmm.mm, 0) == 0
        host.allocator.memalloc.discard(host.sched.current)
        put_page(host, pfn)

    host.memcg.drain_all_stock(memcg)
    run(host, body)
    audit(host)


@pytest.mark.parametrize("seed", range(6))
def test_two_groups_under_limits_beside_reclaim_and_random_scheduling(seed: int) -> None:
    vmm, memcg = machine(0)
    host = vmm.host
    other = Vmm(host=host)
    second = host.memcg.create("second")
    host.memcg.attach(other.process, second)
    memcg.max, second.max = 60, 90
    host.sched.set_strategy(RandomStrategy(seed, 4))

    def user(who: Vmm, salt: int) -> None:
        rng = random.Random(seed + salt)
        truth: dict[int, int] = {}
        for n in range(250):
            page = rng.randrange(150)
            if page in truth and rng.random() < 0.5:
                assert who.host_read(page * PAGE) == truth[page]
            else:
                who.host_write(page * PAGE, n + 1)
                truth[page] = n + 1

    def manager() -> None:
        for n in range(10):
            host.sched.sleep(300_000)
            host.memcg.write_max(memcg, 50 + n * 3)
            host.reclaim(0, 0)

    run(host, lambda: user(vmm, 0), lambda: user(other, 1), manager)
    host.sched.set_strategy(None)
    run(host, host.quiesce)
    audit(host)
    assert second.usage <= 90
    run(host, lambda: (exit_process(vmm.process), exit_process(other.process)))
    run(host, host.quiesce)
    for group in (memcg, second):
        host.memcg.drain_all_stock(group)
        assert (group.usage, group.swap) == (0, 0)
    audit(host)


def test_a_frame_is_charged_once() -> None:
    vmm, _ = machine(1)
    pfn = next(iter(vmm.host.memcg.folios))
    with pytest.raises(BrokenTruth, match=r"memcg-charge.*twice"):
        run(vmm.host, lambda: vmm.host.memcg.charge(pfn, vmm.mm))
