"""Frames behind a guest that runs are moved, taken, put out of use, pinned, and fail."""

from __future__ import annotations

import random

import pytest

import refault
from emu.hostops import perform
from host_mm.kernel.errors import KernelError

GPA = 0x200000
PAGE = 4096

READS = """; reads: memory that has failed
.include "runtime.inc"

main:
    mov rbx, 0x300000
    mov qword ptr [rbx], 7
    HOST4 VMCALL_MEMORY_FAILURE, rbx, {recover}, 0, 0
    mov rax, qword ptr [rbx]
    CHECK_EQ "lost", rax, 0
    mov qword ptr [rbx], 9
    mov rax, qword ptr [rbx]
    CHECK_EQ "goes on", rax, 9
    ret
"""


def frame(vm: refault.VM, gpa: int) -> int:
    return vm.board.vmm.present_pfn(vm.board.memory.hva(gpa))


def filled(pages: int = 64, **kw: object) -> refault.VM:
    vm = refault.VM("8M", check=True, **kw)  # type: ignore[arg-type]
    for page in range(pages):
        vm.host.host_write(GPA + page * PAGE, page + 1)
    return vm


def intact(vm: refault.VM, pages: int = 64) -> bool:
    return all(vm.host.host_read(GPA + page * PAGE) == page + 1 for page in range(pages))


def test_a_guest_goes_on_while_its_frames_are_moved_taken_and_retired() -> None:
    params = {"sched.strategy": "random", "sched.period": "6", "mm.page_group_by_mobility": "Y"}
    with refault.VM("8M", host_ram="24M", seed=1, check=True, params=params) as vm:
        vm.load("swap-storm", "mib=2", "weather=0")
        board = vm.board
        refused: list[str] = []

        def handyman() -> None:
            rng = random.Random(1)
            number = 0
            while board.stop is None:
                gpa = GPA + rng.randrange(256) * PAGE
                taken: list[tuple[str, int]] = []
                for name, back, args in (
                    ("compact", "", ()), ("contig_alloc", "contig_free", (gpa, 8)),
                    ("offline", "online", (gpa,)), ("mbind", "", (gpa, 16, number % 2)),
                    ("soft_offline", "", (gpa, 1)),
                ):
                    try:
                        answer = perform(board, name, *args)
                    except KernelError as exc:
                        refused.append(f"{name} {exc.name}")
                    else:
                        if back:
                            taken.append((back, answer))
                board.host.sched.sleep(20_000)
                for back, answer in taken:
                    perform(board, back, answer)
                number += 1

        board.host.sched.spawn("handyman", handyman)
        stop = vm.run()
        assert (stop.kind, stop.status) == ("exit", 0), stop
        assert "FAIL" not in vm.serial
        assert vm.vmstat["pgmigrate_success"] > 50
        assert {what.split()[1] for what in refused} <= {"EBUSY", "EFAULT", "EIO"}, refused
        vm.finish()


def test_frames_that_a_device_takes_are_given_back_when_the_vm_goes() -> None:
    with filled() as vm:
        vm.host.migrate(GPA, 64)
        pfn = vm.host.contig_alloc(GPA, 8)
        assert not pfn % 8
        vm.host.pin(GPA + 30 * PAGE, 4)
        assert intact(vm)
    with filled() as vm:
        vm.host.migrate(GPA, 64)
        assert vm.host.offline(GPA) % 512 == 0
        assert intact(vm)


def test_pinned_memory_stays_where_it_is_and_keeps_its_block() -> None:
    with filled() as vm:
        vm.host.migrate(GPA, 64)
        vm.host.pin(GPA + PAGE, 2)
        before = [frame(vm, GPA + page * PAGE) for page in range(4)]
        assert vm.host.migrate(GPA, 4) == 2
        assert [frame(vm, GPA + page * PAGE) for page in (1, 2)] == before[1:3]
        for call in (lambda: vm.host.offline(GPA + PAGE), lambda: vm.host.contig_alloc(GPA + PAGE, 1)):
            with pytest.raises(KernelError, match="EBUSY"):
                call()
        with pytest.raises(KernelError, match="EBUSY"):
            vm.host.soft_offline(GPA + PAGE, 1)
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.unpin(GPA, 2)
        vm.host.unpin(GPA + PAGE, 2)
        vm.host.soft_offline(GPA + PAGE, 1)
        assert frame(vm, GPA + PAGE) != before[1]
        assert intact(vm)


def test_a_long_pin_takes_guest_memory_out_of_zone_movable() -> None:
    with filled(params={"mm.movablecore": "8M"}) as vm:
        zone_of = vm.board.host.mm.allocator.zone_of
        assert zone_of(frame(vm, GPA)).name == "Movable"
        vm.host.pin(GPA, 16)
        assert {zone_of(frame(vm, GPA + page * PAGE)).name for page in range(17)} == {"Normal", "Movable"}
        assert {zone_of(frame(vm, GPA + page * PAGE)).name for page in range(16)} == {"Normal"}
        assert vm.host.offline(GPA + 20 * PAGE) > 0
        assert intact(vm)


def test_mbind_moves_and_says_how_many_are_there() -> None:
    with filled() as vm:
        assert vm.host.mbind(GPA, 16, 1) == 16
        assert vm.host.mbind(GPA, 64, 0) == 64
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.mbind(GPA, 1, 7)
        assert intact(vm)


def test_what_the_operations_refuse() -> None:
    with refault.VM("4M", host_ram="8M", check=True) as vm:
        for call in (vm.host.contig_alloc, vm.host.offline, vm.host.memory_failure):
            with pytest.raises(KernelError, match="EFAULT"):
                call(0x1000_0000)
            with pytest.raises(KernelError, match="EFAULT"):
                call(GPA)
            with pytest.raises(KernelError, match="EINVAL"):
                call(GPA + 1)
        vm.host.host_write(GPA, 1)
        for call, args in (
            (vm.host.contig_alloc, (GPA, 3)), (vm.host.contig_alloc, (GPA, 1024)),
            (vm.host.contig_free, (77,)), (vm.host.online, (512,)), (vm.host.pin, (GPA, 0)),
            (vm.host.memory_failure, (GPA, 2)),
        ):
            with pytest.raises(KernelError, match="EINVAL"):
                call(*args)


def test_a_guest_that_reads_failed_memory_finds_zeros_and_goes_on(tmp_path: object) -> None:
    vm = poisoned(tmp_path, recover=1)
    stop = vm.run()
    assert (stop.kind, stop.status) == ("exit", 0), (stop, vm.serial)
    assert vm.vmstat["pgfault"] > 0
    vm.finish()
    vm.close()


def test_without_a_vmm_that_recovers_the_run_ends_with_a_line(tmp_path: object) -> None:
    vm = poisoned(tmp_path, recover=0)
    stop = vm.run()
    assert stop.kind == "error"
    assert stop.why == "SIGBUS (BUS_MCEERR_AR): the memory behind gpa 0x300000 has failed"
    vm.close()


def poisoned(tmp_path: object, recover: int) -> refault.VM:
    path = tmp_path / "reads.s"  # type: ignore[operator]
    path.write_text(READS.format(recover=recover))
    vm = refault.VM("8M", check=True)
    vm.load(str(path))
    return vm
