"""inspector.py shows the translation that the CPU would make, in every paging mode, and changes nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from emu.cpu.paging import CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, EFER_LME, PTE_PS
from emu.cpu.walk import ACCESS_READ, OK, PAGE_FAULT
from emu.inspector import WalkTree, walk_gva
from tests.emu.bare_machine import EPT_AT, Machine

TABLES = 0x200000
MODES = {
    "32-bit": (2, 4, CR4_PSE, 0), "pae": (3, 8, CR4_PAE, 0), "4-level": (4, 8, CR4_PAE, EFER_LME | EFER_LMA),
    "5-level": (5, 8, CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA),
}
"""Levels, bytes of an entry, CR4, EFER."""


class Inspected:
    """The bare machine in one paging mode, its tables at TABLES, one a level, as a board."""

    def __init__(self, mode: str) -> None:
        self.levels, self.size, cr4, efer = MODES[mode]
        self.m = Machine(ept=True)
        vcpu = self.m.vcpus[0]
        vcpu.root_hpa = EPT_AT
        self.v = self.m.cpu.vcpu(vcpu)
        self.v.intercepts.load_cr0(0x11)
        self.v.intercepts.load_cr4(cr4)
        self.v.env.efer = efer
        self.v.intercepts.load_cr3(TABLES)
        self.v.intercepts.load_cr0(0x80000011)
        self.v.env.efer = efer
        host = SimpleNamespace(mm=SimpleNamespace(ram=self.m.ram))
        self.board = SimpleNamespace(host=host, vcpus=[vcpu], cpu=self.m.cpu)

    def map(self, rng: random.Random, gva: int) -> None:
        """Random entries for `gva`, each mostly present."""
        bits = 9 if self.size == 8 else 10
        for level in range(self.levels, 0, -1):
            table = TABLES + (self.levels - level) * 0x1000
            entry = rng.choice((1, 1, 1, 1, 1, 1, 1, 0)) | 6
            if self.levels == 3 == level:
                entry &= 1
            if level == 1:
                entry |= rng.randrange(0x100) << 12
            elif level == 2 and rng.random() < 0.3:
                entry |= PTE_PS | rng.randrange(1, 3) << 12 + bits
            else:
                entry |= table + 0x1000
            at = table + (gva >> 12 + bits * (level - 1) & (1 << bits) - 1) * self.size
            self.m.ram.write(at, entry.to_bytes(self.size, "little"))
            if self.levels == 3 == level:
                self.v.fill.pdptes = [entry] * 4

    def look(self, gva: int) -> WalkTree:
        before = bytes(self.m.ram.b[TABLES : TABLES + 0x5000])
        tree = walk_gva(self.board, gva)
        assert self.m.ram.b[TABLES : TABLES + 0x5000] == before
        return tree


@pytest.mark.parametrize("mode", MODES)
def test_a_walk_shown_is_the_walk_made(mode: str) -> None:
    machine = Inspected(mode)
    rng = random.Random(mode)
    seen = {OK: 0, PAGE_FAULT: 0}
    width = {2: 32, 3: 32, 4: 47, 5: 56}[machine.levels]
    for _ in range(300):
        gva = rng.getrandbits(width)
        machine.map(rng, gva)
        tree = machine.look(gva)
        status, hpa, _, gpa, _, level = machine.v.fill.walk(gva, ACCESS_READ)
        seen[status] += 1
        if status == OK:
            assert (tree.gpa, tree.hpa, tree.why) == (gpa, hpa, "")
            assert [step.stage for step in tree.steps].count(1) in (machine.levels, machine.levels - 1)
        else:
            assert (tree.gpa, tree.hpa) == (None, None)
            last = [step for step in tree.steps if step.stage == 1][-1]
            assert tree.why == f"the guest's {last.name} is not present"
            assert len([step for step in tree.steps if step.stage == 1]) == machine.levels - level + 1
    assert min(seen.values()) > 30


def test_addresses_that_are_not_canonical_depend_on_the_mode() -> None:
    for mode, canonical in (("4-level", False), ("5-level", True)):
        machine = Inspected(mode)
        assert (machine.look(1 << 47).why != "the address is not canonical") is canonical
    assert Inspected("pae").look(1 << 47).gva == 0
