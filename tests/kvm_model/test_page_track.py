"""mmu/page_track.py: counting trackers, protecting their pages, telling the nodes of the head."""

from __future__ import annotations

from errno import EINVAL, ESRCH
from typing import Any

import pytest

from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.uaccess import copy_from_user
from kvm_model.instrument import walk_sptes
from kvm_model.memslots import kvm_gfn_is_write_tracked, lpage_disallowed
from kvm_model.mmu.page_track import (
    KvmPageTrackNotifierNode,
    kvm_page_track_register_notifier,
    kvm_page_track_unregister_notifier,
    kvm_write_track_add_gfn,
    kvm_write_track_remove_gfn,
)
from kvm_model.mmu.spte import PT_WRITABLE_MASK
from tests.kvm_model.direct_machine import direct_huge, dontneed
from tests.kvm_model.machine import BASE, PAGE, Machine

MMUS = [
    pytest.param("linux-6.18", "Y", id="6.18-tdp"), pytest.param("linux-6.18", "N", id="6.18-direct"),
    pytest.param("linux-5.10", "Y", id="5.10-tdp"), pytest.param("linux-5.10", "N", id="5.10-direct"),
]


class Node(KvmPageTrackNotifierNode):
    def __init__(self, log: list[Any], name: str = "n") -> None:
        self.log = log
        self.name = name

    def track_write(self, vcpu: Any, gpa: int, new: bytes) -> None:
        self.log.append((self.name, gpa, int.from_bytes(new, "little")))

    def track_remove_region(self, gfn: int, npages: int) -> None:
        self.log.append((self.name, "removed", gfn, npages))

    def track_flush_slot(self, kvm: Any, slot: Any) -> None:
        self.log.append((self.name, "flush", slot.base_gfn, slot.npages))


def machine(profile: str = "linux-6.18", tdp: str = "Y", **options: Any) -> tuple[Machine, list[Any], Node]:
    m = Machine(profile=profile, params={"kvm.tdp_mmu": tdp}, **options)
    log: list[Any] = []
    node = Node(log)
    assert m.do(lambda: kvm_page_track_register_notifier(m.kvm, node, m.mm)) == 0
    return m, log, node


def track(m: Machine, gfn: int) -> int:
    return int(m.do(lambda: kvm_write_track_add_gfn(m.kvm, gfn)))


def untrack(m: Machine, gfn: int) -> int:
    return int(m.do(lambda: kvm_write_track_remove_gfn(m.kvm, gfn)))


def slot_of(m: Machine, gfn: int) -> Any:
    return m.kvm.slots().gfn_to_memslot(gfn)


@pytest.mark.parametrize(("profile", "tdp"), MMUS)
def test_a_write_to_a_tracked_page_is_emulated_and_told(profile: str, tdp: str) -> None:
    m, log, _ = machine(profile, tdp)
    m.run(("w", 0x3000, 1))
    assert track(m, 3) == 0
    assert not m.leaf(3) & PT_WRITABLE_MASK
    assert m.run(("w", 0x3008, 7), ("r", 0x3008), ("w", 0x2000, 9)) == [7]
    assert log == [("n", 0x3008, 7)]
    assert copy_from_user_of(m, 0x3008) == 7
    emulated = [e for e in m.events if e.name == "kvm_emulate_insn"]
    assert len(emulated) == 1
    assert m.vcpus[0].stat["pf_emulate"] == 1
    m.truths.sweep()


def copy_from_user_of(m: Machine, gpa: int) -> int:
    return int.from_bytes(m.do(lambda: copy_from_user(m.process, BASE + gpa, 8)), "little")


@pytest.mark.parametrize(("profile", "tdp"), MMUS)
def test_what_is_tracked_before_it_is_mapped_is_mapped_without_w(profile: str, tdp: str) -> None:
    m, log, _ = machine(profile, tdp)
    track(m, 3)
    m.run(("w", 0x3000, 5), ("w", 0x3010, 6))
    assert log == [("n", 0x3000, 5), ("n", 0x3010, 6)]
    assert m.leaf(3) & 1
    assert not m.leaf(3) & (PT_WRITABLE_MASK | m.kvm.spte.mmu_writable)


@pytest.mark.parametrize(("profile", "tdp"), MMUS)
def test_a_notifiers_zap_does_not_end_tracking(profile: str, tdp: str) -> None:
    m, log, _ = machine(profile, tdp)
    m.run(("w", 0x3000, 1))
    track(m, 3)
    dontneed(m, 3)
    assert m.run(("w", 0x3000, 8), ("r", 0x3000)) == [8]
    assert log == [("n", 0x3000, 8)]


@pytest.mark.parametrize(("profile", "tdp"), MMUS)
def test_the_last_tracker_gives_the_right_to_write_back(profile: str, tdp: str) -> None:
    m, log, _ = machine(profile, tdp)
    m.run(("w", 0x3000, 1))
    track(m, 3)
    track(m, 3)
    untrack(m, 3)
    m.run(("w", 0x3000, 2))
    assert log == [("n", 0x3000, 2)]
    untrack(m, 3)
    m.run(("w", 0x3000, 3))
    assert len(log) == 1
    assert m.leaf(3) & PT_WRITABLE_MASK
    assert not kvm_gfn_is_write_tracked(slot_of(m, 3), 3)


def test_a_stale_writable_translation_is_flushed_before_tracking_begins() -> None:
    m, _, _ = machine()
    m.run(("w", 0x3000, 1))
    before = m.kvm.stat["remote_tlb_flush_requests"]
    track(m, 3)
    assert m.kvm.stat["remote_tlb_flush_requests"] == before + 1
    track(m, 3)
    assert m.kvm.stat["remote_tlb_flush_requests"] == before + 1


@pytest.mark.parametrize("tdp", ["Y", "N"])
def test_no_huge_page_maps_a_tracked_page(tdp: str) -> None:
    m = direct_huge(params={"kvm.tdp_mmu": tdp})
    log: list[Any] = []
    m.do(lambda: kvm_page_track_register_notifier(m.kvm, Node(log), m.mm))
    m.run(("w", 0x3000, 1))
    assert walk_sptes(m.kvm, 0x3000)[-1][0] == 2
    track(m, 3)
    assert lpage_disallowed(slot_of(m, 3), 3, 2)
    m.run(("w", 0x4000, 2), ("w", 0x3000, 3))
    assert walk_sptes(m.kvm, 0x4000)[-1][0] == 1
    assert log == [("n", 0x3000, 3)]
    untrack(m, 3)
    assert not lpage_disallowed(slot_of(m, 3), 3, 2)
    m.truths.sweep()


def test_several_nodes_on_one_head_hear_the_newest_first() -> None:
    m, log, first = machine()
    second = Node(log, "second")
    m.do(lambda: kvm_page_track_register_notifier(m.kvm, second, m.mm))
    track(m, 3)
    m.run(("w", 0x3000, 4))
    assert log == [("second", 0x3000, 4), ("n", 0x3000, 4)]
    m.do(lambda: kvm_page_track_unregister_notifier(m.kvm, second))
    m.run(("w", 0x3000, 5))
    assert log[2:] == [("n", 0x3000, 5)]
    m.do(lambda: kvm_page_track_unregister_notifier(m.kvm, first))
    m.run(("w", 0x3000, 6))
    assert len(log) == 3


def test_an_emulated_write_to_another_page_is_told_too() -> None:
    m, log, _ = machine(pages=8)
    exit_ = m.run_raw(("w", 9 << 12, 1))
    assert exit_.kind == "mmio"
    assert log == []


def test_only_the_vms_own_process_may_register() -> None:
    m = Machine()
    other = m.host.create_process("other")
    assert m.do(lambda: kvm_page_track_register_notifier(m.kvm, Node([]), other.mm)) == -ESRCH
    assert track(m, 1 << 20) == -EINVAL
    assert untrack(m, 1 << 20) == -EINVAL


def test_tracking_without_a_registered_node_is_a_bug() -> None:
    m = Machine()
    with pytest.raises(BrokenTruth, match="registered"):
        track(m, 3)


def test_a_tracker_too_few_is_a_bug() -> None:
    m, _, _ = machine()
    with pytest.raises(BrokenTruth, match="-1 trackers"):
        untrack(m, 3)


def test_deleting_a_slot_flushes_by_the_heads_nodes_in_5_10_and_tells_them_afterwards_in_6_18() -> None:
    old, log, _ = machine("linux-5.10")
    old.run(("w", 0x3000, 1))
    mark = len(old.events)
    old.do(lambda: old.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert log == [("n", "flush", 0, 64)]
    assert "kvm_mmu_zap_all_fast" in old.names(since=mark)
    new, log, _ = machine("linux-6.18")
    new.do(lambda: new.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert log == [("n", "removed", 0, 64)]


def test_without_the_mmus_own_node_5_10_would_flush_nothing() -> None:
    m, _, node = machine("linux-5.10")
    assert len(m.kvm.track_notifier_list) == 2
    assert m.kvm.track_notifier_list[0] is node
    m.run(("w", 0x3000, 1))
    del m.kvm.track_notifier_list[1]
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    with pytest.raises(BrokenTruth, match="no memslot"):
        m.truths.sweep()


def test_a_slot_does_not_move_under_its_trackers_in_6_18() -> None:
    m, _, _ = machine()
    with pytest.raises(KernelError) as refused:
        m.do(lambda: m.kvm.set_user_memory_region(0, 1 << 20, 64 * PAGE, BASE))
    assert refused.value.errno == EINVAL
    assert m.run(("w", 0x3000, 1), ("r", 0x3000)) == [1]
    old, log, _ = machine("linux-5.10")
    old.do(lambda: old.kvm.set_user_memory_region(0, 1 << 20, 64 * PAGE, BASE))
    assert log == [("n", "flush", 0, 64)]


def test_logging_keeps_a_tracked_page_protected_and_logs_its_emulated_writes() -> None:
    m, log, _ = machine()
    track(m, 3)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, 1))
    m.run(("w", 0x3000, 1), ("w", 0x4000, 1))
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 0b11000
    m.run(("w", 0x3000, 2))
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 0b01000
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, 0))
    m.run(("w", 0x3000, 3))
    assert [entry[2] for entry in log] == [1, 2, 3]
