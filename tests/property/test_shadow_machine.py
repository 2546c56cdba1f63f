"""A guest whose tables KVM shadows never uses a translation that the architecture forbids.

Hypothesis chooses edits of the guest's tables at two levels, INVLPG, loads of CR3 with and without flush
between address spaces that share tables, CR0.WP, SMEP and SMAP, accesses at both privileges, and what the
host does to the memory behind pages and tables: swap, migration, KSM, DONTNEED, the dirty log, memslots. The
oracle is shadow_oracle.py; every truth is checked meanwhile. The switches of shadow paging that a vCPU alone
can meet are caught by the same machine.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.ksm import scan_until_quiet
from host_mm.madvise import (
    MADV_DONTNEED,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
    MADV_SOFT_OFFLINE,
    do_madvise,
)
from tests.kvm_model.shadow_machine import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PCIDE,
    CR4_SMAP,
    CR4_SMEP,
    DATA_GPA,
    DATA_HVA,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    NX,
    PAGE,
    PD_GPA,
    PDPT_GPA,
    PML4_GPA,
    PS,
    RW,
    A,
    D,
    P,
    ShadowMachine,
    U,
)
from tests.property.shadow_oracle import Oracle

STEPS = int(os.environ.get("REFAULT_STEPS", "5000"))
STEPS_AN_EXAMPLE = 40
ROOTS = (PML4_GPA | 1, 0x6000 | 2)
"""CR3: the second has a directory pointer table of its own, over the same directory."""
PDPT2_GPA, DIRECTORY_GPA, TABLES = 0x7000, 0x8000, (0x9000, 0xA000)
REGION = 0x4000_0000
SPAN = 2 << 20
ENTRIES = (0, 1, 8)
PAGES = [REGION + slot * SPAN + page * PAGE for slot in range(3) for page in ENTRIES]
DATA_PAGES = 12
OFFSET = 0x800
"""Data lies behind the entries that are used, so that tables can be data, too."""
TARGETS = [DATA_GPA + n * PAGE for n in range(DATA_PAGES)] + list(TABLES) + [DIRECTORY_GPA]

flags = st.sampled_from([
    P | RW | U | A | D, P | RW | U | A | D, P | RW | U, P | U | A | D, P | RW | A | D, P | A, 0,
    P | RW | U | A | D | NX, P | RW | U | A,
])
pages = st.sampled_from(PAGES)
kinds = st.sampled_from(["r", "r", "w", "x"])


class ShadowGuest(RuleBasedStateMachine):
    """One VM, two vCPUs; `root[vcpu]` is the CR3 value each runs on."""

    BREAKS: tuple[str, ...] = ()
    TRUTHS = True
    PROFILE = "linux-6.18"
    PREEMPT: int | None = None

    @initialize()
    def boot(self) -> None:
        m = self.m = ShadowMachine(
            vcpus=2, breaks=self.BREAKS, profile=self.PROFILE, data=4 << 20, ram=24 << 20, seed=self.PREEMPT,
            checks=self.TRUTHS,
        )
        self.oracle = Oracle(PAGES, [root & ~0xFFF for root in ROOTS], 2)
        self.root = [ROOTS[0], ROOTS[0]]
        self.user = [True, True]
        # Even, for in a table this is an entry, too.
        self.data = {gpa: 0x1000 + 2 * n for n, gpa in enumerate(TARGETS)}
        self.value = 0
        self.slot = True
        m.do(self._lay_out)
        for vcpu in range(2):
            m.cpu.regs[vcpu].update(efer=EFER_LME | EFER_LMA | EFER_NX, cr3=ROOTS[0])
            m.run(("cr4", CR4_PAE | CR4_PCIDE), ("cr0", CR0_PG | CR0_PE), vcpu=vcpu)
            m.run(("cr0", CR0_PG | CR0_PE | CR0_WP), vcpu=vcpu)

    def _lay_out(self) -> None:
        both = P | RW | U
        for root, pdpt in ((PML4_GPA, PDPT_GPA), (0x6000, PDPT2_GPA)):
            self._put(root, pdpt | both)
            self._put(pdpt, PD_GPA | both)
            self._put(pdpt + 8, DIRECTORY_GPA | both)
        self._put(PD_GPA, both | PS | A | D)
        for slot, table in ((0, TABLES[0]), (1, TABLES[1]), (2, TABLES[0])):
            self._put(DIRECTORY_GPA + 8 * slot, table | both)
        for table in TABLES:
            for page in ENTRIES:
                self._put(table + 8 * page, DATA_GPA + (page % DATA_PAGES) * PAGE | both | A | D)

        for gpa, value in self.data.items():
            self.m.put(gpa + OFFSET, value)

    def _put(self, gpa: int, value: int) -> None:
        self.m.put(gpa, value)
        self.oracle.edit(gpa, value)

    # -- the guest ------------------------------------------------------------------------------

    def _regs(self, vcpu: int) -> tuple[int, int]:
        regs = self.m.cpu.regs[vcpu]
        return regs["cr0"], regs["cr4"]

    @rule(vcpu=st.integers(0, 1), page=pages, kind=kinds)
    def access(self, vcpu: int, page: int, kind: str) -> None:
        self.value += 2
        gva = page + OFFSET
        out = self.m.run(("w", gva, self.value) if kind == "w" else (kind, gva), vcpu=vcpu)
        self._judge(vcpu, page, kind, out)

    def _judge(self, vcpu: int, page: int, kind: str, out: list[Any]) -> None:
        oracle, root = self.oracle, self.root[vcpu] & ~0xFFF
        cr0, cr4 = self._regs(vcpu)
        user = self.user[vcpu]
        if out and isinstance(out[0], tuple) and out[0][0] == "pf":
            code = oracle.fault(root, page, kind, user, cr0, cr4)
            assert code is not None, f"a page fault {out[0]} that the tables do not ask for"
            assert out[0] == ("pf", code, page + OFFSET)
            oracle.flush(vcpu, root, page)
            return
        found = oracle.walk(root, page)
        allowed = {t for t in oracle.may[vcpu, root][page] | ({found} if found else set())
                   if t.allows(kind, user, cr0, cr4)}
        assert allowed, f"an access that no translation since the last flush allows: {out}"
        if out and isinstance(out[0], tuple):
            assert out[0][0] == "mmio"
            assert not self.slot, "MMIO while the memory is there"
            return
        gpas = {t.gfn << 12 for t in allowed}
        if kind == "r":
            assert out[0] in {self.data[gpa] for gpa in gpas}
        elif kind == "w":
            where = {gpa for gpa in gpas if self._peek(gpa) == self.value}
            assert len(where) == 1, f"the store went to none of {[hex(gpa) for gpa in gpas]}"
            self.data[where.pop()] = self.value

    def _peek(self, gpa: int) -> int:
        value: int = self.m.do(lambda: self.m.get(gpa + OFFSET))
        return value

    def _edit(self, vcpu: int, gpa: int, value: int) -> None:
        # The identity mapping at 0 is the user's, too; a guest with SMAP would set EFLAGS.AC.
        regs = self.m.cpu.regs[vcpu]
        cs, regs["cs"] = regs["cs"], 0x33
        assert self.m.run(("w", gpa, value), vcpu=vcpu) == []
        regs["cs"] = cs
        self.oracle.edit(gpa, value)

    @rule(vcpu=st.integers(0, 1), table=st.sampled_from(TABLES), page=st.sampled_from(ENTRIES),
          frame=st.sampled_from(TARGETS), flag=flags)
    def edit_entry(self, vcpu: int, table: int, page: int, frame: int, flag: int) -> None:
        self._edit(vcpu, table + 8 * page, frame | flag)

    @rule(vcpu=st.integers(0, 1), page=pages, frame=st.sampled_from(TARGETS), flag=flags, kind=kinds,
          flush=st.sampled_from(["invlpg", "cr3", "both roots"]))
    def use_edit_flush_use(
        self, vcpu: int, page: int, frame: int, flag: int, kind: str, flush: str
    ) -> None:
        self.access(vcpu, page, kind)
        table = self.oracle.tables.get(DIRECTORY_GPA + 8 * (page - REGION >> 21), 0)
        if table & ~0xFFF not in TABLES:
            return
        self._edit(vcpu, (table & ~0xFFF) + 8 * (page >> 12 & 511), frame | flag)
        root = self.root[vcpu]
        if flush == "invlpg":
            self.invlpg(vcpu, page)
        else:
            for each in ROOTS if flush == "both roots" else ():
                self.load_cr3(vcpu, each, False)
            self.load_cr3(vcpu, root, False)
        self.access(vcpu, page, kind)

    @rule(vcpu=st.integers(0, 1), slot=st.integers(0, 2), what=st.sampled_from([*TABLES, 0, DATA_GPA | PS]),
          flag=flags)
    def edit_directory(self, vcpu: int, slot: int, what: int, flag: int) -> None:
        self._edit(vcpu, DIRECTORY_GPA + 8 * slot, what | flag if what else 0)

    @rule(vcpu=st.integers(0, 1), pdpt=st.sampled_from([PDPT_GPA, PDPT2_GPA]),
          flag=st.sampled_from([P | RW | U, P | U, P | U, P | RW]))
    def edit_the_way_to_the_directory(self, vcpu: int, pdpt: int, flag: int) -> None:
        self._edit(vcpu, pdpt + 8, DIRECTORY_GPA | flag)

    @rule(vcpu=st.integers(0, 1), page=pages)
    def invlpg(self, vcpu: int, page: int) -> None:
        self.m.run(("invlpg", page), vcpu=vcpu)
        self.oracle.flush(vcpu, self.root[vcpu] & ~0xFFF, page)

    @rule(vcpu=st.integers(0, 1), root=st.sampled_from(ROOTS), noflush=st.booleans())
    def load_cr3(self, vcpu: int, root: int, noflush: bool) -> None:
        self.m.run(("cr3", root, noflush), vcpu=vcpu)
        self.root[vcpu] = root
        if not noflush:
            self.oracle.flush(vcpu, root & ~0xFFF)

    @rule(vcpu=st.integers(0, 1), wp=st.booleans())
    def set_wp(self, vcpu: int, wp: bool) -> None:
        self.m.run(("cr0", CR0_PG | CR0_PE | (CR0_WP if wp else 0)), vcpu=vcpu)

    @rule(vcpu=st.integers(0, 1), bits=st.sampled_from([0, CR4_SMEP, CR4_SMAP, CR4_SMEP | CR4_SMAP]))
    def set_cr4(self, vcpu: int, bits: int) -> None:
        self.m.run(("cr4", CR4_PAE | CR4_PCIDE | bits), vcpu=vcpu)

    @rule(vcpu=st.integers(0, 1), user=st.booleans())
    def set_cpl(self, vcpu: int, user: bool) -> None:
        self.m.run(("cpl", 3 if user else 0), vcpu=vcpu)
        self.user[vcpu] = user

    # -- the host -------------------------------------------------------------------------------

    @rule(gpa=st.sampled_from(TARGETS[:DATA_PAGES]))
    def dontneed(self, gpa: int) -> None:
        self.m.madvise(gpa, PAGE, MADV_DONTNEED)
        self.data[gpa] = 0

    @rule(gpa=st.sampled_from([*TARGETS, PML4_GPA, PDPT2_GPA, PD_GPA]),
          advice=st.sampled_from([MADV_PAGEOUT, MADV_SOFT_OFFLINE]))
    def move(self, gpa: int, advice: int) -> None:
        self.m.do(lambda: self._advise(gpa, advice))
        self.m.do(self.m.host.swap_device.drain)

    def _advise(self, gpa: int, advice: int) -> None:
        with suppress(KernelError):
            # A page that is in use stays where it is.
            do_madvise(self.m.process.mm, self.m.hva(gpa), PAGE, advice)

    @rule(vcpu=st.integers(0, 1), page=pages, kind=kinds,
          gpa=st.sampled_from([*TABLES, DIRECTORY_GPA, PML4_GPA]),
          advice=st.sampled_from([MADV_PAGEOUT, MADV_SOFT_OFFLINE]))
    def move_a_table_under_the_walk(self, vcpu: int, page: int, kind: str, gpa: int, advice: int) -> None:
        self.value += 2
        gva = page + OFFSET
        task = self.m.spawn(("w", gva, self.value) if kind == "w" else (kind, gva), vcpu=vcpu)
        beside = self.m.sched.spawn("beside", lambda: self._advise(gpa, advice))
        self.m.finish(task, beside)
        self._judge(vcpu, page, kind, task.result)

    @rule()
    def merge(self) -> None:
        self.m.madvise(DATA_GPA, DATA_PAGES * PAGE, MADV_MERGEABLE)
        self.m.do(lambda: scan_until_quiet(self.m.host))

    @rule(on=st.booleans())
    def log(self, on: bool) -> None:
        if self.slot:
            self.m.do(lambda: self.m.kvm.set_user_memory_region(1, DATA_GPA, self.m.data, DATA_HVA, int(on)))

    @rule()
    def read_log(self) -> None:
        slot = self.m.kvm.slots().gfn_to_memslot(DATA_GPA >> 12)
        if slot is not None and slot.flags & 1:
            self.m.do(lambda: self.m.kvm.get_dirty_log(1))

    @rule()
    def delete_and_create_slot(self) -> None:
        self.m.do(lambda: self.m.kvm.set_user_memory_region(1, DATA_GPA, 0, DATA_HVA))
        self.m.do(lambda: self.m.kvm.set_user_memory_region(1, DATA_GPA, self.m.data, DATA_HVA))

    @invariant()
    def what_must_hold(self) -> None:
        if hasattr(self, "m") and self.m.truths is not None:
            self.m.do(self.m.truths.check)

    def teardown(self) -> None:
        if hasattr(self, "m") and self.m.truths is not None and not self.BREAKS:
            self.m.truths.sweep()
            self.m.truths.quiescent()


def run(machine: type[ShadowGuest], steps: int, seed: int, *, shrink: bool = True) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(with_seed(seed)(machine), settings=settings(
        settings.get_profile("machine"), max_examples=max(1, steps // STEPS_AN_EXAMPLE),
        stateful_step_count=STEPS_AN_EXAMPLE, phases=phases,
    ))


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("profile", "preempt"), [
    ("linux-6.18", None), ("linux-6.18", 3), ("linux-5.10", None),
])
def test_the_guest_uses_only_what_its_tables_allowed_since_its_last_flush(
    profile: str, preempt: int | None
) -> None:
    class Machine(ShadowGuest):
        PROFILE = profile
        PREEMPT = preempt

    run(Machine, STEPS // 5, 1)


SWITCHES = (
    "ignore-role-access", "ignore-role-wp", "link-unsynced", "no-invlpg-sync", "no-mark-parents",
    "no-root-sync", "no-table-protect", "no-track-write", "one-pt-access", "unsync-after-store",
)
SEEN_BY_THE_GUEST = ("no-invlpg-sync", "no-mark-parents", "no-root-sync", "no-table-protect")
"""What also shows in what the guest reads, in so many steps, without any truth asked."""


@pytest.mark.timeout(0)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_step_of_the_protocol_that_is_left_out_is_found(switch: str) -> None:
    class Machine(ShadowGuest):
        BREAKS = (switch,)

    with pytest.raises(BrokenTruth):
        run(Machine, 20_000, 1, shrink=False)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("switch", SEEN_BY_THE_GUEST)
def test_and_the_guest_sees_it_itself(switch: str) -> None:
    class Machine(ShadowGuest):
        BREAKS = (switch,)
        TRUTHS = False

    with pytest.raises(AssertionError):
        run(Machine, 20_000, 1, shrink=False)
