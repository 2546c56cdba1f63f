"""Dirty logging through rmaps."""

from __future__ import annotations

import pytest

from kvm_model.instrument import leaf_spte
from kvm_model.mmu.rmap_log import kvm_rmap_clear_dirty_pt_masked, kvm_rmap_write_protect_gfn
from kvm_model.mmu.spte import PT_WRITABLE_MASK
from tests.kvm_model.direct_machine import direct, direct_huge, huge_in_2m, rmap
from tests.kvm_model.machine import BASE, PAGE, Machine

PROFILES = ("linux-6.18", "linux-5.10")


def log(m: Machine, on: int) -> None:
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, on))


def bits(m: Machine) -> set[int]:
    word = int.from_bytes(m.do(lambda: m.kvm.get_dirty_log(0)), "little")
    return {gfn for gfn in range(m.pages) if word >> gfn & 1}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("eptad", ["0", "1"])
def test_the_log_names_exactly_what_was_written_since_it_was_read(profile: str, eptad: str) -> None:
    m = direct(profile=profile, params={"kvm_intel.eptad": eptad})
    m.run(*(("w", gfn * PAGE, 1) for gfn in range(6)))
    log(m, 1)
    assert bits(m) == set()
    for wrote in ({1, 2}, {2}, set(), {0, 5, 40}):
        m.run(*(("w", gfn * PAGE, 2) for gfn in sorted(wrote)), ("r", 3 * PAGE))
        m.truths.sweep()
        assert bits(m) == wrote
    log(m, 0)
    m.truths.sweep()


@pytest.mark.parametrize("profile", PROFILES)
def test_a_huge_leaf_is_protected_and_a_write_maps_4k_in_its_place(profile: str) -> None:
    m = direct_huge(profile=profile)
    m.run(("w", 0, 1))
    log(m, 1)
    assert huge_in_2m(m)
    assert not m.leaf(0) & PT_WRITABLE_MASK
    assert "kvm_mmu_split_huge_page" not in m.names()
    m.run(("w", 7 * PAGE, 2))
    assert leaf_spte(m.kvm, 7)[1] == 1
    assert leaf_spte(m.kvm, 0) == (0, 0)
    assert bits(m) == {7}
    m.truths.sweep()


@pytest.mark.parametrize("profile", PROFILES)
def test_after_the_log_small_leaves_go_and_faults_map_huge_again(profile: str) -> None:
    m = direct_huge(profile=profile)
    m.run(("w", 0, 1))
    log(m, 1)
    m.run(("w", 0, 2), ("w", PAGE, 3))
    assert len(rmap(m, 0)) == len(rmap(m, 1)) == 1
    log(m, 0)
    assert rmap(m, 0) == rmap(m, 1) == []
    assert m.last("spte_zap").args["why"] == "recover"
    assert m.run(("r", 0), ("r", PAGE)) == [2, 3]
    assert huge_in_2m(m)
    m.truths.sweep()


def test_after_the_log_leaves_of_small_pages_stay() -> None:
    m = direct()
    m.run(("w", 0, 1))
    log(m, 1)
    log(m, 0)
    assert len(rmap(m, 0)) == 1


@pytest.mark.parametrize(("profile", "protected"), [("linux-6.18", False), ("linux-5.10", True)])
def test_a_log_that_starts_full_protects_huge_leaves_at_once_in_5_10_and_else_when_cleared(
    profile: str, protected: bool
) -> None:
    m = direct_huge(profile=profile)
    m.kvm.enable_manual_dirty_log(init_set=True)
    m.run(("w", 0, 1))
    log(m, 1)
    assert bool(m.leaf(0) & PT_WRITABLE_MASK) is not protected
    m.do(lambda: m.kvm.clear_dirty_log(0, 0, bytes([0xFF] * 8)))
    assert not m.leaf(0) & PT_WRITABLE_MASK
    m.run(("w", 3 * PAGE, 1))
    assert 3 in bits(m)
    m.truths.sweep()


def test_a_protected_table_of_the_guest_gets_no_right_back_without_the_lock() -> None:
    m = direct()
    m.run(("w", 0, 1))
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None

    def protect() -> bool:
        with m.kvm.mmu_lock:
            return kvm_rmap_write_protect_gfn(m.kvm, slot, 0, 1)

    assert m.do(protect)
    assert not m.leaf(0) & (PT_WRITABLE_MASK | m.kvm.spte.mmu_writable)
    assert not m.do(protect)


@pytest.mark.parametrize("eptad", ["0", "1"])
def test_a_page_is_got_ready_for_the_log_by_its_d_bit_or_without_one_by_w(eptad: str) -> None:
    m = direct(params={"kvm_intel.eptad": eptad})
    m.run(("w", 0, 1), ("w", PAGE, 1))
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None

    def clear() -> None:
        with m.kvm.mmu_lock:
            kvm_rmap_clear_dirty_pt_masked(m.kvm, slot, 0, 0b10)

    m.do(clear)
    gone = m.kvm.spte.dirty if eptad == "1" else PT_WRITABLE_MASK
    assert not m.leaf(1) & gone
    assert m.leaf(0) & gone
    if eptad == "1":
        assert m.leaf(1) & PT_WRITABLE_MASK
