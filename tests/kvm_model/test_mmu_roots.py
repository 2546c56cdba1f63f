"""mmu/mmu_roots.py: what a slot's deletion leaves mapped, and the wrap of the MMIO generation."""

from __future__ import annotations

from errno import EINVAL

import pytest

from host_mm.kernel.errors import KernelError
from kvm_model.kvm_main import KVM_CAP_DISABLE_QUIRKS2
from kvm_model.memslots import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
from kvm_model.mmu.mmu_roots import KVM_X86_QUIRK_SLOT_ZAP_ALL
from kvm_model.mmu.spte import MMIO_SPTE_GEN_MASK, get_mmio_spte_generation
from tests.kvm_model.machine import BASE, PAGE, Machine

DEVICE = 1 << 30


def two_slots(tdp: str = "Y", *, quirk: bool = True) -> Machine:
    m = Machine(slot=False, params={"kvm.tdp_mmu": tdp})
    if not quirk:
        m.kvm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 32 * PAGE, BASE))
    m.do(lambda: m.kvm.set_user_memory_region(1, 64 * PAGE, 32 * PAGE, BASE + 32 * PAGE))
    m.run(("w", 0x3000, 1), ("w", 65 * PAGE, 2))
    return m


@pytest.mark.parametrize("tdp", ["Y", "N"])
def test_with_the_quirk_a_slots_deletion_drops_every_root(tdp: str) -> None:
    m = two_slots(tdp)
    mark = len(m.events)
    m.do(lambda: m.kvm.set_user_memory_region(1, 0, 0, 0))
    assert "kvm_mmu_zap_all_fast" in m.names(since=mark)
    faults = m.vcpus[0].stat["pf_taken"]
    m.run(("r", 0x3000))
    assert m.vcpus[0].stat["pf_taken"] == faults + 1


@pytest.mark.parametrize("tdp", ["Y", "N"])
def test_without_the_quirk_only_the_slots_leaves_go(tdp: str) -> None:
    m = two_slots(tdp, quirk=False)
    root = m.vcpus[0].root_hpa
    mark = len(m.events)
    m.do(lambda: m.kvm.set_user_memory_region(1, 0, 0, 0))
    assert "kvm_mmu_zap_all_fast" not in m.names(since=mark)
    zaps = [e.args["gfn"] for e in m.events[mark:] if e.name == "spte_zap"]
    assert zaps == [65]
    assert "kvm_flush_remote_tlbs" in m.names(since=mark)
    faults = m.vcpus[0].stat["pf_taken"]
    assert m.run(("r", 0x3000)) == [1]
    assert m.vcpus[0].stat["pf_taken"] == faults
    assert m.vcpus[0].root_hpa == root
    assert m.run_raw(("r", 65 * PAGE)).kind == "mmio"
    m.truths.sweep()


@pytest.mark.parametrize("tdp", ["Y", "N"])
def test_a_slot_that_moves_without_the_quirk_is_mapped_anew_at_its_new_place_only(tdp: str) -> None:
    m = two_slots(tdp, quirk=False)
    m.do(lambda: m.kvm.set_user_memory_region(1, 128 * PAGE, 32 * PAGE, BASE + 32 * PAGE))
    assert m.run(("r", 129 * PAGE), ("r", 0x3000)) == [2, 1]
    assert m.run_raw(("r", 65 * PAGE)).kind == "mmio"
    m.truths.sweep()


def test_unknown_quirks_and_quirks_of_5_10_cannot_be_disabled() -> None:
    for m, value in ((Machine(), 1 << 20), (Machine(profile="linux-5.10"), KVM_X86_QUIRK_SLOT_ZAP_ALL)):
        with pytest.raises(KernelError) as refused:
            m.kvm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, value)
        assert refused.value.errno == EINVAL


def near_the_wrap(tdp: str) -> Machine:
    """The next but one update of the memslots takes the MMIO generation to 0."""
    m = Machine(params={"kvm.tdp_mmu": tdp})
    m.kvm.slots().generation = MMIO_SPTE_GEN_MASK + 1 - 2 * m.kvm.profile.nr_memslot_as_ids
    return m


def update(m: Machine) -> None:
    flags = m.kvm.slots().id_hash[0].flags ^ 1
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, flags))


def touch_device(m: Machine) -> list[str]:
    mark = len(m.events)
    assert m.run_raw(("r", DEVICE)).kind == "mmio"
    m.vcpus[0].complete_mmio(0)
    m.run()
    return m.names(since=mark)


@pytest.mark.parametrize("tdp", ["Y", "N"])
def test_when_the_mmio_generation_wraps_every_spte_goes(tdp: str) -> None:
    m = near_the_wrap(tdp)
    touch_device(m)
    old = get_mmio_spte_generation(m.leaf(DEVICE >> 12))
    mark = len(m.events)
    update(m)
    assert "kvm_mmu_zap_all_fast" not in m.names(since=mark)
    update(m)
    assert m.names(since=mark).count("kvm_mmu_zap_all_fast") == 1
    assert m.kvm.slots().generation & MMIO_SPTE_GEN_MASK == 0
    assert "mark_mmio_spte" in touch_device(m)
    assert get_mmio_spte_generation(m.leaf(DEVICE >> 12)) != old


@pytest.mark.parametrize("tdp", ["Y", "N"])
def test_an_mmio_spte_of_an_older_generation_is_made_anew_when_it_is_met(tdp: str) -> None:
    m = Machine(params={"kvm.tdp_mmu": tdp})
    touch_device(m)
    assert "mark_mmio_spte" not in touch_device(m)
    update(m)
    names = touch_device(m)
    assert names.index("check_mmio_spte") < names.index("mark_mmio_spte")


def test_while_memslots_change_no_mmio_spte_is_believed_and_nothing_is_cached() -> None:
    m = Machine()
    touch_device(m)
    vcpu = m.vcpus[0]
    vcpu.mmio_gfn = 0
    slots = m.kvm.slots()
    slots.generation |= KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
    assert "check_mmio_spte" not in touch_device(m)
    assert vcpu.mmio_gfn == 0
    slots.generation &= ~KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
    assert "check_mmio_spte" in touch_device(m)
    assert vcpu.mmio_gfn == DEVICE >> 12
