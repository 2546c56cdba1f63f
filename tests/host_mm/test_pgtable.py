"""The host's entry formats (host_mm/arch/x86/pgtable.py)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from host_mm.arch.x86 import pgtable as pt
from host_mm.arch.x86.swapops import (
    SWP_MIGRATION_WRITE,
    make_migration_entry,
    swp_entry_to_pte,
)


@given(st.integers(0, (1 << 34) - 1))
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


def test_a_huge_leaf_is_no_table_and_has_a_frame_without_the_present_bit_too() -> None:
    leaf = pt.mk_pmd(0x400, pt._PAGE_PRESENT | pt._PAGE_RW | pt._PAGE_USER)
    none = pt.mk_pmd(0x400, pt._PAGE_PROTNONE)
    assert pt.pmd_trans_huge(leaf)
    assert not pt.pmd_table(leaf)
    assert pt.pmd_pfn(leaf) == pt.pmd_pfn(none) == 0x400
    moving = swp_entry_to_pte(
        make_migration_entry(SWP_MIGRATION_WRITE, 0x400, young=True, dirty=True)
    )
    assert pt.is_swap_pmd(moving)
    assert not pt.pmd_present(moving)
    assert not pt.is_swap_pmd(none)
