"""Dirty logging by write protection."""

from __future__ import annotations

import errno

import pytest

from host_mm.kernel.errors import BrokenTruth, KernelError
from tests.kvm_model.machine import BASE, PAGE, Machine

LOG = 1


def log(m: Machine, on: bool = True) -> None:
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, LOG if on else 0))


def get(m: Machine) -> set[int]:
    bits = int.from_bytes(m.do(lambda: m.kvm.get_dirty_log(0)), "little")
    return {n for n in range(m.pages) if bits >> n & 1}


def test_the_log_has_exactly_the_pages_written_since_the_last_read() -> None:
    m = Machine()
    m.run(("w", 0, 1), ("w", 3 * PAGE, 1))
    log(m)
    assert get(m) == set()
    m.run(("w", 3 * PAGE, 2), ("r", 0), ("w", 60 * PAGE, 3))
    assert get(m) == {3, 60}
    assert get(m) == set()
    m.run(("w", 3 * PAGE, 4))
    assert get(m) == {3}


def test_the_second_store_is_fixed_without_mmu_lock() -> None:
    m = Machine()
    m.run(("w", 0, 1))
    log(m)
    assert not m.leaf(0) & 2
    assert m.leaf(0) >> 57 & 3 == 3
    since = len(m.events)
    m.run(("w", 0, 2))
    assert m.last("fast_page_fault").args["ret"] == 5
    assert "gup_answer" not in m.names(since=since)
    assert m.vcpus[0].stat["pf_fast"] == 1
    assert get(m) == {0}


def test_enabling_flushes_even_if_nothing_was_mapped() -> None:
    m = Machine()
    m.run(("r", 0))
    before = m.kvm.stat["remote_tlb_flush_requests"]
    log(m)
    assert m.kvm.stat["remote_tlb_flush_requests"] == before + 1


def test_a_store_through_a_stale_translation_before_the_flush_is_in_the_bits_already_taken() -> None:
    m = Machine()
    log(m)
    m.run(("w", 0, 1))
    got: list[set[int]] = []
    read = ("call", lambda: got.append(get(m)))
    m.run(("w", 0, 2), read, ("w", 0, 3), read)
    assert got == [{0}, {0}]


def test_manual_protection_reads_without_clearing() -> None:
    m = Machine()
    m.kvm.enable_manual_dirty_log()
    log(m)
    m.run(("w", 0, 1), ("w", PAGE, 1))
    assert get(m) == {0, 1} == get(m)
    m.do(lambda: m.kvm.clear_dirty_log(0, 0, (1).to_bytes(8, "little")))
    assert get(m) == {1}
    assert not m.leaf(0) & 2
    assert m.leaf(1) & 2
    m.run(("w", 0, 2))
    assert get(m) == {0, 1}


def test_initially_all_set_protects_nothing() -> None:
    m = Machine()
    m.kvm.enable_manual_dirty_log(init_set=True)
    m.run(("w", 0, 1))
    log(m)
    assert m.leaf(0) & 2
    assert get(m) == set(range(64))
    m.do(lambda: m.kvm.clear_dirty_log(0, 0, b"\xff" * 8))
    assert not m.leaf(0) & 2
    assert get(m) == set()


@pytest.mark.parametrize(
    ("slot", "first", "num", "why"),
    [(0, 1, 63, errno.EINVAL), (0, 0, 63, errno.EINVAL), (0, 128, 1, errno.EINVAL), (0, 0, 65, errno.EINVAL),
     (5, 0, 64, errno.ENOENT), (2 << 16, 0, 64, errno.EINVAL)],
)
def test_bad_clears_are_refused(slot: int, first: int, num: int, why: int) -> None:
    m = Machine()
    log(m)
    with pytest.raises(KernelError) as info:
        m.do(lambda: m.kvm.clear_dirty_log(slot, first, bytes(64), num))
    assert info.value.errno == why


@pytest.mark.parametrize(
    ("cap", "value", "flags"), [(168, 2, 0), (168, 4, 0), (168, 7, 0), (168, 1, 1), (225, 1, 0), (999, 0, 0)]
)
def test_capabilities_that_cannot_be_enabled_are_refused(cap: int, value: int, flags: int) -> None:
    m = Machine()
    with pytest.raises(KernelError) as info:
        m.kvm.enable_cap(cap, value, flags)
    assert info.value.errno == errno.EINVAL


def test_manual_protection_can_be_turned_off_again() -> None:
    m = Machine()
    m.kvm.enable_manual_dirty_log(init_set=True)
    m.kvm.enable_cap(168, 0)
    log(m)
    m.run(("w", 0, 1))
    assert get(m) == {0}
    assert get(m) == set()


def test_a_slot_without_a_log_has_none() -> None:
    m = Machine()
    with pytest.raises(KernelError) as info:
        get(m)
    assert info.value.errno == errno.ENOENT


def test_protected_sptes_stay_after_the_log_ends_and_are_fixed_by_the_next_store() -> None:
    m = Machine()
    m.run(("w", 0, 1))
    log(m)
    log(m, on=False)
    assert not m.leaf(0) & 2
    assert m.run(("w", 0, 2), ("r", 0)) == [2]


def test_without_ad_bits_logging_works_the_same() -> None:
    m = Machine(params={"kvm_intel.eptad": "0"})
    m.run(("w", 0, 1))
    log(m)
    m.run(("w", 0, 2))
    assert get(m) == {0}
    m.truths.sweep()


def test_a_writable_spte_without_its_dirty_bit_breaks_a_truth() -> None:
    m = Machine()
    log(m)
    m.run(("w", 3 * PAGE, 1))
    assert m.kvm.truths is not None
    m.kvm.truths.sweep()
    bitmap = m.kvm.slots().id_hash[0].dirty_bitmap
    assert bitmap is not None
    bitmap[0] = 0
    with pytest.raises(BrokenTruth, match="write-logged: gfn 0x3 "):
        m.kvm.truths.sweep()
