"""Looking at a translation without making one: the GVA -> GPA -> HPA tree of an address.

Reads the tables as the hardware would but sets no A/D bit and faults nothing in, so that a walk of
a frozen machine shows the machine and not the walk. Source of the layouts: emu/cpu/paging.py and
kvm_model/vmx/ept.py.

In PAE paging the first step is the PDPTE register, at the address that it is loaded from. Without EPT:
shadow_inspector.py.

Not modelled: what no table says, such as protection keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from emu.cpu.paging import (
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    PTE_PRESENT,
    PTE_PS,
    is_canonical,
    pde32_frame,
    table_index,
)

if TYPE_CHECKING:
    from emu.board import Board

__all__ = ["WalkStep", "WalkTree", "walk_gpa", "walk_gva"]

_ADDR = 0x000F_FFFF_FFFF_F000
_FRAME32 = 0xFFFF_F000
_GUEST_LEVELS = ("", "PTE", "PDE", "PDPTE", "PML4E", "PML5E")
_EPT_LEVELS = ("EPT PML4E", "EPT PDPTE", "EPT PDE", "EPT PTE")
_GUEST_BITS = ((0x2, "W"), (0x4, "U"), (0x20, "A"), (0x40, "D"), (0x80, "PS"), (0x100, "G"))
_EPT_BITS = ((0x1, "R"), (0x2, "W"), (0x4, "X"), (0x80, "PS"), (0x100, "A"), (0x200, "D"))


class WalkStep(msgspec.Struct):
    """One entry that was read. `stage` 1 is the guest's tables, 2 the EPT or KVM's shadow tables. Addresses
    are where the entry lies: guest physical for stage 1, host physical for stage 2. `flags` decodes it."""

    stage: int
    name: str
    address: int
    entry: int
    flags: str
    present: bool


class WalkTree(msgspec.Struct):
    """The steps in the order the CPU takes them, and the answer.

    `gpa` and `hpa` are None where that stage has no translation; `why` then says what is missing.
    """

    gva: int | None
    gpa: int | None
    hpa: int | None
    why: str
    steps: list[WalkStep]

    def __str__(self) -> str:
        lines = []
        if self.gva is not None:
            lines.append(f"gva {self.gva:#x}")
        elif self.gpa is not None:
            lines.append(f"gpa {self.gpa:#x}")
        for step in self.steps:
            indent = "  " if step.stage == 1 else "      "
            space = "gpa" if step.stage == 1 else "hpa"
            where = f"{step.name:<9} at {space} {step.address:#x}"
            lines.append(f"{indent}{where}: {step.entry:#018x}  {step.flags}")
        if self.gva is not None and self.gpa is not None:
            lines.append(f"gpa {self.gpa:#x}")
        elif self.gva is not None and self.hpa is not None:
            lines.append(f"no gpa: {self.why}")
        if self.hpa is None:
            lines.append(f"no hpa: {self.why}")
        else:
            lines.append(f"hpa {self.hpa:#x} (pfn {self.hpa >> 12:#x})")
        return "\n".join(lines)


def _flags(entry: int, bits: tuple[tuple[int, str], ...]) -> str:
    return "|".join(name for bit, name in bits if entry & bit)


class _Walker:
    def __init__(self, board: Board, vcpu: int) -> None:
        self.u64 = board.host.mm.ram.u64
        self.size = board.host.mm.ram.size
        self.root = board.vcpus[vcpu].root_hpa
        self.steps: list[WalkStep] = []
        self.why = ""

    def stage2(self, gpa: int) -> int | None:
        """The hpa of `gpa` by the EPT, or None with `why` set."""
        if not self.root:
            self.why = "the vCPU has no EPT root (it never entered the guest, or its root was invalidated)"
            return None
        table = self.root & _ADDR
        for level in (4, 3, 2, 1):
            shift = 12 + 9 * (level - 1)
            address = table + ((gpa >> shift) & 511) * 8
            entry = self.u64[address >> 3]
            present = bool(entry & 7)
            name = _EPT_LEVELS[4 - level]
            self.steps.append(WalkStep(2, name, address, entry, _flags(entry, _EPT_BITS) or "-", present))
            if not present:
                self.why = f"the {name} of gpa {gpa:#x} is not present"
                return None
            if level == 1 or entry & 0x80:
                return (entry & _ADDR & ~((1 << shift) - 1)) | (gpa & ((1 << shift) - 1))
            table = entry & _ADDR
        return None


    def note_guest(self, level: int, gpa: int, entry: int) -> bool:
        """A step of the guest's tables; whether its entry is present, else `why` is set."""
        name = _GUEST_LEVELS[level]
        present = bool(entry & PTE_PRESENT)
        self.steps.append(WalkStep(1, name, gpa, entry, _flags(entry, _GUEST_BITS) or "-", present))
        if not present:
            self.why = f"the guest's {name} is not present"
        return present

    def _guest_word(self, gpa: int) -> int | None:
        hpa = self.stage2(gpa)
        if hpa is None or hpa >= self.size:
            self.why = self.why or "the tables point outside RAM"
            return None
        return self.u64[hpa >> 3]

    def stage1(self, gva: int, table: int, level: int) -> int | None:
        """The gpa of `gva` by the guest's 8-byte entries, from a table of `level` on; None with `why` set."""
        while True:
            gpa = table + table_index(gva, level) * 8
            entry = self._guest_word(gpa)
            if entry is None or not self.note_guest(level, gpa, entry):
                return None
            if level == 1 or (entry & PTE_PS and level < 4):
                offset = (1 << 12 + 9 * (level - 1)) - 1
                return entry & _ADDR & ~offset | gva & offset
            table = entry & _ADDR
            level -= 1

    def stage1_32(self, gva: int, table: int, pse: int) -> int | None:
        """The same in 32-bit paging."""
        for level, shift in ((2, 22), (1, 12)):
            gpa = table + (gva >> shift & 1023) * 4
            word = self._guest_word(gpa)
            if word is None:
                return None
            entry = word >> (gpa & 4) * 8 & 0xFFFF_FFFF
            if not self.note_guest(level, gpa, entry):
                return None
            if level == 2 and pse and entry & PTE_PS:
                return pde32_frame(entry) | gva & 0x3F_FFFF
            table = entry & _FRAME32
        return table | gva & 0xFFF


def walk_gpa(board: Board, gpa: int, vcpu: int = 0) -> WalkTree:
    """The second stage alone."""
    walker = _Walker(board, vcpu)
    hpa = walker.stage2(gpa)
    return WalkTree(None, gpa, hpa, walker.why, walker.steps)


def walk_gva(board: Board, gva: int, vcpu: int = 0) -> WalkTree:
    """Both stages, by the vCPU's control registers as they are now."""
    walker = _Walker(board, vcpu)
    cpu, v = board.cpu, board.vcpus[vcpu]
    cr0, cr3, cr4, efer = (cpu.get_reg(v, name) for name in ("cr0", "cr3", "cr4", "efer"))
    if not efer & EFER_LMA:
        gva &= 0xFFFF_FFFF
    if not cr0 & CR0_PG:
        return WalkTree(gva, gva, walker.stage2(gva), walker.why, walker.steps)
    if efer & EFER_LMA and not is_canonical(gva, cr4):
        return WalkTree(gva, None, None, "the address is not canonical", walker.steps)
    gpa: int | None
    if efer & EFER_LMA:
        gpa = walker.stage1(gva, cr3 & _ADDR, 5 if cr4 & CR4_LA57 else 4)
    elif cr4 & CR4_PAE:
        at = (cr3 & 0xFFFF_FFE0) + (gva >> 30) * 8
        pdpte = cpu.get_reg(v, f"pdptr{gva >> 30}")
        gpa = walker.stage1(gva, pdpte & _ADDR, 2) if walker.note_guest(3, at, pdpte) else None
    else:
        gpa = walker.stage1_32(gva, cr3 & _FRAME32, cr4 & CR4_PSE)
    return WalkTree(gva, gpa, None if gpa is None else walker.stage2(gpa), walker.why, walker.steps)
