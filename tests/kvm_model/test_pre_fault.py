"""KVM_PRE_FAULT_MEMORY: memory mapped before the guest touches it."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from host_mm.kernel.errors import KernelError
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from host_mm.mprotect import do_mprotect
from host_mm.uaccess import copy_to_user
from kvm_model.instrument import leaf_spte
from kvm_model.mem_attributes import KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_SW_PROTECTED_VM
from kvm_model.memslots import KVM_MEM_GUEST_MEMFD
from tests.kvm_model.machine import BASE, PAGE, Machine

EPT_ACCESSED = 1 << 8


def prefault(m: Machine, gpa: int, pages: int, flags: int = 0) -> int:
    done: int = m.do(lambda: m.kvm.pre_fault_memory(m.vcpus[0], gpa, pages * PAGE, flags))
    return done


def refused(m: Machine, gpa: int, size: int, flags: int = 0) -> int:
    with pytest.raises(KernelError) as info:
        m.do(lambda: m.kvm.pre_fault_memory(m.vcpus[0], gpa, size, flags))
    return info.value.errno or 0


@pytest.mark.parametrize("tdp_mmu", ["Y", "N"])
def test_what_is_mapped_ahead_is_not_accessed_and_needs_no_fault(tdp_mmu: str) -> None:
    m = Machine(params={"kvm.tdp_mmu": tdp_mmu})
    m.do(lambda: [copy_to_user(m.process, BASE + n * PAGE, bytes([n + 1])) for n in range(4)])
    assert prefault(m, 0, 4) == 4 * PAGE
    assert not any(m.leaf(n) & EPT_ACCESSED for n in range(4))
    assert all(e.args["prefetch"] for e in m.events if e.name == "spte_install")
    assert m.run(*[("r", n * PAGE) for n in range(4)]) == [1, 2, 3, 4]
    stat = m.vcpus[0].stat
    assert (stat["pf_taken"], stat["pf_fixed"]) == (0, 0)
    assert all(m.leaf(n) & EPT_ACCESSED for n in range(4))
    # Again, it finds everything there and changes nothing.
    since = len(m.events)
    assert prefault(m, 0, 4) == 4 * PAGE
    assert "spte_install" not in m.names(since=since)
    m.truths.sweep()


def test_untouched_memory_is_mapped_read_only_as_a_read_maps_it() -> None:
    m = Machine()
    prefault(m, 0, 1)
    assert m.leaf(0) >> 12 & 0xFFFFF == m.host.zero_pfn
    assert m.run(("w", 0, 3), ("r", 0)) == [3]


def test_without_accessed_bits_what_is_mapped_ahead_waits_for_its_first_access() -> None:
    m = Machine(params={"kvm_intel.eptad": "0"})
    m.do(lambda: copy_to_user(m.process, BASE, b"\x07"))
    prefault(m, 0, 1)
    assert m.kvm.spte.is_access_track_spte(m.leaf(0))
    assert m.run(("r", 0)) == [7]
    assert m.vcpus[0].stat["pf_fast"] == 1
    assert not m.kvm.spte.is_access_track_spte(m.leaf(0))


def test_the_part_that_could_be_mapped_counts_and_an_error_only_if_there_is_none() -> None:
    m = Machine(pages=8)
    assert prefault(m, 6 * PAGE, 4) == 2 * PAGE
    assert refused(m, 8 * PAGE, PAGE) == errno.ENOENT
    m.do(lambda: do_mprotect(m.mm, BASE, PAGE, 0))
    assert refused(m, 0, PAGE) == errno.EFAULT


@pytest.mark.parametrize(
    ("gpa", "size", "flags"),
    [(0, 0, 0), (1, PAGE, 0), (0, PAGE + 1, 0), (0, PAGE, 1), ((1 << 64) - PAGE, PAGE, 0)],
)
def test_bad_ranges_are_refused(gpa: int, size: int, flags: int) -> None:
    assert refused(Machine(), gpa, size, flags) == errno.EINVAL


def test_linux_5_10_has_no_such_ioctl() -> None:
    assert refused(Machine(profile="linux-5.10"), 0, PAGE) == errno.EINVAL


def test_it_waits_out_a_bracket_over_the_page() -> None:
    m = Machine()
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE, BASE + PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    task = m.sched.spawn("vmm", lambda: m.kvm.pre_fault_memory(m.vcpus[0], 0, PAGE))
    m.sched.run_until(lambda: m.names().count("fault_retry") >= 3)
    assert leaf_spte(m.kvm, 0) == (0, 0)
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.finish(task)
    assert leaf_spte(m.kvm, 0) != (0, 0)


def test_a_slot_on_its_way_out_ends_it() -> None:
    m = Machine()
    answers: list[int] = []

    def strike(kind: str) -> None:
        slot = m.kvm.slots().gfn_to_memslot(0)
        if slot is not None and slot.flags & 1 << 16 and not answers and kind == "lock":
            answers.append(0)
            with pytest.raises(KernelError) as info:
                m.kvm.pre_fault_memory(m.vcpus[0], 0, PAGE)
            answers.append(info.value.errno or 0)

    m.run(("w", 0, 1))
    m.sched.set_on_point(strike)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert answers[-1:] == [errno.EAGAIN]


def test_private_memory_is_mapped_from_guest_memfd() -> None:
    m = Machine(slot=False, vm_type=KVM_X86_SW_PROTECTED_VM)
    file: Any = m.do(lambda: m.kvm.create_guest_memfd(64 * PAGE))
    m.do(lambda: m.kvm.set_user_memory_region2(0, 0, 64 * PAGE, BASE, KVM_MEM_GUEST_MEMFD, file))
    m.do(lambda: m.kvm.set_memory_attributes(0, 4 * PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE))
    assert prefault(m, 2 * PAGE, 4) == 4 * PAGE
    assert sorted(file.i_pages) == [2, 3]
    assert m.leaf(2) >> 12 & 0xFFFFF == file.i_pages[2]
    m.truths.sweep()


def test_a_huge_page_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kvm_model.test_mmu import huge_machine

    m = huge_machine(monkeypatch)
    m.sched.set_on_point(None)
    since = len(m.events)
    assert prefault(m, 5 * PAGE, 600) == 600 * PAGE
    installs = [e.args["level"] for e in m.events[since:] if e.name == "spte_install"]
    assert installs == [2, 2]
