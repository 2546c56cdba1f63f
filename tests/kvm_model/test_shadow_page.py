"""Shadow pages: the hash, links, zapping, generations, and how many there may be."""

from __future__ import annotations

import itertools

import pytest

from host_mm.kernel.errors import BrokenTruth
from kvm_model.instrument import leaf_spte, walk_sptes
from kvm_model.mmu.rmap import pte_list_remove, rmap_sptes
from kvm_model.truths_rmap import check_rmaps
from tests.kvm_model.direct_machine import direct, direct_huge, dontneed, huge_in_2m, lines, rmap
from tests.kvm_model.machine import BASE, PAGE

MIB2 = 2 << 20


def test_pages_are_found_by_gfn_and_role_and_shared_by_all_vcpus() -> None:
    m = direct(vcpus=2)
    m.run(("w", 0, 1))
    m.run(("w", PAGE, 2), vcpu=1)
    pages = [e.args for e in m.events if e.name == "kvm_mmu_get_page"]
    assert [(p["role"] & 15, p["created"]) for p in pages] == [
        (4, True), (3, True), (2, True), (1, True), (4, False)
    ]
    assert m.vcpus[0].root_hpa == m.vcpus[1].root_hpa
    root = m.kvm.sps[m.vcpus[0].root_hpa >> 12]
    assert root.root_count == 2
    assert {sp.role & 0xFF0 for sp in m.kvm.sps.values()} == {0x780}, "direct, all rights, not 4-byte"


def test_each_table_knows_the_entry_that_points_to_it() -> None:
    m = direct()
    m.run(("w", 0, 1))
    steps = walk_sptes(m.kvm, 0)
    for (_, at, spte), _below in itertools.pairwise(steps):
        child = m.kvm.sps[spte >> 12 & (1 << 34) - 1]
        assert [sptep << 3 for sptep in rmap_sptes(child.parent_ptes)] == [at]


def test_a_table_that_a_huge_leaf_replaced_is_linked_again_with_its_leaves() -> None:
    m = direct_huge()
    m.run(("w", 5 * PAGE, 7))
    assert huge_in_2m(m)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    m.run(("w", 5 * PAGE, 8))
    assert leaf_spte(m.kvm, 5)[1] == 1
    small = leaf_spte(m.kvm, 5)[0]
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 0))
    # Ending the log zaps the small leaf; the next fault maps huge over the table, which stays.
    assert not rmap(m, 5, 1)
    assert m.run(("r", 5 * PAGE)) == [8]
    assert huge_in_2m(m)
    table = m.kvm.sps[small >> 12]
    assert list(rmap_sptes(table.parent_ptes)) == []
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    mark = len(m.events)
    m.run(("w", 5 * PAGE, 9))
    assert leaf_spte(m.kvm, 5)[0] == small
    existing = [e.args for e in m.events[mark:] if e.name == "kvm_mmu_get_page"]
    assert [(p["role"] & 15, p["created"]) for p in existing] == [(1, False)]
    m.truths.sweep()


def test_a_huge_leaf_goes_with_a_flush_when_a_table_takes_its_place() -> None:
    for profile, order in (
        ("linux-6.18", ["kvm_mmu_get_page", "spte_zap", "kvm_flush_remote_tlbs", "kvm_mmu_set_spte"]),
        ("linux-5.10", ["spte_zap", "kvm_flush_remote_tlbs", "kvm_mmu_get_page", "kvm_mmu_set_spte"]),
    ):
        m = direct_huge(profile=profile)
        m.run(("w", 5 * PAGE, 7))
        m.do(lambda m=m: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
        mark = len(m.events)
        m.run(("w", 5 * PAGE, 8))
        assert lines(m, *order, since=mark) == order
        assert m.last("spte_zap").args["why"] == "split"
        assert rmap(m, 0, 2) == []
        m.truths.sweep()


# -- the truth ----------------------------------------------------------------------------------


def test_a_leaf_that_its_rmap_has_lost_is_found_by_the_sweep() -> None:
    m = direct()
    m.run(("w", 0, 1))
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None
    pte_list_remove(slot.rmap[0][0], leaf_spte(m.kvm, 0)[0] >> 3)
    with pytest.raises(BrokenTruth, match="the rmap of level 1, gfn 0x0"):
        m.truths.sweep()


def test_a_table_that_its_parent_does_not_know_is_found() -> None:
    m = direct()
    m.run(("w", 0, 1))
    table = m.kvm.sps[leaf_spte(m.kvm, 0)[0] >> 12]
    pte_list_remove(table.parent_ptes, next(iter(rmap_sptes(table.parent_ptes))))
    with pytest.raises(BrokenTruth, match="parent_ptes"):
        check_rmaps(m.kvm)


def test_a_leaf_without_its_bytes_is_found_and_so_is_a_lost_page() -> None:
    m = direct()
    m.run(("w", 0, 1))
    m.host.ram.u64[leaf_spte(m.kvm, 0)[0] >> 3] = 1 << 63
    with pytest.raises(BrokenTruth, match="the rmap of level 1"):
        check_rmaps(m.kvm)
    m = direct()
    m.run(("w", 0, 1))
    m.kvm.active_mmu_pages.popitem()
    with pytest.raises(BrokenTruth, match="3 tables are active"):
        check_rmaps(m.kvm)


def test_the_unmap_of_a_page_leaves_its_table() -> None:
    m = direct()
    m.run(("w", 0, 1))
    tables = list(m.kvm.sps)
    dontneed(m, 0)
    assert list(m.kvm.sps) == tables
    assert m.run(("r", 0)) == [0]
