"""The dirty ring: pushes, the soft-full exit, harvest and reset."""

from __future__ import annotations

import errno

import pytest

from host_mm.kernel.errors import BrokenTruth, KernelError
from kvm_model import dirty_log
from kvm_model.dirty_log import KVM_CAP_DIRTY_LOG_RING
from kvm_model.dirty_ring import (
    KVM_DIRTY_GFN_F_DIRTY,
    KVM_DIRTY_GFN_F_RESET,
    KvmDirtyRing,
    kvm_dirty_ring_push,
)
from kvm_model.kvm_main import Kvm
from kvm_model.vcpu import Vcpu
from tests.kvm_model.machine import BASE, PAGE, Machine

ENTRIES = 256
RESERVED = 64


def ring_machine(**options: object) -> Machine:
    m = Machine(dirty_ring=ENTRIES, **{"pages": 512, "ram": 16 << 20, **options})  # type: ignore[arg-type]
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, 1))
    return m


def ring_of(vcpu: Vcpu) -> KvmDirtyRing:
    assert vcpu.dirty_ring is not None
    return vcpu.dirty_ring


def harvest(m: Machine, vcpu: int = 0, limit: int = 1 << 30) -> list[int]:
    """Take what is in the ring, as a VMM does; offsets in their order."""
    ring = ring_of(m.vcpus[vcpu])
    found: list[int] = []
    at = ring.reset_index
    while ring.read(at)[0] & KVM_DIRTY_GFN_F_RESET:
        at += 1
    while at < ring.dirty_index and ring.read(at)[0] == KVM_DIRTY_GFN_F_DIRTY and len(found) < limit:
        found.append(ring.read(at)[2])
        ring.set_flags(at, KVM_DIRTY_GFN_F_RESET)
        at += 1
    return found


def writes(*gfns: int) -> list[tuple[object, ...]]:
    return [("w", gfn * PAGE, gfn) for gfn in gfns]


def test_each_first_write_is_an_entry_in_ram_in_the_order_of_the_writes() -> None:
    m = ring_machine()
    m.run(*writes(3, 60, 3, 7))
    ring = ring_of(m.vcpus[0])
    assert [ring.read(n) for n in range(4)] == [(1, 0, 3), (1, 0, 60), (1, 0, 7), (0, 0, 0)]
    word = ring.pfns[0] << 9
    assert m.host.ram.u64[word : word + 4].tolist() == [1, 3, 1, 60]
    assert m.last("kvm_dirty_ring_push").args["dirty_index"] == 3


def test_a_reset_protects_the_pages_and_the_next_write_is_pushed_again() -> None:
    m = ring_machine()
    m.run(*writes(3, 4))
    assert harvest(m) == [3, 4]
    flushes = m.kvm.stat["remote_tlb_flush_requests"]
    assert m.do(m.kvm.reset_dirty_rings) == 2
    assert m.kvm.stat["remote_tlb_flush_requests"] == flushes + 1
    assert not m.leaf(3) & 2
    assert m.run(*writes(3), ("r", 3 * PAGE)) == [3]
    assert harvest(m) == [3]


def test_what_was_not_harvested_is_not_reset() -> None:
    m = ring_machine()
    m.run(*writes(3, 4))
    assert m.do(m.kvm.reset_dirty_rings) == 0
    assert harvest(m, limit=1) == [3]
    assert m.do(m.kvm.reset_dirty_rings) == 1
    assert m.leaf(4) & 2
    assert harvest(m) == [4]


@pytest.mark.parametrize(
    ("gfns", "locks"),
    [((0, 1, 63), 1), ((0, 64), 2), ((63, 0), 1), ((64, 0), 2), ((10, 5, 70), 2), ((5, 68, 4), 2), ((9,), 1)],
)
def test_a_reset_takes_mmu_lock_once_for_what_lies_within_64_gfns(
    monkeypatch: pytest.MonkeyPatch, gfns: tuple[int, ...], locks: int
) -> None:
    m = ring_machine()
    m.run(*writes(*gfns))
    assert harvest(m) == list(gfns)
    batches: list[int] = []
    reset = dirty_log._reset_dirty_gfn

    def counted(kvm: Kvm, slot: int, offset: int, mask: int) -> None:
        batches.append(offset)
        reset(kvm, slot, offset, mask)

    monkeypatch.setattr(dirty_log, "_reset_dirty_gfn", counted)
    m.do(m.kvm.reset_dirty_rings)
    assert len(batches) == locks
    assert not any(m.leaf(gfn) & 2 for gfn in gfns)


def test_a_soft_full_ring_keeps_its_vcpu_out_of_the_guest_until_it_is_reset() -> None:
    m = ring_machine()
    soft = ENTRIES - RESERVED
    exit_ = m.run_raw(*writes(*range(soft + 10)))
    assert exit_.kind == "dirty-ring-full"
    assert m.last("kvm_dirty_ring_exit").args["vcpu_id"] == 0
    assert m.last("kvm_userspace_exit").args["reason"] == 31
    assert ring_of(m.vcpus[0]).used == soft
    assert m.run_raw().kind == "dirty-ring-full"
    assert harvest(m) == list(range(soft))
    assert m.run_raw().kind == "dirty-ring-full", "harvested is not reset"
    m.do(m.kvm.reset_dirty_rings)
    assert m.run_raw().kind == "hlt"
    # Page soft - 1 was pushed by its fault, the write itself came only after the reset.
    assert harvest(m) == list(range(soft - 1, soft + 10))


def test_every_vcpu_has_its_own_ring_and_one_reset_serves_all() -> None:
    m = ring_machine(vcpus=2)
    m.run(*writes(1), vcpu=0)
    m.run(*writes(2, 1), vcpu=1)
    assert (harvest(m, 0), harvest(m, 1)) == ([1], [2])
    assert m.do(m.kvm.reset_dirty_rings) == 2


def test_the_ring_wraps() -> None:
    m = ring_machine()
    for turn in range(5):
        gfns = list(range(turn, turn + 100))
        m.run(*writes(*gfns))
        assert harvest(m) == gfns
        m.do(m.kvm.reset_dirty_rings)
    assert ring_of(m.vcpus[0]).dirty_index == 500


def test_an_entry_that_names_no_page_is_taken_back_and_protects_nothing() -> None:
    m = ring_machine()
    m.run(*writes(3, 4, 5))
    ring = ring_of(m.vcpus[0])
    for at, (slot, offset) in enumerate([(7 << 16, 3), (0, 1 << 40), (9, 5)]):
        ring.fill(at, slot, offset)
        ring.set_flags(at, KVM_DIRTY_GFN_F_RESET)
    m.kvm.truths = None
    assert m.do(m.kvm.reset_dirty_rings) == 3
    assert all(m.leaf(gfn) & 2 for gfn in (3, 4, 5))


def test_a_vm_with_rings_keeps_no_bitmap() -> None:
    m = ring_machine()
    assert m.kvm.slots().id_hash[0].dirty_bitmap is None
    for call in (lambda: m.kvm.get_dirty_log(0), lambda: m.kvm.clear_dirty_log(0, 0, bytes(64))):
        with pytest.raises(KernelError) as info:
            m.do(call)
        assert info.value.errno == errno.ENXIO


@pytest.mark.parametrize(
    ("size", "params", "why"),
    [(0, {}, errno.EINVAL), (4096 + 16, {}, errno.EINVAL), (2048, {}, errno.EINVAL),
     (1 << 21, {}, errno.E2BIG), (8192, {"kvm_intel.pml": "1"}, errno.EINVAL), (4096, {}, 0),
     (16384, {"kvm_intel.pml": "1"}, 0)],
)
def test_a_ring_has_a_power_of_two_of_bytes_a_page_at_least_and_room_for_what_is_reserved(
    size: int, params: dict[str, str], why: int
) -> None:
    m = Machine(vcpus=0, slot=False, params=params)
    if not why:
        m.kvm.enable_cap(KVM_CAP_DIRTY_LOG_RING, size)
        assert ring_of(m.kvm.create_vcpu(0)).size == size // 16
        return
    with pytest.raises(KernelError) as info:
        m.kvm.enable_cap(KVM_CAP_DIRTY_LOG_RING, size)
    assert info.value.errno == why


def test_rings_come_before_vcpus_once_and_not_in_5_10() -> None:
    for m in (Machine(slot=False), Machine(vcpus=0, slot=False, dirty_ring=256),
              Machine(vcpus=0, slot=False, profile="linux-5.10")):
        with pytest.raises(KernelError) as info:
            m.kvm.enable_cap(KVM_CAP_DIRTY_LOG_RING, 4096)
        assert info.value.errno == errno.EINVAL
    with pytest.raises(KernelError) as info:
        Machine().kvm.reset_dirty_rings()
    assert info.value.errno == errno.EINVAL


def test_a_ring_that_overflows_breaks_a_truth() -> None:
    m = ring_machine()
    for n in range(ENTRIES):
        kvm_dirty_ring_push(m.vcpus[0], 0, n)
    with pytest.raises(BrokenTruth, match="dirty-ring: ring 0 is full"):
        kvm_dirty_ring_push(m.vcpus[0], 0, 0)


def test_a_writable_spte_that_no_ring_names_breaks_a_truth() -> None:
    m = ring_machine()
    m.run(*writes(3))
    m.truths.sweep()
    m.truths.log.note_ring(0, 3, -1)
    with pytest.raises(BrokenTruth, match="write-logged: gfn 0x3 "):
        m.truths.sweep()


def test_a_destroyed_vm_gives_its_rings_back() -> None:
    m = ring_machine(vcpus=2)
    held = len(m.kvm._table_frames())
    frames = [ring_of(v).pfns[0] for v in m.vcpus]
    assert all(m.host.pages.refcount[pfn] == 1 for pfn in frames)
    m.do(m.kvm.destroy)
    assert held
    assert not any(m.host.pages.refcount[pfn] for pfn in frames)
