"""Synchronising: what a flush of the guest's changes in the SPTEs of tables that it wrote."""

from __future__ import annotations

import pytest

from host_mm.madvise import MADV_PAGEOUT
from tests.kvm_model.shadow_machine import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    DATA_GPA,
    PAGE,
    PD_GPA,
    PML4_GPA,
    PT_GPA,
    RW,
    USER_4K,
    A,
    D,
    P,
    ShadowMachine,
    U,
)

GVA = DATA_GPA + 3 * PAGE
PTE = PT_GPA + 8 * 3
FLUSH = ("cr3", PML4_GPA)


def used() -> ShadowMachine:
    m = ShadowMachine()
    for page in range(8):
        m.host_write(DATA_GPA + page * PAGE, page + 1)
    m.run(("w", GVA, 4))
    return m


def test_another_gfn_counts_from_the_flush_on_not_before() -> None:
    m = used()
    assert m.run(("w", PTE, DATA_GPA | USER_4K), ("r", GVA)) == [4]
    assert m.run(FLUSH, ("r", GVA)) == [1]
    assert m.last("kvm_mmu_sync_page").args["unsync"]
    assert m.last("spte_zap").args["why"] == "sync"


@pytest.mark.parametrize(("gpte", "low"), [
    (0, None), (USER_4K & ~A, None), (USER_4K | 1 << 50, None), (USER_4K & ~RW, 0xA25), (USER_4K & ~D, 0xA25),
    (USER_4K & ~U, 0xE63), (USER_4K, 0xE67),
])
def test_an_entry_that_is_gone_goes_and_other_rights_are_taken_over(gpte: int, low: int | None) -> None:
    m = used()
    value = gpte | (GVA if gpte else 0)
    m.run(("w", PTE, value), FLUSH, ("r", DATA_GPA))
    spte = m.leaf(GVA)
    assert (spte & 0xFFF if spte & 1 else None) == low


def test_rights_that_come_are_not_given_ahead_of_the_fault_that_asks_for_them() -> None:
    m = used()
    m.run(("w", PTE, GVA | P | U | A | D), FLUSH, ("r", GVA))
    m.run(("w", PTE, GVA | USER_4K), FLUSH)
    m.run(("r", GVA))
    assert m.leaf(GVA) & 0xFFF == 0xE67, "the frame is known to be the host's to write"
    assert m.run(("w", GVA, 9), ("r", GVA)) == [9]


def test_a_flush_protects_the_table_again_and_the_next_write_unsyncs_again() -> None:
    m = used()
    m.run(("w", PTE, 0))
    assert m.leaf(PT_GPA) & 2
    m.run(FLUSH, ("r", DATA_GPA))
    assert not m.leaf(PT_GPA) & 2
    assert m.kvm.stat["mmu_unsync"] == 0
    m.run(("w", PTE, GVA | USER_4K))
    assert m.names().count("kvm_mmu_unsync_page") == 2
    assert m.kvm.stat["mmu_unsync"] == 1


def test_a_page_whose_table_the_host_swapped_out_is_zapped_instead() -> None:
    m = used()
    m.run(("w", PTE, DATA_GPA | USER_4K))
    m.madvise(PT_GPA, PAGE, MADV_PAGEOUT)
    m.do(m.host.swap_device.drain)
    mark = len(m.events)
    assert m.run(FLUSH, ("r", GVA)) == [1]
    assert "kvm_mmu_prepare_zap_page" in m.names(since=mark)


def test_an_unsync_page_that_is_linked_anew_is_synced_first_for_no_flush_is_needed() -> None:
    m = used()
    pde = PD_GPA + 8 * (DATA_GPA >> 21)
    m.run(("w", PTE, DATA_GPA | USER_4K))
    # A flush while nothing leads to the table leaves its page as it is.
    m.run(("w", pde, 0), FLUSH)
    assert m.run(("r", GVA)) == [("pf", 4, GVA)]
    m.run(("w", pde, PT_GPA | P | RW | U))
    assert m.run(("r", GVA)) == [1]


def test_linking_it_unsynced_lets_the_guest_use_what_it_had_taken_away() -> None:
    m = ShadowMachine(breaks=("link-unsynced",), checks=False)
    m.host_write(DATA_GPA, 1)
    m.run(("w", GVA, 4))
    pde = PD_GPA + 8 * (DATA_GPA >> 21)
    m.run(("w", PTE, DATA_GPA | USER_4K), ("w", pde, 0), FLUSH, ("r", GVA), ("w", pde, PT_GPA | P | RW | U))
    # The fault that links it looks at its own address only.
    assert m.run(("r", DATA_GPA), ("r", GVA)) == [1, 4]


def test_a_page_of_another_mode_is_not_synced_but_zapped() -> None:
    m = used()
    m.run(("cr0", CR0_PG | CR0_PE), ("w", GVA, 4), ("w", PTE, DATA_GPA | USER_4K))
    pages = {sp.role >> 13 & 1: sp for sp in m.kvm.mmu_page_hash[PT_GPA >> 12]}
    assert {wp: sp.unsync for wp, sp in pages.items()} == {0: True, 1: True}
    # The other mode's page is left alone by a flush in this one; it is synced when it is used again.
    m.run(FLUSH, ("r", DATA_GPA))
    assert {wp: sp.unsync for wp, sp in pages.items()} == {0: False, 1: True}
    assert m.run(("cr0", CR0_PG | CR0_WP | CR0_PE), ("r", GVA)) == [1]
    assert m.truths is not None
    m.truths.sweep()


def test_the_slots_log_hears_of_a_write_that_a_sync_leaves_possible() -> None:
    m = used()
    m.run(("w", PTE, GVA | P | RW | A | D), FLUSH, ("r", DATA_GPA))
    assert m.leaf(GVA) & 0xFFF == 0xE63
    assert m.truths is not None
    m.truths.sweep()
