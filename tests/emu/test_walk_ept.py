"""The EPT stage of the walk against an expectation table written from the SDM, and an oracle from it.

Five guest-physical pages take part in one translation: the four paging structures (stages 4 to 1)
and the page itself (stage 0). Each lies in its own 512 GiB of guest-physical space, so that every
EPT entry, whatever its level, belongs to one stage only.

SDM vol. 3C: table 29-7 note 1 and 29.3.3.2 (accesses to paging structures), 29.3.3.1
(misconfigurations), 29.3.3.3 (which fault wins), 29.3.5 (A and D). Execute-only is supported.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from emu.cpu import paging as P
from emu.cpu.compile import native
from emu.cpu.walk import (
    ACCESS_FETCH,
    ACCESS_READ,
    ACCESS_WRITE,
    EPT_MISCONFIG,
    EPT_VIOLATION,
    OK,
    OUTSIDE_RAM,
    PML_FULL,
    RIGHT_W,
    walk,
)
from host_mm.ram import Ram
from kvm_model.vmx.ept import VMCS_PML_ADDRESS, VMCS_PML_INDEX
from tests.emu.page_table_cases import Overlay, to_signed

R, W, X = 1, 2, 4
FRAMES = 4 << 18
ACCESSES = {"r": ACCESS_READ, "w": ACCESS_WRITE, "x": ACCESS_FETCH}
GVA = 0x1234_5678_9ABC & ~7
LEAF_HPA = {1: 0x0060_0000, 2: 0x0100_0000, 3: 0x8000_0000}
OFFSETS = {1: 0xFFF, 2: 0x1F_FFFF, 3: 0x3FFF_FFFF}
EPT_ROOT = 1
VMCS, PML = 100, 101
CR0 = P.CR0_PG | P.CR0_PE | P.CR0_WP
CR4 = P.CR4_PAE
EFER = P.EFER_LME | P.EFER_LMA | P.EFER_NXE

# What an access to a page comes to, by the rights its EPT entries combine to:
#    rights     read         write        fetch
PAGE_TABLE = {
    0:         ("violation", "violation", "violation"),
    R:         ("ok",        "violation", "violation"),
    W:         ("misconfig", "misconfig", "misconfig"),
    X:         ("violation", "violation", "ok"),
    R | W:     ("ok",        "ok",        "violation"),
    R | X:     ("ok",        "violation", "ok"),
    W | X:     ("misconfig", "misconfig", "misconfig"),
    R | W | X: ("ok",        "ok",        "ok"),
}  # fmt: skip
# What the CPU's own access to a guest paging-structure entry comes to, with its access bits:
#    rights     EPT A/D off: read, then update             EPT A/D on: always a write
STRUCTURE_TABLE = {
    0:         (("violation", R), ("violation", R),        ("violation", R | W)),
    R:         (("ok", 0),        ("violation", R | W),    ("violation", R | W)),
    W:         (("misconfig", 0), ("misconfig", 0),        ("misconfig", 0)),
    X:         (("violation", R), ("violation", R),        ("violation", R | W)),
    R | W:     (("ok", 0),        ("ok", 0),               ("ok", 0)),
    R | X:     (("ok", 0),        ("violation", R | W),    ("violation", R | W)),
    W | X:     (("misconfig", 0), ("misconfig", 0),        ("misconfig", 0)),
    R | W | X: (("ok", 0),        ("ok", 0),               ("ok", 0)),
}  # fmt: skip
STATUS = {"ok": OK, "violation": EPT_VIOLATION, "misconfig": EPT_MISCONFIG}


@dataclass
class Stage:
    """One guest-physical page: EPT leaf level, rights per EPT level, and extra bits to break entries with."""

    leaf: int = 1
    rights: dict[int, int] = field(default_factory=lambda: {1: 7, 2: 7, 3: 7, 4: 7})
    extra: dict[int, int] = field(default_factory=dict)
    memory_type: int = 6
    guest_flags: int = P.PTE_ACCESSED | P.PTE_DIRTY

    def combined(self) -> int:
        """The AND of the rights, 0 from a not-present entry on; misconfigurations apart."""
        result = 7
        for level in range(4, self.leaf - 1, -1):
            result &= self.rights[level]
        return result

    def first_bad(self) -> str | None:
        """What an entry on its own ends the translation with, from the root down."""
        for level in range(4, self.leaf - 1, -1):
            rights = self.rights[level]
            if rights == 0:
                return "violation"
            if rights in (W, W | X) or level in self.extra:
                return "misconfig"
        return None


class Machine:
    """RAM with the two stages of tables that a list of `Stage` describes."""

    def __init__(self) -> None:
        self.ram = Ram(FRAMES)
        self.native = native()
        self.array = self.native.memory(self.ram.i64)

    def gpa(self, stage: int) -> int:
        """The page of stage 4..0."""
        return (stage + 1) << 39 | 0x40_0000_0000 | 0xA000_0000 | 0x56_7000

    def hpa(self, stage: int, leaf: int) -> int:
        """Where a stage's page lies: a leaf of its own, at the gpa's offset in it."""
        base = LEAF_HPA[leaf] + (stage << (12 + 9 * (leaf - 1)) if leaf < 3 else (stage & 1) << 30)
        return base | (self.gpa(stage) & OFFSETS[leaf] & ~0xFFF)

    def slots(self, stage: int, leaf: int) -> dict[int, int]:
        """Word index of the EPT entry of each level for the stage's page."""
        gpa = self.gpa(stage)
        tables = {4: EPT_ROOT, 3: 16 + stage * 4, 2: 17 + stage * 4, 1: 18 + stage * 4}
        return {n: tables[n] * 512 + (gpa >> (12 + 9 * (n - 1)) & 511) for n in range(4, leaf - 1, -1)}

    def guest_slot(self, stage: int, leaf: int) -> int:
        """Word index of the guest entry used at structure stage 4..1."""
        return (self.hpa(stage, leaf) >> 3) + (GVA >> (12 + 9 * (stage - 1)) & 511)

    def build(self, stages: dict[int, Stage], *, ept_flags: int = 0) -> None:
        words = self.ram.i64
        for n, stage in stages.items():
            slots = self.slots(n, stage.leaf)
            for level, slot in slots.items():
                entry = stage.rights[level] | ept_flags
                if level == stage.leaf:
                    base = self.hpa(n, stage.leaf) & ~OFFSETS[stage.leaf]
                    entry |= base | stage.memory_type << 3 | (0x80 if level > 1 else 0)
                else:
                    entry |= (16 + n * 4 + (3 - (level - 1))) << 12
                    entry &= ~0x200  # D is for leaves
                words[slot] = to_signed(entry | stage.extra.get(level, 0))
        for n in (4, 3, 2, 1):
            flags = P.PTE_PRESENT | P.PTE_RW | P.PTE_USER
            words[self.guest_slot(n, stages[n].leaf)] = self.gpa(n - 1) | flags | stages[n].guest_flags

    def run(self, access: int, eptp: int, pml: int = 0) -> tuple[tuple[int, ...], dict[int, int]]:
        """Result and stores of the interpreted walk, after the compiled one gave the same."""
        registers = (CR0, self.gpa(4), CR4, EFER, eptp, pml, 0, GVA, access)
        overlay = Overlay(self.ram.i64)
        result = walk(overlay, FRAMES, *registers)
        before = {slot: self.ram.i64[slot] for slot in overlay.stores}
        assert self.native.walk(self.array, FRAMES, *registers) == result
        for slot, entry in overlay.stores.items():
            assert self.ram.i64[slot] == entry
            self.ram.i64[slot] = before[slot]
        return result, overlay.stores

    def expected(
        self, stages: dict[int, Stage], kind: str, ad: bool, index: int | None = None
    ) -> tuple[int, int, int, dict[int, int]]:
        """(status, qualification, stage, stores) by the tables above; `index`: the log's, if it is on."""
        words, stores = self.ram.i64, dict[int, int]()
        for n in (4, 3, 2, 1, 0):
            stage = stages[n]
            what, bits, update = self.stage_outcome(stage, n, kind, ad)
            if what != "ok":
                final = 0x100 if n == 0 else 0
                rights = 0 if stage.first_bad() else stage.combined()
                qualification = bits | rights << 3 | 0x80 | final if what == "violation" else 0
                return STATUS[what], qualification, n, stores
            if ad:
                changed = self.flags_to_set(n, stage, kind)
                if index is not None and changed:
                    if index > 511:
                        return PML_FULL, 0, n, stores
                    leaf = self.slots(n, stage.leaf)[stage.leaf]
                    if changed.get(leaf, 0) & ~words[leaf] & 0x200:
                        stores[PML * 512 + index] = self.gpa(n)
                        index = (index - 1) & 0xFFFF
                        stores[VMCS * 512 + VMCS_PML_INDEX] = index
                stores.update(changed)
            if update:
                slot = self.guest_slot(n, stage.leaf)
                stores[slot] = words[slot] | update
        return OK, 0, 0, stores

    def flags_to_set(self, n: int, stage: Stage, kind: str) -> dict[int, int]:
        """The EPT entries of a stage that its access changes."""
        words = self.ram.i64
        changed = {}
        for level, slot in self.slots(n, stage.leaf).items():
            dirty = level == stage.leaf and (n > 0 or kind == "w")
            entry = words[slot] | 0x100 | (0x200 if dirty else 0)
            if entry != words[slot]:
                changed[slot] = entry
        return changed

    def stage_outcome(self, stage: Stage, n: int, kind: str, ad: bool) -> tuple[str, int, int]:
        """(outcome, access bits of a violation, guest flags to set) of one stage by the tables."""
        bad = stage.first_bad()
        if n == 0:
            column = "rwx".index(kind)
            return bad or PAGE_TABLE[stage.combined()][column], 1 << column, 0
        wanted = P.PTE_ACCESSED | (P.PTE_DIRTY if n == 1 and kind == "w" else 0)
        update = wanted if wanted & ~stage.guest_flags else 0
        column = 2 if ad else 1 if update else 0
        what, bits = STRUCTURE_TABLE[0 if bad else stage.combined()][column]
        return (bad or what), bits, update

    def check_logged(self, stages: dict[int, Stage], kind: str, index: int) -> int:
        """As check, with A/D flags and a log whose next entry is `index`; the status."""
        words = self.ram.i64
        words[VMCS * 512 + VMCS_PML_ADDRESS] = PML << 12
        words[VMCS * 512 + VMCS_PML_INDEX] = index
        result, stores = self.run(ACCESSES[kind], EPT_ROOT << 12 | 0x5E, VMCS * 512)
        status, _, stage, expected_stores = self.expected(stages, kind, True, index)
        assert (result[0], result[5] if status else 0) == (status, stage)
        assert stores == expected_stores
        return status

    def check(self, stages: dict[int, Stage], kind: str, ad: bool) -> None:
        eptp = EPT_ROOT << 12 | 0x1E | (0x40 if ad else 0)
        result, stores = self.run(ACCESSES[kind], eptp)
        status, qualification, stage, expected_stores = self.expected(stages, kind, ad)
        assert (result[0], result[5] if status else 0) == (status, stage)
        if status == OK:
            page = self.hpa(0, stages[0].leaf)
            assert result[1] == page | GVA & 0xFFF
            assert result[3:] == (self.gpa(0) | GVA & 0xFFF, 1, stages[0].leaf)
        else:
            offset = (GVA >> (12 + 9 * (stage - 1)) & 511) * 8 if stage else GVA & 0xFFF
            assert result[4] == self.gpa(stage) | offset
        if status == EPT_VIOLATION:
            assert result[3] == qualification
        assert stores == expected_stores


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine()


def plain() -> dict[int, Stage]:
    return {n: Stage() for n in (4, 3, 2, 1, 0)}


@pytest.mark.parametrize("ad", [False, True])
@pytest.mark.parametrize("ept_leaf", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3, 4])
def test_every_combination_of_rights_access_and_page(
    machine: Machine, stage: int, ept_leaf: int, ad: bool
) -> None:
    for rights in range(8):
        for at in range(4, ept_leaf - 1, -1):
            for guest_flags in (0, P.PTE_ACCESSED, P.PTE_DIRTY, P.PTE_ACCESSED | P.PTE_DIRTY):
                stages = plain()
                stages[stage].leaf = ept_leaf
                stages[stage].rights[at] = rights
                stages[stage].guest_flags = guest_flags
                machine.build(stages)
                for kind in "rwx":
                    machine.check(stages, kind, ad)


@pytest.mark.parametrize("ad", [False, True])
def test_random_rights_at_every_level_of_every_stage(machine: Machine, ad: bool) -> None:
    rng = random.Random(7)
    for _ in range(4000):
        stages = plain()
        for stage in stages.values():
            stage.leaf = rng.choice((1, 1, 2, 3))
            stage.rights = {n: rng.choices((0, R, W, X, R | W, R | X, W | X, 7), (1, 3, 1, 2, 8, 4, 1, 60))[0]
                            for n in (1, 2, 3, 4)}
            stage.guest_flags = rng.choice((0, 0x20, 0x40, 0x60))
        machine.build(stages, ept_flags=rng.choice((0, 0x100, 0x300)))
        for kind in "rwx":
            machine.check(stages, kind, ad)


def test_what_sets_an_ept_dirty_flag_is_logged_and_a_full_log_lets_no_flag_be_set(machine: Machine) -> None:
    rng = random.Random(11)
    seen = set()
    for _ in range(4000):
        stages = plain()
        for stage in stages.values():
            stage.leaf = rng.choice((1, 1, 2, 3))
            stage.rights = {n: rng.choices((0, R, X, R | W, R | X, 7), (1, 1, 2, 8, 4, 80))[0]
                            for n in (1, 2, 3, 4)}
            stage.guest_flags = rng.choice((0, 0x20, 0x40, 0x60))
        machine.build(stages, ept_flags=rng.choice((0, 0x100, 0x300)))
        for stage in rng.sample(range(5), 2):
            slot = machine.slots(stage, stages[stage].leaf)[stages[stage].leaf]
            machine.ram.i64[slot] &= ~rng.choice((0, 0x100, 0x200, 0x300))
        for kind in "rwx":
            seen.add(machine.check_logged(stages, kind, rng.choice((511, 300, 4, 3, 1, 0, 0xFFFF))))
    assert seen >= {OK, EPT_VIOLATION, PML_FULL}


MISCONFIGURATIONS = [
    *((level, 1 << bit, 1) for level in (1, 2, 3, 4) for bit in range(P.MAXPHYADDR, 52)),
    *((4, 1 << bit, 1) for bit in (3, 4, 5, 6, 7)),
    *((level, 1 << bit, 1) for level in (2, 3) for bit in (3, 4, 5, 6)),
    *((2, 1 << bit, 2) for bit in range(12, 21)),
    *((3, 1 << bit, 3) for bit in range(12, 30)),
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 4])
def test_reserved_bits_of_ept_entries_are_misconfigurations(machine: Machine, stage: int) -> None:
    for level, bits, leaf in MISCONFIGURATIONS:
        stages = plain()
        stages[stage].leaf = leaf
        stages[stage].extra[level] = bits
        machine.build(stages)
        for kind in "rwx":
            machine.check(stages, kind, True)


@pytest.mark.parametrize("leaf", [1, 2, 3])
def test_memory_types_2_3_and_7_are_misconfigurations(machine: Machine, leaf: int) -> None:
    for memory_type in range(8):
        stages = plain()
        stages[0].leaf, stages[0].memory_type = leaf, memory_type
        if memory_type in (2, 3, 7):
            stages[0].extra[leaf] = 0
        machine.build(stages)
        machine.check(stages, "r", True)


def test_ignored_bits_of_ept_entries_are_ignored(machine: Machine) -> None:
    for bit in (10, 11, *range(52, 64)):
        stages = plain()
        machine.build(stages)
        for slot in machine.slots(0, 1).values():
            machine.ram.i64[slot] |= to_signed(1 << bit)
        machine.check(stages, "w", True)
    machine.build(stages)


@pytest.mark.parametrize("kind", ["r", "w", "x"])
def test_a_tlb_may_write_only_where_both_dirty_flags_are_set(machine: Machine, kind: str) -> None:
    eptp = EPT_ROOT << 12 | 0x5E
    for guest_dirty in (0, P.PTE_DIRTY):
        for ept_dirty in (0, 0x200):
            stages = plain()
            stages[1].guest_flags = P.PTE_ACCESSED | guest_dirty
            machine.build(stages, ept_flags=0x100 | ept_dirty)
            result, _ = machine.run(ACCESSES[kind], eptp)
            may_write = bool(guest_dirty and ept_dirty) or kind == "w"
            assert bool(result[2] & RIGHT_W) == may_write
            without, _ = machine.run(ACCESSES[kind], eptp & ~0x40)
            assert bool(without[2] & RIGHT_W) == (bool(guest_dirty) or kind == "w")


def test_paging_off_translates_32_bits_through_ept(machine: Machine) -> None:
    gpa = 0x40_3000
    words = machine.ram.i64
    words[EPT_ROOT * 512] = 40 << 12 | 7
    words[40 * 512] = 41 << 12 | 7
    words[41 * 512 + 2] = 42 << 12 | 7
    words[42 * 512 + 3] = 0x77_7000 | 6 << 3 | 5
    for gva in (gpa | 0x123, gpa | 0x123 | 5 << 32):
        for kind, status in (("r", OK), ("w", EPT_VIOLATION), ("x", OK)):
            args = (words, FRAMES, P.CR0_PE, 0, 0, 0, EPT_ROOT << 12 | 0x1E, 0, 0, gva, ACCESSES[kind])
            result = walk(*args)
            assert result == machine.native.walk(machine.array, *args[1:])
            if status == OK:
                assert result == (OK, 0x77_7123, 5, gpa | 0x123, 0, 1)
            else:
                assert result == (status, 0, 0, 0x182 | 5 << 3, gpa | 0x123, 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 4])
def test_frames_outside_ram_are_never_read(machine: Machine, stage: int) -> None:
    """EPT entries at every level and guest entries at every stage point past the end of RAM."""
    eptp = EPT_ROOT << 12 | 0x5E
    for level in (1, 2, 3, 4):
        stages = plain()
        machine.build(stages)
        slot = machine.slots(stage, 1)[level]
        frame = random.Random(level).choice((FRAMES, FRAMES + 1, (1 << 34) - 1))
        machine.ram.i64[slot] = (machine.ram.i64[slot] & 0xFFF) | frame << 12
        result, _ = machine.run(ACCESS_READ, eptp)
        assert (result[0], result[1] >> 12, result[5]) == (OUTSIDE_RAM, frame, stage)
    machine.build(plain())
