"""emu/devices/flash.py: commands, the array as a read-only slot, the status while a command is open."""

import pytest

import refault
from emu.devices.flash import ERASE_BLOCK, STATUS_BAD_SEQUENCE, STATUS_READY
from host_mm.kernel.errors import KernelError
from kvm_model.memslots import KVM_MEM_READONLY

GPA, SOURCE = 0xE0000000, 0x200000


@pytest.fixture
def vm():
    with refault.VM("8M", seed=1, check=True) as vm:
        vm.write(SOURCE, bytes(range(256)) * 32)
        vm.host.flash(GPA, 2, SOURCE)
        yield vm


def do(vm, *writes):
    def stores():
        for offset, size, value in writes:
            vm.board.flash.write(GPA + offset, size, value)

    vm.board.host.sched.run_task("stores", stores)


def array(vm, offset, length):
    return vm.read(GPA + offset, length)


def test_the_array_is_a_read_only_slot_with_the_image(vm):
    region = vm.board.flash.region
    assert region.flags == KVM_MEM_READONLY
    assert vm.board.kvm.slots().gfn_to_memslot(GPA >> 12).flags & KVM_MEM_READONLY
    assert array(vm, 0, 0x2000) == bytes(range(256)) * 32


def test_the_slot_is_away_while_a_command_is_open(vm):
    flash = vm.board.flash
    do(vm, (0, 1, 0x70))
    assert flash.region.deleted
    assert vm.board.kvm.slots().gfn_to_memslot(GPA >> 12) is None
    assert flash.read(GPA + 7, 4) == STATUS_READY
    do(vm, (0, 1, 0xFF))
    assert not flash.region.deleted
    assert vm.board.kvm.slots().gfn_to_memslot(GPA >> 12).flags & KVM_MEM_READONLY


def test_programming_clears_bits(vm):
    do(vm, (0x80, 1, 0x40), (0x80, 2, 0x0F0F), (0, 1, 0xFF))
    assert array(vm, 0x7F, 4) == bytes([0x7F, 0x80 & 0x0F, 0x81 & 0x0F, 0x82])


def test_an_erased_block_is_ones_and_its_neighbour_as_it_was(vm):
    do(vm, (0x1234, 1, 0x20), (0x1234, 1, 0xD0), (0, 1, 0xFF))
    assert array(vm, 0x1000, ERASE_BLOCK) == b"\xff" * ERASE_BLOCK
    assert array(vm, 0, ERASE_BLOCK) == bytes(range(256)) * 16


def test_what_is_not_confirmed_is_told_until_it_is_cleared(vm):
    do(vm, (0, 1, 0x20), (0, 1, 0x11), (0, 1, 0x70))
    assert vm.board.flash.read(GPA, 1) == STATUS_READY | STATUS_BAD_SEQUENCE
    do(vm, (0, 1, 0x50), (0, 1, 0x70))
    assert vm.board.flash.read(GPA, 1) == STATUS_READY


@pytest.mark.parametrize(("call", "errno"), [
    ("flash(0xE0400000, 1, 0x200000)", 17), ("flash(0xE0400000, 0, 0x200000)", 22),
])
def test_bad_arguments(vm, call, errno):
    with pytest.raises(KernelError) as refused:
        eval(f"host.{call}", {"host": vm.host})
    assert refused.value.errno == errno
