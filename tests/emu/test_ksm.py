"""KSM behind running guests: it shows only in frames and refaults."""

from __future__ import annotations

import random

import pytest

import refault
from refault.scenarios.api import DATA_GPA, DATA_SIZE, PAGE
from refault.scenarios.emulator import EmulatorBackend

GPA = 0x30_0000
SAME = b"the same in both" * 256


def pfn(vm: refault.VM, gpa: int = GPA) -> int:
    return vm.board.vmm.present_pfn(vm.board.memory.hva(gpa))


def test_two_vms_share_a_frame_until_one_of_them_writes() -> None:
    host = refault.Host("32M", swap="16M", check=True)
    one, two = host.vm(memory="4M"), host.vm(memory="4M")
    for vm in (one, two):
        vm.write(GPA, SAME)
    with one.trace("refault:mmu_notifier_start", "ksm:*") as tr:
        assert one.host.ksm_merge(GPA, 1) == 0
        assert two.host.ksm_merge(GPA, 1) == 1
    assert pfn(one) == pfn(two) >= 0
    merges = [event for event in tr.trace().events if event.event == "ksm:ksm_merge_with_ksm_page"]
    assert [event.args["err"] for event in merges] == [0, 0]
    assert {event.task for event in merges} == {"ksmd"}
    assert one.board.vmm.ksm_stat()["ksm_merging_pages"] == 1
    two.write(GPA, b"two's own")
    assert pfn(one) != pfn(two)
    assert one.read(GPA, len(SAME)) == SAME
    for vm in (one, two):
        vm.close()


def test_zero_pages_merge_into_the_zero_page_and_unmerge_again() -> None:
    vm = refault.VM("4M", check=True)
    for page in range(8):
        vm.write(GPA + page * 4096, bytes(4096))
    assert vm.host.ksm_merge(GPA, 8, zero_pages=1) == 8
    assert pfn(vm) == vm.board.host.mm.zero_pfn
    assert vm.host.ksm_unmerge(GPA, 8) == 0
    assert len({pfn(vm, GPA + page * 4096) for page in range(8)}) == 8
    with pytest.raises(refault.KernelError):
        vm.host.ksm_merge(GPA, 8, zero_pages=2)
    vm.close()


@pytest.mark.parametrize("zero_pages", [False, True])
def test_a_guest_reads_what_it_wrote_while_its_pages_are_merged_and_parted(zero_pages: bool) -> None:
    rng = random.Random(zero_pages)
    backend = EmulatorBackend(check=True, host_ram="24M")
    pages = range(16)
    holds = dict.fromkeys(pages, 0)

    def store(page: int, value: int) -> None:
        assert backend.store(page * PAGE, value) == "ok"
        holds[page] = value

    def load(page: int) -> None:
        assert backend.load(page * PAGE) == holds[page]

    backend.mergeable(0, DATA_SIZE)
    for page in pages:
        backend.fill(page * PAGE, 0)
    mm = backend.vm.board.host.mm
    sharing = 0
    for _ in range(25):
        for _ in range(6):
            page = rng.choice(pages)
            rng.choice((load, lambda page: store(page, rng.randrange(3))))(page)
        backend.ksmd(zero_pages)
        sharing = max(sharing, mm.ksm.ksm_pages_sharing + mm.ksm.ksm_zero_pages)
        what = rng.choice(("", "", "UNMERGEABLE", "PAGEOUT", "fork", "migrate"))
        if what == "fork" and not backend.children:
            backend.fork()
        elif what == "migrate":
            backend.vm.host.migrate(DATA_GPA, len(pages))
        elif what in ("UNMERGEABLE", "PAGEOUT"):
            backend.madvise(0, DATA_SIZE, what)
            backend.mergeable(0, DATA_SIZE)
    for page in pages:
        load(page)
    assert sharing > 8
    assert mm.vmstat["cow_ksm"] > 8
    backend.close()


def test_a_guest_runs_to_its_end_beside_ksmd_and_the_weather() -> None:
    vm = refault.VM("8M", host_ram="12M", swap="32M", seed=3, check=True, params={"sched.strategy": "random"})
    vm.load("swap-storm", "mib=4", "weather=200000")
    while (stop := vm.run(max_insns=100_000)).kind == "limit":
        vm.host.ksm_merge(0, 0x800)
    assert (stop.kind, stop.status) == ("exit", 0)
    assert vm.board.host.mm.ksm.ksm_pages_scanned > 1000
    vm.close()
