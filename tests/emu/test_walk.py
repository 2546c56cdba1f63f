"""Single claims about the walk that no other walker can confirm."""

from __future__ import annotations

import random

import pytest

from emu.cpu import paging as P
from emu.cpu.compile import native
from emu.cpu.walk import (
    ACCESS_AC,
    ACCESS_FETCH,
    ACCESS_IMPLICIT,
    ACCESS_READ,
    ACCESS_USER,
    ACCESS_WRITE,
    EPT_VIOLATION,
    NON_CANONICAL,
    OK,
    OUTSIDE_RAM,
    PAGE_FAULT,
    STATUS_NAMES,
    walk,
)
from host_mm.ram import Ram
from tests.emu.page_table_cases import Overlay

FRAMES = 64
CR0 = P.CR0_PG | P.CR0_PE | P.CR0_WP
LONG = P.EFER_LME | P.EFER_LMA | P.EFER_NXE
MODES = (
    (P.CR4_PAE, LONG), (P.CR4_PAE | P.CR4_LA57, LONG), (P.CR4_PAE, P.EFER_NXE), (0, P.EFER_NXE),
    (P.CR4_PSE, 0),
)
FULL = P.PTE_PRESENT | P.PTE_RW | P.PTE_USER | P.PTE_ACCESSED | P.PTE_DIRTY


@pytest.fixture
def ram() -> Ram:
    """Address 0 mapped to frame 5, through frames 1 (PML4) to 4."""
    ram = Ram(FRAMES)
    for table in (1, 2, 3, 4):
        ram.i64[table * 512] = (table + 1) << 12 | FULL
    return ram


class Bounded(Overlay):
    """Refuses indices outside RAM, negative ones too."""

    def __getitem__(self, i: int) -> int:
        assert 0 <= i < FRAMES * 512
        return super().__getitem__(i)


def both(ram: Ram, access: int, *, cr0: int = CR0, cr4: int = P.CR4_PAE, efer: int = LONG, eptp: int = 0,
         gva: int = 0x123, cr3: int = 0x1000, pdpte: int = 0) -> tuple[int, ...]:
    """The result, after the compiled form on a copy agreed on it and on memory."""
    copy = Ram(FRAMES)
    copy.b[:] = ram.b
    args = (FRAMES, cr0, cr3, cr4, efer, eptp, 0, pdpte, gva, access)
    result = walk(ram.i64, *args)
    code = native()
    assert code.walk(code.memory(copy.i64), *args) == result
    assert copy.b == ram.b
    return result


@pytest.mark.parametrize(("access", "ok"), [
    (ACCESS_USER, True), (ACCESS_READ, False), (ACCESS_AC, True), (ACCESS_IMPLICIT, False),
    (ACCESS_IMPLICIT | ACCESS_AC, False),
])
def test_smap_lets_ac_through_but_never_an_implicit_access(ram: Ram, access: int, ok: bool) -> None:
    for write in (0, ACCESS_WRITE):
        result = both(ram, access | write, cr4=P.CR4_PAE | P.CR4_SMAP)
        assert result[0] == (OK if ok else PAGE_FAULT)
        if not ok:
            assert result[3] == P.PFERR_PRESENT | write


def test_smap_leaves_fetches_alone_and_grants_them_no_reading(ram: Ram) -> None:
    status, _, rights, *_ = both(ram, ACCESS_FETCH, cr4=P.CR4_PAE | P.CR4_SMAP)
    assert (status, rights) == (OK, 4)


def test_cr0_wp_clear_lets_the_supervisor_write_and_sets_dirty(ram: Ram) -> None:
    ram.i64[4 * 512] = 5 << 12 | P.PTE_PRESENT
    assert both(ram, ACCESS_WRITE)[0] == PAGE_FAULT
    assert ram.i64[4 * 512] == 5 << 12 | P.PTE_PRESENT
    assert both(ram, ACCESS_WRITE, cr0=CR0 & ~P.CR0_WP)[0] == OK
    assert ram.i64[4 * 512] == 5 << 12 | P.PTE_PRESENT | P.PTE_ACCESSED | P.PTE_DIRTY


def test_a_flags_of_upper_entries_are_set_though_the_walk_faults_below(ram: Ram) -> None:
    for table in (1, 2, 3):
        ram.i64[table * 512] &= ~P.PTE_ACCESSED
    ram.i64[4 * 512] = 0
    assert both(ram, ACCESS_READ)[0] == PAGE_FAULT
    assert all(ram.i64[table * 512] & P.PTE_ACCESSED for table in (1, 2, 3))


def test_a_write_denied_sets_neither_a_nor_d_in_the_leaf(ram: Ram) -> None:
    ram.i64[4 * 512] = 5 << 12 | P.PTE_PRESENT | P.PTE_USER
    assert both(ram, ACCESS_WRITE | ACCESS_USER)[3] == P.PFERR_PRESENT | P.PFERR_WRITE | P.PFERR_USER
    assert ram.i64[4 * 512] == 5 << 12 | P.PTE_PRESENT | P.PTE_USER


@pytest.mark.parametrize("gva", [1 << 47, -(1 << 47) - 1, (1 << 63) - 1, -(1 << 63)])
def test_non_canonical_addresses_are_no_page_faults(ram: Ram, gva: int) -> None:
    assert both(ram, ACCESS_READ, gva=gva) == (NON_CANONICAL, 0, 0, 0, 0, 0)


def test_bits_of_cr3_that_are_no_address_are_ignored(ram: Ram) -> None:
    assert both(ram, ACCESS_READ, cr3=0x1000 | 0xFFF | 3 << 61)[0] == OK


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_guest_tables_that_point_outside_ram_are_not_followed(ram: Ram, level: int) -> None:
    for frame in (FRAMES, 1 << 20, (1 << 34) - 1):
        ram.i64[(5 - level) * 512] = frame << 12 | FULL
        result = both(ram, ACCESS_WRITE)
        assert (result[0], result[1] >> 12, result[5]) == (OUTSIDE_RAM, frame, max(level - 1, 0))
    assert both(ram, ACCESS_READ, cr3=FRAMES << 12)[:2] == (OUTSIDE_RAM, FRAMES << 12)


def test_hostile_tables_never_lead_outside_ram() -> None:
    """Every word is hostile. Indices of the interpreted walk are checked; the compiled one must agree."""
    rng = random.Random(3)
    ram = Ram(FRAMES)
    code = native()
    array = code.memory(ram.i64)
    seen = set()
    for round_ in range(20):
        for i in range(FRAMES * 512):
            frame = rng.choice((rng.randrange(FRAMES), rng.randrange(FRAMES), FRAMES, rng.getrandbits(34)))
            word = frame << 12 | rng.choice((7, 7, 0x67, 0xE7, 0xB7, 0x37, 0x37, rng.getrandbits(12)))
            ram.i64[i] = word - (1 << 63) if rng.random() < 0.05 else word
        before = bytes(ram.b)
        for _ in range(2000):
            eptp = rng.choice((0, rng.randrange(FRAMES + 1) << 12 | rng.choice((0x1E, 0x5E))))
            access = rng.choice((ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH)) | rng.choice((0, ACCESS_USER))
            cr4, efer = rng.choice(MODES)
            pdpte = rng.getrandbits(18) << 12 | rng.getrandbits(1)
            args = (
                FRAMES, CR0, rng.getrandbits(18), cr4, efer, eptp, 0, pdpte, rng.getrandbits(47), access
            )
            result = walk(Bounded(ram.i64), *args)
            assert code.walk(array, *args) == result
            seen.add(STATUS_NAMES[result[0]])
            if result[0] == OK:
                assert 0 <= result[1] < FRAMES << 12
        after = bytes(ram.b)
        ram.b[:] = before
        assert after != before or round_ > 0
    assert {"ok", "page-fault", "ept-violation", "ept-misconfig", "outside-ram"} <= seen


def test_an_ept_violation_on_a_paging_structure_names_the_entry(ram: Ram) -> None:
    result = both(ram, ACCESS_READ, eptp=10 << 12 | 0x1E, gva=3 << 39 | 0x5008)
    assert result == (EPT_VIOLATION, 0, 0, 0x81, 0x1018, 4)
