"""Entries that map nothing (host_mm/arch/x86/swapops.py)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from host_mm.arch.x86 import pgtable as pt
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_EXCLUSIVE,
    _PAGE_SWP_SOFT_DIRTY,
    SWP_MIG_DIRTY,
    SWP_MIG_YOUNG,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_WRITE,
    SWP_PFN_MASK,
    decode_pte,
    is_migration_entry,
    is_swap_pte,
    is_writable_migration_entry,
    make_migration_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
    swp_offset,
    swp_type,
)

pfns = st.integers(0, (1 << 34) - 1)


def test_known_words_of_the_kernel() -> None:
    # type 0, offset 1: the inverted offset fills bits 9..58.
    assert swp_entry_to_pte(swp_entry(0, 1)) == ((~1 & ((1 << 50) - 1)) << 9)
    assert swp_entry_to_pte(swp_entry(27, 0x1234)) >> 59 == 27
    assert SWP_MIGRATION_READ == 25
    assert SWP_MIGRATION_WRITE == 27


@given(st.integers(0, 31), st.integers(0, (1 << 50) - 1))
def test_a_swap_entry_survives_the_page_table(kind: int, offset: int) -> None:
    entry = swp_entry(kind, offset)
    for flags in (0, _PAGE_SWP_EXCLUSIVE, _PAGE_SWP_SOFT_DIRTY):
        pte = swp_entry_to_pte(entry) | flags
        assert pte_to_swp_entry(pte) == entry
        assert not pt.pte_present(pte)
    assert (swp_type(entry), swp_offset(entry)) == (kind, offset)


@given(pfns, st.booleans(), st.booleans(), st.sampled_from([25, 26, 27]))
def test_a_migration_entry_keeps_frame_and_history(pfn: int, young: bool, dirty: bool, kind: int) -> None:
    entry = make_migration_entry(kind, pfn, young=young, dirty=dirty)
    pte = swp_entry_to_pte(entry)
    assert is_swap_pte(pte)
    assert is_migration_entry(pte_to_swp_entry(pte))
    assert swp_offset(entry) & SWP_PFN_MASK == pfn
    assert bool(entry & SWP_MIG_YOUNG) == young
    assert bool(entry & SWP_MIG_DIRTY) == dirty
    assert is_writable_migration_entry(entry) == (kind == 27)


def test_decode_names_what_an_entry_is() -> None:
    assert decode_pte(0) == "none"
    assert "migration-write pfn 0x10" in decode_pte(swp_entry_to_pte(swp_entry(27, 0x10)))
    assert decode_pte(pt.mk_pte(5, 0x27)) == "pfn 0x5 P|RW|US|A"
