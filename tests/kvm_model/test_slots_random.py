"""Random memory slots: every change is answered as KVM answers it, and the guest sees the memory that it has.

Beside the model runs a reference: a dict of slots, the checks of kvm_set_memory_region in its order, and the
words of the VMM's memory. REFAULT_STEPS sets the steps over all machines (2,000; `make soak` sets more).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EEXIST, EINVAL, ENOENT
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from kvm_model.instrument import walk_sptes
from kvm_model.mmu.spte import is_last_spte, is_shadow_present_pte
from tests.kvm_model.machine import BASE, PAGE, Machine

STEPS = int(os.environ.get("REFAULT_STEPS", "2000"))
PER_RUN = 40
PAGES = 24
LOG, READONLY = 1, 2
TOP = 1 << 52
"""No guest address is so high."""

slots = st.integers(0, 4)
gfns = st.integers(0, 2 * PAGES)
Slot = tuple[int, int, int, int]
"""Base gfn, pages, host page, flags."""


class SlotMachine(RuleBasedStateMachine):
    """One VM with one vCPU."""

    config: ClassVar[dict[str, Any]] = {}

    @initialize()
    def begin(self) -> None:
        self.m = Machine(pages=PAGES, slot=False, **self.config)
        self.kvm = self.m.kvm
        self.slots: dict[int, Slot] = {}
        self.words: dict[int, int] = {}
        self.written: dict[int, set[int]] = {}
        self.count = 0
        self.generation = self.kvm.slots().generation
        # Without the TDP MMU KVM_RUN fails with ENOSPC until the first slot gives the MMU its pages.
        self.set_region(0, 0, PAGE, 0, 0)
        self.set_region(0, 0, 0, 0, 0)

    # -- the reference --------------------------------------------------------------------------

    def expected(self, slot: int, gpa: int, size: int, page: int, flags: int) -> int:
        """The errno of KVM_SET_USER_MEMORY_REGION, or 0."""
        id_, end = slot & 0xFFFF, gpa + size
        if flags & ~(LOG | READONLY) or size % PAGE or gpa % PAGE or slot >> 16 > 1 or end >= 1 << 64:
            return EINVAL
        old = self.slots.get(id_)
        if not size:
            return 0 if old else EINVAL
        gfn, pages = gpa // PAGE, size // PAGE
        if old:
            if old[1:3] != (pages, page) or (flags ^ old[3]) & READONLY:
                return EINVAL
            if (gfn, flags) == (old[0], old[3]):
                return 0
        if old is None or gfn != old[0]:
            for other, (base, count, _, _) in self.slots.items():
                if other != id_ and base < gfn + pages and gfn < base + count:
                    return EEXIST
        return EINVAL if end > TOP else 0

    def set_region(self, slot: int, gpa: int, size: int, page: int, flags: int) -> None:
        errno = self.expected(slot, gpa, size, page, flags)
        before = self.state()
        got, _ = self.ask(
            lambda: self.kvm.set_user_memory_region(slot, gpa, size, BASE + page * PAGE, flags)
        )
        assert got == errno, f"{got}, not {errno}: {slot} {gpa:#x} {size:#x} {page} {flags}"
        if errno:
            assert self.state() == before
            return
        old = self.slots.pop(slot, None)
        if size:
            self.slots[slot] = (gpa // PAGE, size // PAGE, page, flags)
        if not flags & LOG or not old or not old[3] & LOG or not size:
            self.written.pop(slot, None)
        if size and flags & LOG:
            self.written.setdefault(slot, set())

    def ask(self, call: Callable[[], Any]) -> tuple[int, Any]:
        """(errno or 0, the answer)."""
        try:
            return 0, self.m.do(call)
        except KernelError as exc:
            return exc.errno, None

    def state(self) -> list[tuple[int, Slot]]:
        return sorted(
            (s.id, (s.base_gfn, s.npages, (s.userspace_addr - BASE) // PAGE, s.flags))
            for s in self.kvm.slots()
        )

    def slot_of(self, gfn: int) -> tuple[int, Slot] | None:
        for id_, slot in self.slots.items():
            if slot[0] <= gfn < slot[0] + slot[1]:
                return id_, slot
        return None

    # -- what happens ---------------------------------------------------------------------------

    @rule(slot=slots, gfn=gfns, pages=st.sampled_from((1, 2, 4, 8)), page=st.integers(0, PAGES - 8),
          flags=st.sampled_from((0, 0, LOG, READONLY, LOG | READONLY)))
    def create(self, slot: int, gfn: int, pages: int, page: int, flags: int) -> None:
        self.set_region(slot, gfn * PAGE, pages * PAGE, page, flags)

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), gfn=gfns, flags=st.sampled_from((0, LOG)))
    def move_or_flag(self, data: st.DataObject, gfn: int, flags: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        base, pages, page, old = self.slots[slot]
        self.set_region(slot, (gfn if gfn % 2 else base) * PAGE, pages * PAGE, page, old & READONLY | flags)

    @rule(slot=slots, page=st.integers(0, 2))
    def delete(self, slot: int, page: int) -> None:
        self.set_region(slot, 0, 0, page, 0)

    @rule(slot=st.sampled_from((0, 1, 1 << 17)), gpa=st.sampled_from((0, 8, TOP, (1 << 64) - PAGE)),
          size=st.sampled_from((0, PAGE, PAGE + 1, 2 * PAGE)), flags=st.sampled_from((0, LOG, 1 << 3)))
    def bad(self, slot: int, gpa: int, size: int, flags: int) -> None:
        if self.expected(slot, gpa, size, 0, flags):
            self.set_region(slot, gpa, size, 0, flags)

    @rule(gfn=gfns, word=st.integers(0, 3))
    def store(self, gfn: int, word: int) -> None:
        self.count += 1
        gpa = gfn * PAGE + word * 8
        exit_ = self.m.run_raw(("w", gpa, self.count))
        found = self.slot_of(gfn)
        if found is None or found[1][3] & READONLY:
            assert (exit_.kind, exit_.write, exit_.gpa, exit_.data) == ("mmio", True, gpa, self.count)
            assert self.m.run_raw().kind == "hlt"
            return
        assert exit_.kind == "hlt", exit_
        id_, (base, _, page, flags) = found
        self.words[(page + gfn - base) * PAGE + word * 8] = self.count
        if flags & LOG:
            self.written[id_].add(gfn - base)

    @rule(gfn=gfns, word=st.integers(0, 3))
    def load(self, gfn: int, word: int) -> None:
        gpa = gfn * PAGE + word * 8
        self.m.cpu.out[0] = []
        exit_ = self.m.run_raw(("r", gpa))
        found = self.slot_of(gfn)
        if found is None:
            assert (exit_.kind, exit_.write, exit_.gpa) == ("mmio", False, gpa)
            self.m.vcpus[0].complete_mmio(0)
            assert self.m.run_raw().kind == "hlt"
            return
        assert exit_.kind == "hlt", exit_
        _, (base, _, page, _) = found
        assert self.m.cpu.out[0] == [self.words.get((page + gfn - base) * PAGE + word * 8, 0)]

    @rule(slot=slots)
    def get_log(self, slot: int) -> None:
        errno, bitmap = self.ask(lambda: self.kvm.get_dirty_log(slot))
        assert errno == (0 if slot in self.written else ENOENT)
        if errno:
            return
        bits = int.from_bytes(bitmap, "little")
        assert not bits >> self.slots[slot][1]
        missed = {page for page in self.written[slot] if not bits >> page & 1}
        assert not missed, f"slot {slot}: {missed} not in {bits:#x}"
        self.written[slot].clear()

    @rule(page=st.integers(0, PAGES - 1), pages=st.integers(1, 4))
    def page_out(self, page: int, pages: int) -> None:
        length = min(pages, PAGES - page) * PAGE
        self.m.do(lambda: do_madvise(self.m.mm, BASE + page * PAGE, length, MADV_PAGEOUT))

    @rule(page=st.integers(0, PAGES - 1))
    def discard(self, page: int) -> None:
        self.m.do(lambda: do_madvise(self.m.mm, BASE + page * PAGE, PAGE, MADV_DONTNEED))
        self.words = {at: value for at, value in self.words.items() if at // PAGE != page}

    # -- what must hold -------------------------------------------------------------------------

    @invariant()
    def slots_are_the_references(self) -> None:
        if not hasattr(self, "m"):
            return
        assert self.state() == sorted(self.slots.items())
        assert self.kvm.nr_memslot_pages == sum(slot[1] for slot in self.slots.values())
        logged = sum(slot[3] & LOG for slot in self.slots.values())
        assert self.kvm.nr_memslots_dirty_logging == logged
        generation = self.kvm.slots().generation
        assert generation >= self.generation
        assert generation % self.kvm.profile.nr_memslot_as_ids == 0
        self.generation = generation

    @invariant()
    def no_leaf_is_outside_of_slots(self) -> None:
        if not hasattr(self, "m"):
            return
        for gfn in range(3 * PAGES):
            steps = walk_sptes(self.kvm, gfn * PAGE)
            if steps and is_shadow_present_pte(steps[-1][2]) and is_last_spte(steps[-1][2], steps[-1][0]):
                assert self.slot_of(gfn) is not None, f"gfn {gfn:#x} is mapped and in no slot"

    def teardown(self) -> None:
        if hasattr(self, "m"):
            self.m.truths.sweep()
            self.m.truths.quiescent()


CONFIGS: dict[str, dict[str, Any]] = {
    "tdp": {"params": {"kvm.tdp_mmu": "Y"}},
    "direct": {"params": {"kvm.tdp_mmu": "N"}},
    "tdp of 5.10": {"params": {"kvm.tdp_mmu": "Y"}, "profile": "linux-5.10"},
    "direct of 5.10": {"params": {"kvm.tdp_mmu": "N"}, "profile": "linux-5.10"},
    "without A and D": {"params": {"kvm_intel.eptad": "0"}},
    "with the CPU's log": {"params": {"kvm_intel.pml": "Y"}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_slots_and_memory_are_the_references(name: str) -> None:
    machine = type("Configured", (SlotMachine,), {"config": CONFIGS[name]})
    runs = max(5, STEPS // PER_RUN // len(CONFIGS))
    run_state_machine_as_test(machine, settings=settings(max_examples=runs, stateful_step_count=PER_RUN))
