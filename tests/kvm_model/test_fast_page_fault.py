"""Rights given back without mmu_lock: access tracking without A/D bits, and write protection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.mmu_notifier import mmu_notifier_clear_young, mmu_notifier_test_young
from kvm_model.instrument import leaf_spte
from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES
from kvm_model.mmu.mmu_internal import RET_PF_FIXED, RET_PF_INVALID, RET_PF_SPURIOUS
from tests.kvm_model.machine import BASE, PAGE, Machine

MMUS = ["Y", "N"]


def machine(tdp_mmu: str = "Y", **kwargs: Any) -> Machine:
    return Machine(params={"kvm_intel.eptad": "0", "kvm.tdp_mmu": tdp_mmu}, **kwargs)


def age(m: Machine, first: int = 0, pages: int = 1) -> int:
    start = BASE + first * PAGE
    young = int(m.do(lambda: mmu_notifier_clear_young(m.mm, start, start + pages * PAGE)))
    for tlb in m.cpu.tlb.values():
        tlb.clear()
    return young


def at_cmpxchg(m: Machine, act: Callable[[], None], times: int = 1) -> list[int]:
    """Do something between the fast fault's look at the SPTE and its store."""
    struck: list[int] = []

    def strike(kind: str) -> None:
        if kind == "cmpxchg" and len(struck) < times and m.sched.current.name == "vcpu0":
            struck.append(1)
            act()
        m.truths.on_point(kind)

    m.sched.set_on_point(strike)
    return struck


@pytest.mark.parametrize("tdp_mmu", MMUS)
def test_aging_takes_all_rights_and_remembers_all_but_w(tdp_mmu: str) -> None:
    m = machine(tdp_mmu)
    m.run(("w", 0, 1))
    before = m.leaf(0)
    assert before & 7 == 7
    assert age(m) == 1
    aged = m.leaf(0)
    # R and X in bits 54 and 56; what says that W may come back stays.
    assert aged & 7 == 0
    assert aged >> 54 & 7 == 5
    assert aged >> 57 & 3 == 3
    assert m.kvm.spte.is_access_track_spte(aged)
    assert not m.kvm.spte.is_accessed_spte(aged)
    assert age(m) == 0
    assert m.leaf(0) == aged


@pytest.mark.parametrize("tdp_mmu", MMUS)
@pytest.mark.parametrize(("op", "rwx"), [(("r", 0), 5), (("x", 0), 5), (("w", 0, 9), 7)])
def test_the_next_access_gives_the_rights_back_without_a_lock_or_a_look_at_the_host(
    op: tuple[Any, ...], rwx: int, tdp_mmu: str
) -> None:
    m = machine(tdp_mmu)
    m.run(("w", 0, 1))
    age(m)
    since = len(m.events)
    m.do(m.kvm.mmu_lock.lock)
    m.run(op)
    m.kvm.mmu_lock.owner = None
    names = m.names(since=since)
    assert "fast_page_fault" in names
    assert not {"gup", "spte_install", "kvm_mmu_spte_requested"} & set(names)
    assert m.last("fast_page_fault").args["ret"] == RET_PF_FIXED
    assert m.leaf(0) & 7 == rwx
    assert m.leaf(0) >> 54 & 7 == 0
    assert m.kvm.spte.is_accessed_spte(m.leaf(0))
    assert m.vcpus[0].stat["pf_fast"] == 1


def test_w_comes_back_with_the_next_write_and_is_logged_then() -> None:
    m = machine()
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, KVM_MEM_LOG_DIRTY_PAGES))
    m.run(("w", 0, 1))
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 1
    age(m)
    assert m.run(("r", 0)) == [1]
    assert m.leaf(0) & 7 == 5
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 0
    assert m.run(("w", 0, 2), ("r", 0)) == [2]
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 1
    assert m.vcpus[0].stat["pf_fast"] == 2


def test_a_page_that_is_only_asked_about_keeps_its_rights() -> None:
    m = machine()
    m.run(("w", 0, 1))
    assert m.do(lambda: mmu_notifier_test_young(m.mm, BASE)) == 1
    assert m.leaf(0) & 7 == 7


def test_the_write_to_a_page_that_the_host_maps_read_only_takes_the_slow_path() -> None:
    m = machine()
    m.run(("r", 0))
    age(m)
    since = len(m.events)
    assert m.run(("w", 0, 5), ("r", 0)) == [5]
    first = next(e for e in m.events[since:] if e.name == "fast_page_fault")
    assert first.args["ret"] == RET_PF_INVALID
    assert m.names(since=since).count("gup_answer") >= 1


def test_aging_between_the_look_and_the_store_makes_the_fast_fault_look_again() -> None:
    m = machine()
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, KVM_MEM_LOG_DIRTY_PAGES))
    m.run(("w", 0, 1))
    m.do(lambda: m.kvm.get_dirty_log(0))
    young: list[int] = []
    struck = at_cmpxchg(m, lambda: young.append(mmu_notifier_clear_young(m.mm, BASE, BASE + PAGE)))
    assert m.run(("w", 0, 2), ("r", 0)) == [2]
    assert struck
    assert young == [1]
    assert m.last("fast_page_fault").args["ret"] == RET_PF_FIXED
    assert m.leaf(0) & 7 == 7
    m.truths.sweep()


def test_an_spte_that_is_zapped_under_the_fast_fault_is_not_brought_back() -> None:
    m = machine()
    m.run(("w", 0, 1))
    age(m)
    struck = at_cmpxchg(m, lambda: do_madvise(m.mm, BASE, PAGE, MADV_DONTNEED))
    assert m.run(("r", 0)) == [0]
    assert struck
    assert [e.args["ret"] for e in m.events if e.name == "fast_page_fault"][-1] == RET_PF_INVALID
    m.truths.sweep()


def test_what_another_vcpu_gave_back_meanwhile_is_spurious() -> None:
    m = machine(vcpus=2)
    m.run(("w", 0, 1), vcpu=1)
    m.run(("r", PAGE))
    age(m)
    sptep = leaf_spte(m.kvm, 0)[0] >> 3
    restored = m.kvm.spte.restore_acc_track_spte(m.leaf(0)) | m.kvm.spte.accessed

    def other() -> None:
        m.host.ram.u64[sptep] = restored

    struck = at_cmpxchg(m, other)
    assert m.run(("r", 0)) == [1]
    assert struck
    assert m.last("fast_page_fault").args["ret"] == RET_PF_SPURIOUS


def test_after_four_retries_the_slow_path_decides() -> None:
    m = machine()
    m.run(("w", 0, 1))
    age(m)
    sptep = leaf_spte(m.kvm, 0)[0] >> 3

    def change() -> None:
        # An ignored bit that nobody looks at.
        m.host.ram.u64[sptep] ^= 1 << 59

    struck = at_cmpxchg(m, change, times=5)
    m.sched.run_until(lambda: True)
    assert m.run(("r", 0)) == [1]
    assert len(struck) == 5
    rets = [e.args["ret"] for e in m.events if e.name == "fast_page_fault"]
    assert rets[-1] == RET_PF_INVALID


def test_with_ad_bits_only_a_write_to_what_is_present_is_fast() -> None:
    m = Machine()
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, KVM_MEM_LOG_DIRTY_PAGES))
    since = len(m.events)
    m.run(("w", 0, 1))
    assert "fast_page_fault" not in m.names(since=since)
    m.do(lambda: m.kvm.get_dirty_log(0))
    m.run(("w", 0, 2))
    assert m.last("fast_page_fault").args["ret"] == RET_PF_FIXED


@pytest.mark.parametrize("bad", ["forgot", "kept"])
def test_a_leaf_that_forgot_its_rights_or_kept_their_memory_breaks_a_truth(bad: str) -> None:
    m = machine()
    m.run(("w", 0, 1))
    sptep = leaf_spte(m.kvm, 0)[0] >> 3
    if bad == "forgot":
        age(m)
        m.host.ram.u64[sptep] &= ~(7 << 54)
    else:
        m.host.ram.u64[sptep] |= 1 << 54
    with pytest.raises(BrokenTruth, match="spte-access-track"):
        m.truths.sweep()


@pytest.mark.parametrize("tdp_mmu", MMUS)
@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize("seed", range(4))
def test_aging_storms_beside_vcpus_lose_nothing(seed: int, profile: str, tdp_mmu: str) -> None:
    m = machine(tdp_mmu, vcpus=3, seed=seed, profile=profile)
    for gfn in range(4):
        m.run(("w", gfn * PAGE, gfn + 1))

    def ager() -> None:
        for n in range(30):
            mmu_notifier_clear_young(m.mm, BASE + n % 4 * PAGE, BASE + (n % 4 + 1) * PAGE)
            if n % 10 == 9:
                do_madvise(m.mm, BASE + 3 * PAGE, PAGE, MADV_DONTNEED)
            m.sched.yield_()

    tasks = []
    for n in range(3):
        ops: list[tuple[Any, ...]] = []
        evict = ("call", m.cpu.tlb.setdefault(n, {}).clear)
        for turn in range(20):
            gfn = (turn + n) % 3
            ops += [("w", gfn * PAGE, gfn + 1), evict, ("r", gfn * PAGE)]
        tasks.append(m.spawn(*ops, vcpu=n))
    m.finish(m.sched.spawn("ager", ager), *tasks)
    for n in range(3):
        assert m.cpu.out[n][-20:] == [(turn + n) % 3 + 1 for turn in range(20)]
    m.truths.sweep()
