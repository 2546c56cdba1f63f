"""A checked host that is closed tells what was left behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

import refault
from emu.hostops import perform
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT
from host_mm.page import get_page
from host_mm.page_alloc import GFP_KERNEL, alloc_pages
from kvm_model.instrument import zap_for_instrument
from kvm_model.requests import KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, kvm_check_request, kvm_make_request
from refault.scenarios.api import DATA_GPA
from refault.scenarios.emulator import EmulatorBackend
from refault.scenarios.guest import CODE

GPA = 0x30_0000


@pytest.fixture
def vm() -> Iterator[refault.VM]:
    vm = refault.VM("8M", host_ram="4M", swap="16M", check=True)
    vm.write(GPA, b"something")
    yield vm
    vm.abandon()


def present_pfn(vm: refault.VM) -> int:
    board = vm.board
    return board.vmm.present_pfn(board.memory.hva(GPA))


def frames_in_use(vm: refault.VM) -> int:
    """Frames that are neither free nor reserved, of a host that may have been closed."""
    mm = vm._host.machine.mm
    return sum(zone.managed - zone.nr_free for zone in mm.zones)


def test_a_closed_host_has_every_frame_and_swap_slot_back(vm: refault.VM) -> None:
    vm.host.swap_out(GPA, 1)
    vm.host.fork()
    assert frames_in_use(vm) > 0
    swap = vm._host.machine.mm.swap
    assert swap is not None
    assert swap.inuse_pages == 1
    vm.close()
    assert frames_in_use(vm) == swap.inuse_pages == 0


def test_a_leaked_page_reference_is_reported(vm: refault.VM) -> None:
    pfn = present_pfn(vm)
    get_page(vm.board.host.mm, pfn)
    with pytest.raises(BrokenTruth, match=rf"pfn {pfn:#x} .* has refcount 1, 0 references exist"):
        vm.close()


def test_a_frame_that_somebody_still_holds_when_the_host_goes_down_is_reported(vm: refault.VM) -> None:
    mm = vm.board.host.mm
    pfn = alloc_pages(mm, GFP_KERNEL, 0, 0)
    mm.frame_holders.append(lambda: {pfn: 1})
    with pytest.raises(BrokenTruth, match=rf"leak: 1 frames were not given back, pfn {pfn:#x} .* first"):
        vm.close()


def test_a_folio_discarded_under_writeback_is_given_back_when_the_host_goes_down(vm: refault.VM) -> None:
    board, mm = vm.board, vm.board.host.mm

    def discard() -> None:
        hva = board.memory.hva(GPA)
        board.vmm.madvise(hva, 4096, MADV_PAGEOUT)
        assert mm.swap_device.inflight
        board.vmm.madvise(hva, 4096, MADV_DONTNEED)

    mm.sched.run_task("vmm", discard)
    assert mm.swap is not None
    assert mm.swap.inuse_pages == 1
    vm.close()
    assert frames_in_use(vm) == mm.swap.inuse_pages == 0


def test_a_leaked_frame_is_reported(vm: refault.VM) -> None:
    pfn = alloc_pages(vm.board.host.mm, GFP_KERNEL, 0, 0)
    with pytest.raises(BrokenTruth, match=f"pfn {pfn:#x} "):
        vm.close()


def test_a_leaked_swap_slot_is_reported(vm: refault.VM) -> None:
    swap = vm.board.host.mm.swap
    assert swap is not None
    vm.host.swap_out(GPA, 1)
    slot = next(n for n in range(len(swap.swap_map)) if swap.swap_count(n) == 1)
    swap.swap_map[slot] += 1
    with pytest.raises(BrokenTruth, match=f"slot {slot:#x} "):
        vm.close()


def test_a_bracket_that_never_closed_is_reported(vm: refault.VM) -> None:
    vm.board.kvm.mn_active_invalidate_count += 1
    with pytest.raises(BrokenTruth, match="mn_active_invalidate_count 1"):
        vm.close()


def test_closing_waits_for_the_guest_and_the_operations_under_way() -> None:
    vm = refault.VM("16M", host_ram="3M", swap="32M", seed=5, check=True, params={"sched.strategy": "random"})
    vm.load("swap-storm", "mib=4", "weather=20000")
    vm.run(until=lambda: vm.board.operations_inside > 0 and vm.board.host.mm.swap_device.inflight)
    assert vm.board.operations_inside
    vm.close()
    assert frames_in_use(vm) == 0


def test_a_vm_that_is_being_destroyed_takes_no_operations(vm: refault.VM) -> None:
    vm.close()
    with pytest.raises(KernelError) as refused:
        vm.host.age(GPA, 1)
    assert refused.value.errno == errno.ESRCH


def test_a_vcpu_that_must_drop_its_root_holds_no_translations() -> None:
    """Zapping an invalidated root flushes nothing: the vCPU flushes when it loads the next one."""
    backend = EmulatorBackend(check=True, mmu="ept")
    backend.load(0)
    slot = backend.vm.host.slot_create(0x2000_0000)
    backend.vm.host.slot_delete(slot)
    assert backend.vm.host.swap_out(0, pages=8) > 0
    assert backend.vm.host.reclaim(pages=8) > 0
    backend.close()


def test_code_that_is_unmapped_before_its_mmio_is_emulated_is_fetched_again() -> None:
    backend = EmulatorBackend(check=True, mmu="ept")
    board = backend.board
    emulate, calls = board.cpu.emulate, 0

    def late(vcpu: Any, gpa: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            # Another CPU's notifier, between the exit and the emulator's look at the instruction.
            zap_for_instrument(board.kvm, CODE >> 12)
        return emulate(vcpu, gpa)

    board.cpu.emulate = late  # type: ignore[method-assign]
    assert backend.load(0x2000_0000 - DATA_GPA) == "MMIO read of 8 bytes at 0x20000000"
    assert calls == 2
    backend.close()


def test_a_vcpu_that_is_about_to_drop_its_root_holds_no_translations() -> None:
    """The request is served already, the root not dropped yet: memory may be freed at that moment."""
    backend = EmulatorBackend(check=True, mmu="ept")
    backend.load(0)
    board = backend.board
    slot = backend.vm.host.slot_create(0x2000_0000)
    backend.vm.host.slot_delete(slot)
    vcpu = board.vcpus[0]
    assert kvm_check_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu)
    assert backend.vm.host.swap_out(0, pages=8) > 0
    assert backend.vm.host.reclaim(pages=8) > 0
    kvm_make_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS, vcpu)
    backend.close()


def test_a_guest_that_runs_code_from_a_device_is_not_tried_again() -> None:
    backend = EmulatorBackend(check=True, mmu="ept")
    assert backend.fetch(0x2000_0000 - DATA_GPA) == "ERROR"
    assert backend.board.stop is not None
    assert "cannot be emulated" in backend.board.stop.why
    backend.close()


def test_two_forks_at_once_make_one_child() -> None:
    params = {"sched.strategy": "random", "sched.period": "2"}
    vm = refault.VM("8M", host_ram="4M", swap="16M", check=True, params=params)
    vm.write(GPA, b"something")
    sched, board = vm.board.host.sched, vm.board
    answers: list[int] = []

    def fork() -> None:
        try:
            answers.append(perform(board, "fork"))
        except KernelError as exc:
            answers.append(-(exc.errno or 0))

    tasks = [sched.spawn(f"fork {n}", fork) for n in range(3)]
    sched.run_until(lambda: all(task.done for task in tasks))
    assert sorted(answers) == [-errno.EBUSY, -errno.EBUSY, 0]
    vm.close()
    assert frames_in_use(vm) == 0
