"""The same under shadow paging: the guest's tables beside those that KVM made of them.

The CPU reads only KVM's. The guest's entries are read through the memslots and the VMM's page tables as they
stand, so that nothing is faulted in; a page of the guest's tables that the host has swapped out is said so.
Each level shows what the guest wrote and what KVM made of it: they may differ where the guest owes a flush.

Not modelled: entries of an address space that the vCPU has left and that KVM keeps for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.cpu.paging import EFER_LMA, is_canonical
from emu.inspector import WalkStep, WalkTree
from host_mm.arch.x86.pgtable import _PAGE_PRESENT, lookup_address_in_mm, pte_pfn
from kvm_model.instrument import walk_sptes
from kvm_model.mmu.kvm_mmu import PT32E_ROOT_LEVEL
from kvm_model.mmu.paging_tmpl import (
    PAGING32,
    PT_PRESENT_MASK,
    gpte_to_gfn,
    gpte_to_gfn_lvl,
    guest_paging,
    is_last_gpte,
)
from kvm_model.mmu.rmap import gfn_to_rmap, rmap_sptes
from kvm_model.mmu.spte import is_last_spte, is_shadow_present_pte, spte_to_pfn

if TYPE_CHECKING:
    from emu.board import Board
    from kvm_model.kvm_main import Kvm

__all__ = ["peek_guest", "shadow_walk_gpa", "shadow_walk_gva"]

_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}
_BITS = ((0x2, "W"), (0x4, "U"), (0x20, "A"), (0x40, "D"), (0x80, "PS"), (0x100, "G"), (1 << 63, "NX"))


def _flags(entry: int) -> str:
    return "|".join(name for bit, name in _BITS if entry & bit) or "-"


def peek_guest(kvm: Kvm, gpa: int) -> int | None:
    """Where in RAM the host keeps `gpa` now: its physical address, None if nowhere."""
    slot = kvm.slots().gfn_to_memslot(gpa >> 12)
    if slot is None:
        return None
    hva = slot.gfn_to_hva(gpa >> 12) | gpa & 0xFFF
    entry, level = lookup_address_in_mm(kvm.mm, hva)
    if not entry & _PAGE_PRESENT:
        return None
    mask = (1 << 12 + 9 * (level - 1)) - 1
    return (pte_pfn(entry) << 12) & ~mask | hva & mask


class _Pair:
    """One walk of both kinds of tables, merged level by level."""

    def __init__(self, board: Board, vcpu: int) -> None:
        self.kvm = board.kvm
        self.vcpu = board.vcpus[vcpu]
        self.steps: list[WalkStep] = []
        self.why = ""

    def _guest_entry(self, gva: int, level: int, table_gfn: int) -> tuple[int, int] | None:
        paging = guest_paging(self.vcpu.mmu)
        gpa = table_gfn << 12 | paging.index(gva, level) * paging.gpte_size
        at = peek_guest(self.kvm, gpa)
        if at is None:
            self.why = f"the host has no page behind the guest's {_NAMES[level]} at gpa {gpa:#x}"
            return None
        word = self.kvm.ram.u64[at >> 3]
        entry = word if paging is not PAGING32 else word >> 8 * (at & 4) & 0xFFFF_FFFF
        return gpa, entry

    def _note(self, stage: int, level: int, address: int, entry: int, present: bool) -> None:
        name = _NAMES[level] if stage == 1 else f"shadow {_NAMES[level]}"
        self.steps.append(WalkStep(stage, name, address, entry, _flags(entry), present))

    def guest(self, gva: int) -> tuple[int | None, list[WalkStep]]:
        """(gpa, the guest's steps)."""
        mmu = self.vcpu.mmu
        level = mmu.guest_level
        if not level:
            return gva & 0xFFFF_FFFF, []
        table_gfn = (self.kvm.cpu.get_reg(self.vcpu, "cr3") & 0x000F_FFFF_FFFF_F000) >> 12
        if level == PT32E_ROOT_LEVEL:
            pdpte = mmu.pae_pdptrs[gva >> 30 & 3]
            self._note(1, 3, table_gfn << 12 | (gva >> 30 & 3) * 8, pdpte, bool(pdpte & PT_PRESENT_MASK))
            if not pdpte & PT_PRESENT_MASK:
                self.why = "the guest's PDPTE is not present"
                return None, self.steps
            table_gfn, level = gpte_to_gfn(guest_paging(mmu), pdpte), 2
        while True:
            found = self._guest_entry(gva, level, table_gfn)
            if found is None:
                return None, self.steps
            gpa, entry = found
            self._note(1, level, gpa, entry, bool(entry & PT_PRESENT_MASK))
            paging = guest_paging(mmu)
            if not entry & PT_PRESENT_MASK:
                self.why = f"the guest's {_NAMES[level]} is not present"
                return None, self.steps
            if is_last_gpte(mmu, level, entry):
                offset = paging.offset_mask(level) | 0xFFF
                return gpte_to_gfn_lvl(paging, entry, level) << 12 | gva & offset, self.steps
            table_gfn, level = gpte_to_gfn(paging, entry), level - 1

    def shadow(self, gva: int) -> int | None:
        """The hpa by KVM's tables."""
        steps = walk_sptes(self.kvm, gva, self.vcpu)
        if not steps:
            self.why = self.why or "the vCPU has no root: it never entered the guest, or its root was dropped"
        for level, address, spte in steps:
            present = is_shadow_present_pte(spte)
            self._note(2, level, address, spte, present)
            if not present:
                self.why = self.why or f"KVM's {_NAMES[level]} is not present"
                return None
            if is_last_spte(spte, level):
                mask = (1 << 12 + 9 * (level - 1)) - 1
                return (spte_to_pfn(spte) << 12) & ~mask | gva & mask
        return None


def shadow_walk_gva(board: Board, gva: int, vcpu: int = 0) -> WalkTree:
    """The guest's tables and KVM's, level beside level."""
    regs = {name: board.cpu.get_reg(board.vcpus[vcpu], name) for name in ("efer", "cr4")}
    if regs["efer"] & EFER_LMA:
        if not is_canonical(gva, regs["cr4"]):
            return WalkTree(gva, None, None, "the address is not canonical", [])
    else:
        gva &= 0xFFFF_FFFF
    pair = _Pair(board, vcpu)
    gpa, _ = pair.guest(gva)
    hpa = pair.shadow(gva)
    level = {name: number for number, name in _NAMES.items()}
    steps = sorted(pair.steps, key=lambda step: (-level[step.name.split()[-1]], step.stage))
    return WalkTree(gva, gpa, hpa, pair.why, steps)


def shadow_walk_gpa(board: Board, gpa: int) -> WalkTree:
    """Every leaf of KVM's tables that maps the page, by its reverse map."""
    kvm = board.kvm
    steps: list[WalkStep] = []
    hpa = None
    slot = kvm.slots().gfn_to_memslot(gpa >> 12)
    for level in (1, 2, 3):
        if slot is None:
            break
        for sptep in rmap_sptes(gfn_to_rmap(gpa >> 12, level, slot)):
            spte = kvm.ram.u64[sptep]
            mask = (1 << 12 + 9 * (level - 1)) - 1
            hpa = (spte_to_pfn(spte) << 12) & ~mask | gpa & mask
            steps.append(WalkStep(2, f"shadow {_NAMES[level]}", sptep << 3, spte, _flags(spte), True))
    return WalkTree(None, gpa, hpa, "" if steps else f"no shadow entry maps gpa {gpa:#x}", steps)
