"""The truths about the APIC-access address of VMCSs: apic-page-matches, vmcs-of-freed-frame (truths.py).

Source of truth: the rules themselves (arch/x86/kvm/vmx/vmx.c: vmx_set_apic_access_page_addr); Linux 6.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from host_mm.arch.x86.pgtable import _PAGE_PRESENT, lookup_address_in_mm, pte_pfn
from host_mm.kernel.errors import BrokenTruth
from kvm_model.instrument import walk_sptes
from kvm_model.lapic import APIC_DEFAULT_PHYS_BASE, apic_access_page_slot
from kvm_model.mmu.spte import is_last_spte, is_shadow_present_pte, spte_to_pfn
from kvm_model.requests import KVM_REQ_APIC_PAGE_RELOAD, kvm_test_request

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = ["ApicTruths"]


class ApicTruths:
    """Watches the VMCSs of one VM. `released`: no vCPU will run again."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.released = False

    def _broken(self, truth: str, vcpu: Vcpu, what: str) -> NoReturn:
        assert vcpu.apic is not None
        address = vcpu.apic.apic_access_addr
        why = f"the VMCS of vCPU {vcpu.vcpu_id} has the APIC's page at {address:#x}, {what}"
        raise BrokenTruth(truth, why, self.kvm.stream.here())

    def frame_freed(self, pfn: int, order: int) -> None:
        """A free hook."""
        if not self.kvm.apic_access_memslot_enabled or self.released:
            return
        for vcpu in self.kvm.vcpus:
            apic = vcpu.apic
            if apic is None or apic.reloading:
                continue
            # Who asks others kicks them, and who asks itself looks before it enters.
            asked = kvm_test_request(KVM_REQ_APIC_PAGE_RELOAD, vcpu)
            if not asked and pfn <= apic.apic_access_addr >> 12 < pfn + (1 << order):
                self._broken("vmcs-of-freed-frame", vcpu, "which is freed")

    def check_entry(self, vcpu: Vcpu) -> None:
        """The vCPU enters the guest, with nothing asked of it; no page-table lock is held."""
        kvm = self.kvm
        assert vcpu.apic is not None
        pfn = vcpu.apic.apic_access_addr >> 12
        steps = walk_sptes(kvm, APIC_DEFAULT_PHYS_BASE, vcpu) if kvm.tdp_enabled else []
        if steps:
            level, _, spte = steps[-1]
            if is_shadow_present_pte(spte) and is_last_spte(spte, level) and spte_to_pfn(spte) != pfn:
                self._broken("apic-page-matches", vcpu, f"EPT has {spte:#x}")
        slot = kvm.slots().id_hash.get(apic_access_page_slot(kvm))
        truths = kvm.truths
        if slot is None or truths is None or truths.caches.in_open_bracket(slot.userspace_addr):
            return
        entry, _ = lookup_address_in_mm(kvm.mm, slot.userspace_addr)
        if not entry & _PAGE_PRESENT or pte_pfn(entry) != pfn:
            self._broken("apic-page-matches", vcpu, f"the host has {entry:#x}")
