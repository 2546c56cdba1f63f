"""KVM's own reads and writes of guest memory."""

from __future__ import annotations

from errno import EFAULT

import pytest

from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.uaccess import try_cmpxchg_user
from kvm_model import guest_access as G
from kvm_model.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from tests.kvm_model.machine import BASE, PAGE, Machine


def test_writes_cross_pages_are_logged_and_seen_by_the_guest() -> None:
    m = Machine()
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, KVM_MEM_LOG_DIRTY_PAGES))
    vcpu = m.vcpus[0]
    m.do(lambda: G.kvm_vcpu_write_guest(vcpu, 0x2FF8, bytes(range(16))))
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 0b1100
    assert m.do(lambda: G.kvm_vcpu_read_guest(vcpu, 0x2FF8, 16)) == bytes(range(16))
    assert m.run(("r", 0x3000)) == [int.from_bytes(bytes(range(8, 16)), "little")]


def test_what_no_slot_holds_or_a_read_only_one_is_efault() -> None:
    m = Machine(slot=False)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, KVM_MEM_READONLY))
    vcpu = m.vcpus[0]
    with pytest.raises(KernelError) as error:
        m.do(lambda: G.kvm_vcpu_write_guest(vcpu, 0x2000, b"x"))
    assert error.value.errno == EFAULT
    assert m.do(lambda: G.kvm_vcpu_read_guest(vcpu, 0x2000, 1)) == b"\0"
    with pytest.raises(KernelError):
        m.do(lambda: G.kvm_vcpu_read_guest(vcpu, m.pages * PAGE, 1))
    assert m.do(lambda: G.kvm_vcpu_read_guest_atomic(vcpu, m.pages * PAGE, 1)) is None


def test_an_atomic_read_takes_no_fault() -> None:
    m = Machine()
    vcpu = m.vcpus[0]
    m.run(("w", 0x2000, 7))
    assert m.do(lambda: G.kvm_vcpu_read_guest_atomic(vcpu, 0x2000, 8)) == b"\7" + bytes(7)
    m.do(lambda: do_madvise(m.mm, BASE + 0x2000, PAGE, MADV_DONTNEED))
    faults = m.host.vmstat["pgfault"]
    assert m.do(lambda: G.kvm_vcpu_read_guest_atomic(vcpu, 0x2000, 8)) is None
    assert m.host.vmstat["pgfault"] == faults


def test_a_compare_and_exchange_stores_only_what_was_expected() -> None:
    m = Machine()
    m.run(("w", 0x2000, 7))
    old, new = b"\7" + bytes(7), b"\x08" + bytes(7)
    assert m.do(lambda: try_cmpxchg_user(m.process, BASE + 0x2000, old, new))
    assert not m.do(lambda: try_cmpxchg_user(m.process, BASE + 0x2000, old, bytes(8)))
    assert m.run(("r", 0x2000)) == [8]
