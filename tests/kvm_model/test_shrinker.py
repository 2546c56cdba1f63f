"""mmu/shrinker.py: table pages of VMs in turn, in 5.10 only."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.shrinker import shrink_slab
from kvm_model import profile as kvm_profile
from kvm_model.kvm_main import Kvm
from kvm_model.mmu.shrinker import MmuShrinker
from tests.kvm_model.machine import BASE, PAGE, Machine, ScriptedCpu

FAR = 1 << 30


def shrinker_of(m: Machine) -> MmuShrinker:
    (found,) = m.host.shrinkers
    assert isinstance(found, MmuShrinker)
    return found


def test_6_18_has_none() -> None:
    assert Machine().host.shrinkers == []


def test_it_takes_tables_but_no_root_in_use_and_the_guest_reads_on() -> None:
    m = Machine(profile="linux-5.10")
    m.run(*(("w", gfn * PAGE, gfn) for gfn in range(8)))
    used = m.kvm.n_used_mmu_pages
    freed = m.do(lambda: shrinker_of(m).mmu_shrink_scan(100))
    assert freed == used - 1
    assert m.kvm.n_used_mmu_pages == 1
    assert m.kvm.stat["mmu_recycled"] == freed
    assert m.run(*(("r", gfn * PAGE) for gfn in range(8))) == list(range(8))
    m.truths.sweep()


def second_vm(m: Machine) -> Kvm:
    process = m.host.create_process("vmm2")
    profile = kvm_profile.PROFILES["linux-5.10"]
    kvm: Any = m.do(lambda: Kvm(m.host, process, ScriptedCpu(m.host), profile=profile))
    return kvm


def test_vms_are_asked_in_turn_and_those_without_pages_are_passed_over() -> None:
    m = Machine(profile="linux-5.10")
    other = second_vm(m)
    shrinker = shrinker_of(m)
    assert shrinker.vm_list == [other, m.kvm]
    m.run(("w", 0, 1))
    assert m.do(lambda: shrinker.mmu_shrink_scan(1)) == 0
    assert m.do(lambda: shrinker.mmu_shrink_scan(2)) >= 2
    assert shrinker.vm_list == [other, m.kvm]
    m.do(other.destroy)
    assert shrinker.vm_list == [m.kvm]


@pytest.mark.parametrize(("priority", "asked"), [(12, False), (0, True)])
def test_reclaim_asks_it_when_it_tries_hard(priority: int, asked: bool) -> None:
    m = Machine(profile="linux-5.10", slot=False)
    for n in range(16):
        m.do(lambda n=n: m.kvm.set_user_memory_region(n, n * FAR, PAGE, BASE + n * PAGE))
    m.run(*(("w", n * FAR, 1) for n in range(16)))
    assert shrinker_of(m).mmu_shrink_count() == m.kvm.n_used_mmu_pages == 2 + 2 * 16
    for _ in range(12):
        m.do(lambda: shrink_slab(m.host, 0, priority))
    assert (m.kvm.stat["mmu_recycled"] > 0) == asked
