"""What a range of gfns is asked of rmaps: unmap, age, test, follow; and that both MMUs answer alike."""

from __future__ import annotations

import random

import pytest

from host_mm.arch.x86.pgtable import _PAGE_RW, pte_wrprotect
from host_mm.mmu_notifier import (
    mmu_notifier_change_pte,
    mmu_notifier_clear_young,
    mmu_notifier_test_young,
)
from host_mm.pgtable_generic import pmd_offset, pte_offset_map, set_pte
from kvm_model.instrument import leaf_spte, zap_for_instrument
from kvm_model.mmu.gfn_range import kvm_age_gfn, kvm_test_age_gfn, kvm_unmap_gfn_range
from kvm_model.mmu.spte import PT_WRITABLE_MASK
from tests.kvm_model.direct_machine import direct, direct_huge, dontneed, rmap
from tests.kvm_model.machine import BASE, PAGE, Machine
from tests.kvm_model.test_breaks import SwitchOnce


@pytest.mark.parametrize("seed", range(6))
def test_both_mmus_map_and_unmap_the_same(seed: int) -> None:
    rng = random.Random(seed)
    steps = [(rng.choice("wrd"), rng.randrange(20)) for _ in range(60)]
    seen = []
    for params in ({"kvm.tdp_mmu": "Y"}, {"kvm.tdp_mmu": "N", "kvm_intel.eptad": "0"}):
        m = Machine(pages=20, params={"kvm_intel.eptad": "0"} | params)
        trace = []
        for kind, gfn in steps:
            if kind == "d":
                dontneed(m, gfn)
            else:
                m.run(("r", gfn * PAGE) if kind == "r" else ("w", gfn * PAGE, 1))
            trace.append([leaf_spte(m.kvm, n)[1] for n in range(20)])
        m.truths.sweep()
        stat = m.vcpus[0].stat
        seen.append((trace, stat["pf_taken"], stat["pf_fixed"], m.kvm.stat["pages_4k"]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize("eptad", ["0", "1"])
def test_a_page_is_young_until_it_is_aged_and_again_after_a_use(profile: str, eptad: str) -> None:
    m = direct(profile=profile, params={"kvm_intel.eptad": eptad})
    m.run(("w", 5 * PAGE, 7))
    hva = BASE + 5 * PAGE
    assert m.do(lambda: mmu_notifier_test_young(m.mm, hva))
    assert m.do(lambda: mmu_notifier_clear_young(m.mm, hva, hva + PAGE))
    assert not m.do(lambda: mmu_notifier_test_young(m.mm, hva))
    assert not m.do(lambda: mmu_notifier_clear_young(m.mm, hva, hva + PAGE))
    m.cpu.tlb.clear()
    m.run(("w", 5 * PAGE, 8))
    assert m.do(lambda: mmu_notifier_test_young(m.mm, hva))
    assert m.run(("r", 5 * PAGE)) == [8]
    m.truths.sweep()


def test_the_age_of_a_huge_leaf_is_asked_by_any_of_its_pages() -> None:
    m = direct_huge()
    m.run(("w", 5 * PAGE, 7))
    assert m.do(lambda: mmu_notifier_test_young(m.mm, BASE + 300 * PAGE))
    assert m.do(lambda: mmu_notifier_clear_young(m.mm, BASE, BASE + 512 * PAGE))
    assert not m.do(lambda: mmu_notifier_test_young(m.mm, BASE + 300 * PAGE))


def test_aging_steps_by_whole_huge_pages_from_where_the_range_starts() -> None:
    m = direct_huge()
    m.run(("w", 512 * PAGE, 7))
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None
    # Two gfns in two huge pages: the step from the first is past the end.
    assert not m.do(lambda: kvm_test_age_gfn(m.kvm, slot, 511, 513))
    assert m.do(lambda: kvm_age_gfn(m.kvm, slot, 512, 513))


def test_while_aging_reads_a_list_nobody_takes_from_it() -> None:
    """The zap waits for the head that the age between its read and its update holds."""
    m = direct(params={"kvm_intel.eptad": "0"})
    m.run(("w", 0, 1))
    order: list[str] = []

    def age() -> None:
        mmu_notifier_clear_young(m.mm, BASE, BASE + PAGE)
        order.append("age")

    def zap() -> None:
        zap_for_instrument(m.kvm, 0)
        order.append("zap")

    m.sched.set_strategy(SwitchOnce(m, lambda task, kind: task.name == "age" and kind == "cmpxchg"))
    m.finish(m.sched.spawn("age", age), m.sched.spawn("zap", zap))
    assert order == ["age", "zap"]
    assert not rmap(m, 0)
    m.truths.sweep()


def test_an_unmap_asks_for_a_flush_only_if_something_was_there() -> None:
    m = direct()
    m.run(("w", 0, 1))
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None

    def unmap(start: int, end: int) -> bool:
        with m.kvm.mmu_lock:
            return kvm_unmap_gfn_range(m.kvm, slot, start, end, may_block=True)

    assert not m.do(lambda: unmap(1, 64))
    assert m.do(lambda: unmap(0, 1))
    assert not m.do(lambda: unmap(0, 64))


def change(m: Machine, gfn: int, protect: bool) -> None:
    def set_pte_at_notify() -> None:
        mm, hva = m.mm, BASE + gfn * PAGE
        at = pte_offset_map(mm, pmd_offset(mm, hva), hva)
        pte = int(m.host.ram.u64[at >> 3])
        pte = pte_wrprotect(pte) if protect else pte | _PAGE_RW
        mmu_notifier_change_pte(mm, hva, pte)
        set_pte(mm, hva, at, pte)

    m.do(set_pte_at_notify)


def test_change_pte_keeps_a_read_only_leaf_in_its_rmap_and_drops_a_writable_one() -> None:
    m = direct(profile="linux-5.10")
    m.run(("w", 0, 7))
    change(m, 0, True)
    spte, masks = m.leaf(0), m.kvm.spte
    assert spte & 1
    assert not spte & (PT_WRITABLE_MASK | masks.host_writable | masks.accessed)
    assert rmap(m, 0) == [leaf_spte(m.kvm, 0)[0]]
    assert m.run(("r", 0)) == [7]
    change(m, 0, False)
    assert rmap(m, 0) == []
    m.truths.sweep()
