"""Every protocol switch breaks a truth, and without the switch the same steps break none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from emu.devices.pci_bar import PciBar
from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import Task
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    MmuNotifierRange,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from host_mm.uaccess import copy_to_user
from kvm_model.breaks import BREAKS
from kvm_model.guest_memfd import GUEST_MEMFD_FLAG_MMAP
from kvm_model.mem_attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE
from kvm_model.memslots import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES
from kvm_model.mmu.page_track import (
    KvmPageTrackNotifierNode,
    kvm_page_track_register_notifier,
    kvm_write_track_add_gfn,
)
from tests.kvm_model.machine import BASE, PAGE, Machine
from tests.kvm_model.test_apic_access import reload_inside_a_bracket
from tests.kvm_model.test_breaks_shadow import SCENES as SHADOW_SCENES
from tests.kvm_model.test_pfncache import (
    give_a_cache_another_page,
    open_and_close_over_a_cache,
    refresh_inside_a_start,
)
from tests.kvm_model.test_smm import page_out_what_both_spaces_have


class SwitchOnce:
    """A strategy that lets everybody else run at the first point that `here` accepts."""

    def __init__(self, m: Machine, here: Callable[[Task, str], bool]) -> None:
        self.m = m
        self.here = here
        self.switched = False

    def switch_here(self, kind: str) -> bool:
        if not self.switched and self.here(self.m.sched.current, kind):
            self.switched = True
            return True
        return False

    def pick(self, runnable: deque[Task]) -> Task:
        return runnable.popleft()


def range_of(m: Machine, first: int, last: int) -> MmuNotifierRange:
    return mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE + first * PAGE, BASE + last * PAGE)


def dontneed(m: Machine, first: int = 0, pages: int = 1) -> None:
    do_madvise(m.mm, BASE + first * PAGE, pages * PAGE, MADV_DONTNEED)


def drop_a_mapped_page(m: Machine) -> None:
    m.run(("w", 0, 1))
    m.do(lambda: dontneed(m))
    m.truths.sweep()
    m.truths.quiescent()


def fault_during_a_bracket(m: Machine) -> None:
    """The bracket opens when the fault has its frame but not yet mmu_lock."""
    mark = len(m.events)
    raced: list[int] = []
    truths = m.truths

    def race(kind: str) -> None:
        truths.on_point(kind)
        if kind == "lock" and not raced and "gup_answer" in m.names(since=mark):
            raced.append(1)
            dontneed(m, 3)

    m.run(("w", 5 * PAGE, 1))
    mark = len(m.events)
    m.sched.set_on_point(race)
    m.run(("w", 3 * PAGE, 7))
    assert raced
    m.truths.sweep()


def reset_during_a_fault(m: Machine) -> None:
    """The frames are given back when the fault knows one of them but has not mapped it yet."""
    bar = PciBar(m.host, 1)
    gpa = 0x4000_0000
    m.do(lambda: m.kvm.set_user_memory_region(1, gpa, PAGE, bar.mmap(m.process)))
    raced: list[int] = []
    truths = m.truths

    def race(kind: str) -> None:
        truths.on_point(kind)
        if kind == "lock" and not raced and "gup_answer" in m.names(since=mark):
            raced.append(1)
            bar.revoke()

    m.run(("w", 0, 1))
    mark = len(m.events)
    m.sched.set_on_point(race)
    m.run(("w", gpa, 7))
    assert raced
    m.truths.sweep()


def two_brackets(m: Machine) -> None:
    first, second = range_of(m, 0, 2), range_of(m, 8, 9)
    m.do(lambda: mmu_notifier_invalidate_range_start(first))
    m.do(lambda: mmu_notifier_invalidate_range_start(second))
    task = m.spawn(("w", 0, 1))
    m.sched.run_until(lambda: task.done or "fault_retry" in m.names())
    if task.error is not None:
        raise task.error
    for range_ in (second, first):
        m.do(lambda range_=range_: mmu_notifier_invalidate_range_end(range_))
    m.finish(task)


def fast_fault_against_a_zap(m: Machine) -> None:
    """A page write-protected for the log is dropped between the fast fault's read and its cmpxchg."""
    m.run(("w", 0, 1))
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    m.sched.set_strategy(SwitchOnce(m, lambda task, kind: kind == "cmpxchg" and task.ctx.vcpu == 0))
    tasks = [m.spawn(("w", 0, 2)), m.sched.spawn("host", lambda: dontneed(m))]
    m.finish(*tasks)
    m.truths.sweep()


def bracket_over_a_memslot_update(m: Machine) -> None:
    m.run(("w", 0, 1))
    range_ = range_of(m, 0, 1)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    update = m.sched.spawn("update", lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    m.sched.run_until(lambda: update.done or bool(m.kvm.mn_memslots_update_wait.waiters))
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.finish(update)
    m.truths.quiescent()


def bracket_while_invalid_roots_are_zapped(m: Machine) -> None:
    m.run(("w", 0, 1))
    seen: list[str] = []

    def here(task: Task, kind: str) -> bool:
        # The first mmu_lock section of the update has invalidated the roots, the second will zap.
        if task.name == "update" and kind == "unlock" and any(r.invalid for r in m.kvm.tdp_mmu_roots):
            seen.append(kind)
            return True
        return False

    m.sched.set_strategy(SwitchOnce(m, here))
    update = m.sched.spawn("update", lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    m.finish(update, m.sched.spawn("host", lambda: dontneed(m)))
    assert seen


def fault_on_a_slot_being_deleted(m: Machine) -> None:
    m.run(("r", 0))

    def here(task: Task, kind: str) -> bool:
        slot = m.kvm.slots().gfn_to_memslot(0)
        return task.name == "update" and slot is not None and slot.flags & 1 << 16 != 0

    m.sched.set_strategy(SwitchOnce(m, here))
    update = m.sched.spawn("update", lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    task = m.spawn(("w", 0, 5))
    m.finish(update, task)


def reclaim_what_only_the_guest_wrote(m: Machine) -> None:
    def pageout() -> None:
        do_madvise(m.mm, BASE, PAGE, MADV_PAGEOUT)
        m.sched.sleep(10_000_000)

    m.run(("w", 0, 1))
    m.do(pageout)
    # The read fault maps the swapped-in page writable; the store below then takes no fault.
    m.run(("r", 0), ("w", 0, 2))
    m.do(pageout)
    assert m.run(("r", 0)) == [2]


def fault_beside_a_bracket(m: Machine) -> None:
    """The page is outside the range, its neighbour, which the host still maps, inside."""
    for gfn in (0, 1):
        m.do(lambda gfn=gfn: copy_to_user(m.process, BASE + gfn * PAGE, b"x"))
    range_ = range_of(m, 1, 2)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    m.run(("w", 0, 1))
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))


def page_from_disk(m: Machine) -> None:
    def pageout() -> None:
        do_madvise(m.mm, BASE, PAGE, MADV_PAGEOUT)
        m.sched.sleep(10_000_000)
        m.host.lru.lru_add_drain_all()
        m.host.reclaim(0, 0)

    m.kvm.async_pf = True
    m.run(("w", 0, 7))
    m.do(pageout)
    assert m.run(("r", 0)) == [7]


def conversion_during_a_fault(m: Machine) -> None:
    """The page becomes private when a fault has the shared one but not yet mmu_lock."""
    mark = len(m.events)
    raced: list[int] = []
    m.kvm.has_private_mem = True

    def race(kind: str) -> None:
        m.truths.on_point(kind)
        if kind == "lock" and not raced and "gup_answer" in m.names(since=mark):
            raced.append(1)
            m.kvm.set_memory_attributes(3 * PAGE, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)

    m.run(("w", 5 * PAGE, 1))
    mark = len(m.events)
    m.sched.set_on_point(race)
    m.run_raw(("w", 3 * PAGE, 7))
    assert raced
    m.truths.sweep()


def hole_in_guest_memfd(m: Machine) -> None:
    file = m.do(lambda: m.kvm.create_guest_memfd(PAGE, GUEST_MEMFD_FLAG_MMAP))
    m.do(lambda: m.kvm.set_user_memory_region2(4, 1 << 28, PAGE, BASE, KVM_MEM_GUEST_MEMFD, file))
    m.run(("w", 1 << 28, 1))
    m.do(lambda: file.a_ops.fallocate(file, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, PAGE))
    m.truths.sweep()


def fetch_the_log(m: Machine) -> None:
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, KVM_MEM_LOG_DIRTY_PAGES))
    for value in (1, 2):
        m.run(("w", 0, value))
        assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 1


def track_a_page_that_was_written(m: Machine) -> None:
    m.run(("w", 0x3000, 1))
    m.do(lambda: kvm_page_track_register_notifier(m.kvm, KvmPageTrackNotifierNode(), m.mm))
    m.do(lambda: kvm_write_track_add_gfn(m.kvm, 3))


SCENES: dict[str, tuple[Callable[[Machine], Any], set[str]]] = {
    "apf-no-wakeup": (page_from_disk, {"no-deadlock"}),
    "apic-reload-early": (reload_inside_a_bracket, {"vmcs-of-freed-frame"}),
    "attributes-no-bracket": (conversion_during_a_fault, {"spte-matches-host"}),
    "drop-ad": (reclaim_what_only_the_guest_wrote, {"dirty-dropped"}),
    "flush-after-unlock": (drop_a_mapped_page, {"flush-before-unlock"}),
    "gmem-no-unmap": (hole_in_guest_memfd, {"no-spte-in-bracket"}),
    "gpc-late-count": (refresh_inside_a_start, {"gpc-in-bracket"}),
    "gpc-map-before-invalidate": (give_a_cache_another_page, {"gpc-matches-host"}),
    "gpc-skip-invalidate": (open_and_close_over_a_cache, {"gpc-in-bracket"}),
    "ignore-invalid-roots": (bracket_while_invalid_roots_are_zapped, {"no-spte-in-bracket"}),
    "ignore-invalid-slot": (fault_on_a_slot_being_deleted, {"no-mmio-over-slot"}),
    "log-no-flush": (fetch_the_log, {"log-flushed"}),
    "ignore-smm-slots": (page_out_what_both_spaces_have, {"spte-matches-host", "spte-of-freed-frame"}),
    "no-flush": (drop_a_mapped_page, {"flush-before-unlock"}),
    "no-memslot-wait": (bracket_over_a_memslot_update, {"bracket-balance"}),
    "no-range-union": (two_brackets, {"no-spte-in-bracket"}),
    "no-retry": (fault_during_a_bracket, {"spte-matches-host"}),
    "no-track-flush": (track_a_page_that_was_written, {"write-tracked"}),
    "pfnmap-take-ref": (reset_during_a_fault, {"device-frames"}),
    "plain-store": (fast_fault_against_a_zap, {"spte-matches-host"}),
    "prefetch-in-bracket": (fault_beside_a_bracket, {"no-spte-in-bracket"}),
    "retry-before-gup-only": (fault_during_a_bracket, {"spte-matches-host"}),
    "seq-before-count": (drop_a_mapped_page, {"bracket-balance"}),
    "skip-end": (drop_a_mapped_page, {"bracket-balance"}),
    "skip-start": (drop_a_mapped_page, {"no-spte-in-bracket"}),
}


DIRECT_ONLY = {"prefetch-in-bracket"}
# Without the TDP MMU the leaf is dropped first.
TDP_ONLY = {"ignore-invalid-roots", "ignore-invalid-slot"}
CASES = [(name, "Y") for name in sorted(set(SCENES) - DIRECT_ONLY)]
CASES += [(name, "N") for name in sorted(set(SCENES) - TDP_ONLY)]


def test_every_switch_has_its_scene() -> None:
    # Those of shadow paging are in a file of their own.
    assert {*SCENES, *SHADOW_SCENES} == set(BREAKS)
    assert not set(SCENES) & set(SHADOW_SCENES)


@pytest.mark.parametrize(("name", "tdp_mmu"), CASES)
def test_a_switch_breaks_its_truth(name: str, tdp_mmu: str) -> None:
    scene, truths = SCENES[name]
    with pytest.raises(BrokenTruth) as info:
        scene(Machine(breaks=(name,), params={"kvm.tdp_mmu": tdp_mmu}))
    assert info.value.truth in truths
    # What names no event here is the VMM's own call, which nothing encloses.
    quiet = ("apf-no-wakeup", "drop-ad", "log-no-flush", "no-memslot-wait")
    assert info.value.seq is not None or name in quiet


@pytest.mark.parametrize(("name", "tdp_mmu"), CASES)
def test_without_the_switch_the_scene_is_sound(name: str, tdp_mmu: str) -> None:
    SCENES[name][0](Machine(params={"kvm.tdp_mmu": tdp_mmu}))
