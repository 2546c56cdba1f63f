"""A guest on shadow tables, whole: its own tables go while KVM walks them; KVM counts what it must."""

from __future__ import annotations

import random

import pytest

import refault
from emu.hostops import perform

TABLES = 0x120000
"""From here on the payload's runtime has its first tables; its heap, with the others, follows the image."""
HEAP = 0x200000


def disturb(vm: refault.VM, rng: random.Random) -> None:
    """The host takes pages of the guest's tables and data away, or moves them."""
    base = rng.choice((TABLES, HEAP))
    gpa = base + (rng.randrange(48) << 12)
    operation = rng.choice((vm.host.swap_out, vm.host.migrate, vm.host.swap_out))
    operation(gpa=gpa, pages=rng.randint(1, 16))


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize(("payload", "words"), [
    ("guest-paging", ("pages=4",)), ("shadow-pt", ("pages=8", "rounds=1", "spaces=5")),
])
def test_tables_that_are_swapped_and_moved_translate_as_before(
    payload: str, words: tuple[str, ...], profile: str
) -> None:
    rng = random.Random(f"{payload} {profile}")
    with refault.VM(memory="16M", mmu="shadow", check=True, profile=profile) as vm:
        vm.load(payload, *words)
        steps = 0
        while True:
            stop = vm.run(max_insns=rng.choice((40, 150, 600)))
            if stop.kind != "limit":
                break
            steps += 1
            disturb(vm, rng)
        assert stop.kind == "exit", f"{stop}\n{vm.serial}"
        assert " 0 unexpected failures" in vm.serial, vm.serial
        assert steps > 20
        assert vm.vmstat["pswpin"] > 5
        assert vm.vmstat["pgmigrate_success"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_tables_go_in_the_middle_of_a_walk(seed: int) -> None:
    params = {"sched.strategy": "random", "sched.period": "3"}
    with refault.VM(memory="16M", mmu="shadow", check=True, seed=seed, params=params, vcpus=2) as vm:
        vm.load("shadow-pt", "pages=6", "rounds=1", "spaces=4")
        rng = random.Random(seed)
        board = vm.board

        def weather() -> None:
            while board.stop is None:
                gpa = rng.choice((TABLES, HEAP)) + (rng.randrange(48) << 12)
                perform(board, rng.choice(("swap_out", "migrate")), gpa=gpa, pages=2)
                board.host.sched.yield_()

        task = board.host.sched.spawn("weather", weather)
        stop = vm.run(timeout=300)
        assert stop.kind == "exit", f"{stop}\n{vm.serial}"
        assert " 0 unexpected failures" in vm.serial, vm.serial
        assert vm.vmstat["pswpin"] > 5
        board.host.sched.run_until(lambda: task.done)


def test_kvm_counts_what_shadowing_costs() -> None:
    with refault.VM(memory="16M", mmu="shadow", check=True) as vm:
        vm.load("shadow-pt", "pages=8", "rounds=1", "spaces=5")
        assert vm.run(timeout=300).kind == "exit"
        stat = vm.stat
    for name in ("mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_unsync", "pf_guest", "invlpg",
                 "insn_emulation", "mmu_shadow_zapped"):
        assert stat[name] > 0, name
    assert stat["insn_emulation_fail"] == 0


def test_without_shadowing_the_same_guest_costs_none_of_it() -> None:
    with refault.VM(memory="16M", check=True) as vm:
        vm.load("shadow-pt", "pages=8", "rounds=1", "spaces=5")
        assert vm.run(timeout=300).kind == "exit"
        stat = vm.stat
    assert [name for name in ("mmu_pte_write", "mmu_unsync", "pf_guest", "invlpg") if stat[name]] == []
