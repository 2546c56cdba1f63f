"""In every form of dirty tracking, what vCPUs wrote since the last harvest is in the next one.

The oracle is the scripted CPU, which knows each page that a store reached. The log may name more: a page
that a load mapped writable counts as written where nothing else would tell KVM of its first write.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.madvise import MADV_HUGEPAGE, MADV_PAGEOUT, do_madvise
from host_mm.mmap import PROT_READ, PROT_WRITE
from host_mm.mprotect import do_mprotect
from host_mm.task_mmu import clear_refs_write
from tests.kvm_model.machine import BASE, PAGE, Machine
from tests.kvm_model.test_dirty_ring import harvest, ring_of

PML = {"kvm_intel.pml": "1"}
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "wrprot": ({}, 0),
    "wrprot-without-ad": ({"params": {"kvm_intel.eptad": "0"}}, 0),
    "pml": ({"params": PML}, 0),
    "manual": ({}, 1),
    "manual-pml": ({"params": PML}, 1),
    "initset": ({}, 3),
    "initset-pml": ({"params": PML}, 3),
    "initset-lazy-split": ({"params": {"kvm.eager_page_split": "N"}}, 3),
    "pml-lazy-split": ({"params": {**PML, "kvm.eager_page_split": "N"}}, 0),
    "ring": ({"dirty_ring": 256}, 0),
    "ring-pml": ({"dirty_ring": 1024, "params": PML}, 0),
    "wrprot-5.10": ({"profile": "linux-5.10"}, 0),
    "pml-5.10": ({"profile": "linux-5.10", "params": PML}, 0),
    "wrprot, direct": ({"params": {"kvm.tdp_mmu": "N"}}, 0),
    "pml, direct": ({"params": PML | {"kvm.tdp_mmu": "N"}}, 0),
    "pml-init-set, direct": ({"params": PML | {"kvm.tdp_mmu": "N"}}, 3),
    "ring, direct": ({"dirty_ring": 256, "params": {"kvm.tdp_mmu": "N"}}, 0),
}


class Harvester:
    """A VMM that reads the log in its form; `log` is what it has found since it was last emptied."""

    def __init__(self, m: Machine, manual: int) -> None:
        self.m = m
        self.manual = manual
        self.on = False
        self.log: set[int] = set()
        if manual:
            m.kvm.enable_cap(168, manual)

    def switch(self) -> None:
        self.on = not self.on
        self.m.kvm.set_user_memory_region(0, 0, self.m.pages * PAGE, BASE, int(self.on))

    def read(self) -> None:
        """One harvest; with manual protection all of what was found is cleared."""
        kvm = self.m.kvm
        if kvm.dirty_ring_size:
            self.rings()
            return
        bitmap = kvm.get_dirty_log(0)
        bits = int.from_bytes(bitmap, "little")
        self.log |= {n for n in range(self.m.pages) if bits >> n & 1}
        if self.manual:
            kvm.clear_dirty_log(0, 0, bitmap, self.m.pages)

    def rings(self) -> None:
        for n, vcpu in enumerate(self.m.vcpus):
            self.log |= set(harvest(self.m, n))
            assert ring_of(vcpu).used <= ring_of(vcpu).size
        self.m.kvm.reset_dirty_rings()

    def run(self, vcpu: int = 0) -> None:
        """Run a vCPU's operations to their end, serving full rings."""
        while True:
            exit_ = self.m.run_raw(vcpu=vcpu)
            if exit_.kind != "dirty-ring-full":
                assert exit_.kind == "hlt", exit_
                return
            self.m.do(self.rings)


def _guest(rng: random.Random, pages: int, count: int) -> list[tuple[Any, ...]]:
    ops: list[tuple[Any, ...]] = []
    for _ in range(count):
        gpa = rng.randrange(pages) * PAGE + 8 * rng.randrange(512)
        ops.append(("w", gpa, rng.getrandbits(60)) if rng.random() < 0.6 else ("r", gpa))
    return ops


def _host(m: Machine, rng: random.Random, pages: int) -> None:
    first = rng.randrange(pages)
    hva, size = BASE + first * PAGE, rng.randint(1, min(8, pages - first)) * PAGE
    kind = rng.randrange(4)
    if kind == 0:
        do_madvise(m.mm, hva, size, MADV_PAGEOUT)
    elif kind == 1:
        do_mprotect(m.mm, hva, size, PROT_READ)
        do_mprotect(m.mm, hva, size, PROT_READ | PROT_WRITE)
    elif kind == 2:
        exit_process(fork_process(m.process))
    else:
        clear_refs_write(m.mm, rng.choice((1, 4)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_every_page_written_since_the_last_harvest_is_in_the_next(form: str, seed: int) -> None:
    options, manual = FORMS[form]
    m = Machine(pages=64, vcpus=2, **options)
    vmm = Harvester(m, manual)
    rng = random.Random(seed)
    written: set[int] = set()
    for _ in range(60):
        step = rng.randrange(10)
        if step < 5:
            vcpu = rng.randrange(2)
            m.cpu.ops.setdefault(vcpu, []).extend(_guest(rng, m.pages, rng.randrange(1, 12)))
            m.cpu.written.clear()
            vmm.run(vcpu)
            if vmm.on:
                written |= m.cpu.written
        elif step < 7:
            m.do(lambda: _host(m, rng, m.pages))
        elif step < 9 and vmm.on:
            m.do(vmm.read)
            assert written <= vmm.log
            written.clear()
            vmm.log.clear()
        elif step == 9 and not (vmm.on and m.kvm.dirty_ring_size):
            # Rings stay as they are when logging ends; a VMM harvests them first.
            m.do(vmm.switch)
            written.clear()
            vmm.log.clear()
        m.truths.sweep()
    m.truths.quiescent()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_no_write_is_lost_while_vcpus_run_beside_the_harvest(form: str, seed: int) -> None:
    options, manual = FORMS[form]
    m = Machine(pages=64, vcpus=2, seed=seed, **options)
    vmm = Harvester(m, manual)
    m.do(vmm.switch)
    rng = random.Random(seed)
    m.cpu.written.clear()
    for vcpu in range(2):
        m.cpu.ops[vcpu] = _guest(rng, m.pages, 120)

    def beside() -> None:
        for _ in range(12):
            vmm.read() if rng.random() < 0.6 else _host(m, rng, m.pages)
            m.sched.yield_()

    tasks = [m.spawn(vcpu=vcpu) for vcpu in range(2)]
    m.finish(*tasks, m.sched.spawn("vmm", beside))
    m.sched.set_strategy(None)
    for vcpu in range(2):
        vmm.run(vcpu)
    m.do(vmm.read)
    assert m.cpu.written <= vmm.log
    assert not any(m.cpu.ops.values())
    m.truths.sweep()
    m.truths.quiescent()


def _huge(form: str) -> tuple[Machine, Harvester, Callable[[], int]]:
    options, manual = FORMS[form]
    pages = 1024
    m = Machine(pages=pages, ram=64 << 20, **options)
    m.do(lambda: do_madvise(m.mm, BASE, pages * PAGE, MADV_HUGEPAGE))
    for n in (0, 512):
        m.run(("w", n * PAGE, 1))
    return m, Harvester(m, manual), lambda: m.kvm.stat["pages_2m"]


@pytest.mark.parametrize("form", FORMS)
def test_huge_pages_are_logged_by_4k_and_come_back_when_logging_ends(form: str) -> None:
    m, vmm, huge = _huge(form)
    assert huge() == 2
    m.do(vmm.switch)
    if vmm.manual & 2:
        assert huge() == 2, "initially all set protects nothing"
        m.do(vmm.read)
        vmm.log.clear()
    eager = m.kvm.eager_page_split and m.kvm.tdp_mmu_enabled
    if eager:
        assert huge() == 0
    m.run(("w", 3 * PAGE, 2), ("r", 700 * PAGE), ("w", 600 * PAGE, 3))
    m.do(vmm.read)
    assert vmm.log == {3, 600}
    assert huge() == 0 or not eager
    m.do(vmm.switch)
    m.truths.sweep()
    # The TDP MMU maps huge at once, rmaps are only emptied for the next faults to do so.
    assert huge() == 2 or not m.kvm.tdp_mmu_enabled
    assert m.run(("r", 3 * PAGE), ("r", 600 * PAGE)) == [2, 3]
    assert huge() == 2
