"""SPTE encoding, bit for bit."""

from __future__ import annotations

import pytest

from kvm_model.mmu.mmu_internal import KvmMmuPage, tdp_root_role
from kvm_model.mmu.spte import (
    ACC_ALL,
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    FROZEN_SPTE,
    SHADOW_NONPRESENT_VALUE,
    SpteMasks,
    decode_spte,
    ept_masks,
    get_mmio_spte_generation,
    is_frozen_spte,
    is_shadow_present_pte,
    legacy_masks,
    spte_ad_enabled,
)
from kvm_model.vmx.ept import ept_misconfigured, make_eptp

AD = ept_masks(has_ad_bits=True)
NO_AD = ept_masks(has_ad_bits=False)


def table(level: int, masks: SpteMasks = AD) -> KvmMmuPage:
    return KvmMmuPage(9, -1, 0, tdp_root_role(ad_disabled=not masks.ad_enabled, level=level))


def leaf(level: int = 1, masks: SpteMasks = AD, *, writable: bool = True, prefetch: bool = False) -> int:
    return masks.make_spte(
        table(level, masks), ACC_ALL, 0x200, prefetch=prefetch, synchronizing=False, host_writable=writable
    )


def test_a_writable_4k_leaf_has_every_bit_the_kernel_sets() -> None:
    # suppress #VE, mmu-writable, host-writable, pfn, MMU-present, D, A, IPAT, WB, X, W, R
    assert leaf() == 1 << 63 | 1 << 58 | 1 << 57 | 0x200 << 12 | 0x800 | 0x200 | 0x100 | 0x40 | 0x30 | 7


def test_a_read_only_leaf_lacks_w_d_and_both_writable_bits() -> None:
    assert leaf(writable=False) == 1 << 63 | 0x200 << 12 | 0x800 | 0x100 | 0x40 | 0x30 | 5


def test_a_2m_leaf_has_bit_7() -> None:
    assert leaf(2) == leaf() | 0x80


def test_a_prefetched_leaf_is_not_accessed() -> None:
    assert leaf(prefetch=True) == leaf() & ~0x100


def test_without_ad_bits_the_leaf_says_so_and_a_prefetched_one_has_no_rights() -> None:
    spte = leaf(masks=NO_AD)
    assert spte == leaf() | 1 << 52
    assert not spte_ad_enabled(spte)
    tracked = leaf(masks=NO_AD, prefetch=True)
    assert tracked & 7 == 0
    assert tracked >> 54 & 7 == 5
    assert NO_AD.is_access_track_spte(tracked)


def test_access_tracking_keeps_r_and_x_and_forgets_w() -> None:
    tracked = NO_AD.mark_spte_for_access_track(leaf(masks=NO_AD))
    back = NO_AD.restore_acc_track_spte(tracked)
    assert back & 7 == 5
    assert NO_AD.is_mmu_writable_spte(back)


def test_nonleaf_entries_are_rwx_and_accessed() -> None:
    assert AD.make_nonleaf_spte(0x123) == 1 << 63 | 0x123 << 12 | 0x800 | 0x100 | 7
    assert NO_AD.make_nonleaf_spte(0x123) == 1 << 63 | 1 << 52 | 0x123 << 12 | 0x800 | 7


@pytest.mark.parametrize("generation", [0, 2, 0xFE, 0x100, 0x7FFFE, 0x80002])
def test_an_mmio_spte_keeps_gfn_and_19_bits_of_generation(generation: int) -> None:
    spte = AD.make_mmio_spte(0xFEE00, ACC_ALL, generation)
    assert AD.is_mmio_spte(spte)
    assert not is_shadow_present_pte(spte)
    assert spte & 7 == 6
    assert ept_misconfigured(spte, 1)
    assert AD.get_mmio_spte_gfn(spte) == 0xFEE00
    assert get_mmio_spte_generation(spte) == generation & 0x7FFFF


def test_frozen_and_nonpresent_values() -> None:
    assert FROZEN_SPTE == SHADOW_NONPRESENT_VALUE | 0x5A0
    assert is_frozen_spte(FROZEN_SPTE)
    assert not is_shadow_present_pte(FROZEN_SPTE)
    assert not AD.is_mmio_spte(FROZEN_SPTE)
    assert not AD.is_mmio_spte(SHADOW_NONPRESENT_VALUE)


def test_small_and_huge_sptes_convert_into_each_other() -> None:
    huge = leaf(2)
    small = AD.make_small_spte(huge, 1, 37)
    assert small == (huge & ~0x80) + (37 << 12)
    assert AD.make_huge_spte(small, 2) == huge


def test_nx_huge_pages_take_x_from_huge_leaves_only() -> None:
    nx = ept_masks(has_ad_bits=True, nx_huge_pages=True)
    assert leaf(2, nx) & 4 == 0
    assert leaf(1, nx) & 4
    assert nx.make_small_spte(leaf(2, nx), 1, 0) & 4


@pytest.mark.parametrize(
    ("host", "mmu", "w", "legal"),
    [(1, 1, 1, True), (1, 1, 0, True), (1, 0, 0, True), (0, 0, 0, True), (0, 1, 0, False), (1, 0, 1, False),
     (0, 0, 1, False), (0, 1, 1, False)],
)
def test_exactly_four_writable_states_are_legal(host: int, mmu: int, w: int, legal: bool) -> None:
    assert AD.writable_state_is_legal(0x800 | host << 57 | mmu << 58 | w << 1) is legal


def test_only_losing_mmu_writable_needs_a_flush() -> None:
    spte = leaf()
    assert AD.leaf_spte_change_needs_tlb_flush(spte, spte & ~(2 | 1 << 58))
    assert not AD.leaf_spte_change_needs_tlb_flush(spte, spte & ~2)
    assert not AD.leaf_spte_change_needs_tlb_flush(spte, spte & ~0x300)


def test_what_needs_atomic_updates() -> None:
    assert not AD.spte_needs_atomic_update(leaf())
    assert AD.spte_needs_atomic_update(leaf() & ~2)
    assert AD.spte_needs_atomic_update(leaf() & ~0x200)
    assert not AD.spte_needs_atomic_update(leaf(writable=False))
    assert NO_AD.spte_needs_atomic_update(leaf(masks=NO_AD))


def test_sptes_read_as_words() -> None:
    assert decode_spte(leaf(), 1, AD) == "pfn 0x200 rwx A D host-w mmu-w"
    assert decode_spte(FROZEN_SPTE, 1, AD) == "frozen"
    assert decode_spte(AD.make_mmio_spte(5, 7, 2), 1, AD) == "mmio gfn 0x5 gen 0x2"


def test_the_eptp_says_wb_four_levels_and_ad() -> None:
    assert make_eptp(0x5000, True) == 0x505E
    assert make_eptp(0x5000, False) == 0x501E


@pytest.mark.parametrize(
    ("entry", "level", "bad"),
    [(0, 1, False), (1 << 63, 1, False), (2, 1, True), (6, 1, True), (4 | 0x30, 1, False), (0x37, 1, False),
     (7 | 2 << 3, 1, True), (7 | 3 << 3, 1, True), (7 | 7 << 3, 1, True), (7, 4, False), (7 | 0x80, 4, True),
     (7 | 0x30, 3, True), (7 | 0x80 | 0x30, 2, False), (7 | 0x80 | 0x30 | 0x1000, 2, True),
     (7 | 0x80 | 0x30 | 1 << 21, 3, True), (7 | 0x30 | 1 << 46, 1, True)],
)
def test_ept_misconfigurations(entry: int, level: int, bad: bool) -> None:
    assert ept_misconfigured(entry, level) is bad


# -- shadow paging ------------------------------------------------------------------------------

LEGACY = legacy_masks()


def shadow_leaf(
    access: int = ACC_ALL, *, level: int = 1, writable: bool = True, prefetch: bool = False
) -> int:
    return LEGACY.make_spte(
        KvmMmuPage(9, -1, 0, level), access, 0x200, prefetch=prefetch, synchronizing=False,
        host_writable=writable,
    )


@pytest.mark.parametrize(("access", "writable", "prefetch", "low"), [
    (ACC_ALL, True, False, 0xE67), (ACC_ALL, False, False, 0x825), (ACC_ALL, True, True, 0xE47),
    (ACC_ALL & ~ACC_WRITE_MASK, True, True, 0xA05), (ACC_ALL & ~ACC_USER_MASK, True, True, 0xE43),
    (ACC_ALL & ~ACC_WRITE_MASK, True, False, 0xA25),
])
def test_the_low_bits_of_a_shadow_leaf_are_those_that_linux_was_recorded_with(
    access: int, writable: bool, prefetch: bool, low: int
) -> None:
    assert shadow_leaf(access, writable=writable, prefetch=prefetch) == 0x200 << 12 | low


def test_a_shadow_leaf_without_exec_has_bit_63_and_a_2m_one_bit_7() -> None:
    assert shadow_leaf(ACC_ALL & ~ACC_EXEC_MASK) == 1 << 63 | 0x200 << 12 | 0xE67
    assert shadow_leaf(level=2) == 0x200 << 12 | 0xEE7
    assert not LEGACY.is_executable_pte(shadow_leaf(ACC_ALL & ~ACC_EXEC_MASK))
    assert LEGACY.is_executable_pte(shadow_leaf())


def test_a_pointer_to_a_shadow_table_is_present_writable_user_and_accessed() -> None:
    assert LEGACY.make_nonleaf_spte(5) == 5 << 12 | 0x827


def test_an_mmio_spte_of_shadow_paging_is_present_and_reserved_and_keeps_the_guests_rights() -> None:
    spte = LEGACY.make_mmio_spte(0xFEE00, ACC_USER_MASK | ACC_EXEC_MASK, 0x2AB5A)
    assert spte & (1 << 51 | 7) == 1 << 51 | 1 | ACC_USER_MASK
    assert LEGACY.is_mmio_spte(spte)
    assert not is_shadow_present_pte(spte)
    assert LEGACY.get_mmio_spte_gfn(spte) == 0xFEE00
    assert get_mmio_spte_generation(spte) == 0x2AB5A
    assert not LEGACY.is_mmio_spte(shadow_leaf())
    assert not legacy_masks(mmio_caching=False).is_mmio_spte(spte)


def test_shadow_sptes_in_words() -> None:
    assert decode_spte(shadow_leaf(), 1, LEGACY) == "pfn 0x200 rwxu A D host-w mmu-w"
    kernels = shadow_leaf(ACC_WRITE_MASK, prefetch=True)
    assert decode_spte(kernels, 1, LEGACY) == "pfn 0x200 rw-- D host-w mmu-w"
    assert decode_spte(LEGACY.make_nonleaf_spte(5), 2, LEGACY) == "table 0x5 rwxu"
