"""Unsync shadow pages: which guest tables the guest may write itself, and who knows of it."""

from __future__ import annotations

import pytest

from kvm_model.instrument import walk_sptes
from kvm_model.mmu.unsync import (
    MmuPagePath,
    for_each_sp,
    mmu_pages_clear_parents,
    mmu_unsync_walk,
)
from tests.kvm_model.shadow_machine import DATA_GPA, PAGE, PD_GPA, PT_GPA, USER_4K, ShadowMachine

MIB2 = 2 << 20


def written(tables: int = 1, **options: int) -> ShadowMachine:
    """The guest has used some of its page tables, then written to each."""
    m = ShadowMachine(**options)
    for table in range(tables):
        m.run(("w", DATA_GPA + table * MIB2, 1))
        m.run(("w", PT_GPA + table * PAGE + 8 * 5, DATA_GPA | USER_4K))
    return m


def test_the_first_write_to_a_page_table_unsyncs_its_page_before_the_table_is_mapped_writable() -> None:
    m = ShadowMachine()
    m.run(("r", DATA_GPA))
    mark = len(m.events)
    m.run(("w", PT_GPA + 8 * 3, 0))
    names = [e.name for e in m.events[mark:] if e.name in ("kvm_mmu_unsync_page", "kvm_mmu_set_spte")]
    assert names[:2] == ["kvm_mmu_unsync_page", "kvm_mmu_set_spte"]
    assert m.leaf(PT_GPA) & 0xFFF == 0xE67
    assert m.kvm.stat["mmu_unsync"] == 1
    faults = m.vcpus[0].stat["pf_taken"]
    m.run(("w", PT_GPA + 8 * 4, 0))
    assert m.vcpus[0].stat["pf_taken"] == faults, "from here on the guest writes it at full speed"


def test_every_table_above_an_unsync_page_has_the_bit_that_leads_to_it() -> None:
    m = written()
    path = walk_sptes(m.kvm, DATA_GPA)
    for level, address, _ in path[:-1]:
        sp = m.kvm.sps[address >> 12]
        assert sp.unsync_child_bitmap == {address >> 3 & 511}, level
    assert m.kvm.sps[path[-1][1] >> 12].unsync


def test_a_table_above_the_lowest_level_is_write_tracked_and_its_writes_are_emulated() -> None:
    m = ShadowMachine()
    m.run(("r", DATA_GPA))
    slot = m.kvm.slots().gfn_to_memslot(4)
    assert slot is not None
    assert {2, 3, 4} <= set(slot.gfn_write_track)
    assert 0x10 not in slot.gfn_write_track
    m.run(("w", PD_GPA + 8 * 400, 0))
    assert m.kvm.stat["mmu_unsync"] == 0
    assert not m.leaf(PD_GPA) & 2
    assert m.do(lambda: m.get(PD_GPA + 8 * 400)) == 0
    assert m.vcpus[0].stat["pf_emulate"] == 1


def test_a_neighbour_that_holds_a_table_is_not_made_writable_by_the_way() -> None:
    m = ShadowMachine()
    m.run(("r", DATA_GPA))
    # The eight pages around gfn 0x11 are mapped ahead; 0x10 holds the table that is shadowed.
    m.run(("r", PT_GPA + PAGE))
    assert m.leaf(PT_GPA + PAGE) & 2
    assert m.leaf(PT_GPA) & 3 == 1
    assert m.kvm.stat["mmu_unsync"] == 0


def test_a_walk_finds_up_to_sixteen_pages_and_clearing_them_leaves_none() -> None:
    m = written(20, data=40 << 20, ram=96 << 20)
    root = m.kvm.sps[m.vcpus[0].root_hpa >> 12]
    assert m.kvm.stat["mmu_unsync"] == 20
    found = []
    while pages := mmu_unsync_walk(m.kvm, root):
        assert len(pages) <= 16
        path = MmuPagePath()
        for sp in for_each_sp(pages, path):
            found.append(sp.gfn)
            sp.unsync = False
            mmu_pages_clear_parents(path)
    assert sorted(found) == [(PT_GPA >> 12) + n for n in range(20)]
    assert not root.unsync_child_bitmap


def test_a_bit_whose_page_is_gone_is_cleared_by_the_next_walk() -> None:
    m = written()
    root = m.kvm.sps[m.vcpus[0].root_hpa >> 12]
    # The guest's directory entry goes, and with it the link to the unsync page.
    m.run(("w", PD_GPA + 8 * (DATA_GPA >> 21), 0))
    assert root.unsync_child_bitmap
    assert mmu_unsync_walk(m.kvm, root) == []
    assert not root.unsync_child_bitmap


@pytest.mark.parametrize("breaks", [(), ("no-mark-parents",)])
def test_a_flush_finds_the_page_by_those_bits(breaks: tuple[str, ...]) -> None:
    m = ShadowMachine(breaks=breaks, checks=False)
    m.host_write(DATA_GPA, 7)
    m.host_write(DATA_GPA + PAGE, 8)
    m.run(("r", DATA_GPA))
    m.run(("w", PT_GPA, DATA_GPA + PAGE | USER_4K), ("cr3", m.cpu.reg(m.vcpus[0], "cr3")))
    assert m.run(("r", DATA_GPA)) == ([7] if breaks else [8])
