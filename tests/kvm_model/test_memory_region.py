"""KVM_SET_USER_MEMORY_REGION as the ioctl behaves."""

from __future__ import annotations

import errno

import pytest

from host_mm.kernel.errors import KernelError
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from kvm_model.memslots import KvmMemorySlot, KvmMemslots
from tests.kvm_model.machine import BASE, PAGE, Machine

MIB2 = 2 << 20


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((1, 0x100800, PAGE, BASE), errno.EINVAL),
        ((1, 0x100000, PAGE + 1, BASE), errno.EINVAL),
        ((1, 0x100000, PAGE, BASE + 8), errno.EINVAL),
        ((1, 0x100000, PAGE, BASE, 4), errno.EINVAL),
        ((1, 0x100000, PAGE, 1 << 47), errno.EINVAL),
        ((1, (1 << 64) - PAGE, 2 * PAGE, BASE), errno.EINVAL),
        ((1, 1 << 46, PAGE, BASE), errno.EINVAL),
        ((1, 0x100000, 0, BASE), errno.EINVAL),
        ((0x7FFC, 0x100000, PAGE, BASE), errno.EINVAL),
        ((2 << 16, 0x100000, PAGE, BASE), errno.EINVAL),
        ((1, 63 * PAGE, PAGE, BASE), errno.EEXIST),
        ((0, 0, 32 * PAGE, BASE), errno.EINVAL),
        ((0, 0, 64 * PAGE, BASE + PAGE), errno.EINVAL),
        ((0, 0, 64 * PAGE, BASE, 2), errno.EINVAL),
    ],
)
def test_bad_regions_are_refused_with_the_kernels_errno(args: tuple[int, ...], why: int) -> None:
    m = Machine()
    generation = m.kvm.slots().generation
    with pytest.raises(KernelError) as info:
        m.do(lambda: m.kvm.set_user_memory_region(*args))
    assert info.value.errno == why
    assert m.kvm.slots().generation == generation
    assert m.run(("w", 0, 1), ("r", 0)) == [1]


def test_slots_may_share_host_addresses_but_not_gfns() -> None:
    m = Machine()
    m.do(lambda: m.kvm.set_user_memory_region(1, 0x100000, 64 * PAGE, BASE))
    assert m.run(("w", 0x2000, 5), ("r", 0x102000)) == [5]
    m.truths.sweep()


def test_every_update_moves_the_generation_by_the_number_of_address_spaces() -> None:
    m = Machine()
    first = m.kvm.slots().generation
    m.do(lambda: m.kvm.set_user_memory_region(1, 0x100000, PAGE, BASE))
    assert m.kvm.slots().generation == first + 2
    m.do(lambda: m.kvm.set_user_memory_region(1, 0x100000, 0, BASE))
    # A delete publishes twice: INVALID, then gone.
    assert m.kvm.slots().generation == first + 6


def test_setting_the_same_region_again_changes_nothing() -> None:
    m = Machine()
    generation = m.kvm.slots().generation
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE))
    assert m.kvm.slots().generation == generation


def test_a_deleted_slot_leaves_no_spte_and_the_next_access_is_mmio() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7))
    assert m.truths.sweep() == 1
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert m.truths.sweep() == 0
    exit_ = m.run_raw(("r", 0x3000))
    assert exit_.kind == "mmio"
    assert exit_.gpa == 0x3000
    names = m.names(system="kvmmmu")
    assert "kvm_mmu_prepare_zap_page" in names[names.index("kvm_mmu_zap_all_fast"):]


def test_a_moved_slot_shows_its_bytes_at_the_new_place() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7))
    m.do(lambda: m.kvm.set_user_memory_region(0, 0x400000, 64 * PAGE, BASE))
    assert m.run(("r", 0x403000)) == [7]
    assert m.run_raw(("r", 0x3000)).kind == "mmio"


def test_a_read_only_slot_reads_as_memory_and_writes_as_mmio() -> None:
    m = Machine(slot=False)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, 2))
    assert m.run(("r", 0x3000)) == [0]
    exit_ = m.run_raw(("w", 0x3000, 9))
    assert (exit_.kind, exit_.write, exit_.data) == ("mmio", True, 9)
    assert m.run(("r", 0x3000)) == [0]


def test_an_update_waits_for_open_brackets() -> None:
    m = Machine()
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE, BASE + PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    update = m.sched.spawn("update", lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    m.sched.run_until(lambda: bool(m.kvm.mn_memslots_update_wait.waiters))
    assert not update.done
    assert m.kvm.slots().gfn_to_memslot(0) is not None
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.finish(update)
    assert m.kvm.slots().gfn_to_memslot(0) is None


def test_a_fault_on_an_invalid_slot_retries() -> None:
    m = Machine()
    m.run(("r", 0x3000))
    slot = m.kvm.slots().gfn_to_memslot(3)
    assert slot is not None
    slot.flags |= 1 << 16
    task = m.spawn(("w", 0x3000, 1), ("call", lambda: None))
    m.sched.run_until(lambda: "fault_retry" in m.names())
    assert m.last("fault_retry").args["reason"] == "invalid-slot"
    slot.flags &= ~(1 << 16)
    m.finish(task)


def test_overlapping_host_ranges_are_all_found() -> None:
    slots = KvmMemslots(0)
    for n, (start, pages) in enumerate(((0, 100), (10, 2), (50, 5), (200, 1))):
        slots.replace(None, KvmMemorySlot(0, n, n * 1000, pages, 0, start * PAGE))
    found = [s.id for s in slots.in_hva_range(52 * PAGE, 53 * PAGE - 1)]
    assert found == [0, 2]
    assert [s.id for s in slots.in_hva_range(0, 300 * PAGE)] == [0, 1, 2, 3]
    assert list(slots.in_hva_range(120 * PAGE, 150 * PAGE)) == []


def test_large_pages_are_forbidden_where_slot_ends_or_addresses_do_not_align() -> None:
    m = Machine(slot=False)

    def infos(gpa: int, size: int, hva: int) -> list[list[int]]:
        m.do(lambda: m.kvm.set_user_memory_region(1, gpa, size, hva))
        slot = m.kvm.slots().id_hash[1]
        out = [list(info) for info in slot.lpage_info]
        m.do(lambda: m.kvm.set_user_memory_region(1, gpa, 0, hva))
        return out

    assert infos(0, 2 * MIB2, BASE) == [[0, 0], [1]]
    assert infos(PAGE, 3 * MIB2, BASE + PAGE)[0] == [1, 0, 0, 1]
    assert infos(0, 3 * MIB2, BASE + PAGE)[0] == [1, 1, 1]


def test_a_generation_that_wraps_zaps_everything() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7))
    for pair in m.kvm.memslot_sets:
        for slots in pair:
            slots.generation = (1 << 19) - 2 + (slots.generation & 1)
    m.do(lambda: m.kvm.set_user_memory_region(1, 0x100000, PAGE, BASE))
    assert m.truths.sweep() == 0
    assert m.run(("r", 0x3000)) == [7]
