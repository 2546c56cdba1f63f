"""A guest whose pages come when it asks for them, are saved before it writes them, or are lent away."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

import refault
from emu.hostops import perform
from host_mm.kernel.errors import KernelError

GPA = 0x200000
CHUNK = 64
RANDOM = {"sched.strategy": "random", "sched.period": "6"}


@pytest.mark.parametrize("name", ["uffd_missing", "uffd_wp", "uffd_move"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_guest_with_weather_never_knows(name: str, seed: int) -> None:
    with refault.VM("8M", host_ram="24M", seed=seed, check=True, params=RANDOM) as vm:
        vm.load("swap-storm", "mib=2")
        board, served = vm.board, 0

        def driver() -> None:
            nonlocal served
            number = 0
            while board.stop is None:
                perform(board, name, GPA + (number % 8) * CHUNK * 4096, CHUNK)
                board.host.sched.sleep(300_000)
                if board.stop is not None:
                    return
                served += perform(board, "uffd_end")
                number += 1

        board.host.sched.spawn("driver", driver)
        stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0), stop
        assert served, "no access of the guest met the userfaultfd: nothing was tried"
        assert "FAIL" not in vm.serial
        vm.finish()


def live(**kw: object) -> refault.VM:
    vm = refault.VM("8M", vcpus=2, seed=1, check=True, **kw)
    vm.load("swap-storm", "mib=4", "weather=0")
    vm.run(max_insns=3_000_000)
    return vm


def test_kvm_is_told_that_it_would_have_to_wait_and_then_waits() -> None:
    with live() as vm:
        assert vm.host.uffd_missing(GPA, 512) > 400
        with vm.trace("refault:gup_answer", "refault:userfault") as recording:
            vm.run(max_insns=4_000_000)
        events = recording.trace().events
        asked = [event.args["address"] for event in events if event.event == "refault:userfault"]
        assert asked
        answers = {
            hva: [e.args["answer"] for e in events if e.args.get("hva") == hva and "answer" in e.args]
            for hva in asked
        }
        seen = {tuple(found[:2]) for found in answers.values()}
        assert ("needs-io", "slow") in seen
        assert seen <= {("needs-io", "slow"), ("needs-io",)}, "the last ones still wait"
        vm.finish()
        assert vm.host.uffd_end() >= len(asked)


def test_what_the_thread_does_has_the_fault_as_its_cause() -> None:
    with live() as vm:
        vm.host.uffd_wp(GPA, 512)
        with vm.trace("refault:mmu_notifier_start", "refault:userfault") as recording:
            vm.run(max_insns=4_000_000)
        events = {event.seq: event for event in recording.trace().events}
        resolved = [
            event for event in events.values()
            if event.event == "refault:mmu_notifier_start" and event.args["event"] == "protection-vma"
        ]
        assert resolved
        assert all(
            events[event.cause].event == "refault:host_fault" for event in resolved if event.cause is not None
        )
        assert all(event.cause is not None for event in resolved)
        vm.finish()


def test_a_snapshot_has_the_bytes_of_its_moment_and_counts_the_pages_written() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        for page in range(4):
            vm.host.host_write(GPA + page * 4096, page + 1)
        assert vm.host.uffd_wp(GPA, 8) == 0
        vm.host.host_write(GPA, 0x77)
        vm.host.host_write(GPA, 0x78)
        vm.host.host_write(GPA + 5 * 4096, 0x79)
        assert [vm.host.uffd_read(GPA + page * 4096) for page in range(6)] == [1, 2, 3, 4, 0, 0]
        assert vm.host.host_read(GPA) == 0x78
        assert vm.host.uffd_end() == 2
        assert vm.host.host_read(GPA + 5 * 4096) == 0x79


def test_pages_that_were_set_aside_come_one_by_one_and_at_the_end_all() -> None:
    for name in ("uffd_missing", "uffd_move"):
        with refault.VM("4M", host_ram="16M", check=True) as vm:
            for page in range(8):
                vm.host.host_write(GPA + page * 4096, page + 1)
            assert getattr(vm.host, name)(GPA, 16) == 8
            vmm, hva = vm.board.vmm, vm.board.memory.hva(GPA)
            assert [vmm.present_pfn(hva + page * 4096) for page in range(8)] == [-1] * 8
            assert vm.host.host_read(GPA + 3 * 4096) == 4
            assert vm.host.host_read(GPA + 9 * 4096) == 0
            assert vmm.present_pfn(hva) == -1
            assert vm.host.uffd_end() == 2
            assert [vm.host.host_read(GPA + page * 4096) for page in range(9)] == [1, 2, 3, 4, 5, 6, 7, 8, 0]


def test_lent_pages_that_a_fork_shared_come_back_as_copies() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        vm.host.host_write(GPA, 7)
        assert vm.host.uffd_move(GPA, 4) == 1
        child = vm.board.vmm.fork()
        assert vm.host.host_read(GPA) == 7
        child.exit()
        vm.host.uffd_end()


def test_pagemap_scan_counts_what_was_written_since() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        for page in range(4):
            vm.host.host_write(GPA + page * 4096, 1)
        assert vm.host.pagemap_scan(GPA, 16) == 4
        assert vm.host.pagemap_scan(GPA, 16) == 0
        vm.host.host_write(GPA + 4096, 2)
        vm.host.host_write(GPA + 9 * 4096, 2)
        vm.host.host_read(GPA)
        assert vm.host.pagemap_scan(GPA, 16, protect=0) == 2
        assert vm.host.pagemap_scan(GPA, 16) == 2
        vm.host.swap_out(GPA, 4)
        assert vm.host.pagemap_scan(GPA, 16) == 0


@pytest.mark.parametrize("name", ["uffd_missing", "uffd_wp", "uffd_move"])
def test_a_vm_can_be_closed_with_its_pages_elsewhere_and_a_vcpu_waiting(name: str) -> None:
    with live(params=RANDOM) as vm:
        getattr(vm.host, name)(GPA, 512)
        waits: Callable[[], bool] = lambda: bool(vm.board.uffd and vm.board.uffd.ctx.fault_pending)  # noqa: E731
        vm.run(waits)
    assert vm.board.uffd is not None


def test_what_the_operations_refuse() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        calls = [vm.host.uffd_missing, vm.host.uffd_wp, vm.host.uffd_move, vm.host.pagemap_scan]
        for call in calls:
            with pytest.raises(KernelError, match="EFAULT"):
                call(0x1000_0000, 1)
            with pytest.raises(KernelError, match="EINVAL"):
                call(GPA + 1, 1)
        with pytest.raises(KernelError, match="ENOENT"):
            vm.host.uffd_end()
        with pytest.raises(KernelError, match="ENOENT"):
            vm.host.uffd_read(GPA, 8)
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.pagemap_scan(GPA, 1, protect=2)


def test_the_next_use_ends_the_one_before_and_nothing_is_lost() -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        host = vm.host
        uses = [host.uffd_missing, host.uffd_move, host.uffd_wp, host.pagemap_scan, host.mremap]
        for number, (first, second) in enumerate(itertools.product(uses, uses)):
            for page in range(4):
                host.host_write(GPA + page * 4096, number * 4 + page)
            first(GPA, 8)
            second(GPA, 8)
            found = [host.host_read(GPA + page * 4096) for page in range(4)]
            assert found == [number * 4 + page for page in range(4)]


@pytest.mark.parametrize("name", ["uffd_missing", "uffd_move"])
def test_a_forked_child_has_the_pages_that_were_elsewhere(name: str) -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        vm.host.host_write(GPA, 7)
        getattr(vm.host, name)(GPA, 4)
        vm.host.fork()
        vm.host.host_write(GPA, 8)
        assert vm.host.child_read(GPA) == 7
        vm.host.child_exit()
        assert vm.host.host_read(GPA) == 8


@pytest.mark.parametrize("name", ["uffd_missing", "uffd_move"])
def test_dropping_pages_drops_them_where_they_are(name: str) -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        vm.host.host_write(GPA, 7)
        vm.host.host_write(GPA + 4096, 8)
        getattr(vm.host, name)(GPA, 4)
        vm.host.dontneed(GPA, 1)
        assert [vm.host.host_read(GPA), vm.host.host_read(GPA + 4096)] == [0, 8]


@pytest.mark.parametrize("name", ["uffd_missing", "uffd_move", "uffd_wp"])
@pytest.mark.parametrize("prot", [0, 1])
def test_rights_that_change_meanwhile_lose_nothing(name: str, prot: int) -> None:
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        for page in range(4):
            vm.host.host_write(GPA + page * 4096, page + 1)
        hva = vm.board.memory.hva(GPA)
        getattr(vm.host, name)(GPA, 4)
        vm.board.vmm.mprotect(hva, 2 * 4096, prot)
        if prot:
            assert vm.host.host_read(GPA) == 1
        vm.host.uffd_end()
        vm.board.vmm.mprotect(hva, 2 * 4096, 3)
        assert [vm.host.host_read(GPA + page * 4096) for page in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_operations_beside_each_other_wait_for_each_other(seed: int) -> None:
    names = ["uffd_missing", "uffd_move", "uffd_wp", "pagemap_scan", "fork", "mremap"]
    with refault.VM("4M", host_ram="16M", seed=seed, check=True, params=RANDOM) as vm:
        for page in range(8):
            vm.host.host_write(GPA + page * 4096, page + 1)
        sched = vm.board.host.sched
        tasks = []
        for name in names:
            args = () if name == "fork" else (GPA, 8)
            tasks.append(sched.spawn(name, lambda name=name, args=args: perform(vm.board, name, *args)))
        sched.run_until(lambda: all(task.done for task in tasks))
        assert [vm.host.host_read(GPA + page * 4096) for page in range(8)] == list(range(1, 9))
        assert [vm.host.child_read(GPA + page * 4096) for page in range(8)] == list(range(1, 9))
        vm.host.child_exit()


def test_shared_memory_is_mapped_page_by_page_when_it_is_touched() -> None:
    gpa = 0xE000_0000
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        vm.host.memfd_create(gpa, 16)
        for page in range(4):
            vm.host.host_write(gpa + page * 4096, page + 1)
        assert vm.host.uffd_minor(gpa, 16) == 0
        vmm, hva = vm.board.vmm, vm.board.memory.hva(gpa)
        assert vmm.present_pfn(hva) == -1
        assert [vm.host.host_read(gpa + page * 4096) for page in range(6)] == [1, 2, 3, 4, 0, 0]
        assert vm.host.uffd_end() == 4
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.uffd_minor(GPA, 1)
        assert vm.host.host_read(gpa) == 1


@pytest.mark.parametrize("name", ["uffd_missing", "uffd_wp", "uffd_move", "pagemap_scan"])
def test_shared_memory_takes_the_other_uses_as_well(name: str) -> None:
    gpa = 0xE000_0000
    with refault.VM("4M", host_ram="16M", check=True) as vm:
        vm.host.memfd_create(gpa, 16)
        for page in range(4):
            vm.host.host_write(gpa + page * 4096, page + 1)
        getattr(vm.host, name)(gpa, 16)
        vm.host.host_write(gpa, 9)
        assert [vm.host.host_read(gpa + page * 4096) for page in range(4)] == [9, 2, 3, 4]
        if name == "pagemap_scan":
            assert vm.host.pagemap_scan(gpa, 16) == 1
        else:
            vm.host.uffd_end()
        assert [vm.host.host_read(gpa + page * 4096) for page in range(6)] == [9, 2, 3, 4, 0, 0]


def test_linux_5_10_has_missing_and_write_protect_faults_only() -> None:
    with refault.VM("4M", host_ram="16M", check=True, profile="linux-5.10") as vm:
        for page in range(4):
            vm.host.host_write(GPA + page * 4096, page + 1)
        for call in (vm.host.uffd_move, vm.host.uffd_minor, vm.host.pagemap_scan):
            with pytest.raises(KernelError, match="ENOSYS"):
                call(GPA, 4)
        assert vm.host.uffd_wp(GPA, 8) == 0
        vm.host.host_write(GPA, 9)
        assert vm.host.uffd_read(GPA) == 1
        assert vm.host.uffd_end() == 1
        assert vm.host.uffd_missing(GPA, 8) == 4
        assert vm.host.host_read(GPA) == 9
        vm.host.uffd_end()
