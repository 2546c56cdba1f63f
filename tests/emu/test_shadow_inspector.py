"""emu/shadow_inspector.py: the guest's tables and KVM's, side by side, nothing touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import refault


@pytest.fixture(scope="module")
def vm() -> Iterator[refault.VM]:
    """In the middle of guest-paging, in ring 0."""
    with refault.VM(memory="16M", mmu="shadow", check=True) as machine:
        machine.load("guest-paging")
        machine.run(max_insns=500_000)
        yield machine


def test_each_level_shows_the_guests_entry_and_kvms(vm: refault.VM) -> None:
    rip = vm.regs()["rip"]
    tree = vm.walk(gva=rip)
    names = [step.name for step in tree.steps]
    assert names == [
        "PML4E", "shadow PML4E", "PDPTE", "shadow PDPTE", "PDE", "shadow PDE", "PTE", "shadow PTE",
    ]
    assert tree.gpa == rip
    assert tree.hpa is not None
    u64 = vm.board.host.mm.ram.u64
    for step in tree.steps:
        if step.stage == 2:
            assert u64[step.address >> 3] == step.entry
    assert vm.read(tree.steps[0].address, 8) == tree.steps[0].entry.to_bytes(8, "little")
    at_rip = bytes(vm.board.host.mm.ram.read(tree.hpa, 8))
    assert at_rip == vm.read(rip, 8)


def test_looking_leaves_no_mark(vm: refault.VM) -> None:
    before = bytes(vm.board.host.mm.ram.b)
    for gva in (vm.regs()["rip"], 0, 1 << 39, 0x3FF_FFFF, 1 << 60):
        vm.walk(gva=gva)
    assert bytes(vm.board.host.mm.ram.b) == before


def test_what_the_guest_has_not_mapped_is_the_reason(vm: refault.VM) -> None:
    tree = vm.walk(gva=0x10)
    assert tree.hpa is None
    assert tree.why == "the guest's PTE is not present"
    assert vm.walk(gva=1 << 60).why == "the address is not canonical"


def test_a_gpa_shows_every_entry_that_maps_it(vm: refault.VM) -> None:
    rip = vm.regs()["rip"]
    tree = vm.walk(gpa=rip)
    assert tree.hpa == vm.walk(gva=rip).hpa
    assert vm.walk(gva=rip).steps[-1].address in [step.address for step in tree.steps]
    assert vm.walk(gpa=15 << 20).why == f"no shadow entry maps gpa {15 << 20:#x}"


def test_tables_that_the_host_took_away_are_said_so_and_kvms_remain(vm: refault.VM) -> None:
    regs = vm.regs()
    vm.host.swap_out(gpa=regs["cr3"] & ~0xFFF, pages=1)
    tree = vm.walk(gva=regs["rip"])
    assert tree.gpa is None
    assert tree.hpa is not None
    assert tree.why.startswith("the host has no page behind the guest's PML4E")
    assert f"no gpa: {tree.why}" in str(tree)


def test_what_cannot_be_walked_is_said() -> None:
    with refault.VM("4M", mmu="shadow") as vm:
        for address in ({"gva": -1}, {"gpa": 1 << 64}):
            with pytest.raises(ValueError, match="is no address"):
                vm.walk(**address)
        with pytest.raises(IndexError, match="no vCPU 1; the machine has 1"):
            vm.walk(gva=0, vcpu=1)
