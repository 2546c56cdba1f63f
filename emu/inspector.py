"""Looking at a translation without making one: the GVA -> GPA -> HPA tree of an address.

Reads the tables as the hardware would but sets no A/D bit and faults nothing in, so that a walk of
a frozen machine shows the machine and not the walk. Source of the layouts: emu/cpu/paging.py and
kvm_model/vmx/ept.py.

Without EPT: shadow_inspector.py.

Not modelled: 5-level and 32-bit paging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from emu.board import Board

__all__ = ["WalkStep", "WalkTree", "walk_gpa", "walk_gva"]

_ADDR = 0x000F_FFFF_FFFF_F000
_GUEST_LEVELS = ("PML4E", "PDPTE", "PDE", "PTE")
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


def walk_gpa(board: Board, gpa: int, vcpu: int = 0) -> WalkTree:
    """The second stage alone."""
    walker = _Walker(board, vcpu)
    hpa = walker.stage2(gpa)
    return WalkTree(None, gpa, hpa, walker.why, walker.steps)


def walk_gva(board: Board, gva: int, vcpu: int = 0) -> WalkTree:
    """Both stages, by the vCPU's CR0, CR3 and CR4 as they are now."""
    walker = _Walker(board, vcpu)
    cpu, v = board.cpu, board.vcpus[vcpu]
    if not cpu.get_reg(v, "cr0") >> 31 & 1:
        gpa = gva & 0xFFFF_FFFF
        return WalkTree(gva, gpa, walker.stage2(gpa), walker.why, walker.steps)
    if gva >> 47 not in (0, 0x1FFFF):
        return WalkTree(gva, None, None, "the address is not canonical", walker.steps)
    table = cpu.get_reg(v, "cr3") & _ADDR
    for level in (4, 3, 2, 1):
        shift = 12 + 9 * (level - 1)
        entry_gpa = table + ((gva >> shift) & 511) * 8
        entry_hpa = walker.stage2(entry_gpa)
        if entry_hpa is None or entry_hpa >= walker.size:
            return WalkTree(gva, None, None, walker.why or "the tables point outside RAM", walker.steps)
        entry = walker.u64[entry_hpa >> 3]
        name = _GUEST_LEVELS[4 - level]
        present = bool(entry & 1)
        walker.steps.append(WalkStep(1, name, entry_gpa, entry, _flags(entry, _GUEST_BITS) or "-", present))
        if not present:
            return WalkTree(gva, None, None, f"the guest's {name} is not present", walker.steps)
        if level == 1 or (entry & 0x80 and level < 4):
            gpa = (entry & _ADDR & ~((1 << shift) - 1)) | (gva & ((1 << shift) - 1))
            return WalkTree(gva, gpa, walker.stage2(gpa), walker.why, walker.steps)
        table = entry & _ADDR
    return WalkTree(gva, None, None, "no leaf", walker.steps)
