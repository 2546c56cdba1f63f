"""The audit finds every kind of miscount (host_mm/truths.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.sched import Scheduler
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.page import get_page
from host_mm.page_alloc import GFP_KERNEL
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from trace_events.stream import TraceStream

PAGE = 4096
BASE = 0x10000000


def make() -> tuple[HostMm, Process]:
    """Two pages in RAM, two in swap, two that were only read."""
    stream = TraceStream()
    host = HostMm(Scheduler(stream), stream, ram_bytes=512 * PAGE, swap_bytes=64 * PAGE, checks=True)
    process = host.create_process("p")
    do_mmap(process.mm, BASE, 6 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)

    def body() -> None:
        for page in range(4):
            copy_to_user(process, BASE + page * PAGE, b"x")
        copy_from_user(process, BASE + 4 * PAGE, 2 * PAGE)
        host.lru.lru_add_drain()
        do_madvise(process.mm, BASE + 2 * PAGE, 2 * PAGE, MADV_PAGEOUT)
        host.swap_device.drain()

    host.sched.run_task("body", body)
    return host, process


def pfn_of(process: Process, page: int = 0) -> int:
    return pte_pfn(lookup_address_in_mm(process.mm, BASE + page * PAGE)[0])


def test_a_host_at_rest_passes() -> None:
    audit(make()[0])


def test_references_of_others_must_be_registered() -> None:
    host, process = make()
    pfn = host.allocator.alloc_pages(GFP_KERNEL)
    get_page(host, pfn_of(process))
    host.frame_holders.append(lambda: {pfn: 1, pfn_of(process): 1})
    audit(host)


def _leak(host: HostMm, process: Process) -> None:
    get_page(host, pfn_of(process))


def _leak_frame(host: HostMm, process: Process) -> None:
    host.allocator.alloc_pages(GFP_KERNEL)


def _mapcount(host: HostMm, process: Process) -> None:
    host.pages.mapcount[pfn_of(process)] += 1


def _rss(host: HostMm, process: Process) -> None:
    process.mm.rss[1] += 1


def _slot(host: HostMm, process: Process) -> None:
    assert host.swap is not None
    host.swap.swap_map[1] += 1


def _cache(host: HostMm, process: Process) -> None:
    assert host.swap is not None
    host.swap.cache[1] = 0


def _lost_slot(host: HostMm, process: Process) -> None:
    assert host.swap is not None
    host.swap.inuse_pages += 1


def _tlb(host: HostMm, process: Process) -> None:
    process.mm.tlb.fill(BASE, pfn_of(process) + 1, False)


def _tlb_rights(host: HostMm, process: Process) -> None:
    process.mm.tlb.fill(BASE + 4 * PAGE, pfn_of(process, 4), True)


def _list(host: HostMm, process: Process) -> None:
    host.lru.lru_add_drain_all()
    host.lru.lruvec(pfn_of(process)).lists[0].pop(pfn_of(process))


@pytest.mark.parametrize(
    ("harm", "truth"),
    [
        (_leak, "frame-refcount"), (_leak_frame, "frame-refcount"), (_mapcount, "frame-mapcount"),
        (_rss, "rss"), (_slot, "swap-count"), (_cache, "swap-cache"), (_lost_slot, "swap-count"),
        (_tlb, "tlb-stale"), (_tlb_rights, "tlb-stale"), (_list, "lru"),
    ],
)
def test_the_audit_finds_it(harm: Callable[[HostMm, Process], None], truth: str) -> None:
    host, process = make()
    harm(host, process)
    with pytest.raises(BrokenTruth) as caught:
        audit(host)
    assert caught.value.truth == truth
