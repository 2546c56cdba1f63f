"""32-bit, PAE and 5-level paging: the walk agrees with Unicorn's own (UC_TLB_CPU), and with the SDM's tables.

As test_walk_unicorn.py, which has 4-level paging, and what Unicorn's walker has not. Nothing is compared
that Unicorn has otherwise: in a PDPTE of PAE paging it looks for reserved bits when it walks, where the
CPU looked when it loaded the register.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from typing import NamedTuple

import pytest
from unicorn import UC_ARCH_X86, UC_HOOK_INTR, UC_MODE_64, UC_PROT_ALL, Uc
from unicorn import x86_const as x86
from unicorn.unicorn_const import UC_CTL_IO_WRITE, UC_CTL_TLB_FLUSH, UC_TLB_CPU
from unicorn.unicorn_py3.unicorn import uclib

from emu.cpu import env as E
from emu.cpu import paging as P
from emu.cpu.compile import native
from emu.cpu.walk import (
    ACCESS_FETCH,
    ACCESS_USER,
    ACCESS_WRITE,
    EPT_VIOLATION,
    NON_CANONICAL,
    OK,
    PAGE_FAULT,
    walk,
)
from host_mm.ram import Ram
from tests.emu.page_table_cases import Overlay, to_signed

RAM_FRAMES = 1 << 18
HF_SMAP = 1 << 23
MAGIC = 0x1234567
FULL = P.PTE_PRESENT | P.PTE_RW | P.PTE_USER | P.PTE_ACCESSED | P.PTE_DIRTY
TABLES = {5: 1, 4: 2, 3: 3, 2: 4, 1: 5}
PROBE_TABLES = {4: 8, 3: 9, 2: 10, 1: 11}
PROBE_USER, PROBE_KERNEL = 12, 13
LOAD, STORE = 0, 0x10


class Mode(NamedTuple):
    """One paging mode. The probe's code is at `probe`, which no case's address comes near."""

    levels: int
    bits: int
    cr4: int
    efer: int
    probe: int

    def index(self, gva: int, level: int) -> int:
        return gva >> (12 + self.bits * (level - 1)) & ((1 << self.bits) - 1)


MODES = {
    "32-bit": Mode(2, 10, 0, 0, 0xFF80_0000),
    "32-bit-pse": Mode(2, 10, P.CR4_PSE, 0, 0xFF80_0000),
    "pae": Mode(3, 9, P.CR4_PAE, 0, 0xFFE0_0000),
    "5-level": Mode(5, 9, P.CR4_PAE | P.CR4_LA57, P.EFER_LME | P.EFER_LMA, 300 << 48 | 0x7F << 57),
}


class Case(NamedTuple):
    """One access. `entries`: (level, gpa of the entry, entry) from the root down."""

    cr0: int
    cr4: int
    efer: int
    gva: int
    access: int
    entries: list[tuple[int, int, int]]


class Memory:
    """The test memory of one mode, and Unicorn with its own MMU on it."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.size = 4 if mode.bits == 10 else 8
        self.ram = Ram(RAM_FRAMES)
        self.root = TABLES[mode.levels]
        uc = self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_BROADWELL)
        uc.mem_map_ptr(0, self.ram.size, UC_PROT_ALL, self.ram.ptr)
        uc.ctl_set_tlb_mode(UC_TLB_CPU)
        self._probe()
        self.env = E.Env(uc)
        uc.reg_write(x86.UC_X86_REG_CR4, mode.cr4 | P.CR4_PAE | 0x600)
        uc.reg_write(x86.UC_X86_REG_CR3, self.root << 12)
        uc.reg_write(x86.UC_X86_REG_CR0, P.CR0_PG | P.CR0_PE | 0x10)
        if not mode.efer:
            uc.reg_write(x86.UC_X86_REG_CR0, P.CR0_PE | 0x10)
            self.env.efer = 0
            uc.reg_write(x86.UC_X86_REG_CR4, mode.cr4 | 0x600)
            uc.reg_write(x86.UC_X86_REG_CR0, P.CR0_PG | P.CR0_PE | 0x10)
        hflags = self.env.hflags & ~(3 | E.HF_CS64 | E.HF_LMA | E.HF_ADDSEG)
        self.hflags = hflags | E.HF_CS32 | E.HF_SS32 | (E.HF_CS64 | E.HF_LMA if mode.efer else 0)
        self.vector = -1
        uc.hook_add(UC_HOOK_INTR, self._intr)
        uc.ctl_exits_enabled(True)
        uc.ctl_set_exits([])
        self._start = uclib.uc_emu_start
        self._zero = ctypes.c_uint64(0)

    def put(self, at: int, entry: int) -> None:
        self.ram.b[at : at + self.size] = entry.to_bytes(self.size, "little")

    def get(self, at: int) -> int:
        return int.from_bytes(self.ram.b[at : at + self.size], "little")

    def entry_at(self, table: int, gva: int, level: int) -> int:
        return table << 12 | self.mode.index(gva, level) * self.size

    def _probe(self) -> None:
        mode = self.mode
        table = self.root
        for level in range(mode.levels, 1, -1):
            below = PROBE_TABLES[level - 1]
            flags = P.PTE_PRESENT if level == 3 == mode.levels else FULL
            self.put(self.entry_at(table, mode.probe, level), below << 12 | flags)
            table = below
        for n, frame in enumerate((PROBE_USER, PROBE_KERNEL)):
            flags = FULL if frame == PROBE_USER else FULL & ~P.PTE_USER
            self.put(self.entry_at(table, mode.probe + (n << 12), 1), frame << 12 | flags)
            for offset, code in ((LOAD, b"\x8b\x03\xf4"), (STORE, b"\x89\x03\xf4")):  # mov; hlt
                self.ram.b[(frame << 12) + offset : (frame << 12) + offset + len(code)] = code

    def _intr(self, uc: Uc, vector: int, user_data: object) -> None:
        self.vector = vector
        self.env.clear_old_exception()
        uc.emu_stop()

    def access(self, case: Case) -> tuple[int, int, int]:
        """(vector or -1, error code, EAX) after one access by Unicorn."""
        env = self.env
        user = case.access & ACCESS_USER
        env.set_cr(0, case.cr0)
        env.set_cr(4, case.cr4)
        env.efer = case.efer
        env.hflags = self.hflags | (3 if user else 0) | (HF_SMAP if case.cr4 & P.CR4_SMAP else 0)
        env.eflags = 2
        env.set_cr(2, 0)
        env.set_reg(3, case.gva & (1 << 64) - 1)
        env.set_reg(0, MAGIC)
        probe = self.mode.probe + (0 if user else 0x1000)
        start = probe + (STORE if case.access & ACCESS_WRITE else LOAD)
        if case.access & ACCESS_FETCH:
            start = case.gva & (1 << 64) - 1
        self.vector = -1
        self.uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)
        error = self._start(self.uc._uch, ctypes.c_uint64(start), self._zero, self._zero, ctypes.c_size_t(0))
        assert error == 0, f"uc_emu_start: {error}"
        return self.vector, env.error_code, env.reg(0) & 0xFFFFFFFF


def random_case(rng: random.Random, memory: Memory) -> Case:
    """Anything but what leads outside the test memory: mostly good entries, each flaw now and then."""
    mode = memory.mode
    # From the root down, the levels whose entries may map a page of 4M, 2M or 1G.
    large_at = {2: 0.3, 3: 0.15 if mode.levels > 3 else 0.0}
    gva = rng.getrandbits(57 if mode.efer else 32) & ~7
    while mode.index(gva, mode.levels) == mode.index(mode.probe, mode.levels):
        gva ^= 1 << 31 if not mode.efer else 1 << 50
    if mode.efer and gva >> 56:
        gva |= 0x7F << 57
    if mode.efer and rng.random() < 0.03:
        gva ^= 1 << rng.randrange(57, 64)
    entries = []
    table = memory.root
    for level in range(mode.levels, 0, -1):
        pdpte = level == 3 == mode.levels
        leaf = level == 1 or rng.random() < large_at.get(level, 0)
        entry = _random_entry(rng, mode, level, pdpte)
        span = mode.bits * (level - 1)
        frame = rng.randrange(64, 256) if level == 1 else rng.randrange(1, max(2, 1 << 18 >> span)) << span
        if not leaf:
            frame = TABLES[level - 1]
        if level > 1 and not pdpte:
            entry = entry | P.PTE_PS if leaf else entry & ~P.PTE_PS
            if leaf and rng.random() < 0.1:
                # 4M: bits 20:13 are address bits that lead outside; only bit 21 and PAT may be tried here.
                frame |= 1 << 9 if mode.bits == 10 else 1 << rng.randrange(9)
        if leaf and level == 3 and frame >= 1 << 18:
            frame = 0
        entries.append((level, memory.entry_at(table, gva, level), entry | frame << 12))
        table = TABLES.get(level - 1, 0)
        if leaf and level > 1 and (mode.bits == 9 or mode.cr4 & P.CR4_PSE):
            break
        if leaf and level > 1:
            # Without PSE the bit is ignored and the entry refers to a table.
            entries[-1] = (level, entries[-1][1], entry | P.PTE_PS | table << 12)
    kind = rng.choice((0, ACCESS_WRITE, ACCESS_FETCH))
    return Case(
        P.CR0_PG | P.CR0_PE | 0x10 | rng.choice((0, P.CR0_WP)),
        mode.cr4 | 0x600 | rng.choice((0, 0, P.CR4_SMEP)) | rng.choice((0, 0, P.CR4_SMAP)),
        mode.efer | rng.choice((0, P.EFER_NXE)), to_signed(gva), kind | rng.choice((0, ACCESS_USER)), entries,
    )


def _random_entry(rng: random.Random, mode: Mode, level: int, pdpte: bool) -> int:
    def chance(p: float) -> bool:
        return rng.random() < p

    entry = 0 if chance(0.03) else P.PTE_PRESENT
    entry |= rng.getrandbits(3) << 9
    if pdpte:
        return entry
    entry |= (0 if chance(0.1) else P.PTE_RW) | (0 if chance(0.15) else P.PTE_USER)
    entry |= rng.getrandbits(2) << 3 | rng.getrandbits(4) << 5
    if mode.bits == 9:
        if mode.efer:
            entry |= rng.getrandbits(11) << 52
        elif chance(0.03):
            entry |= 1 << rng.randrange(52, 63)
        if chance(0.03):
            entry |= 1 << rng.randrange(P.MAXPHYADDR, 52)
        if level >= 4 and chance(0.05):
            entry |= P.PTE_PS
        if chance(0.05):
            entry |= P.PTE_XD
    return entry


@pytest.fixture(scope="module", params=MODES)
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(MODES[request.param])


def outcome(case: Case, result: tuple[int, ...]) -> tuple[object, ...]:
    kind = "x" if case.access & ACCESS_FETCH else "w" if case.access & ACCESS_WRITE else "r"
    if result[0] != PAGE_FAULT:
        return (result[0], result[4] if result[0] != OK else result[2] != 0, kind)
    code = result[3]
    what = "reserved" if code & P.PFERR_RSVD else "rights" if code & P.PFERR_PRESENT else "absent"
    return (what, result[5], kind)


def test_forty_thousand_accesses_end_as_in_unicorn_compiled_and_interpreted(memory: Memory) -> None:
    rng = random.Random(7)
    code = native()
    array = code.memory(memory.ram.i64)
    seen: Counter[tuple[object, ...]] = Counter()
    for _ in range(40_000):
        case = random_case(rng, memory)
        for _, at, entry in case.entries:
            memory.put(at, entry)
        pdpte = to_signed(case.entries[0][2]) if memory.mode.levels == 3 else 0
        args = (
            RAM_FRAMES, case.cr0, memory.root << 12, case.cr4, case.efer, 0, 0, pdpte, case.gva, case.access
        )
        overlay = Overlay(memory.ram.i64)
        result = walk(overlay, *args)
        assert code.walk(array, *args) == result, case
        flagged = {at: memory.get(at) for _, at, _ in case.entries}
        assert all(memory.ram.i64[slot] == word for slot, word in overlay.stores.items()), case
        for _, at, entry in case.entries:
            memory.put(at, entry)
        seen[outcome(case, result)] += 1
        _compare(memory, case, result)
        for level, at, entry in case.entries:
            if memory.get(at) != flagged[at]:
                # It sets A in a 1G leaf before it looks at rights and at bits 29:13: test_walk_unicorn.py.
                assert (level, result[0]) == (3, PAGE_FAULT), case
                assert memory.get(at) == entry | P.PTE_ACCESSED, case
    levels = range(1, 3 if memory.mode.levels == 3 else memory.mode.levels + 1)
    for kind in "rwx":
        assert all(seen["absent", level, kind] > 100 for level in levels)
        # Rights are judged at the leaf.
        assert seen["rights", 1, kind] > 100
    assert seen[OK, True, "r"] > 1000
    if memory.mode.bits == 9:
        assert all(seen["reserved", level, "r"] > 100 for level in levels)
    elif memory.mode.cr4:
        assert seen["reserved", 2, "r"] > 100


def _compare(memory: Memory, case: Case, result: tuple[int, ...]) -> None:
    status, hpa, code = result[0], result[1], result[3]
    if status == OK:  # mov eax, hpa; hlt
        memory.ram.b[hpa : hpa + 8] = (0xF4 << 40 | hpa << 8 | 0xB8).to_bytes(8, "little")
    vector, error_code, eax = memory.access(case)
    if status == OK:
        assert vector == (13 if case.access & ACCESS_USER else -1), case
        if case.access & ACCESS_WRITE:
            assert int.from_bytes(memory.ram.b[hpa : hpa + 4], "little") == MAGIC, case
        else:
            assert eax == (hpa if case.access & ACCESS_FETCH else (hpa << 8 | 0xB8) & 0xFFFFFFFF), case
    elif status == PAGE_FAULT:
        assert (vector, error_code) == (14, code), case
        assert memory.env.cr(2) == case.gva & (1 << 64) - 1, case
    else:
        assert (status, vector) == (NON_CANONICAL, 13), case


# -- what the manual says and Unicorn cannot confirm ---------------------------------------------


def one(
    entries: dict[int, int], mode: str, gva: int, *, size: int = 8, pdpte: int = 0, access: int = 0,
    efer: int = 0, frames: int = 64,
) -> tuple[int, ...]:
    """A walk from the root at 0x1000 over `entries` by address; compiled form and interpreted."""
    ram = Ram(64)
    for at, entry in entries.items():
        ram.b[at : at + size] = entry.to_bytes(size, "little")
    m = MODES[mode]
    args = (frames, P.CR0_PG | P.CR0_PE, 0x1000, m.cr4, m.efer | efer, 0, 0, to_signed(pdpte), gva, access)
    result = walk(Overlay(ram.i64), *args)
    code = native()
    assert code.walk(code.memory(ram.i64), *args) == result
    return result


def test_a_4m_page_has_40_address_bits_of_which_eight_lie_above_its_frame() -> None:
    pde = P.PTE_PRESENT | P.PTE_PS | 3 << 22 | 0xA5 << 13
    assert one({0x1004: pde}, "32-bit-pse", 0x412345, size=4, frames=1 << 29)[:2] == (
        OK, 0xA5 << 32 | 3 << 22 | 0x12345
    )
    assert one({0x1004: pde | 1 << 21}, "32-bit-pse", 0x412345, size=4)[3] == P.PFERR_PRESENT | P.PFERR_RSVD


def test_nxe_counts_in_32_bit_paging_neither_for_rights_nor_for_error_codes() -> None:
    for mode, code in (("32-bit", 0), ("pae", P.PFERR_FETCH)):
        assert one({}, mode, 0, pdpte=0x2001, access=ACCESS_FETCH, efer=P.EFER_NXE)[3] == code


def test_addresses_of_32_bit_modes_wrap_at_4_gib() -> None:
    for gva in (0x5000, 0x5000 | 1 << 32, 0x5000 - (1 << 32)):
        tables = {0x1000: 0x2001, 0x2014: 0x9001}
        assert one(tables, "32-bit", gva, size=4)[1] == 0x9000
        assert one({0x2000: 0x3001, 0x3028: 0x9001}, "pae", gva, pdpte=0x2001)[1] == 0x9000


def test_a_pdpte_register_that_is_not_present_faults_without_a_look_at_memory() -> None:
    result = one({0x1018: 0x2001}, "pae", 0xC0000000, pdpte=0, access=ACCESS_USER)
    assert result == (PAGE_FAULT, 0, 0, P.PFERR_USER, 0x1018, 3)


@pytest.mark.parametrize(("bit", "reserved"), [
    (0, False), (1, True), (2, True), (3, False), (4, False), (5, True), (8, True), (9, False), (11, False),
    (45, False), (46, True), (52, True), (63, True),
])
def test_reserved_bits_of_a_pdpte_are_the_manuals(bit: int, reserved: bool) -> None:
    assert P.pdpte_reserved(to_signed(P.PTE_PRESENT | 1 << bit)) is reserved


@pytest.mark.parametrize(("gva", "four", "five"), [
    (1 << 47, False, True), (-(1 << 47) - 1, False, True), (1 << 56, False, False), (-(1 << 56), False, True),
    (-(1 << 56) - 1, False, False), ((1 << 64) - 1, True, True), ((1 << 47) - 1, True, True),
])
def test_canonical_addresses_have_48_or_57_bits(gva: int, four: bool, five: bool) -> None:
    assert P.is_canonical(gva, 0) is four
    assert P.is_canonical(gva, P.CR4_LA57) is five


@pytest.mark.parametrize(("mode", "entries", "size", "leaf"), [
    ("32-bit", {0x1004: 0x2003, 0x2004: 0x9003}, 4, 0x2004),
    ("pae", {0x2010: 0x3003, 0x3008: 0x9003}, 8, 0x3008),
    ("5-level", {0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4010: 0x5003, 0x5008: 0x9003}, 8, 0x5008),
])
def test_tables_of_every_mode_are_reached_through_ept(
    mode: str, entries: dict[int, int], size: int, leaf: int
) -> None:
    ram = Ram(64)
    for at, entry in entries.items():
        ram.b[at : at + size] = entry.to_bytes(size, "little")
    ept, code, m = 40, native(), MODES[mode]
    for table, below in ((ept, ept + 1), (ept + 1, ept + 2), (ept + 2, ept + 3)):
        ram.i64[table * 512] = below << 12 | 7
    for frame in range(16):
        ram.i64[(ept + 3) * 512 + frame] = frame << 12 | 0x37
    frame = (ept + 3) * 512 + (leaf >> 12)
    eptp = ept << 12 | 0x1E
    args = (64, P.CR0_PG | P.CR0_PE, 0x1000, m.cr4, m.efer, eptp, 0, 0x2001, 0x401000, ACCESS_WRITE)
    for ept_rights, qualification in ((0x30, 0x81), (0x31, 0x8B), (0x37, None)):
        ram.i64[frame] = leaf & ~0xFFF | ept_rights
        result = walk(Overlay(ram.i64), *args)
        if qualification is None:
            assert result[:2] == (OK, 0x9000)
        else:
            # Absent; then readable, where the A and D flags are a write.
            assert result == (EPT_VIOLATION, 0, 0, qualification, leaf, 1)
        assert code.walk(code.memory(ram.i64), *args) == result
    assert int.from_bytes(ram.b[leaf : leaf + size], "little") == entries[leaf] | P.PTE_ACCESSED | P.PTE_DIRTY
