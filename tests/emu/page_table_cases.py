"""Random guest page tables that aim at one outcome each, and a memory that remembers stores.

Used by the tests that run the walk against Unicorn's own, and compiled against interpreted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from emu.cpu import paging as P
from emu.cpu.walk import ACCESS_AC, ACCESS_FETCH, ACCESS_IMPLICIT, ACCESS_USER, ACCESS_WRITE

TABLE_FRAMES = {4: 1, 3: 2, 2: 3, 1: 4}
"""Frame of the one table of each level. Each case writes the entries on its path."""
PROBE_SLOT = 300
"""PML4 slot of the probe's own code, never used by a case."""
RAM_FRAMES = 3 << 18
"""3 GiB: 1G leaves at 0, 1G and 2G."""
DATA_FRAMES = range(64, 256)

LONG_MODE = P.EFER_LME | P.EFER_LMA
CR0_BASE = P.CR0_PG | P.CR0_PE | 0x10
CR4_BASE = P.CR4_PAE | 0x600


class Overlay:
    """The words of `base` with stores kept apart in `stores`."""

    __slots__ = ("base", "stores")

    def __init__(self, base: memoryview) -> None:
        self.base = base
        self.stores: dict[int, int] = {}

    def __getitem__(self, i: int) -> int:
        value = self.stores.get(i)
        return self.base[i] if value is None else value

    def __setitem__(self, i: int, value: int) -> None:
        self.stores[i] = value


@dataclass(slots=True)
class Case:
    """One access: registers, signed address, ACCESS_* bits, and the entries that lie on its path."""

    cr0: int
    cr4: int
    efer: int
    gva: int
    access: int
    leaf: int
    entries: dict[int, int] = field(default_factory=dict)

    @property
    def cr3(self) -> int:
        return TABLE_FRAMES[4] << 12


def to_signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


AIMS = [
    *(("ok", leaf, kind) for leaf in (1, 2, 3) for kind in "rwx"),
    *(("not-present", level, "") for level in (1, 2, 3, 4)),
    *(("reserved", level, "") for level in (1, 2, 3, 4)),
    *(("reserved-xd", level, "") for level in (1, 2, 3, 4)),
    *((why, leaf, "") for leaf in (1, 2, 3) for why in ("us", "rw-user", "rw-wp", "xd", "smep", "smap")),
    ("misaligned", 2, ""), ("misaligned", 3, ""), ("non-canonical", 0, ""),
    ("any", 1, ""), ("any", 2, ""), ("any", 3, ""),
]


def random_case(rng: random.Random, aim: tuple[str, int, str]) -> Case:
    """A case that most likely ends as `aim` says; what it does is for the walks to find out."""
    why, level, kind = aim
    leaf = level if level in (2, 3) and why not in ("not-present", "reserved", "reserved-xd") else 1
    if why in ("not-present", "reserved", "reserved-xd"):
        leaf = rng.choice([n for n in (1, 2, 3) if n <= level])
    noise = 0.15 if why == "any" else 0.0

    def chance(p: float) -> bool:
        return rng.random() < p

    user_page = chance(0.6)
    user_mode = user_page and chance(0.5)
    if not kind:
        kind = rng.choice("rwx")
    fetch, write = kind == "x", kind == "w"
    smep, smap, wp, nxe, ac = chance(0.5), chance(0.5), chance(0.5), chance(0.6), chance(0.5)
    implicit = chance(0.1)
    if why in ("ok", "misaligned") and not user_mode and user_page:
        smep, smap = False, False
    if why == "us":
        user_page, user_mode = False, True
    elif why == "rw-user":
        user_page, user_mode, write, fetch = True, True, True, False
    elif why == "rw-wp":
        user_mode, write, fetch, wp, ac, implicit = False, True, False, True, True, False
    elif why == "xd":
        nxe, fetch, write = True, True, False
    elif why == "smep":
        user_page, user_mode, smep, fetch, write = True, False, True, True, False
    elif why == "smap":
        user_page, user_mode, smap, fetch = True, False, True, False
        ac = implicit and ac
    elif why == "reserved-xd":
        nxe = False
    read_only = rng.randrange(leaf, 5) if why in ("rw-user", "rw-wp") or chance(noise) else 0
    xd = rng.randrange(leaf, 5) if why == "xd" or (nxe and not fetch and chance(0.1 + noise)) else 0
    no_user = rng.randrange(leaf, 5)

    gva = _random_gva(rng, leaf, why)
    case = Case(
        cr0=CR0_BASE | (P.CR0_WP if wp else 0),
        cr4=CR4_BASE | (P.CR4_SMEP if smep else 0) | (P.CR4_SMAP if smap else 0),
        efer=LONG_MODE | (P.EFER_NXE if nxe else 0),
        gva=to_signed(gva),
        access=(ACCESS_WRITE if write else 0) | (ACCESS_FETCH if fetch else 0)
        | (ACCESS_USER if user_mode else (ACCESS_AC if ac else 0) | (ACCESS_IMPLICIT if implicit else 0)),
        leaf=leaf,
    )
    aims = _EntryAims(why, level, leaf, noise, user_page, no_user, read_only, xd)
    for n in range(4, leaf - 1, -1):
        slot = (TABLE_FRAMES[n] << 9) + ((gva >> (12 + 9 * (n - 1))) & 511)
        case.entries[slot] = to_signed(_random_entry(rng, n, aims))
    return case


def _random_gva(rng: random.Random, leaf: int, why: str) -> int:
    gva = rng.getrandbits(48)
    if leaf > 1:
        # few places in a large page, so that few frames of the test's memory are touched
        base = gva & ~((1 << (12 + 9 * (leaf - 1))) - 1)
        gva = base | rng.choice((0x100000, 0x1F3000, 0x55000)) | (gva & 0xFF8)
    gva &= ~7
    if gva >> 39 == PROBE_SLOT:
        gva ^= 1 << 40
    if gva >> 47:
        gva |= 0xFFFF << 48
    if why == "non-canonical":
        gva ^= 1 << rng.randrange(48, 64)
    return gva


class _EntryAims(NamedTuple):
    """What the entries of one case shall come to; `no_user`, `read_only` and `xd` are levels (0: none)."""

    why: str
    level: int
    leaf: int
    noise: float
    user_page: bool
    no_user: int
    read_only: int
    xd: int


def _random_entry(rng: random.Random, n: int, aims: _EntryAims) -> int:
    """The entry of level `n`."""
    entry = rng.getrandbits(11) << 52 | rng.getrandbits(3) << 9 | rng.getrandbits(2) << 3
    entry |= P.PTE_PRESENT | P.PTE_RW | P.PTE_USER | (rng.getrandbits(4) & 0xB) << 5
    if n == 4:
        entry &= ~P.PTE_PS
    if n == aims.leaf:
        frame = rng.choice(DATA_FRAMES) if n == 1 else rng.randrange(1, 3) << (9 * (n - 1))
        if n > 1:
            entry |= P.PTE_PS
            frame |= rng.getrandbits(1)  # bit 12: PAT of a large page
            if aims.why == "misaligned":
                frame |= 1 << rng.randrange(1, 9 * (n - 1))
        elif rng.random() < 0.5:
            entry ^= P.PTE_PS  # PAT of a 4K page
    else:
        entry &= ~P.PTE_PS
        frame = TABLE_FRAMES[n - 1]
    entry |= frame << 12
    if n == aims.read_only or (aims.read_only and rng.random() < 0.2):
        entry &= ~P.PTE_RW
    if not aims.user_page and (n == aims.no_user or rng.random() < 0.3):
        entry &= ~P.PTE_USER
    if n == aims.xd:
        entry |= P.PTE_XD
    if (aims.why == "not-present" and n == aims.level) or rng.random() < aims.noise / 5:
        entry &= ~P.PTE_PRESENT
    if aims.why == "reserved" and n == aims.level:
        if n == 4 and rng.random() < 0.5:
            entry |= P.PTE_PS
        else:
            entry |= 1 << rng.randrange(P.MAXPHYADDR, 52)
    if aims.why == "reserved-xd" and n == aims.level:
        entry |= P.PTE_XD
    return entry
