"""The host's entry formats (host_mm/arch/x86/pgtable.py)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from host_mm.arch.x86 import pgtable as pt

pfns = st.integers(0, (1 << 34) - 1)


def test_known_words_of_the_kernel() -> None:
    # type 0, offset 1: the inverted offset fills bits 9..58.
    assert pt.swp_entry_to_pte(pt.swp_entry(0, 1)) == ((~1 & ((1 << 50) - 1)) << 9)
    assert pt.swp_entry_to_pte(pt.swp_entry(27, 0x1234)) >> 59 == 27
    assert pt.SWP_MIGRATION_READ == 25
    assert pt.SWP_MIGRATION_WRITE == 27


@given(st.integers(0, 31), st.integers(0, (1 << 50) - 1))
def test_a_swap_entry_survives_the_page_table(kind: int, offset: int) -> None:
    entry = pt.swp_entry(kind, offset)
    for flags in (0, pt._PAGE_SWP_EXCLUSIVE, pt._PAGE_SWP_SOFT_DIRTY):
        pte = pt.swp_entry_to_pte(entry) | flags
        assert pt.pte_to_swp_entry(pte) == entry
        assert not pt.pte_present(pte)
    assert (pt.swp_type(entry), pt.swp_offset(entry)) == (kind, offset)


@given(pfns, st.booleans(), st.booleans(), st.sampled_from([25, 26, 27]))
def test_a_migration_entry_keeps_frame_and_history(pfn: int, young: bool, dirty: bool, kind: int) -> None:
    entry = pt.make_migration_entry(kind, pfn, young=young, dirty=dirty)
    pte = pt.swp_entry_to_pte(entry)
    assert pt.is_swap_pte(pte)
    assert pt.is_migration_entry(pt.pte_to_swp_entry(pte))
    assert pt.swp_offset(entry) & pt.SWP_PFN_MASK == pfn
    assert bool(entry & pt.SWP_MIG_YOUNG) == young
    assert bool(entry & pt.SWP_MIG_DIRTY) == dirty
    assert pt.is_writable_migration_entry(entry) == (kind == 27)


@given(pfns)
def test_a_prot_none_entry_hides_its_frame_but_keeps_it(pfn: int) -> None:
    mapped = pt.mk_pte(pfn, pt._PAGE_PRESENT | pt._PAGE_USER | pt._PAGE_ACCESSED | pt._PAGE_NX)
    hidden = pt.pte_modify(mapped, pt._PAGE_PROTNONE | pt._PAGE_ACCESSED)
    assert pt.pte_protnone(hidden)
    assert pt.pte_present(hidden)
    assert hidden & pt.PFN_MASK != pfn << 12
    assert pt.pte_pfn(hidden) == pfn
    back = pt.pte_modify(hidden, pt._PAGE_PRESENT | pt._PAGE_USER | pt._PAGE_ACCESSED | pt._PAGE_NX)
    assert back == mapped


def test_write_protection_moves_the_dirty_bit_and_back() -> None:
    pte = pt.pte_mkdirty(pt.mk_pte(7, pt._PAGE_PRESENT | pt._PAGE_RW | pt._PAGE_USER))
    ro = pt.pte_wrprotect(pte)
    assert not ro & (pt._PAGE_DIRTY | pt._PAGE_RW)
    assert pt.pte_dirty(ro)
    assert pt.pte_mkwrite(ro) == pte
    assert not pt.pte_dirty(pt.pte_mkclean(ro))


def test_decode_names_what_an_entry_is() -> None:
    assert pt.decode_pte(0) == "none"
    assert "migration-write pfn 0x10" in pt.decode_pte(pt.swp_entry_to_pte(pt.swp_entry(27, 0x10)))
    assert pt.decode_pte(pt.mk_pte(5, 0x27)) == "pfn 0x5 P|RW|US|A"


def test_a_huge_leaf_is_no_table_and_has_a_frame_without_the_present_bit_too() -> None:
    leaf = pt.mk_pmd(0x400, pt._PAGE_PRESENT | pt._PAGE_RW | pt._PAGE_USER)
    none = pt.mk_pmd(0x400, pt._PAGE_PROTNONE)
    assert pt.pmd_trans_huge(leaf)
    assert not pt.pmd_table(leaf)
    assert pt.pmd_pfn(leaf) == pt.pmd_pfn(none) == 0x400
    moving = pt.swp_entry_to_pte(
        pt.make_migration_entry(pt.SWP_MIGRATION_WRITE, 0x400, young=True, dirty=True)
    )
    assert pt.is_swap_pmd(moving)
    assert not pt.pmd_present(moving)
    assert not pt.is_swap_pmd(none)
