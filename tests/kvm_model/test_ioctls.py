"""Each ioctl of the model answers bad arguments with KVM's errno, and a refusal changes nothing."""

from __future__ import annotations

import pytest

from host_mm.address_space import AddressSpace
from host_mm.kernel.errors import KernelError
from kvm_model.profile import PROFILES
from tests.kvm_model import machine
from tests.kvm_model.ioctl_cases import ARENA, CASES, Case


class Model:
    """ioctl_cases.Machine on kvm_model."""

    hva = machine.BASE

    def __init__(self, profile: str) -> None:
        self.m = machine.Machine(pages=ARENA >> 12, vcpus=0, slot=False, profile=profile)
        self.kvm = self.m.kvm
        self.max_vcpu_ids = PROFILES[profile].max_vcpu_ids
        self.user_mem_slots = PROFILES[profile].user_mem_slots
        self.gmem: AddressSpace | None = None
        self.address_spaces = PROFILES[profile].nr_memslot_as_ids

    def region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self.m.do(lambda: self.kvm.set_user_memory_region(slot, gpa, size, hva, flags))

    def get_log(self, slot: int) -> None:
        self.m.do(lambda: self.kvm.get_dirty_log(slot))

    def clear_log(self, slot: int, first: int, count: int, mask: int | None = 0) -> None:
        bitmap = b"" if mask is None else mask.to_bytes((count + 63) // 64 * 8, "little")
        self.m.do(lambda: self.kvm.clear_dirty_log(slot, first, bitmap, count))

    def enable_cap(self, cap: int, value: int, flags: int = 0) -> None:
        self.kvm.enable_cap(cap, value, flags)

    def reset_rings(self) -> None:
        self.m.do(self.kvm.reset_dirty_rings)

    def create_vcpu(self, vcpu_id: int) -> None:
        self.kvm.create_vcpu(vcpu_id)

    def create_gmem(self, size: int, flags: int = 0) -> None:
        self.gmem = self.m.do(lambda: self.kvm.create_guest_memfd(size, flags))

    def region2(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 4, offset: int = 0, *,
        bad_file: bool = False,
    ) -> None:
        file = None if bad_file else self.gmem
        self.m.do(lambda: self.kvm.set_user_memory_region2(slot, gpa, size, hva, flags, file, offset))

    def pre_fault(self, gpa: int, size: int, flags: int = 0) -> None:
        self.m.do(lambda: self.kvm.pre_fault_memory(self.kvm.vcpus[-1], gpa, size, flags))

    def attributes(self, gpa: int, size: int, attributes: int = 0, flags: int = 0) -> None:
        self.m.do(lambda: self.kvm.set_memory_attributes(gpa, size, attributes, flags))

    def state(self) -> tuple[object, ...]:
        """What a refusal must leave as it is."""
        kvm = self.kvm
        slots = [
            (s.as_id, s.id, s.base_gfn, s.npages, s.flags, s.userspace_addr, bytes(s.dirty_bitmap or b""))
            for space in kvm.memslots for s in space
        ]
        return (
            slots, [v.vcpu_id for v in kvm.vcpus], kvm.dirty_ring_size, kvm.manual_dirty_log_protect,
            kvm.nr_memslot_pages, kvm.nr_memslots_dirty_logging, len(kvm.gmems),
            [slot for gmem in kvm.gmems for slot in gmem.bindings],
        )


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_the_model_answers_as_kvm(case: Case, profile: str) -> None:
    if profile not in case.profiles:
        pytest.skip(f"not of {profile}")
    m = Model(profile)
    for call in case.calls[:-1]:
        call(m)
    before = m.state()
    if not case.errno:
        case.calls[-1](m)
    else:
        with pytest.raises(KernelError) as info:
            case.calls[-1](m)
        assert info.value.errno == case.errno
        assert m.state() == before
    m.m.truths.sweep()


def test_no_two_cases_have_one_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
