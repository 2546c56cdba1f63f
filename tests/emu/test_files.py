"""The VMM's files, and guest memory that is theirs (emu/files.py, emu/operations/files.py, emu/memory.py)."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EACCES, EBADF, EEXIST, EINVAL, ENOENT, ENOMEM
from pathlib import Path

import pytest

import refault
from emu import files
from host_mm.kernel.errors import KernelError
from refault.errors import UsageError

SLOT = 0xE000_0000


@pytest.fixture
def vm() -> Iterator[refault.VM]:
    with refault.VM("8M", seed=1, check=True) as machine:
        yield machine
        machine.finish()


@pytest.mark.parametrize("make", ["memfd_create", "file_create"])
def test_what_a_peer_stores_the_vm_reads_and_the_other_way_round(vm: refault.VM, make: str) -> None:
    getattr(vm.host, make)(gpa=SLOT, pages=16)
    vm.host.host_write(gpa=SLOT + 8, value=1)
    vm.host.peer_write(gpa=SLOT, value=0x1234)
    assert vm.host.host_read(gpa=SLOT) == 0x1234
    assert vm.host.host_read(gpa=SLOT + 8) == 1
    vm.host.file_write(gpa=SLOT + 16, value=5, size=4)
    assert vm.host.host_read(gpa=SLOT + 16) == 5


def test_a_private_slot_keeps_what_it_wrote_until_the_file_is_cut(vm: refault.VM) -> None:
    vm.host.file_create(gpa=SLOT, pages=16, private=1)
    vm.host.host_write(gpa=SLOT, value=1)
    vm.host.peer_write(gpa=SLOT, value=2)
    vm.host.peer_write(gpa=SLOT + 0x1000, value=3)
    assert vm.host.host_read(gpa=SLOT) == 1
    assert vm.host.host_read(gpa=SLOT + 0x1000) == 3
    vm.host.punch_hole(gpa=SLOT, pages=2)
    assert vm.host.host_read(gpa=SLOT) == 1
    assert vm.host.host_read(gpa=SLOT + 0x1000) == 0
    vm.host.truncate(gpa=SLOT)
    assert vm.host.host_read(gpa=SLOT) == 0


def test_memory_that_was_removed_reads_as_zeros(vm: refault.VM) -> None:
    vm.host.memfd_create(gpa=SLOT, pages=16)
    for page in range(3):
        vm.host.host_write(gpa=SLOT + 0x1000 * page, value=7)
    vm.host.remove(gpa=SLOT, pages=2)
    assert [vm.host.host_read(gpa=SLOT + 0x1000 * page) for page in range(3)] == [0, 0, 7]


def test_shared_memory_goes_to_swap_and_comes_back(vm: refault.VM) -> None:
    vm.host.memfd_create(gpa=SLOT, pages=16)
    for page in range(16):
        vm.host.host_write(gpa=SLOT + 0x1000 * page, value=page + 1)
    assert vm.host.swap_out(gpa=SLOT, pages=16) == 16
    assert [vm.host.host_read(gpa=SLOT + 0x1000 * page) for page in range(16)] == list(range(1, 17))


def test_mistakes_are_answered_by_name(vm: refault.VM) -> None:
    vm.host.file_create(gpa=SLOT, pages=16, private=1)
    wrong = [
        (lambda: vm.host.fsync(gpa=0x200000), EBADF), (lambda: vm.host.punch_hole(gpa=0x200000), EBADF),
        (lambda: vm.host.truncate(gpa=0x200000), EBADF), (lambda: vm.host.remove(gpa=0x200000), EINVAL),
        (lambda: vm.host.remove(gpa=SLOT), EACCES), (lambda: vm.host.truncate(gpa=SLOT + 1), EINVAL),
        (lambda: vm.host.file_create(gpa=SLOT, pages=1), EEXIST),
        (lambda: vm.host.file_create(gpa=SLOT + (1 << 20), pages=1 << 52), ENOMEM),
        (lambda: vm.host.memfd_create(gpa=SLOT + (1 << 20), pages=1 << 52), ENOMEM),
        (lambda: vm.host.memfd_create(gpa=SLOT, pages=1), EEXIST),
        (lambda: vm.host.file_create(gpa=SLOT + (1 << 20), pages=1, private=2), EINVAL),
    ]
    for call, number in wrong:
        with pytest.raises(KernelError) as refused:
            call()
        assert refused.value.errno == number


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_a_guest_whose_ram_is_a_file_runs_in_any_weather(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "ram"
    backend = "memfd" if kind == "memfd" else f"file:{path}"
    with refault.VM("8M", memory_backend=backend, seed=3, check=True) as machine:
        machine.load("swap-storm", "mib=4")
        stop = machine.run(max_insns=3_000_000)
        assert stop.kind == "limit"
        machine.host.host_write(gpa=0x1000, value=0x5EED)
        machine.finish()
    if kind == "file":
        assert path.stat().st_size == 8 << 20
        assert path.read_bytes()[0x1000:0x1008] == (0x5EED).to_bytes(8, "little")


def test_ram_beyond_the_hole_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with refault.VM("3076M", memory_backend=f"file:{path}", host_ram="64M", swap=None, check=True) as machine:
        machine.host.host_write(gpa=(4 << 30) + 0x1000, value=9)
        machine.finish()
    with path.open("rb") as file:
        file.seek((3 << 30) + 0x1000)
        assert file.read(1) == b"\x09"


def test_a_backend_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="memory_backend 'tape'"):
        refault.VM("8M", memory_backend="tape")
    with pytest.raises(KernelError) as refused:
        refault.VM("8M", memory_backend=f"file:{tmp_path}/none/ram")
    assert refused.value.errno == ENOENT


def test_a_file_that_is_given_bytes_has_them_in_the_cache_and_on_disk(vm: refault.VM) -> None:
    board = vm.board

    def use() -> None:
        at = files.mmap_file(board.vmm, 0x10000, data=b"\x11" * 0x10000)
        assert files.file_size(board.vmm, at) == 0x10000
        mapping, pos = files.file_at(board.vmm, at + 0x3000)
        assert pos == 0x3000
        assert not mapping.dirty
        assert board.vmm.read(at + 0x3000, 2) == b"\x11\x11"
        board.vmm.munmap(at, 0x10000)

    board.host.sched.run_task("vmm", use)
