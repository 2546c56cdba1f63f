"""pfncache.py, truths_gpc.py: check, refresh, invalidate, in the kernel's order; and what breaks them."""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EINVAL
from typing import Any

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    MmuNotifierRange,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from host_mm.uaccess import copy_from_user
from kvm_model.pfncache import GfnToPfnCache
from tests.kvm_model.machine import BASE, PAGE, Machine

GPA = 0x3010


def srcu(m: Machine, fn: Callable[[], Any]) -> Any:
    idx = m.kvm.srcu.read_lock()
    try:
        return fn()
    finally:
        m.kvm.srcu.read_unlock(idx)


def cache(m: Machine, gpa: int = GPA) -> GfnToPfnCache:
    gpc = GfnToPfnCache(m.kvm)
    assert m.do(lambda: srcu(m, lambda: gpc.activate(gpa, 8))) == 0
    return gpc


def refresh(m: Machine, gpc: GfnToPfnCache, length: int = 8) -> int:
    return int(m.do(lambda: srcu(m, lambda: gpc.refresh(length))))


def pageout(m: Machine, gfn: int) -> None:
    m.do(lambda: do_madvise(m.mm, BASE + gfn * PAGE, PAGE, MADV_PAGEOUT))


def bracket(m: Machine, first: int, last: int) -> MmuNotifierRange:
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE + first * PAGE, BASE + last * PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    return range_


def test_a_cache_is_dropped_by_a_bracket_and_refreshed_after_it() -> None:
    m = Machine()
    gpc = cache(m)
    assert gpc.check(8)
    assert not gpc.check(PAGE)
    m.run(("w", 0x3010, 7))
    pageout(m, 3)
    assert not gpc.check(8)
    assert refresh(m, gpc) == 0
    assert gpc.check(8)
    assert m.host.ram.u64[gpc.khva >> 3] == 7
    m.do(gpc.deactivate)
    assert not m.kvm.gpc_list
    assert not gpc.check(8)


def test_what_is_written_through_it_is_what_guest_and_vmm_read_and_is_logged() -> None:
    m = Machine(slot=False)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, 1))
    gpc = cache(m)

    def write() -> None:
        gpc.lock.read_lock()
        assert gpc.check(8)
        m.host.ram.write(gpc.khva, (77).to_bytes(8, "little"))
        gpc.mark_dirty_in_slot(m.vcpus[0])
        gpc.lock.read_unlock()

    m.do(write)
    assert m.run(("r", GPA)) == [77]
    assert m.do(lambda: copy_from_user(m.process, BASE + GPA, 1)) == bytes([77])
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 0b1000


def test_a_refresh_of_a_valid_cache_finds_it_as_it_is() -> None:
    m = Machine()
    gpc = cache(m)
    pfn = gpc.pfn
    mark = len(m.events)
    assert refresh(m, gpc) == 0
    assert m.do(lambda: srcu(m, lambda: gpc.activate(0x3ff8, 8))) == 0
    assert (gpc.pfn, gpc.khva & 0xFFF) == (pfn, 0xFF8)
    assert "gpc_refresh" not in m.names(since=mark)


def test_memslots_that_change_are_looked_up_again() -> None:
    m = Machine()
    gpc = cache(m)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, 1))
    assert gpc.valid
    assert not gpc.check(8)
    assert refresh(m, gpc) == 0
    assert gpc.check(8)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert refresh(m, gpc) == -EFAULT
    assert not gpc.valid


def test_addresses_and_lengths_that_are_refused() -> None:
    m = Machine()
    gpc = GfnToPfnCache(m.kvm)
    assert m.do(lambda: srcu(m, lambda: gpc.refresh(8))) == -EINVAL
    assert m.do(lambda: srcu(m, lambda: gpc.activate(0x3FF9, 8))) == -EINVAL
    assert m.do(lambda: srcu(m, lambda: gpc.activate_hva(1 << 60, 8))) == -EINVAL
    assert m.do(lambda: srcu(m, lambda: gpc.activate(1 << 40, 8))) == -EFAULT
    assert gpc.active
    assert not gpc.valid


def test_a_cache_by_host_address_cares_for_no_memslot() -> None:
    m = Machine()
    gpc = GfnToPfnCache(m.kvm)
    assert m.do(lambda: srcu(m, lambda: gpc.activate_hva(BASE + GPA, 8))) == 0
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert gpc.check(8)
    pageout(m, 3)
    assert not gpc.check(8)
    assert refresh(m, gpc) == 0


def test_a_cache_is_not_filled_while_a_bracket_is_open_anywhere() -> None:
    m = Machine()
    gpc = GfnToPfnCache(m.kvm)
    range_ = bracket(m, 40, 41)
    task = m.sched.spawn("gpc", lambda: srcu(m, lambda: gpc.activate(GPA, 8)))
    spin = m.sched.spawn("clock", lambda: [m.sched.yield_() for _ in range(20)])
    m.finish(spin)
    assert not task.done
    assert not gpc.valid
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.finish(task)
    assert gpc.valid
    assert m.last("gpc_refresh").args["rounds"] > 1


def test_the_caches_are_told_before_mmu_lock_is_taken() -> None:
    m = Machine()
    m.run(("w", GPA, 7))
    cache(m)
    mark = len(m.events)
    pageout(m, 3)
    names = m.names(since=mark)
    assert names.index("kvm_unmap_hva_range") < names.index("gpc_invalidate")
    assert names.index("gpc_invalidate") < names.index("mmu_invalidate_begin")


class SwitchIn:
    """A strategy that lets everybody else run once, at the first point of a kind while `fn` says so."""

    def __init__(self, m: Machine, fn: Callable[[str], bool]) -> None:
        self.m = m
        self.fn = fn
        self.done = False

    def switch_here(self, kind: str) -> bool:
        if self.done or not self.fn(kind):
            return False
        self.done = True
        return True

    def pick(self, runnable: Any) -> Any:
        return runnable.popleft()


def refresh_inside_a_start(m: Machine) -> None:
    """A refresh runs between the invalidation of the caches and mmu_invalidate_in_progress."""
    m.run(("w", GPA, 1))
    gpc = cache(m)
    m.sched.set_strategy(SwitchIn(m, lambda kind: m.kvm.mn_active_invalidate_count > 0 and not gpc.valid))
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE + 3 * PAGE, BASE + 4 * PAGE)
    start = m.sched.spawn("vmm", lambda: mmu_notifier_invalidate_range_start(range_))
    other = m.sched.spawn("gpc", lambda: srcu(m, lambda: gpc.refresh(8)))
    m.finish(start)
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.finish(other)
    assert gpc.check(8)


def test_a_refresh_inside_a_start_goes_round_until_the_end() -> None:
    m = Machine()
    refresh_inside_a_start(m)
    assert m.last("gpc_refresh").args["rounds"] > 1


def test_the_count_that_is_raised_later_is_too_late_for_the_caches() -> None:
    with pytest.raises(BrokenTruth, match="gpc-in-bracket"):
        refresh_inside_a_start(Machine(breaks=("gpc-late-count",)))


def open_and_close_over_a_cache(m: Machine) -> None:
    cache(m)
    range_ = bracket(m, 3, 4)
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))


def give_a_cache_another_page(m: Machine) -> None:
    m.run(("w", 0x5000, 1))
    pageout(m, 5)
    gpc = cache(m)
    assert m.do(lambda: srcu(m, lambda: gpc.activate(0x5000, 8))) == 0


def test_a_frame_that_is_freed_under_a_valid_cache_breaks_a_truth() -> None:
    m = Machine()
    gpc = cache(m)
    with pytest.raises(BrokenTruth, match="gpc-of-freed-frame"):
        m.truths.caches.frame_freed(gpc.pfn, 0)
