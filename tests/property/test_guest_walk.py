"""KVM's walk of guest tables (paging_tmpl.py) ends as the CPU's own (emu/cpu/walk.py), in every paging mode.

Random tables, control registers and accesses; translation, rights, error code and A and D flags are compared.
Where the kernel departs from the CPU the departure is a named exception below, which must also be needed.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import pytest

from emu.cpu import paging as P
from emu.cpu.walk import (
    ACCESS_AC,
    ACCESS_FETCH,
    ACCESS_IMPLICIT,
    ACCESS_USER,
    ACCESS_WRITE,
    OK,
    RIGHT_W,
    RIGHT_X,
    walk_guest,
)
from host_mm.ram import Ram
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.mmu.kvm_mmu import PFERR_IMPLICIT_ACCESS, kvm_init_mmu
from kvm_model.mmu.paging_tmpl import GuestWalker, walk_addr
from tests.kvm_model.machine import BASE, Machine

FRAMES = 16
ROOT = 1
CASES = 12_000

FLAGS_AFTER_A_FAULT = (
    "walk_addr_generic sets A once the access is allowed; the CPU sets it in each entry that it goes through"
)
PSE36_HAS_36_BITS = (
    "__reset_rsvds_bits_mask, pse36_gfn_delta: bits 20:17 of a 4M entry are reserved; SDM table 4-4 has "
    "address bits 39:36 there where MAXPHYADDR is 40 or more"
)
NX_WITHOUT_PAE = "walk_addr_generic reports a fetch where EFER.NX is set; SDM 4.7 wants CR4.PAE, too"


class Mode(NamedTuple):
    """`levels` tables (of PAE the top one is registers) of entries of `size` bytes."""

    levels: int
    size: int
    cr4: int
    efer: int

    @property
    def bits(self) -> int:
        return 9 if self.size == 8 else 10


MODES = {
    "32-bit": Mode(2, 4, 0, 0), "32-bit-pse": Mode(2, 4, P.CR4_PSE, 0), "pae": Mode(3, 8, P.CR4_PAE, 0),
    "4-level": Mode(4, 8, P.CR4_PAE, P.EFER_LME | P.EFER_LMA),
    "5-level": Mode(5, 8, P.CR4_PAE | P.CR4_LA57, P.EFER_LME | P.EFER_LMA),
}


class Case(NamedTuple):
    cr0: int
    cr4: int
    efer: int
    gva: int
    access: int
    entries: list[tuple[int, int]]
    large: bool


def random_case(rng: random.Random, mode: Mode) -> Case:
    def chance(p: float) -> bool:
        return rng.random() < p

    width = {2: 32, 3: 32, 4: 47, 5: 56}[mode.levels]
    gva = rng.getrandbits(width)
    entries = []
    large = False
    for level in range(mode.levels, 0, -1):
        table = ROOT + mode.levels - level
        index = gva >> (12 + mode.bits * (level - 1)) & (1 << mode.bits) - 1
        entry = 0 if chance(0.03) else P.PTE_PRESENT
        if mode.levels == 3 == level:
            entries.append((table << 12 | index * 8, entry | (table + 1) << 12))
            continue
        entry |= (0 if chance(0.2) else P.PTE_RW) | (0 if chance(0.25) else P.PTE_USER)
        entry |= rng.getrandbits(2) << 3 | rng.getrandbits(2) << 5 | rng.getrandbits(4) << 8
        leaf = level == 1 or (level <= (3 if mode.levels > 3 else 2) and chance(0.25))
        frame = rng.getrandbits(20 if mode.size == 4 else 34) if leaf else table + 1
        if leaf and level > 1:
            entry |= P.PTE_PS
            large = mode.size == 8 or mode.cr4 != 0
            if not large:
                frame = table + 1  # the bit is ignored
            elif not chance(0.2):
                frame &= ~((1 << mode.bits * (level - 1)) - 1)
        if mode.size == 8:
            entry |= P.PTE_XD if chance(0.1) else 0
            entry |= 1 << rng.randrange(P.MAXPHYADDR, 52) if chance(0.02) else 0
            entry |= 1 << rng.randrange(52, 63) if chance(0.1 if mode.efer else 0.03) else 0
            entry |= P.PTE_PS if level > 3 and chance(0.03) else 0
        if level == 1:
            entry |= rng.getrandbits(1) << 7
        entries.append((table << 12 | index * mode.size, entry | frame << 12))
        if leaf and (level == 1 or large):
            break
    access = rng.choice((0, ACCESS_WRITE, ACCESS_FETCH))
    if chance(0.5):
        access |= ACCESS_USER
    else:
        access |= (ACCESS_AC if chance(0.4) else 0)
        access |= ACCESS_IMPLICIT if not access & ACCESS_FETCH and chance(0.2) else 0
    return Case(
        P.CR0_PG | P.CR0_PE | rng.choice((0, P.CR0_WP)),
        mode.cr4 | rng.choice((0, P.CR4_SMEP)) | rng.choice((0, 0, P.CR4_SMAP)),
        mode.efer | rng.choice((0, P.EFER_NXE)), gva, access, entries, large,
    )


class Both:
    """The two walks over the same bytes: `ram` is the guest's memory for the CPU, the VM's for KVM."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.m = Machine(pages=FRAMES)
        self.m.kvm.tdp_enabled = False
        self.vcpu = self.m.vcpus[0]
        self.ram = Ram(FRAMES)
        self.exceptions: Counter[str] = Counter()
        self.seen: Counter[tuple[object, ...]] = Counter()

    def kvm_put(self, gpa: int, data: bytes) -> None:
        copy_to_user(self.m.process, BASE + gpa, data)

    def kvm_get(self, gpa: int) -> int:
        return int.from_bytes(copy_from_user(self.m.process, BASE + gpa, self.mode.size), "little")

    def run(self, case: Case) -> None:
        mode, size = self.mode, self.mode.size
        for gpa, entry in case.entries:
            data = entry.to_bytes(size, "little")
            self.ram.b[gpa : gpa + size] = data
            self.kvm_put(gpa, data)
        pdpte = case.entries[0][1] if mode.levels == 3 else 0
        status, gpa, rights, code, *_ = walk_guest(
            self.ram.i64, FRAMES, case.cr0, ROOT << 12, case.cr4, case.efer, 0, 0, pdpte, case.gva,
            case.access,
        )
        walker = self.kvm_walk(case, pdpte)
        ok = walker.fault.vector == 0
        outcome = "ok" if ok else "rsvd" if walker.fault.error_code & 8 else walker.fault.error_code & 1
        self.seen[outcome, walker.level, case.access & 0x12] += 1
        if ok != (status == OK):
            self.explain(PSE36_HAS_36_BITS, not ok and self.high_pse36(case))
        elif ok:
            assert walker.gfn == gpa >> 12, case
            self.compare_rights(case, walker.pte_access, rights)
            self.compare_flags(case, fault=False)
        else:
            if walker.fault.error_code != code:
                fetch = walker.fault.error_code == code | P.PFERR_FETCH
                if self.high_pse36(case):
                    self.explain(PSE36_HAS_36_BITS, True)
                else:
                    self.explain(NX_WITHOUT_PAE, fetch and size == 4 and bool(case.efer & P.EFER_NXE))
            self.compare_flags(case, fault=True)

    def kvm_walk(self, case: Case, pdpte: int) -> GuestWalker:
        self.m.cpu.regs[0] = {
            "cr0": case.cr0, "cr3": ROOT << 12, "cr4": case.cr4, "efer": case.efer,
            "rflags": 2 | (P.EFLAGS_AC if case.access & ACCESS_AC else 0),
        }
        self.vcpu.mmu.pae_pdptrs = [pdpte] * 4
        kvm_init_mmu(self.vcpu)
        pfec = case.access & (ACCESS_WRITE | ACCESS_USER | ACCESS_FETCH)
        walker = GuestWalker()
        pfec |= PFERR_IMPLICIT_ACCESS if case.access & ACCESS_IMPLICIT else 0
        assert walk_addr(walker, self.vcpu, case.gva, pfec) == (walker.fault.vector == 0)
        return walker

    def explain(self, why: str, holds: bool) -> None:
        assert holds, why
        self.exceptions[why] += 1

    def high_pse36(self, case: Case) -> bool:
        return self.mode.size == 4 and case.large and case.entries[0][1] & 0xF << 17 != 0

    def compare_rights(self, case: Case, pte_access: int, rights: int) -> None:
        """KVM's rights are those of the entries; what they come to for CPL 3 the CPU must say, too."""
        if case.access & ACCESS_USER:
            assert pte_access & 4, case
            assert bool(pte_access & 2) == bool(rights & RIGHT_W), case
            assert bool(pte_access & 1) == bool(rights & RIGHT_X), case

    def compare_flags(self, case: Case, *, fault: bool) -> None:
        size = self.mode.size
        for gpa, entry in case.entries:
            cpu = int.from_bytes(self.ram.b[gpa : gpa + size], "little")
            kvm = self.kvm_get(gpa)
            if kvm != cpu:
                self.explain(FLAGS_AFTER_A_FAULT, fault and kvm == entry and cpu == entry | P.PTE_ACCESSED)


@pytest.mark.parametrize("name", MODES)
def test_kvms_walk_ends_as_the_cpus_own(name: str) -> None:
    both = Both(MODES[name])
    rng = random.Random(name)

    def cases() -> None:
        for _ in range(CASES):
            both.run(random_case(rng, both.mode))

    both.m.do(cases)
    levels = range(1, 3 if name == "pae" else both.mode.levels + 1)
    for kind in (0, ACCESS_WRITE, ACCESS_FETCH):
        assert both.seen["ok", 1, kind] > 200
        assert all(both.seen[0, level, kind] > 20 for level in levels), "absent entries"
        assert both.seen[1, 1, kind] > 100, "rights"
    if both.mode.size == 8:
        assert all(both.seen["rsvd", level, 0] > 20 for level in levels)
    needed = {FLAGS_AFTER_A_FAULT}
    if both.mode.size == 4:
        needed |= {NX_WITHOUT_PAE} | ({PSE36_HAS_36_BITS} if both.mode.cr4 else set())
    assert set(both.exceptions) == needed
