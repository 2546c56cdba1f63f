"""Faults under shadow paging: the guest's rights and page faults, CR0.WP, neighbours, huge pages, modes."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.madvise import MADV_DONTNEED
from kvm_model.instrument import walk_sptes
from kvm_model.mmu.mmu_internal import role_quadrant
from kvm_model.mmu.spte import spte_to_pfn
from tests.kvm_model.shadow_machine import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMEP,
    DATA_GPA,
    DATA_HVA,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    NX,
    PAGE,
    PD_GPA,
    PML4_GPA,
    PS,
    PT_GPA,
    RW,
    USER_4K,
    A,
    D,
    P,
    ShadowMachine,
    U,
)

MIB2 = 2 << 20
_WP_ON = CR0_PG | CR0_WP | CR0_PE
_WP_OFF = CR0_PG | CR0_PE


def gpte(m: ShadowMachine, page: int, flags: int, gpa: int | None = None) -> None:
    """The host sets the guest's entry of a data page, before anybody uses it."""
    m.host_write(PT_GPA + 8 * page, (DATA_GPA + page * PAGE if gpa is None else gpa) | flags)


def populate(m: ShadowMachine, *pages: int) -> None:
    for page in pages:
        m.host_write(DATA_GPA + page * PAGE, page + 1)


def low(m: ShadowMachine, page: int) -> int:
    """The low 12 bits of the SPTE of a data page."""
    return m.leaf(DATA_GPA + page * PAGE) & 0xFFF


def lines(m: ShadowMachine, since: int) -> list[str]:
    """The kernel's events of KVM's MMU, without the elements of walks."""
    names = m.names(since=since, system="kvmmmu")
    return [name for name in names if name != "kvm_mmu_paging_element"]


# -- as recorded --------------------------------------------------------------------------------


def test_the_first_read_maps_the_zero_page_and_the_first_write_walks_twice_around_its_unmap() -> None:
    m = ShadowMachine()
    m.run(("x", 0x1000))
    mark = len(m.events)
    assert m.run(("r", DATA_GPA + 0x3000)) == [0]
    assert lines(m, mark) == [
        "kvm_mmu_pagetable_walk", "kvm_mmu_set_accessed_bit", "kvm_mmu_get_page", "kvm_mmu_spte_requested",
        "kvm_mmu_set_spte",
    ]
    assert m.last("kvm_mmu_pagetable_walk").args == {"addr": DATA_GPA + 0x3000, "pferr": 4}
    assert low(m, 3) == 0x825
    mark = len(m.events)
    m.run(("w", DATA_GPA + 0x3000, 1))
    events = [e for e in m.events[mark:] if e.name in ("kvm_mmu_pagetable_walk", "kvm_unmap_hva_range")]
    assert [e.args.get("pferr") for e in events] == [7, None, 6]
    assert low(m, 3) == 0xE67


def test_a_clean_guest_entry_is_mapped_read_only_until_the_write_that_sets_its_dirty_bit() -> None:
    m = ShadowMachine()
    gpte(m, 3, P | RW | U)
    populate(m, 3)
    assert m.run(("r", DATA_GPA + 3 * PAGE)) == [4]
    assert low(m, 3) == 0xA25
    assert m.do(lambda: m.get(PT_GPA + 24)) & (A | D) == A
    m.run(("w", DATA_GPA + 3 * PAGE, 9))
    assert low(m, 3) == 0xE67
    assert m.do(lambda: m.get(PT_GPA + 24)) & (A | D) == A | D


def letter(m: ShadowMachine, page: int) -> str:
    word = {0: "-", 0xE67: "F", 0xE47: "w", 0xA05: "r", 0xE43: "s", 0x825: "Z", 0xA25: "C"}
    spte = m.leaf(DATA_GPA + page * PAGE)
    return word[spte & 0xFFF if spte & 1 else 0]


@pytest.mark.parametrize(("holes", "odd", "at", "want"), [
    ((), {}, 3, "wwwFwwww"),
    ((), {}, 7, "wwwwwwwF"),
    ((2,), {}, 4, "ww--F---"),
    ((0,), {}, 4, "----F---"),
    ((), {2: P | RW | U | D}, 4, "ww--F---"),
    ((), {2: 0}, 4, "ww--F---"),
    ((), {2: P | RW | U | A}, 4, "wwrwFwww"),
    ((), {2: P | U | A | D}, 4, "wwrwFwww"),
    ((), {2: P | RW | A | D}, 4, "wwswFwww"),
    ((), {2: USER_4K | NX}, 4, "ww--F---"),
    ((), {4: P | RW | U}, 4, "wwwwCwww"),
    ((3,), {}, 3, "wwwZwwww"),
])
def test_neighbours_are_mapped_by_the_guests_entries_up_to_the_first_that_cannot_be(
    holes: tuple[int, ...], odd: dict[int, int], at: int, want: str
) -> None:
    m = ShadowMachine()
    populate(m, *(page for page in range(8) if page not in holes))
    for page, flags in odd.items():
        gpte(m, page, flags)
    m.run(("r", DATA_GPA + at * PAGE))
    assert "".join(letter(m, page) for page in range(8)) == want


def test_a_neighbour_is_what_its_guest_entry_says_not_what_lies_beside_it() -> None:
    m = ShadowMachine()
    populate(m, *range(8), 0x20)
    gpte(m, 2, USER_4K, DATA_GPA + 0x20 * PAGE)
    m.run(("r", DATA_GPA + 4 * PAGE))
    assert m.run(("r", DATA_GPA + 2 * PAGE)) == [0x21]
    assert m.vcpus[0].stat["pf_taken"] == 1


def test_a_writable_neighbour_in_a_logged_slot_ends_the_group_and_a_read_only_one_does_not() -> None:
    m = ShadowMachine()
    m.do(lambda: m.kvm.set_user_memory_region(1, DATA_GPA, m.data, DATA_HVA, 1))
    populate(m, *range(16))
    m.run(("r", DATA_GPA + 3 * PAGE))
    for page in (8, 9, 13):
        gpte(m, page, P | U | A | D)
    m.run(("r", DATA_GPA + 11 * PAGE))
    assert "".join(letter(m, page) for page in range(16)) == "---F----" + "rr-F----"


# -- what is the guest's own --------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "op", "code"), [
    (0, "r", 4), (0, "w", 6), (P | U | A | D, "w", 7), (P | RW | A | D, "r", 5),
    (USER_4K | 1 << 50, "r", 0xD),
])
def test_what_the_guests_tables_forbid_is_its_own_page_fault(flags: int, op: str, code: int) -> None:
    m = ShadowMachine()
    gpte(m, 3, flags)
    gva = DATA_GPA + 3 * PAGE + 8
    assert m.run((op, gva, 1)) == [("pf", code, gva)]
    assert m.last("kvm_mmu_walker_error").args["pferr"] == code
    assert m.vcpus[0].stat["pf_guest"] == 1


def test_nx_binds_only_where_the_guest_turned_it_on() -> None:
    m = ShadowMachine()
    gpte(m, 3, USER_4K | NX)
    gva = DATA_GPA + 3 * PAGE
    assert m.run(("r", gva)) == [("pf", 0xD, gva)]
    m.cpu.regs[0]["efer"] = EFER_LME | EFER_LMA | EFER_NX
    m.run(("cr4", CR4_PAE | CR4_PSE))
    assert m.run(("r", gva), ("x", gva)) == [0, ("pf", 0x15, gva)]
    assert m.leaf(gva) >> 63


def test_a_frame_that_the_slot_does_not_have_is_mmio_and_remembered_by_its_linear_address() -> None:
    m = ShadowMachine()
    gpte(m, 3, USER_4K, 0x90000000)
    gva = DATA_GPA + 3 * PAGE
    assert m.run(("r", gva)) == [("mmio", 0x90000)]
    assert m.last("mark_mmio_spte").args["gfn"] == 0x90000
    assert m.leaf(gva) >> 51 & 1
    walks = m.names().count("kvm_mmu_pagetable_walk")
    assert m.run(("r", gva)) == [("mmio", 0x90000)]
    assert m.names().count("kvm_mmu_pagetable_walk") == walks
    m.run(("invlpg", gva))
    assert m.vcpus[0].mmio_gva == 0
    assert m.run(("r", gva)) == [("mmio", 0x90000)]
    assert m.last("handle_mmio_page_fault").args == {"addr": gva, "gfn": 0x90000, "access": 6}


def test_an_mmio_spte_takes_the_leaf_that_the_guest_remapped_without_a_flush_out_of_its_rmap() -> None:
    m = ShadowMachine()
    gpte(m, 3, P | U | A | D)
    populate(m, 3)
    m.run(("r", DATA_GPA + 3 * PAGE))
    m.run(("w", PT_GPA + 24, 0x90000000 | USER_4K))
    assert m.run(("w", DATA_GPA + 3 * PAGE, 1)) == [("mmio", 0x90000)]
    assert m.truths is not None
    m.truths.sweep()


# -- CR0.WP -------------------------------------------------------------------------------------


def test_without_wp_a_supervisors_write_maps_the_page_for_it_alone_and_the_users_read_for_both() -> None:
    m = ShadowMachine()
    gpte(m, 3, P | U | A | D)
    gva = DATA_GPA + 3 * PAGE
    assert m.run(("cpl", 0), ("cr0", _WP_ON), ("w", gva, 1)) == [("pf", 3, gva)]
    assert m.run(("cr0", _WP_OFF), ("w", gva, 7)) == []
    assert low(m, 3) == 0xE63
    assert m.run(("cpl", 3), ("r", gva)) == [7]
    assert m.leaf(gva) & 7 == P | U
    assert m.run(("w", gva, 8)) == [("pf", 7, gva)]
    assert m.run(("cpl", 0), ("w", gva, 9), ("r", gva)) == [9]
    assert m.last("kvm_mmu_set_spte").args["u"] == 0


def test_with_smep_the_page_that_now_looks_like_the_supervisors_is_not_executable() -> None:
    m = ShadowMachine()
    gpte(m, 3, P | U | A | D)
    m.run(("cpl", 0), ("cr0", _WP_OFF), ("cr4", CR4_PAE | CR4_SMEP))
    m.run(("w", DATA_GPA + 3 * PAGE, 7))
    assert m.leaf(DATA_GPA + 3 * PAGE) >> 63


# -- rights on the way --------------------------------------------------------------------------


def test_one_table_reached_by_ways_of_other_rights_has_a_page_for_each() -> None:
    m = ShadowMachine()
    populate(m, 3)
    alias = DATA_GPA + 16 * MIB2
    m.host_write(PD_GPA + 8 * (alias >> 21), PT_GPA | P | U | A)
    assert m.run(("w", DATA_GPA + 3 * PAGE, 5), ("r", alias + 3 * PAGE)) == [5]
    assert m.run(("w", alias + 3 * PAGE, 6)) == [("pf", 7, alias + 3 * PAGE)]
    roles = {sp.role >> 8 & 7 for sp in m.kvm.mmu_page_hash[PT_GPA >> 12]}
    assert roles == {7, 5}
    assert m.leaf(alias + 3 * PAGE) & RW == 0


# -- huge pages ---------------------------------------------------------------------------------


def huge(**options: Any) -> ShadowMachine:
    """A guest that maps its data by 2M entries, over a host that does, too."""
    m = ShadowMachine(nohuge=False, guest_huge=True, **options)
    m.host.thp.enabled = "always"
    return m


def test_a_guests_2m_page_over_a_hosts_is_one_2m_leaf() -> None:
    m = huge()
    m.run(("w", DATA_GPA + 0x3000, 7))
    level, _, spte = walk_sptes(m.kvm, DATA_GPA)[-1]
    assert (level, spte & 0xFFF) == (2, 0xEE7)
    assert m.run(("r", DATA_GPA + 0x3000)) == [7]
    assert m.kvm.stat["pages_2m"] == 1


def test_a_guests_2m_page_over_small_pages_goes_on_in_a_direct_page_with_its_rights() -> None:
    m = ShadowMachine(guest_huge=True)
    m.host_write(PD_GPA + 8 * (DATA_GPA >> 21), DATA_GPA | P | U | PS | A | D)
    populate(m, *range(8))
    assert m.run(("r", DATA_GPA + 3 * PAGE)) == [4]
    child = m.kvm.sps[walk_sptes(m.kvm, DATA_GPA)[-1][1] >> 12]
    assert (child.gfn, child.role >> 7 & 1, child.role >> 8 & 7) == (DATA_GPA >> 12, 1, 5)
    assert "".join(letter(m, page) for page in range(8)) == "rrrCrrrr"


def test_a_direct_page_is_replaced_when_the_guests_huge_entry_becomes_dirty() -> None:
    m = ShadowMachine(guest_huge=True)
    m.host_write(PD_GPA + 8 * (DATA_GPA >> 21), DATA_GPA | P | RW | U | PS | A)
    populate(m, 3)
    assert m.run(("r", DATA_GPA + 3 * PAGE)) == [4]
    old = walk_sptes(m.kvm, DATA_GPA)[-1][1] >> 12
    m.run(("w", DATA_GPA + 3 * PAGE, 9))
    new = walk_sptes(m.kvm, DATA_GPA)[-1][1] >> 12
    assert new != old
    assert low(m, 3) == 0xE67
    assert m.truths is not None
    m.truths.sweep()


def test_a_write_to_a_read_only_huge_leaf_of_a_logged_slot_goes_on_in_small_ones() -> None:
    m = huge()
    m.host_write(PD_GPA + 8 * (DATA_GPA >> 21), DATA_GPA | P | RW | U | PS | A)
    m.host_write(DATA_GPA, 1)
    m.run(("r", DATA_GPA + 0x3000))
    assert walk_sptes(m.kvm, DATA_GPA)[-1][0] == 2
    m.do(lambda: m.kvm.set_user_memory_region(1, DATA_GPA, m.data, DATA_HVA, 1))
    m.run(("w", DATA_GPA + 0x3000, 7))
    assert walk_sptes(m.kvm, DATA_GPA + 0x3000)[-1][0] == 1
    assert m.do(lambda: m.kvm.get_dirty_log(1))[0] == 1 << 3


def test_no_huge_leaf_covers_a_page_that_holds_a_shadowed_table() -> None:
    m = huge()
    m.host_write(DATA_GPA, 1)
    # The guest keeps a page table inside its data's first 2M.
    table = DATA_GPA + 0x10000
    gva = DATA_GPA + 32 * MIB2
    m.host_write(table, (DATA_GPA + 0x20000) | USER_4K)
    m.host_write(PD_GPA + 8 * (gva >> 21), table | P | RW | U)
    m.run(("r", gva))
    m.run(("r", DATA_GPA + 0x3000))
    assert walk_sptes(m.kvm, DATA_GPA + 0x3000)[-1][0] == 1
    assert low(m, 0x10) & 2 == 0


# -- modes --------------------------------------------------------------------------------------


def mode(m: ShadowMachine, *, cr0: int, cr4: int, cr3: int, efer: int = 0) -> None:
    m.cpu.regs[0].update(cr3=cr3, efer=efer)
    m.run(("cr4", cr4), ("cr0", cr0 & ~CR0_PG), ("cr0", cr0))


def test_without_paging_gpas_are_mapped_by_direct_pages_below_four_entries() -> None:
    m = ShadowMachine()
    m.host_write(0x5000, 5)
    m.run(("cr0", CR0_PE))
    assert m.run(("r", 0x5000), ("w", DATA_GPA, 7), ("r", DATA_GPA)) == [5, 7]
    assert m.vcpus[0].root_hpa >> 12 == m.vcpus[0].mmu.pae_root
    assert {sp.role >> 7 & 1 for sp in m.kvm.sps.values() if sp.root_count} == {1}
    assert m.names().count("kvm_mmu_pagetable_walk") == 0
    assert m.cpu.level[0] == 3
    m.run(("cr0", _WP_ON))
    assert m.run(("r", DATA_GPA)) == [7]


def two_level(m: ShadowMachine) -> None:
    """A 32-bit guest: directory at 0x6000, a table of the data's first 4M at 0x7000, the first 4M huge."""
    def lay_out() -> None:
        m.put(0x6000, P | RW | U | PS | A | D, 4)
        m.put(0x6000 + 4 * (DATA_GPA >> 22), 0x7000 | P | RW | U, 4)
        m.put(0x6000 + 4 * (0xD0000000 >> 22), 0x7000 | P | RW | U, 4)
        for page in range(1024):
            m.put(0x7000 + 4 * page, DATA_GPA + page * PAGE | USER_4K, 4)

    m.do(lay_out)
    mode(m, cr0=_WP_ON, cr4=CR4_PSE, cr3=0x6000)


def test_a_guest_of_32_bit_paging_has_four_views_of_its_directory_and_two_of_each_table() -> None:
    m = ShadowMachine()
    two_level(m)
    populate(m, 3, 600)
    gvas = [DATA_GPA + 3 * PAGE, DATA_GPA + 600 * PAGE, 0xD0000000 + 600 * PAGE, 0x1000]
    assert m.run(*(("r", gva) for gva in gvas))[:3] == [4, 601, 601]
    directories = [sp for sp in m.kvm.mmu_page_hash[6] if sp.level == 2]
    assert sorted(role_quadrant(sp.role) for sp in directories) == [0, 1, 2, 3]
    assert sorted(role_quadrant(sp.role) for sp in m.kvm.mmu_page_hash[7]) == [0, 1]
    assert m.last("kvm_mmu_get_page").args["role"] >> 4 & 1
    m.run(("w", 0x7000 + 4 * 600, DATA_GPA + 3 * PAGE | USER_4K, 4), ("invlpg", DATA_GPA + 600 * PAGE))
    assert m.run(("r", DATA_GPA + 600 * PAGE)) == [4]
    assert m.truths is not None
    m.truths.sweep()


def test_a_pae_guest_has_its_directories_below_the_four_entries() -> None:
    m = ShadowMachine()

    def lay_out() -> None:
        m.put(0x6000, 0x7000 | P)
        m.put(0x7000 + 8 * (DATA_GPA >> 21), PT_GPA | P | RW | U)
        m.put(0x7000, P | RW | U | PS | A | D)

    m.do(lay_out)
    populate(m, 3)
    m.vcpus[0].mmu.pae_pdptrs = [0x7001, 0, 0, 0]
    mode(m, cr0=_WP_ON, cr4=CR4_PAE, cr3=0x6000)
    assert m.run(("r", DATA_GPA + 3 * PAGE), ("r", 0x40000000)) == [4, ("pf", 4, 0x40000000)]
    assert [sp.level for sp in m.kvm.mmu_page_hash[7]] == [2]
    assert m.cpu.level[0] == 3


def test_a_guest_of_5_level_paging_has_one_table_more() -> None:
    m = ShadowMachine()
    m.host_write(0x6000, PML4_GPA | P | RW | U)
    populate(m, 3)
    mode(m, cr0=_WP_ON, cr4=CR4_PAE | CR4_LA57, cr3=0x6000, efer=EFER_LME | EFER_LMA)
    assert m.run(("r", DATA_GPA + 3 * PAGE)) == [4]
    assert [level for level, _, _ in walk_sptes(m.kvm, DATA_GPA + 3 * PAGE)] == [5, 4, 3, 2, 1]


# -- the host's side ----------------------------------------------------------------------------


def test_what_the_host_takes_away_is_zapped_by_its_gfn_wherever_the_guest_maps_it() -> None:
    m = ShadowMachine()
    populate(m, 3)
    gpte(m, 9, USER_4K, DATA_GPA + 3 * PAGE)
    assert m.run(("r", DATA_GPA + 3 * PAGE), ("r", DATA_GPA + 9 * PAGE)) == [4, 4]
    frame = spte_to_pfn(m.leaf(DATA_GPA + 9 * PAGE))
    m.madvise(DATA_GPA + 3 * PAGE, PAGE, MADV_DONTNEED)
    assert not m.leaf(DATA_GPA + 3 * PAGE) & 1
    assert not m.leaf(DATA_GPA + 9 * PAGE) & 1
    assert m.run(("r", DATA_GPA + 9 * PAGE)) == [0]
    assert m.host.pages.refcount[frame] >= 0
    assert m.truths is not None
    m.truths.sweep()
