"""Guest memory that is locked, or moved away and back, under a guest that runs."""

from __future__ import annotations

import pytest

import refault
from emu.hostops import perform
from host_mm.kernel.errors import KernelError

GPA = 0x200000
CHUNK = 64
"""Pages that move at once."""


def test_a_guest_whose_memory_is_moved_about_never_knows() -> None:
    params = {"sched.strategy": "random", "sched.period": "6"}
    with refault.VM("8M", host_ram="16M", seed=1, check=True, params=params) as vm:
        vm.load("swap-storm", "mib=2", "weather=0")
        board, met = vm.board, 0

        def mover() -> None:
            number = 0
            while board.stop is None:
                perform(board, "mremap", GPA + (number % 8) * CHUNK * 4096, CHUNK)
                board.host.sched.sleep(50_000)
                number += 1

        board.host.sched.spawn("mover", mover)

        def waiting() -> bool:
            nonlocal met
            met += bool(board.moved_back.waiters)
            return False

        stop = vm.run(waiting)
        assert (stop.kind, stop.status) == ("exit", 0), stop
        assert met, "no access of the guest met the hole: nothing was tried"
        assert "FAIL" not in vm.serial
        vm.finish()


def test_locked_guest_memory_stays_in_its_frames_until_it_is_unlocked() -> None:
    with refault.VM("4M", host_ram="8M", check=True) as vm:
        for page in range(8):
            vm.host.host_write(GPA + page * 4096, page + 1)
        vm.host.mlock(GPA, 8)
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.swap_out(GPA, 8)
        vm.host.reclaim(2000)
        vmm, hva = vm.board.vmm, vm.board.memory.hva(GPA)
        assert all(vmm.present_pfn(hva + page * 4096) > 0 for page in range(8))
        assert vm.vmstat["nr_mlock"] == 8
        assert vm.host.age(GPA, 8) == 0, "nobody asks whether locked pages are young"
        vm.host.munlock(GPA, 8)
        assert vm.vmstat["nr_mlock"] == 0
        assert vm.host.swap_out(GPA, 8) == 8
        assert [vm.host.host_read(GPA + page * 4096) for page in range(8)] == list(range(1, 9))


def test_what_the_operations_refuse() -> None:
    with refault.VM("4M", host_ram="8M") as vm:
        for call in (vm.host.mlock, vm.host.munlock, vm.host.mremap):
            with pytest.raises(KernelError, match="EFAULT"):
                call(0x1000_0000, 1)
            with pytest.raises(KernelError, match="EINVAL"):
                call(GPA + 1, 1)
        vm.board.moving = True
        with pytest.raises(KernelError, match="EBUSY"):
            vm.host.mremap(GPA, 1)
        vm.board.moving = False


def test_mremap_brings_every_page_back_to_its_frame() -> None:
    with refault.VM("4M", host_ram="8M", check=True) as vm:
        vm.host.host_write(GPA, 7)
        vmm, hva = vm.board.vmm, vm.board.memory.hva(GPA)
        before, vmas = vmm.present_pfn(hva), [(v.start, v.end) for v in vm.board.process.mm.vmas]
        assert vm.host.mremap(GPA, 16) == 0
        assert vmm.present_pfn(hva) == before
        assert [(v.start, v.end) for v in vm.board.process.mm.vmas] == vmas
