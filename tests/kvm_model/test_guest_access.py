"""guest_access.py: KVM's own reads and writes of guest memory."""

from __future__ import annotations

from errno import EFAULT

import pytest

from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_DONTNEED, do_madvise
from kvm_model.guest_access import (
    kvm_vcpu_gfn_to_hva,
    kvm_vcpu_read_guest,
    kvm_vcpu_read_guest_atomic,
    kvm_vcpu_write_guest,
)
from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from tests.kvm_model.machine import BASE, PAGE, Machine


def test_bytes_go_across_pages_by_the_vmms_mapping_and_into_the_log() -> None:
    m = Machine(slot=False)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, KVM_MEM_LOG_DIRTY_PAGES))
    vcpu = m.vcpus[0]
    data = bytes(range(200))
    m.do(lambda: kvm_vcpu_write_guest(vcpu, 0x2FC0, data))
    assert m.do(lambda: kvm_vcpu_read_guest(vcpu, 0x2FC0, 200)) == data
    assert m.run(("r", 0x3000)) == [int.from_bytes(data[64:72], "little")]
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 0b1100


def test_what_has_no_slot_is_efault_after_what_came_before_was_written() -> None:
    m = Machine(pages=4)
    vcpu = m.vcpus[0]
    with pytest.raises(KernelError) as refused:
        m.do(lambda: kvm_vcpu_write_guest(vcpu, 0x3FFC, bytes([9]) * 8))
    assert refused.value.errno == EFAULT
    assert m.do(lambda: kvm_vcpu_read_guest(vcpu, 0x3FFC, 4)) == bytes([9]) * 4
    with pytest.raises(KernelError):
        m.do(lambda: kvm_vcpu_read_guest(vcpu, 0x4000, 1))


def test_a_read_only_slot_has_an_address_to_read_and_none_to_write() -> None:
    m = Machine(slot=False)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE, KVM_MEM_READONLY))
    vcpu = m.vcpus[0]
    assert kvm_vcpu_gfn_to_hva(vcpu, 3, write=False) == BASE + 3 * PAGE
    assert kvm_vcpu_gfn_to_hva(vcpu, 3, write=True) == -1
    with pytest.raises(KernelError):
        m.do(lambda: kvm_vcpu_write_guest(vcpu, 0x3000, b"x"))


def test_an_atomic_read_takes_no_fault() -> None:
    m = Machine()
    vcpu = m.vcpus[0]
    m.run(("w", 0x2000, 7))
    assert m.do(lambda: kvm_vcpu_read_guest_atomic(vcpu, 0x2000, 8)) == b"\7" + bytes(7)
    m.do(lambda: do_madvise(m.mm, BASE + 0x2000, PAGE, MADV_DONTNEED))
    faults = m.host.vmstat["pgfault"]
    assert m.do(lambda: kvm_vcpu_read_guest_atomic(vcpu, 0x2000, 8)) is None
    assert m.do(lambda: kvm_vcpu_read_guest_atomic(vcpu, m.pages * PAGE, 8)) is None
    assert m.host.vmstat["pgfault"] == faults
