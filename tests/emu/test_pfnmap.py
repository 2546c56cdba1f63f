"""A guest uses a PCI function's memory in a slot, and loses it to a reset (emu/operations/pfnmap.py)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import refault
from host_mm.kernel.errors import KernelError

GPA = 0xE000_0000
PAYLOAD = """
; pfnmap: the guest's view of a function's memory
.include "runtime.inc"
main:
    HOST2 VMCALL_PFNMAP_CREATE, qword ptr [bar], 4
    mov [slot], rax
    HOST_CHECK "created", 1
    mov rdi, [bar]
    mov ebx, 20
.again:
    CHECK_EQ "zeros", qword ptr [rdi + 4096], 0
    mov [rdi + 4096], rbx
    CHECK_EQ "kept", qword ptr [rdi + 4096], rbx
    lea rsi, [rdi + 4096]
    HOST2 VMCALL_HOST_READ, rsi, 4
    CHECK_EQ "the VMM sees it", rax, rbx
    HOST0 VMCALL_FORK
    mov [rsi], ebx
    HOST2 VMCALL_CHILD_READ, rsi, 4
    CHECK_EQ "a child shares it", rax, rbx
    HOST0 VMCALL_CHILD_EXIT
    HOST1 VMCALL_PFNMAP_REVOKE, qword ptr [slot]
    CHECK_EQ "reset", rax, 0
    dec ebx
    jnz .again
    ret
.section bss
.align 8
slot: .skip 8
.section rodata
.align 8
bar: .quad 0xE0000000
"""


@pytest.fixture
def payload(tmp_path: Path) -> str:
    path = tmp_path / "pfnmap.s"
    path.write_text(PAYLOAD.lstrip())
    return str(path)


@pytest.mark.parametrize("params", [{}, {"sched.strategy": "random", "sched.period": "2"}])
def test_a_guest_uses_it_and_every_reset_gives_other_frames(payload: str, params: dict[str, str]) -> None:
    with refault.VM(memory="4M", host_ram="8M", check=True, params=params) as vm:
        vm.load(payload)
        with vm.trace("refault:gup_answer", "refault:mmu_notifier_start") as recording:
            vm.run()
        assert "FAIL" not in vm.serial, vm.serial
        assert " 0 unexpected failures" in vm.serial
        answers = [e.args for e in recording.trace().events if e.event == "refault:gup_answer"]
        frames = [a["pfn"] for a in answers if a["gfn"] == (GPA >> 12) + 1 and a["answer"] == "remapped"]
        assert len(frames) == 20
        assert all(one != following for one, following in itertools.pairwise(frames))


def test_what_the_operations_refuse_leaves_nothing_behind() -> None:
    with refault.VM(memory="4M", host_ram="8M", check=True) as vm:
        slot = vm.host.pfnmap_create(GPA, 2)
        for call, name in (
            (lambda: vm.host.pfnmap_create(GPA + 0x1000, 1), "EEXIST"),
            (lambda: vm.host.pfnmap_create(GPA + 1, 1), "EINVAL"),
            (lambda: vm.host.pfnmap_create(GPA + 0x100000, 100_000), "ENOSPC"),
            (lambda: vm.host.pfnmap_revoke(0), "ENOENT"),
        ):
            with pytest.raises(KernelError, match=name):
                call()
        vm.host.host_write(GPA, 5)
        vm.host.slot_delete(slot)
        vm.host.slot_restore(slot)
        assert vm.host.host_read(GPA) == 5
        with pytest.raises(KernelError, match="EINVAL"):
            vm.host.swap_out(GPA)
        assert vm.host.host_read(GPA) == 5
        assert len(vm.board.host.mm.device_frames.busy) == 1


def test_a_devices_memory_is_no_file_to_the_operations_on_files() -> None:
    with refault.VM(memory="4M", host_ram="8M", check=True) as vm:
        vm.host.pfnmap_create(GPA, 2)
        vm.host.host_write(GPA, 5)
        for call in (
            lambda: vm.host.peer_write(GPA, 7),
            lambda: vm.host.file_write(GPA, 7),
            lambda: vm.host.punch_hole(GPA),
            lambda: vm.host.truncate(GPA),
            lambda: vm.host.fsync(GPA),
            lambda: vm.host.fadvise_dontneed(GPA),
        ):
            with pytest.raises(KernelError, match="EBADF"):
                call()
        assert vm.host.host_read(GPA) == 5
