"""Who translates by tables of his own does so in memory of huge pages as well."""

from __future__ import annotations

from typing import Protocol

import pytest

from emu.devices.rdma import RdmaDevice
from emu.devices.sva import SvaDevice
from emu.dune import Dune
from host_mm.fork import exit_process, fork_process
from host_mm.hmm import (
    HMM_PFN_FLAGS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HmmRange,
    hmm_pfn_to_map_order,
    hmm_range_fault,
)
from host_mm.hmm_mirror import HmmMirror
from host_mm.hugetlb_pool import set_max_huge_pages
from host_mm.interval_notifier import mmu_interval_read_begin
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, do_mmap
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, RW, make_host, run

HUGE = 2 << 20


class Translator(Protocol):
    def read(self, address: int, length: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...

    def close(self) -> None: ...


class _Rdma:
    def __init__(self, process: Process, base: int, *, pinned: bool) -> None:
        self.device = RdmaDevice(process.host, process)
        self.key = self.device.register(base, base, HUGE, pinned=pinned)

    def read(self, address: int, length: int) -> bytes:
        return self.device.dma_read(self.key, address, length)

    def write(self, address: int, data: bytes) -> None:
        self.device.dma_write(self.key, address, data)

    def close(self) -> None:
        self.device.close()


class _Dune:
    def __init__(self, process: Process) -> None:
        self.dune = Dune(process)
        self.read, self.write, self.close = self.dune.load, self.dune.store, self.dune.close


class _Sva:
    def __init__(self, process: Process) -> None:
        self.device = SvaDevice(process)
        self.read, self.write, self.close = self.device.read, self.device.write, self.device.unbind


def make(kind: str, process: Process, base: int) -> Translator:
    if kind == "dune":
        return _Dune(process)
    if kind == "sva":
        return _Sva(process)
    return _Rdma(process, base, pinned=kind == "pinned")


def huge_area() -> tuple[Process, int]:
    host = make_host(ram=32 << 20)
    run(host, lambda: set_max_huge_pages(host, 4))
    process = host.create_process("p")
    base = do_mmap(process.mm, 0, HUGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    return process, base


@pytest.mark.parametrize("kind", ["odp", "pinned", "dune", "sva"])
def test_one_memory_before_and_after_a_fork_and_after_the_process(kind: str) -> None:
    process, base = huge_area()
    host = process.host

    def body() -> None:
        who = make(kind, process, base)
        copy_to_user(process, base + 5 * PAGE, b"from the cpu")
        assert who.read(base + 5 * PAGE, 12) == b"from the cpu"
        who.write(base + 300 * PAGE, b"from it")
        assert copy_from_user(process, base + 300 * PAGE, 7) == b"from it"
        child = fork_process(process)
        who.write(base + 300 * PAGE, b"later")
        assert copy_from_user(child, base + 300 * PAGE, 7) == b"from it"
        assert copy_from_user(process, base + 300 * PAGE, 7) == b"laterit"
        exit_process(child)
        if kind != "pinned":
            do_madvise(process.mm, base, HUGE, MADV_DONTNEED)
            assert who.read(base + 300 * PAGE, 5) == bytes(5)
        audit(host)
        exit_process(process)
        who.close()

    run(host, body)
    run(host, host.quiesce)
    audit(host)


def test_hmm_says_of_each_page_how_much_the_cpus_entry_maps() -> None:
    process, base = huge_area()
    run(process.host, lambda: copy_to_user(process, base, b"x"))
    mirror = HmmMirror(process)
    mirror.open(base, HUGE)
    flags = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE
    range_ = HmmRange(mirror, base + 7 * PAGE, base + 10 * PAGE, default_flags=flags)
    range_.notifier_seq = mmu_interval_read_begin(mirror)
    assert hmm_range_fault(range_) == 0
    first = range_.hmm_pfns[0] & ~HMM_PFN_FLAGS
    assert [word & ~HMM_PFN_FLAGS for word in range_.hmm_pfns] == [first, first + 1, first + 2]
    assert {hmm_pfn_to_map_order(word) for word in range_.hmm_pfns} == {9}
    assert first & 511 == 7
