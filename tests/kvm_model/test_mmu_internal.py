"""What the parts of the MMU share: the role word."""

from __future__ import annotations

from kvm_model.mmu import mmu_internal as mmu
from kvm_model.mmu.mmu_internal import fmt_mmu_page


def test_the_role_word_is_read_as_the_kernels_events_print_it() -> None:
    role = mmu.ROLE_4_BYTE_GPTE | mmu.ROLE_EFER_NX | mmu.ROLE_SMM
    role = mmu.role_with_quadrant(mmu.role_with_access(mmu.role_with_level(role, 2), 5), 3)
    assert (mmu.role_level(role), mmu.role_access(role), mmu.role_quadrant(role)) == (2, 5, 3)
    assert mmu.role_has_4_byte_gpte(role)
    assert not mmu.role_direct(role)
    assert mmu.role_smm(role) == 1
    assert fmt_mmu_page(0, 0x10, role, 0, False) == "sp gen 0 gfn 10 l2 4-byte q3 -ux nxe ad root 0 sync\0"


def test_changing_one_field_of_a_role_leaves_the_others() -> None:
    role = (1 << 32) - 1
    assert mmu.role_with_level(role, 3) == role & ~12
    assert mmu.role_with_access(role, 0) == role & ~mmu.ROLE_ACCESS_MASK
    assert mmu.role_with_quadrant(role, 1) == role & ~(1 << 6)
