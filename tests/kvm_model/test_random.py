"""Random guests, host operations and schedules: the truths hold and every load sees the last store."""

from __future__ import annotations

import random
from typing import Any

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmap import PROT_READ, PROT_WRITE
from host_mm.mprotect import do_mprotect
from host_mm.task_mmu import clear_refs_write
from kvm_model.vcpu import Vcpu
from kvm_model.x86 import kvm_arch_vcpu_ioctl_run
from tests.kvm_model.machine import BASE, PAGE, Machine

PAGES = 20


def _host_op(m: Machine, rng: random.Random) -> None:
    """One operation that keeps the guest's bytes."""
    first = rng.randrange(PAGES)
    hva, size = BASE + first * PAGE, rng.randint(1, min(4, PAGES - first)) * PAGE
    kind = rng.randrange(6)
    if kind == 0:
        do_madvise(m.mm, hva, size, MADV_PAGEOUT)
    elif kind == 1:
        do_mprotect(m.mm, hva, size, PROT_READ)
        do_mprotect(m.mm, hva, size, PROT_READ | PROT_WRITE)
    elif kind == 2:
        exit_process(fork_process(m.process))
    elif kind == 3:
        clear_refs_write(m.mm, rng.choice((1, 4)))
    elif kind == 4:
        m.kvm.set_user_memory_region(0, 0, PAGES * PAGE, BASE, 1)
        m.kvm.get_dirty_log(0)
        m.sched.yield_()
        m.kvm.get_dirty_log(0)
        m.kvm.set_user_memory_region(0, 0, PAGES * PAGE, BASE, 0)
    else:
        # A move there and back keeps the bytes; accesses meanwhile are served as MMIO below.
        m.kvm.set_user_memory_region(0, 1 << 30, PAGES * PAGE, BASE)
        m.kvm.set_user_memory_region(0, 0, PAGES * PAGE, BASE)
    m.sched.yield_()


def _guest(m: Machine, vcpu: Vcpu, rng: random.Random) -> None:
    """Each vCPU has its own words, so that it knows what its loads must see."""
    n = vcpu.vcpu_id
    words: dict[int, int] = {}
    out = m.cpu.out.setdefault(n, [])
    ops = m.cpu.ops.setdefault(n, [])
    for _ in range(150):
        gpa = rng.randrange(PAGES) * PAGE + 8 * (rng.randrange(64) * 2 + n)
        if rng.random() < 0.5:
            words[gpa] = rng.getrandbits(60)
            ops.append(("w", gpa, words[gpa]))
        else:
            ops.append(("r", gpa))
        out.clear()
        mmio = _to_the_end(m, vcpu, words)
        if out and not mmio:
            assert out[-1] == words.get(gpa, 0), f"vCPU {n} gpa {gpa:#x}"


def _to_the_end(m: Machine, vcpu: Vcpu, words: dict[int, int]) -> bool:
    mmio = False
    while True:
        exit_ = kvm_arch_vcpu_ioctl_run(vcpu)
        if exit_.kind == "mmio":
            # The slot was away: a store is lost, as on a real machine.
            mmio = True
            if exit_.write:
                words.pop(exit_.gpa, None)
                m.cpu.out[vcpu.vcpu_id].append(0)
                m.cpu.ops[vcpu.vcpu_id].append(("r", exit_.gpa))
                words[exit_.gpa] = _reread(m, vcpu)
            else:
                vcpu.complete_mmio(0)
        elif exit_.kind == "memory-fault":
            m.sched.yield_()
        else:
            assert exit_.kind == "hlt", exit_
            return mmio


def _reread(m: Machine, vcpu: Vcpu) -> int:
    """What the word holds after a store that went nowhere."""
    while True:
        exit_ = kvm_arch_vcpu_ioctl_run(vcpu)
        if exit_.kind == "hlt":
            return m.cpu.out[vcpu.vcpu_id][-1]
        if exit_.kind == "mmio":
            # Still away: leave the load and try again.
            m.cpu.ops[vcpu.vcpu_id].append(("r", exit_.gpa))
            vcpu.complete_mmio(0)
        m.sched.yield_()


def _storm(seed: int, breaks: tuple[str, ...] = (), **kw: Any) -> Machine:
    m = Machine(pages=PAGES, vcpus=2, seed=seed, breaks=breaks, **kw)
    rng = random.Random(seed)
    guests = [
        m.sched.spawn(f"vcpu{v.vcpu_id}", lambda v=v: _guest(m, v, random.Random(seed * 7 + v.vcpu_id)),
                      vcpu=v.vcpu_id)
        for v in m.vcpus
    ]
    m.finish(*guests, m.sched.spawn("host", lambda: [_host_op(m, rng) for _ in range(25)]))
    m.sched.set_strategy(None)
    return m


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_breaks_a_truth_or_loses_a_store(seed: int) -> None:
    m = _storm(seed, params={"kvm_intel.eptad": "0"} if seed % 3 == 0 else None)
    m.truths.sweep()
    m.truths.quiescent()
    m.do(m.kvm.destroy)


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
@pytest.mark.parametrize("seed", range(4))
def test_nor_does_any_without_the_tdp_mmu(seed: int, profile: str) -> None:
    params = {"kvm.tdp_mmu": "N"} | ({"kvm_intel.eptad": "0"} if seed % 3 == 0 else {})
    m = _storm(seed, params=params, profile=profile)
    m.truths.sweep()
    m.truths.quiescent()
    m.do(m.kvm.destroy)


def test_the_same_seed_gives_the_same_events() -> None:
    first, second = _storm(3), _storm(3)
    assert first.events == second.events


def test_random_schedules_find_a_missing_retry() -> None:
    def search() -> None:
        for seed in range(10):
            _storm(seed, ("no-retry",))

    with pytest.raises(BrokenTruth):
        search()
