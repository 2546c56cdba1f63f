"""Private and shared memory of a software-protected VM, and the change from one to the other."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, AddressSpace
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.uaccess import copy_from_user
from kvm_model.instrument import leaf_spte
from kvm_model.mem_attributes import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_X86_SW_PROTECTED_VM,
    kvm_range_has_memory_attributes,
)
from kvm_model.memslots import KVM_LPAGE_MIXED_FLAG, KVM_MEM_GUEST_MEMFD
from kvm_model.mmu.set_mem_attributes import KVM_VM_SET_MEM_ATTRIBUTES
from kvm_model.x86 import kvm_arch_vcpu_ioctl_run
from tests.kvm_model.machine import BASE, PAGE, Machine

PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE
HOLE = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def protected(pages: int = 64, **kwargs: Any) -> tuple[Machine, AddressSpace]:
    """A VM whose slot 0 has both kinds of memory: BASE, and a guest_memfd."""
    m = Machine(pages=pages, slot=False, vm_type=KVM_X86_SW_PROTECTED_VM, **kwargs)
    file = m.do(lambda: m.kvm.create_guest_memfd(pages * PAGE))
    m.do(lambda: m.kvm.set_user_memory_region2(0, 0, pages * PAGE, BASE, KVM_MEM_GUEST_MEMFD, file))
    return m, file


def convert(m: Machine, gfn: int, pages: int, attributes: int) -> None:
    m.do(lambda: m.kvm.set_memory_attributes(gfn * PAGE, pages * PAGE, attributes))


def test_private_and_shared_are_two_pages_and_each_conversion_shows_the_other() -> None:
    m, file = protected()
    m.run(("w", 3 * PAGE, 1))
    convert(m, 3, 1, PRIVATE)
    assert m.run(("r", 3 * PAGE), ("w", 3 * PAGE, 2), ("r", 3 * PAGE)) == [0, 2]
    assert m.leaf(3) >> 12 & 0xFFFFF == file.i_pages[3]
    assert m.do(lambda: copy_from_user(m.process, BASE + 3 * PAGE, 1)) == b"\x01"
    convert(m, 3, 1, 0)
    assert m.run(("r", 3 * PAGE)) == [1]
    convert(m, 3, 1, PRIVATE)
    assert m.run(("r", 3 * PAGE)) == [2]
    m.truths.sweep()


def test_a_conversion_is_a_bracket_begin_unmap_flush_end() -> None:
    m, _ = protected()
    m.run(("w", 3 * PAGE, 1), ("w", 4 * PAGE, 1))
    before = len(m.events)
    seq = m.kvm.mmu_invalidate_seq
    convert(m, 3, 1, PRIVATE)
    wanted = {
        "kvm_vm_set_mem_attributes", "mmu_invalidate_begin", "spte_zap", "kvm_flush_remote_tlbs",
        "mmu_invalidate_end",
    }
    assert [e.name for e in m.events[before:] if e.name in wanted] == [
        "kvm_vm_set_mem_attributes", "mmu_invalidate_begin", "spte_zap", "kvm_flush_remote_tlbs",
        "mmu_invalidate_end",
    ]
    args = m.last("kvm_vm_set_mem_attributes").args
    assert KVM_VM_SET_MEM_ATTRIBUTES.fmt(**args) == "0x00000000000003 -- 0x00000000000004 [0x8]"
    assert m.kvm.mmu_invalidate_seq == seq + 1
    assert leaf_spte(m.kvm, 4) != (0, 0)


def test_what_has_the_attribute_already_is_left_alone() -> None:
    m, _ = protected()
    m.run(("w", 3 * PAGE, 1))
    seq = m.kvm.mmu_invalidate_seq
    convert(m, 0, 64, 0)
    assert m.kvm.mmu_invalidate_seq == seq
    assert leaf_spte(m.kvm, 3) != (0, 0)


def test_a_hole_takes_the_private_page_and_not_the_shared_one() -> None:
    m, file = protected()
    m.run(("w", 3 * PAGE, 1))
    convert(m, 3, 1, PRIVATE)
    m.run(("w", 3 * PAGE, 2))
    m.do(lambda: file.a_ops.fallocate(file, HOLE, 3 * PAGE, PAGE))
    assert m.run(("r", 3 * PAGE)) == [0]
    convert(m, 3, 1, 0)
    assert m.run(("r", 3 * PAGE)) == [1]


def test_private_memory_without_guest_memfd_leaves_with_a_memory_fault() -> None:
    m = Machine(vm_type=KVM_X86_SW_PROTECTED_VM)
    m.run(("w", 0, 1))
    convert(m, 0, 1, PRIVATE)
    # Beyond every slot private memory is no MMIO.
    convert(m, 0x5_0000, 1, PRIVATE)
    for gpa in (0, 0x5000_0000):
        out = m.run_raw(("r", gpa))
        assert (out.kind, out.gpa, out.size, out.private) == ("memory-fault-exit", gpa, PAGE, True)
        assert out.why == f"no private memory for gpa {gpa:#x}"
        m.cpu.ops[0].clear()
    assert m.last("kvm_userspace_exit").args == {"reason": 39, "errno": -errno.EFAULT}


def test_a_fault_that_meets_the_change_of_its_attribute_is_told_so() -> None:
    m, _ = protected()
    struck: list[int] = []

    def strike(kind: str) -> None:
        # The fault took the page for shared, and has its snapshot of the sequence.
        if kind == "seq" and not struck:
            struck.append(1)
            m.kvm.set_memory_attributes(3 * PAGE, PAGE, PRIVATE)
        m.truths.on_point(kind)

    m.sched.set_on_point(strike)
    out = m.run_raw(("w", 3 * PAGE, 5))
    assert (out.kind, out.gpa, out.private) == ("memory-fault-exit", 3 * PAGE, False)
    # Again, it is a private access and has its page.
    assert m.run(("r", 3 * PAGE)) == [5]
    m.truths.sweep()


@pytest.mark.parametrize("seed", range(6))
def test_conversions_beside_running_vcpus_never_show_one_kind_in_the_place_of_the_other(seed: int) -> None:
    m, _ = protected(vcpus=2, seed=seed)
    for gfn in range(4):
        m.run(("w", gfn * PAGE, 0x1000 + gfn))
    convert(m, 0, 4, PRIVATE)
    for gfn in range(4):
        m.run(("w", gfn * PAGE, 0x2000 + gfn))

    def flip() -> None:
        for n in range(12):
            m.kvm.set_memory_attributes((n % 4) * PAGE, PAGE, PRIVATE * (n // 4 % 2))

    def read(vcpu: int) -> None:
        ops = m.cpu.ops.setdefault(vcpu, [])
        ops += [("r", gfn * PAGE) for gfn in (0, 1, 2, 3) * 6]
        while ops:
            out = kvm_arch_vcpu_ioctl_run(m.vcpus[vcpu])
            assert out.kind in ("hlt", "memory-fault-exit")

    tasks = [m.sched.spawn(f"vcpu{n}", lambda n=n: read(n), vcpu=n) for n in (0, 1)]
    m.finish(m.sched.spawn("vmm", flip), *tasks)
    for vcpu in (0, 1):
        values = m.cpu.out[vcpu]
        assert {v & 0xFF for v in values} <= {0, 1, 2, 3}
        assert {v >> 12 for v in values} <= {1, 2}
    m.truths.sweep()


def test_a_huge_page_with_both_kinds_is_mixed_until_it_has_one_again() -> None:
    m = Machine(pages=1536, slot=False, vm_type=KVM_X86_SW_PROTECTED_VM, ram=24 << 20)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 1024 * PAGE, 0x7F0000000000))
    info = m.kvm.slots().id_hash[0].lpage_info[0]
    assert [n & KVM_LPAGE_MIXED_FLAG for n in info] == [0, 0]
    convert(m, 500, 20, PRIVATE)
    assert [bool(n & KVM_LPAGE_MIXED_FLAG) for n in info] == [True, True]
    convert(m, 0, 512, PRIVATE)
    assert [bool(n & KVM_LPAGE_MIXED_FLAG) for n in info] == [False, True]
    convert(m, 512, 8, 0)
    assert [bool(n & KVM_LPAGE_MIXED_FLAG) for n in info] == [False, False]
    # A slot that comes later finds the attributes as they are.
    convert(m, 1030, 1, PRIVATE)
    m.do(lambda: m.kvm.set_user_memory_region(1, 1024 * PAGE, 512 * PAGE, 0x7F0000000000))
    assert m.kvm.slots().id_hash[1].lpage_info[0][0] & KVM_LPAGE_MIXED_FLAG


def test_a_cut_huge_page_may_not_be_mapped_while_the_attributes_change() -> None:
    m = Machine(pages=1024, slot=False, vm_type=KVM_X86_SW_PROTECTED_VM, ram=24 << 20)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 1024 * PAGE, 0x7F0000000000))
    m.run(("w", PAGE, 1))
    convert(m, 500, 20, PRIVATE)
    begins = [e.args for e in m.events if e.name == "mmu_invalidate_begin"]
    assert [(a["range_start"], a["range_end"]) for a in begins] == [(500, 520), (0, 520), (0, 1024)]
    # What lies beside the range stays mapped.
    assert leaf_spte(m.kvm, 1) != (0, 0)


@pytest.mark.parametrize(
    ("args", "protected_vm"),
    [
        ((0, PAGE, PRIVATE), False), ((0, PAGE, 1), True), ((0, 0, 0), True), ((0, PAGE, 0, 1), True),
        ((1, PAGE, 0), True), ((0, PAGE + 1, 0), True), (((1 << 64) - PAGE, PAGE, 0), True),
    ],
)
def test_bad_attributes_are_refused(args: tuple[int, ...], protected_vm: bool) -> None:
    m = Machine(vm_type=KVM_X86_SW_PROTECTED_VM if protected_vm else 0)
    with pytest.raises(KernelError) as info:
        m.do(lambda: m.kvm.set_memory_attributes(*args))
    assert info.value.errno == errno.EINVAL


def test_a_vm_without_the_tdp_mmu_cannot_be_protected() -> None:
    with pytest.raises(KernelError) as info:
        Machine(vm_type=KVM_X86_SW_PROTECTED_VM, params={"kvm.tdp_mmu": "N"})
    assert info.value.errno == errno.EINVAL


def test_ranges_are_asked_the_same_whether_few_or_many_frames_are_private() -> None:
    m, _ = protected()
    convert(m, 2, 3, PRIVATE)
    has = lambda start, end, attrs: kvm_range_has_memory_attributes(m.kvm, start, end, attrs)  # noqa: E731
    assert [has(2, 5, PRIVATE), has(1, 5, PRIVATE), has(0, 2, 0), has(0, 3, 0), has(5, 1 << 40, 0)] == [
        True, False, True, False, True,
    ]
    assert not has(0, 1 << 40, 0)


def test_an_spte_of_the_other_kind_breaks_a_truth() -> None:
    m, _ = protected()
    m.run(("w", 3 * PAGE, 1))
    m.kvm.mem_attr_array[3] = PRIVATE
    with pytest.raises(BrokenTruth, match="spte-matches-host"):
        m.truths.sweep()
