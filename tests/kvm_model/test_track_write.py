"""Emulated writes to guest tables: what they zap, and when a table is taken for one no more."""

from __future__ import annotations

import pytest

from kvm_model.instrument import walk_sptes
from tests.kvm_model.shadow_machine import (
    DATA_GPA,
    PAGE,
    PD_GPA,
    PDPT_GPA,
    PT_GPA,
    RW,
    USER_4K,
    P,
    ShadowMachine,
    U,
)
from tests.kvm_model.test_shadow_fetch import two_level

MIB2 = 2 << 20
PDE = PD_GPA + 8 * (DATA_GPA >> 21)


def machine(**options: int) -> ShadowMachine:
    m = ShadowMachine(**options)
    for page in range(8):
        m.host_write(DATA_GPA + page * PAGE, page + 1)
    m.run(("r", DATA_GPA), ("r", DATA_GPA + MIB2))
    return m


def test_the_entry_that_was_written_is_zapped_and_no_other() -> None:
    m = machine()
    m.run(("w", PDE, PT_GPA + PAGE | P | RW | U))
    assert [level for level, _, _ in walk_sptes(m.kvm, DATA_GPA)] == [4, 3, 2]
    assert [level for level, _, _ in walk_sptes(m.kvm, DATA_GPA + MIB2)] == [4, 3, 2, 1]
    assert m.run(("r", DATA_GPA)) == [0], "the second table maps the second 2M"
    stat = m.kvm.stat
    assert (stat["mmu_pte_write"], stat["mmu_pde_zapped"], stat["mmu_flooded"]) == (1, 1, 0)


def test_a_change_of_a_directory_entry_needs_no_flush_to_be_seen_while_it_was_not_present() -> None:
    m = machine()
    m.run(("w", PDE, 0))
    assert m.run(("r", DATA_GPA)) == [("pf", 4, DATA_GPA)]
    m.run(("w", PDE, PT_GPA | P | RW | U))
    assert m.run(("r", DATA_GPA)) == [1]


def test_three_writes_without_a_use_in_between_are_a_flood_and_the_table_is_let_go() -> None:
    m = machine()
    # A directory that does not translate itself: each write to PD_GPA is a use of it.
    m.host_write(PDPT_GPA + 8, 0x6000 | P | RW | U)
    m.host_write(0x6000, PT_GPA | P | RW | U)
    m.run(("r", 0x4000_0000), ("w", 0x6800, 0), ("w", 0x6808, 0))
    assert m.kvm.stat["mmu_flooded"] == 0
    mark = len(m.events)
    m.run(("w", 0x6810, 0))
    assert m.kvm.stat["mmu_flooded"] == 1
    zapped = [e.args["gfn"] for e in m.events[mark:] if e.name == "kvm_mmu_prepare_zap_page"]
    assert zapped == [6]
    m.run(*(("w", PD_GPA + 8 * entry, 0) for entry in range(300, 306)))
    assert m.kvm.stat["mmu_flooded"] == 1


def test_a_use_of_the_table_begins_the_count_anew() -> None:
    m = machine()
    m.host_write(PDPT_GPA + 8, 0x6000 | P | RW | U)
    m.host_write(0x6000, PT_GPA | P | RW | U)
    for page in range(5):
        m.run(("r", 0x4000_0000 + page * 8 * PAGE), ("w", 0x6800 + 8 * page, 0), ("w", 0x6800, 0))
    assert m.kvm.stat["mmu_flooded"] == 0
    assert m.kvm.stat["mmu_pte_write"] == 10


@pytest.mark.parametrize(("offset", "length", "flooded"), [
    (0, 8, False), (0, 1, False), (3, 1, True), (0, 4, False), (4, 4, False), (0, 2, True), (6, 8, True),
])
def test_a_write_that_is_not_one_entry_means_that_this_is_no_table(
    offset: int, length: int, flooded: bool
) -> None:
    m = machine()
    m.run(("w", PD_GPA + 8 * 300 + offset, 0, length))
    assert m.kvm.stat["mmu_flooded"] == flooded


def test_half_of_an_8_byte_entry_zaps_the_entry() -> None:
    m = machine()
    m.run(("w", PDE + 4, 0, 4))
    assert [level for level, _, _ in walk_sptes(m.kvm, DATA_GPA)] == [4, 3, 2]


def test_an_entry_of_a_32_bit_directory_is_two_of_ours_in_one_of_its_four_views() -> None:
    m = ShadowMachine()
    two_level(m)
    m.run(("r", DATA_GPA), ("r", DATA_GPA + MIB2), ("r", 0xD0000000), ("r", 0xD0000000 + MIB2))
    pde = 0x6000 + 4 * (DATA_GPA >> 22)
    m.run(("w", pde, 0, 4))
    assert [level for level, _, _ in walk_sptes(m.kvm, DATA_GPA)] == [2]
    assert [level for level, _, _ in walk_sptes(m.kvm, DATA_GPA + MIB2)] == [2]
    assert [level for level, _, _ in walk_sptes(m.kvm, 0xD0000000)] == [2, 1]
    assert m.kvm.stat["mmu_pde_zapped"] == 0, "an entry that is zero is not counted"


def test_without_shadow_pages_nothing_is_looked_for() -> None:
    m = ShadowMachine()
    m.run(("cr0", 1), ("r", 0x5000))
    assert m.kvm.indirect_shadow_pages == 0
    m.run(("w", PT_GPA, USER_4K))
    assert m.kvm.stat["mmu_pte_write"] == 0
