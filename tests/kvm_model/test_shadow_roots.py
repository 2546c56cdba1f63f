"""Roots of shadow paging: what a CR3 write keeps, finds again and syncs; roots that are no shadow pages."""

from __future__ import annotations

from kvm_model.mmu.mmu_internal import INVALID_PAGE
from tests.kvm_model.shadow_machine import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    DATA_GPA,
    MEM_HVA,
    PAGE,
    PML4_GPA,
    PT_GPA,
    USER_4K,
    ShadowMachine,
)

GVA = DATA_GPA + 3 * PAGE
PTE = PT_GPA + 8 * 3
ROOTS = [0x6000, 0x7000, 0x8000, 0x9000, 0xA000]


def machine() -> ShadowMachine:
    """A guest with address spaces that share all tables but the top one."""
    m = ShadowMachine()

    def lay_out() -> None:
        top = m.get(PML4_GPA)
        for root in ROOTS:
            m.put(root, top)
        for page in range(8):
            m.put(DATA_GPA + page * PAGE, page + 1)

    m.do(lay_out)
    m.run(("w", GVA, 4))
    return m


def kept(m: ShadowMachine) -> list[int]:
    return [pgd for pgd, hpa in m.vcpus[0].mmu.prev_roots if hpa != INVALID_PAGE]


def test_the_last_three_roots_are_kept_the_latest_first_and_one_more_drops_the_oldest() -> None:
    m = machine()
    for root in ROOTS[:3]:
        m.run(("cr3", root), ("r", GVA))
    assert kept(m) == [0x7000, 0x6000, PML4_GPA]
    m.run(("cr3", ROOTS[3]), ("r", GVA))
    assert kept(m) == [0x8000, 0x7000, 0x6000]
    counts = {sp.gfn << 12: sp.root_count for sp in m.kvm.sps.values() if sp.level == 4}
    assert counts == {PML4_GPA: 0, 0x6000: 1, 0x7000: 1, 0x8000: 1, 0x9000: 1}


def test_a_kept_root_is_used_again_without_being_looked_for() -> None:
    m = machine()
    m.run(("cr3", 0x6000), ("r", GVA), ("cr3", 0x7000), ("r", GVA))
    old = dict(m.vcpus[0].mmu.prev_roots)[PML4_GPA]
    mark = len(m.events)
    m.run(("cr3", PML4_GPA), ("r", GVA))
    assert m.vcpus[0].root_hpa == old
    assert kept(m) == [0x7000, 0x6000]
    assert "kvm_mmu_get_page" not in m.names(since=mark)


def test_a_root_that_comes_back_is_synced_unless_the_guest_says_that_it_need_not_flush() -> None:
    m = machine()
    m.run(("cr3", 0x6000), ("r", GVA), ("w", PTE, DATA_GPA | USER_4K), ("cr3", PML4_GPA, True))
    assert m.run(("r", GVA)) == [4]
    assert m.run(("cr3", PML4_GPA), ("r", GVA)) == [1]


def test_a_flush_of_all_address_spaces_drops_the_kept_roots_that_are_not_up_to_date() -> None:
    m = machine()
    m.run(("cr3", 0x6000), ("r", GVA), ("w", PTE, DATA_GPA | USER_4K))
    assert kept(m) == [PML4_GPA]
    # The present root is synced; the other cannot know that this made it up to date, too.
    m.run(("cr4", CR4_PAE | CR4_PGE), ("r", GVA))
    assert kept(m) == []
    assert m.run(("r", GVA), ("cr3", PML4_GPA, True), ("r", GVA)) == [1, 1]
    m.run(("cr3", 0x6000), ("cr4", CR4_PAE), ("r", GVA))
    assert kept(m) == [PML4_GPA]


def test_a_change_of_mode_drops_all_roots_and_coming_back_finds_the_pages_in_the_hash() -> None:
    m = machine()
    m.run(("cr3", 0x6000), ("r", GVA))
    m.run(("cr0", CR0_PG | CR0_PE), ("r", GVA))
    assert kept(m) == []
    mark = len(m.events)
    m.run(("cr0", CR0_PG | CR0_WP | CR0_PE), ("r", GVA))
    pages = [e.args for e in m.events[mark:] if e.name == "kvm_mmu_get_page"]
    assert [(p["gfn"], p["created"]) for p in pages] == [(6, False)]


def test_a_cr3_that_points_nowhere_has_the_zero_page_for_a_root_and_a_slot_later_ends_that() -> None:
    m = machine()
    m.run(("cr3", 0x7000_0000))
    assert m.run(("r", GVA)) == [("pf", 4, GVA)]
    assert m.vcpus[0].root_hpa >> 12 == m.host.zero_pfn
    # The same memory once more, so that CR3 points to a PML4 after all.
    m.do(lambda: m.kvm.set_user_memory_region(2, 0x7000_0000 - PML4_GPA, PAGE * 16, MEM_HVA))
    assert m.run(("r", GVA)) == [4]


def test_a_slot_that_goes_takes_all_roots_and_the_vcpu_begins_with_a_new_one() -> None:
    m = machine()
    m.run(("cr3", 0x6000), ("r", GVA))
    old = m.vcpus[0].root_hpa
    m.do(lambda: m.kvm.set_user_memory_region(2, 0x4000_0000, PAGE, MEM_HVA))
    m.do(lambda: m.kvm.set_user_memory_region(2, 0x4000_0000, 0, MEM_HVA))
    assert m.run(("r", GVA)) == [4]
    assert m.vcpus[0].root_hpa != old
    assert kept(m) == []
    assert all(sp.mmu_valid_gen == m.kvm.mmu_valid_gen for sp in m.kvm.sps.values())


def test_a_root_that_the_guest_writes_to_as_data_is_asked_back_from_all_vcpus() -> None:
    m = machine()
    m.run(("cr3", 0x6000), ("r", GVA))
    # Misaligned: no page table is written so.
    m.run(("w", PML4_GPA + 0x803, 0x55, 8))
    assert kept(m) == [PML4_GPA]
    m.run(("r", GVA))
    assert kept(m) == []


def test_vcpus_share_a_root_of_the_same_tables() -> None:
    m = ShadowMachine(vcpus=2)
    m.run(("w", GVA, 4))
    assert m.run(("r", GVA), vcpu=1) == [4]
    assert m.vcpus[0].root_hpa == m.vcpus[1].root_hpa
    assert m.kvm.sps[m.vcpus[0].root_hpa >> 12].root_count == 2


def test_destroying_the_vm_gives_every_frame_back() -> None:
    m = machine()
    m.run(("cr3", 0x6000), ("r", GVA), ("cr0", CR0_PE), ("r", 0x1000))
    m.do(m.kvm.destroy)
    assert m.kvm.sps == {}
