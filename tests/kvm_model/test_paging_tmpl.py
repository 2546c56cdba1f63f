"""KVM's walk of guest tables: what it reads, sets, announces and refuses in every paging mode.

That its answers are the CPU's own is tests/property/test_guest_walk.py's claim.
"""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.fork import fork_process
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from kvm_model.mmu import paging_tmpl as T
from kvm_model.mmu.invalidate import INVALID_GPA
from kvm_model.mmu.kvm_mmu import X86Exception, kvm_init_mmu
from kvm_model.mmu.mmu_internal import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from tests.kvm_model.machine import BASE, PAGE, Machine
from trace_events.stream import Listener

PG_WP = 1 << 31 | 1 << 16 | 1
PSE, PAE, LA57 = 1 << 4, 1 << 5, 1 << 12
LMA_NX = 1 << 8 | 1 << 10 | 1 << 11
P, W, U, A, D, PS = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
ROOT = 1
MODES = {
    "32-bit": (0, 0, 4, 2), "pae": (PAE, 0, 8, 3), "4-level": (PAE, LMA_NX, 8, 4),
    "5-level": (PAE | LA57, LMA_NX, 8, 5),
}
"""CR4, EFER, bytes of an entry, levels."""


class Tables:
    """A guest whose address 0x5000 is gfn 9 by tables in gfns 1, 2, ..."""

    def __init__(self, mode: str, *, flags: int = W | U, **machine: Any) -> None:
        cr4, efer, self.size, self.levels = MODES[mode]
        self.m = Machine(**machine)
        self.vcpu = self.m.vcpus[0]
        self.m.cpu.regs[0] = {"cr0": PG_WP, "cr3": ROOT << 12, "cr4": cr4, "efer": efer}
        self.entries: list[tuple[int, int]] = []
        table = ROOT
        for level in range(self.levels, 0, -1):
            at = table << 12 | (5 * self.size if level == 1 else 0)
            entry = (table + 1 if level > 1 else 9) << 12 | P
            if level != 3 or mode != "pae":
                entry |= flags
            else:
                self.m.cpu.regs[0]["pdptr0"] = entry
            self.put(at, entry)
            self.entries.append((at, entry))
            table += 1
        kvm_init_mmu(self.vcpu)

    def put(self, gpa: int, entry: int) -> None:
        data = entry.to_bytes(self.size, "little")
        self.m.do(lambda: copy_to_user(self.m.process, BASE + gpa, data))

    def get(self, gpa: int) -> int:
        data = self.m.do(lambda: copy_from_user(self.m.process, BASE + gpa, self.size))
        return int.from_bytes(data, "little")

    def walk(self, access: int, addr: int = 0x5000) -> T.GuestWalker:
        self.walker = T.GuestWalker()
        self.mark = len(self.m.events)
        self.ok = self.m.do(lambda: T.walk_addr(self.walker, self.vcpu, addr, access), "vcpu0")
        return self.walker

    def told(self) -> list[tuple[str, str]]:
        """(name, text) of the last walk's own events."""
        names = {t.name: t for t in T.TRACEPOINTS}
        return [
            (e.name, names[e.name].format(tuple(e.args.values())))
            for e in self.m.events[self.mark :] if e.name in names
        ]


@pytest.mark.parametrize("mode", MODES)
def test_a_write_sets_a_everywhere_and_d_in_the_leaf_and_each_step_is_told_in_order(mode: str) -> None:
    g = Tables(mode)
    w = g.walk(PFERR_WRITE_MASK | PFERR_USER_MASK)
    assert g.ok
    assert (w.gfn, w.level, w.pte_access) == (9, 1, 7)
    in_memory = g.entries[1:] if mode == "pae" else g.entries
    assert w.max_level == len(in_memory)
    for at, entry in in_memory[:-1]:
        assert g.get(at) == entry | A
    at, entry = g.entries[-1]
    assert g.get(at) == entry | A | D
    assert g.told() == [
        ("kvm_mmu_pagetable_walk", "addr 5000 pferr 6 W|U"),
        *(("kvm_mmu_paging_element", f"pte {entry:x} level {g.levels - n}")
          for n, (_, entry) in enumerate(g.entries)),
        *(("kvm_mmu_set_accessed_bit", f"gpa {at:x}") for at, _ in in_memory),
        ("kvm_mmu_set_dirty_bit", f"gpa {g.entries[-1][0]:x}"),
    ]
    if mode == "pae":
        assert g.get(g.entries[0][0]) == g.entries[0][1], "PDPTEs have no A"


@pytest.mark.parametrize("mode", MODES)
def test_a_read_of_a_clean_page_gives_no_right_to_write(mode: str) -> None:
    g = Tables(mode)
    assert g.walk(PFERR_USER_MASK).pte_access & 2 == 0
    assert g.get(g.entries[-1][0]) & (A | D) == A
    g.put(g.entries[-1][0], g.entries[-1][1] | A | D)
    assert g.walk(PFERR_USER_MASK).pte_access & 2


@pytest.mark.parametrize(("mode", "depth"), [(mode, n) for mode in MODES for n in range(MODES[mode][3])])
def test_an_entry_that_is_not_present_is_the_guests_own_fault(mode: str, depth: int) -> None:
    g = Tables(mode)
    at, entry = g.entries[depth]
    g.put(at, entry & ~P)
    if mode == "pae" and depth == 0:
        g.m.cpu.regs[0]["pdptr0"] = entry & ~P
    fault = g.walk(PFERR_WRITE_MASK).fault
    assert not g.ok
    assert (fault.vector, fault.error_code, fault.address) == (14, PFERR_WRITE_MASK, 0x5000)
    assert g.told()[-1] == ("kvm_mmu_walker_error", "pferr 2 W")
    assert all(g.get(at) & A == 0 for at, _ in g.entries), "a walk that fails sets nothing"


def test_refusals_say_present_and_fetches_say_so_where_execution_can_be_forbidden() -> None:
    g = Tables("4-level", flags=0)
    assert g.walk(PFERR_USER_MASK | PFERR_FETCH_MASK).fault.error_code == (
        PFERR_PRESENT_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK
    )
    g = Tables("32-bit", flags=0)
    assert g.walk(PFERR_USER_MASK | PFERR_FETCH_MASK).fault.error_code == PFERR_PRESENT_MASK | PFERR_USER_MASK


@pytest.mark.parametrize(("mode", "row", "bit", "rsvd"), [
    ("4-level", 0, 7, True), ("4-level", 0, 8, False), ("4-level", 0, 46, True), ("4-level", 3, 51, True),
    ("4-level", 3, 52, False), ("5-level", 0, 7, True), ("5-level", 1, 7, True),
    ("pae", 1, 46, True), ("pae", 2, 62, True), ("pae", 2, 63, True), ("pae", 1, 63, True),
    ("32-bit", 0, 7, False), ("32-bit", 1, 11, False),
])
def test_reserved_bits_are_those_of_the_mode(mode: str, row: int, bit: int, rsvd: bool) -> None:
    g = Tables(mode)
    at, entry = g.entries[row]
    g.put(at, entry | 1 << bit)
    w = g.walk(PFERR_USER_MASK)
    assert g.ok is not rsvd
    if rsvd:
        assert w.fault.error_code == PFERR_RSVD_MASK | PFERR_PRESENT_MASK | PFERR_USER_MASK


def test_a_4m_page_has_four_more_address_bits_and_five_reserved_ones() -> None:
    g = Tables("32-bit")
    g.m.cpu.regs[0]["cr4"] = PSE
    kvm_init_mmu(g.vcpu)
    g.put(ROOT << 12, P | W | U | PS | 3 << 22 | 5 << 13)
    w = g.walk(PFERR_USER_MASK)
    assert (w.level, w.gfn) == (2, 5 << 20 | 3 << 10 | 5)
    for bit in (17, 21):
        g.put(ROOT << 12, P | W | U | PS | 3 << 22 | 1 << bit)
        assert g.walk(PFERR_USER_MASK).fault.error_code & PFERR_RSVD_MASK
    g.m.cpu.regs[0]["cr4"] = 0
    kvm_init_mmu(g.vcpu)
    g.put(ROOT << 12, P | W | U | PS | 2 << 12)
    assert g.walk(PFERR_USER_MASK).gfn == 9, "without CR4.PSE the bit is ignored"


@pytest.mark.parametrize(("mode", "row", "level"), [("4-level", 2, 2), ("4-level", 1, 3), ("pae", 1, 2)])
def test_a_large_page_ends_the_walk_and_the_address_gives_the_rest_of_the_gfn(
    mode: str, row: int, level: int
) -> None:
    g = Tables(mode)
    g.put(g.entries[row][0], P | W | U | PS | 1 << 30)
    w = g.walk(PFERR_USER_MASK, 0x105000)
    assert (w.level, w.gfn) == (level, 1 << 18 | 0x105)
    g.put(g.entries[row][0], P | W | U | PS | 1 << 30 | 1 << 13)
    assert g.walk(PFERR_USER_MASK).fault.error_code & PFERR_RSVD_MASK


def test_an_entry_that_changes_before_its_a_flag_is_set_begins_the_walk_anew() -> None:
    g = Tables("4-level")
    at, entry = g.entries[-1]
    changed = []

    def meddle(event: Any) -> None:
        # Between the read of the leaf and the cmpxchg of its A flag.
        if event.name == "kvm_mmu_set_accessed_bit" and event.args["gpa"] == at and not changed:
            changed.append(True)
            pfn = g.m.process.mm.tlb.lookup(BASE + at, False)
            g.m.host.ram.write(pfn << 12 | at & 0xFFF, (entry & ~0xFF000 | 11 << 12).to_bytes(8, "little"))

    g.m.stream.listen(Listener(("*",), meddle, ancestors=False))
    w = g.walk(PFERR_USER_MASK)
    assert g.ok
    assert w.gfn == 11
    names = [name for name, _ in g.told()]
    assert names.count("kvm_mmu_pagetable_walk") == 1
    assert names.count("kvm_mmu_paging_element") == 8


def test_a_table_that_the_host_swapped_out_is_faulted_in() -> None:
    g = Tables("4-level")
    g.m.do(lambda: do_madvise(g.m.process.mm, BASE + 3 * PAGE, PAGE, MADV_PAGEOUT))
    w = g.walk(PFERR_USER_MASK)
    assert g.ok
    assert w.gfn == 9
    names = g.m.names(since=g.mark)
    assert names.index("kvm_mmu_paging_element") < names.index("swap_in")


def test_setting_a_in_a_table_shared_with_a_forked_child_copies_it_inside_the_walk() -> None:
    g = Tables("4-level")
    for gfn in range(1, 5):
        g.m.run(("r", gfn * PAGE))
    child = g.m.do(lambda: fork_process(g.m.process))
    g.walk(PFERR_USER_MASK)
    names = g.m.names(since=g.mark)
    first = names.index("kvm_mmu_set_accessed_bit")
    assert g.ok
    assert "kvm_unmap_hva_range" in names[first:]
    assert g.get(g.entries[0][0]) & A
    assert not int.from_bytes(g.m.do(lambda: copy_from_user(child, BASE + PAGE, 8)), "little") & A


def test_flags_set_in_a_logged_slot_are_in_its_log_and_in_a_read_only_one_stay_clear() -> None:
    g = Tables("4-level")
    g.m.do(lambda: g.m.kvm.set_user_memory_region(0, 0, g.m.pages * PAGE, BASE, KVM_MEM_LOG_DIRTY_PAGES))
    g.m.do(lambda: g.m.kvm.get_dirty_log(0))
    g.walk(PFERR_USER_MASK)
    assert g.m.do(lambda: g.m.kvm.get_dirty_log(0))[0] == 0b11110
    g = Tables("4-level", slot=False)
    g.m.do(lambda: g.m.kvm.set_user_memory_region(0, 0, g.m.pages * PAGE, BASE, KVM_MEM_READONLY))
    g.walk(PFERR_WRITE_MASK)
    assert g.ok
    assert [g.get(at) for at, _ in g.entries] == [entry for _, entry in g.entries]
    assert g.told()[-1][0] == "kvm_mmu_set_dirty_bit", "the kernel announces what it then leaves undone"


def test_a_table_without_a_memslot_is_not_present() -> None:
    g = Tables("4-level")
    at, _ = g.entries[0]
    g.put(at, 0x5555 << 12 | P | W | U)
    assert g.walk(PFERR_USER_MASK).fault.error_code == PFERR_USER_MASK
    assert g.told()[-2][0] == "kvm_mmu_paging_element"


def test_gpte_changed_sees_a_change_and_what_it_cannot_read_without_a_fault() -> None:
    g = Tables("4-level")
    w = g.walk(PFERR_USER_MASK)
    for level in (4, 3, 2, 1):
        assert not g.m.do(lambda level=level: T.gpte_changed(g.vcpu, w, level))
    at, entry = g.entries[-1]
    assert w.prefetch_ptes[5] == w.ptes[0] == entry | A
    g.put(at, entry)
    assert g.m.do(lambda: T.gpte_changed(g.vcpu, w, 1))
    g.m.do(lambda: do_madvise(g.m.process.mm, BASE + PAGE, PAGE, MADV_DONTNEED))
    assert g.m.do(lambda: T.gpte_changed(g.vcpu, w, 4))


def test_rights_on_the_way_are_kept_for_each_level() -> None:
    for breaks, want in ((frozenset(), [5, 7, 7]), (frozenset({"one-pt-access"}), [5, 5, 5])):
        g = Tables("4-level")
        g.m.kvm.breaks = breaks
        at, entry = g.entries[2]
        g.put(at, entry & ~W)
        assert g.walk(PFERR_USER_MASK).pt_access[:3] == want


def test_5_10_sets_flags_in_the_frame_that_gup_gives() -> None:
    g = Tables("4-level", profile="linux-5.10")
    g.walk(PFERR_WRITE_MASK)
    assert g.ok
    assert [g.get(at) & (A | D) for at, _ in g.entries] == [A, A, A, A | D]


def test_gva_to_gpa_translates_refuses_and_with_paging_off_gives_the_address_itself() -> None:
    g = Tables("4-level")
    assert g.m.do(lambda: T.gva_to_gpa(g.vcpu, 0x5123, PFERR_USER_MASK)) == 0x9123
    why = X86Exception()
    assert g.m.do(lambda: T.gva_to_gpa(g.vcpu, 0x6123, PFERR_USER_MASK, why)) == INVALID_GPA
    assert (why.vector, why.error_code, why.address) == (14, PFERR_USER_MASK, 0x6123)
    g.m.cpu.regs[0]["cr0"] = 1
    assert T.gva_to_gpa(g.vcpu, 0x6123, PFERR_USER_MASK) == 0x6123
