"""What SPTEs know of a page's use goes to struct page when it leaves them.

Source of truth: arch/x86/kvm/mmu/tdp_mmu.c: handle_changed_spte_acc_track, __handle_changed_spte;
virt/kvm/kvm_main.c: kvm_set_pfn_accessed, kvm_set_pfn_dirty (Linux 5.10). Linux 6.18 marks the page when the
fault that maps it is done, and looks at the bits no more.

Not modelled: frames of devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.page import PG_reserved, set_page_dirty
from kvm_model.mmu.spte import (
    PT_WRITABLE_MASK,
    is_last_spte,
    is_shadow_present_pte,
    spte_ad_enabled,
    spte_to_pfn,
)

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm

__all__ = ["is_dirty_spte", "transfer_marks"]


def is_dirty_spte(kvm: Kvm, spte: int) -> bool:
    """The CPU's D, or where it keeps none the right to write."""
    return spte & (kvm.spte.dirty if spte_ad_enabled(spte) else PT_WRITABLE_MASK) != 0


def transfer_marks(kvm: Kvm, level: int, old: int, new: int, *, accessed: bool) -> None:
    """A leaf that was `old` is `new` now: mark the page for each of A and D that it lost.

    Without `accessed` only for D: who clears A to age the page has the answer himself.
    """
    if not is_shadow_present_pte(old) or not is_last_spte(old, level):
        return
    pfn = spte_to_pfn(old)
    if kvm.host.pages.flags[pfn] & PG_reserved:
        return
    kept = new if is_shadow_present_pte(new) and spte_to_pfn(new) == pfn else 0
    if accessed and kvm.spte.is_accessed_spte(old) and not (kept and kvm.spte.is_accessed_spte(kept)):
        kvm.host.mark_page_accessed(pfn)
    if is_dirty_spte(kvm, old) and not (kept and is_dirty_spte(kvm, kept)) and "drop-ad" not in kvm.breaks:
        set_page_dirty(kvm.host, pfn)
