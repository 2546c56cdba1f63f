"""INVLPG, INVPCID of an address, and the invalidation that a guest's page fault is."""

from __future__ import annotations

from tests.kvm_model.shadow_machine import (
    CR4_PAE,
    CR4_PCIDE,
    DATA_GPA,
    PAGE,
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


def used() -> ShadowMachine:
    m = ShadowMachine()
    for page in range(8):
        m.host_write(DATA_GPA + page * PAGE, page + 1)
    m.run(("w", GVA, 4), ("r", DATA_GPA + PAGE))
    return m


def test_invlpg_syncs_the_one_address_and_leaves_the_page_unsync() -> None:
    m = used()
    m.run(("w", PTE, DATA_GPA | USER_4K), ("w", PT_GPA + 8, DATA_GPA | USER_4K))
    assert m.run(("invlpg", GVA), ("r", GVA), ("r", DATA_GPA + PAGE)) == [1, 2]
    assert m.kvm.stat["mmu_unsync"] == 1
    assert m.vcpus[0].stat["invlpg"] == 1
    assert m.run(("invlpg", DATA_GPA + PAGE), ("r", DATA_GPA + PAGE)) == [1]


def test_invlpg_of_a_synced_address_only_empties_the_tlb() -> None:
    m = used()
    requests = m.kvm.stat["remote_tlb_flush_requests"]
    m.run(("invlpg", GVA))
    assert m.kvm.stat["remote_tlb_flush_requests"] == requests
    assert m.leaf(GVA) & 1
    assert all(key[1] != GVA >> 12 for key in m.cpu.xtlb[0])


def test_invlpg_of_an_address_that_is_not_canonical_does_nothing() -> None:
    m = used()
    m.run(("w", PTE, DATA_GPA | USER_4K), ("invlpg", GVA | 1 << 47 << 5))
    assert m.run(("r", GVA)) == [4]


def test_invlpg_reaches_the_roots_that_are_kept_for_later() -> None:
    m = used()
    other = 0x6000
    m.do(lambda: [m.put(other + 8 * n, m.get(PML4_GPA + 8 * n)) for n in range(512)])
    m.run(("cr4", CR4_PAE | CR4_PCIDE), ("w", PTE, DATA_GPA | USER_4K), ("cr3", other | 1, True))
    m.run(("r", DATA_GPA), ("invlpg", GVA))
    assert m.run(("cr3", PML4_GPA, True), ("r", GVA)) == [1]


def test_a_page_fault_of_the_guests_own_drops_the_stale_translation_of_its_address() -> None:
    m = used()
    m.run(("w", PTE, GVA | P | U | A | D))
    # Not flushed: the old translation may still be used, but the SPTE that grants the write goes once a
    # fault has looked at the tables.
    m.run(("w", PTE, GVA | P | U | A | D), ("invlpg", GVA))
    assert m.run(("w", GVA, 9)) == [("pf", 7, GVA)]
    m.run(("w", PTE, GVA | P | RW | U | A | D))
    assert m.run(("w", GVA, 9), ("r", GVA)) == [9]
